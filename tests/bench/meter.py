"""What a stretch of load cost: CPU and memory of each process, WAL and rows of PostgreSQL, messages of Kafka.
It only reads; the difference of two readings divided by the workflows between them is the cost of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import psutil
from confluent_kafka import Consumer, TopicPartition

READING = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint AS wal_bytes, d.tup_inserted, d.tup_updated, d.tup_deleted,
       d.xact_commit
  FROM pg_stat_database d WHERE d.datname = current_database()"""
MEMORY_EVERY_S = 1.0


@dataclass(frozen=True)
class Reading:
    """Everything at one instant, as numbers that only rise."""

    cpu_s: Mapping[str, float]
    postgres: Mapping[str, int]
    messages: Mapping[str, int]


def cpu_s(process: psutil.Process) -> float:
    """What a process and its children have spent; of this very process, without its children."""
    spent = 0.0
    for p in [process, *process.children(recursive=True)] if process.pid != os.getpid() else [process]:
        with contextlib.suppress(psutil.Error):
            times = p.cpu_times()
            spent += times.user + times.system
            if p == process and process.pid != os.getpid():  # and what its children that have ended had spent
                spent += times.children_user + times.children_system
    return spent


class Meter:
    """Over the processes of one system and the stack that it shares; `pids` by the name in the table."""

    def __init__(self, dsn: str, bootstrap: str, pids: Mapping[str, Sequence[int]], prefix: str) -> None:
        self._dsn, self._prefix = dsn, prefix
        every = {**pids, "generator": [os.getpid()]}
        self._processes = {name: [psutil.Process(pid) for pid in ones] for name, ones in every.items()}
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench-meter"})
        self.memory: dict[str, list[float]] = {name: [] for name in self._processes}
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Meter:
        self._connection = await asyncpg.connect(self._dsn)
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: Any) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._connection.close()
        self._consumer.close()

    async def _watch(self) -> None:
        while True:
            for name, processes in self._processes.items():
                with contextlib.suppress(psutil.Error):
                    self.memory[name].append(round(sum(self._rss(name, p) for p in processes) / 1e6, 1))
            await asyncio.sleep(MEMORY_EVERY_S)

    @staticmethod
    def _rss(name: str, process: psutil.Process) -> int:
        if name != "postgres":
            return int(process.memory_info().rss)
        # Its processes share one large segment, which each would count again.
        own = [p.memory_info() for p in [process, *process.children(recursive=True)]]
        return int(sum(m.rss - m.shared for m in own) + max(m.shared for m in own))

    async def read(self) -> Reading:
        cpu = {name: sum(map(cpu_s, ones)) for name, ones in self._processes.items()}
        row = await self._connection.fetchrow(READING)
        return Reading(cpu, dict(row), await asyncio.to_thread(self._offsets))

    def _offsets(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, topic in self._consumer.list_topics(timeout=10).topics.items():
            if name.startswith(self._prefix):
                ends = (
                    self._consumer.get_watermark_offsets(TopicPartition(name, p), timeout=10) for p in topic.partitions
                )
                found[name.removeprefix(self._prefix)] = sum(high for _, high in ends)
        return found


def cost(before: Reading, after: Reading, workflows: int) -> dict[str, Any]:
    """What each of these workflows cost."""
    if workflows <= 0:
        return {}
    cpu = {n: round((after.cpu_s[n] - before.cpu_s[n]) * 1000 / workflows, 3) for n in after.cpu_s}
    postgres = {n: round((after.postgres[n] - before.postgres[n]) / workflows, 2) for n in after.postgres}
    counts = {n: after.messages[n] - before.messages.get(n, 0) for n in after.messages}
    messages = {n: round(c / workflows, 2) for n, c in counts.items() if c}
    return {"workflows": workflows, "cpu_ms": cpu, "postgres": postgres, "messages": messages}
