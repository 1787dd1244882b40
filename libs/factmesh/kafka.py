"""The Kafka gateway: an idempotent producer that never drops, a consumer on one owned thread, topics made and checked.
The only importer of confluent_kafka; nothing is decoded or decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog
from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from factmesh.errors import FactmeshError, SettingsError
from factmesh.message import Delivery, Emission
from factmesh.topics import DLQ_BYTES_MAX, DLQ_PREFIX, VALUE_BYTES_MAX

log = structlog.get_logger("factmesh.kafka")

WAIT_MAX_S = 5.0
CONSUME_WAIT_S = 0.1
DELIVERY_TIMEOUT_S = 120.0
QUEUE_MESSAGES_MAX = 100_000
RECORD_OVERHEAD_BYTES_MAX = 65_536
WATERMARK_TRIES_MAX = 8
#: The partitioner of Kafka's own clients; librdkafka's default differs, and then one key lies on two partitions.
PARTITIONER = "murmur2_random"
Coordinates = tuple[str, int]


class BrokerError(FactmeshError):
    """The broker refuses in a way that waiting does not cure."""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic that must be there."""

    name: str
    partitions: int
    retention_days: int = 14
    value_bytes_max: int = VALUE_BYTES_MAX


def dlq_spec(origin: TopicSpec) -> TopicSpec:
    """The DLQ of a topic: at least as many partitions, and a copy of anything on it fits."""
    return TopicSpec(DLQ_PREFIX + origin.name, origin.partitions, origin.retention_days, DLQ_BYTES_MAX)


def _admin(bootstrap: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "error_cb": lambda _error: None})


async def wait_for_broker(bootstrap: str) -> None:
    """Return when the brokers answer; say so once a try while they do not."""
    admin = _admin(bootstrap)
    wait_s, attempt = 0.25, 0
    while True:
        try:
            await asyncio.to_thread(admin.list_topics, timeout=5)
            return
        except KafkaException as error:
            attempt += 1
            log.warning(
                "kafka.waiting",
                message=f"Kafka at {bootstrap} does not answer; trying again in {wait_s:g} s, for as long as it takes",
                error=str(error.args[0]),
                attempt=attempt,
            )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_MAX_S)


async def ensure_topics(bootstrap: str, specs: Sequence[TopicSpec], *, replication: int = -1) -> None:
    """Create what is missing, each with its DLQ given by the caller, and refuse what cannot be worked with.

    Raises SettingsError for a compacted topic: compaction would drop messages that were never handled.
    """
    admin = _admin(bootstrap)

    def work() -> None:
        there = admin.list_topics(timeout=10).topics
        new = [
            NewTopic(
                s.name,
                num_partitions=s.partitions,
                replication_factor=replication,
                config={
                    "cleanup.policy": "delete",
                    "retention.ms": str(s.retention_days * 86_400_000),
                    "max.message.bytes": str(s.value_bytes_max + RECORD_OVERHEAD_BYTES_MAX),
                },
            )
            for s in specs
            if s.name not in there
        ]
        if new:
            for name, future in admin.create_topics(new, operation_timeout=15).items():
                try:
                    future.result()
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                        raise BrokerError(
                            f"topic {name} cannot be created: {error.args[0].str()}",
                            hint="create it by hand or give the service's principal the right to",
                        ) from error
        wanted = [ConfigResource(ResourceType.TOPIC, s.name) for s in specs]
        for resource, future in admin.describe_configs(wanted, request_timeout=15).items():
            policy = future.result()["cleanup.policy"].value
            if "compact" in str(policy):
                raise SettingsError(
                    f"topic {resource.name} is compacted (cleanup.policy={policy})",
                    hint="set cleanup.policy=delete: compaction drops messages that were never handled",
                )

    wait_s = 0.25
    while True:
        try:
            await asyncio.to_thread(work)
            return
        except KafkaException as error:
            # A topic that was just created may be unknown to the next request for a moment.
            log.warning("kafka.topics_waiting", error=str(error.args[0]))
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_MAX_S)


async def list_topics(bootstrap: str) -> dict[str, int]:
    """Every topic with its number of partitions."""
    metadata = await asyncio.to_thread(_admin(bootstrap).list_topics, timeout=10)
    return {name: len(t.partitions) for name, t in metadata.topics.items()}


# --- producing -------------------------------------------------------------------------------------------------------


class _Wave:
    """Emissions that are published together: counts acknowledgements and keeps what failed."""

    __slots__ = ("failed", "left", "loop", "ready")

    def __init__(self, n: int, loop: asyncio.AbstractEventLoop) -> None:
        self.left = n
        self.failed: list[tuple[Emission, KafkaError]] = []
        self.loop = loop
        self.ready: asyncio.Future[None] = loop.create_future()

    def ack(self, emission: Emission, error: KafkaError | None) -> None:
        """Called on the producer's thread, one at a time."""
        if error is not None:
            self.failed.append((emission, error))
        self.left -= 1
        if self.left == 0:
            with contextlib.suppress(RuntimeError):  # the loop may be closed at a hard stop
                self.loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)


class Publisher:
    """An idempotent producer (KIP-98), acks from all. `publish` returns when all is acknowledged; it never drops.

    A failed publish is tried again until it works: what waits behind it (an offset, a settlement) waits too.
    """

    def __init__(self, bootstrap: str, *, client_id: str, on_retry: Callable[[int], None] = lambda _n: None) -> None:
        self._config: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "client.id": client_id,
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": PARTITIONER,
            "linger.ms": 0,
            "message.max.bytes": DLQ_BYTES_MAX + RECORD_OVERHEAD_BYTES_MAX,
            "queue.buffering.max.messages": QUEUE_MESSAGES_MAX,
            "delivery.timeout.ms": int(DELIVERY_TIMEOUT_S * 1000),
            "error_cb": lambda error: log.warning("kafka.producer", error=str(error)),
            "log_level": 3,
        }
        self._on_retry = on_retry
        self._stop = threading.Event()
        self._producer = Producer(self._config)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.is_set():
            self._producer.poll(0.1)

    async def publish(self, emissions: Sequence[Emission], *, patient: bool = True) -> None:
        """Publish and wait for every acknowledgement. Raises BrokerError at the first failure unless `patient`."""
        pending: Sequence[Emission] = emissions
        wait_s = 0.1
        while pending:
            wave = _Wave(len(pending), asyncio.get_running_loop())
            for emission in pending:
                await self._produce(emission, wave)
            await wave.ready
            if not wave.failed:
                return
            first = wave.failed[0][1]
            if not patient:
                raise BrokerError(f"not published: {first.str()}", hint="try again when the broker answers")
            log.error(
                "kafka.publish_failed",
                message=f"{len(wave.failed)} messages were not acknowledged and are published again",
                error=first.str(),
                topic=wave.failed[0][0].topic,
            )
            self._on_retry(len(wave.failed))
            if any(error.fatal() for _, error in wave.failed):
                self._renew()
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_MAX_S)
            pending = [emission for emission, _ in wave.failed]

    async def _produce(self, emission: Emission, wave: _Wave) -> None:
        def acknowledged(error: KafkaError | None, _message: Any, e: Emission = emission) -> None:
            wave.ack(e, error)

        while True:
            try:
                self._producer.produce(
                    emission.topic,
                    value=emission.value,
                    key=emission.key,
                    headers=list(emission.headers) or None,
                    on_delivery=acknowledged,
                )
                return
            except BufferError:
                await asyncio.sleep(0.01)
            except KafkaException as error:
                wave.ack(emission, error.args[0])
                return

    def _renew(self) -> None:
        """After a fatal error the idempotent producer is of no use any more; what failed goes through a new one."""
        with self._lock:
            log.error("kafka.producer_renewed", message="the producer met a fatal error and is replaced")
            self._producer = Producer(self._config)

    @property
    def queued(self) -> int:
        """Messages that wait for the broker, for back-pressure."""
        return len(self._producer)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Flush what is queued, at most `timeout_s`; what is left is in the ledger and is published again."""
        await asyncio.to_thread(self._producer.flush, timeout_s)
        self._stop.set()
        await asyncio.to_thread(self._thread.join, 1.0)


# --- consuming -------------------------------------------------------------------------------------------------------


def _delivery(message: Any) -> Delivery:
    return Delivery(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        tuple(message.headers() or ()),
        message.timestamp()[1],
    )


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
            error = message.error()
            if error is None:
                out.append(_delivery(message))
            elif error.code() != KafkaError._PARTITION_EOF:
                log.warning("kafka.consume", group=self.group, error=error.str())
        return out

    async def commit(self, offsets: Mapping[Coordinates, int]) -> None:
        """Commit the next offset to read of each partition. A refused commit is logged: the messages come again."""
        if not offsets:
            return
        positions = [TopicPartition(t, p, o) for (t, p), o in offsets.items()]

        def work() -> None:
            self._the().commit(offsets=positions, asynchronous=False)

        try:
            # Not on the owned thread: that one may be waiting, inside a revocation, for this very commit.
            await asyncio.to_thread(work)
        except (KafkaException, RuntimeError) as error:
            log.warning("kafka.commit", group=self.group, error=str(error), message="the messages come again")

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
            consumer, out = self._the(), {}
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


DRAIN_S_MAX = 8.0


async def end_offsets(bootstrap: str, topics: Sequence[str]) -> dict[Coordinates, int]:
    """The next offset that will be written, of every partition of these topics."""
    return (await _watermarks(bootstrap, topics))[0]


def _watermark(consumer: Any, topic: str, partition: int) -> tuple[int, int]:
    """(first, next) offset. A leader that is just moving is asked again, for a bounded time."""
    for attempt in range(WATERMARK_TRIES_MAX):
        try:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            return low, high
        except KafkaException:
            if attempt == WATERMARK_TRIES_MAX - 1:
                raise
            time.sleep(0.1 * (attempt + 1))
    raise AssertionError("unreachable: the loop above returns or raises")


async def _watermarks(bootstrap: str, topics: Sequence[str]) -> tuple[dict[Coordinates, int], dict[Coordinates, int]]:
    def work() -> tuple[dict[Coordinates, int], dict[Coordinates, int]]:
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "factmesh-inspect", "log_level": 0})
        try:
            there = consumer.list_topics(timeout=10).topics
            ends, starts = {}, {}
            for topic in topics:
                for partition in there[topic].partitions if topic in there else ():
                    low, high = _watermark(consumer, topic, partition)
                    ends[(topic, partition)], starts[(topic, partition)] = high, low
            return ends, starts
        finally:
            consumer.close()

    return await asyncio.to_thread(work)


async def backlog(bootstrap: str, group: str, topics: Sequence[str]) -> int:
    """Messages that a group has not committed yet, over all partitions of these topics."""
    ends, starts = await _watermarks(bootstrap, topics)

    def work() -> int:
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "log_level": 0})
        try:
            committed = consumer.committed([TopicPartition(t, p) for t, p in ends], timeout=10)
            total = 0
            for position in committed:
                where = (position.topic, position.partition)
                at = position.offset if position.offset != OFFSET_INVALID and position.offset >= 0 else starts[where]
                total += max(0, ends[where] - at)
            return total
        finally:
            consumer.close()

    return await asyncio.to_thread(work) if ends else 0


async def read_all(bootstrap: str, topics: Sequence[str]) -> list[Delivery]:
    """Everything on these topics now, from offset 0 to the end: for inspection and judges, not for services."""
    ends = await end_offsets(bootstrap, topics)

    def work() -> list[Delivery]:
        consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": "factmesh-read", "enable.auto.commit": False, "log_level": 0}
        )
        out: list[Delivery] = []
        try:
            starts = []
            left = dict(ends)
            for (topic, partition), high in ends.items():
                low, _ = _watermark(consumer, topic, partition)
                if low < high:
                    starts.append(TopicPartition(topic, partition, low))
                else:
                    left.pop((topic, partition))
            consumer.assign(starts)
            while left:
                for message in consumer.consume(1000, 0.2):
                    if message.error() is None:
                        delivery = _delivery(message)
                        out.append(delivery)
                        where = (delivery.topic, delivery.partition)
                        if delivery.offset + 1 >= left.get(where, 0):
                            left.pop(where, None)
            return out
        finally:
            consumer.close()

    return await asyncio.to_thread(work)
