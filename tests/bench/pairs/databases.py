"""asyncpg against psycopg 3, with and without its pipeline: a transaction of one row, and one of 500.
A database; `python -m tests.bench.pairs.databases [dsn]`. Rounds alternate; medians and spread.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg

from factmesh import event_loop
from factmesh.stack import open_stack

ROUNDS = 5
COLUMNS = "id uuid PRIMARY KEY, topic text, at bigint, hash bytea, cause text, emitted bytea"
TYPES = ("uuid", "text", "bigint", "bytea", "text", "bytea")


def rows(n: int) -> tuple[list[Any], ...]:
    ids = [uuid.uuid4() for _ in range(n)]
    return (ids, ["a.topic"] * n, list(range(n)), [b"h" * 16] * n, [str(i) for i in ids], [b"e" * 600] * n)


def insert(mark: Callable[[int], str]) -> str:
    arrays = ", ".join(f"{mark(i + 1)}::{kind}[]" for i, kind in enumerate(TYPES))
    return f"INSERT INTO pairs SELECT * FROM unnest({arrays})"


async def ways(dsn: str) -> dict[str, Callable[[int], Awaitable[None]]]:
    import psycopg

    one = await asyncpg.connect(dsn)
    await one.execute(f"DROP TABLE IF EXISTS pairs; CREATE UNLOGGED TABLE pairs ({COLUMNS})")
    two = await psycopg.AsyncConnection.connect(dsn)
    two.prepare_threshold = 0
    by_number, by_place = insert(lambda n: f"${n}"), insert(lambda _n: "%s")
    names = [column.split()[0] for column in COLUMNS.split(", ")]

    async def unnest(n: int) -> None:
        async with one.transaction():
            await one.fetch("SELECT 1")
            await one.execute(by_number, *rows(n))

    async def copy(n: int) -> None:
        async with one.transaction():
            await one.fetch("SELECT 1")
            await one.copy_records_to_table("pairs", records=zip(*rows(n), strict=True), columns=names)

    async def plain(n: int) -> None:
        async with two.transaction():
            await two.execute("SELECT 1", binary=True)
            await two.execute(by_place, rows(n), binary=True)

    async def pipelined(n: int) -> None:
        async with two.pipeline(), two.transaction():
            await two.execute("SELECT 1", binary=True)
            await two.execute(by_place, rows(n), binary=True)

    return {"asyncpg": unnest, "asyncpg, COPY": copy, "psycopg": plain, "psycopg, pipeline": pipelined}


async def compare(dsn: str) -> None:
    made = await ways(dsn)
    for n, calls in ((1, 200), (500, 20)):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        for _ in range(ROUNDS + 1):
            for name, work in made.items():
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(calls):
                    await work(n)
                found[name].append(
                    ((time.process_time() - cpu) / calls * 1e6, (time.perf_counter() - wall) / calls * 1e6)
                )
        for name, runs in found.items():
            runs = runs[1:]
            cpus, wall = sorted(run[0] for run in runs), statistics.median(run[1] for run in runs)
            spread = f"({cpus[0]:.0f}-{cpus[-1]:.0f})"
            print(f"{n:4} rows {name:18} {statistics.median(cpus):8.0f} us CPU {spread:14} {wall:8.0f} us wall")


if __name__ == "__main__":
    run = asyncio.run if "asyncio" in sys.argv else event_loop.run
    if len(sys.argv) > 1:
        run(compare(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="fm-") as folder, open_stack(Path(folder)) as stack:
            run(compare(stack.postgres_dsn))
