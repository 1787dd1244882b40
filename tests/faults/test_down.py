"""The database or the broker is down: at start, and in the middle of the load, stopped and killed.
On a stack of its own, because nobody else's may be stopped; the services are processes that nobody starts again.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support import chaos, evidence
from tests.support.judge import judge, text
from tests.support.load import Load, parts
from tests.support.triage import Operator
from tests.support.waiting import until

from factmesh.stack import EmbeddedStack, Stack, kind_of_stack
from factmesh_cli.mesh import SERVICES, Member, Mesh, free_port

pytestmark = [
    pytest.mark.stack,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(kind_of_stack() == "external", reason="an external stack is not ours to stop"),
]

FACTS = 280
RATE = 10.0
SEED = 11
BEFORE_S = 2.0
OUTAGE_S = 4.0
LINES_MAX = 200


@pytest.fixture
async def mesh() -> AsyncIterator[tuple[EmbeddedStack, Mesh]]:
    """Services as processes over servers that are not there yet; only the sandbox runs."""
    with tempfile.TemporaryDirectory(prefix="fm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = free_port()
        own = EmbeddedStack(Path(folder) / "stack", port, free_port())
        try:
            await asyncio.to_thread(own.postgres.start)
            stack = Stack(f"127.0.0.1:{port}", own.postgres.dsn)
            mesh = Mesh(Path(folder) / "run", stack, chaos.impatient(Path(folder)))
            for service in SERVICES:
                await stack.provide_schema(mesh.schema(service))
            await asyncio.to_thread(own.postgres.stop)
            await mesh.start(())
            for service in SERVICES:
                mesh.add(service, free_port()).start()
            try:
                yield own, mesh
            finally:
                await mesh.stop()
        finally:
            await asyncio.to_thread(own.stop)


async def test_servers_down_at_start_and_under_load(mesh: tuple[EmbeddedStack, Mesh]) -> None:
    """INV-L, X, K, F, D (B2, G7): services wait with a clear text, go on by themselves, and nothing is lost."""
    own, up = mesh
    own_address = up.stack.postgres_dsn.partition("@")[2].partition("/")[0]
    await says(up, "PostgreSQL at", own_address, "does not answer; trying again")
    await asyncio.to_thread(own.postgres.start)
    await says(up, f"Kafka at {up.stack.bootstrap} does not answer; trying again", "for as long as it takes")
    assert not up.ended(), "a service gave up waiting"
    await asyncio.to_thread(own.kafka.start)
    await up.until_ready(SERVICES, timeout_s=120)

    async with evidence.books(up) as look:
        plan = chaos.generate(up.project, FACTS, SEED)
        load = Load(up, RATE, give_up_s=180)
        outages = (
            (own.kafka.kill, own.kafka.start),
            (own.postgres.stop, own.postgres.start),
            (own.kafka.stop, own.kafka.start),
            (own.postgres.kill, own.postgres.start),
        )
        for (stop, start), part in zip(outages, parts(plan.sendings, len(outages)), strict=True):
            sending = asyncio.create_task(load.send(part))
            await asyncio.sleep(BEFORE_S)
            assert not sending.done(), "the load ended before the outage: nothing was proved"
            await asyncio.to_thread(stop)
            await asyncio.sleep(OUTAGE_S)
            await asyncio.to_thread(start)
            await sending
            assert not up.ended(), f"a service ended over an outage: {[(m.name, m.tail()) for m in up.ended()]}"
        dead = sum(1 for s in plan.sendings if s.remedy is not None)
        await evidence.quiet(look, instances=len(plan.intended) - dead, timeout_s=150)
        before = judge(await evidence.gather(look, load.acknowledged, plan.intended, final=False))
        assert not before, text(before)
        assert not up.ended(), "a service ended by itself"
        await up.until_ready(SERVICES)

        operator = Operator(up, plan, chaos.IN_FLIGHT_S)
        await operator.until_all_is_done(look, timeout_s=150)
        print(f"acts: {dict(operator.acts)}; answers: {load.answers}; attempts: {load.attempts}")
        after = await evidence.gather(look, load.acknowledged, plan.intended, final=True)
        breaches = judge(after)
        assert not breaches, text(breaches)
        assert len(after.instances) == len(plan.intended)


async def says(mesh: Mesh, *parts: str) -> None:
    """Every service's log has one line with all of these parts, and the service still runs."""
    for service in SERVICES:
        member = mesh.members[service]

        async def said(member: Member = member) -> bool:
            lines = member.tail(LINES_MAX).splitlines()
            return any(all(part in line for part in parts) for line in map(readable, lines))

        try:
            await until(f"{service} says {parts}", said, timeout_s=60)
        except AssertionError as error:
            raise AssertionError(f"{error}; its log ends:\n{member.tail()}") from None
        assert member.running, f"{service} ended:\n{member.tail()}"


def readable(line: str) -> str:
    """A log line's texts as a person reads them."""
    try:
        return " | ".join(str(v) for v in json.loads(line).values())
    except ValueError:
        return line
