"""Two operators replay the same filter, and one of them is killed with SIGKILL at each step of his work.
Real processes over the real index, and the real intake that handles what they publish.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from tests.faults import killed_operator
from tests.support import chaos, evidence
from tests.support.waiting import until

from factmesh import ids, kafka
from factmesh.ids import Root
from factmesh.message import Emission
from factmesh.settings import Settings
from factmesh.stack import Stack
from factmesh.topics import FACT, FACTS_RAW, dlq_of
from factmesh_cli import dlq_operate
from factmesh_cli.dlq_index import Index, catch_up, load_settings, open_index, read_addresses
from factmesh_cli.mesh import Mesh
from factmesh_quarantine import queries
from factmesh_quarantine.model import State

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(600)]

SOURCE = "//shop.example/web"
COHORT = 2
STEPS_MAX = 40
AT_ONCE = 3
GOOD_BESIDE_EACH = 2
"""Live facts between the dead ones: a partition where most messages die would be halted, and rightly."""
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Desk:
    """The mesh, the index as a third operator has it open, and the dead facts in cohorts."""

    mesh: Mesh
    settings: Settings
    index: Index
    cohorts: list[tuple[UUID, ...]]


def fact(name: str, at: datetime) -> Emission:
    """A sign-up; one whose instant is older than the horizon dies at intake, and a replay is its acceptance."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": name,
        "ce_source": SOURCE,
        "ce_type": "customer.signed_up",
        "ce_dataschema": "//shop.example/schemas/customer.signed_up/v1",
        "content-type": "application/json",
    }
    data: dict[str, str | None] = {"customer_id": name, "email": f"{name}@example.org", "country": "AT"}
    data |= {"signed_up_at": at.isoformat(), "full_name": "A B", "marketing": None, "plan": "free"}
    pairs = tuple((k, v.encode()) for k, v in headers.items())
    return Emission("", name.encode(), json.dumps(data).encode(), pairs)


@pytest.fixture
async def desk(stack: Stack, namespace: str) -> AsyncIterator[Desk]:
    killed_by_steps, at_once = STEPS_MAX * COHORT, STEPS_MAX * COHORT
    with tempfile.TemporaryDirectory(prefix="fm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        mesh = Mesh(Path(folder) / "run", stack, chaos.impatient(Path(folder)), namespace)
        try:
            await mesh.start(("intake", "quarantine"), sandbox=False)
            # Its index must be there; the service itself would publish what a killed tool left, so it leaves.
            mesh.members["quarantine"].signal(signal.SIGTERM)
            mesh.members["quarantine"].wait(20)
            settings = load_settings(read_addresses(mesh.run_dir))
            async with open_index(settings) as index:
                dead = await die(mesh, index, killed_by_steps + at_once)
                cohorts = [tuple(dead[n : n + COHORT]) for n in range(0, len(dead), COHORT)]
                yield Desk(mesh, settings, index, cohorts)
        finally:
            await mesh.stop()


async def die(mesh: Mesh, index: Index, count: int) -> list[UUID]:
    """Facts that are too old to be proved new, between live ones; their records once all are filed."""
    now, raw = datetime.now(UTC), FACTS_RAW.of(mesh.prefix)
    publisher = kafka.Publisher(mesh.stack.bootstrap, client_id="load")
    emissions = []
    for n in range(count):
        emissions += [fact(f"live-{n}-{m}", now) for m in range(GOOD_BESIDE_EACH)]
        emissions.append(fact(f"old-{n}", now - timedelta(days=40)))
    await publisher.publish([Emission(raw, e.key, e.value, e.headers) for e in emissions])
    await publisher.close()

    async def filed() -> list[UUID]:
        await catch_up(index)
        rows = await queries.list_records(index.pool, queries.Filter(topic=raw))
        return [r["id"] for r in rows] if len(rows) == count else []

    return list(await until(f"{count} dead facts are filed", filed, timeout_s=90, every_s=0.5))


class Hand:
    """One operator's process, and the last step that it told of."""

    def __init__(self, settings: Settings, records: Sequence[UUID], by: str, kill_at: int = 0) -> None:
        self._reading, writing = PROCESSES.Pipe(duplex=False)
        arguments = (settings, records, by, kill_at, writing)
        self.process = PROCESSES.Process(target=killed_operator.operate, args=arguments, daemon=True)
        self.process.start()
        writing.close()
        self.last = (0, "nothing")

    async def ended(self, timeout_s: float = 90.0) -> int | None:
        """Its exit code; the negative number of the signal that killed it."""
        deadline = time.monotonic() + timeout_s
        while self.process.is_alive():
            assert time.monotonic() < deadline, f"an operator hangs after step {self.last}"
            self._hear()
            await asyncio.sleep(0.02)
        self._hear()
        return self.process.exitcode

    def _hear(self) -> None:
        try:
            while self._reading.poll():
                self.last = self._reading.recv()
        except EOFError:
            pass


async def test_killed_at_each_step(desk: Desk) -> None:
    """E2, DESIGN 9: one killed at each step, another one with him or after him: each opening once, none lost."""
    PROCESSES.set_forkserver_preload(["tests.faults.killed_operator"])
    cohorts = iter(desk.cohorts)
    whole = Hand(desk.settings, next(cohorts), "ann")
    assert await whole.ended() == 0
    steps = whole.last[0]
    assert 15 < steps < STEPS_MAX, f"the count of steps is not what this test was made for: {whole.last}"

    reached: dict[bool, dict[int, str]] = {True: {}, False: {}}
    used = [desk.cohorts[0]]
    gate = asyncio.Semaphore(AT_ONCE)

    async def scenario(kill_at: int, records: tuple[UUID, ...], *, together: bool) -> None:
        async with gate:
            killed = Hand(desk.settings, records, "ann", kill_at)
            other = Hand(desk.settings, records, "bob") if together else None
            code = await killed.ended()
            if code == -signal.SIGKILL:
                reached[together][kill_at] = killed.last[1]
            other = other or Hand(desk.settings, records, "bob")
            assert await other.ended() == 0, f"the other operator failed after a kill at {killed.last}"
            await resume(desk.index)
            await check(desk, records, f"killed at step {killed.last}, together={together}")

    async with asyncio.TaskGroup() as tasks:
        for together in (False, True):
            for kill_at in range(1, steps + 1):
                used.append(next(cohorts))
                tasks.create_task(scenario(kill_at, used[-1], together=together))
    # Who took up what another scenario's killed one left may have spared this one a step: once more, one by one.
    for kill_at in sorted(set(range(1, steps + 1)) - reached[False].keys()):
        used.append(next(cohorts))
        await scenario(kill_at, used[-1], together=False)
    # Alone he meets every step; of two at once one may find the work done and have fewer.
    assert sorted(reached[False]) == list(range(1, steps + 1)), reached[False]
    assert len(reached[True]) > steps // 2, reached[True]
    print(f"{steps} steps, all met by one alone; {len(reached[True])} of them beside another")
    await handled_once(desk, [r for records in used for r in records])


async def resume(index: Index) -> None:
    """The next start of the tool publishes what was left; then the killed operation is taken up again."""
    await dlq_operate.publish_left_over(index)
    rows = await index.pool.fetch("SELECT DISTINCT operation FROM operation_item WHERE outcome IS NULL")
    for row in rows:
        operation = await dlq_operate.find(index, row["operation"])
        act = index.acts.replay
        await dlq_operate.run(index, operation, act, "cleo", rate=1_000, told=lambda _step: None)


async def check(desk: Desk, records: Sequence[UUID], where: str) -> None:
    """The index: each record raised once, under number 1, published, and taken by one of the operations."""
    for id_ in records:
        row = await desk.index.acts.read(desk.index.pool, id_)
        _, acts = await queries.story(desk.index.pool, id_)
        numbers = (State(row["state"]), row["raised"], row["published"], row["dead"])
        assert numbers == (State.REPLAYED, 1, 1, 0), f"{where}: record {id_} is {numbers}"
        assert [a["number"] for a in acts] == [1], f"{where}: record {id_} has acts {acts}"
        took = await desk.index.pool.fetchval(
            "SELECT count(*) FROM operation_item WHERE record = $1 AND outcome = 'raised'", id_
        )
        assert took == 1, f"{where}: record {id_} was raised by {took} operations"


async def handled_once(desk: Desk, records: Sequence[UUID]) -> None:
    """The receiver: one opening of each root, the same bytes however often, handled once, and nothing died again."""
    mesh = desk.mesh
    rows = await queries.list_records(desk.index.pool, queries.Filter(ids=tuple(records), states=None))
    roots = {bytes(r["root"]).decode() for r in rows}
    assert len(roots) == len(records)
    raw, facts, dlq = (t for t in (FACTS_RAW.of(mesh.prefix), FACT.of(mesh.prefix), dlq_of(FACTS_RAW.of(mesh.prefix))))

    async def settled() -> bool:
        return not await kafka.backlog(mesh.stack.bootstrap, f"{mesh.prefix}factmesh-intake", [raw])

    await until("intake has handled every opening", settled, timeout_s=60)
    sent: dict[str, set[tuple[int, bytes | None]]] = defaultdict(set)
    for d in await kafka.read_all(mesh.stack.bootstrap, [raw]):
        if d.opening > 0 and d.root_override is not None:
            sent[d.root_override.text].add((d.opening, d.value))
    assert set(sent) == roots, "an opening was lost, or one was sent that nobody raised"
    assert {len(s) for s in sent.values()} == {1}, "an opening has two numbers or two bodies"
    assert {n for s in sent.values() for n, _ in s} == {1}
    async with evidence.books(mesh, ("intake",)) as look:
        own = await evidence.decoded(mesh, await kafka.read_all(mesh.stack.bootstrap, [facts]))
        given = defaultdict(set)
        for m in own:
            given[m["correlation_id"]].add(m.id)
        names = [d.header("ce_id") or "" for d in await kafka.read_all(mesh.stack.bootstrap, [dlq])]
        opened = [n for n in names if Root.stranger(SOURCE, n).text in roots]
        assert sorted(opened) == sorted(set(opened)), "an opening died again"
        for name in opened:
            handled = given[str(ids.correlation_id(SOURCE, name))]
            assert len(handled) == 1, f"{name} was handled {len(handled)} times"
        ledger = await look.fetch("intake", evidence.SQL.ledger)
        done = sum(1 for r in ledger if r["opening"] == 1 and r["disposition"] == "done")
        assert done == len(records)
        assert not [r for r in ledger if r["opening"] > 1]
