"""Rows under a lease when something stops, fails or is re-armed: the claim loop's promises of DESIGN 3b and 5."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from tests.support import kernel, toy
from tests.support.waiting import until

from factmesh import claims, ids
from factmesh.claim_loop import Death, Settlement
from factmesh.claims import Claimed, Settled
from factmesh.effects import Amend, Effect, Schedule
from factmesh.errors import BusinessError
from factmesh.message import Delivery, Emission, Message
from factmesh.postgres import Connection
from factmesh.service import STOP_S_MAX, Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def rests(running: Running, n: int = 1) -> bool:
    rows = await kernel.claims_rows(running)
    return len(rows) == n and not any(r["due_at"] or r["unpublished"] for r in rows)


async def test_a_graceful_stop_settles_what_is_under_way(stack: Stack, namespace: str) -> None:
    """INV-X: an outcome that is known is written and published before the end: nobody needs to ask the downstream."""
    begun = asyncio.Event()

    async def work(row: Claimed) -> Settlement:
        if len(toil.seen) == 4:
            begun.set()
        await asyncio.sleep(1.0)
        return toy.done()

    settings = await toy.settings(stack, namespace)
    toil = toy.Toil(work)
    async with open_service(toy.service(toil), settings) as running:
        sent = [toy.asking(running, "result", f"o{n}", do="work") for n in range(4)]
        await running.context.publisher.publish(sent)
        async with asyncio.timeout(20):
            await begun.wait()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    seen = toy.Toil()
    async with open_service(toy.service(seen), settings) as running:
        await until("all rest", lambda: rests(running, 4))
        assert {(r["state"], r["epoch"], r["attempts"]) for r in await kernel.claims_rows(running)} == {("done", 1, 1)}
        assert seen.seen == []
        assert len({m.id for m in toy.decoded(running, await kernel.on_topic(running, "signal"))}) == 4


async def test_a_call_that_hangs_does_not_hold_the_stop(stack: Stack, namespace: str) -> None:
    """DESIGN 3, 5: it ends within ten seconds; the row keeps its lease; who takes it knows that it was interrupted."""
    begun = asyncio.Event()

    async def work(row: Claimed) -> Settlement:
        begun.set()
        if row.epoch == 1:
            await asyncio.sleep(60)
        return toy.done()

    settings = await toy.settings(stack, namespace)
    toil = toy.Toil(work, lease_s=8.0)
    async with open_service(toy.service(toil), settings) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])
        async with asyncio.timeout(20):
            await begun.wait()
        began = time.monotonic()
    assert time.monotonic() - began < STOP_S_MAX
    async with open_service(toy.service(toil), settings) as running:
        await until("the successor has settled", lambda: rests(running))
        assert [(r.epoch, r.attempts, r.interrupted) for r in toil.seen] == [(1, 1, False), (2, 2, True)]


async def test_what_is_claimed_while_the_stop_comes_is_given_back(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 5: nothing of it began, so it is no attempt, and nobody calls its outcome unknown."""
    real = claims.claim_due

    async def claim_due(
        conn: Connection, kind: str, limit: int, lease_s: float, lease_ends: float
    ) -> list[Claimed]:
        rows = await real(conn, kind, limit, lease_s, lease_ends)
        if rows:
            running.context.claims.loops["toil"]._stopping = True
        return rows

    settings = await toy.settings(stack, namespace)
    toil = toy.Toil()
    async with open_service(toy.service(toil), settings) as running:
        monkeypatch.setattr(claims, "claim_due", claim_due)
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work", now=False)])

        async def given_back() -> bool:
            return [(r["state"], r["attempts"], r["epoch"]) for r in await kernel.claims_rows(running)] == [
                ("pending", 0, 1)
            ]

        await until("the row is given back", given_back)
    monkeypatch.undo()
    assert toil.seen == []
    async with open_service(toy.service(toil), settings) as running:
        await until("done by the next", lambda: rests(running))
        assert [(r.epoch, r.attempts, r.interrupted) for r in toil.seen] == [(2, 1, False)]


async def test_an_interrupted_row_that_is_given_back_stays_interrupted(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 5: failed means known not to have worked: a stop must not wipe out that a call may be out there."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        id_ = ids.entrance_id("t", "x", 1_760_000_000_000)
        async with running.context.pool.acquire() as conn:
            (first,) = await claims.start(conn, [Schedule("other", id_, b"")], lambda _kind: 0.01)
            await asyncio.sleep(0.05)
            for attempt in (2, 2):
                (row,) = await claims.claim_due(conn, "other", 5, 30.0, 0.0)
                assert (row.interrupted, row.attempts) == (True, attempt)
                await claims.release(conn, [row])
            late = Settled(id_, first.epoch, "done", None, None, None)
            assert (await claims.settle(conn, "other", [late])).counted == frozenset()


async def test_a_row_that_failed_starts_over_and_shuts_the_old_worker_out(stack: Stack, namespace: str) -> None:
    """INV-F, INV-B: scheduled again it has a new epoch and a fresh policy; a row that did not fail is left as it is."""
    id_ = ids.entrance_id("t", "the row", 1_760_000_000_000)

    def decide(state: int, message: Message, now: datetime) -> tuple[int, Sequence[Effect]]:
        return state + 1, [Schedule("toil", id_, bytes(message["body"]), start_now=True)]

    async def work(row: Claimed) -> Settlement:
        return Settlement("failed" if row.epoch == 1 else "done", progress=b"progress %d" % row.epoch)

    toil = toy.Toil(work)
    async with open_service(toy.service(toil, decide=decide), await toy.settings(stack, namespace)) as running:
        for n in range(3):
            await running.context.publisher.publish([toy.asking(running, "result", "o", do="x", text=str(n))])
            await kernel.idle(running)
            await until("settled", lambda: rests(running))
        assert [(r.epoch, r.attempts, r.progress, r.last_lease_ended_at) for r in toil.seen] == [
            (1, 1, None, None),
            (2, 1, None, None),
        ]
        (row,) = await kernel.claims_rows(running)
        assert (row["state"], row["epoch"]) == ("done", 2)
        async with running.context.pool.acquire() as conn:
            late = Settled(id_, 1, "failed", None, None, None)
            assert (await claims.settle(conn, "toil", [late])).counted == frozenset()
        assert running.context.claims.loops["toil"]._free == 8


async def test_no_slot_is_lost_where_a_batch_fails_after_it_reserved(stack: Stack, namespace: str) -> None:
    """DESIGN 3b: repeats, culprits and rolled back batches give back what they reserved, or the loop starves."""
    fails = 0

    async def save(conn: Connection, changes: Sequence[Any]) -> None:
        await toy.save(conn, changes)

    def decide(state: int, message: Message, now: datetime) -> tuple[int, Sequence[Effect]]:
        nonlocal fails
        state, effects = toy.decide(state, message, now)
        if message["business_object_id"] == "bad" and fails < 5:
            fails += 1
            # Found out after the rows were started: the whole batch is rolled back.
            effects = [*effects, Amend("toil", UUID(int=1), expected="done", state="failed")]
        return state, effects

    async with open_service(toy.service(decide=decide, save=save), await toy.settings(stack, namespace)) as running:
        loop = running.context.claims.loops["toil"]
        for _ in range(12):
            once = [toy.asking(running, "result", f"o{n}", do="work") for n in range(3)]
            bad = toy.asking(running, "result", "bad", do="work")
            await running.context.publisher.publish([*once, bad, *once])
        await kernel.idle(running)

        async def all_done() -> bool:
            rows = await kernel.claims_rows(running)
            return len(rows) >= 36 and all(r["state"] == "done" and not r["unpublished"] for r in rows)

        await until("every row is done", all_done)
        assert fails == 5
        assert loop._free == 8


async def test_an_outage_of_the_broker_does_not_multiply_what_waits(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 3: memory stays flat: an outcome that this process is publishing is not queued again when it comes due."""
    gate = kernel.PublishGate(monkeypatch, b"toil")
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])

        async def held() -> bool:
            return gate.held == 1

        await until("the outcome waits for the broker", held)
        for _ in range(5):
            async with running.context.pool.acquire() as conn:
                await conn.execute("UPDATE unpublished SET due_at = now()")
            running.context.claims.loops["toil"].wake()
            await asyncio.sleep(0.2)
        assert gate.held == 1
        gate.open.set()
        await until("published and marked", lambda: rests(running))
        assert len(await kernel.on_topic(running, "signal")) == 1


async def test_a_message_that_dies_in_its_settlement_is_replayed_as_a_message(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 9: the ledger row is marked `dead` with the settlement, so that an opening re-arms the row, once."""
    originals: dict[UUID, Delivery] = {}

    def decide(state: int, message: Message, now: datetime) -> tuple[int, Sequence[Effect]]:
        assert message.id is not None
        originals.setdefault(message.id, message.delivery)
        return state + 1, [Schedule("toil", message.id, bytes(message["body"]), start_now=True)]

    async def work(row: Claimed) -> Settlement:
        if row.epoch > 1:
            return toy.done()
        death = Death(
            originals[row.id], f"id:{row.id}", BusinessError("refused for good"), 6, row.created_at, {}, replayable=True
        )
        return Settlement("failed", death=death)

    toil = toy.Toil(work)
    async with open_service(toy.service(toil, decide=decide), await toy.settings(stack, namespace)) as running:
        message: Emission = toy.asking(running, "result", "o", do="x")
        await running.context.publisher.publish([message])
        await until("failed and told", lambda: rests(running))
        (record,) = await kernel.dead_of(running)
        assert (record.dead.attempts, record.dead.opening) == (6, 0)
        (row,) = await kernel.ledger_rows(running)
        assert (row["disposition"], row["opening"]) == ("dead", 0)
        opened = kernel.opening(message, record.dead.root, 1, record.dead.group)
        await running.context.publisher.publish([opened, opened])
        await kernel.idle(running)
        await until("done", lambda: rests(running))
        assert [(r.epoch, r.attempts) for r in toil.seen] == [(1, 1), (2, 1)]
        (row,) = await kernel.ledger_rows(running)
        assert (row["disposition"], row["opening"]) == ("done", 1)
        assert len(await kernel.on_topic(running, "signal")) == 1
