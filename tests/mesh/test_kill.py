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
from tests.support.load import Load
from tests.support.triage import Operator

from factmesh.stack import Stack
from factmesh_cli.mesh import Mesh

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(600)]

FACTS = 500
ROUNDS = 3
VICTIMS = ("intake", "orchestrator", "connector", "notifier")
SEED = 20261123
RATE = 14.0
AFTER_S_MAX = 0.012
"""What a batch takes from a statement of its transaction to the acknowledgement of what it published, and a little."""
MIDDLE_S_MAX = 3.0


async def test_every_service_killed_three_times(stack: Stack, namespace: str) -> None:
    """INV-L, X, K, F, D (B2, C2, D2, G7): a kill at any instant loses nothing and does nothing twice."""
    async with chaos.started(stack, namespace) as mesh, evidence.books(mesh) as look:
        plan = chaos.generate(mesh.project, FACTS, SEED)
        load = Load(mesh, RATE)
        sending = asyncio.create_task(load.send(plan.sendings))
        in_flight = await kill_all(mesh, look, load, random.Random(SEED))
        await sending
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


async def kill_all(mesh: Mesh, look: Books, load: Load, chance: random.Random) -> dict[str, int]:
    """Kill each service `ROUNDS` times, in turn, each time while facts are under way; returns how many were."""
    in_flight = {}
    for number in range(ROUNDS):
        victims = list(VICTIMS)
        chance.shuffle(victims)
        for victim in victims:
            in_flight[f"{victim} {number + 1}"] = await under_way(look, load)
            await in_the_middle(mesh, look, victim)
            await asyncio.sleep(chance.uniform(0.0, AFTER_S_MAX))
            mesh.kill(victim)
            await asyncio.sleep(chance.uniform(0.2, 1.0))
            mesh.restart(victim)
            await mesh.until_ready([victim])
            await asyncio.sleep(chance.uniform(0.2, 1.5))
    return in_flight


async def in_the_middle(mesh: Mesh, look: Books, victim: str) -> None:
    """Return at an instant at which it is within a transaction: what follows is the commit, then the publication."""
    until = time.monotonic() + MIDDLE_S_MAX
    while time.monotonic() < until:
        if await look.fetch(victim, evidence.SQL.writes, mesh.schema(victim)):
            return


async def under_way(look: Books, load: Load, timeout_s: float = 60.0) -> int:
    """Acknowledged facts whose instance has not ended, once there are some."""
    deadline = time.monotonic() + timeout_s
    while True:
        names = {s.name for s in load.acknowledged}
        n: int = len(names) - (await evidence.moving(look))["ended"]
        if n > 0 or time.monotonic() > deadline:
            return n
        await asyncio.sleep(0.1)
