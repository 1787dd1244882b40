"""Our own records: kinds, identity, body hashes, and what the envelope refuses (DESIGN 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import avro, ids
from factmesh.errors import DecodeError, FactmeshError, Reason, SchemaError, TransientError, ValidationError
from factmesh.ids import Root
from factmesh.message import Delivery
from factmesh.records import Records, decode_fact, fact_needs_schema, read_json
from factmesh.registry import DirectoryRegistry
from factmesh.schema_files import LockEntry, digest_of, platform_dir, read_lock, write_lock, write_schema

INSTANT_MS = 1_700_000_000_000
ID = ids.entrance_id("fact", "one", INSTANT_MS)
INSTANCE = ids.instance_id("w", ID)
SIGNAL: dict[str, Any] = {
    "ce_id": str(ID), "ce_source": "/factmesh/connector", "ce_type": "signal.message_parked", "ce_time": INSTANT_MS,
    "cause_id": "c", "correlation_id": "corr", "actor": "service:connector", "business_object_type": "parcel",
    "business_object_id": "p-1", "instance_id": str(INSTANCE), "instance_seq": 4, "signal": "message_parked",
    "body": b'{"a":1}',
}  # fmt: skip


@pytest.fixture(scope="module")
async def records() -> Records:
    return await Records.open(DirectoryRegistry([platform_dir()]))


def delivery(value: bytes | None, headers: tuple[tuple[str, bytes | None], ...] = ()) -> Delivery:
    return Delivery("factmesh.signal.v1", 2, 41, b"k", value, headers)


async def test_a_record_becomes_a_message(records: Records) -> None:
    """Kind, id, root and instant come from the bytes alone; defaults may be left out."""
    value = records.encode("signal", SIGNAL)
    assert records.needs_schema(delivery(value)) is None
    message = records.decode(delivery(value))
    assert (message.kind, message.id, message.root, message.opening) == ("signal", ID, Root.own(ID), 0)
    assert message.instant_ms == INSTANT_MS
    assert message.instance_id == INSTANCE
    assert message.record == {**SIGNAL, "traceparent": None}
    assert message.writer_schema_id == avro.peek_schema_id(value) == 5


async def test_a_replay_keeps_its_root(records: Records) -> None:
    """An opening names the root that it reopens; its own id is still the record's (DESIGN 9)."""
    root = Root.coordinates("factmesh.signal.v1", 2, 7)
    headers = (("factmesh-root-id", root.text.encode()), ("factmesh-opening", b"3"))
    message = records.decode(delivery(records.encode("signal", SIGNAL), headers))
    assert (message.root, message.opening, message.id) == (root, 3, ID)


@pytest.mark.parametrize("opening", ["0", "-1", "²", "9" * 5000, "x", ""])
async def test_a_header_that_is_no_opening_is_none(records: Records, opening: str) -> None:
    """A foreign or broken header neither reopens anything nor stops the loop."""
    headers = (("factmesh-root-id", b"at:t:0:1"), ("factmesh-opening", opening.encode()))
    message = records.decode(delivery(records.encode("signal", SIGNAL), headers))
    assert (message.root, message.opening) == (Root.own(ID), 0)


@pytest.mark.parametrize(
    "root",
    [
        "",
        "anything",
        "at:t:0",
        "at:a\0b:0:1",
        "ce:1:a\0:b",
        "ce:1:a:" + "b" * 2000,
        "id:not-an-id-but-36-characters-long----",
        f"id:{ID}".replace("-8", "-4"),
        "id:ffffffff-ffff-8fff-bfff-ffffffffffff",
    ],
)
async def test_a_root_that_no_mesh_wrote_is_none(records: Records, root: str) -> None:
    """Bad input: a stranger may write any header; one that PostgreSQL or the calendar cannot hold stopped a partition
    for ever. It reopens nothing, and the message is what it would be without it."""
    headers = (("factmesh-root-id", root.encode()), ("factmesh-opening", b"1"))
    given = delivery(records.encode("signal", SIGNAL), headers)
    assert (given.opening, given.root_override) == (0, None)
    message = records.decode(given)
    assert (message.root, message.opening) == (Root.own(ID), 0)


@pytest.mark.parametrize(
    "root", [Root.own(ID), Root.stranger("//ü b/c", "😀 a:b"), Root.coordinates("a.b-c_d", 0, 2**62)]
)
def test_every_root_that_a_mesh_writes_is_read(root: Root) -> None:
    """DESIGN 9: what `dlq` puts into the header comes back the same."""
    assert Root.parse(root.text) == root


# ── the body hash ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_repeat_has_the_same_hash(records: Records) -> None:
    """What senders restamp is left out: a repeat is a repeat whenever, and in whichever span, it was sent."""
    one = records.decode(delivery(records.encode("signal", SIGNAL)))
    again = {**SIGNAL, "ce_time": INSTANT_MS + 9, "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    two = records.decode(delivery(records.encode("signal", again | {"instance_seq": 5})))
    assert one.hash == two.hash
    assert len(one.hash) == 16


@pytest.mark.parametrize("name", [n for n in SIGNAL if n not in ("ce_time", "instance_seq")])
async def test_another_body_has_another_hash(records: Records, name: str) -> None:
    """Every other field counts: the same id with another body is a conflict, never a repeat (A4)."""
    other: Any = {"body": b'{"a":2}', "ce_id": str(ids.entrance_id("x", "y", 1)), "instance_id": str(uuid4())}
    changed = {**SIGNAL, name: other.get(name, "changed")}
    one = records.decode(delivery(records.encode("signal", SIGNAL)))
    two = records.decode(delivery(records.encode("signal", changed)))
    assert one.hash != two.hash


@given(st.text("ab=:0", max_size=8), st.text("ab=:0", max_size=8))
async def test_fields_do_not_run_into_each_other(records: Records, a: str, b: str) -> None:
    """No two different bodies read the same to the hash, whatever is in their texts."""
    one = records.decode(delivery(records.encode("signal", {**SIGNAL, "actor": a, "business_object_id": b})))
    two = records.decode(delivery(records.encode("signal", {**SIGNAL, "actor": a + b, "business_object_id": ""})))
    assert (one.hash == two.hash) == (b == "")


def _next_version(tmp_path: Path) -> DirectoryRegistry:
    """The platform one version on: signal v2 has one field more."""
    folder = tmp_path / "schemas"
    entries = read_lock(platform_dir())
    for path in platform_dir().glob("*/v*.avsc"):
        write_schema(folder, path.parent.name, int(path.stem[1:]), json.loads(path.read_bytes()))
    source = json.loads((platform_dir() / "factmesh.signal" / "v1.avsc").read_bytes())
    extra = [
        {"name": "priority", "type": ["null", "int"], "default": None},
        {"name": "labels", "type": {"type": "array", "items": "string"}, "default": []},
    ]
    source = {**source, "fields": [*source["fields"], *extra]}
    write_schema(folder, "factmesh.signal", 2, source)
    write_lock(folder, {**entries, "factmesh.signal/v2": LockEntry(900, digest_of(source))})
    return DirectoryRegistry([folder])


async def test_an_upgrade_makes_no_conflicts(records: Records, tmp_path: Path) -> None:
    """A message that was handled before an upgrade is still a repeat after it, either way (FULL_TRANSITIVE)."""
    newer = await Records.open(_next_version(tmp_path), tmp_path / "schemas")
    old_bytes = records.encode("signal", SIGNAL)
    before, after = records.decode(delivery(old_bytes)), newer.decode(delivery(old_bytes))
    assert before.hash == after.hash
    assert after.record == {**SIGNAL, "traceparent": None, "priority": None, "labels": []}
    assert avro.peek_schema_id(newer.encode("signal", SIGNAL)) == 900
    # The same cause, written again by the newer code, is the same body.
    assert newer.decode(delivery(newer.encode("signal", SIGNAL))).hash == before.hash
    assert newer.decode(delivery(newer.encode("signal", {**SIGNAL, "priority": 1}))).hash != before.hash


async def test_after_a_rollback_old_code_reads_newer_bytes(tmp_path: Path) -> None:
    """The reader is what this code carries, not the registry's newest (B2)."""
    registry = _next_version(tmp_path)
    newer = await Records.open(registry, tmp_path / "schemas")
    value = newer.encode("signal", {**SIGNAL, "priority": 3})
    older = await Records.open(registry, platform_dir())
    message = older.decode(delivery(value))
    assert message.record == {**SIGNAL, "traceparent": None}
    assert message.hash == newer.decode(delivery(value)).hash


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ce_id": "x"}, "field ce_id is not a UUID in lower case"),
        ({"ce_id": str(ID).upper()}, "field ce_id is not a UUID in lower case"),
        ({"ce_id": ""}, "field ce_id is not a UUID"),
        ({"instance_id": "not-one"}, "field instance_id is not a UUID"),
        ({"ce_time": 2**62}, "field ce_time is not an instant of the years 1 to 9999"),
        ({"ce_time": -(2**62)}, "field ce_time is not an instant"),
        ({"business_object_id": "a\0b"}, "field business_object_id holds a NUL character"),
    ],
)
async def test_what_the_envelope_refuses(records: Records, change: dict[str, Any], text: str) -> None:
    """Malformed ids, instants outside the calendar and NUL are refused on the way out and on the way in, by name."""
    with pytest.raises(ValidationError) as caught:
        records.encode("signal", SIGNAL | change)
    assert text in str(caught.value)
    value = avro.encode(records.schema("signal"), {**SIGNAL, "traceparent": None, **change})
    with pytest.raises(ValidationError) as caught:
        records.decode(delivery(value))
    assert text in str(caught.value)
    assert str(caught.value).startswith("factmesh.signal.v1[2]@41: ")
    assert caught.value.reason is Reason.VALIDATION


@pytest.mark.parametrize("id", [uuid4(), UUID(int=((1 << 48) - 1) << 80 | 0x8 << 76 | 0b10 << 62)])
async def test_an_id_that_is_not_ours_is_refused(records: Records, id: UUID) -> None:
    """Only ids that tell their day enter the ledger; a random one, or one of the year 10889, does not (DESIGN 8)."""
    with pytest.raises(ValidationError, match="field ce_id is not an id of ours"):
        records.decode(delivery(records.encode("signal", SIGNAL | {"ce_id": str(id)})))


async def test_a_signal_without_an_instance(records: Records) -> None:
    """A fact that started nothing has no instance to name; its signals carry an empty one."""
    assert records.decode(delivery(records.encode("signal", SIGNAL | {"instance_id": ""}))).instance_id is None


async def test_encoding_names_what_is_wrong(records: Records) -> None:
    """A decision that asks for a record that does not fit gets the record's kind and the field."""
    with pytest.raises(ValidationError, match="signal: field instance_seq: expected a 64-bit integer, found str"):
        records.encode("signal", SIGNAL | {"instance_seq": "4"})
    with pytest.raises(ValidationError, match="signal: field body: missing"):
        records.encode("signal", {k: v for k, v in SIGNAL.items() if k != "body"})
    with pytest.raises(ValidationError, match="unknown fields: colour"):
        records.encode("signal", SIGNAL | {"colour": "red"})
    with pytest.raises(SchemaError, match="no record is called 'signals'"):
        records.encode("signals", SIGNAL)


async def test_a_kind_that_the_topic_does_not_carry(records: Records) -> None:
    """A good record on the wrong topic is a decode error there, not a handler's surprise."""
    decode = records.expect(("command", "resolution"))
    with pytest.raises(DecodeError, match=r"a signal record on a topic for command, resolution"):
        decode(delivery(records.encode("signal", SIGNAL)))
    assert records.expect(["signal"])(delivery(records.encode("signal", SIGNAL))).kind == "signal"
    with pytest.raises(SchemaError, match="no record is called"):
        records.expect(["signals"])


@given(st.binary(max_size=200), st.sampled_from([1, 2, 3, 4, 5, 6]))
async def test_any_bytes_are_a_message_or_poison(records: Records, payload: bytes, id: int) -> None:
    """Whatever arrives is a message or one of our errors: the loop never meets a bug in decoding (E1)."""
    for value in (payload, b"\0" + id.to_bytes(4, "big") + payload):
        try:
            records.decode(delivery(value))
        except TransientError:
            assert records.needs_schema(delivery(value)) is not None
        except FactmeshError as error:
            assert error.reason in (Reason.DECODE, Reason.VALIDATION, Reason.SCHEMA)  # noqa: PT017 - one of several ends


async def test_an_unknown_schema_id_is_asked_for_first(records: Records) -> None:
    """Decoding never waits: the loop fetches the schema that `needs_schema` names, or hears that there is none."""
    value = b"\0" + (4242).to_bytes(4, "big") + b"x"
    assert records.needs_schema(delivery(value)) == 4242
    with pytest.raises(TransientError, match="schema id 4242 has not been fetched yet"):
        records.decode(delivery(value))
    assert records.needs_schema(delivery(None)) is None
    with pytest.raises(DecodeError, match="tombstone"):
        records.decode(delivery(None))


async def test_json_in_a_record(records: Records) -> None:
    """A bytes field that should be a JSON object and is not is named, with its message."""
    message = records.decode(delivery(records.encode("signal", SIGNAL)))
    assert read_json(message, "body") == {"a": 1}
    for body, text in ((b"{", "field body is not JSON"), (b"[1]", "field body is not a JSON object but list")):
        bad = records.decode(delivery(records.encode("signal", SIGNAL | {"body": body})))
        with pytest.raises(ValidationError, match=text):
            read_json(bad, "body")


# ── facts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _project(tmp_path: Path) -> DirectoryRegistry:
    base = {"type": "record", "name": "moved", "namespace": "parcel"}
    id = {"name": "id", "type": "string"}
    write_schema(tmp_path, "parcel.moved", 1, {**base, "fields": [id, {"name": "to", "type": "string", "default": ""}]})
    city = {"name": "city", "type": "string", "default": "unknown"}
    write_schema(tmp_path, "parcel.moved", 2, {**base, "fields": [id, city]})
    write_lock(tmp_path, {"parcel.moved/v1": LockEntry(10_000), "parcel.moved/v2": LockEntry(10_001)})
    return DirectoryRegistry([platform_dir(), tmp_path])


async def test_facts_are_read_with_their_writers_schema(tmp_path: Path) -> None:
    """Versions side by side: each is read as it was written, and resolved to the newest (A5)."""
    registry = _project(tmp_path)
    one, two = await registry.by_version("parcel.moved", 1), await registry.latest("parcel.moved")
    schema, record = decode_fact(registry, avro.encode(one, {"id": "p", "to": "Graz"}), "facts.raw[0]@1")
    assert (schema.subject, schema.version, record) == ("parcel.moved", 1, {"id": "p", "to": "Graz"})
    assert avro.resolve(record, one, two) == {"id": "p", "city": "unknown"}
    schema, record = decode_fact(registry, avro.encode(two, {"id": "p", "city": "Linz"}))
    assert (schema.version, record["city"]) == (2, "Linz")


async def test_a_fact_that_is_none(tmp_path: Path) -> None:
    """Records between our services are no facts, and an unknown id is fetched first."""
    registry = _project(tmp_path)
    records = await Records.open(registry)
    with pytest.raises(DecodeError, match=r"factmesh\.signal/v1 .* and no fact"):
        decode_fact(registry, records.encode("signal", SIGNAL))
    value = b"\0" + (777).to_bytes(4, "big") + b"x"
    assert fact_needs_schema(registry, value) == 777
    with pytest.raises(TransientError, match="777"):
        decode_fact(registry, value)
    assert fact_needs_schema(registry, b"{}") is None
    with pytest.raises(DecodeError, match="wire format"):
        decode_fact(registry, b"{}")
    with pytest.raises(DecodeError, match=r"written with parcel\.moved/v1 .* no record of the platform"):
        records.decode(delivery(avro.encode(await registry.by_id(10_000), {"id": "p", "to": ""})))
