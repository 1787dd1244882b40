"""JSON judged by a compiled schema: what the fast way takes, the careful way takes too, with the same result."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from factmesh import avro, avro_json
from factmesh import avro_json_fast as fast
from factmesh.errors import ValidationError

MILLIS = {"type": "long", "logicalType": "timestamp-millis"}
SCHEMA = avro.parse(
    {
        "type": "record",
        "name": "sent",
        "namespace": "parcel",
        "fields": [
            {"name": "id", "type": "string"},
            {"name": "at", "type": MILLIS},
            {"name": "due", "type": ["null", {"type": "long", "logicalType": "timestamp-micros"}], "default": None},
            {"name": "odd", "type": {"type": "long", "logicalType": "timestamp-nanos"}, "default": 0},
            {"name": "day", "type": ["null", {"type": "int", "logicalType": "date"}], "default": None},
            {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}},
            {"name": "ref", "type": ["null", {"type": "string", "logicalType": "uuid"}], "default": None},
            {"name": "size", "type": {"type": "enum", "name": "size", "symbols": ["s", "l"], "default": "s"}},
            {"name": "other", "type": "size", "default": "l"},
            {"name": "weight", "type": "double", "default": 0},
            {"name": "count", "type": "int"},
            {"name": "any", "type": ["null", "long", "double", "string"], "default": None},
            {"name": "wrapped", "type": {"type": "string"}, "default": ""},
            {"name": "code", "type": {"type": "fixed", "name": "code", "size": 2}},
            {"name": "tags", "type": {"type": "array", "items": ["null", "string"]}, "default": []},
            {"name": "notes", "type": {"type": "map", "values": "boolean"}, "default": {}},
            {
                "name": "lines",
                "type": {
                    "type": "array",
                    "items": {
                        "type": "record",
                        "name": "line",
                        "fields": [{"name": "sku", "type": "string"}, {"name": "at", "type": ["null", MILLIS]}],
                    },
                },
            },
            {
                "name": "box",
                "type": {"type": "record", "name": "box", "fields": [{"name": "raw", "type": "bytes"}]},
            },
        ],
    },
    subject="parcel.sent",
    version=1,
)

ODD = st.sampled_from([None, True, 1, 2**31, 2**63, -1, 1.5, "", "x", "AAE=", "\ud800", [], {}, [1], {"sku": "a"}])
TEXTS = st.sampled_from(["", "a", "é", "2026-01-31T09:30:00Z"])
INSTANTS = st.sampled_from(
    [0, 1_000, -62_135_596_800_000, -62_135_596_800_001, 10**17, "2026-01-31T09:30:00.25+02:00", "2026-01-31 09:30:00"]
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "id": TEXTS,
    "at": INSTANTS,
    "due": INSTANTS | st.none(),
    "odd": st.integers(0, 10**18),
    "day": st.sampled_from([None, 3, "2026-01-31", "2026-02-30"]),
    "price": st.sampled_from(["12.50", "-0.01", "1e3", "12345.67", "AAAA"]),
    "ref": st.sampled_from([None, "8C0F4AB2-4E5B-4C52-8E9B-6C1B5A0D2F11", "x"]),
    "size": st.sampled_from(["s", "l", "m"]),
    "other": st.sampled_from(["s", "l"]),
    "weight": st.sampled_from([0, 1, 1.5, float("inf"), 10**39]),
    "count": st.integers(-(2**31), 2**31),
    "any": st.sampled_from([None, 1, 1.0, "1", True]),
    "wrapped": TEXTS,
    "code": st.sampled_from(["AAE=", "AA==", "x"]),
    "tags": st.lists(st.none() | TEXTS, max_size=2),
    "notes": st.dictionaries(TEXTS, st.booleans(), max_size=2),
    "lines": st.lists(st.fixed_dictionaries({"sku": TEXTS, "at": st.none() | INSTANTS}), max_size=2),
    "box": st.fixed_dictionaries({"raw": st.sampled_from(["AAE=", "", "="])}),
}
REQUIRED = ("id", "at", "price", "size", "count", "code", "lines", "box")


@st.composite
def records(draw: st.DrawFn) -> Any:
    """JSON that mostly fits, with now and then a field that is missing, unknown, or of another type."""
    optional = draw(st.sets(st.sampled_from(sorted(FIELDS.keys() - set(REQUIRED)))))
    made = {name: draw(values) for name, values in FIELDS.items() if name in REQUIRED or name in optional}
    what = draw(st.sampled_from(["", "", "", "missing", "unknown", "odd", "other"]))
    if what == "missing":
        del made[draw(st.sampled_from(REQUIRED))]
    elif what == "unknown":
        made["more"] = 1
    elif what == "odd":
        made[draw(st.sampled_from(sorted(FIELDS)))] = draw(ODD)
    return draw(ODD) if what == "other" else made


def carefully(value: Any) -> Any:
    record = avro_json._Reader("w", SCHEMA.named).read(SCHEMA.source, value, "")
    SCHEMA.check(record, "w")
    return record


def outcome(work: Any) -> str:
    """The value with types and order, or the error's words."""
    try:
        return repr(work())
    except (ValidationError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"


@given(records())
def test_both_ways_say_the_same(value: Any) -> None:
    """A3: the same record with its types and its order, or the same refusal in the same words; and so on the way back.

    That the fast way takes anything at all is the other test's.
    """
    assert outcome(lambda: avro_json.validate(SCHEMA, value, "w")) == outcome(lambda: carefully(value))
    try:
        record = carefully(value)
    except (ValidationError, OverflowError):
        return
    back = outcome(lambda: avro_json.to_json(SCHEMA, record, "w"))
    assert back == outcome(lambda: avro_json._plain(SCHEMA.source, record, "", SCHEMA.named, "w"))


def test_what_is_plainly_right_takes_the_fast_way() -> None:
    """Issue 7: a fact that fits, with a default left out, is not walked through twice."""
    value = {
        "id": "p", "at": "2026-01-31T09:30:00Z", "price": "1.00", "size": "s", "count": 1, "code": "AAE=",
        "tags": ["a"], "notes": {}, "lines": [{"sku": "a", "at": None}], "box": {"raw": ""},
    }  # fmt: skip
    read, write = avro_json._compiled(SCHEMA)
    record = read(value)
    assert record == carefully(value)
    assert record["weight"] == 0
    assert write(record)["at"] == "2026-01-31T09:30:00.000Z"
    for wrong in ({**value, "more": 1}, {**value, "count": True}, {k: v for k, v in value.items() if k != "id"}):
        try:
            read(wrong)
        except fast.NOT_PLAIN:
            continue
        raise AssertionError(wrong)
