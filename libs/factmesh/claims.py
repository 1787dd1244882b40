"""The claims table: rows with a due time that some replica claims, works on and settles under a lease epoch.
The only place with its SQL; the loop around it is `claim_loop`, what the rows mean is their service's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from factmesh.effects import Amend, Schedule, Unschedule
from factmesh.errors import IllegalTransitionError
from factmesh.postgres import Connection, Record, load_sql

SQL = load_sql(__file__, "claims.sql")

#: How long settled outcomes wait for their mark before any replica publishes them again.
PUBLISH_GRACE_S = 15.0
#: Batches that one look takes over: each holds as many outcomes as are settled together at most.
UNPUBLISHED_MAX = 4


@dataclass(slots=True)
class Claimed:
    """A row that this process holds until its lease ends; treat it as read-only. Not frozen: made once for each row.

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
    """What was settled together and is not known to be published, as `message.pack` packed it for each row."""

    batch: int
    outcomes: Sequence[bytes]


@dataclass(slots=True)
class Settled:
    """A settlement as the table takes it."""

    id: UUID
    epoch: int
    state: str
    due_at: datetime | None
    progress: bytes | None
    outcome: bytes | None


@dataclass(frozen=True, slots=True)
class Written:
    """What a settling statement did. `counted`: the (id, epoch) that counted, None for all; `batch`: to be marked."""

    batch: int | None
    counted: frozenset[tuple[UUID, int]] | None


@dataclass(frozen=True, slots=True)
class Along:
    """An INSERT that is written by the settling statement: what a kind saves of its attempts.

    It must take only what counts: rows whose (id, epoch) stands in the table `counted`, in the form
    `WHERE ((s.id, s.epoch) IN (TABLE counted)) IS TRUE`, which is looked up by hash, not joined row by row.
    """

    sql: str
    args: Sequence[Any]


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


async def start(
    conn: Connection, rows: Sequence[Schedule], lease_s: Callable[[str], float], *, fresh: bool = False
) -> list[Claimed]:
    """Rows inserted already claimed by this process; only those returned are its to work on.

    `fresh`: no row with such an id should be there; a unique violation is raised for one that is. `lease_ends` is left
    0: whoever opened the transaction knows when the lease began on its own clock.
    """
    out = []
    for kind in {r.kind for r in rows}:
        of_kind = [r for r in rows if r.kind == kind]
        got = await conn.fetch(
            SQL.start_fresh if fresh else SQL.start,
            [r.id for r in of_kind],
            kind,
            [r.tag for r in of_kind],
            [r.payload for r in of_kind],
            lease_s(kind),
        )
        if fresh:
            at = got[0]["claimed_at"]
            out += [_started(r, 1, at, at) for r in of_kind]
        else:
            by_id = {r.id: r for r in of_kind}
            out += [_started(by_id[g["id"]], g["epoch"], g["created_at"], g["claimed_at"]) for g in got]
    return out


def _started(row: Schedule, epoch: int, created_at: datetime, claimed_at: datetime) -> Claimed:
    """A row that starts, or starts over: nothing of an earlier life is left in it."""
    return Claimed(
        row.id, row.kind, epoch, 1, False, row.payload, None, created_at, claimed_at, 0.0, None, row.tag, row.hand
    )


def _claimed(row: Record, lease_ends: float) -> Claimed:
    """A returned row as the loop hands it to its worker."""
    return Claimed(
        row["id"],
        row["kind"],
        row["epoch"],
        row["attempts"],
        row["was"] == "leased",
        row["payload"],
        row["progress"],
        row["created_at"],
        row["claimed_at"],
        lease_ends,
        row["lease_ended_at"],
        row["tag"],
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


async def claim_due(conn: Connection, kind: str, limit: int, lease_s: float, lease_ends: float) -> list[Claimed]:
    """Due rows, now this process's to work on."""
    return [_claimed(row, lease_ends) for row in await conn.fetch(SQL.claim_due, kind, limit, lease_s)]


async def next_due_s(conn: Connection, kind: str, ours: Collection[int]) -> float | None:
    """Seconds until a row of a kind is due, or a batch of outcomes besides `ours`; None for nothing."""
    seconds: float | None = await conn.fetchval(SQL.next_due, kind, list(ours))
    return seconds


_SETTLE_ARGS = 9


@lru_cache(maxsize=64)  # one a kind
def _settle_with(sql: str) -> str:
    """`settle` with another INSERT in it, whose parameters follow its own."""
    if "(TABLE counted)" not in sql:
        raise ValueError(f"what rides with a settlement must ask what counts: {sql}")
    moved = re.sub(r"\$(\d+)", lambda m: f"${int(m[1]) + _SETTLE_ARGS}", sql)
    return SQL.settle.replace("/* along */", f", along AS (\n{moved}\n)")


async def settle(
    conn: Connection,
    kind: str,
    rows: Sequence[Settled],
    published: Sequence[int] = (),
    along: Along | None = None,
) -> Written:
    """Write settlements of one kind; only what counted may be published. `published`: batches to mark with it."""
    order = sorted(rows, key=lambda r: r.id.int)  # so that two statements lock in one order
    got = await conn.fetchrow(
        SQL.settle if along is None else _settle_with(along.sql),
        [r.id for r in order],
        [r.epoch for r in order],
        [r.state for r in order],
        [r.due_at for r in order],
        [r.progress for r in order],
        [r.outcome for r in order],
        kind,
        PUBLISH_GRACE_S,
        published,
        *(() if along is None else along.args),
    )
    assert got is not None, "an aggregate without GROUP BY gives a row"
    counted = got["counted"]
    return Written(got["batch"], None if counted is None else frozenset(zip(counted, got["epochs"], strict=True)))


async def claim_unpublished(conn: Connection, kind: str, ours: Collection[int]) -> list[Unpublished]:
    """Outcomes to publish again; `ours`: batches that this process is publishing, or has published, already."""
    got = await conn.fetch(SQL.claim_unpublished, kind, UNPUBLISHED_MAX, PUBLISH_GRACE_S, list(ours))
    return [Unpublished(row["batch"], row["outcomes"] or ()) for row in got]


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
