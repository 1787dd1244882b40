"""One batch in one transaction: dedup, lock, decide, save, record, and the bytes to publish afterwards.
No polling, publishing or offsets here (`batch_loop`), no service's state, no SQL but through `ledger` and `claims`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Generic, TypeVar
from uuid import UUID

import structlog

from factmesh import claims, dlq, ids, ledger, topics
from factmesh.effects import Amend, Discard, Effect, MarkLedger, Note, Publish, Schedule, Unschedule
from factmesh.emitting import Cause, Emitter, parked, released
from factmesh.errors import (
    ConflictError,
    ErrorClass,
    FactmeshError,
    OnBehalf,
    Reason,
    StaleError,
    ValidationError,
    reason_of,
)
from factmesh.handling import Change as Change
from factmesh.handling import Dead as Dead
from factmesh.handling import Handler as Handler
from factmesh.handling import Item, Outcome, ids_of
from factmesh.ids import Root
from factmesh.message import Delivery, Emission, Message, pack, to_ms, unpack, unpack_delivery
from factmesh.postgres import Connection
from factmesh.telemetry import Hop, messaging
from factmesh.verdict import Verdict, judge

S = TypeVar("S")
log = structlog.get_logger("factmesh.batch")

FUTURE_DAYS_MAX = 1
"""An id whose day lies further ahead than this was not made by a clock of ours."""


class SplitBatch(Exception):
    """These deliveries cannot be judged together; the loop halves the batch."""


class Disturbed(Exception):
    """Not every message of a projection's batch is plainly to be applied: the ledger must judge and record it."""


@dataclass(frozen=True)
class Runner(Generic[S]):
    """Everything that handling one batch of one handler needs."""

    service: str
    group: str
    version: str
    handler: Handler[S]
    emitter: Emitter
    audit_days: int
    reserve: Callable[[str, int], int]
    lease_s: Callable[[str], float]

    # --- before the transaction --------------------------------------------------------------------------------------

    def item(self, delivery: Delivery, now: datetime, error: BaseException | None = None) -> Item:
        """Decode one delivery; what cannot be decoded becomes poison, gated by its coordinates or its outer id."""
        message: Message | None = None
        if error is None:
            try:
                message = self.handler.decode(delivery)
            except FactmeshError as failure:
                if failure.error_class is ErrorClass.TRANSIENT:
                    raise
                error = failure
            except Exception as bug:
                error = bug
        opening = delivery.opening
        coordinates = Root.coordinates(delivery.topic, delivery.partition, delivery.offset)
        opened = delivery.root_override
        implausible = self._implausible(delivery, message, opened, now)
        if implausible is not None:
            # Its own day cannot hold it: the row lies under the coordinates, in the day of the delivery. Its numbers
            # go on counting under the root that was opened, or the record there would never be open again.
            raw = message.hash if message is not None else ids.body_hash(delivery.value or b"")
            error = error or implausible
            return Item(delivery, message, error, opened or coordinates, coordinates, opening, raw, beside=True)
        if message is None:
            own = self.handler.identify(delivery) or coordinates
            raw = ids.body_hash(delivery.value or b"")
            return Item(delivery, None, error, opened or own, own, opening, raw)
        own = Root.own(message.id) if message.id is not None else message.own or message.root
        return Item(delivery, message, error, message.root, own, opening, message.hash)

    def _implausible(
        self, delivery: Delivery, message: Message | None, opened: Root | None, now: datetime
    ) -> FactmeshError | None:
        """Why the ledger has no day for one of its ids; a header may name any id, and days are tables."""
        where = message.where if message is not None else delivery.where
        latest_ms = to_ms(now + timedelta(days=FUTURE_DAYS_MAX))
        named = [opened.id if opened is not None else None]
        named += [message.id, message.root.id] if message is not None else []
        for id_ in filter(None, named):
            if ids.instant_ms_of(id_) > latest_ms:
                return ValidationError(f"id {id_} lies in the future", where=where, hint="check the sender's clock")
            if ids.day_of(id_) < now.date() - timedelta(days=self.audit_days):
                return StaleError(
                    f"id {id_} is of {ids.day_of(id_)}, a day that the ledger no longer holds",
                    where=where,
                    hint=f"the audit period is {self.audit_days} days; start a new instance instead",
                )
        return None

    def days(self, items: Sequence[Item], now: datetime) -> set[UUID]:
        """Ids in every day that this batch may write to."""
        wanted = {ids.entrance_id("day", "", int(now.timestamp() * 1000))}
        for item in items:
            if not item.beside:
                wanted |= {i for i in (item.root.id, item.own.id) if i is not None}
        return wanted

    # --- the transaction ---------------------------------------------------------------------------------------------

    def may_be_fast(self, items: Sequence[Item]) -> bool:
        if not all(i.simple for i in items):
            return False
        if self.handler.projection:
            return all(i.root.id is not None for i in items)  # what has a row is found by its id
        return len({i.root.text for i in items}) == len(items)

    async def fast(self, conn: Connection, items: Sequence[Item], now: datetime) -> Outcome:
        """All are taken for fresh; an id that is there raises a unique violation, and nothing of the batch stays."""
        if self.handler.projection:
            return await self._project(conn, items, now)
        strange: dict[str, UUID] = {}
        for item in items:
            item.ledger_id = ledger.candidate_id(item.root, now)
            if item.root.id is None:
                strange[item.root.text] = item.ledger_id
        await ledger.enter_fresh(conn, strange)
        outcome = await self._handle(conn, items, now)
        await ledger.insert(conn, [self._row(i) for i in items])
        return outcome

    async def _project(self, conn: Connection, items: Sequence[Item], now: datetime) -> Outcome:
        """A projection's batch without a ledger row: a repeat or a late message changes nothing by its own guard.

        Raises Disturbed where one has a row already (it died, or was handled beside one that did), or asks for more
        than the change of its object: a death, a discard, an effect, a note.
        """
        wanted = [i.root.id for i in items if i.root.id is not None]
        if await ledger.has_any(conn, wanted):
            raise Disturbed
        for item, id_ in zip(items, wanted, strict=True):
            item.ledger_id = id_
        return await self._handle(conn, items, now, plain_only=True)

    async def slow(self, conn: Connection, items: Sequence[Item], now: datetime) -> Outcome:
        """Claim first, then judge, then handle what is to be handled: repeats, openings, poison and conflicts."""
        known = await self._claim(conn, items, now)
        repeats: dict[UUID, int] = {}
        told: dict[str, Item] = {}
        for item in items:
            self._judge(item, known, told, repeats)
        await self._file_beside(conn, [i for i in items if i.beside], known, repeats, now)
        live = [i for i in items if i.verdict not in (Verdict.REPEAT, Verdict.REPUBLISH)]
        outcome = await self._handle(conn, live, now)
        rows, forget = [self._row(i) for i in live], []
        for item in live:
            own_id = known.ids.get(item.own.text)
            if own_id is None or own_id == item.ledger_id or item.beside:
                continue
            if item.disposition == "dead" or item.verdict is not Verdict.HANDLE:
                forget.append(own_id)
            else:
                before = known.recorded.get(own_id)
                opening = before.opening if before is not None else 0
                # With its body: what comes later under this id with another one is a conflict, never a repeat (A4).
                own = replace(self._row(item), id=own_id, root=_text(item.own), emitted=None, opening=opening)
                rows.append(replace(own, body_hash=item.hash))
        used = {r.id for r in rows}
        forget += [i for i in known.fresh if i not in used]
        await ledger.finish(conn, rows, forget=forget, seen=repeats)
        outcome.items = items
        outcome.emissions = [e for i in sorted(items, key=lambda i: i.order) for e in i.emissions]
        return outcome

    async def _claim(self, conn: Connection, items: Sequence[Item], now: datetime) -> ledger.Known:
        roots = {r.text: r for i in items for r in (i.root, i.own) if not i.beside}
        known = ledger.Known(await ledger.resolve(conn, roots.values(), now))
        wanted: dict[UUID, Delivery] = {}
        for item in items:
            if not item.beside:
                for root in (item.root, item.own):
                    wanted.setdefault(known.ids[root.text], item.delivery)
        await ledger.claim(conn, wanted, known)
        return known

    def _judge(self, item: Item, known: ledger.Known, told: dict[str, Item], repeats: dict[UUID, int]) -> None:
        if item.beside:
            return
        root_id, own_id = known.ids[item.root.text], known.ids[item.own.text]
        item.ledger_id = root_id
        first = told.get(item.root.text) or told.get(item.own.text)
        if first is not None:
            # Folded inside the batch: only the plain repeat; anything subtler is judged in a batch of its own.
            if (first.opening, first.root, first.own) != (item.opening, item.root, item.own):
                raise SplitBatch
            item.verdict = Verdict.REPEAT if first.hash == item.hash else Verdict.CONFLICT
            if item.verdict is Verdict.CONFLICT and item.opening > 0:
                raise SplitBatch
        else:
            root_row, own_row = known.recorded.get(root_id), known.recorded.get(own_id)
            seen = [r.seen(item.delivery, item.hash) if r is not None else None for r in (root_row, own_row)]
            item.verdict = judge(item.opening, seen[0], seen[1])
            if item.verdict is Verdict.REPUBLISH and root_row is not None:
                item.emissions = list(unpack(root_row.emitted))
        if item.verdict in (Verdict.REPEAT, Verdict.REPUBLISH):
            repeats[root_id] = repeats.get(root_id, 0) + 1
        elif item.verdict is Verdict.HANDLE:
            told[item.root.text] = told[item.own.text] = item
        elif item.verdict is Verdict.CONFLICT:
            item.error = ConflictError(
                "the same id came with another body",
                where=item.message.where if item.message else item.delivery.where,
                hint="correct and replay it, or discard it; the first body stays in force",
            )
            item.beside = True
        else:
            item.error = ConflictError(
                f"opening {item.opening} came for a message that is done already",
                where=item.message.where if item.message else item.delivery.where,
                hint="discard the record; what its sender meant besides, it sends under an id of its own",
            )
            item.beside = item.verdict is Verdict.REFUSE_BESIDE

    async def _file_beside(
        self,
        conn: Connection,
        items: Sequence[Item],
        known: ledger.Known,
        repeats: dict[UUID, int],
        now: datetime,
    ) -> None:
        """Rows under coordinates, for what may not touch the row of its root. A redelivery finds its row there."""
        if not items:
            return
        here = {Root.coordinates(*i.order).text: i for i in items}
        found = ledger.Known(await ledger.resolve(conn, [Root(t) for t in here], now))
        await ledger.claim(conn, {found.ids[t]: i.delivery for t, i in here.items()}, found)
        for text, item in here.items():
            item.ledger_id = found.ids[text]
            recorded = found.recorded.get(item.ledger_id)
            if recorded is not None:
                item.verdict = Verdict.REPUBLISH
                item.emissions = list(unpack(recorded.emitted))
                repeats[item.ledger_id] = repeats.get(item.ledger_id, 0) + 1
        known.ids.update(found.ids)
        known.fresh |= found.fresh

    # --- deciding ----------------------------------------------------------------------------------------------------

    async def _handle(
        self, conn: Connection, items: Sequence[Item], now: datetime, *, plain_only: bool = False
    ) -> Outcome:
        alive: list[tuple[Item, Message]] = []
        for item in items:
            assert item.ledger_id is not None
            message = item.message
            if item.error is not None or message is None:
                continue
            if not message.instant_ms:
                message = item.message = replace(message, instant_ms=ids.instant_ms_of(item.ledger_id))
            alive.append((item, message))
        for item in items:
            name = f"process {item.delivery.topic}"
            about = messaging(
                item.delivery.topic, "process", item.delivery.partition, item.delivery.offset, self.group
            )
            traceparent = (item.message.traceparent if item.message else None) or item.delivery.header("traceparent")
            item.hop = Hop(name, traceparent, "consumer", about | ids_of(item.message))
        asked = _Asked()
        states = await self.handler.load(conn, [m for _, m in alive], now) if alive else {}
        changes = self._fold(alive, states, now, asked)
        if plain_only and (asked.rows or asked.marks or not all(i.plain for i in items)):
            raise Disturbed
        if changes:
            await self.handler.save(conn, changes)
        for item in items:
            if item.error is not None:
                self._bury(item, now)
        dead = [Dead(i.delivery, i.message, i.error) for i in items if i.error is not None]
        if dead and self.handler.dead is not None:
            await self.handler.dead(conn, dead)
        started = await self._carry_out(conn, asked, now)
        for item in items:
            if item.hop is not None:
                item.hop.note(**{"factmesh.disposition": item.disposition})
                if item.error is not None:
                    item.hop.fail(type(item.error).__qualname__)
                item.hop.end()
        emissions = [e for i in sorted(items, key=lambda i: i.order) for e in i.emissions]
        return Outcome(emissions, started, asked.wake, items)

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
                if isinstance(effect, Discard):
                    item.disposition, item.detail = "discarded", effect.reason
                elif isinstance(effect, Note):
                    item.note = {**(item.note or {}), **effect.fields}
                elif isinstance(effect, MarkLedger):
                    asked.marks.append((item, effect))
                elif not isinstance(effect, Publish):
                    asked.rows.append(effect)
            current[key] = after
            steps.setdefault(key, []).append((message, effects))
        return [Change(k, states.get(k), current[k], s) for k, s in steps.items()]

    def _cause(self, item: Item, message: Message | None) -> Cause:
        record = message.record if message is not None else {}
        hop = item.hop.traceparent if item.hop is not None else None
        root = Root.coordinates(*item.order).text if item.beside else item.root.text
        assert item.ledger_id is not None
        instant_ms = message.instant_ms if message is not None else 0
        return Cause(root, item.opening, instant_ms or ids.instant_ms_of(item.ledger_id), item.own.text, record, hop)

    def _emissions(self, item: Item, message: Message, effects: Sequence[Effect], now: datetime) -> list[Emission]:
        """Encode what a decision publishes; what does not fit its topic kills the message here, before the commit."""
        cause = self._cause(item, message)
        out = [
            self.emitter.emit(publish, cause, ordinal, now)
            for ordinal, publish in enumerate(e for e in effects if isinstance(e, Publish))
        ]
        # As the park found it: by the record, else by the key, which an opening restores.
        instance = (message.instance_id or self._instance_of_key(item.delivery)) if item.opening > 0 else None
        if instance is not None:
            signal = released(ids.record_id(item.root.text, self.group), item.opening, instance)
            out.append(self.emitter.emit(signal, cause, len(out), now))
        return out

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
        item.emissions = [self.emitter.dead(letter)]
        if instance is not None and not _is_park_signal(message):
            signal = parked(letter, ids.record_id(root, group), instance)
            item.emissions.append(self.emitter.emit(signal, self._cause(item, message), 0, now))

    def _instance_of_key(self, delivery: Delivery) -> UUID | None:
        topic = topics.topic_of(delivery.topic, self.emitter.namespace)
        if topic is None or not topic.key_is_instance or not delivery.key:
            return None
        try:
            return UUID(delivery.key.decode())
        except ValueError:
            return None

    async def _carry_out(self, conn: Connection, asked: _Asked, now: datetime) -> list[claims.Claimed]:
        schedules = [r for r in asked.rows if isinstance(r, Schedule)]
        begin: list[Schedule] = []
        later = [s for s in schedules if not s.start_now]
        for kind in {s.kind for s in schedules if s.start_now}:
            wanted = [s for s in schedules if s.start_now and s.kind == kind]
            n = self.reserve(kind, len(wanted))
            begin += wanted[:n]
            later += wanted[n:]
        started = await claims.start(conn, begin, self.lease_s) if begin else []
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
            item.emissions.append(self.emitter.dead(letter))

    def _row(self, item: Item) -> ledger.Row:
        assert item.ledger_id is not None
        record = item.message.record if item.message is not None else {}
        root = Root.coordinates(*item.order) if item.beside else item.root
        return ledger.Row(
            id=item.ledger_id,
            root=_text(root),
            opening=item.opening,
            disposition=item.disposition,
            delivery=item.delivery,
            kind=item.message.kind if item.message is not None else "",
            body_hash=item.hash if item.opening == 0 or item.root.text == item.own.text else None,
            reason=str(reason_of(item.error)) if item.error is not None else None,
            detail=item.detail,
            business_object_type=record.get("business_object_type"),
            business_object_id=record.get("business_object_id"),
            instance_id=item.message.instance_id if item.message is not None else None,
            correlation_id=record.get("correlation_id"),
            cause_id=record.get("cause_id"),
            actor=record.get("actor"),
            note=ids.canonical_json(dict(item.note)) if item.note else None,
            emitted=pack(item.emissions),
        )


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


def _text(root: Root) -> str | None:
    """The root as the ledger shows it: PostgreSQL refuses NUL, and the gate knows it by its hash anyway."""
    return None if root.id is not None else root.text.replace("\0", "\ufffd")


def is_conflict(item: Item) -> bool:
    """Whether it died of another body under its id."""
    return item.error is not None and reason_of(item.error) is Reason.CONFLICT
