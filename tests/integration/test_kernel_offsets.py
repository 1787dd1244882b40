"""Offsets follow what is published, whatever happens in between: the batch loop's side of INV-L on the real broker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from tests.support import kernel, toy
from tests.support.waiting import until

from factmesh import kafka
from factmesh.kafka import Coordinates
from factmesh.message import Emission
from factmesh.service import Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def test_offsets_never_pass_an_unpublished_batch(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """⚑ DESIGN 3: later batches of the partition are published and acknowledged; the first one holds all offsets."""
    gate = kernel.PublishGate(monkeypatch, b"first")
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        for name in ("first", "second", "third"):
            message = replace(toy.asking(running, "result", name, do="count"), key=b"one-partition")
            await running.context.publisher.publish([message])

            async def counted(name: str = name) -> bool:
                return name in await toy.counts(running)

            await until(f"{name} is committed in PostgreSQL", counted)

        async def published() -> bool:
            return {d.key for d in await kernel.on_topic(running, "status")} == {b"second", b"third"}

        await until("the later ones are published", published)
        await asyncio.sleep(0.5)
        assert gate.held == 1
        assert await kernel.backlog(running) == 3
        gate.open.set()
        await kernel.idle(running)
        assert len(await kernel.on_topic(running, "status")) == 3


async def test_an_opening_for_another_group_lets_no_offset_pass(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """⚑ DESIGN 3, 9: passing an opening over commits nothing that stands before it in the partition."""

    def make(running: Running) -> list[Emission]:
        # Each alone in its transaction, so that in-flight batches and commits come between them.
        mine = [replace(toy.asking(running, "result", f"o{n}", do="count"), key=b"p") for n in range(6)]
        culprit = replace(toy.asking(running, "result", "x", do="count", raw="\0"), key=b"p")
        return [*mine, culprit, kernel.opening(mine[0], "at:elsewhere:0:0", 1, "somebody-else")]

    emissions = await kernel.make_topics(stack, namespace, make)
    await kernel.send(stack, emissions)
    gate = kernel.PublishGate(monkeypatch)
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:

        async def held() -> bool:
            return gate.held >= 4

        await until("as many batches are in flight as may be", held)
        await asyncio.sleep(1.0)
        assert await kernel.backlog(running) == 8
        gate.open.set()
        await kernel.idle(running)
        assert len(await toy.counts(running)) == 6
        assert len(await kernel.dead_of(running)) == 1


async def test_a_partition_that_halts_in_the_middle_of_a_batch_keeps_everything_behind_it(
    stack: Stack, namespace: str
) -> None:
    """DESIGN 3: halted in one half, the other half is not handled either, or its offset would pass the dead ones."""

    def make(running: Running) -> list[Emission]:
        topic = running.context.topic("result")
        torn = [Emission(topic, b"p", b"torn %d" % n) for n in range(200)]
        culprit = replace(toy.asking(running, "result", "x", do="count", raw="\0"), key=b"p")
        good = [replace(toy.asking(running, "result", f"o{n}", do="count"), key=b"p") for n in range(250)]
        return [*torn, culprit, *good]

    emissions = await kernel.make_topics(stack, namespace, make)
    await kernel.send(stack, emissions)
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:

        async def halted() -> bool:
            return bool(running.batch_loops[0].halted)

        await until("the partition halts", halted)
        await asyncio.sleep(1.0)
        handled = len(await kernel.ledger_rows(running))
        assert handled < 100
        assert await toy.counts(running) == {}
        assert await kernel.backlog(running) >= len(emissions) - handled


async def test_a_refused_commit_is_tried_again(stack: Stack, namespace: str) -> None:
    """The last message of a quiet day must not wait for the next one until its offset is committed."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        subscription = running.batch_loops[0]._subscription
        real, refused = subscription.commit, 0

        async def commit(offsets: Mapping[Coordinates, int]) -> bool:
            nonlocal refused
            if refused < 3:
                refused += 1
                return False
            return await real(offsets)

        subscription.commit = commit  # type: ignore[method-assign]
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="count")])
        await kernel.idle(running)
        assert refused == 3


async def test_a_slow_commit_holds_no_batch_and_an_idle_loop_no_connection(stack: Stack, namespace: str) -> None:
    """A commit waits for the group's coordinator; the next message does not wait for the commit. Offsets follow."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        loop, answered = running.batch_loops[0], asyncio.Event()
        real = loop._subscription.commit

        async def commit(offsets: Mapping[Coordinates, int]) -> bool:
            await answered.wait()
            return await real(offsets)

        loop._subscription.commit = commit  # type: ignore[method-assign]
        for n in (1, 2, 3):
            await running.context.publisher.publish([toy.asking(running, "result", "o", do="count")])

            async def handled(n: int = n) -> bool:
                return await toy.counts(running) == {"o": n}

            await until(f"message {n} is handled", handled)
        assert await kernel.backlog(running) == 3
        answered.set()
        await kernel.idle(running)

        async def given_back() -> bool:
            return loop._held._conn is None

        await until("the pool has its connection back", given_back)


async def test_nothing_is_committed_for_a_partition_that_has_left(stack: Stack, namespace: str) -> None:
    """A zombie's offset may be lower than where the new owner is: it is his to commit."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        loop = running.batch_loops[0]

        async def assigned() -> bool:
            return len(loop._subscription.assigned) == 8

        await until("assigned", assigned)
        told: list[Mapping[Coordinates, int]] = []

        async def commit(offsets: Mapping[Coordinates, int]) -> bool:
            told.append(dict(offsets))
            return True

        loop._subscription.commit = commit  # type: ignore[method-assign]
        topic = running.context.topic("result")
        loop._subscription.assigned.discard((topic, 0))
        loop._committed = {(topic, 0): 7, (topic, 1): 3}
        await loop._commit()
        assert {(topic, 1): 3} in told
        assert not any((topic, 0) in offsets for offsets in told)


async def test_a_rebalance_in_the_middle_of_the_load(stack: Stack, namespace: str) -> None:
    """INV-F, INV-L, G7: replicas come and go while messages arrive; each is counted once, the sequence is gapless."""
    settings = await toy.settings(stack, namespace, batch_max=10)
    async with open_service(toy.service(), settings) as staying:
        load = asyncio.create_task(_load(staying, 300))
        for _ in range(2):
            async with open_service(toy.service(), settings, http=False) as other:

                async def shares(other: Running = other) -> bool:
                    return 0 < len(other.batch_loops[0]._subscription.assigned) < 8

                await until("the other replica has its share", shares)
                await asyncio.sleep(0.5)
        await load
        await kernel.idle(staying)
        assert await toy.counts(staying) == {f"o{n}": 100 for n in range(3)}
        seqs: dict[object, int] = {}
        for message in toy.decoded(staying, await kernel.on_topic(staying, "status")):
            seqs[message.id] = message["instance_seq"]
        assert sorted(seqs.values()) == sorted(list(range(1, 101)) * 3)


async def _load(running: Running, n: int) -> None:
    for number in range(n):
        topic = "result" if number % 2 else "fact"
        await running.context.publisher.publish([toy.asking(running, topic, f"o{number % 3}", do="count")])
        await asyncio.sleep(0.01)


async def test_a_fatal_error_of_the_producer_loses_no_emission_and_leaves_nobody_waiting(
    stack: Stack, namespace: str
) -> None:
    """INV-L: the producer is replaced once; who waited for the old one's answers publishes through the new one."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        topic = running.context.topic("status")
        publisher = kafka.Publisher("127.0.0.1:1", client_id="test")
        waiting = [asyncio.create_task(publisher.publish([Emission(topic, b"k", b"v%d" % n)])) for n in range(5)]
        await asyncio.sleep(0.3)
        publisher._config["bootstrap.servers"] = stack.bootstrap
        broken = publisher._producer
        publisher._renew(broken)
        renewed = publisher._producer
        publisher._renew(broken)
        assert publisher._producer is renewed is not broken
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)
        values: Sequence[bytes | None] = sorted(str(d.value).encode() for d in await kernel.on_topic(running, "status"))
        assert len(values) == 5
        await publisher.close()
