"""Every service is killed with SIGKILL, three times, while 500 facts are in flight; then the invariants must hold.
Judged from the generator's log, the sandbox's own log and the topics, not from what the mesh says of itself.
"""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from tests.support import chaos, evidence
from tests.support.evidence import Books
from tests.support.judge import judge, text
from tests.support.load import Load, parts
from tests.support.triage import Operator

from factmesh.stack import Stack
from factmesh_cli.demo_plan import Plan
from factmesh_cli.mesh import Mesh

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(600)]

FACTS = 500
ROUNDS = 3
VICTIMS = ("intake", "orchestrator", "connector", "notifier")
SEED = 20261123
RATE = 12.0
AFTER_S_MAX = 0.012
"""What a batch takes from a statement of its transaction to the acknowledgement of what it published, and a little."""
MIDDLE_S_MAX = 3.0


async def test_every_service_killed_three_times(stack: Stack, namespace: str) -> None:
    """INV-L, X, K, F, D (B2, C2, D2, G7): a kill at any instant loses nothing and does nothing twice."""
    async with chaos.started(stack, namespace) as mesh, evidence.books(mesh) as look:
        plan = chaos.generate(mesh.project, FACTS, SEED)
        load = Load(mesh, RATE)
        in_flight = await send_and_kill(mesh, look, load, plan)
        assert all(n > 0 for n in in_flight.values()), f"a kill that hits nothing proves nothing: {in_flight}"
        dead = sum(1 for s in plan.sendings if s.remedy is not None)
        await evidence.quiet(look, instances=len(plan.intended) - dead, timeout_s=150)
        before = judge(await evidence.gather(look, load.acknowledged, plan.intended, final=False))
        assert not before, text(before)

        operator = Operator(mesh, plan, chaos.IN_FLIGHT_S)
        await operator.until_all_is_done(look, timeout_s=150)
        print(f"in flight at each kill: {in_flight}; acts: {dict(operator.acts)}; answers: {load.answers}")
        after = await evidence.gather(look, load.acknowledged, plan.intended, final=True)
        breaches = judge(after)
        assert not breaches, text(breaches)
        assert len(after.instances) == len(plan.intended)
        assert not [m.name for m in mesh.ended()], "a service ended by itself"


async def send_and_kill(mesh: Mesh, look: Books, load: Load, plan: Plan) -> dict[str, int]:
    """A part of the facts for each kill, in some order of the services; returns how many instances moved at each."""
    chance = random.Random(SEED)
    turns = [f"{victim} {n + 1}" for n in range(ROUNDS) for victim in chance.sample(VICTIMS, len(VICTIMS))]
    in_flight = {}
    for turn, part in zip(turns, parts(plan.sendings, len(turns)), strict=True):
        victim = turn.partition(" ")[0]
        sending = asyncio.create_task(load.send(part))
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        in_flight[turn] = await under_way(look)
        await in_the_middle(mesh, look, victim)
        await asyncio.sleep(chance.uniform(0.0, AFTER_S_MAX))
        mesh.kill(victim)
        await asyncio.sleep(chance.uniform(0.2, 1.0))
        mesh.restart(victim)
        await mesh.until_ready([victim])
        await sending
    return in_flight


async def in_the_middle(mesh: Mesh, look: Books, victim: str) -> None:
    """Return at an instant at which it is within a transaction: what follows is the commit, then the publication."""
    until = time.monotonic() + MIDDLE_S_MAX
    while time.monotonic() < until:
        if await look.fetch(victim, evidence.SQL.writes, mesh.schema(victim)):
            return


async def under_way(look: Books, timeout_s: float = 60.0) -> int:
    """How many instances move, once some do."""
    deadline = time.monotonic() + timeout_s
    while True:
        n: int = (await evidence.moving(look))["moving"]
        if n > 0 or time.monotonic() > deadline:
            return n
        await asyncio.sleep(0.05)
