"""Who takes the acknowledgements: a thread that polls, or the event loop itself, while the loop is busy.
A broker and its own topic; `python -m tests.bench.pairs.acks [bootstrap]`. Rounds alternate; medians and spread.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from factmesh.stack import open_stack

BATCH = 300
BATCHES = 30
ROUNDS = 5
IN_FLIGHT_MAX = 4
WORK = 3_000
VALUE = b"\0" * 450


class Wave:
    def __init__(self, n: int, loop: asyncio.AbstractEventLoop, *, threaded: bool) -> None:
        self.left, self.loop, self.threaded = n, loop, threaded
        self.ready: asyncio.Future[None] = loop.create_future()

    def acknowledged(self, error: Any, _message: Any) -> None:
        assert error is None, error
        self.left -= 1
        if self.left == 0:
            if self.threaded:
                self.loop.call_soon_threadsafe(self.ready.set_result, None)
            else:
                self.ready.set_result(None)


def work() -> int:
    """What a batch costs in Python, some milliseconds."""
    return sum(n * n % 7 for n in range(WORK * 10))


async def run(producer: Producer, topic: str, *, threaded: bool) -> tuple[float, float, float]:
    """Batches worked on and published, four in flight: CPU us a message, wall ms a batch, p50 of acknowledgement."""
    loop = asyncio.get_running_loop()
    waves: list[tuple[float, Wave]] = []
    waits: list[float] = []
    polling = False

    def poll() -> None:
        nonlocal polling
        producer.poll(0)
        polling = len(producer) > 0
        if polling:
            loop.call_later(0.001, poll)

    cpu, wall = time.process_time(), time.perf_counter()

    def landed(began: float, _future: Any) -> None:
        waits.append(time.perf_counter() - began)

    for _ in range(BATCHES):
        work()
        wave = Wave(BATCH, loop, threaded=threaded)
        began = time.perf_counter()
        wave.ready.add_done_callback(partial(landed, began))
        for n in range(BATCH):
            producer.produce(topic, value=VALUE, key=b"%036d" % n, on_delivery=wave.acknowledged)
        if not threaded and not polling:
            polling = True
            loop.call_later(0.001, poll)
        waves.append((began, wave))
        await asyncio.sleep(0)
        while len(waves) >= IN_FLIGHT_MAX:
            await waves.pop(0)[1].ready
    for _, wave in waves:
        await wave.ready
    n = BATCH * BATCHES
    return (
        (time.process_time() - cpu) / n * 1e6,
        (time.perf_counter() - wall) / BATCHES * 1e3,
        statistics.median(waits) * 1e3,
    )


WAYS = {"thread": (True, 0.005), "thread, switch 0.5 ms": (True, 0.0005), "event loop": (False, 0.005)}


async def compare(bootstrap: str) -> None:
    topic = "pairs.acks"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, 4, 1)])[topic].result()
    producers: dict[str, Producer] = {}
    stop = threading.Event()
    for name, (threaded, _) in WAYS.items():
        producer = producers[name] = Producer(
            {"bootstrap.servers": bootstrap, "enable.idempotence": True, "acks": "all", "linger.ms": 0}
        )

        def poll(producer: Producer = producer) -> None:
            while not stop.is_set():
                producer.poll(0.1)

        if threaded:
            threading.Thread(target=poll, daemon=True).start()
        await run(producer, topic, threaded=threaded)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, (threaded, interval_s) in WAYS.items():
            sys.setswitchinterval(interval_s)
            found[name].append(await run(producers[name], topic, threaded=threaded))
    stop.set()
    print(f"{'':24} {'cpu us':>8} {'(min-max)':>15} {'batch ms':>9} {'ack ms':>8}")
    for name, runs in found.items():
        cpu, wall, ack = (statistics.median(column) for column in zip(*runs, strict=True))
        low, high = min(r[0] for r in runs), max(r[0] for r in runs)
        print(f"{name:24} {cpu:8.2f} {f'({low:.2f}-{high:.2f})':>15} {wall:9.2f} {ack:8.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(compare(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="fm-") as folder, open_stack(Path(folder)) as stack:
            asyncio.run(compare(stack.bootstrap))
