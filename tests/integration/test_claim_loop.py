"""The claim loop on the real database and broker: leases, epochs, lost workers, unpublished outcomes (DESIGN 3b, 5)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from tests.support import toy
from tests.support.waiting import until

from factmesh import claims, kafka
from factmesh.claim_loop import IDLE_S_MAX, Settlement
from factmesh.claims import Claimed
from factmesh.clock import SystemClock
from factmesh.service import Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def states(running: Running) -> list[tuple[str, int, bool]]:
    async with running.context.pool.acquire() as conn:
        rows = await conn.fetch("SELECT state, epoch, due_at IS NULL AS rests FROM claims ORDER BY id")
        return [(r["state"], r["epoch"], r["rests"]) for r in rows]


async def outcomes(running: Running) -> int:
    topic = running.context.topic("signal")
    return len(await kafka.read_all(running.context.settings.kafka_bootstrap, [topic]))


async def settled(running: Running, n: int) -> bool:
    found = await states(running)
    return len(found) == n and all(s == "done" and rests for s, _, rests in found)


async def test_a_command_that_may_run_at_once_is_inserted_claimed(stack: Stack, namespace: str) -> None:
    """DESIGN 5: an undisturbed row is worked on in its first epoch, and its outcome published once and marked."""
    toil = toy.Toil()
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        sent = [toy.asking(running, "result", f"o{n}", do="work") for n in range(30)]
        await running.context.publisher.publish(sent)
        await until("all are done and marked", lambda: settled(running, 30))
        assert len(toil.seen) == 30
        assert {row.attempts for row in toil.seen} == {1}
        assert await outcomes(running) == 30


async def test_a_retry_waits_in_its_row_and_blocks_nothing(stack: Stack, namespace: str) -> None:
    """C4: a waiting retry is a row; others go on; the attempt is counted."""
    clock = SystemClock()

    async def work(row: Claimed) -> Settlement:
        if b"slow" in row.payload and row.attempts < 3:
            from datetime import timedelta

            return Settlement("pending", due_at=clock.now() + timedelta(seconds=0.4), progress=b"%d" % row.attempts)
        return toy.done()

    toil = toy.Toil(work)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        sent = [toy.asking(running, "result", "o", do="work", text="slow")]
        sent += [toy.asking(running, "result", "o", do="work") for _ in range(9)]
        await running.context.publisher.publish(sent)
        await until("all are done", lambda: settled(running, 10))
        slow = [row for row in toil.seen if b"slow" in row.payload]
        assert [row.attempts for row in slow] == [1, 2, 3]
        assert [row.progress for row in slow] == [None, b"1", b"2"]
        assert not any(row.interrupted for row in slow)


async def test_a_settlement_from_a_lost_lease_changes_nothing(stack: Stack, namespace: str) -> None:
    """INV-F: the worker that was paused past its lease is refused; its successor knows that it was interrupted."""
    release = asyncio.Event()

    async def work(row: Claimed) -> Settlement:
        if row.epoch == 1:
            await release.wait()
        return toy.done()

    toil = toy.Toil(work, lease_s=0.5)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])
        await until("the successor settled", lambda: settled(running, 1))
        assert [(r.epoch, r.interrupted) for r in toil.seen] == [(1, False), (2, True)]
        release.set()
        await asyncio.sleep(0.5)
        assert await states(running) == [("done", 2, True)]
        assert await outcomes(running) == 1
        assert b'factmesh_settle_refused_total{kind="toil"} 1.0' in running.context.metrics.render()


async def test_an_outcome_that_was_not_published_is_published_by_any_replica(stack: Stack, namespace: str) -> None:
    """DESIGN 5: killed between the settlement and the publish, the row is due and another replica publishes it."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:

        async def lost(_outcomes: object) -> None:
            return None

        running.context.claims.loops["toil"]._publish = lost  # type: ignore[assignment]
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])

        async def unpublished() -> bool:
            return await states(running) == [("done", 1, False)]

        await until("settled, not published", unpublished)
        async with running.context.pool.acquire() as conn:
            await conn.execute("UPDATE claims SET due_at = now()")
    async with open_service(toy.service(), settings) as running:
        await until("published and marked", lambda: settled(running, 1))
        assert await outcomes(running) == 1


async def test_a_bug_in_the_work_leaves_the_row_to_be_found(stack: Stack, namespace: str) -> None:
    """An exception decides nothing: the row comes due again as interrupted, and the loop goes on."""

    async def work(row: Claimed) -> Settlement:
        if row.epoch == 1:
            raise RuntimeError("a bug")
        return toy.done()

    toil = toy.Toil(work, lease_s=0.5)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])
        await until("done in the second epoch", lambda: settled(running, 1))
        assert [(r.epoch, r.interrupted) for r in toil.seen] == [(1, False), (2, True)]


async def test_an_undisturbed_row_costs_no_look_for_due_ones(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 5: a look takes the slots that the next batch needs, so a settlement with nothing left due causes none."""
    looks = 0
    claim_due = claims.claim_due

    async def counted(*given: Any) -> Any:
        nonlocal looks
        looks += 1
        return await claim_due(*given)

    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        monkeypatch.setattr(claims, "claim_due", counted)
        for n in range(1, 21):
            await running.context.publisher.publish([toy.asking(running, "result", f"o{n}", do="work")])
            await until(f"{n} are done", partial(settled, running, n), every_s=0.02)
        assert looks < 15, "one a settlement, besides the look every few seconds"


async def test_a_row_that_found_no_slot_is_worked_on_when_one_is_free(stack: Stack, namespace: str) -> None:
    """DESIGN 3b: what waited for a slot does not wait for the look that comes every few seconds."""
    gate = asyncio.Event()

    async def work(row: Claimed) -> Settlement:
        await gate.wait()
        return toy.done()

    toil = toy.Toil(work)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        loop = running.context.claims.loops["toil"]
        sent = [toy.asking(running, "result", "o", do="work") for _ in range(40)]
        await running.context.publisher.publish(sent)
        await until("every slot is taken, and the rest are rows", lambda: _rows(running, 40))
        assert len(toil.seen) == loop.kind.concurrency
        began = loop._clock.monotonic()
        gate.set()
        await until("all are done", lambda: settled(running, 40))
        waves = 40 // loop.kind.concurrency
        assert loop._clock.monotonic() - began < (waves - 1) * IDLE_S_MAX, "each wave waited for the next look"


async def _rows(running: Running, n: int) -> bool:
    return len(await states(running)) == n
