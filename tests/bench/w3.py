"""The workload W3 on the real services and on the ideal loop, on one stack in one run: the ratios are the result.
It plans, runs and writes down; how load is made, read and drawn is beside this file. It ends by itself.

    python -m tests.bench.w3 [--full] [--out build/bench]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench import report, systems
from tests.bench.http_load import posts
from tests.bench.load import DATA_BYTES, Load, StallError
from tests.bench.meter import Meter, cost

from factmesh.stack import EmbeddedStack

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


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  load {os.getloadavg()[0]:.1f}  {text}", flush=True)


async def saturate(load: Load, meter: Meter, plan: Plan) -> dict[str, Any]:
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
        say(f"  {window:5d} at once: {sample.rate:8.1f} workflows/s")
        await load.idle()
        if len(tried) > 1 and tried[-1]["per_s"] < tried[-2]["per_s"]:
            break
    knee = max(tried, key=lambda t: float(t["per_s"]))
    return {"knee": knee, "tried": tried}


async def measure(system: systems.System, stack: Any, plan: Plan, knee: float | None, run: str) -> dict[str, Any]:
    """One system, all phases. `knee` is the real services' where the rates must be theirs."""
    say(f"{system.name}: warming up")
    pids = {**system.pids, "kafka": stack.kafka.pid, "postgres": stack.postgres.pid}
    load = Load(stack.stack.bootstrap, system.topic_in, system.topic_status, run, plan.data_bytes)
    out: dict[str, Any] = {"settings": dict(system.settings), "load_at_start": os.getloadavg()[0]}
    try:
        async with Meter(stack.stack.postgres_dsn, stack.stack.bootstrap, pids, system.prefix) as meter:
            await load.closed(100, plan.warm_s)
            await load.idle()
            out["alone"] = (await load.alone(plan.alone_n)).summary()
            say(f"{system.name}: alone p50 {out['alone']['p50']} ms, p99 {out['alone']['p99']} ms")
            out["saturation"] = await saturate(load, meter, plan)
            out["drain"] = (await load.drain(plan.drain_n)).summary()
            say(f"{system.name}: a backlog of {plan.drain_n} in {out['drain']['per_s']}/s")
            reference = knee or float(out["saturation"]["knee"]["per_s"])
            out["rates"] = {}
            for share in SHARES:
                rate = round(reference * share, 1)
                before = await meter.read()
                sample = await load.open(rate, plan.rate_s)
                costs = cost(before, await meter.read(), int(rate * (plan.rate_s + 3)))
                out["rates"][f"{share:g}"] = {"rate": rate, **sample.summary(), "cost": costs}
                summary = sample.summary()
                say(f"{system.name}: at {rate}/s p50 {summary['p50']} ms, p99 {summary['p99']} ms")
            if system.http:
                out["http"] = await through_http(system, plan, run)
            out["memory_mb"] = {name: series for name, series in meter.memory.items() if name != "generator"}
            out["strange_statuses"] = dict(load.watcher.other)
    finally:
        load.close()
    return out


async def through_http(system: systems.System, plan: Plan, run: str) -> dict[str, Any]:
    """Intake's HTTP entrance: acknowledged facts a second, and latencies at half of that."""
    full = await posts(system.http, f"h{run}", connections=plan.http_connections, seconds=plan.http_s)
    rate = len(full.latencies_ms) / full.seconds / 2
    say(f"{system.name}: HTTP {rate * 2:.0f} facts/s acknowledged")
    half = await posts(
        system.http, f"i{run}", connections=plan.http_connections, seconds=plan.http_s, rate=max(rate, 1.0)
    )
    return {"full": full.summary(), "half": half.summary()}


@asynccontextmanager
async def opened(which: str, stack: Any, folder: Path, name: str, given: Mapping[str, str]) -> AsyncIterator[Any]:
    if which == "ours":
        async with systems.ours(stack.stack, folder, name, given) as system:
            yield system
    else:
        async with systems.ideal(stack.stack, folder, name) as system:
            yield system


async def run(plan: Plan, only: str, given: Mapping[str, str], hold_s: float, folder: Path) -> dict[str, Any]:
    """All rounds; ours and the ideal take turns, so that a round is a pair."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    say("starting Kafka and PostgreSQL")
    stack = EmbeddedStack(folder / "stack")
    rounds: list[dict[str, Any]] = []
    try:
        await asyncio.to_thread(stack.start)
        for n in range(plan.rounds):
            pair: dict[str, Any] = {}
            for which in ("ours", "ideal"):
                if only and which != only:
                    continue
                knee = pair["ours"]["saturation"]["knee"]["per_s"] if "ours" in pair else None
                async with opened(which, stack, folder, f"{which}{n}", given) as system:
                    if hold_s:
                        await hold(system, stack, plan, hold_s)
                    else:
                        pair[which] = await measure(system, stack, plan, knee, f"{which}{n}")
            rounds.append(pair)
    finally:
        await asyncio.to_thread(stack.stop)
    return {"rounds": rounds}


async def hold(system: systems.System, stack: Any, plan: Plan, seconds: float) -> None:
    """Saturate for a while, for a profiler; says which process is which."""
    load = Load(stack.stack.bootstrap, system.topic_in, system.topic_status, "hold", plan.data_bytes)
    try:
        await load.ramp(plan.windows[-1])
        say(f"{system.name} holds for {seconds:g} s: {json.dumps(dict(system.pids))}")
        sample = await load.closed(plan.windows[-1], seconds)
        say(f"{system.name}: {sample.rate:.1f} workflows/s")
    finally:
        load.close()


def machine() -> dict[str, Any]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processors": os.cpu_count(),
        "load_before": os.getloadavg(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="W3 on the real services and on the ideal loop")
    parser.add_argument("--full", action="store_true", help="longer phases, more windows, two rounds")
    parser.add_argument("--only", choices=("ours", "ideal"), default="", help="one of the two")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where w3.json and w3.svg are written")
    parser.add_argument("--data-bytes", type=int, default=DATA_BYTES, help="size of a fact's data as JSON")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the services")
    parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS", help="only saturate, for a profiler")
    arguments = parser.parse_args()
    plan = replace(FULL if arguments.full else Plan(), data_bytes=arguments.data_bytes)
    given = dict(pair.split("=", 1) for pair in arguments.set)
    said = "the full version, some 20 minutes" if arguments.full else "the short one, some 3 minutes; FULL=1 is longer"
    print(f"W3: {said}. Figures are of this machine at this hour: read the ratios.", flush=True)
    facts = machine()
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL may run as another user below it
    try:
        found = asyncio.run(run(plan, arguments.only, given, arguments.hold, folder))
    except StallError as error:
        for log in sorted(folder.glob("*/*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
        sys.exit(f"void: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("stopped before the end, nothing is written")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.hold:
        return
    facts["load_after"] = os.getloadavg()
    result = {"workload": "W3", "full": arguments.full, "data_bytes": plan.data_bytes, "machine": facts, **found}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "w3.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "w3.svg").write_text(report.picture(result), encoding="utf-8")
    print(report.table(result))
    print(f"\nwritten: {arguments.out / 'w3.json'}, {arguments.out / 'w3.svg'}")


if __name__ == "__main__":
    main()
