"""CPU time a message of the codec alone: what one command, result or status costs to write and to read.
No broker and no database; `python -m tests.bench.pairs.codec`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

from factmesh import ids
from factmesh.message import Delivery
from factmesh.records import Records
from factmesh.registry import DirectoryRegistry
from factmesh.schema_files import platform_dir

CALLS = 5_000
ROUNDS = 9
NOW_MS = 1_795_000_000_000


def cpu_us(work: Callable[[], Any], calls: int = CALLS, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median and lowest CPU time of one call, in microseconds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            work()
        found.append((time.process_time() - began) / calls * 1e6)
    return statistics.median(found), min(found)


def bodies() -> dict[str, dict[str, Any]]:
    """One of each record as a workflow of W3 emits it."""
    fact = ids.entrance_id("fact", "1", NOW_MS)
    instance = ids.instance_id("w3", fact)

    def envelope(kind: str, ordinal: int) -> dict[str, Any]:
        return {
            "ce_id": str(ids.message_id("orchestrator", f"id:{fact}", 0, ordinal, NOW_MS)),
            "ce_source": "/factmesh/orchestrator",
            "ce_type": f"factmesh.{kind}",
            "ce_time": NOW_MS,
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
            "cause_id": str(fact),
            "correlation_id": str(ids.correlation_id("bench", "1")),
            "actor": "bench",
            "business_object_type": "thing",
            "business_object_id": "thing-000000001",
        }

    of_instance = {"instance_id": str(instance), "instance_seq": 3}
    of_step = {"workflow": "w3", "workflow_version": "1.0.0", "step": "second"}
    command = {
        **of_instance,
        **of_step,
        "iteration": 0,
        "run": 0,
        "connector": "noop",
        "operation": "work",
        "idempotency_key": str(ids.idempotency_key(instance, "second", 0, 0)),
        "deadline": NOW_MS + 60_000,
        "body": b'{"id":"thing-000000001","note":"' + b"x" * 60 + b'"}',
    }
    return {"command": {**envelope("command", 1), **command}}


async def main() -> None:
    records = await Records.open(DirectoryRegistry([platform_dir()]))
    for kind, body in bodies().items():
        value = records.encode(kind, body)
        delivery = Delivery("factmesh.command.noop.v1", 0, 1, b"k", value)
        records.decode(delivery)
        for name, work in (
            ("encode", lambda kind=kind, body=body: records.encode(kind, body)),
            ("decode", lambda delivery=delivery: records.decode(delivery)),
        ):
            median, lowest = cpu_us(work)
            print(f"{kind:10} {name:8} {median:6.2f} us (lowest {lowest:.2f})  {len(value)} bytes")


if __name__ == "__main__":
    asyncio.run(main())
