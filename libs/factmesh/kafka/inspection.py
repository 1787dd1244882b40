"""What lies on topics, for the tool, readiness and judges: ends, a group's backlog, everything from the beginning.
No service reads its work through this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaException, TopicPartition

from factmesh.kafka.common import Coordinates, delivery_of, log
from factmesh.message import Delivery

INSPECT_TRIES_MAX = 8


async def end_offsets(bootstrap: str, topics: Sequence[str]) -> dict[Coordinates, int]:
    """The next offset that will be written, of every partition of these topics."""
    return (await _watermarks(bootstrap, topics))[0]


async def _patiently(work: Callable[[], Any]) -> Any:
    """Run `work` on a thread; a leader that is just moving is asked again, for a bounded number of times."""
    for attempt in range(1, INSPECT_TRIES_MAX):
        try:
            return await asyncio.to_thread(work)
        except KafkaException as error:
            log.info("kafka.inspect_again", error=str(error.args[0]), attempt=attempt)
            await asyncio.sleep(0.1 * attempt)
    return await asyncio.to_thread(work)


async def _watermarks(bootstrap: str, topics: Sequence[str]) -> tuple[dict[Coordinates, int], dict[Coordinates, int]]:
    def work() -> tuple[dict[Coordinates, int], dict[Coordinates, int]]:
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "factmesh-inspect", "log_level": 0})
        try:
            there = consumer.list_topics(timeout=10).topics
            ends, starts = {}, {}
            for topic in topics:
                for partition in there[topic].partitions if topic in there else ():
                    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
                    ends[(topic, partition)], starts[(topic, partition)] = high, low
            return ends, starts
        finally:
            consumer.close()

    found: tuple[dict[Coordinates, int], dict[Coordinates, int]] = await _patiently(work)
    return found


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

    return int(await _patiently(work)) if ends else 0


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
                low, _ = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
                if low < high:
                    starts.append(TopicPartition(topic, partition, low))
                else:
                    left.pop((topic, partition))
            consumer.assign(starts)
            while left:
                for message in consumer.consume(1000, 0.2):
                    if message.error() is None:
                        delivery = delivery_of(message)
                        out.append(delivery)
                        where = (delivery.topic, delivery.partition)
                        if delivery.offset + 1 >= left.get(where, 0):
                            left.pop(where, None)
            return out
        finally:
            consumer.close()

    deliveries: list[Delivery] = await _patiently(work)
    return deliveries
