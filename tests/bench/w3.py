"""The workload W3 on the real services, on the ideal loop and on other engines, in one run: the ratios are the result.
It plans, runs and writes down; how load is made, read, judged and drawn is beside this file. It ends by itself.

    python -m tests.bench.w3 [--full] [--parts w3,plans,peers,growth] [--out build/bench]
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench import report, systems
from tests.bench.growth import AXES, TINY_GROWTH, Growth, GrowthPlan
from tests.bench.load import DATA_BYTES, Load
from tests.bench.peers import run as peers
from tests.bench.phases import FULL, SATURATION, TINY, Plan, measure, opened, say, through_http

from factmesh.stack import EmbeddedStack

PARTS = ("w3", "plans", "peers", "growth")
"""In this order: the last one fills the database."""
IDEAL_VARIANTS: Mapping[str, Mapping[str, str]] = {
    "four statuses": {"IDEAL_STATUSES": "4"},
    "batches of 2000": {"IDEAL_BATCH_MAX": "2000"},
}
"""Of the ideal loop, saturation alone: with as many statuses as ours, and at another setting that may be its best."""

VARIANT_S = 15.0


@dataclass
class Bench:
    """One run over one stack. What is found is written down after every part: a part that fails loses no other."""

    parts: Sequence[str]
    plan: Plan
    growth: GrowthPlan
    peers: peers.PeerPlan
    only: str
    given: Mapping[str, str]
    ideal_given: Mapping[str, str]
    variants: Sequence[str]
    axes: Sequence[str]
    both_plans: bool
    budget_s: float
    folder: Path
    out: Path
    result: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        say("starting Kafka and PostgreSQL")
        stack = EmbeddedStack(self.folder / "stack")
        try:
            await asyncio.to_thread(stack.start)
            for part in self.parts:
                try:
                    await getattr(self, f"_{part}")(stack)
                except Exception as error:  # whatever it was, it is told, and the other parts still have their worth
                    self.result.setdefault("failed", {})[part] = f"{type(error).__name__}: {error}"
                    say(f"{part} FAILED: {error}")
                    self._tails()
                self.write()
        finally:
            await asyncio.to_thread(stack.stop)

    async def _w3(self, stack: Any) -> None:
        """Ours and the ideal take turns, so that a round is a pair; settings of the ideal are tried in the first."""
        rounds = self.result.setdefault("rounds", [])
        for n in range(self.plan.rounds):
            pair: dict[str, Any] = {}
            rounds.append(pair)
            await self._pair(stack, pair, self.plan, f"{n}")
            if self.only != "ours" and n == 0:
                pair["ideal_variants"] = {}
                for at, name in enumerate(self.variants):
                    settings = {**self.ideal_given, **IDEAL_VARIANTS[name]}
                    async with opened("ideal", stack, self.folder, f"variant{at}", settings) as system:
                        stretch_s = min(self.plan.saturation_s, VARIANT_S)
                        plan = replace(self.plan, alone_n=0, drain_n=0, shares=(), saturation_s=stretch_s)
                        say(f"the ideal loop with {name}")
                        pair["ideal_variants"][name] = await measure(system, stack, plan, None, f"v{at}")
            if self.only != "ideal" and self.plan.http_s:
                say("intake alone, for its HTTP entrance")
                async with systems.ours(
                    stack.stack, self.folder, f"entrance{n}", self.given, services=("intake",)
                ) as system:
                    pair["ours"]["http_alone"] = await through_http(system, self.plan, f"e{n}")
            self.write()

    async def _pair(self, stack: Any, pair: dict[str, Any], plan: Plan, n: str) -> None:
        for which, given in (("ours", self.given), ("ideal", self.ideal_given)):
            if self.only and which != self.only:
                continue
            knee = pair["ours"]["saturation"]["knee"]["per_s"] if "ours" in pair else None
            async with opened(which, stack, self.folder, f"{which}{n}", given) as system:
                pair[which] = await measure(system, stack, plan, knee, f"{which}{n}")

    async def _growth(self, stack: Any) -> None:
        grow = Growth(stack, self.folder, self.given, self.growth, time.monotonic() + self.budget_s)
        self.result["growth"] = grow.found
        await grow.all(self.axes)

    async def _plans(self, stack: Any) -> None:
        grow = Growth(stack, self.folder, self.given, self.growth, time.monotonic() + self.budget_s)
        self.result["plans"] = await grow.plans(both=self.both_plans)

    async def _peers(self, stack: Any) -> None:
        """With a short pair of ours and the ideal, where the run has none."""
        if not self.result.get("rounds"):
            pair: dict[str, Any] = {}
            await self._pair(stack, pair, replace(self.plan, drain_n=0, shares=(), http_s=0.0), "p")
            self.result["rounds"] = [pair]
        self.result["peers"] = await peers.measure_all(stack, self.peers, self.folder, say)

    async def hold(self, seconds: float) -> None:
        """Saturate for a while, for a profiler; says which process is which."""
        stack = EmbeddedStack(self.folder / "stack")
        try:
            await asyncio.to_thread(stack.start)
            which = self.only or "ours"
            given = self.given if which == "ours" else self.ideal_given
            async with opened(which, stack, self.folder, "hold", given) as system:
                load = Load(stack.stack.bootstrap, system.topic_in, system.topic_status, "hold", self.plan.data_bytes)
                await load.ramp(self.plan.windows[-1])
                say(f"{system.name} holds for {seconds:g} s: {json.dumps(dict(system.pids))}")
                sample = await load.closed(self.plan.windows[-1], seconds)
                say(f"{system.name}: {sample.rate:.1f} workflows/s")
                load.close()
        finally:
            await asyncio.to_thread(stack.stop)

    def write(self) -> None:
        """The JSON so far, and what is drawn from it."""
        self.result["machine"]["load_after"] = os.getloadavg()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.with_suffix(".json").write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        report.write(self.result, self.out)

    def _tails(self) -> None:
        for log in sorted(self.folder.glob("*/*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-800:]}", file=sys.stderr)


def machine() -> dict[str, Any]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processors": os.cpu_count(),
        "load_before": os.getloadavg(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="W3 on the real services, on the ideal loop and on other engines")
    add = parser.add_argument
    add("--full", action="store_true", help="longer phases, more windows, two rounds, and every part")
    add("--tiny", action="store_true", help="every path in little time, no figure: for trying the benchmark itself")
    add("--parts", default="", metavar="A,B", help=f"of {', '.join(PARTS)}; w3 and plans unless --full")
    add("--axes", default=",".join(AXES), metavar="A,B", help=f"of the growth curves: {', '.join(AXES)}")
    add("--budget-s", type=float, default=2400.0, help="the growth curves take this long at most")
    add("--only", choices=("ours", "ideal"), default="", help="one of the two")
    add("--out", type=Path, default=Path("build/bench"), help="the folder of the JSON, the table and the picture")
    add("--data-bytes", type=int, default=DATA_BYTES, help="size of a fact's data as JSON")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the services")
    add("--ideal-statuses", choices=("2", "4"), default="2", help="statuses of a workflow that the ideal loop tells")
    add("--ideal-batch", default="500", metavar="N", help="messages in one transaction of the ideal loop, at most")
    add("--hold", type=float, default=0.0, metavar="SECONDS", help="only saturate, for a profiler")
    return parser.parse_args()


def _bench(arguments: argparse.Namespace, folder: Path) -> Bench:
    full, tiny = arguments.full, arguments.tiny
    chosen = arguments.parts.split(",") if arguments.parts else list(PARTS if full or tiny else PARTS[:2])
    if arguments.only and not arguments.parts:
        chosen = ["w3"]
    parts = [p for p in PARTS if p in chosen]
    plan = TINY if tiny else FULL if full else Plan() if "w3" in parts else SATURATION
    name = "w3" if "w3" in parts else "-".join(parts)
    return Bench(
        parts=parts,
        plan=replace(plan, data_bytes=arguments.data_bytes),
        growth=TINY_GROWTH if tiny else GrowthPlan(),
        peers=peers.PeerPlan(windows=(8, 32), seconds=2.0, alone_n=10) if tiny else peers.PeerPlan(),
        only=arguments.only,
        given=dict(pair.split("=", 1) for pair in arguments.set),
        ideal_given={"IDEAL_STATUSES": arguments.ideal_statuses, "IDEAL_BATCH_MAX": arguments.ideal_batch},
        variants=list(IDEAL_VARIANTS) if full or tiny else list(IDEAL_VARIANTS)[:1],
        axes=arguments.axes.split(","),
        both_plans="growth" in parts,
        budget_s=arguments.budget_s,
        folder=folder,
        out=arguments.out / name,
        result={"workload": "W3", "full": full, "tiny": tiny, "data_bytes": arguments.data_bytes, "machine": machine()},
    )


def main() -> None:
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    folder.chmod(0o755)  # PostgreSQL may run as another user below it
    bench = _bench(arguments, folder)
    print(f"W3: {', '.join(bench.parts)}. Figures are of this machine at this hour: read the ratios.", flush=True)
    try:
        asyncio.run(bench.hold(arguments.hold) if arguments.hold else bench.run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("stopped before the end; what was finished is written")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.hold:
        return
    print(report.table(bench.result))
    print(f"\nwritten: {bench.out}.json, .svg, .md")
    if lost := report.failures(bench.result):
        sys.exit(f"void: {', '.join(lost)}")


if __name__ == "__main__":
    main()
