"""CPU time a message of ways to publish a batch: a call a message, with headers, in one call, with lingering.
A broker and its own topic; `python -m tests.bench.pairs.publish [bootstrap]`. Rounds alternate; medians and spread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from factmesh.stack import open_stack

BATCH = 300
BATCHES = 25
ROUNDS = 5
VALUE = b"\0" * 450
HEADERS: list[tuple[str, str | bytes | None]] = [(f"ce_header_{n}", b"some value of it") for n in range(8)]


class Wave:
    """Counts acknowledgements on the producer's thread."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.done = threading.Event()

    def acknowledged(self, error: Any, _message: Any) -> None:
        assert error is None, error
        self.left -= 1
        if self.left == 0:
            self.done.set()


Send = Callable[[Producer, str, Sequence[bytes], Wave], None]


def each(producer: Producer, topic: str, keys: Sequence[bytes], wave: Wave) -> None:
    for key in keys:
        producer.produce(topic, value=VALUE, key=key, on_delivery=wave.acknowledged)


def closures(producer: Producer, topic: str, keys: Sequence[bytes], wave: Wave) -> None:
    for key in keys:

        def acknowledged(error: Any, message: Any, key: bytes = key) -> None:
            wave.acknowledged(error, message)

        producer.produce(topic, value=VALUE, key=key, on_delivery=acknowledged)


def with_headers(producer: Producer, topic: str, keys: Sequence[bytes], wave: Wave) -> None:
    for key in keys:
        producer.produce(topic, value=VALUE, key=key, headers=HEADERS, on_delivery=wave.acknowledged)


def one_call(producer: Producer, topic: str, keys: Sequence[bytes], wave: Wave) -> None:
    producer.produce_batch(topic, [{"value": VALUE, "key": key} for key in keys], on_delivery=wave.acknowledged)


WAYS: dict[str, tuple[Send, dict[str, Any]]] = {
    "a call each": (each, {}),
    "a closure each": (closures, {}),
    "eight headers": (with_headers, {}),
    "one call": (one_call, {}),
    "a call each, linger 1 ms": (each, {"linger.ms": 1}),
    "a call each, linger 5 ms": (each, {"linger.ms": 5}),
    "a call each, sticky 0": (each, {"sticky.partitioning.linger.ms": 0}),
    "a call each, lz4": (each, {"compression.type": "lz4"}),
}


def broker_of(bootstrap: str) -> psutil.Process:
    """The process that listens there."""
    port = int(bootstrap.rpartition(":")[2])
    found = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    return psutil.Process(found[0].pid)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def once(send: Send, producer: Producer, topic: str, process: psutil.Process) -> tuple[float, float, float]:
    """Our CPU and the broker's, us a message, and the wall time of a wave in ms."""
    keys = [b"%036d" % n for n in range(BATCH)]
    broker, cpu, wall = cpu_s(process), time.process_time(), time.perf_counter()
    for _ in range(BATCHES):
        wave = Wave(BATCH)
        send(producer, topic, keys, wave)
        wave.done.wait()
    n = BATCH * BATCHES
    return (
        (time.process_time() - cpu) / n * 1e6,
        (cpu_s(process) - broker) / n * 1e6,
        (time.perf_counter() - wall) / BATCHES * 1e3,
    )


def compare(bootstrap: str) -> None:
    topic = "pairs.publish"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, 4, 1)])[topic].result()
    process = broker_of(bootstrap)
    producers = {}
    stop = threading.Event()
    for name, (_, extra) in WAYS.items():
        config = {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": "murmur2_random",
            "linger.ms": 0,
        }
        producer = producers[name] = Producer({**config, **extra})

        def poll(producer: Producer = producer) -> None:
            while not stop.is_set():
                producer.poll(0.1)

        threading.Thread(target=poll, daemon=True).start()
        once(WAYS[name][0], producer, topic, process)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, (send, _) in WAYS.items():
            found[name].append(once(send, producers[name], topic, process))
    stop.set()
    print(f"{'':28} {'ours us':>8} {'(min-max)':>13} {'broker us':>10} {'wave ms':>8}")
    for name, runs in found.items():
        ours, broker, wall = (statistics.median(column) for column in zip(*runs, strict=True))
        low, high = min(r[0] for r in runs), max(r[0] for r in runs)
        print(f"{name:28} {ours:8.2f} {f'({low:.2f}-{high:.2f})':>13} {broker:10.2f} {wall:8.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compare(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory(prefix="fm-") as folder, open_stack(Path(folder)) as stack:
            compare(stack.bootstrap)
