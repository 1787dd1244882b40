"""The idempotent producer: acknowledged by all replicas, tried again until it works, never dropped.
What may be published, and when, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from factmesh.kafka.common import RECORD_OVERHEAD_BYTES_MAX, WAIT_MAX_S, BrokerError, log
from factmesh.message import Emission
from factmesh.topics import DLQ_BYTES_MAX

DELIVERY_TIMEOUT_S = 120.0
QUEUE_MESSAGES_MAX = 100_000
QUEUE_FULL_WAIT_S = 0.01
#: The partitioner of Kafka's own clients; librdkafka's default differs, and then one key lies on two partitions.
PARTITIONER = "murmur2_random"


class _Wave:
    """Emissions that are published together under one callback: counts the answers, and keeps which of them failed.

    Answers come on the producer's thread alone and refusals on the loop's alone: each writes its own number, so that
    nothing is locked, and looks at the other's afterwards.
    """

    __slots__ = ("_answered", "_awaited", "_loop", "errors", "failed", "ready")

    def __init__(self, n: int, loop: asyncio.AbstractEventLoop) -> None:
        self._awaited = n
        self._answered = 0
        self._loop = loop
        self.errors: list[KafkaError] = []
        self.failed: set[_Bytes] = set()
        self.ready: asyncio.Future[None] = loop.create_future()

    def answer(self, error: KafkaError | None, message: Any) -> None:
        """What became of one that the producer took."""
        if error is not None:
            self.failed.add((message.topic(), message.key() or b"", message.value() or b""))
            self.errors.append(error)
        self._answered += 1
        if self._answered >= self._awaited:
            with contextlib.suppress(RuntimeError):  # the loop may be closed at a hard stop
                self._loop.call_soon_threadsafe(self._set)

    def refuse(self, error: KafkaError, emission: Emission) -> None:
        """The producer did not even take this one."""
        self.failed.add(_bytes_of(emission))
        self.errors.append(error)
        self._awaited -= 1
        if self._answered >= self._awaited:
            self._set()

    def _set(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)


_Bytes = tuple[str, bytes, bytes]


def _bytes_of(emission: Emission) -> _Bytes:
    """By what an answer tells which emission it is about: it has no headers. A twin is published again with it."""
    return (emission.topic, emission.key or b"", emission.value or b"")


class _Answers:
    """Acknowledgements on their way from the producer's thread to those who wait on the loop: one wake-up a burst."""

    __slots__ = ("_due", "_loop", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: deque[tuple[asyncio.Future[None], KafkaError | None]] = deque()
        self._woken = False

    def put(self, waiting: asyncio.Future[None], error: KafkaError | None) -> None:
        """Called on the producer's thread. First the answer, then the look: `_deliver` does it the other way round."""
        self._due.append((waiting, error))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop may be closed at a hard stop
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._due:
            waiting, error = self._due.popleft()
            if waiting.done():
                continue  # its caller has given up
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(_refused(error))


def _refused(error: KafkaError) -> BrokerError:
    return BrokerError(f"not published: {error.str()}", hint="try again when the broker answers")


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
        self._retired: list[Producer] = []
        self._lock = threading.Lock()
        self._answers: _Answers | None = None
        self._thread = threading.Thread(target=self._poll, name="kafka-producer", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.is_set():
            self._producer.poll(0.1)
            for old in list(self._retired):
                # Others' emissions may be on it: until each had its answer, their publishers wait.
                old.poll(0)
                if len(old) == 0:
                    self._retired.remove(old)

    async def publish(self, emissions: Sequence[Emission], *, patient: bool = True) -> None:
        """Publish and wait for every acknowledgement. Raises BrokerError at the first failure unless `patient`."""
        pending: Sequence[Emission] = emissions
        wait_s = 0.1
        while pending:
            wave = _Wave(len(pending), asyncio.get_running_loop())
            producer = self._producer
            taken = self._produce(pending, 0, wave)
            while taken < len(pending):
                await asyncio.sleep(QUEUE_FULL_WAIT_S)
                taken = self._produce(pending, taken, wave)
            await wave.ready
            if not wave.errors:
                return
            first = wave.errors[0]
            if not patient:
                raise _refused(first)
            pending = [emission for emission in pending if _bytes_of(emission) in wave.failed] or pending
            log.error(
                "kafka.publish_failed",
                message=f"{len(pending)} messages were not acknowledged and are published again",
                error=first.str(),
                topic=pending[0].topic,
            )
            self._on_retry(len(pending))
            if any(error.fatal() for error in wave.errors):
                self._renew(producer)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_MAX_S)

    def send(self, emission: Emission) -> asyncio.Future[None]:
        """Publish one, impatiently: done at its own acknowledgement, or fails alone with BrokerError.

        For entrances, where many callers wait at once, each for its own; they are not held up by each other's.
        """
        loop = asyncio.get_running_loop()
        answers = self._answers
        if answers is None or answers._loop is not loop:
            answers = self._answers = _Answers(loop)
        waiting: asyncio.Future[None] = loop.create_future()
        producer = self._producer

        def acknowledged(error: KafkaError | None, _message: Any) -> None:
            if error is not None and error.fatal():
                loop.call_soon_threadsafe(self._renew, producer)
            answers.put(waiting, error)

        try:
            producer.produce(
                emission.topic,
                value=emission.value,
                key=emission.key,
                headers=list(emission.headers) or None,
                on_delivery=acknowledged,
            )
        except BufferError:
            waiting.set_exception(BrokerError("not published: the queue is full", hint="try again later"))
        except KafkaException as error:
            acknowledged(error.args[0], None)
        return waiting

    def _produce(self, emissions: Sequence[Emission], begin: int, wave: _Wave) -> int:
        """Hand them to the producer from `begin` on; the index of the first that its full queue did not take."""
        produce, answer = self._producer.produce, wave.answer
        for n in range(begin, len(emissions)):
            e = emissions[n]
            try:
                produce(e.topic, value=e.value, key=e.key, headers=list(e.headers) or None, on_delivery=answer)
            except BufferError:
                return n
            except KafkaException as error:
                wave.refuse(error.args[0], e)
        return len(emissions)

    def _renew(self, failed: Producer) -> None:
        """After a fatal error the idempotent producer is of no use any more; what failed goes through a new one.

        What others have on it fails now, and their publishers try it again: nobody else would answer them.
        """
        with self._lock:
            if self._producer is not failed:
                return  # another publisher has met the same error
            log.error("kafka.producer_renewed", message="the producer met a fatal error and is replaced")
            self._producer = Producer(self._config)
            self._retired.append(failed)
            failed.purge(blocking=False)

    @property
    def queued(self) -> int:
        """Messages that wait for the broker, for back-pressure."""
        return len(self._producer)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Flush what is queued, at most `timeout_s`; what is left is in the ledger and is published again."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while len(self._producer) and loop.time() < until:  # not flush: answers come on the producer's thread alone
            await asyncio.sleep(0.01)
        self._stop.set()
        await asyncio.to_thread(self._thread.join, 1.0)
        # Its threads would go on reconnecting for as long as somebody holds the object.
        del self._producer
