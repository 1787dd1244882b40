"""What becomes of throughput and of the cost of a workflow as work grows: ledger, payload, steps, replicas, partitions.
Each point is short and by itself; a budget of time bounds the whole, and what did not fit into it is named.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncpg
from tests.bench import plans, systems
from tests.bench.load import DATA_BYTES, Load, StallError
from tests.bench.meter import Meter
from tests.bench.phases import Plan, pids_of, saturate, say
from tests.bench.seed import SAMPLE_WORKFLOWS, Seeder
from tests.bench.systems import SERVICES, Shape

AXES = ("ledger", "payload", "steps", "replicas", "partitions")
START_S = 15.0
"""What starting and stopping the services takes, for the budget."""


@dataclass(frozen=True)
class GrowthPlan:
    """Which points, how many workflows at once at each, and for how long."""

    window: int = 300
    warm_s: float = 4.0
    seconds: float = 8.0
    repeats: int = 2
    """Of the points of the ledger, whose flatness is judged: the mean of so many stretches."""
    ledger: Sequence[int] = (10_000, 100_000, 1_000_000)
    payload_bytes: Sequence[int] = (DATA_BYTES, 4_096, 65_536)
    steps: Sequence[int] = (1, 3, 10, 50)
    replicas: Sequence[int] = (2, 4)
    partitions: Sequence[int] = (1, 4, 12, 24)
    young_s: float = 5.0
    grown_workflows: int = 30_000


TINY_GROWTH = GrowthPlan(
    window=30,
    warm_s=1.0,
    seconds=2.0,
    repeats=1,
    ledger=(3_000, 6_000),
    payload_bytes=(65_536,),
    steps=(10,),
    replicas=(2,),
    partitions=(24,),
    young_s=2.0,
    grown_workflows=20_000,
)
"""For trying the benchmark itself: every path, no figure."""


@dataclass
class Growth:
    """One run of the curves over one stack."""

    stack: Any
    folder: Path
    given: Mapping[str, str]
    plan: GrowthPlan
    ends: float
    found: dict[str, Any] = field(default_factory=lambda: {"axes": {}, "skipped": []})
    """Filled point by point, so that a point that fails loses no other."""

    @property
    def axes(self) -> dict[str, list[dict[str, Any]]]:
        axes: dict[str, list[dict[str, Any]]] = self.found["axes"]
        return axes

    def fits(self, what: str, seconds: float) -> bool:
        """Whether there is time for it; named if not."""
        if time.monotonic() + seconds <= self.ends:
            return True
        self.found["skipped"].append(what)
        say(f"growth: no time left for {what}")
        return False

    async def all(self, only: Sequence[str] = AXES) -> None:
        """The curves, cheap axes first; the ledger's 10⁶ last, for seeding it takes longest."""
        base = await self.point("base", 0, Shape())
        if base is None:
            return
        busiest = max(SERVICES, key=lambda s: float(base["cost"]["cpu_ms"][s]))
        plan = self.plan
        self.found |= {"busiest": busiest, "window": plan.window}
        if "payload" in only:
            for size in plan.payload_bytes:
                await self.add("payload", size, base, size == DATA_BYTES, Shape(), data_bytes=size)
        if "steps" in only:
            for steps in plan.steps:
                await self.add("steps", steps, base, steps == 3, Shape(steps=steps))
        if "replicas" in only:
            for service in dict.fromkeys((busiest, "orchestrator")):
                self.axes[f"replicas of {service}"] = [{**base, "x": 1}]
                for count in plan.replicas:
                    shape = Shape(replicas={service: count})
                    await self.add(f"replicas of {service}", count, base, False, shape)
        if "partitions" in only:
            for count in plan.partitions:
                await self.add("partitions", count, base, count == Shape().partitions, Shape(partitions=count))
        if "ledger" in only:
            await self.ledger()

    async def add(
        self, axis: str, x: int, base: Mapping[str, Any], is_base: bool, shape: Shape, *, data_bytes: int = DATA_BYTES
    ) -> None:
        """One more point of a curve; the plain setting is measured once. A point that fails is named and left out."""
        try:
            found = dict(base) if is_base else await self.point(axis, x, shape, data_bytes)
        except Exception as error:
            say(f"growth: {axis} {x} FAILED: {error}")
            self.found.setdefault("failed", {})[f"{axis} {x}"] = f"{type(error).__name__}: {error}"[:2000]
            return
        if found is not None:
            self.axes.setdefault(axis, []).append({**found, "x": x})

    async def point(self, axis: str, x: int, shape: Shape, data_bytes: int = DATA_BYTES) -> dict[str, Any] | None:
        """A system of its own: warmed up, then measured at the window."""
        plan = self.plan
        what = f"{axis} {x}" if x else axis
        if not self.fits(what, START_S + plan.warm_s + plan.seconds * 2):
            return None
        name = "g" + "".join(c for c in axis if c.isalpha())[:14].lower() + str(x)
        async with systems.ours(self.stack.stack, self.folder, name, self.given, shape) as system:
            load = Load(self.stack.stack.bootstrap, system.topic_in, system.topic_status, name, data_bytes)
            try:
                async with self.meter(system) as meter:
                    await load.closed(plan.window, plan.warm_s, waves=1)
                    await load.idle()
                    return await self.stretch(load, meter, what)
            finally:
                load.close()

    def meter(self, system: systems.System) -> Meter:
        stack = self.stack
        return Meter(stack.stack.postgres_dsn, stack.stack.bootstrap, pids_of(system, stack), system.prefix)

    async def stretch(self, load: Load, meter: Meter, what: str) -> dict[str, Any]:
        """Throughput, cost and memory at the window, once."""
        plan = Plan(windows=(self.plan.window,), saturation_s=self.plan.seconds)
        found = (await saturate(load, meter, plan, quiet=True))["knee"]
        if not found["cost"]:
            raise StallError(f"{what}: nothing was completed within the stretch")
        found["memory_mb"] = {name: series[-1] for name, series in meter.memory.items() if series}
        cpu = sum(v for n, v in found["cost"]["cpu_ms"].items() if n != "generator")
        say(f"growth: {what}: {found['per_s']} workflows/s, {cpu:.2f} CPU-ms a workflow")
        return dict(found)

    async def ledger(self) -> None:
        """One system that was started on empty tables, and is measured as they grow."""
        plan, stack = self.plan, self.stack.stack
        if not self.fits("ledger", 3 * START_S):
            return
        async with systems.ours(stack, self.folder, "gledger", self.given) as system:
            load = Load(stack.bootstrap, system.topic_in, system.topic_status, "gledger", DATA_BYTES)
            seeder = Seeder(stack.postgres_dsn, [f"gledger_{s}" for s in SERVICES], say)
            try:
                async with self.meter(system) as meter:
                    await load.closed(plan.window, 60.0, enough=int(SAMPLE_WORKFLOWS * 1.5))
                    await load.idle()
                    present, a_second = len(load.watcher.done), 2_000.0
                    for wanted in plan.ledger:
                        if not self.fits(f"ledger {wanted}", (wanted - present) / a_second + plan.seconds * 3):
                            return
                        seeded = await seeder.to(present, wanted, analyze=True)
                        a_second = (wanted - present) / seeded["seconds"]
                        done = len(load.watcher.done)
                        await load.closed(plan.window, plan.warm_s, waves=1)
                        await load.idle()
                        ones = [await self.stretch(load, meter, f"ledger {wanted}") for _ in range(plan.repeats)]
                        point = {**mean(ones), "x": wanted, "seeded": seeded}
                        self.axes.setdefault("ledger", []).append(point)
                        present = wanted + len(load.watcher.done) - done
            finally:
                load.close()

    async def plans(self, *, both: bool) -> dict[str, Any]:
        """Statements young and grown, with the plans pinned and not: the second shows that the check does notice."""
        out: dict[str, Any] = {}
        for name, pinned in (("pinned", True), ("free", False))[: 2 if both else 1]:
            if self.fits(f"plans {name}", START_S * 2 + self.plan.young_s * 4):
                out[name] = await self.pair(f"plan{name}", Shape(plans_pinned=pinned))
                bad = len(out[name]["gone_bad"])
                say(f"plans {name}: {bad} statements or tables grew more than {plans.FACTOR:g}-fold a workflow")
        return out

    async def pair(self, name: str, shape: Shape) -> dict[str, Any]:
        """Services on empty tables of which the statistics say so; then grown before anybody takes new ones."""
        stack, plan = self.stack.stack, replace(self.plan, window=100)
        observer = plans.Observer(stack.postgres_dsn, self.stack.postgres.log_path, f"{name}_")
        found: dict[str, Any] = {}
        await _autovacuum(stack.postgres_dsn, on=False)
        try:
            async with systems.ours(stack, self.folder, name, self.given, shape) as system:
                load = Load(stack.bootstrap, system.topic_in, system.topic_status, name, DATA_BYTES)
                seeder = Seeder(stack.postgres_dsn, [f"{name}_{s}" for s in SERVICES], say)
                try:
                    await _vacuum(stack.postgres_dsn)
                    await load.closed(plan.window, 60.0, enough=int(SAMPLE_WORKFLOWS * 1.5))
                    await load.idle()
                    for when in ("young", "grown"):
                        if when == "grown":
                            await seeder.to(len(load.watcher.done), plan.grown_workflows, analyze=False)
                        await load.closed(plan.window, plan.warm_s, waves=1)
                        await load.idle()
                        first, before = len(load.watcher.done), await observer.begin()
                        await load.closed(plan.window, plan.young_s, waves=1)
                        await load.idle()
                        found[when] = await observer.end(before, len(load.watcher.done) - first)
                finally:
                    load.close()
        finally:
            await _autovacuum(stack.postgres_dsn, on=True)
        found["gone_bad"] = plans.gone_bad(found["young"], found["grown"])
        return found


def mean(ones: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers at the same place averaged; `spread` is the largest CPU a workflow divided by the least."""

    def merged(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {k: merged([v[k] for v in values if k in v]) for k in values[0]}
        return round(sum(values) / len(values), 4) if isinstance(values[0], int | float) else values[0]

    spent = [sum(v for n, v in o["cost"]["cpu_ms"].items() if n != "generator") for o in ones]
    found: dict[str, Any] = merged(ones)
    return {**found, "spread": round(max(spent) / min(spent), 3)}


async def _autovacuum(dsn: str, *, on: bool) -> None:
    connection: Any = await asyncpg.connect(dsn)
    await connection.execute("ALTER SYSTEM RESET autovacuum" if on else "ALTER SYSTEM SET autovacuum = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


async def _vacuum(dsn: str) -> None:
    connection: Any = await asyncpg.connect(dsn)
    await connection.execute("VACUUM (ANALYZE)")
    await connection.close()
