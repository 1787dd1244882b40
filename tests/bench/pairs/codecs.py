"""Avro codecs on one command: fastavro, cavro where it is installed, our generated code, and that with all its checks.
No broker and no database; `python -m tests.bench.pairs.codecs`. Rounds alternate; medians and spread.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import fastavro
from tests.bench.pairs.codec import bodies

from factmesh import avro
from factmesh.avro_strict import strip_logical
from factmesh.message import Delivery
from factmesh.records import Records
from factmesh.registry import DirectoryRegistry
from factmesh.schema_files import platform_dir

CALLS, ROUNDS = 3_000, 7


async def main() -> None:
    records = await Records.open(DirectoryRegistry([platform_dir()]))
    body = {"retry": None, **bodies()["command"]}
    schema = records.schema("command")
    plain = fastavro.parse_schema(strip_logical(schema.source))
    value = records.encode("command", body)
    delivery = Delivery("t", 0, 1, b"k", value)
    records.decode(delivery)

    def write() -> bytes:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, plain, body, strict=True)
        return out.getvalue()

    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "fastavro": (write, lambda: fastavro.schemaless_reader(io.BytesIO(value[5:]), plain, None)),
        "generated": (lambda: avro.encode(schema, body), lambda: avro.decode(value, schema)),
        "generated, checked": (lambda: records.encode("command", body), lambda: records.decode(delivery)),
    }
    try:
        theirs: Any = importlib.import_module("cavro").Schema(json.dumps(strip_logical(schema.source)))
        ways["cavro"] = (lambda: theirs.binary_encode(body), lambda: theirs.binary_decode(value[5:]))
    except ModuleNotFoundError:
        print("cavro is not installed")
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, pair in ways.items():
            for what, work in zip(("encode", "decode"), pair, strict=True):
                began = time.process_time()
                for _ in range(CALLS):
                    work()
                found.setdefault((name, what), []).append((time.process_time() - began) / CALLS * 1e6)
    for (name, what), runs in found.items():
        print(f"{name:20} {what}  {statistics.median(runs):6.2f} us  ({min(runs):.2f}-{max(runs):.2f})")


if __name__ == "__main__":
    asyncio.run(main())
