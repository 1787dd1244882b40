"""The phases of a measurement: alone, saturation, backlog, rates, HTTP; and how long each takes.
What is measured is given; nothing is started here but load, and nothing is judged.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import systems
from tests.bench.http_load import posts
from tests.bench.load import DATA_BYTES, Load
from tests.bench.meter import Meter, cost
from tests.bench.verdicts import HTTP_PER_S

SHARES = (0.1, 0.5, 0.8)
"""Of the knee of the real services; the ideal loop is given the very same rates."""


@dataclass(frozen=True)
class Plan:
    """How long each phase takes."""

    warm_s: float = 8.0
    alone_n: int = 60
    windows: Sequence[int] = (200, 1000)
    saturation_s: float = 10.0
    rate_s: float = 7.0
    drain_n: int = 3_000
    http_s: float = 6.0
    http_connections: int = 64
    rounds: int = 1
    data_bytes: int = DATA_BYTES
    shares: Sequence[float] = SHARES


FULL = Plan(
    warm_s=20.0,
    alone_n=300,
    windows=(100, 300, 1000, 3000),
    saturation_s=30.0,
    rate_s=30.0,
    drain_n=20_000,
    http_s=20.0,
    rounds=2,
)
SATURATION = Plan(windows=(200, 1000, 2000))
"""For ratios with other engines, where nothing else is asked for."""
TINY = Plan(warm_s=2.0, alone_n=5, windows=(20, 40), saturation_s=2.0, rate_s=2.0, drain_n=50, http_s=2.0)
"""For trying the benchmark itself: every path, no figure."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  load {os.getloadavg()[0]:.1f}  {text}", flush=True)


def pids_of(system: systems.System, stack: Any) -> dict[str, Sequence[int]]:
    """Every process that is paid for: the system's and the stack's."""
    return {**system.pids, "kafka": [stack.kafka.pid], "postgres": [stack.postgres.pid]}


async def saturate(load: Load, meter: Meter, plan: Plan, *, quiet: bool = False) -> dict[str, Any]:
    """Rising windows of workflows at once until more of them brings nothing: the knee, and what one costs there."""
    tried: list[dict[str, Any]] = []
    for window in plan.windows:
        await load.ramp(window)
        before = await meter.read()
        first = len(load.watcher.done)
        sample = await load.closed(window, plan.saturation_s, waves=2)
        after = await meter.read()
        costs = cost(before, after, len(load.watcher.done) - first)
        tried.append({"window": window, **sample.summary(), "cost": costs})
        if not quiet:
            say(f"  {window:5d} at once: {sample.rate:8.1f} workflows/s")
        await load.idle()
        if len(tried) > 1 and tried[-1]["per_s"] < tried[-2]["per_s"]:
            break
    knee = max(tried, key=lambda t: float(t["per_s"]))
    return {"knee": knee, "tried": tried}


async def measure(system: systems.System, stack: Any, plan: Plan, knee: float | None, run: str) -> dict[str, Any]:
    """One system, all phases. `knee` is the real services' where the rates must be theirs."""
    say(f"{system.name}: warming up")
    pids = pids_of(system, stack)
    load = Load(stack.stack.bootstrap, system.topic_in, system.topic_status, run, plan.data_bytes)
    out: dict[str, Any] = {"settings": dict(system.settings), "load_at_start": os.getloadavg()[0]}
    try:
        async with Meter(stack.stack.postgres_dsn, stack.stack.bootstrap, pids, system.prefix) as meter:
            await load.closed(100, plan.warm_s)
            await load.idle()
            if plan.alone_n:
                out["alone"] = (await load.alone(plan.alone_n)).summary()
                say(f"{system.name}: alone p50 {out['alone']['p50']} ms, p99 {out['alone']['p99']} ms")
            out["saturation"] = await saturate(load, meter, plan)
            if plan.drain_n:
                out["drain"] = (await load.drain(plan.drain_n)).summary()
                say(f"{system.name}: a backlog of {plan.drain_n} in {out['drain']['per_s']}/s")
            reference = knee or float(out["saturation"]["knee"]["per_s"])
            out["rates"] = {f"{s:g}": await at_rate(load, meter, plan, system, reference * s) for s in plan.shares}
            if system.http and plan.http_s:
                out["http"] = await through_http(system, plan, run)
            out["memory_mb"] = {name: series for name, series in meter.memory.items() if name != "generator"}
            out["strange_statuses"] = dict(load.watcher.other)
    finally:
        load.close()
    return out


async def at_rate(load: Load, meter: Meter, plan: Plan, system: systems.System, per_s: float) -> dict[str, Any]:
    """Latencies and cost at a rate below the knee."""
    rate = round(per_s, 1)
    before = await meter.read()
    sample = await load.open(rate, plan.rate_s)
    costs = cost(before, await meter.read(), int(rate * (plan.rate_s + 3)))
    summary = sample.summary()
    say(f"{system.name}: at {rate}/s p50 {summary['p50']} ms, p99 {summary['p99']} ms")
    return {"rate": rate, **summary, "cost": costs}


async def through_http(system: systems.System, plan: Plan, run: str) -> dict[str, Any]:
    """Intake's HTTP entrance: acknowledged facts a second, and latencies at half of the goal, or of what it can."""
    full = await posts(system.http, f"h{run}", connections=plan.http_connections, seconds=plan.http_s)
    rate = max(1.0, min(full["per_s"], HTTP_PER_S) / 2)
    half = await posts(system.http, f"i{run}", connections=plan.http_connections, seconds=plan.http_s, rate=rate)
    say(f"{system.name}: HTTP {full['per_s']:.0f} facts/s acknowledged, at {rate:.0f}/s p99 {half['p99']} ms")
    return {"full": full, "half": half}


@asynccontextmanager
async def opened(which: str, stack: Any, folder: Path, name: str, given: Mapping[str, str]) -> AsyncIterator[Any]:
    if which == "ours":
        async with systems.ours(stack.stack, folder, name, given) as system:
            yield system
    else:
        async with systems.ideal(stack.stack, folder, name, given) as system:
            yield system
