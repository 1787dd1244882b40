"""The claims table: rows with a due time that some replica claims, works on and settles under a lease epoch.
The only place with its SQL; the loop around it is `claim_loop`, what the rows mean is their service's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh.effects import Amend, Schedule, Unschedule
from factmesh.errors import IllegalTransitionError
from factmesh.postgres import Connection, Record, load_sql

SQL = load_sql(__file__, "claims.sql")

#: How long a settled row waits before another replica publishes its outcome again.
PUBLISH_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row that this process holds until its lease ends.

    Attributes:
        epoch: settlements count only from the current one.
        attempts: the number of this attempt; 1 is the first.
        interrupted: an earlier lease ended without a settlement: what that attempt did is unknown.
        claimed_at: when, by PostgreSQL's clock, which judges leases.
        lease_ends: when to stop, in this process's monotonic seconds, counted from before the claim was sent.
        last_lease_ended_at: when the lease before this one ended, settled or lost.
        hand: the `Schedule`'s, where this process has just written the row that it starts; None on every other.
    """

    id: UUID
    kind: str
    epoch: int
    attempts: int
    interrupted: bool
    payload: bytes
    progress: bytes | None
    created_at: datetime
    claimed_at: datetime
    lease_ends: float
    last_lease_ended_at: datetime | None = None
    tag: UUID | None = None
    hand: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A row as a message's decision sees it, locked. `at` is PostgreSQL's instant of looking."""

    id: UUID
    kind: str
    state: str
    epoch: int
    attempts: int
    payload: bytes
    progress: bytes | None
    created_at: datetime
    settled_at: datetime | None
    lease_ended_at: datetime | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Unpublished:
    """A settled row whose outcome is not known to be published."""

    id: UUID
    epoch: int
    outcome: bytes | None


@dataclass(frozen=True, slots=True)
class Settled:
    """A settlement as the table takes it."""

    id: UUID
    epoch: int
    state: str
    due_at: datetime | None
    progress: bytes | None
    outcome: bytes | None


async def schedule(conn: Connection, rows: Sequence[Schedule]) -> None:
    """Rows to work on when they are due."""
    await conn.execute(
        SQL.schedule,
        [r.id for r in rows],
        [r.kind for r in rows],
        [r.due_at for r in rows],
        [r.tag for r in rows],
        [r.payload for r in rows],
    )


async def start(conn: Connection, rows: Sequence[Schedule], lease_s: Callable[[str], float]) -> list[Claimed]:
    """Rows inserted already claimed by this process; only those returned are its to work on.

    `lease_ends` is left 0: whoever opened the transaction knows when the lease began on its own clock.
    """
    out = []
    for kind in {r.kind for r in rows}:
        of_kind = [r for r in rows if r.kind == kind]
        got = await conn.fetch(
            SQL.start,
            [r.id for r in of_kind],
            [r.kind for r in of_kind],
            [r.tag for r in of_kind],
            [r.payload for r in of_kind],
            lease_s(kind),
        )
        hands = {r.id: r.hand for r in of_kind}
        out += [claimed(row, False, 0.0, hands.get(row["id"])) for row in got]
    return out


def claimed(row: Record, interrupted: bool, lease_ends: float, hand: Any = None) -> Claimed:
    """A returned row as the loop hands it to its worker."""
    return Claimed(
        row["id"],
        row["kind"],
        row["epoch"],
        row["attempts"],
        interrupted,
        row["payload"],
        row["progress"],
        row["created_at"],
        row["claimed_at"],
        lease_ends,
        row["lease_ended_at"],
        row["tag"],
        hand,
    )


async def unschedule(conn: Connection, rows: Sequence[Unschedule]) -> None:
    """Take rows back that are not settled."""
    for kind in {r.kind for r in rows}:
        await conn.execute(SQL.unschedule, kind, [r.id for r in rows if r.kind == kind])


async def amend(conn: Connection, rows: Sequence[Amend]) -> None:
    """Settle rows by a person's word. Raises IllegalTransitionError where a row is not in the expected state.

    The decision saw the row under its lock, so that can only be a wrong decision; nothing of the batch stays.
    """
    if not rows:
        return
    got = await conn.fetch(
        SQL.amend,
        [r.id for r in rows],
        [r.kind for r in rows],
        [r.expected for r in rows],
        [r.state for r in rows],
        [r.progress for r in rows],
    )
    missing = {r.id for r in rows} - {row["id"] for row in got}
    if missing:
        raise IllegalTransitionError(f"rows {sorted(map(str, missing))} were not in the state that was decided from")


async def lock(conn: Connection, ids: Sequence[UUID]) -> Mapping[UUID, ClaimRow]:
    """Rows that messages are about, locked until the transaction ends."""
    return {
        row["id"]: ClaimRow(
            row["id"],
            row["kind"],
            row["state"],
            row["epoch"],
            row["attempts"],
            row["payload"],
            row["progress"],
            row["created_at"],
            row["settled_at"],
            row["lease_ended_at"],
            row["at"],
        )
        for row in await conn.fetch(SQL.lock, list(ids))
    }


async def claim_due(
    conn: Connection, kind: str, limit: int, lease_s: float, lease_ends: float
) -> tuple[list[Claimed], list[Unpublished]]:
    """Due rows, now this process's: those to work on, and settled ones to publish again."""
    work, outcomes = [], []
    for row in await conn.fetch(SQL.claim_due, kind, limit, lease_s):
        if row["was"] in ("pending", "leased"):
            work.append(claimed(row, row["was"] == "leased", lease_ends))
        else:
            outcomes.append(Unpublished(row["id"], row["epoch"], row["outcome"]))
    return work, outcomes


async def next_due_s(conn: Connection, kind: str) -> float | None:
    """Seconds until the next row of a kind is due; None for none."""
    seconds: float | None = await conn.fetchval(SQL.next_due, kind)
    return seconds


async def lock_leased(conn: Connection, rows: Sequence[Claimed]) -> set[UUID]:
    """Which of these rows are still held under the same epoch, locked until the transaction ends."""
    order = sorted(rows, key=lambda r: r.id)
    got = await conn.fetch(SQL.lock_leased, [r.id for r in order], [r.epoch for r in order])
    return {row["id"] for row in got}


async def settle(conn: Connection, rows: Sequence[Settled]) -> set[UUID]:
    """Write settlements; only those returned counted, and only their outcomes may be published."""
    got = await conn.fetch(
        SQL.settle,
        [r.id for r in rows],
        [r.epoch for r in rows],
        [r.state for r in rows],
        [r.due_at for r in rows],
        [r.progress for r in rows],
        [r.outcome for r in rows],
        PUBLISH_GRACE_S,
    )
    return {row["id"] for row in got}


async def mark_published(conn: Connection, rows: Sequence[tuple[UUID, int]]) -> None:
    """The outcomes of these (id, epoch) are acknowledged."""
    if rows:
        order = sorted(rows)
        await conn.execute(SQL.mark_published, [i for i, _ in order], [e for _, e in order])


async def release(conn: Connection, rows: Sequence[Claimed]) -> None:
    """Give back what was not begun."""
    if rows:
        await conn.execute(
            SQL.release, [r.id for r in rows], [r.epoch for r in rows], [r.interrupted for r in rows]
        )


async def counts(conn: Connection) -> list[tuple[str, str, int, float | None]]:
    """(kind, state, how many, seconds the oldest due one has waited)."""
    return [(r["kind"], r["state"], r["n"], r["late_s"]) for r in await conn.fetch(SQL.counts)]


async def expire(conn: Connection, horizon_days: int) -> None:
    """Settled rows live for the horizon."""
    await conn.execute(SQL.expire, horizon_days)


async def count_outcomes_since(conn: Connection, since: datetime) -> int:
    """How many rows `outcomes_since` will give."""
    return int(await conn.fetchval(SQL.count_outcomes_since, since))


async def outcomes_since(
    conn: Connection, since: datetime, after: tuple[datetime, UUID], limit: int
) -> list[tuple[datetime, UUID, bytes]]:
    """(settled at, id, packed emissions) of settlements after `after`, at most `limit`, oldest first."""
    rows = await conn.fetch(SQL.outcomes_since, since, after[0], after[1], limit)
    return [(r["settled_at"], r["id"], r["outcome"]) for r in rows]
