"""confluent-kafka against aiokafka: CPU time a message of reading batches, and of publishing them acknowledged.
A broker and its own topic; `python -m tests.bench.pairs.consumers [bootstrap]`. Rounds alternate; medians and spread.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiokafka
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from factmesh import event_loop, kafka
from factmesh.message import Emission
from factmesh.stack import open_stack

MESSAGES, BATCH, ROUNDS = 6_000, 500, 5
VALUE = b"\0" * 450


async def ours(bootstrap: str, topic: str) -> tuple[float, float]:
    publisher = kafka.Publisher(bootstrap, client_id="pairs")
    cpu = time.process_time()
    for begin in range(0, MESSAGES, BATCH):
        await publisher.publish([Emission(topic, b"%d" % n, VALUE) for n in range(begin, begin + BATCH)])
    published = time.process_time() - cpu
    await publisher.close()
    subscription = kafka.Subscription(bootstrap, group=topic, topics=[topic], client_id="pairs")
    await subscription.start()
    read = len(await subscription.poll(1, 5.0))
    cpu = time.process_time()
    while read < MESSAGES:
        read += len(await subscription.poll(BATCH))
    consumed = time.process_time() - cpu
    await subscription.close()
    return published / MESSAGES * 1e6, consumed / MESSAGES * 1e6


async def theirs(bootstrap: str, topic: str) -> tuple[float, float]:
    producer = aiokafka.AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True)
    await producer.start()
    cpu = time.process_time()
    for begin in range(0, MESSAGES, BATCH):
        sent = [await producer.send(topic, VALUE, key=b"%d" % n) for n in range(begin, begin + BATCH)]
        await asyncio.gather(*sent)
    published = time.process_time() - cpu
    await producer.stop()
    consumer = aiokafka.AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=topic, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    read = 0
    while not read:
        read = sum(map(len, (await consumer.getmany(timeout_ms=5_000, max_records=1)).values()))
    cpu = time.process_time()
    while read < MESSAGES:
        read += sum(map(len, (await consumer.getmany(timeout_ms=100, max_records=BATCH)).values()))
    consumed = time.process_time() - cpu
    await consumer.stop()
    return published / MESSAGES * 1e6, consumed / MESSAGES * 1e6


async def compare(bootstrap: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    ways = {"confluent-kafka": ours, "aiokafka": theirs}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        for name, work in ways.items():
            topic = f"pairs.{name}.{number}.{int(time.time())}"
            admin.create_topics([NewTopic(topic, 4, 1)])[topic].result()
            found[name].append(await work(bootstrap, topic))
    for name, runs in found.items():
        for what, column in zip(("publish", "read"), zip(*runs, strict=True), strict=True):
            print(f"{name:16} {what:8} {statistics.median(column):7.2f} us ({min(column):.2f}-{max(column):.2f})")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        event_loop.run(compare(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="fm-") as folder, open_stack(Path(folder)) as stack:
            event_loop.run(compare(stack.bootstrap))
