"""The batch loop on the real broker and database: each promise of DESIGN sections 3 and 9 as a message history."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.support import toy
from tests.support.waiting import until

from factmesh import dlq, ids, kafka
from factmesh.message import H_GROUP, H_OPENING, H_ROOT_ID, Delivery, Emission
from factmesh.service import Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def status_of(running: Running) -> list[Delivery]:
    return await kafka.read_all(running.context.settings.kafka_bootstrap, [running.context.topic("status")])


async def dead_of(running: Running, topic: str) -> list[dlq.DeadRecord]:
    name = "dlq." + running.context.topic(topic)
    return [dlq.parse(d) for d in await kafka.read_all(running.context.settings.kafka_bootstrap, [name])]


async def ledger_rows(running: Running) -> Sequence[dict[str, object]]:
    async with running.context.pool.acquire() as conn:
        return [dict(r.items()) for r in await conn.fetch("SELECT * FROM ledger ORDER BY handled_at")]


async def idle(running: Running) -> None:
    context = running.context

    async def check() -> bool:
        names = [context.topic("result"), context.topic("fact")]
        return await kafka.backlog(context.settings.kafka_bootstrap, context.group, names) == 0

    await until("everything is handled and committed", check)


def opening(original: Emission, root: str, number: int, group: str, value: bytes | None = None) -> Emission:
    headers = ((H_ROOT_ID, root.encode()), (H_OPENING, str(number).encode()), (H_GROUP, group.encode()))
    return Emission(original.topic, original.key, value if value is not None else original.value, headers)


async def test_messages_of_one_object_fold_and_each_emits(stack: Stack, namespace: str) -> None:
    """Every message is decided once, its emission published, its offset committed (DESIGN 3, INV-L)."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        sent = [toy.asking(running, t, f"o{n % 5}", do="count") for n in range(60) for t in ("result", "fact")]
        await running.context.publisher.publish(sent)
        await idle(running)
        assert await toy.counts(running) == {f"o{n}": 24 for n in range(5)}
        statuses = toy.decoded(running, await status_of(running))
        assert len({m.id for m in statuses}) == len(statuses) == 120
        # Gapless under the lock although two topics, hence two partitions, carry one object's messages (INV-F).
        for n in range(5):
            seqs = sorted(m["instance_seq"] for m in statuses if m["business_object_id"] == f"o{n}")
            assert seqs == list(range(1, 25))


async def test_a_duplicate_publishes_nothing_a_redelivery_publishes_the_same_again(
    stack: Stack, namespace: str
) -> None:
    """A mere duplicate must not ripple; a redelivery from the recorded coordinates is published again (DESIGN 3)."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        first = toy.asking(running, "result", "o", do="count")
        await running.context.publisher.publish([first])
        await idle(running)
        await running.context.publisher.publish([first, first])
        await idle(running)
        assert await toy.counts(running) == {"o": 1}
        assert len(await status_of(running)) == 1
        (row,) = await ledger_rows(running)
        assert row["seen"] == 3
        group, topic = running.context.group, running.context.topic("result")
    # As after a crash between commit and acknowledgement: the offsets were never committed.
    rewind = kafka.Subscription(stack.bootstrap, group=group, topics=[topic], client_id="test")
    await rewind.start()
    await until("assigned", lambda: _poll(rewind))
    await rewind.commit({(topic, p): 0 for p in range(4)})
    await rewind.close()
    async with open_service(toy.service(), settings) as running:
        await until("published again", lambda: _at_least(running, 2))
        await idle(running)
        before, after = await status_of(running)
        assert (before.key, before.value) == (after.key, after.value)
        assert await toy.counts(running) == {"o": 1}


async def _poll(subscription: kafka.Subscription) -> bool:
    await subscription.poll(1)
    return bool(subscription.assigned)


async def _at_least(running: Running, n: int) -> bool:
    return len(await status_of(running)) >= n


async def test_poison_goes_to_the_dlq_byte_for_byte_and_the_partition_moves_on(stack: Stack, namespace: str) -> None:
    """E1: undecodable, unknown schema, refused, a bug, a value the database refuses, too large: each alone dies."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        topic = context.topic("result")
        instance = str(ids.entrance_id("instance", "i", 1_760_000_000_000))
        bad = [
            Emission(topic, instance.encode(), b"not avro", (("x", b"1"), ("y", None))),
            Emission(topic, b"o", b"\x00\x7f\xff\xff\xff rest"),
            Emission(topic, b"o", None),
            toy.asking(running, "result", "o", do="refuse"),
            toy.asking(running, "result", "o", do="bug"),
            toy.asking(running, "result", "o", do="count", raw="nul\x00"),
            toy.asking(running, "result", "o", do="big"),
        ]
        good = [toy.asking(running, "result", "o", do="count") for _ in range(20)]
        await context.publisher.publish([*good[:10], *bad, *good[10:]])
        await idle(running)
        assert await toy.counts(running) == {"o": 20}
        records = await dead_of(running, "result")
        reasons = sorted(str(r.dead.reason) for r in records)
        assert reasons == ["bug", "bug", "decode", "decode", "schema", "validation", "validation"]
        by_value = {r.dead.original.value: r.dead for r in records}
        for emission in bad:
            assert by_value[emission.value].original.key == emission.key
            assert by_value[emission.value].original.headers == emission.headers
        # The key tells the instance even of bytes that nobody can read (H1).
        assert str(by_value[b"not avro"].instance_id) == instance
        signals = toy.decoded(running, await kafka.read_all(stack.bootstrap, [context.topic("signal")]))
        assert [(m["signal"], m["instance_id"]) for m in signals] == [("message_parked", instance)]


async def test_openings_are_judged_by_root_and_by_own_id(stack: Stack, namespace: str) -> None:
    """DESIGN 9: handled once, a repeat is dropped, an opening of what is done is dead again under its number."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        poison = Emission(context.topic("result"), b"o", b"torn")
        await context.publisher.publish([poison])
        await idle(running)
        (record,) = await dead_of(running, "result")
        root, group = record.dead.root, record.dead.group
        corrected = toy.asking(running, "result", "o", do="count")
        replay = opening(poison, root, 1, group, corrected.value)
        other_group = opening(poison, root, 1, "somebody-else", corrected.value)
        await context.publisher.publish([other_group, replay, replay])
        await idle(running)
        assert await toy.counts(running) == {"o": 1}
        # Its resent twin is a repeat, and a later opening of the same root is refused, never dropped in silence.
        await context.publisher.publish([corrected])
        await context.publisher.publish([opening(poison, root, 2, group, corrected.value)])
        await idle(running)
        assert await toy.counts(running) == {"o": 1}
        again = [r for r in await dead_of(running, "result") if r.dead.opening == 2]
        assert [r.dead.root for r in again] == [root]
        assert len(await status_of(running)) == 1


async def test_a_corrected_message_that_meets_its_twin_is_not_applied_twice(stack: Stack, namespace: str) -> None:
    """The twin came first: the opening is dead again under its number, raising the root's row (DESIGN 9)."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        poison = Emission(context.topic("result"), b"o", b"torn")
        twin = toy.asking(running, "result", "o", do="count")
        await context.publisher.publish([poison, twin])
        await idle(running)
        (record,) = await dead_of(running, "result")
        await context.publisher.publish([opening(poison, record.dead.root, 1, record.dead.group, twin.value)])
        await idle(running)
        assert await toy.counts(running) == {"o": 1}
        assert sorted(r.dead.opening for r in await dead_of(running, "result")) == [0, 1]
        rows = [r for r in await ledger_rows(running) if r["root"] == record.dead.root]
        assert [(r["disposition"], r["opening"]) for r in rows] == [("dead", 1)]


async def test_the_same_id_with_another_body_is_a_conflict(stack: Stack, namespace: str) -> None:
    """A4: quarantined and reported, filed under its coordinates; the first body stays in force."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        id_ = ids.entrance_id("test", "same", int(context.clock.now().timestamp() * 1000))
        first = toy.asking(running, "result", "o", id=id_, do="count", text="a")
        second = toy.asking(running, "result", "o", id=id_, do="count", text="b")
        await context.publisher.publish([first])
        await idle(running)
        await context.publisher.publish([second, first])
        await idle(running)
        assert await toy.counts(running) == {"o": 1}
        (record,) = await dead_of(running, "result")
        assert record.dead.reason == "conflict"
        assert record.dead.root == f"id:{id_}"
        dispositions = {(r["root"], r["disposition"]) for r in await ledger_rows(running)}
        original = record.dead.original
        coordinates = f"at:{original.topic}:{original.partition}:{original.offset}"
        assert dispositions == {(None, "done"), (coordinates, "dead")}


async def test_ids_of_no_day_that_the_ledger_holds(stack: Stack, namespace: str) -> None:
    """DESIGN 8: an id from the far past is stale, one from the future is refused; both rest on the DLQ."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        now_ms = int(running.context.clock.now().timestamp() * 1000)
        old = ids.entrance_id("test", "old", now_ms - 500 * 86_400_000)
        future = ids.entrance_id("test", "future", now_ms + 5 * 86_400_000)
        last_month = ids.entrance_id("test", "month", now_ms - 30 * 86_400_000)
        sent = [toy.asking(running, "result", "o", id=i, do="count") for i in (old, future, last_month)]
        await running.context.publisher.publish(sent)
        await idle(running)
        assert await toy.counts(running) == {"o": 1}
        assert sorted(str(r.dead.reason) for r in await dead_of(running, "result")) == ["stale", "validation"]


async def test_two_replicas_share_the_work_and_no_count_is_lost(stack: Stack, namespace: str) -> None:
    """The row lock carries safety, not the partition: two owners of one object's messages lose nothing (INV-F)."""
    settings = await toy.settings(stack, namespace, batch_max=20)
    async with (
        open_service(toy.service(), settings) as one,
        open_service(toy.service(), settings),
    ):
        sent = [toy.asking(one, t, f"o{n % 3}", do="count") for n in range(150) for t in ("result", "fact")]
        await one.context.publisher.publish(sent)
        await idle(one)
        assert await toy.counts(one) == {f"o{n}": 100 for n in range(3)}
        seqs = sorted(m["instance_seq"] for m in toy.decoded(one, await status_of(one)))
        assert seqs == sorted(list(range(1, 101)) * 3)


async def test_offsets_do_not_pass_what_is_not_published(stack: Stack, namespace: str) -> None:
    """A publish that fails blocks the offset, the DLQ's too; nothing is dropped (DESIGN 3)."""
    import asyncio

    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        gate = asyncio.Event()
        real = context.publisher.publish

        async def held(emissions: Sequence[Emission], *, patient: bool = True) -> None:
            await gate.wait()
            await real(emissions, patient=patient)

        loop = running.batch_loops[0]
        loop._publisher.publish = held  # type: ignore[method-assign]
        await real([toy.asking(running, "result", "o", do="count"), Emission(context.topic("result"), b"o", b"torn")])

        async def decided() -> bool:
            return len(await ledger_rows(running)) == 2

        await until("both have their disposition", decided)
        await asyncio.sleep(0.5)
        names = [context.topic("result")]
        assert await kafka.backlog(stack.bootstrap, context.group, names) == 2
        gate.set()
        await idle(running)
        assert len(await status_of(running)) == 1
        assert len(await dead_of(running, "result")) == 1


async def test_known_garbage_passes_where_an_operator_lets_it(stack: Stack, namespace: str) -> None:
    """A halted partition has a way through: without the halt every one of a flood reaches the DLQ (INV-D, INV-L)."""
    settings = await toy.settings(stack, namespace, halt_on_flood=False)
    async with open_service(toy.service(), settings) as running:
        context = running.context
        flood = [Emission(context.topic("result"), b"same", b"torn %d" % n) for n in range(300)]
        await context.publisher.publish(flood)
        await idle(running)
        assert len(await dead_of(running, "result")) == 300
        assert running.problems() == []


async def test_a_flood_of_poison_halts_the_partition(stack: Stack, namespace: str) -> None:
    """After a bad deploy, stopping beats dead-lettering everything (DESIGN 3); the rest goes on and readyz says it."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        flood = [Emission(context.topic("result"), b"same", b"torn %d" % n) for n in range(300)]
        await context.publisher.publish(flood)

        async def halted() -> bool:
            return bool(running.batch_loops[0].halted)

        await until("the partition halts", halted)
        await context.publisher.publish([toy.asking(running, "fact", "o", do="count")])

        async def counted() -> bool:
            return await toy.counts(running) == {"o": 1}

        await until("another partition goes on", counted)
        assert len(await dead_of(running, "result")) < 150
        assert any("halted" in p for p in running.problems())
