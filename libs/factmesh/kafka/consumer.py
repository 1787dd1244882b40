"""A consumer on one owned thread, driven from asyncio; offsets are committed by hand.
What a message means, and when its offset may be committed, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from factmesh.kafka.common import RECORD_OVERHEAD_BYTES_MAX, Coordinates, delivery_of, log
from factmesh.message import Delivery
from factmesh.topics import DLQ_BYTES_MAX

CONSUME_WAIT_S = 0.1
DRAIN_S_MAX = 8.0
"""How long a revocation waits for what is in flight; letting go late is harmless."""


class Subscription:
    """A consumer on one owned thread, driven from asyncio. Offsets are committed by hand, never automatically.

    `drain` is called (from asyncio) when partitions are revoked: finish what is in flight and commit, then let go.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        group: str,
        topics: Sequence[str],
        client_id: str,
        protocol: str = "consumer",
        drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        config: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "client.id": client_id,
            "group.protocol": protocol,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 100,
            "fetch.max.bytes": 16_777_216,
            "max.partition.fetch.bytes": DLQ_BYTES_MAX + RECORD_OVERHEAD_BYTES_MAX,
            "queued.max.messages.kbytes": 32_768,
            "max.poll.interval.ms": 600_000,
            "error_cb": lambda error: log.warning("kafka.consumer", error=str(error)),
            "log_level": 3,
        }
        if protocol == "classic":
            config["partition.assignment.strategy"] = "cooperative-sticky"
            config["session.timeout.ms"] = 15_000
        self.group = group
        self.topics = tuple(topics)
        self._config = config
        self._drain = drain
        self._consumer: Consumer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kafka-{group}")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.assigned: set[Coordinates] = set()

    async def _on_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

        def work() -> None:
            self._consumer = Consumer(self._config)
            self._subscribe()

        await self._on_thread(work)

    async def resubscribe(self, topics: Sequence[str]) -> None:
        """Follow another set of topics (new DLQs)."""
        self.topics = tuple(topics)

        def work() -> None:
            self._subscribe()

        await self._on_thread(work)

    def _subscribe(self) -> None:
        on = {"on_assign": self._assigned, "on_revoke": self._revoked, "on_lost": self._lost}
        self._the().subscribe(list(self.topics), **on)

    def _the(self) -> Consumer:
        assert self._consumer is not None, "start() was not awaited"
        return self._consumer

    def _assigned(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.assigned |= {(p.topic, p.partition) for p in partitions}
        log.info("kafka.assigned", group=self.group, partitions=len(self.assigned))

    def _revoked(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """On the owned thread: the loop finishes and commits what is in flight, then the partitions go."""
        if self._drain is not None and self._loop is not None and not self._loop.is_closed():
            future = asyncio.run_coroutine_threadsafe(self._bounded_drain(), self._loop)
            with contextlib.suppress(Exception):
                future.result(timeout=DRAIN_S_MAX + 1)
        self.assigned -= {(p.topic, p.partition) for p in partitions}
        log.info("kafka.revoked", group=self.group, partitions=len(self.assigned))

    async def _bounded_drain(self) -> None:
        assert self._drain is not None
        # Letting go late is harmless: a second owner, or a zombie, can only repeat (DESIGN section 3).
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S_MAX):
                await self._drain()

    def _lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.assigned -= {(p.topic, p.partition) for p in partitions}
        log.warning("kafka.lost", group=self.group, partitions=len(partitions))

    async def poll(self, max_messages: int, wait_s: float = CONSUME_WAIT_S) -> list[Delivery]:
        """Up to `max_messages`, or what is there after `wait_s`. Broker trouble is logged and reads as nothing."""
        deliveries: list[Delivery] = await self._on_thread(self._consume, max_messages, wait_s)
        return deliveries

    def _consume(self, max_messages: int, wait_s: float) -> list[Delivery]:
        # One blocking poll for the first message, then whatever is there already: a batch at low load is one message.
        consumer = self._the()
        try:
            messages = consumer.consume(1, wait_s)
            if messages and max_messages > 1:
                messages += consumer.consume(max_messages - 1, 0)
        except KafkaException as error:
            log.warning("kafka.consume", group=self.group, error=str(error.args[0]))
            return []
        out = []
        for message in messages:
            failure = message.error()
            if failure is None:
                out.append(delivery_of(message))
            elif failure.code() != KafkaError._PARTITION_EOF:
                log.warning("kafka.consume", group=self.group, error=failure.str())
        return out

    async def commit(self, offsets: Mapping[Coordinates, int]) -> bool:
        """Commit the next offset to read of each partition; whether it counted.

        A refused commit is logged: it may be tried again, and if it never is, the messages come again.
        """
        if not offsets:
            return True
        positions = [TopicPartition(t, p, o) for (t, p), o in offsets.items()]

        def work() -> str:
            # A refusal of one partition is not raised: it stands in what is returned.
            results = self._the().commit(offsets=positions, asynchronous=False) or ()
            return ", ".join(f"{p.topic}[{p.partition}]: {p.error}" for p in results if p.error is not None)

        try:
            # Not on the owned thread: that one may be waiting, inside a revocation, for this very commit.
            refused = await asyncio.to_thread(work)
            if refused:
                log.warning("kafka.commit", group=self.group, error=refused, message="not committed, tried again")
                return False
        except (KafkaException, RuntimeError) as error:
            log.warning("kafka.commit", group=self.group, error=str(error), message="not committed, tried again")
            return False
        return True

    async def rewind(self, offsets: Mapping[Coordinates, int]) -> None:
        """Read again from these offsets."""

        def work() -> None:
            for (topic, partition), offset in offsets.items():
                with contextlib.suppress(KafkaException):
                    self._the().seek(TopicPartition(topic, partition, offset))

        await self._on_thread(work)

    async def pause(self, partitions: Sequence[Coordinates]) -> None:
        """Fetch nothing from these until the next assignment."""

        def work() -> None:
            with contextlib.suppress(KafkaException):
                self._the().pause([TopicPartition(t, p) for t, p in partitions])

        await self._on_thread(work)

    async def lag(self) -> dict[Coordinates, int]:
        """Messages between the committed offset and the end, by partition that is assigned here."""

        def work() -> dict[Coordinates, int]:
            consumer = self._the()
            out: dict[Coordinates, int] = {}
            assigned = [TopicPartition(t, p) for t, p in sorted(self.assigned)]
            if not assigned:
                return out
            try:
                for position in consumer.position(assigned):
                    low, high = consumer.get_watermark_offsets(position, timeout=1, cached=True)
                    at = position.offset if position.offset >= 0 else low
                    if high >= 0:
                        out[(position.topic, position.partition)] = max(0, high - max(at, 0))
            except KafkaException:
                return out
            return out

        lags: dict[Coordinates, int] = await self._on_thread(work)
        return lags

    async def close(self) -> None:
        """Leave the group."""
        if self._consumer is not None:
            self._drain = None
            await self._on_thread(self._the().close)
        self._thread.shutdown(wait=False)
