"""An operator in a process of its own who replays a filter and kills himself with SIGKILL at his n-th step.
The steps are counted outside the product: around its pool, its transactions and its publisher, which it is handed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from factmesh.message import Emission
from factmesh.settings import Settings
from factmesh_cli import dlq_operate
from factmesh_cli.dlq_index import Index, open_index
from factmesh_quarantine import queries
from factmesh_quarantine.acts import Acts

UNHURRIED = 1_000.0
"""Members a second: no wait between them."""


class Steps:
    """Counts; at `kill_at` the process is gone. 0 never comes."""

    def __init__(self, kill_at: int, told: Callable[[int, str], None]) -> None:
        self.kill_at, self.n, self._told = kill_at, 0, told

    def __call__(self, what: str) -> None:
        self.n += 1
        self._told(self.n, what)
        if self.n == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class CountedConnection:
    """A connection whose every statement, and every commit, is a step: before it, and after the commit."""

    def __init__(self, connection: Any, step: Steps) -> None:
        self._connection, self._step = connection, step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if name not in ("fetch", "fetchrow", "fetchval", "execute"):
            return found

        async def counted(query: str, *arguments: Any) -> Any:
            self._step(f"before {name}: {' '.join(query.split())[:60]}")
            return await found(query, *arguments)

        return counted

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        async with self._connection.transaction():
            yield
            self._step("before a commit")
        self._step("after a commit")


class CountedPool(CountedConnection):
    """The same around a pool."""

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[CountedConnection]:
        async with self._connection.acquire() as connection:
            yield CountedConnection(connection, self._step)


def counted(index: Index, step: Steps) -> Index:
    """The index, with its parts wrapped."""
    publish = index.acts._publish

    async def publish_in_steps(emissions: Sequence[Emission]) -> None:
        step("before a publication")
        publishing = asyncio.ensure_future(publish(emissions))
        await asyncio.sleep(0)
        step("within a publication: sent, and not known to be acknowledged")
        await publishing
        step("after a publication, before it is written down")

    pool: Any = CountedPool(index.pool, step)
    acts = Acts(pool, index.registry, index.namespace, publish_in_steps)
    return replace(index, pool=pool, acts=acts)


async def replay_all(index: Index, records: Sequence[UUID], by: str) -> UUID:
    """What `factmesh dlq replay ID… --yes` does: the open ones of the filter, as a resumable operation."""
    wanted = queries.Filter(ids=tuple(records))
    rows = await queries.list_records(index.pool, wanted)
    cohort = [r["id"] for r in rows]
    operation = await dlq_operate.begin(index, "replay", by, "two operators", wanted.text, cohort)
    act = index.acts.replay
    await dlq_operate.run(index, operation, act, by, rate=UNHURRIED, told=lambda _step: None)
    return operation.id


def operate(settings: Settings, records: Sequence[UUID], by: str, kill_at: int, steps: Any) -> None:
    """The process. `steps` is a pipe's end that hears of every step, so that the last one is known after the kill."""

    async def work() -> None:
        async with open_index(settings) as index:
            told: Callable[[int, str], None] = lambda n, what: steps.send((n, what))  # noqa: E731
            await replay_all(counted(index, Steps(kill_at, told)), records, by)

    asyncio.run(work())
