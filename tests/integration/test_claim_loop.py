"""The claim loop on the real database and broker: leases, epochs, lost workers, unpublished outcomes (DESIGN 3b, 5)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from tests.support import toy
from tests.support.waiting import until

from factmesh import claims, ids, kafka, message
from factmesh.claim_loop import IDLE_S_MAX, Settlement
from factmesh.claims import Claimed, Settled, Unpublished
from factmesh.clock import SystemClock
from factmesh.effects import Amend, MarkLedger, Schedule
from factmesh.errors import Reason
from factmesh.message import Emission
from factmesh.postgres import connect
from factmesh.service import Running, open_service
from factmesh.settings import Settings
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def states(running: Running) -> list[tuple[str, int, bool]]:
    """State, epoch, and whether nobody has to do anything more about it."""
    async with running.context.pool.acquire() as conn:
        rows = await conn.fetch(
            "SELECT state, epoch, due_at IS NULL AND NOT EXISTS (SELECT 1 FROM unpublished WHERE c.id = ANY (ids))"
            " AS rests FROM claims c ORDER BY id"
        )
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

        async def lost(_batch: int, _emissions: object) -> None:
            return None

        running.context.claims.loops["toil"]._publish = lost  # type: ignore[assignment]
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])

        async def unpublished() -> bool:
            return await states(running) == [("done", 1, False)]

        await until("settled, not published", unpublished)
        async with running.context.pool.acquire() as conn:
            await conn.execute("UPDATE unpublished SET due_at = now()")
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


async def test_what_rides_with_a_settlement_is_written_for_a_current_lease_only(stack: Stack, namespace: str) -> None:
    """INV-F: of a worker that lost its lease while others settle beside it nothing is saved, marked or published."""
    release = asyncio.Event()
    asked: list[int] = []

    def save(rows: Sequence[tuple[Claimed, str]]) -> claims.Along:
        asked.extend(row.epoch for row, _ in rows)
        keys = [f"{what} {row.epoch}" for row, what in rows]
        return claims.Along(toy.SQL.save_work, ([r.id for r, _ in rows], [r.epoch for r, _ in rows], keys))

    async def work(row: Claimed) -> Settlement:
        if row.epoch == 1 and b"slow" in row.payload:
            await release.wait()
        root = await running.context.pool.fetchval("SELECT id FROM ledger")
        mark = MarkLedger(f"id:{root}", "discarded", Reason.BUSINESS, f"epoch {row.epoch} of {row.payload.decode()}")
        return replace(toy.done(), save="saved", ledger=(mark,) if b"slow" in row.payload else ())

    toil = toy.Toil(work, lease_s=0.5, save=save)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work", text="slow")])
        await until("the successor settled", lambda: settled(running, 1))
        assert await toy.counts(running) == {"o": 1, "saved 2": 2}
        await running.context.pool.execute("UPDATE ledger SET disposition = 'done', detail = NULL")
        release.set()
        await until("the late one asked too", lambda: _true(asked == [2, 1]))
        await asyncio.sleep(0.3)
        assert await toy.counts(running) == {"o": 1, "saved 2": 2}
        assert await running.context.pool.fetchval("SELECT count(*) FROM ledger WHERE disposition <> 'done'") == 0
        assert await outcomes(running) == 1


async def test_both_epochs_of_a_row_in_one_settlement_only_the_current_one_counts(
    stack: Stack, namespace: str
) -> None:
    """INV-F: a process that lost a lease and took it again may end both works at once; rows count by id and epoch."""
    gate = asyncio.Event()

    async def work(row: Claimed) -> Settlement:
        await gate.wait()
        return toy.done()

    toil = toy.Toil(work, lease_s=0.5)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work")])

        async def twice() -> bool:
            return len(toil.seen) >= 2

        await until("taken again", twice)
        gate.set()
        await until("settled", lambda: settled(running, 1))
        assert await outcomes(running) == 1
        refused = running.context.metrics.render().split(b'factmesh_settle_refused_total{kind="toil"} ')[1]
        assert float(refused.split()[0]) >= 1


async def test_a_crash_before_the_mark_publishes_once_more_under_the_same_ids(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 5: published and not marked is a due row; what is published again has the same ids, so it is dropped."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        running.context.claims.loops["toil"]._mark_soon = lambda: None  # type: ignore[method-assign]
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work") for _ in range(5)])

        async def published() -> bool:
            return await outcomes(running) == 5

        await until("published", published)
        assert [(s, rests) for s, _, rests in await states(running)] == [("done", False)] * 5
        running.context.claims.loops["toil"]._published.clear()
    await _come_due(settings)
    async with open_service(toy.service(), settings) as running:
        await until("marked by the next", lambda: settled(running, 5))
        sent = await kafka.read_all(settings.kafka_bootstrap, [running.context.topic("signal")])
        assert len(sent) == 10
        assert len({m.id for m in toy.decoded(running, sent)}) == 5


async def test_an_outcome_that_another_epoch_replaced_is_not_published_again(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 9: a row that a person's word amended before its mark has its own outcome: the old one is not told."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        id_ = ids.entrance_id("t", "x", 1_760_000_000_000)
        async with running.context.pool.acquire() as conn:
            (row,) = await claims.start(conn, [Schedule("other", id_, b"")], lambda _kind: 30.0, fresh=True)
            packed = message.pack([Emission("t", None, b"told")])
            assert packed is not None
            written = await claims.settle(conn, "other", [Settled(id_, row.epoch, "unknown", None, None, packed)])
            assert written.batch is not None
            await conn.execute("UPDATE unpublished SET due_at = now()")
            assert await claims.claim_unpublished(conn, "other", [written.batch]) == []
            assert await claims.claim_unpublished(conn, "other", []) == [Unpublished(written.batch, [packed])]
            assert await claims.claim_unpublished(conn, "other", []) == [], "the grace has not passed again"
            await claims.amend(conn, [Amend("other", id_, expected="unknown", state="done")])
            await conn.execute("UPDATE unpublished SET due_at = now()")
            assert await claims.claim_unpublished(conn, "other", []) == [Unpublished(written.batch, ())]
            assert (await claims.settle(conn, "other", [], [written.batch])).counted is None
            assert await conn.fetchval("SELECT count(*) FROM unpublished") == 0


async def test_a_stop_marks_what_it_has_published(stack: Stack, namespace: str) -> None:
    """DESIGN 5: the mark waits for the next settlement, but not over a clean end: nobody has to publish again."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work") for _ in range(3)])

        async def published() -> bool:
            return await outcomes(running) == 3

        await until("published", published)
    async with open_service(toy.service(), settings) as running:
        assert await settled(running, 3)


async def test_rows_wait_in_memory_for_their_turn_as_far_as_their_lease_goes(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 5: more rows are held than are worked on at once; one whose turn comes too late goes back, unbegun."""
    most, now, short = 0, 0, asyncio.Event()

    async def work(row: Claimed) -> Settlement:
        nonlocal most, now
        left_s = row.lease_ends - running.context.clock.monotonic()
        assert left_s >= toil.lease_s - toil.wait_s - 0.1, "begun although its lease does not cover the work"
        now += 1
        most = max(most, now)
        await asyncio.sleep(1.2 if short.is_set() else 0.001)
        now -= 1
        return toy.done()

    toil = toy.Toil(work, held_max=200, wait_s=1.0)
    async with open_service(toy.service(toil), await toy.settings(stack, namespace)) as running:
        loop = running.context.claims.loops["toil"]
        assert loop._free < 16, "nothing is known of the pace yet"
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work") for _ in range(100)])
        await until("all are done", lambda: settled(running, 100))
        assert loop._free > 50
        short.set()
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="work") for _ in range(40)])
        await until("the rest too", lambda: settled(running, 140), timeout_s=60)
        assert most == loop.kind.concurrency
        assert {(r.attempts, r.interrupted) for r in toil.seen} == {(1, False)}, "what did not begin is no attempt"
        assert max(r.epoch for r in toil.seen) > 1, "none waited too long: the test did not test"


async def _true(condition: bool) -> bool:
    return condition


async def _come_due(settings: Settings) -> None:
    conn = await connect(settings.postgres_dsn.get_secret_value(), schema=settings.schema_name("toy"))
    await conn.execute("UPDATE unpublished SET due_at = now()")
    await conn.close()


async def _rows(running: Running, n: int) -> bool:
    return len(await states(running)) == n
