"""One contract for every registry: directories with an id lock, and a real Confluent-compatible server over HTTP."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from factmesh import avro
from factmesh.avro import Schema
from factmesh.errors import SchemaError
from factmesh.ids import entrance_id
from factmesh.message import Delivery
from factmesh.records import Records
from factmesh.registry import DirectoryRegistry, HttpRegistry, Registry
from factmesh.schema_files import platform_dir, read_dir, write_lock

_ids = itertools.count(20_000)


def thing(subject: str, version: int = 1, id: int = 0, extra: bool = False) -> Schema:
    """A small schema; with `extra`, one compatible field more."""
    fields: list[dict[str, Any]] = [
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "note", "type": "string", "doc": "kept"},
    ]
    if extra:
        fields.append({"name": "tags", "type": {"type": "array", "items": "string"}, "default": []})
    name = subject.rpartition(".")[2]
    source = {"type": "record", "name": name, "namespace": "contract", "fields": fields}
    return avro.parse(source, subject=subject, version=version, id=id)


@dataclass
class Bench:
    registry: Registry
    subject: str
    reopen: Any

    def id(self) -> int:
        return next(_ids)


@pytest.fixture(params=["directory", "http"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    subject = f"contract.thing_{uuid.uuid4().hex[:10]}"
    if request.param == "directory":
        write_lock(tmp_path, {})
        yield Bench(DirectoryRegistry([tmp_path]), subject, lambda: DirectoryRegistry([tmp_path]))
        return
    url = request.getfixturevalue("registry_url")
    opened: list[HttpRegistry] = []

    def reopen() -> HttpRegistry:
        opened.append(HttpRegistry(url))
        return opened[-1]

    yield Bench(reopen(), subject, reopen)
    for registry in opened:
        await registry.close()


async def test_a_schema_is_found_under_the_id_it_was_registered_with(bench: Bench) -> None:
    """Ids in the lock are the ids: bytes written with either registry are read with the other (DESIGN 7)."""
    wanted = bench.id()
    registered = await bench.registry.register(thing(bench.subject, id=wanted))
    assert (registered.id, registered.version, registered.subject) == (wanted, 1, bench.subject)
    again: Registry = bench.reopen()
    found = await again.by_id(wanted)
    assert (found.id, found.subject, found.version) == (wanted, bench.subject, 1)
    assert found.field_names == ("at", "note")
    assert found.source["fields"][0]["type"]["logicalType"] == "timestamp-millis"
    assert again.cached(wanted) is found
    assert await again.by_id(wanted) is found


async def test_versions_latest_and_their_ids(bench: Bench) -> None:
    """A subject's versions rise, and each tells its id (A5)."""
    one, two = bench.id(), bench.id()
    await bench.registry.register(thing(bench.subject, 1, one))
    await bench.registry.register(thing(bench.subject, 2, two, extra=True))
    again: Registry = bench.reopen()
    assert await again.versions(bench.subject) == (1, 2)
    assert [await again.id_of(bench.subject, v) for v in (1, 2)] == [one, two]
    assert (await again.latest(bench.subject)).id == two
    assert (await again.by_version(bench.subject, 1)).field_names == ("at", "note")
    assert bench.subject in await again.subjects()


async def test_registering_twice_changes_nothing(bench: Bench) -> None:
    """A second deploy registers the same schemas again and finds them there."""
    id = bench.id()
    first = await bench.registry.register(thing(bench.subject, 1, id))
    second = await bench.registry.register(thing(bench.subject, 1, id))
    third = await bench.reopen().register(thing(bench.subject, 1, id))
    assert {first.id, second.id, third.id} == {id}
    assert await bench.reopen().versions(bench.subject) == (1,)


async def test_a_taken_id_or_version_is_refused(bench: Bench) -> None:
    """An id means one schema for ever; neither it nor a version is overwritten."""
    id = bench.id()
    await bench.registry.register(thing(bench.subject, 1, id))
    other = bench.subject + "_other"
    with pytest.raises(SchemaError, match=str(id)):
        await bench.registry.register(thing(other, 1, id))
    assert await bench.reopen().versions(other) == ()
    with pytest.raises(SchemaError):
        await bench.registry.register(thing(bench.subject, 1, bench.id(), extra=True))
    assert (await bench.reopen().by_id(id)).field_names == ("at", "note")


async def test_what_is_not_there_is_an_answer(bench: Bench) -> None:
    """No such id, subject or version is a SchemaError that says what to do: poison, never waiting."""
    registry = bench.registry
    with pytest.raises(SchemaError, match=r"schema id 999999 is not registered.*register the writer's schema"):
        await registry.by_id(999_999)
    assert registry.cached(999_999) is None
    assert await registry.versions(bench.subject) == ()
    with pytest.raises(SchemaError, match="no version latest"):
        await registry.latest(bench.subject)
    with pytest.raises(SchemaError, match="no version 3"):
        await registry.id_of(bench.subject, 3)
    with pytest.raises(SchemaError, match="no version"):
        await registry.find(thing(bench.subject))


async def test_find_tells_the_id_of_the_same_schema(bench: Bench) -> None:
    """A producer asks for the id of the schema that it carries; another text is not found."""
    id = bench.id()
    await bench.registry.register(thing(bench.subject, 1, id))
    assert (await bench.reopen().find(thing(bench.subject))).id == id
    with pytest.raises(SchemaError):
        await bench.reopen().find(thing(bench.subject, extra=True))


async def test_the_platform_runs_on_either(bench: Bench) -> None:
    """The same bytes work with both: our records keep the ids of the lock in a registry over HTTP (DESIGN 7)."""
    files = read_dir(platform_dir())
    registry = bench.registry if isinstance(bench.registry, HttpRegistry) else DirectoryRegistry([platform_dir()])
    for file in files:
        await registry.register(file.schema)
    records = await Records.open(registry)
    newest = {f.schema.name: f.lock.id for f in files}
    assert {kind: records.schema(kind).id for kind in records.kinds} == newest
    body = {f["name"]: _VALUES[f["name"]] for f in records.schema("signal").source["fields"] if "default" not in f}
    value = records.encode("signal", body)
    by_lock = await Records.open(DirectoryRegistry([platform_dir()]))
    assert value == by_lock.encode("signal", body)
    # A consumer that starts cold asks for the id that the bytes name, and reads the same message.
    delivery = Delivery("factmesh.signal.v1", 0, 1, b"k", value)
    cold: Registry = bench.reopen() if isinstance(bench.registry, HttpRegistry) else registry
    other = Records(cold, {"signal": by_lock.schema("signal")})
    missing = other.needs_schema(delivery)
    if missing is not None:
        await cold.by_id(missing)
    assert other.decode(delivery) == by_lock.decode(delivery)


_ID = str(entrance_id("signal", "x", 1_700_000_000_000))
_VALUES: dict[str, Any] = {
    "ce_id": _ID, "ce_source": "/factmesh/tool", "ce_type": "signal", "ce_time": 1_700_000_000_000, "cause_id": _ID,
    "correlation_id": _ID, "actor": "a", "business_object_type": "parcel", "business_object_id": "1",
    "instance_id": _ID, "instance_seq": 1, "signal": "retry_step", "body": b"{}",
}  # fmt: skip
