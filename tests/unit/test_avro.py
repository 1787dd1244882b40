"""The codec: strict both ways, framed, and never fooled by torn, hostile or foreign bytes (DESIGN 7 and 11)."""

from __future__ import annotations

import io
import json
import struct
import time
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import avro.io
import avro.schema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh import avro as codec
from factmesh.errors import DecodeError, SchemaError, ValidationError

EVERY = codec.parse(
    {
        "type": "record",
        "name": "every",
        "namespace": "test.v1",
        "doc": "Every type once.",
        "fields": [
            {"name": "b", "type": "boolean"},
            {"name": "i", "type": "int"},
            {"name": "l", "type": "long"},
            {"name": "d", "type": "double"},
            {"name": "s", "type": "string"},
            {"name": "y", "type": "bytes"},
            {"name": "o", "type": ["null", "string"], "default": None},
            {"name": "e", "type": {"type": "enum", "name": "colour", "symbols": ["red", "blue"], "default": "red"}},
            {"name": "f", "type": {"type": "fixed", "name": "four", "size": 4}},
            {"name": "a", "type": {"type": "array", "items": "string"}, "default": []},
            {"name": "m", "type": {"type": "map", "values": "long"}, "default": {}},
            {"name": "t", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "td", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}], "default": None},
            {
                "name": "r",
                "type": {
                    "type": "record",
                    "name": "inner",
                    "fields": [
                        {"name": "c", "type": "colour"},
                        {"name": "n", "type": ["null", "int"], "default": None},
                    ],
                },
            },
        ],
    },
    subject="test.every",
    version=1,
    id=123_456,
)

longs = st.integers(-(2**63), 2**63 - 1)
ints = st.integers(-(2**31), 2**31 - 1)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
records = st.fixed_dictionaries(
    {
        "b": st.booleans(),
        "i": ints,
        "l": longs,
        "d": st.floats(allow_nan=False),
        "s": texts,
        "y": st.binary(max_size=60),
        "o": st.none() | texts,
        "e": st.sampled_from(["red", "blue"]),
        "f": st.binary(min_size=4, max_size=4),
        "a": st.lists(texts, max_size=4),
        "m": st.dictionaries(texts, longs, max_size=4),
        "t": longs,
        "td": st.none() | longs,
        "r": st.fixed_dictionaries({"c": st.sampled_from(["red", "blue"]), "n": st.none() | ints}),
    }
)
SAMPLE: dict[str, Any] = {
    "b": True, "i": 1, "l": 2, "d": 0.5, "s": "x", "y": b"y", "o": None, "e": "red", "f": b"1234", "a": ["p"],
    "m": {"k": 1}, "t": 1_700_000_000_000, "td": None, "r": {"c": "blue", "n": 3},
}  # fmt: skip


@given(records)
def test_what_is_written_is_read(record: dict[str, Any]) -> None:
    """Any record that fits its schema comes back equal, under its schema id."""
    value = codec.encode(EVERY, record)
    assert value[:5] == b"\0" + struct.pack(">I", 123_456)
    assert codec.peek_schema_id(value) == 123_456
    assert codec.decode(value, EVERY) == record


def in_calendar(record: dict[str, Any]) -> bool:
    """Apache's decoder makes dates of instants, and its calendar has the years 1 to 9999."""
    return all(-62_135_596_800_000 <= (record[name] or 0) <= 253_402_300_799_999 for name in ("t", "td"))


@given(records.filter(in_calendar))
@settings(max_examples=60)
def test_a_plain_avro_decoder_reads_our_bytes(record: dict[str, Any]) -> None:
    """Apache's own decoder, with the registered schema and its logical types, reads the hot path's bytes (issue 6)."""
    schema = avro.schema.parse(EVERY.text)
    source = io.BytesIO(codec.encode(EVERY, record)[5:])
    seen = avro.io.DatumReader(schema).read(avro.io.BinaryDecoder(source))
    assert source.read() == b""
    assert seen["s"] == record["s"]
    assert (seen["y"], seen["e"], seen["a"], seen["m"]) == (record["y"], record["e"], record["a"], record["m"])
    assert (seen["t"] - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1) == record["t"]


@given(records, st.data())
def test_torn_bytes_are_a_decode_error(record: dict[str, Any], data: st.DataObject) -> None:
    """A value cut anywhere is refused with the schema's name and what to do, never half read."""
    value = codec.encode(EVERY, record)
    cut = data.draw(st.integers(0, len(value) - 1))
    with pytest.raises(DecodeError) as caught:
        codec.decode(value[:cut], EVERY, where="t[0]@5")
    assert "t[0]@5" in str(caught.value)


@given(st.binary(max_size=300))
@settings(max_examples=400)
def test_any_bytes_decode_or_are_a_decode_error(payload: bytes) -> None:
    """No input raises anything but DecodeError: what is not ours to read is poison, not a bug (E1)."""
    try:
        record = codec.decode(b"\0" + struct.pack(">I", 123_456) + payload, EVERY)
    except DecodeError:
        return
    EVERY.check(record)


@given(records, st.data())
def test_flipped_bits_decode_or_are_a_decode_error(record: dict[str, Any], data: st.DataObject) -> None:
    """The same for values that are nearly right."""
    value = bytearray(codec.encode(EVERY, record))
    at = data.draw(st.integers(5, len(value) - 1))
    value[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        codec.decode(bytes(value), EVERY)
    except DecodeError:
        return


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "no value (a tombstone)"),
        (b"", "not in the Confluent wire format: 0 bytes"),
        (b"\0\0\0", "not in the Confluent wire format: 3 bytes"),
        (b'{"a": 1}', "beginning 0x7b"),
    ],
)
def test_bytes_without_our_frame(value: bytes | None, text: str) -> None:
    """What is not in the wire format is told so, with what to serialize by."""
    with pytest.raises(DecodeError) as caught:
        codec.peek_schema_id(value, "facts.raw[1]@7")
    assert text in str(caught.value)
    assert str(caught.value).startswith("facts.raw[1]@7: ")


def test_trailing_bytes_are_refused() -> None:
    """The whole value is consumed: left-over bytes mean that another schema wrote it (DESIGN 11)."""
    with pytest.raises(DecodeError, match=r"2 bytes are left over after test.every/v1 \(schema id 123456\)"):
        codec.decode(codec.encode(EVERY, SAMPLE) + b"xx", EVERY)


def test_another_schema_id_than_the_writers_is_refused() -> None:
    """Bytes are only read with the schema that they name."""
    value = codec.encode(EVERY, SAMPLE)
    with pytest.raises(DecodeError, match="written with schema id 7"):
        codec.decode(b"\0\0\0\0\7" + value[5:], EVERY)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"i": 1.5}, "field i: expected a 32-bit integer, found float"),
        ({"i": True}, "field i: expected a 32-bit integer, found bool"),
        ({"i": 2**40}, "field i: expected a 32-bit integer, found an integer"),
        ({"l": 2**63}, "field l: expected a 64-bit integer, found an integer out of range"),
        ({"s": b"x"}, "field s: expected a string, found bytes"),
        ({"s": None}, "field s: expected a string, found null"),
        ({"y": "x"}, "field y: expected bytes, found str"),
        ({"b": 1}, "field b: expected a boolean, found an integer"),
        ({"b": ""}, "field b: expected a boolean, found str"),
        ({"d": "1"}, "field d: expected a number, found str"),
        ({"e": "green"}, "field e: expected one of blue, red"),
        ({"f": b"123"}, "field f: expected 4 bytes"),
        ({"a": "abc"}, "field a: expected an array, found str"),
        ({"a": ["x", 1]}, "field a[1]: expected a string"),
        ({"m": {1: 2}}, "field m (key): expected a string"),
        ({"r": {"c": "blue", "n": "x"}}, "field r.n: expected a 32-bit integer"),
        ({"r": {"c": "blue"}}, "field r.n: missing"),
        ({"o": 5}, "field o: expected a string"),
        ({"t": datetime(2026, 1, 1, tzinfo=UTC)}, "field t: expected a 64-bit integer, found datetime"),
        ({"zz": 1}, "unknown fields: zz"),
        ({"s": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_writing_is_strict(change: dict[str, Any], text: str) -> None:
    """A value of another type, out of range, missing or unknown is refused by name, never bent to fit (DESIGN 11)."""
    with pytest.raises(ValidationError) as caught:
        codec.encode(EVERY, SAMPLE | change, "fact 1")
    assert text in str(caught.value)
    assert str(caught.value).startswith("fact 1: ")


def test_a_missing_field_is_named() -> None:
    """A record without one of its fields is never completed in silence."""
    with pytest.raises(ValidationError, match="field s: missing"):
        codec.encode(EVERY, {k: v for k, v in SAMPLE.items() if k != "s"})


def test_errors_never_show_the_value() -> None:
    """What was in the field may be personal data: the text says its type only (F5)."""
    with pytest.raises(ValidationError) as caught:
        codec.encode(EVERY, SAMPLE | {"e": "jane@example.org"})
    assert "jane" not in str(caught.value)


# ── resolution ────────────────────────────────────────────────────────────────────────────────────────────────────

OLD = codec.parse(
    {
        "type": "record",
        "name": "r",
        "namespace": "t",
        "fields": [
            {"name": "a", "type": "int"},
            {"name": "gone", "type": "string", "default": ""},
            {"name": "e", "type": {"type": "enum", "name": "e", "symbols": ["u", "x"], "default": "u"}},
        ],
    },
    subject="t.r",
    version=1,
    id=1,
)
NEW = codec.parse(
    {
        "type": "record",
        "name": "r",
        "namespace": "t",
        "fields": [
            {"name": "a", "type": "int"},
            {"name": "tags", "type": {"type": "array", "items": "string"}, "default": []},
            {"name": "e", "type": {"type": "enum", "name": "e", "symbols": ["u", "x", "y"], "default": "u"}},
        ],
    },
    subject="t.r",
    version=2,
    id=2,
)


def test_an_old_writer_is_read_by_the_new_reader_and_the_reverse() -> None:
    """Added fields take their default, removed ones go, unknown symbols become the default symbol (A5)."""
    old = codec.encode(OLD, {"a": 1, "gone": "x", "e": "x"})
    assert codec.decode(old, OLD, NEW) == {"a": 1, "tags": [], "e": "x"}
    new = codec.encode(NEW, {"a": 2, "tags": ["p"], "e": "y"})
    assert codec.decode(new, NEW, OLD) == {"a": 2, "gone": "", "e": "u"}
    assert codec.resolve({"a": 1, "gone": "x", "e": "u"}, OLD, NEW) == {"a": 1, "tags": [], "e": "u"}


def test_defaults_are_not_shared() -> None:
    """A decoded default belongs to its record alone: changing it changes no other (DESIGN 11)."""
    old = codec.encode(OLD, {"a": 1, "gone": "x", "e": "x"})
    codec.decode(old, OLD, NEW)["tags"].append("mine")
    assert codec.decode(old, OLD, NEW)["tags"] == []
    assert NEW.source["fields"][1]["default"] == []


def test_what_cannot_be_resolved_is_a_schema_error() -> None:
    """Two versions that do not fit are named, with the check to run."""
    other = codec.parse({"type": "record", "name": "r", "namespace": "t", "fields": [{"name": "z", "type": "int"}]})
    with pytest.raises(SchemaError, match=r"t\.r/v1 .* cannot be read as .*factmesh schema check"):
        codec.decode(codec.encode(OLD, {"a": 1, "gone": "", "e": "x"}), OLD, other)


# ── logical types ─────────────────────────────────────────────────────────────────────────────────────────────────

LOGICAL = codec.parse(
    {
        "type": "record",
        "name": "l",
        "fields": [
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "sum", "type": {"type": "bytes", "logicalType": "decimal", "precision": 8, "scale": 2}},
        ],
    }
)


def test_logical_types_are_python_values_for_those_who_ask() -> None:
    """The same bytes: integers on the hot path, aware datetimes and decimals for others (DESIGN 7)."""
    at = datetime(2026, 1, 31, 9, 30, tzinfo=timezone(timedelta(hours=2)))
    value = codec.encode_logical(LOGICAL, {"at": at, "sum": Decimal("12.50")})
    assert codec.decode(value, LOGICAL) == {"at": 1_769_844_600_000, "sum": b"\x04\xe2"}
    assert codec.encode(LOGICAL, {"at": 1_769_844_600_000, "sum": b"\x04\xe2"}) == value
    seen = codec.decode_logical(value, LOGICAL)
    assert seen == {"at": at, "sum": Decimal("12.50")}
    assert seen["at"].tzinfo is not None


def test_a_naive_datetime_is_refused() -> None:
    """A time without a zone is refused by field name: the machine's zone is nobody's intention (A3)."""
    with pytest.raises(ValidationError, match="field at: a timestamp without an offset"):
        codec.encode_logical(LOGICAL, {"at": datetime(2026, 1, 1), "sum": Decimal(1)})  # noqa: DTZ001


# ── decode bombs ──────────────────────────────────────────────────────────────────────────────────────────────────


def record_of(*fields: Any) -> dict[str, Any]:
    return {
        "type": "record",
        "name": "x",
        "namespace": "n",
        "fields": [{"name": f"f{i}", "type": t} for i, t in enumerate(fields)],
    }


@pytest.mark.parametrize(
    "items",
    [
        "null",
        {"type": "record", "name": "empty", "fields": []},
        {"type": "fixed", "name": "nothing", "size": 0},
        {"type": "record", "name": "deep", "fields": [{"name": "n", "type": "null"}]},
    ],
)
def test_arrays_of_nothing_are_refused(items: Any) -> None:
    """Five bytes that claim a billion items of no bytes would fill the memory: such a schema is not even loaded."""
    with pytest.raises(SchemaError, match="an array of items that take no bytes"):
        codec.parse(record_of({"type": "array", "items": items}))
    with pytest.raises(SchemaError, match="an array of items that take no bytes"):
        codec.parse(record_of({"type": "map", "values": {"type": "array", "items": items}}))


def test_recursion_is_refused() -> None:
    """A type that contains itself can nest as deep as its bytes say."""
    with pytest.raises(SchemaError, match=r"type n\.x contains itself"):
        codec.parse(record_of(["null", "x"]))
    with pytest.raises(SchemaError, match=r"type n\.x contains itself"):
        codec.parse(record_of({"type": "array", "items": "n.x"}))


def test_depth_is_bounded() -> None:
    """A schema from a registry cannot exhaust the stack."""
    deep: Any = "string"
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    with pytest.raises(SchemaError, match="deeper than 32"):
        codec.parse(record_of(deep))
    text = '{"type":"record","name":"x","fields":[{"name":"f","type":' + '{"type":"array","items":' * 60_000
    with pytest.raises(SchemaError):
        codec.parse(text)


def zigzag(n: int) -> bytes:
    n = (n << 1) ^ (n >> 63)
    out = bytearray()
    while n & ~0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 63) - 1, -5, -(1 << 40), -(1 << 63)])
@pytest.mark.parametrize(
    "kind", ["bytes", "string", {"type": "array", "items": "string"}, {"type": "map", "values": "int"}]
)
def test_huge_lengths_are_refused_at_once(kind: Any, count: int) -> None:
    """A length that the value does not have allocates nothing and is a decode error in no time."""
    schema = codec.parse(record_of(kind))
    began = time.perf_counter()
    with pytest.raises(DecodeError):
        codec.decode_bare(zigzag(count) + b"\1ab", schema)
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("{", "not JSON"),
        ('{"type": "record", "type": "record", "name": "x", "fields": []}', "duplicate key type"),
        ('"string"', "the top level must be a record"),
        ('{"type": "record", "name": "x", "fields": [{"name": "a", "type": "strnig"}]}', "not a valid Avro schema"),
        ('{"type": "record", "name": "x", "fields": [{"name": "a"}]}', "has no list of fields"),
        ('{"type": "record", "name": "x", "fields": [{"name": "a", "type": {"type": "array"}}]}', "not a type"),
        ('{"type": "enum", "name": "x", "symbols": ["a"]}', "the top level must be a record"),
        ('{"type": "record", "name": "9x", "fields": []}', "not a valid Avro name"),
    ],
)
def test_a_bad_schema_is_a_schema_error(raw: str, text: str) -> None:
    """Whatever a file or a registry holds, it is a SchemaError that says what is wrong."""
    with pytest.raises(SchemaError) as caught:
        codec.parse(raw)
    assert text in str(caught.value)


def test_the_registered_text_keeps_docs_and_logical_types() -> None:
    """Those who read the registry see what the file says; only our hot path strips it (DESIGN 7)."""
    text = json.loads(EVERY.text)
    assert text["doc"] == "Every type once."
    assert text["fields"][11]["type"]["logicalType"] == "timestamp-millis"
