"""The generated codec is an accelerator: the same bytes and records as the vendor's, and never more than it accepts."""

from __future__ import annotations

import io
import time
from typing import Any

import fastavro
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from factmesh import avro, avro_fast
from factmesh.avro_strict import strip_logical
from factmesh.errors import DecodeError

FLAT = avro.parse(
    {
        "type": "record",
        "name": "flat",
        "fields": [
            {"name": "s", "type": "string"},
            {"name": "l", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "i", "type": "int"},
            {"name": "y", "type": "bytes"},
            {"name": "b", "type": "boolean"},
            {"name": "os", "type": ["null", "string"], "default": None},
            {"name": "ol", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}], "default": None},
            {"name": "oy", "type": ["null", "bytes"], "default": None},
            {"name": "ob", "type": ["null", "boolean"], "default": None},
            {"name": "oi", "type": ["null", "int"], "default": None},
        ],
    },
    subject="test.flat",
    version=1,
    id=9,
)
_plain = fastavro.parse_schema(strip_logical(FLAT.source))
_compiled = avro_fast.compile_flat(list(_plain["fields"]), b"\0\0\0\0\x09")
assert _compiled is not None
fast_encode, fast_decode = _compiled

longs = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300) | st.sampled_from([2**34, 2**35, 2**41 - 1, 2**41, -1])
ints = st.integers(-(2**31), 2**31 - 1)
texts = st.text(st.characters(exclude_categories=("Cs",)))
records = st.fixed_dictionaries(
    {
        "s": texts | st.just("x" * 5000),
        "l": longs,
        "i": ints,
        "y": st.binary(),
        "b": st.booleans(),
        "os": st.none() | texts,
        "ol": st.none() | longs,
        "oy": st.none() | st.binary(),
        "ob": st.none() | st.booleans(),
        "oi": st.none() | ints,
    }
)


def vendor_bytes(record: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _plain, record, strict=True)
    return b"\0\0\0\0\x09" + out.getvalue()


@given(records)
@settings(max_examples=300)
def test_the_same_bytes_and_the_same_record(record: dict[str, Any]) -> None:
    """Generated code and fastavro agree on every record."""
    value = fast_encode(record)
    assert value == vendor_bytes(record)
    assert fast_decode(value) == record


def _accepted(value: bytes) -> dict[str, Any] | None:
    try:
        return fast_decode(value)
    except avro_fast.NOT_PLAIN:
        return None


@given(records, st.data())
@settings(max_examples=400)
def test_it_accepts_nothing_that_the_vendor_refuses(record: dict[str, Any], data: st.DataObject) -> None:
    """Of changed, cut and lengthened bytes it either makes what fastavro makes, or leaves the judgement to it."""
    value = bytearray(vendor_bytes(record))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(5, len(value)))
        value[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    raw = bytes(value)
    found = _accepted(raw)
    if found is not None:
        source = io.BytesIO(raw[5:])
        assert fastavro.schemaless_reader(source, _plain) == found
        assert source.read() == b""


@given(st.binary(max_size=80))
@example(b"\xff" * 11)
@example(b"\x00\x80\x00")
@settings(max_examples=400)
def test_nor_of_any_bytes(payload: bytes) -> None:
    """The same for bytes that were never a record."""
    found = _accepted(b"\0\0\0\0\x09" + payload)
    if found is not None:
        assert fastavro.schemaless_reader(io.BytesIO(payload), _plain) == found


def test_an_endless_number_costs_nothing() -> None:
    """A megabyte of continuation bytes is refused in no time."""
    began = time.perf_counter()
    with pytest.raises(DecodeError):
        avro.decode(b"\0\0\0\0\x09" + b"\xff" * 1_000_000, FLAT)
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    "type_",
    ["double", {"type": "array", "items": "string"}, ["string", "null"], ["null", "string", "long"]],
)
def test_what_is_not_flat_is_left_to_the_vendor(type_: Any) -> None:
    """No generated code where a field is more than a plain or optional value."""
    assert avro_fast.compile_flat([{"name": "a", "type": type_}], b"\0\0\0\0\x09") is None


def test_our_own_records_are_flat() -> None:
    """The records between our services all take the fast path: a field that leaves it costs each message twice."""
    from factmesh.schema_files import platform_dir, read_dir

    slow = [f.key for f in read_dir(platform_dir()) if f.schema._fast is None]
    assert slow == []
