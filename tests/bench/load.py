"""Sends W3's facts on a plan and watches, as a client of its own, when each workflow is told to be completed.
An open loop never waits for the system: a latency counts from the instant at which the fact was due to be sent.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastavro
from confluent_kafka import Consumer, Producer, TopicPartition

PROJECT = Path(__file__).parent / "project"
SCHEMAS = Path(__file__).parents[2] / "schemas"
SOURCE = "//bench.example/generator"
TYPE = "bench.asked"
DATA_BYTES = 300
TICK_S = 0.002
STALL_S_MAX = 60.0
RAMP_S_MAX = 60.0
STRETCH_MAX = 6
"""A phase that must see whole waves takes this many times as long at most."""


class StallError(Exception):
    """Nothing was completed for a minute: the run is void, and goes no further."""


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed; NaN for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass
class Sample:
    """One phase: what was asked of it, how long it ran, and what came of the workflows that it began."""

    seconds: float
    completed: int
    latencies_ms: list[float] = field(default_factory=list)
    unfinished: int = 0

    @property
    def rate(self) -> float:
        return self.completed / self.seconds

    def summary(self) -> dict[str, float]:
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        values = {name: round(percentile(self.latencies_ms, share), 2) for name, share in shares.items()}
        return {"per_s": round(self.rate, 1), "n": len(self.latencies_ms), "unfinished": self.unfinished, **values}


class Facts:
    """Facts of one size, each with a number; as Avro in the Confluent wire format or as JSON."""

    def __init__(self, run: str, data_bytes: int = DATA_BYTES) -> None:
        self.run, self.next = run, 0
        self._schema = fastavro.parse_schema(json.loads((PROJECT / "schemas/bench.asked/v1.avsc").read_text()))
        number: int = json.loads((PROJECT / "schemas/ids.lock").read_text())["bench.asked/v1"]
        self._prefix = b"\0" + number.to_bytes(4, "big")
        self._note = ""
        self._note = "x" * max(0, data_bytes - len(self.json("R-00000000-0000000")))

    def reference(self) -> str:
        self.next += 1
        return f"R-{self.run}-{self.next:07d}"

    def data(self, reference: str) -> dict[str, Any]:
        return {
            "reference": reference,
            "asked_at": int(time.time() * 1000),
            "name": "Ada Lovelace",
            "street": "12 St James's Square",
            "city": "London",
            "country": "GB",
            "amount": 7,
            "note": self._note,
        }

    def json(self, reference: str) -> bytes:
        return json.dumps(self.data(reference)).encode()

    def avro(self, reference: str) -> bytes:
        out = io.BytesIO(self._prefix)
        out.seek(5)
        fastavro.schemaless_writer(out, self._schema, self.data(reference))
        return out.getvalue()


class Watcher:
    """Reads the status topic without a group, and notes when each reference was first said to be completed."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        schema = json.loads((SCHEMAS / "factmesh.status/v1.avsc").read_text(encoding="utf-8"))
        self._schema = fastavro.parse_schema(schema)
        self.done: dict[str, float] = {}
        self.other: dict[str, int] = {}
        config = {"bootstrap.servers": bootstrap, "group.id": "bench-watcher", "enable.auto.commit": False}
        self._consumer = Consumer({**config, "fetch.wait.max.ms": 100})
        partitions = self._consumer.list_topics(topic, timeout=10).topics[topic].partitions
        ends = [self._consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[1] for p in partitions]
        self._consumer.assign([TopicPartition(topic, p, o) for p, o in zip(partitions, ends, strict=True)])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            messages = self._consumer.consume(1, 0.1)
            if messages:
                messages += self._consumer.consume(500, 0)
            now = time.monotonic()
            for message in messages:
                value = message.value()
                if message.error() is None and value is not None:
                    record: Any = fastavro.schemaless_reader(io.BytesIO(value[5:]), self._schema, None)
                    if record["status"] == "completed":
                        self.done.setdefault(record["business_object_id"], now)
                    elif record["status"] != "running":
                        self.other[record["status"]] = self.other.get(record["status"], 0) + 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._consumer.close()


class Load:
    """The generator over one system's topics; every method ends by itself."""

    def __init__(self, bootstrap: str, topic_in: str, topic_status: str, run: str, data_bytes: int) -> None:
        self.facts = Facts(run, data_bytes)
        self.watcher = Watcher(bootstrap, topic_status)
        self._topic = topic_in
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 0,
                "partitioner": "murmur2_random",
                "queue.buffering.max.messages": 1_000_000,
                "log_level": 2,
            }
        )
        self.sent: dict[str, float] = {}

    def send(self, due: float) -> str:
        """One fact; `due` is when it should have gone out."""
        reference = self.facts.reference()
        headers = {"ce_specversion": "1.0", "ce_id": reference, "ce_source": SOURCE, "ce_type": TYPE}
        self.sent[reference] = due
        self._producer.produce(
            self._topic,
            key=reference,
            value=self.facts.avro(reference),
            headers=[(k, v.encode()) for k, v in (headers | {"content-type": "application/avro"}).items()],
        )
        self._producer.poll(0)
        return reference

    @property
    def in_flight(self) -> int:
        return len(self.sent) - len(self.watcher.done)

    async def alone(self, n: int) -> Sample:
        """One workflow at a time."""
        began, mine = time.monotonic(), []
        for _ in range(n):
            mine.append(self.send(time.monotonic()))
            await self._until(lambda: mine[-1] in self.watcher.done, 0.0005)
        return self._sample(mine, time.monotonic() - began)

    async def open(self, rate: float, seconds: float, settle_s: float = 3.0) -> Sample:
        """Facts at a rate, by the clock, whatever becomes of them; the first `settle_s` seconds do not count."""
        began = time.monotonic()
        n = int(rate * (seconds + settle_s))
        mine: list[str] = []
        while len(mine) < n:
            due = began + len(mine) / rate
            now = time.monotonic()
            if due > now:
                await asyncio.sleep(min(due - now, TICK_S))
            else:
                mine.append(self.send(due))
                if len(mine) % 50 == 0:
                    await asyncio.sleep(0)
        measured = [r for r in mine if self.sent[r] >= began + settle_s]
        await self._until(lambda: self.in_flight <= 0)
        return self._sample(measured, seconds)

    async def ramp(self, window: int) -> None:
        """Until `window` workflows at once are a steady flow: as many have been completed."""
        await self.closed(window, RAMP_S_MAX, enough=window)

    async def closed(self, window: int, seconds: float, enough: int | None = None, waves: int = 0) -> Sample:
        """Saturation: `window` workflows at once; throughput is what was completed in the given time.

        Workflows that began together end together: a slow system is measured over so many whole `waves` at least.
        """
        first, began = len(self.watcher.done), time.monotonic()
        mine: list[str] = []
        last, moved = first, began
        while (now := time.monotonic()) < began + seconds or (
            last - first < waves * window and now < began + seconds * STRETCH_MAX
        ):
            for _ in range(max(0, min(window - self.in_flight, 200))):
                mine.append(self.send(now))
            done = len(self.watcher.done)
            if enough is not None and done - first >= enough:
                break
            if done != last:
                last, moved = done, now
            elif now - moved > STALL_S_MAX:
                raise StallError(f"nothing was completed for {STALL_S_MAX:g} s, {self.in_flight} are under way")
            await asyncio.sleep(TICK_S)
        took = time.monotonic() - began
        completed = len(self.watcher.done) - first
        sample = self._sample([r for r in mine if r in self.watcher.done], took)
        sample.completed = completed
        return sample

    async def drain(self, n: int) -> Sample:
        """A backlog of `n` facts, produced as fast as the broker takes them; the time until the last is completed."""
        began = time.monotonic()
        mine = []
        for i in range(n):
            mine.append(self.send(time.monotonic()))
            if i % 500 == 0:
                await asyncio.sleep(0)
        await self._until(lambda: self.in_flight <= 0)
        return self._sample(mine, max(self.watcher.done[r] for r in mine) - began)

    async def idle(self) -> None:
        """Until everything that was sent is completed."""
        await self._until(lambda: self.in_flight <= 0)

    async def _until(self, true: Any, every_s: float = 0.005) -> None:
        last, moved = len(self.watcher.done), time.monotonic()
        while not true():
            await asyncio.sleep(every_s)
            if len(self.watcher.done) != last:
                last, moved = len(self.watcher.done), time.monotonic()
            elif time.monotonic() - moved > STALL_S_MAX:
                raise StallError(f"nothing was completed for {STALL_S_MAX:g} s, {self.in_flight} are under way")

    def _sample(self, mine: Sequence[str], seconds: float) -> Sample:
        done = self.watcher.done
        latencies = [(done[r] - self.sent[r]) * 1000 for r in mine if r in done]
        return Sample(seconds, len(latencies), latencies, len(mine) - len(latencies))

    def close(self) -> None:
        self._producer.flush(5)
        self.watcher.close()
