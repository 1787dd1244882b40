"""What a batch does between its claim and its record: load, fold, save, and what each decision asks for.
No verdict and no ledger row of the batch's own messages is made here (`batch`), no service's state, no polling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Generic, TypeVar
from uuid import UUID

import structlog

from factmesh import claims, dlq, ids, ledger, topics
from factmesh.effects import Amend, Discard, Effect, MarkLedger, Note, Publish, Schedule, Unschedule
from factmesh.emitting import Cause, Emitter, parked, released
from factmesh.errors import ErrorClass, FactmeshError, OnBehalf, StaleError
from factmesh.handling import Change, Dead, Handler, Item, Outcome, ids_of
from factmesh.ids import Root
from factmesh.message import Delivery, Emission, Message, unpack_delivery
from factmesh.postgres import Connection
from factmesh.telemetry import Hop, carried, messaging
from factmesh.verdict import Verdict

S = TypeVar("S")
log = structlog.get_logger("factmesh.batch")
Reserve = Callable[[str, int], int]
"""How many of so many rows of a claim kind this process may begin at once."""


class Disturbed(Exception):
    """Not every message of a projection's batch is plainly to be applied: the ledger must judge and record it."""


@dataclass(frozen=True)
class Deciding(Generic[S]):
    """Everything that deciding over the messages of one handler needs."""

    service: str
    group: str
    version: str
    handler: Handler[S]
    emitter: Emitter
    lease_s: Callable[[str], float]

    async def handle(
        self,
        conn: Connection,
        items: Sequence[Item],
        now: datetime,
        reserve: Reserve,
        *,
        fresh: bool = False,
        plain_only: bool = False,
    ) -> Outcome:
        """Decide over items that have their ledger ids, in order, and carry out what was asked for.

        With `fresh`, raises a unique violation where a row to begin at once is there already; with `plain_only`,
        Disturbed where a decision did more than change its object.
        """
        alive: list[tuple[Item, Message]] = []
        for item in items:
            self._enter(item)
            message = item.message
            if item.error is None and message is not None:
                if not message.instant_ms:
                    assert item.ledger_id is not None
                    message = item.message = replace(message, instant_ms=ids.instant_ms_of(item.ledger_id))
                alive.append((item, message))
        asked = _Asked()
        states = await self.handler.load(conn, [m for _, m in alive], now) if alive else {}
        changes = self._fold(alive, states, now, asked)
        if plain_only and (asked.rows or asked.marks or not all(i.plain for i in items)):
            raise Disturbed
        if changes:
            await self.handler.save(conn, changes)
        dead = [i for i in items if i.error is not None]
        if dead:
            for item in dead:
                self._bury(item, now)
            if self.handler.dead is not None:
                told = [Dead(i.delivery, i.message, i.error) for i in dead if i.error is not None]
                await self.handler.dead(conn, told)
        started = await self._carry_out(conn, asked, now, reserve, fresh) if asked.rows or asked.marks else []
        for item in items:
            if item.hop is not None:
                item.hop.note(**{"factmesh.disposition": item.disposition})
                if item.error is not None:
                    item.hop.fail(type(item.error).__qualname__)
                item.hop.end()
        return Outcome([e for i in items for e in i.emissions], started, asked.wake, items)

    def _enter(self, item: Item) -> None:
        """Go on with the message's trace; a span and its attributes only where it is sampled."""
        came = item.message.traceparent if item.message is not None else None
        item.traceparent, sampled = carried(came or item.delivery.header("traceparent"))
        if sampled:
            d = item.delivery
            about = messaging(d.topic, "process", d.partition, d.offset, self.group)
            item.hop = Hop(f"process {d.topic}", item.traceparent, "consumer", about | ids_of(item.message), drawn=True)
            item.traceparent = item.hop.traceparent

    def _fold(
        self, alive: Sequence[tuple[Item, Message]], states: Mapping[str, S], now: datetime, asked: _Asked
    ) -> list[Change[S]]:
        """Fold the fresh messages of each object in order. A message that dies leaves its object as it found it."""
        current: dict[str, S] = {}
        steps: dict[str, list[tuple[Message, Sequence[Effect]]]] = {}
        for item, message in alive:
            key = self.handler.key(message)
            state = current[key] if key in current else states.get(key)
            if state is None:
                state = self.handler.initial(message)
            try:
                after, effects = self.handler.decide(state, message, now)
                emissions = self._emissions(item, message, effects, now)
            except FactmeshError as error:
                if error.error_class is ErrorClass.TRANSIENT:
                    raise  # waiting cures it: the batch is tried again, and nothing is dead
                item.error = error
                continue
            except Exception as bug:
                # Frames only: the text and the locals of a bug may quote the payload (F5).
                _, text, frames = dlq.describe(bug)
                log.error("message.bug", where=item.delivery.where, id=str(message.id), error=text, stack=frames)
                item.error = bug
                continue
            item.emissions = emissions
            for effect in effects:
                match effect:
                    case Publish():
                        pass
                    case Note():
                        item.note = {**item.note, **effect.fields} if item.note else effect.fields
                    case Discard():
                        item.disposition, item.detail = "discarded", effect.reason
                    case MarkLedger():
                        asked.marks.append((item, effect))
                    case _:
                        asked.rows.append(effect)
            current[key] = after
            steps.setdefault(key, []).append((message, effects))
        return [Change(k, states.get(k), current[k], s) for k, s in steps.items()]

    def _cause(self, item: Item, message: Message | None) -> Cause:
        record = message.record if message is not None else {}
        root = Root.coordinates(*item.order).text if item.beside else item.root.text
        assert item.ledger_id is not None
        instant_ms = (message.instant_ms if message is not None else 0) or ids.instant_ms_of(item.ledger_id)
        return Cause(root, item.opening, instant_ms, item.own.text, record, item.traceparent)

    def _emissions(self, item: Item, message: Message, effects: Sequence[Effect], now: datetime) -> list[Emission]:
        """Encode what a decision publishes; what does not fit its topic kills the message here, before the commit."""
        publishes = [e for e in effects if isinstance(e, Publish)]
        # As the park found it: by the record, else by the key, which an opening restores.
        instance = (message.instance_id or self._instance_of_key(item.delivery)) if item.opening > 0 else None
        if instance is not None:
            publishes.append(released(ids.record_id(item.root.text, self.group), item.opening, instance))
        return self.emitter.emit_all(publishes, self._cause(item, message), now) if publishes else []

    def _bury(self, item: Item, now: datetime) -> None:
        """The record for the DLQ, and the park of the instance that the message is about."""
        error, message = item.error, item.message
        assert error is not None
        behalf = getattr(error, "on_behalf", None) or item.on_behalf(self.group)
        root, opening, group = (
            (behalf.root, behalf.opening, behalf.group)
            if behalf is not None
            else (item.root.text, item.opening, self.group)
        )
        if item.verdict is Verdict.CONFLICT and message is not None:
            root = item.own.text
        record = item.diagnosis()
        instance = (message.instance_id if message is not None else None) or self._instance_of_key(item.delivery)
        if instance is not None:
            record["instance_id"] = str(instance)
        letter = dlq.dead_letter(
            item.delivery,
            error,
            root=root,
            opening=opening,
            group=group,
            stage=f"{self.service}/{self.handler.name or 'main'}",
            first_failed_at=now,
            failed_at=now,
            service_version=self.version,
            attempts=item.attempts,
            record=record,
        )
        item.disposition, item.detail = "dead", letter.message
        emissions = [self.emitter.dead(letter)]
        if instance is not None and not _is_park_signal(message):
            signal = parked(letter, ids.record_id(root, group), instance)
            emissions.append(self.emitter.emit(signal, self._cause(item, message), 0, now))
        item.emissions = emissions

    def _instance_of_key(self, delivery: Delivery) -> UUID | None:
        topic = topics.topic_of(delivery.topic, self.emitter.namespace)
        if topic is None or not topic.key_is_instance or not delivery.key:
            return None
        try:
            return UUID(delivery.key.decode())
        except ValueError:
            return None

    async def _carry_out(
        self, conn: Connection, asked: _Asked, now: datetime, reserve: Reserve, fresh: bool
    ) -> list[claims.Claimed]:
        schedules = [r for r in asked.rows if isinstance(r, Schedule)]
        begin: list[Schedule] = []
        later = [s for s in schedules if not s.start_now]
        for kind in {s.kind for s in schedules if s.start_now}:
            wanted = [s for s in schedules if s.start_now and s.kind == kind]
            n = reserve(kind, len(wanted))
            begin += wanted[:n]
            later += wanted[n:]
        started = await claims.start(conn, begin, self.lease_s, fresh=fresh) if begin else []
        if later:
            await claims.schedule(conn, later)
            for s in later:
                due_at = s.due_at or now
                asked.wake[s.kind] = min(asked.wake.get(s.kind, due_at), due_at)
        await claims.unschedule(conn, [r for r in asked.rows if isinstance(r, Unschedule)])
        amends = [r for r in asked.rows if isinstance(r, Amend)]
        await claims.amend(conn, amends)
        for amend in amends:
            if amend.state == "pending":
                asked.wake[amend.kind] = now
        for item, mark in asked.marks:
            await self._mark(conn, item, mark, now)
        return started

    async def _mark(self, conn: Connection, item: Item, mark: MarkLedger, now: datetime) -> None:
        """An earlier message's row changes; one that dies now goes to its DLQ with this message's emissions."""
        opening = await ledger.mark(conn, mark.root, mark.disposition, mark.reason, mark.detail)
        if mark.disposition == "dead" and mark.original is not None:
            error = FactmeshError(mark.detail, reason=mark.reason, error_class=StaleError.error_class)
            behalf = mark.on_behalf or OnBehalf(mark.root, opening or 0, self.group)
            letter = dlq.dead_letter(
                unpack_delivery(mark.original),
                error,
                root=behalf.root,
                opening=behalf.opening,
                group=behalf.group,
                stage=f"{self.service}/{self.handler.name or 'main'}",
                first_failed_at=now,
                failed_at=now,
                service_version=self.version,
            )
            item.emissions = [*item.emissions, self.emitter.dead(letter)]


@dataclass(slots=True)
class _Asked:
    """Effects that are rows, collected over the batch."""

    rows: list[Effect] = field(default_factory=list)
    marks: list[tuple[Item, MarkLedger]] = field(default_factory=list)
    wake: dict[str, datetime] = field(default_factory=dict)


PARK_SIGNALS = frozenset({"message_parked", "message_released", "message_discarded"})


def _is_park_signal(message: Message | None) -> bool:
    """Quarantining one of these parks nothing, or parks would breed parks (DESIGN section 9)."""
    return message is not None and message.kind == "signal" and message.record.get("signal") in PARK_SIGNALS
