"""The idempotent producer: acknowledged by all replicas, tried again until it works, never dropped.
What may be published, and when, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from factmesh.kafka.common import RECORD_OVERHEAD_BYTES_MAX, WAIT_MAX_S, BrokerError, log
from factmesh.message import Emission
from factmesh.topics import DLQ_BYTES_MAX

DELIVERY_TIMEOUT_S = 120.0
QUEUE_MESSAGES_MAX = 100_000
#: The partitioner of Kafka's own clients; librdkafka's default differs, and then one key lies on two partitions.
PARTITIONER = "murmur2_random"


class _Wave:
    """Emissions that are published together: counts acknowledgements and keeps what failed."""

    __slots__ = ("failed", "left", "lock", "loop", "ready")

    def __init__(self, n: int, loop: asyncio.AbstractEventLoop) -> None:
        self.left = n
        self.failed: list[tuple[Emission, KafkaError]] = []
        self.loop = loop
        self.lock = threading.Lock()
        self.ready: asyncio.Future[None] = loop.create_future()

    def ack(self, emission: Emission, error: KafkaError | None) -> None:
        """Called on the producer's thread, and on the loop's for what the producer did not even take."""
        with self.lock:
            if error is not None:
                self.failed.append((emission, error))
            self.left -= 1
            done = self.left == 0
        if done:
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
        self._retired: list[Producer] = []
        self._lock = threading.Lock()
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
                self._renew(producer)
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
        await asyncio.to_thread(self._producer.flush, timeout_s)
        self._stop.set()
        await asyncio.to_thread(self._thread.join, 1.0)
        # Its threads would go on reconnecting for as long as somebody holds the object.
        del self._producer
