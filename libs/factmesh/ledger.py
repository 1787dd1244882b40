"""The ledger: dedup, outbox, audit. The only place with SQL over the ledger's tables; `claims.sql` has the claims'.
Nothing is decided here: rows go in and out, set-based, inside transactions that the loops open.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from operator import attrgetter
from typing import NamedTuple
from uuid import UUID

from factmesh import ids
from factmesh.ids import Root
from factmesh.message import Delivery
from factmesh.postgres import Connection, load_sql
from factmesh.verdict import Seen

SQL = load_sql(__file__, "ledger.sql")

EMPTY_ROWS_MAX = 5000
"""Rows that one statement takes the emitted bytes from."""
COPY_ROWS_MIN = 12
"""From here on COPY costs less than as many inserts in one round trip, on both sides (measured)."""
_NUMBER_OF = attrgetter("id.int")


class Row(NamedTuple):
    """What the ledger will hold of one message: who, what, when, why, caused by what, causing what (B10).

    The fields are the table's columns, in the order in which every statement takes them.
    """

    id: UUID
    root: str | None
    opening: int
    disposition: str
    reason: str | None
    detail: str | None
    topic: str
    partition: int
    offset: int
    body_hash: bytes | None
    kind: str
    business_object_type: str | None = None
    business_object_id: str | None = None
    instance_id: str | None = None
    correlation_id: str | None = None
    cause_id: str | None = None
    actor: str | None = None
    note: bytes | None = None
    emitted: bytes | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the ledger held of one id before this transaction."""

    id: UUID
    opening: int
    disposition: str
    coordinates: tuple[str, int, int]
    body_hash: bytes | None
    emitted: bytes | None

    def seen(self, delivery: Delivery, body_hash: bytes) -> Seen:
        """As `verdict.judge` takes it, for this delivery."""
        here = (delivery.topic, delivery.partition, delivery.offset)
        return Seen(
            self.disposition,
            self.opening,
            self.coordinates == here,
            self.body_hash is None or self.body_hash == body_hash,
        )


@dataclass(slots=True)
class Known:
    """The ids of a batch: which are fresh in this transaction, and what was recorded of the others."""

    ids: dict[str, UUID]
    fresh: set[UUID] = field(default_factory=set)
    recorded: dict[UUID, Recorded] = field(default_factory=dict)


def candidate_id(root: Root, now: datetime) -> UUID:
    """The ledger id that a root gets if this is its first sight: its own, or one of this instant."""
    return root.id or ids.entrance_id("root", root.text, int(now.timestamp() * 1000))


async def enter_fresh(conn: Connection, roots: Mapping[str, UUID]) -> None:
    """Fast path: record first sight of roots that are no ids of ours. A repeat raises a unique violation."""
    if roots:
        hashes = [UUID(bytes=ids.gate_hash(text)) for text in roots]
        await conn.execute(SQL.gate_fresh, hashes, list(roots.values()))


async def insert(conn: Connection, rows: Iterable[Row]) -> None:
    """Fast path: whole rows, sorted so that two replicas cannot deadlock. A repeat raises a unique violation.

    Either way is one whole row a message; COPY costs a round trip more and a third as much a row (decision 13).
    """
    order = sorted(rows, key=_NUMBER_OF)
    if len(order) >= COPY_ROWS_MIN:
        await conn.copy_records_to_table("ledger", records=order, columns=Row._fields)
    elif order:
        await conn.executemany(SQL.insert_row, order)


async def has_any(conn: Connection, wanted: Sequence[UUID]) -> bool:
    """Whether one of these ids has a row."""
    return bool(await conn.fetchval(SQL.has_any, wanted))


async def resolve(conn: Connection, roots: Iterable[Root], now: datetime) -> dict[str, UUID]:
    """Slow path: the ledger id of each root by its text, entering those that the gate does not know yet."""
    known: dict[str, UUID] = {}
    strange: dict[UUID, Root] = {}
    for root in roots:
        own = root.id
        if own is not None:
            known[root.text] = own
        else:
            strange[UUID(bytes=ids.gate_hash(root.text))] = root
    if strange:
        await conn.execute(SQL.enter_gate, list(strange), [candidate_id(r, now) for r in strange.values()])
        for row in await conn.fetch(SQL.read_gate, list(strange)):
            known[strange[row["hash"]].text] = row["ledger_id"]
    return known


async def claim(conn: Connection, wanted: Mapping[UUID, Delivery], known: Known) -> None:
    """Slow path: take the ids that are fresh, lock and read the others; adds both to `known`. Sorted by id."""
    if not wanted:
        return
    order = sorted(wanted)
    rows = await conn.fetch(
        SQL.claim_rows,
        order,
        [wanted[i].topic for i in order],
        [wanted[i].partition for i in order],
        [wanted[i].offset for i in order],
    )
    fresh = {row["id"] for row in rows}
    known.fresh |= fresh
    there = [i for i in order if i not in fresh]
    if there:
        for row in await conn.fetch(SQL.read_rows, there):
            known.recorded[row["id"]] = Recorded(
                row["id"],
                row["opening"],
                row["disposition"],
                (row["topic"], row["partition"], row["offset"]),
                row["body_hash"],
                row["emitted"],
            )


async def finish(conn: Connection, rows: Sequence[Row], *, forget: Sequence[UUID], seen: Mapping[UUID, int]) -> None:
    """Slow path: write what became of the claimed and opened rows, let go of unused claims, count the repeats."""
    if rows:
        await conn.execute(SQL.finish_rows, *map(list, zip(*rows, strict=True)))
    if forget:
        await conn.execute(SQL.forget_rows, list(forget))
    if seen:
        order = sorted(seen)
        await conn.execute(SQL.raise_seen, order, [seen[i] for i in order])


async def mark(conn: Connection, root: str, disposition: str, reason: str, detail: str) -> int | None:
    """Change the disposition of an earlier message's row; its opening, or None where the row is gone."""
    own = Root(root).id
    if own is None:
        own = await conn.fetchval(SQL.mark_root, UUID(bytes=ids.gate_hash(root)))
        if own is None:
            return None
    opening: int | None = await conn.fetchval(SQL.mark_row, own, disposition, reason, detail)
    return opening


# --- days ------------------------------------------------------------------------------------------------------------


def partition_name(day: date) -> str:
    """The table of a day."""
    return f"ledger_{day:%Y%m%d}"


class Days:
    """Which days the ledger holds; makes those that a batch needs before its transaction begins."""

    def __init__(self) -> None:
        self._held: set[date] = set()

    def missing(self, wanted: Iterable[UUID]) -> set[date]:
        return {ids.day_of(i) for i in ids.one_of_each_day(wanted)} - self._held

    async def ensure(self, conn: Connection, days: Iterable[date]) -> None:
        for day in sorted(days):
            low, high = ids.first_id_of(day), ids.first_id_of(day + timedelta(days=1))
            await conn.execute(SQL.ensure_day, partition_name(day), low, high)
            self._held.add(day)


async def expire(
    conn: Connection, now: datetime, *, horizon_days: int, audit_days: int, emptied: set[str] | None = None
) -> list[str]:
    """Retention (DESIGN section 8): the gate and emitted bytes after the horizon, whole days after the audit period.

    Returns the partitions that were dropped. A day with a quarantined or unfinished row is kept. `emptied` remembers
    the days that hold no emitted bytes any more, so that the next call does not look through them all.
    """
    emptied = set() if emptied is None else emptied
    # A day more than the horizon: `occurred_at` may lie minutes ahead of the first sight, and two clocks judge.
    await conn.execute(SQL.gate_expire, horizon_days + 1)
    dropped = []
    first_kept = partition_name((now - timedelta(days=audit_days)).date())
    first_emitting = partition_name((now - timedelta(days=horizon_days)).date())
    for row in await conn.fetch(SQL.days):
        name = row["relname"]
        if name >= first_emitting:
            break
        day = datetime.strptime(name.removeprefix("ledger_"), "%Y%m%d").replace(tzinfo=UTC).date()
        low, high = ids.first_id_of(day), ids.first_id_of(day + timedelta(days=1))
        if name < first_kept and await conn.fetchval(SQL.day_is_free, low, high):
            await conn.execute(await conn.fetchval(SQL.drop_day_statement, name))
            dropped.append(name)
        elif name not in emptied:
            await _empty(conn, low, high)
            emptied.add(name)
    return dropped


async def _empty(conn: Connection, low: UUID, high: UUID) -> None:
    while True:
        rows = await conn.fetch(SQL.emitted_expire, low, high, EMPTY_ROWS_MAX)
        if len(rows) < EMPTY_ROWS_MAX:
            return
        low = max(row["id"] for row in rows)


async def alive(conn: Connection) -> None:
    """Return when the database serves."""
    await conn.execute(SQL.alive)


async def count_emitted_since(conn: Connection, since: datetime) -> int:
    """How many rows `emitted_since` will give."""
    return int(await conn.fetchval(SQL.count_emitted_since, since))


async def emitted_since(
    conn: Connection, since: datetime, after: tuple[datetime, UUID], limit: int
) -> list[tuple[datetime, UUID, bytes]]:
    """(handled at, id, packed emissions) of rows after `after`, at most `limit`, oldest first."""
    rows = await conn.fetch(SQL.emitted_since, since, after[0], after[1], limit)
    return [(r["handled_at"], r["id"], r["emitted"]) for r in rows]


# --- unclean stops ---------------------------------------------------------------------------------------------------


class ProcessMark:
    """Tells the next start whether this process stopped cleanly, by a row and an advisory lock of its connection."""

    def __init__(self, conn: Connection, name: str) -> None:
        self._conn = conn
        self._name = name
        self._key = int.from_bytes(os.urandom(7), "big")

    async def enter(self) -> bool:
        """Take the mark; True if another process of this schema died without leaving."""
        await self._conn.fetch(SQL.lock_process, self._key)
        async with self._conn.transaction():
            dead = await self._conn.fetch(SQL.dead_processes)
            await self._conn.execute(SQL.enter_process, self._key, self._name)
        return bool(dead)

    async def leave(self) -> None:
        """A clean stop."""
        await self._conn.execute(SQL.leave_process, self._key)


async def mark_attempt(conn: Connection, delivery: Delivery) -> int:
    """Count an attempt durably before the message is touched; how many there were, this one included."""
    attempts: int = await conn.fetchval(SQL.mark_attempt, delivery.topic, delivery.partition, delivery.offset)
    return attempts


async def clear_attempt(conn: Connection, delivery: Delivery) -> None:
    """The message is through."""
    await conn.execute(SQL.clear_attempt, delivery.topic, delivery.partition, delivery.offset)
