"""Acts over many records: a frozen cohort, worked off one by one at a rate, that can be killed and taken up again.
Each member is raised together with its outcome, in one transaction, and published after it; nothing is printed here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from factmesh import ids
from factmesh.errors import ValidationError
from factmesh.message import Emission, to_ms
from factmesh.postgres import Connection, Record
from factmesh_cli.dlq_index import Index
from factmesh_quarantine.acts import SQL, Raised, RefusedError
from factmesh_quarantine.messages import Person

Act = Callable[[Connection, UUID, Person], Awaitable[Raised]]
"""Raises one record in the caller's transaction, or RefusedError."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A bulk act, as stored."""

    id: UUID
    verb: str
    by: str
    reason: str
    filter: str


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one member."""

    record: UUID
    raised: Raised | None
    refused: str


@dataclass(frozen=True, slots=True)
class Tally:
    """How far an operation is."""

    total: int
    raised: int
    skipped: int

    @property
    def left(self) -> int:
        return self.total - self.raised - self.skipped


async def begin(index: Index, verb: str, by: str, reason: str, wanted: str, cohort: Sequence[UUID]) -> Operation:
    """Freeze the cohort under an id, before anything is done."""
    now = index.clock.now()
    name = f"{verb}:{by}:{wanted}:{now.isoformat()}:{','.join(map(str, cohort[:1]))}"
    operation = Operation(ids.entrance_id("dlq.operation", name, to_ms(now)), verb, by, reason, wanted)
    async with index.pool.acquire() as conn, conn.transaction():
        await conn.execute(SQL.insert_operation, operation.id, verb, by, reason, wanted, now)
        await conn.execute(SQL.insert_items, operation.id, list(cohort))
    return operation


async def find(index: Index, id_: UUID) -> Operation:
    """A stored operation. Raises ValidationError when there is none."""
    row = await index.pool.fetchrow(SQL.read_operation, id_)
    if row is None:
        raise ValidationError(f"no operation {id_}", hint="its id was printed when it began")
    return Operation(row["id"], row["verb"], row["by"], row["reason"], row["filter"])


async def tally(index: Index, operation: Operation) -> Tally:
    row = await index.pool.fetchrow(SQL.count_items, operation.id)
    assert row is not None
    return Tally(row["total"], row["raised"], row["skipped"])


async def next_step(index: Index, operation: Operation, act: Act, by: str) -> Step | None:
    """Work on the next member that nobody has in hand; None when there is none left.

    The raise and the member's outcome are one transaction. Killed before it: nothing happened. Killed after it: the
    act is due, and is published by the next start of the tool or by the quarantine service, under the same number.
    """
    person = Person(by, operation.reason, index.clock.now(), operation.id)
    async with index.pool.acquire() as conn, conn.transaction():
        item = await conn.fetchrow(SQL.take_item, operation.id)
        if item is None:
            return None
        raised: Raised | None = None
        refused = ""
        try:
            raised = await act(conn, item["record"], person)
        except RefusedError as error:
            refused = error.message
        outcome = "raised" if raised is not None else "skipped"
        await conn.execute(SQL.finish_item, operation.id, item["position"], outcome, refused)
    if raised is not None:
        await index.acts.publish_act(raised.act, index.clock.now)
    return Step(item["record"], raised, refused)


async def run(
    index: Index, operation: Operation, act: Act, by: str, *, rate: float, told: Callable[[Step], None]
) -> Tally:
    """Work the cohort off, at most `rate` members a second over all of it."""
    clock = index.clock
    began, done = clock.monotonic(), 0
    while (step := await next_step(index, operation, act, by)) is not None:
        done += 1
        told(step)
        await clock.sleep(began + done / rate - clock.monotonic())
    return await tally(index, operation)


async def publish_left_over(index: Index) -> int:
    """Publish what an earlier, killed run has raised and not published; the same bytes under the same numbers."""
    return await index.acts.publish_due(index.clock.now(), index.clock.now)


@dataclass(frozen=True, slots=True)
class Planned:
    """What an act would do to one record."""

    row: Record
    what: str
    emissions: tuple[Emission, ...]
    refused: str


async def plan(index: Index, rows: Sequence[Record], verb: str, by: str, reason: str, at: datetime) -> list[Planned]:
    """The dry run: nothing is changed, nothing is published."""
    person = Person(by, reason, at)
    out = []
    for row in rows:
        try:
            fresh = await index.acts.read(index.pool, row["id"])
            if verb == "discard":
                what, _, emissions = await index.acts.plan_discard(fresh, person)
            else:
                what, emissions = await index.acts.plan_replay(fresh, fresh["counter"] + 1, person)
            out.append(Planned(row, str(what), emissions, ""))
        except RefusedError as error:
            out.append(Planned(row, "refused", (), f"{error.message} ({error.hint})"))
    return out
