"""Openings, marks and conflicts on the real broker and database: no way back applies twice or ends in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from tests.support import kernel, toy

from factmesh import ids
from factmesh.effects import Effect, MarkLedger
from factmesh.errors import Reason
from factmesh.ids import Root
from factmesh.message import Emission, Message, pack_delivery
from factmesh.service import Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack
DAY_MS = 86_400_000


def now_ms(running: Running) -> int:
    return int(running.context.clock.now().timestamp() * 1000)


async def signals(running: Running) -> list[tuple[str, str, Any]]:
    """(signal, instance, its body) of what was said about parks, in order."""
    import json

    found = toy.decoded(running, await kernel.on_topic(running, "signal"))
    return [(m["signal"], m["instance_id"], json.loads(m["body"])) for m in found]


async def test_only_the_coordinates_of_the_current_opening_publish_again(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 3: after an opening was handled, a redelivery of everything repeats what that opening emitted, once."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        context = running.context
        poison = Emission(context.topic("result"), b"p", b"torn")
        await context.publisher.publish([poison])
        await kernel.idle(running)
        (record,) = await kernel.dead_of(running)
        value = toy.asking(running, "result", "o", do="count").value
        opened = kernel.opening(poison, record.dead.root, 1, record.dead.group, value)
        await context.publisher.publish([opened])
        await context.publisher.publish([opened])
        await kernel.idle(running)
        assert len(await kernel.on_topic(running, "status")) == 1
        group, topic = context.group, context.topic("result")
    await kernel.redeliver(stack, group, topic)
    async with open_service(toy.service(), settings) as running:
        await kernel.idle(running)
        assert await toy.counts(running) == {"o": 1}
        before, after = await kernel.on_topic(running, "status")
        assert (before.key, before.value) == (after.key, after.value)
        # The poison's own coordinates are those of opening 0: its record is not written a second time.
        assert len(await kernel.dead_of(running)) == 1


async def test_an_opening_that_is_of_no_day_dies_under_its_own_number(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 9: numbers count per root and group; filed elsewhere, the record could never be opened again."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        instance = str(ids.entrance_id("i", "1", now_ms(running)))
        old = ids.entrance_id("t", "old", now_ms(running) - 500 * DAY_MS)
        stale = replace(
            toy.asking(running, "result", "o", id=old, do="count", instance_id=instance), key=instance.encode()
        )
        await context.publisher.publish([stale])
        await kernel.idle(running)
        (record,) = await kernel.dead_of(running)
        for number in (1, 2):
            await context.publisher.publish([kernel.opening(stale, record.dead.root, number, record.dead.group)])
            await kernel.idle(running)
        records = await kernel.dead_of(running)
        assert [(r.dead.root, r.dead.opening, str(r.dead.reason)) for r in records] == [
            (record.dead.root, number, "stale") for number in (0, 1, 2)
        ]
        parks = [(name, body["record_id"], body["opening"]) for name, _, body in await signals(running)]
        record_id = str(ids.record_id(record.dead.root, record.dead.group))
        assert parks == [("message_parked", record_id, number) for number in (0, 1, 2)]


async def test_no_header_makes_a_day(stack: Stack, namespace: str) -> None:
    """DESIGN 8: a stranger may write any root; the ledger's tables are not his to make, and the partition moves on."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        good = replace(toy.asking(running, "result", "o", do="count"), key=b"p")
        far = [ids.entrance_id("t", "x", 4_000_000_000_000), UUID(int=(0xFFFF << 112) | (0x8 << 76) | (0b10 << 62))]
        roots = [*(f"id:{id_}" for id_ in far), "id:torn", "ce:1:a:\0b", "at:t:0:1\n"]
        torn = Emission(context.topic("result"), b"p", b"torn")
        sent = [kernel.opening(torn, root, 1, context.group) for root in roots]
        await context.publisher.publish([*sent, kernel.opening(good, roots[0], 1, context.group), good])
        await kernel.idle(running)
        assert await toy.counts(running) == {"o": 1}
        assert len(await kernel.dead_of(running)) == len(roots) + 1
        async with context.pool.acquire() as conn:
            tables = [r["t"] for r in await conn.fetch("SELECT inhrelid::regclass::text AS t FROM pg_inherits")]
        assert not [t for t in tables if "ledger_2096" in t or "ledger_9" in t]


async def test_the_body_of_a_correction_is_remembered(stack: Stack, namespace: str) -> None:
    """A4: once corrected and handled under an id, another body with that id is a conflict, never a repeat."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        poison = Emission(context.topic("result"), b"p", b"torn")
        await context.publisher.publish([poison])
        await kernel.idle(running)
        (record,) = await kernel.dead_of(running)
        id_ = ids.entrance_id("t", "x", now_ms(running))
        right, other = (toy.asking(running, "result", "o", id=id_, do="count", text=t) for t in ("right", "other"))
        await context.publisher.publish([kernel.opening(poison, record.dead.root, 1, record.dead.group, right.value)])
        await kernel.idle(running)
        await context.publisher.publish([right, other])
        await kernel.idle(running)
        assert await toy.counts(running) == {"o": 1}
        assert [str(r.dead.reason) for r in await kernel.dead_of(running)] == ["decode", "conflict"]


async def test_a_park_that_the_key_told_is_released_by_the_key(stack: Stack, namespace: str) -> None:
    """⚑ H1: bytes that nobody could read parked their key's instance; the opening that is handled releases that one."""
    async with open_service(toy.service(), await toy.settings(stack, namespace)) as running:
        context = running.context
        instance = str(ids.entrance_id("i", "1", now_ms(running)))
        poison = Emission(context.topic("result"), instance.encode(), b"torn")
        await context.publisher.publish([poison])
        await kernel.idle(running)
        (record,) = await kernel.dead_of(running)
        corrected = toy.asking(running, "result", "o", do="count").value
        await context.publisher.publish([kernel.opening(poison, record.dead.root, 1, record.dead.group, corrected)])
        await kernel.idle(running)
        said = [(name, about, body["record_id"], body["opening"]) for name, about, body in await signals(running)]
        record_id = str(ids.record_id(record.dead.root, record.dead.group))
        assert said == [("message_parked", instance, record_id, 0), ("message_released", instance, record_id, 1)]


async def test_a_message_that_was_kept_can_die_later_and_come_back(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 4: a mark to `dead` publishes the original's record and keeps its opening; an opening is then handled.

    A redelivery of the original repeats what it emitted when it was done, and changes nothing.
    """
    kept: list[bytes] = []

    def decide(state: int, message: Message, now: datetime) -> tuple[int, Sequence[Effect]]:
        text = bytes(message["body"])
        if b'"do": "mark"' in text:
            root = Root.own(first).text
            return state, [MarkLedger(root, "dead", Reason.STALE, "nobody awaited it", original=kept[0])]
        if message.id == first:
            kept.append(pack_delivery(message.delivery))
        return toy.decide(state, message, now)

    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(decide=decide), settings) as running:
        context = running.context
        first = ids.entrance_id("t", "first", now_ms(running))
        original = toy.asking(running, "result", "o", id=first, do="count")
        await context.publisher.publish([original])
        await kernel.idle(running)
        await context.publisher.publish([toy.asking(running, "result", "o", do="mark")])
        await kernel.idle(running)
        (record,) = await kernel.dead_of(running)
        assert (record.dead.root, record.dead.opening, str(record.dead.reason)) == (f"id:{first}", 0, "stale")
        assert (record.dead.original.key, record.dead.original.value) == (original.key, original.value)
        row = next(r for r in await kernel.ledger_rows(running) if r["id"] == first)
        assert (row["disposition"], row["opening"], row["reason"]) == ("dead", 0, "stale")
        group, topic = context.group, context.topic("result")
    await kernel.redeliver(stack, group, topic)
    async with open_service(toy.service(decide=decide), settings) as running:
        await kernel.idle(running)
        one, again = await kernel.on_topic(running, "status")
        assert one.value == again.value
        assert len({r.id for r in await kernel.dead_of(running)}) == 1
        await running.context.publisher.publish([kernel.opening(original, f"id:{first}", 1, group)])
        await kernel.idle(running)
        assert await toy.counts(running) == {"o": 2}
        row = next(r for r in await kernel.ledger_rows(running) if r["id"] == first)
        assert (row["disposition"], row["opening"]) == ("done", 1)


async def test_two_records_corrected_to_one_message_in_one_batch(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 9: handled once; the other opening is dead again under its own number, not folded away as a repeat."""

    def make(running: Running) -> list[Emission]:
        return [
            Emission(running.context.topic("result"), b"p", b"torn"),
            Emission(running.context.topic("result"), b"p", b"torn too"),
            toy.asking(running, "result", "o", do="count"),
        ]

    one, other, right = await kernel.make_topics(stack, namespace, make)
    await kernel.send(stack, [one, other])
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        await kernel.idle(running)
        roots = [r.dead.root for r in await kernel.dead_of(running)]
        group = running.context.group
    await kernel.send(stack, [kernel.opening(one, root, 1, group, right.value) for root in roots])
    async with open_service(toy.service(), settings) as running:
        await kernel.idle(running)
        assert await toy.counts(running) == {"o": 1}
        again = [(r.dead.root, r.dead.opening) for r in await kernel.dead_of(running) if r.dead.opening > 0]
        assert again == [(roots[1], 1)]
        rows = {r["root"]: (r["disposition"], r["opening"]) for r in await kernel.ledger_rows(running) if r["root"]}
        assert rows == {roots[0]: ("done", 1), roots[1]: ("dead", 1)}
