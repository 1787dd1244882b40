"""A projection leaves no row of what it merely applied; whatever is disturbed is judged and recorded as ever."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support import kernel, toy

from factmesh import ids
from factmesh.message import Emission
from factmesh.service import Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def things(running: Running) -> dict[str, tuple[int, str]]:
    async with running.context.pool.acquire() as conn:
        return {r["key"]: (r["n"], r["last"]) for r in await conn.fetch("SELECT key, n, last FROM thing")}


async def rows(running: Running) -> list[tuple[str, str, int]]:
    return [(r["disposition"], r["reason"] or "", r["seen"]) for r in await kernel.ledger_rows(running)]


def seeing(running: Running, object_id: str, seq: int, **more: Any) -> Emission:
    return toy.asking(running, "result", object_id, do="see", seq=seq, text=f"at {seq}", **more)


async def test_what_is_merely_applied_leaves_no_row_and_a_repeat_or_late_one_changes_nothing(
    stack: Stack, namespace: str
) -> None:
    """Decision 11: the guard on the row's own number stands for the ledger; nothing is emitted, offsets move on."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(**toy.projection()), settings) as running:
        publish = running.context.publisher.publish
        messages = [seeing(running, f"o{n % 3}", n) for n in range(30)]
        await publish([*messages, messages[-1], messages[0]])
        await kernel.idle(running)
        newest = {"o0": (27, "at 27"), "o1": (28, "at 28"), "o2": (29, "at 29")}
        assert await things(running) == newest
        await publish([messages[5], messages[29], messages[28]])
        await kernel.idle(running)
        assert await things(running) == newest
        assert await rows(running) == []
        assert await kernel.dead_of(running) == [] == await kernel.on_topic(running, "status")
        group, topic = running.context.group, running.context.topic("result")
    await kernel.redeliver(stack, group, topic)
    async with open_service(toy.service(**toy.projection()), settings) as running:
        await kernel.idle(running)
        assert (await things(running), await rows(running)) == (newest, [])


async def test_what_dies_in_a_projection_is_recorded_quarantined_and_opened(stack: Stack, namespace: str) -> None:
    """⚑ INV-D: a decision that refuses, a bug and bytes that nobody can read each have their row, record and park."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(**toy.projection()), settings) as running:
        context = running.context
        instance = str(ids.entrance_id("i", "1", int(context.clock.now().timestamp() * 1000)))
        refused = toy.asking(running, "result", "o", do="refuse", instance_id=instance)
        bug = toy.asking(running, "result", "o", do="bug", instance_id=instance)
        torn = Emission(context.topic("result"), instance.encode(), b"torn")
        await context.publisher.publish([seeing(running, "o", 1), refused, torn, bug, seeing(running, "p", 2)])
        await kernel.idle(running)
        assert await things(running) == {"o": (1, "at 1"), "p": (2, "at 2")}
        dead = {str(r.dead.reason): r.dead for r in await kernel.dead_of(running)}
        assert set(dead) == {"validation", "decode", "bug"}
        found = await rows(running)
        assert sorted(r for d, r, _ in found if d == "dead") == ["bug", "decode", "validation"]
        said = toy.decoded(running, await kernel.on_topic(running, "signal"))
        assert [(m["signal"], m["instance_id"]) for m in said] == [("message_parked", instance)] * 3

        right = seeing(running, "o", 7, id=ids.entrance_id("t", "x", int(context.clock.now().timestamp() * 1000)))
        record = dead["decode"]
        opened = kernel.opening(torn, record.root, 1, record.group, right.value)
        await context.publisher.publish([opened, opened])
        await kernel.idle(running)
        assert (await things(running))["o"] == (7, "at 7")
        said = toy.decoded(running, await kernel.on_topic(running, "signal"))
        body = json.loads(said[-1]["body"])
        assert (said[-1]["signal"], body["opening"], len(said)) == ("message_released", 1, 4)
        row = next(r for r in await kernel.ledger_rows(running) if r["root"] == record.root)
        assert (row["disposition"], row["opening"]) == ("done", 1)


async def test_a_row_is_respected_also_by_code_that_would_decide_otherwise(stack: Stack, namespace: str) -> None:
    """⚑ INV-D: it died and its record may not be out; after the restart, mended code publishes that record again."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(**toy.projection()), settings) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "o", do="bug", seq=5)])
        await kernel.idle(running)
        (record,) = await kernel.dead_of(running)
        group, topic = running.context.group, running.context.topic("result")
    await kernel.redeliver(stack, group, topic)
    mended = toy.projection(decide=lambda _state, _message, _now: (None, ()))
    async with open_service(toy.service(**mended), settings) as running:
        await running.context.publisher.publish([seeing(running, "p", 1)])
        await kernel.idle(running)
        assert [r.id for r in await kernel.dead_of(running)] == [record.id, record.id]
        assert await things(running) == {"p": (1, "at 1")}
        assert ("dead", "bug", 2) in await rows(running)


async def test_a_decision_with_effects_has_its_row_and_a_duplicate_of_it_publishes_nothing(
    stack: Stack, namespace: str
) -> None:
    """⚑ DESIGN 3: what a projection emits after all is emitted from the ledger, once."""
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(**toy.projection()), settings) as running:
        telling = toy.asking(running, "result", "o", do="count", seq=3)
        await running.context.publisher.publish([telling])
        await kernel.idle(running)
        await running.context.publisher.publish([telling, seeing(running, "o", 4)])
        await kernel.idle(running)
        assert len(await kernel.on_topic(running, "status")) == 1
        assert ("done", "", 2) in await rows(running)
        assert (await things(running))["o"] == (4, "at 4")
