"""The event loop's share: asyncio's own against uvloop, for what our services do with it.
A database; `python -m tests.bench.pairs.loops [dsn]`. Each setting in a process of its own, alternating; medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg

from factmesh.stack import open_stack

ROUNDS = 5
CALLS = 1_500


async def measured(work: Callable[[], Awaitable[Any]], calls: int = CALLS) -> tuple[float, float]:
    """CPU and wall, us a call."""
    for _ in range(calls // 10):
        await work()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        await work()
    return (time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - wall) / calls * 1e6


async def main(dsn: str) -> dict[str, tuple[float, float]]:
    loop = asyncio.get_running_loop()
    conn = await asyncpg.connect(dsn)
    thread = ThreadPoolExecutor(1)
    rows = [f"value {n}" for n in range(500)]

    async def transaction() -> None:
        async with conn.transaction():
            await conn.fetch("SELECT 1")

    async def many() -> None:
        await conn.execute("SELECT count(*) FROM unnest($1::text[]) AS r", rows)

    async def acknowledged() -> None:
        ready = loop.create_future()
        thread.submit(loop.call_soon_threadsafe, ready.set_result, None)
        await ready

    found = {
        "a statement": await measured(lambda: conn.fetch("SELECT 1")),
        "a transaction of one": await measured(transaction),
        "500 texts": await measured(many, CALLS // 5),
        "a call on a thread": await measured(lambda: loop.run_in_executor(thread, int)),
        "a wake-up from a thread": await measured(acknowledged),
        "a task": await measured(lambda: asyncio.create_task(asyncio.sleep(0))),
    }
    await conn.close()
    return found


def once(kind: str, dsn: str) -> None:
    if kind == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(main(dsn))
    else:
        found = asyncio.run(main(dsn))
    print(json.dumps(found))


def compare(dsn: str) -> None:
    runs: dict[str, list[dict[str, tuple[float, float]]]] = {"asyncio": [], "uvloop": []}
    for _ in range(ROUNDS):
        for kind, found in runs.items():
            command = [sys.executable, "-m", "tests.bench.pairs.loops", kind, dsn]
            found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"{'us CPU (spread) / us wall':26} {'asyncio':>28} {'uvloop':>28}")
    for name in runs["asyncio"][0]:
        line = f"{name:26}"
        for found in runs.values():
            cpus = sorted(run[name][0] for run in found)
            wall = statistics.median(run[name][1] for run in found)
            line += f" {f'{statistics.median(cpus):.0f} ({cpus[0]:.0f}-{cpus[-1]:.0f}) / {wall:.0f}':>28}"
        print(line)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        once(sys.argv[1], sys.argv[2])
    elif len(sys.argv) == 2:
        compare(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory(prefix="fm-") as folder, open_stack(Path(folder)) as stack:
            compare(stack.postgres_dsn)
