"""A consumer on one owned thread, driven from asyncio; offsets are committed by hand.
What a message means, and when its offset may be committed, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from factmesh.kafka.common import RECORD_OVERHEAD_BYTES_MAX, Coordinates, delivery_of, log
from factmesh.message import Delivery
from factmesh.topics import DLQ_BYTES_MAX

T = TypeVar("T")

CONSUME_WAIT_S = 0.1
DRAIN_S_MAX = 8.0
"""How long a revocation waits for what is in flight; letting go late is harmless."""
COMMIT_S_MAX = 5.0
"""The client holds a commit back for a session timeout when its coordinator is gone; the loop cannot wait so long."""
ANSWER_S_MAX = 2.0
RENEW_AFTER_S = 15.0
"""How long commits may be refused while the broker answers, before this consumer is replaced by a new one."""
SOCKET_TIMEOUT_S = 10.0
"""A question that a broker took with it when it died is asked again after this time, by default after a minute."""
ASIDE_S_MAX = 60.0
"""Longer than the client holds a commit back: until then nobody may close the consumer under it."""


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
            "socket.timeout.ms": int(SOCKET_TIMEOUT_S * 1000),
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
        self._draining = False
        self._refused_since: float | None = None
        self._asides: set[threading.Thread] = set()

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

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if consumer is not self._consumer:
            return  # one that was replaced
        self.assigned |= {(p.topic, p.partition) for p in partitions}
        log.info("kafka.assigned", group=self.group, partitions=len(self.assigned))

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """On the owned thread: the loop finishes and commits what is in flight, then the partitions go."""
        if consumer is not self._consumer:
            return
        if self._drain is not None and self._loop is not None and not self._loop.is_closed():
            future = asyncio.run_coroutine_threadsafe(self._bounded_drain(), self._loop)
            with contextlib.suppress(Exception):
                future.result(timeout=DRAIN_S_MAX + 1)
        self.assigned -= {(p.topic, p.partition) for p in partitions}
        log.info("kafka.revoked", group=self.group, partitions=len(self.assigned))

    async def _bounded_drain(self) -> None:
        assert self._drain is not None
        # Letting go late is harmless: a second owner, or a zombie, can only repeat (DESIGN section 3).
        self._draining = True
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S_MAX):
                    await self._drain()
        finally:
            self._draining = False

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if consumer is not self._consumer:
            return
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
        consumer, positions = self._the(), [TopicPartition(t, p, o) for (t, p), o in offsets.items()]

        def work() -> str:
            # A refusal of one partition is not raised: it stands in what is returned.
            results = consumer.commit(offsets=positions, asynchronous=False) or ()
            return ", ".join(f"{p.topic}[{p.partition}]: {p.error}" for p in results if p.error is not None)

        try:
            # Not on the owned thread: that one may be waiting, inside a revocation, for this very commit.
            async with asyncio.timeout(COMMIT_S_MAX):
                refused = await self._aside(work)
        except TimeoutError:
            refused = f"no answer within {COMMIT_S_MAX:g} s"
        except (KafkaException, RuntimeError) as error:
            refused = str(error)
        if not refused:
            self._refused_since = None
            return True
        log.warning("kafka.commit", group=self.group, error=refused, message="not committed, tried again")
        if not self._draining:
            await self._renew_if_stuck(consumer)
        return False

    async def _renew_if_stuck(self, consumer: Consumer) -> None:
        """A broker that answers, and a group that accepts nothing: the client lost its coordinator over a restart.

        It was seen to ask nobody for more than two minutes. A new consumer starts where the last commit was, and what
        comes twice is recognised.
        """
        try:
            async with asyncio.timeout(ANSWER_S_MAX + 1):
                await self._aside(lambda: consumer.list_topics(timeout=ANSWER_S_MAX))
        except (KafkaException, RuntimeError, TimeoutError):
            self._refused_since = None  # nobody could commit anything now
            return
        now = asyncio.get_running_loop().time()
        if self._refused_since is None:
            self._refused_since = now
        elif now - self._refused_since >= RENEW_AFTER_S:
            self._refused_since = None
            log.error(
                "kafka.consumer_renewed",
                group=self.group,
                message=f"the broker answers and has taken no commit for {RENEW_AFTER_S:g} s: the consumer is replaced",
            )
            await self._on_thread(self._renew, consumer)

    def _renew(self, stuck: Consumer) -> None:
        """On the owned thread. The old one leaves the group in its own time, or is thrown out by the broker."""
        if self._consumer is not stuck:
            return
        self._consumer = Consumer(self._config)
        self.assigned.clear()
        self._subscribe()
        asides = list(self._asides)

        def close() -> None:
            if _ended(asides, ASIDE_S_MAX):
                stuck.close()

        threading.Thread(target=close, name=f"kafka-close-{self.group}", daemon=True).start()

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
            asides = list(self._asides)
            if await asyncio.to_thread(_ended, asides, ANSWER_S_MAX):
                await self._on_thread(self._the().close)
            else:
                # Freed under a call that still runs, it would take the process with it. The broker throws it out.
                log.warning("kafka.not_closed", group=self.group, message="the client hangs in a call; left behind")
        self._thread.shutdown(wait=False)

    def _aside(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Run what may hang on a thread of its own, which nobody waits for when the process ends."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return  # given up
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except Exception as error:
                failure = error
            self._asides.discard(threading.current_thread())
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
                loop.call_soon_threadsafe(tell, result, failure)

        thread = threading.Thread(target=run, name="kafka-aside", daemon=True)
        self._asides.add(thread)
        thread.start()
        return future


def _ended(threads: Sequence[threading.Thread], within_s: float) -> bool:
    """Whether all of these have ended within that time."""
    for thread in threads:
        thread.join(within_s / len(threads))
    return not any(thread.is_alive() for thread in threads)
