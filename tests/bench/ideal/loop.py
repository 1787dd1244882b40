"""The ideal loop: what a hand could write for W3 alone, with the guarantees and without a feature. It is the yardstick.
The same hops, topics, Avro, durable writes, row locks, dedup by id and idempotent producer; no errors, no definitions.

    python -m tests.bench.ideal.loop intake|orchestrator|connector

It is told where everything is by IDEAL_BOOTSTRAP, IDEAL_DSN, IDEAL_PREFIX, and says `ready` when it has its partitions.
IDEAL_STATUSES says how many statuses of a workflow it tells: 2, the least that lets anyone see its end, or 4, as ours;
IDEAL_BATCH_MAX bounds a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import asyncpg
from confluent_kafka import Consumer, Producer, TopicPartition
from tests.bench.ideal.records import Emission

from factmesh import event_loop

BATCH_MAX = int(os.environ.get("IDEAL_BATCH_MAX", "500"))
IN_FLIGHT_MAX = 4
COMMIT_EVERY_S = 0.2


class Role(Protocol):
    """What one service does with a batch, in its transaction; what it returns is published, then offsets follow."""

    topics: Sequence[str]
    loop: Loop

    async def handle(self, batch: Sequence[Any]) -> list[Emission]: ...


class Wave:
    """Emissions that were published together; `ready` when all are acknowledged."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self.loop.create_future()
        if n == 0:
            self.ready.set_result(None)

    def acknowledged(self, error: Any, _message: Any) -> None:
        """On the producer's thread alone, so nothing is locked. A failed publish ends the process: redelivery cures."""
        if error is not None:
            os._exit(3)
        self.left -= 1
        if self.left == 0:
            self.loop.call_soon_threadsafe(self.ready.set_result, None)


class Loop:
    """Poll, handle, publish without waiting, commit offsets behind; the next poll runs while a batch is written."""

    def __init__(self, role: Role, name: str, bootstrap: str, prefix: str) -> None:
        self.role = role
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"{prefix}ideal-{name}",
                "group.protocol": "consumer",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 100,
            }
        )
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "partitioner": "murmur2_random",
                "linger.ms": 0,
            }
        )
        self.thread = ThreadPoolExecutor(1)
        self.in_flight: deque[tuple[dict[tuple[str, int], int], Wave]] = deque()
        self.offsets: dict[tuple[str, int], int] = {}
        self.committed_at = 0.0
        self.stopping = False
        threading.Thread(target=self._acknowledge, daemon=True).start()

    def _acknowledge(self) -> None:
        while not self.stopping:
            self.producer.poll(0.1)

    def _consume(self) -> list[Any]:
        first: list[Any] = self.consumer.consume(1, 0.1)
        return first + self.consumer.consume(BATCH_MAX - 1, 0) if first else first

    def publish(self, emissions: Sequence[Emission]) -> Wave:
        wave = Wave(len(emissions))
        for topic, key, value in emissions:
            self.producer.produce(topic, value=value, key=key, on_delivery=wave.acknowledged)
        return wave

    async def _commit(self) -> None:
        while self.in_flight and self.in_flight[0][1].ready.done():
            self.offsets |= self.in_flight.popleft()[0]
        if self.offsets and time.monotonic() - self.committed_at > COMMIT_EVERY_S:
            positions = [TopicPartition(t, p, o) for (t, p), o in self.offsets.items()]
            self.offsets, self.committed_at = {}, time.monotonic()
            await asyncio.to_thread(self.consumer.commit, offsets=positions, asynchronous=False)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.consumer.subscribe(list(self.role.topics), on_assign=lambda *_: print("ready", flush=True))
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        polled = loop.run_in_executor(self.thread, self._consume)
        parent = os.getppid()
        while not self.stopping and os.getppid() == parent:  # a killed benchmark leaves nothing behind
            batch = [m for m in await polled if m.error() is None]
            polled = loop.run_in_executor(self.thread, self._consume)
            if batch:
                wave = self.publish(await self.role.handle(batch))
                offsets = {(m.topic(), m.partition()): m.offset() + 1 for m in batch}
                self.in_flight.append((offsets, wave))
                while len(self.in_flight) > IN_FLIGHT_MAX:
                    await self.in_flight[0][1].ready
                    await self._commit()
            await self._commit()
        self.stopping = True
        await polled
        self.consumer.close()


async def main(name: str) -> None:
    from tests.bench.ideal.roles import ROLES

    bootstrap, prefix = os.environ["IDEAL_BOOTSTRAP"], os.environ["IDEAL_PREFIX"]
    pool = await asyncpg.create_pool(
        os.environ["IDEAL_DSN"],
        min_size=2,
        max_size=2,
        max_inactive_connection_lifetime=0,
        reset=_nothing,
        # A plan made on an empty table must not scan it for ever.
        server_settings={"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"},
    )
    role = ROLES[name](pool, prefix)
    loop = Loop(role, name, bootstrap, prefix)
    role.loop = loop
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: setattr(loop, "stopping", True))
    with contextlib.suppress(asyncio.CancelledError):
        await loop.run()


async def _nothing(_connection: Any) -> None:
    """Sessions need no reset."""


if __name__ == "__main__":
    event_loop.run(main(sys.argv[1]))
