"""One batch in one transaction: dedup, lock, decide, save, record, and the bytes to publish afterwards.
No polling, publishing or offsets here (`batch_loop`), no service's state, no SQL but through `ledger` and `claims`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar
from uuid import UUID

import orjson

from factmesh import ids, ledger
from factmesh.deciding import Deciding as Deciding
from factmesh.deciding import Disturbed as Disturbed
from factmesh.deciding import Reserve
from factmesh.errors import ConflictError, ErrorClass, FactmeshError, Reason, StaleError, ValidationError, reason_of
from factmesh.handling import Change as Change
from factmesh.handling import Dead as Dead
from factmesh.handling import Handler as Handler
from factmesh.handling import Item, Outcome
from factmesh.ids import Root
from factmesh.message import Delivery, Message, pack, to_ms, unpack
from factmesh.postgres import Connection
from factmesh.verdict import Verdict, judge

S = TypeVar("S")

FUTURE_DAYS_MAX = 1
"""An id whose day lies further ahead than this was not made by a clock of ours."""


class SplitBatch(Exception):
    """These deliveries cannot be judged together; the loop halves the batch."""


@dataclass(frozen=True)
class Runner(Generic[S]):
    """Everything that handling one batch of one handler needs."""

    deciding: Deciding[S]
    audit_days: int

    @property
    def handler(self) -> Handler[S]:
        return self.deciding.handler

    @property
    def group(self) -> str:
        return self.deciding.group

    # --- before the transaction --------------------------------------------------------------------------------------

    def items(
        self,
        deliveries: Sequence[Delivery],
        now: datetime,
        failures: Mapping[str, BaseException] | None = None,
        error: BaseException | None = None,
    ) -> list[Item]:
        """Decode deliveries; `failures` are of those, by their coordinates, that cannot be, `error` is of all."""
        days = _Days(now, self.audit_days)
        if not failures:
            return [self._item(d, days, error) for d in deliveries]
        return [self._item(d, days, failures.get(d.where) or error) for d in deliveries]

    def _item(self, delivery: Delivery, days: _Days, error: BaseException | None) -> Item:
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
        opened = delivery.root_override if delivery.headers else None
        if message is not None and opened is None and message.id is not None:
            root = message.root
            if (root.id is message.id or root.id == message.id) and days.hold(message.id):
                return Item(delivery, message, None, root, root, 0, message.hash)
        return self._unusual(delivery, message, opened, days, error)

    def _unusual(
        self,
        delivery: Delivery,
        message: Message | None,
        opened: Root | None,
        days: _Days,
        error: BaseException | None,
    ) -> Item:
        """Poison, an opening, a stranger's message, or one that no day of the ledger holds."""
        opening = delivery.opening
        coordinates = Root.coordinates(delivery.topic, delivery.partition, delivery.offset)
        implausible = _implausible(delivery, message, opened, days)
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

    def days(self, items: Sequence[Item], now: datetime) -> list[UUID]:
        """Ids in every day that this batch may write to."""
        wanted = [ids.entrance_id("day", "", to_ms(now))]
        for item in items:
            if not item.beside:
                root = item.root.id
                if root is not None:
                    wanted.append(root)
                if item.own is not item.root and (own := item.own.id) is not None:
                    wanted.append(own)
        return wanted

    # --- the transaction ---------------------------------------------------------------------------------------------

    def may_be_fast(self, items: Sequence[Item]) -> bool:
        if not all(i.simple for i in items):
            return False
        if self.handler.projection:
            return all(i.root.id is not None for i in items)  # what has a row is found by its id
        return len({i.root.text for i in items}) == len(items)

    async def fast(self, conn: Connection, items: Sequence[Item], now: datetime, reserve: Reserve) -> Outcome:
        """All are taken for fresh; an id that is there raises a unique violation, and nothing of the batch stays."""
        if self.handler.projection:
            return await self._project(conn, items, now, reserve)
        strange: dict[str, UUID] = {}
        for item in items:
            item.ledger_id = ledger.candidate_id(item.root, now)
            if item.root.id is None:
                strange[item.root.text] = item.ledger_id
        await ledger.enter_fresh(conn, strange)
        outcome = await self.deciding.handle(conn, items, now, reserve, fresh=True)
        await ledger.insert(conn, map(_row, items))
        return outcome

    async def _project(self, conn: Connection, items: Sequence[Item], now: datetime, reserve: Reserve) -> Outcome:
        """A projection's batch without a ledger row: a repeat or a late message changes nothing by its own guard.

        Raises Disturbed where one has a row already (it died, or was handled beside one that did), or asks for more
        than the change of its object: a death, a discard, an effect, a note.
        """
        wanted = [i.root.id for i in items if i.root.id is not None]
        if await ledger.has_any(conn, wanted):
            raise Disturbed
        for item, id_ in zip(items, wanted, strict=True):
            item.ledger_id = id_
        return await self.deciding.handle(conn, items, now, reserve, fresh=True, plain_only=True)

    async def slow(self, conn: Connection, items: Sequence[Item], now: datetime, reserve: Reserve) -> Outcome:
        """Claim first, then judge, then handle what is to be handled: repeats, openings, poison and conflicts."""
        known = await self._claim(conn, items, now)
        repeats: dict[UUID, int] = {}
        told: dict[str, Item] = {}
        for item in items:
            self._judge(item, known, told, repeats)
        await self._file_beside(conn, [i for i in items if i.beside], known, repeats, now)
        live = [i for i in items if i.verdict not in (Verdict.REPEAT, Verdict.REPUBLISH)]
        outcome = await self.deciding.handle(conn, live, now, reserve)
        rows, forget = [_row(i) for i in live], []
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
                own = _row(item)._replace(id=own_id, root=_text(item.own), emitted=None, opening=opening)
                rows.append(own._replace(body_hash=item.hash))
        used = {r.id for r in rows}
        forget += [i for i in known.fresh if i not in used]
        await ledger.finish(conn, rows, forget=forget, seen=repeats)
        outcome.items = items
        outcome.emissions = [e for i in items for e in i.emissions]
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


class _Days:
    """Which ids the ledger has a day for, at one instant, as numbers: a date for each id costs more than its row."""

    __slots__ = ("audit_days", "first_ms", "latest_ms")

    def __init__(self, now: datetime, audit_days: int) -> None:
        self.audit_days = audit_days
        self.first_ms = ids.instant_ms_of(ids.first_id_of(now.date() - timedelta(days=audit_days)))
        self.latest_ms = to_ms(now + timedelta(days=FUTURE_DAYS_MAX))

    def hold(self, id_: UUID) -> bool:
        return self.first_ms <= id_.int >> 80 <= self.latest_ms


def _implausible(
    delivery: Delivery, message: Message | None, opened: Root | None, days: _Days
) -> FactmeshError | None:
    """Why the ledger has no day for one of its ids; a header may name any id, and days are tables."""
    where = message.where if message is not None else delivery.where
    named = [opened.id if opened is not None else None]
    named += [message.id, message.root.id] if message is not None else []
    for id_ in filter(None, named):
        if ids.instant_ms_of(id_) > days.latest_ms:
            return ValidationError(f"id {id_} lies in the future", where=where, hint="check the sender's clock")
        if not days.hold(id_):
            return StaleError(
                f"id {id_} is of {ids.day_of(id_)}, a day that the ledger no longer holds",
                where=where,
                hint=f"the audit period is {days.audit_days} days; start a new instance instead",
            )
    return None


def _row(item: Item) -> ledger.Row:
    assert item.ledger_id is not None
    delivery, message, error = item.delivery, item.message, item.error
    about = message.record.get if message is not None else _NOTHING.get
    if item.beside:
        root = _text(Root.coordinates(*item.order))
    else:
        root = None if item.root.id is not None else _text(item.root)
    return ledger.Row(
        item.ledger_id,
        root,
        item.opening,
        item.disposition,
        None if error is None else str(reason_of(error)),
        item.detail,
        delivery.topic,
        delivery.partition,
        delivery.offset,
        item.hash if item.opening == 0 or item.root.text == item.own.text else None,
        message.kind if message is not None else "",
        about("business_object_type"),
        about("business_object_id"),
        about("instance_id") or None,
        about("correlation_id"),
        about("cause_id"),
        about("actor"),
        _json(item.note) if item.note else None,
        pack(item.emissions),
    )


_NOTHING: Mapping[str, str] = {}


def _json(note: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(note, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a mapping that is no dict, a number above 64 bits
        return ids.canonical_json(dict(note))


def _text(root: Root) -> str | None:
    """The root as the ledger shows it: PostgreSQL refuses NUL, and the gate knows it by its hash anyway."""
    return None if root.id is not None else root.text.replace("\0", "\ufffd")


def is_conflict(item: Item) -> bool:
    """Whether it died of another body under its id."""
    return item.error is not None and reason_of(item.error) is Reason.CONFLICT
