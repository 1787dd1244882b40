"""Two replicas of each service; one of them stops (SIGSTOP) past its lease and goes on while facts are in flight.
A process that wakes up late believes what it believed before: it may repeat, and nothing that it does may count.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter

import psutil
import pytest
from tests.support import chaos, evidence
from tests.support.judge import judge, text
from tests.support.load import Load, parts
from tests.support.triage import Operator

from factmesh.stack import Stack
from factmesh_cli.mesh import SERVICES, Member, Mesh, free_port

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(600)]

FACTS = 400
SEED = 7
RATE = 8.0
BEFORE_S = 3.0
REPLICATED = ("connector", "notifier", "intake", "orchestrator")
TRANSACTION_TIMEOUT_S = 3.0
EVENTS = ("claims.lease_lost", "batch.retry", "kafka.lost")
STOPPED_S = 18.0
"""Past everything that tells a living replica from a dead one: the transaction (3 s), the group's session (6 s) and the
longest lease (the CRM's question and call, and ten: 13 s, and what it takes until somebody looks)."""


async def test_one_of_two_replicas_stops_and_goes_on(stack: Stack, namespace: str) -> None:
    """INV-L, X, K, F, D (G7): a replica that was stopped past its lease and continued changes nothing that it lost."""
    settings = {"FACTMESH_TRANSACTION_TIMEOUT_S": str(TRANSACTION_TIMEOUT_S)}
    async with chaos.started(stack, namespace, settings=settings) as mesh, evidence.books(mesh) as look:
        assert set(REPLICATED) < set(SERVICES)
        twins = [mesh.add(service, free_port(), f"{service}-2") for service in REPLICATED]
        for twin in twins:
            twin.start()
        await mesh.until_ready([t.name for t in twins])
        plan = chaos.generate(mesh.project, FACTS, SEED)
        load = Load(mesh, RATE, entrances=("intake", "intake-2"))
        ended = []
        for names, part in zip(_turns(), parts(plan.sendings, 2), strict=True):
            sending = asyncio.create_task(load.send(part))
            await asyncio.sleep(BEFORE_S)
            ended.append(await stop_a_while(mesh, look, names))
            await sending
        assert all(after > before for before, after in ended), f"the other replica should have gone on: {ended}"
        dead = sum(1 for s in plan.sendings if s.remedy is not None)
        await evidence.quiet(look, instances=len(plan.intended) - dead, timeout_s=150)
        before = judge(await evidence.gather(look, load.acknowledged, plan.intended, final=False))
        assert not before, text(before)

        operator = Operator(mesh, plan, chaos.IN_FLIGHT_S)
        await operator.until_all_is_done(look, timeout_s=150)
        print(f"ended before and after each stop: {ended}; acts: {dict(operator.acts)}; answers: {load.answers}")
        met = +woken(mesh)
        print(f"what the woken ones met: {met}")
        assert met["orchestrator", "batch.retry"] and met["orchestrator-2", "batch.retry"], met
        assert met["connector", "claims.lease_lost"] + met["connector-2", "claims.lease_lost"], met
        after = await evidence.gather(look, load.acknowledged, plan.intended, final=True)
        breaches = judge(after)
        assert not breaches, text(breaches)
        assert len(after.instances) == len(plan.intended)
        assert not [m.name for m in mesh.ended()], "a service ended by itself"


def woken(mesh: Mesh) -> Counter[tuple[str, str]]:
    """What the replicas said of having been away: transactions that were ended, leases and partitions lost."""
    out: Counter[tuple[str, str]] = Counter()
    for name, member in mesh.members.items():
        text_ = member.log.read_text(encoding="utf-8")
        out.update({(name, event): text_.count(f'"{event}"') for event in EVENTS})
    return out


def _turns() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First one replica of every service, then the other one."""
    return REPLICATED, tuple(f"{service}-2" for service in REPLICATED)


async def stop_within_a_call(member: Member, look: evidence.Books, timeout_s: float = 30.0) -> None:
    """SIGSTOP at an instant at which it has a call in flight: a row that is not settled for longer than calls take."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        member.signal(signal.SIGSTOP)
        before = {(r["id"], r["epoch"]) for r in await look.fetch("connector", evidence.SQL.leased)}
        await asyncio.sleep(2 * chaos.TIMEOUT_S + 1.0)
        if before & {(r["id"], r["epoch"]) for r in await look.fetch("connector", evidence.SQL.leased)}:
            return
        member.signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
    raise AssertionError(f"{member.name} was never seen with a call in flight; its log ends:\n{member.tail()}")


async def stop_within_a_transaction(member: Member, look: evidence.Books, timeout_s: float = 30.0) -> None:
    """SIGSTOP at an instant at which it holds locks: looked at, and where it holds none, continued and tried again."""
    assert member.process is not None
    process = psutil.Process(member.process.pid)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        member.signal(signal.SIGSTOP)
        await asyncio.sleep(0.05)  # what PostgreSQL is still carrying out for it ends
        ports = {c.laddr.port for c in process.net_connections("tcp")}
        if any(r["client_port"] in ports for r in await look.fetch("orchestrator", evidence.SQL.in_transaction)):
            return
        member.signal(signal.SIGCONT)
        await asyncio.sleep(0.031)
    raise AssertionError(f"{member.name} was never seen within a transaction; its log ends:\n{member.tail()}")


async def stop_a_while(mesh: Mesh, look: evidence.Books, names: tuple[str, ...]) -> tuple[int, int]:
    """SIGSTOP, wait, SIGCONT; how many instances had ended before and after."""
    before, until = (await evidence.moving(look))["ended"], 0.0
    for name in names:
        if name.startswith("connector"):
            await stop_within_a_call(mesh.members[name], look)
            until = time.monotonic() + STOPPED_S
        elif name.startswith("orchestrator"):
            await stop_within_a_transaction(mesh.members[name], look)
        else:
            mesh.members[name].signal(signal.SIGSTOP)
    while time.monotonic() < until:
        await asyncio.sleep(0.2)
    after = (await evidence.moving(look))["ended"]
    for name in names:
        mesh.members[name].signal(signal.SIGCONT)
    return before, after
