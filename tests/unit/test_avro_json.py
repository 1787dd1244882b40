"""Facts that arrive as JSON are judged by the same schema as those in Avro, and end in the same record (A1, A3)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import avro, avro_json
from factmesh.errors import ValidationError

FACT = avro.parse(
    {
        "type": "record",
        "name": "shipped",
        "namespace": "parcel",
        "fields": [
            {"name": "id", "type": "string"},
            {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
            {"name": "due", "type": ["null", {"type": "long", "logicalType": "timestamp-micros"}], "default": None},
            {"name": "day", "type": {"type": "int", "logicalType": "date"}},
            {"name": "shift", "type": {"type": "int", "logicalType": "time-millis"}},
            {"name": "local", "type": {"type": "long", "logicalType": "local-timestamp-millis"}},
            {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}},
            {"name": "ref", "type": {"type": "string", "logicalType": "uuid"}},
            {
                "name": "size",
                "type": {"type": "enum", "name": "size", "symbols": ["s", "l"], "default": "s"},
                "default": "s",
            },
            {"name": "weight", "type": "double"},
            {"name": "count", "type": "int"},
            {"name": "raw", "type": "bytes"},
            {"name": "fragile", "type": ["null", "boolean"], "default": None},
            {"name": "tags", "type": {"type": "array", "items": "string"}, "default": []},
            {"name": "notes", "type": {"type": "map", "values": "string"}, "default": {}},
            {
                "name": "lines",
                "type": {
                    "type": "array",
                    "items": {
                        "type": "record",
                        "name": "line",
                        "fields": [{"name": "sku", "type": "string"}, {"name": "size", "type": "size"}],
                    },
                },
            },
        ],
    }
)  # fmt: skip
GOOD: dict[str, Any] = {
    "id": "p-1", "at": "2026-01-31T09:30:00.250+02:00", "day": "2026-01-31", "shift": "09:30:00",
    "local": "2026-01-31T09:30:00", "price": "-12.50", "ref": "8C0F4AB2-4E5B-4C52-8E9B-6C1B5A0D2F11", "weight": 2,
    "count": 3, "raw": "AAEC", "lines": [{"sku": "a", "size": "l"}],
}  # fmt: skip


def test_json_becomes_the_record_that_avro_would_carry() -> None:
    """Instants with an offset, dates, decimals and base64 become Avro's own values; defaults are filled (A3)."""
    record = avro_json.validate(FACT, GOOD)
    assert record == {
        "id": "p-1", "at": 1_769_844_600_250, "due": None, "day": 20_484, "shift": 34_200_000,
        "local": 1_769_851_800_000, "price": b"\xfb\x1e", "ref": "8c0f4ab2-4e5b-4c52-8e9b-6c1b5a0d2f11", "size": "s",
        "weight": 2.0, "count": 3, "raw": b"\0\1\2", "fragile": None, "tags": [], "notes": {},
        "lines": [{"sku": "a", "size": "l"}],
    }  # fmt: skip
    assert avro.decode(avro.encode(FACT, record), FACT) == record


def test_and_back() -> None:
    """A record as JSON, read again, is the same record; instants are RFC 3339 in UTC."""
    record = avro_json.validate(FACT, GOOD)
    plain = avro_json.to_json(FACT, record)
    assert plain["at"] == "2026-01-31T07:30:00.250Z"
    assert (plain["day"], plain["shift"], plain["price"], plain["raw"]) == (
        "2026-01-31",
        "09:30:00.000",
        "-12.50",
        "AAEC",
    )
    assert avro_json.validate(FACT, json.loads(json.dumps(plain))) == record


@given(
    at=st.integers(-62_135_596_800_000, 253_402_300_799_999),
    due=st.none() | st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
    day=st.integers(-719_162, 2_932_896),
    cents=st.integers(-999_999, 999_999),
    tags=st.lists(st.text(st.characters(exclude_categories=("Cs",)))),
)
def test_every_instant_of_the_calendar_comes_back(
    at: int, due: int | None, day: int, cents: int, tags: list[str]
) -> None:
    """From the first millisecond of year 1 to the last of 9999, nothing is rounded."""
    record = avro_json.validate(FACT, GOOD)
    price = cents.to_bytes((cents + (cents < 0)).bit_length() // 8 + 1, "big", signed=True)
    record |= {"at": at, "due": due, "day": day, "price": price, "tags": tags}
    assert avro_json.validate(FACT, json.loads(json.dumps(avro_json.to_json(FACT, record)))) == record


def test_avros_own_integers_are_taken_too() -> None:
    """A sender that knows the schema may write the instant as the schema does."""
    assert avro_json.validate(FACT, GOOD | {"at": 1_769_844_600_250})["at"] == 1_769_844_600_250


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"at": "2026-01-31T09:30:00"}, "field at: the timestamp has no offset from UTC (add Z or an offset"),
        ({"due": "2026-01-31 09:30:00.5"}, "field due: the timestamp has no offset from UTC"),
        ({"at": "yesterday"}, "field at: expected an instant like 2026-01-31T09:30:00Z, found text that is not"),
        ({"at": "2026-02-30T09:30:00Z"}, "field at: expected an instant that exists"),
        ({"at": 1.5}, "field at: expected a 64-bit integer, found a number"),
        ({"at": None}, "field at: expected a 64-bit integer, found null"),
        ({"local": "2026-01-31T09:30:00Z"}, "field local: expected a local time like 2026-01-31T09:30:00, without"),
        ({"day": "31.01.2026"}, "field day: expected a date like 2026-01-31"),
        ({"shift": "09:30:00+02:00"}, "field shift: expected a time without an offset"),
        ({"price": "1.234"}, "field price: expected a decimal number of 6 digits, 2 of them after the point"),
        ({"price": "99999999"}, "field price: expected a decimal number"),
        ({"price": "1e999999999"}, "field price: expected a decimal number"),
        ({"price": "NaN"}, "field price: expected a decimal number"),
        ({"price": 12.5}, "field price: expected bytes in base64, found a number"),
        ({"ref": "x"}, "field ref: expected a UUID"),
        ({"size": "medium"}, "field size: expected one of s, l, found text that is not"),
        ({"count": "3"}, "field count: expected a 32-bit integer, found text that is not"),
        ({"count": 3.0}, "field count: expected a 32-bit integer, found a number"),
        ({"count": True}, "field count: expected a 32-bit integer, found a boolean"),
        ({"count": 2**31}, "field count: expected a 32-bit integer"),
        ({"weight": float("inf")}, "field weight: expected a finite number"),
        ({"weight": True}, "field weight: expected a finite number, found a boolean"),
        ({"fragile": "yes"}, "field fragile: expected true or false"),
        ({"raw": "%%"}, "field raw: expected bytes in base64"),
        ({"id": "\ud800"}, "field id: expected text without lone surrogates"),
        ({"tags": "abc"}, "field tags: expected an array"),
        ({"tags": ["a", None]}, "field tags[1]: expected text, found null"),
        ({"notes": {"k": 1}}, "field notes.k: expected text, found a number"),
        ({"lines": [{"sku": "a"}]}, "field lines[0].size: missing"),
        ({"lines": [{"sku": "a", "size": "s", "extra": 1}]}, "unknown fields: lines[0].extra (the schema knows sku"),
        ({"colour": "red", "shape": 1}, "unknown fields: colour, shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: dict[str, Any], text: str) -> None:
    """Wrong types, unknown fields, unmapped enums and naive timestamps are refused with the field's name (issue 6)."""
    with pytest.raises(ValidationError) as caught:
        avro_json.validate(FACT, GOOD | change, "fact 7")
    assert text in str(caught.value)
    assert str(caught.value).startswith("fact 7: ")


def test_a_missing_field_and_no_object() -> None:
    """A required field that is missing, and JSON that is no object."""
    with pytest.raises(ValidationError, match="field id: missing"):
        avro_json.validate(FACT, {k: v for k, v in GOOD.items() if k != "id"})
    with pytest.raises(ValidationError, match=r"field \(all\): expected an object, found an array"):
        avro_json.validate(FACT, [])


def test_defaults_are_not_shared() -> None:
    """A filled default belongs to its record alone."""
    avro_json.validate(FACT, GOOD)["tags"].append("mine")
    assert avro_json.validate(FACT, GOOD)["tags"] == []


def test_an_instant_outside_the_calendar_is_named() -> None:
    """Avro carries any 64-bit integer; one that is no date is refused on the way to JSON."""
    record = avro_json.validate(FACT, GOOD) | {"at": 2**62}
    with pytest.raises(ValidationError, match="field at: timestamp-millis out of range"):
        avro_json.to_json(FACT, record)


def test_unions_of_several_types() -> None:
    """Branches are told apart by what JSON shows."""
    schema = avro.parse(
        {
            "type": "record",
            "name": "u",
            "fields": [
                {"name": "v", "type": ["null", "boolean", "long", "string", {"type": "array", "items": "long"}]}
            ],
        }
    )
    for value in (None, True, 5, "x", [1, 2]):
        record = avro_json.validate(schema, {"v": value})
        assert record == {"v": value}
        assert avro_json.to_json(schema, avro.decode(avro.encode(schema, record), schema)) == {"v": value}
    with pytest.raises(ValidationError, match="field v: expected one of the union's types"):
        avro_json.validate(schema, {"v": {}})
