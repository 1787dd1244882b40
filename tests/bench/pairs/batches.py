"""How batches grow: polled ahead while the batch before is written, or when the loop is free, or both.
A broker and its own topic; `python -m tests.bench.pairs.batches [bootstrap]`. A batch costs a fixed and a linear time.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from factmesh import kafka
from factmesh.stack import open_stack

RATES = (100, 1_000, 4_000)
SECONDS = 5.0
FIXED_S, EACH_S = 0.004, 0.00008
BATCH_MAX = 500
ROUNDS = 3


async def consume(subscription: kafka.Subscription, way: str, until: float) -> tuple[list[int], list[float]]:
    sizes: list[int] = []
    waits: list[float] = []

    async def poll(n: int = BATCH_MAX, wait_s: float = 0.1) -> list[Any]:
        return list(await subscription.poll(n, wait_s))

    ahead = asyncio.create_task(poll()) if way != "when free" else None
    while time.time() < until:
        if ahead is None:
            batch = await poll()
        else:
            full = ahead.done()
            batch = await ahead
            if way == "ahead, topped up" and full and batch and len(batch) < BATCH_MAX:
                batch += await poll(BATCH_MAX - len(batch), 0.0)
            ahead = asyncio.create_task(poll())
        if batch:
            await asyncio.sleep(FIXED_S + EACH_S * len(batch))
            sizes.append(len(batch))
            waits += [time.time() - float(d.value or 0) for d in batch]
    if ahead is not None:
        await ahead
    return sizes, waits


def produce(bootstrap: str, topic: str, rate: int, until: float) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    sent, began = 0, time.time()
    while time.time() < until:
        while sent < (time.time() - began) * rate:
            producer.produce(topic, value=repr(time.time()).encode())
            sent += 1
        producer.poll(0.001)
    producer.flush(5)


async def compare(bootstrap: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    print(f"{'':10} {'':18} {'batches/s':>10} {'mean size':>10} {'p50 ms':>8} {'p99 ms':>8}")
    for rate in RATES:
        found: dict[str, list[tuple[float, ...]]] = {"ahead": [], "when free": [], "ahead, topped up": []}
        for _ in range(ROUNDS):
            for way, runs in found.items():
                topic = f"pairs.batches.{time.time()}"
                admin.create_topics([NewTopic(topic, 4, 1)])[topic].result()
                subscription = kafka.Subscription(bootstrap, group=topic, topics=[topic], client_id="pairs")
                await subscription.start()
                while not subscription.assigned:
                    await subscription.poll(1, 0.1)
                until = time.time() + SECONDS
                thread = threading.Thread(target=produce, args=(bootstrap, topic, rate, until - 0.5))
                thread.start()
                sizes, waits = await consume(subscription, way, until)
                thread.join()
                await subscription.close()
                waits.sort()
                p50, p99 = waits[len(waits) // 2], waits[len(waits) * 99 // 100]
                runs.append((len(sizes) / SECONDS, sum(sizes) / len(sizes), p50 * 1e3, p99 * 1e3))
        for way, runs in found.items():
            each, size, p50, p99 = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{rate:8}/s {way:18} {each:10.0f} {size:10.1f} {p50:8.1f} {p99:8.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(compare(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="fm-") as folder, open_stack(Path(folder)) as stack:
            asyncio.run(compare(stack.bootstrap))
