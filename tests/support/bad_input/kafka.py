"""Records that a stranger may put on `facts.raw`, and bytes that nobody should put on any topic.
Bytes only, as any client would write them; what has to come of each stands beside it.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.order_mesh import CARRIER, WAREHOUSE, noticed_at, warehouse_data
from tests.support.plain import plain_encode

Headers = list[tuple[str, bytes | None]]
EVENT_JSON: Headers = [("content-type", b"application/cloudevents+json")]


@dataclass(frozen=True)
class KafkaCase:
    """One record. `reason` is that of its DLQ record, and `says` stands in its error text."""

    name: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    reason: str
    says: str


def binary(id_: str | bytes, *more: tuple[str, bytes | None], drop: str = "", **changes: str | bytes) -> Headers:
    """The headers of binary mode with JSON, changed by name (`content_type` is content-type)."""
    made: dict[str, str | bytes] = {
        "ce_specversion": "1.0",
        "ce_id": id_,
        "ce_source": WAREHOUSE,
        "ce_type": "order.delayed",
        "ce_dataschema": "x/order.delayed/v1",
        "content-type": "application/json",
        **{name.replace("content_type", "content-type"): value for name, value in changes.items()},
    }
    pairs = [(n, v.encode() if isinstance(v, str) else v) for n, v in made.items() if n != drop]
    return [*pairs, *more]


def data(**changes: Any) -> bytes:
    return json.dumps({**warehouse_data("O-BAD", 1), **changes}).encode()


def structured(id_: str, **changes: Any) -> bytes:
    whole = {
        "specversion": "1.0",
        "id": id_,
        "source": WAREHOUSE,
        "type": "order.delayed",
        "dataschema": "x/order.delayed/v1",
        "data": warehouse_data("O-BAD", 1),
    }
    return json.dumps({**whole, **changes}).encode()


def of_carrier(code: str, scanned: str) -> bytes:
    shipment = {"reference": "O-BAD", "slip": {"days": 2, "code": code}}
    return json.dumps({"hub": "VIE", "scannedAt": scanned, "shipment": shipment}).encode()


def _undecodable(t: str) -> list[KafkaCase]:
    good = data()
    avro = plain_encode("order.delayed", {**warehouse_data("O-BAD", 1), "noticed_at": noticed_at()})
    as_avro = {"content_type": "application/avro"}
    return [
        KafkaCase("tombstone", b"k", None, binary(f"{t}-1"), "decode", "a record without a value (a tombstone)"),
        KafkaCase("empty value", b"k", b"", binary(f"{t}-2"), "validation", "data: the event has no data"),
        KafkaCase("no headers", b"k", good, [], "decode", "no CloudEvents headers and not structured mode"),
        KafkaCase("null key", None, b"junk", binary(f"{t}-4"), "decode", "not JSON"),
        KafkaCase("binary key", b"\xff\x00\xfe", b"junk", binary(f"{t}-5"), "decode", "not JSON"),
        KafkaCase("gzip", b"k", gzip.compress(good), binary(f"{t}-6"), "decode", "the JSON is not UTF-8 (byte 1)"),
        KafkaCase("utf-16", b"k", good.decode().encode("utf-16"), binary(f"{t}-7"), "decode", "not UTF-8"),
        KafkaCase("bom", b"k", b"\xef\xbb\xbf" + good, binary(f"{t}-8"), "decode", "a byte order mark"),
        KafkaCase("deep", b"k", b"[" * 100_000, binary(f"{t}-9"), "decode", "nested deeper than 32 levels"),
        KafkaCase("digits", b"k", b"9" * 5000, binary(f"{t}-10"), "decode", "a number of 5000 characters"),
        KafkaCase("a megabyte", b"k", b"x" * 1_000_000, binary(f"{t}-11"), "decode", "not JSON"),
        KafkaCase("left over", b"k", avro + b"xx", binary(f"{t}-12", **as_avro), "decode", "2 bytes are left over"),
        KafkaCase("torn", b"k", avro[:-1], binary(f"{t}-13", **as_avro), "decode", "bytes do not fit order.delayed/v1"),
        KafkaCase("json as avro", b"k", good, binary(f"{t}-14", **as_avro), "decode", "not in the Confluent wire form"),
        KafkaCase("avro as json", b"k", avro, binary(f"{t}-15"), "decode", "JSON"),
        KafkaCase(
            "unknown schema id",
            b"k",
            b"\0\x00\x0f\xff\xffx",
            binary(f"{t}-16", **as_avro),
            "schema",
            "schema id 1048575 is not registered",
        ),
        KafkaCase("no fact", b"k", b"\0\0\0\0\1x", binary(f"{t}-17", **as_avro), "decode", "and no fact"),
    ]


def _attributes(t: str) -> list[KafkaCase]:
    good = data()
    return [
        KafkaCase("header not UTF-8", b"k", good, binary(b"\xff\xfe"), "decode", "ce_id: the header is not UTF-8"),
        KafkaCase("header twice", b"k", good, binary(f"{t}-20", ("ce_id", b"b")), "validation", "is there twice"),
        KafkaCase("id of 10 kB", b"k", good, binary("i" * 10_000), "validation", "id: 10000 characters, more than 255"),
        KafkaCase("id with NUL", b"k", good, binary("a\0b\x1b[2J"), "validation", "id: control characters"),
        KafkaCase("no id", b"k", good, binary("x", drop="ce_id"), "validation", "id: required and missing"),
        KafkaCase("source", b"k", good, binary(f"{t}-25", ce_source="//x/😀 b"), "validation", "not a URI reference"),
        KafkaCase(
            "source not allowed",
            b"k",
            good,
            binary(f"{t}-26", ce_source="//evil.example"),
            "validation",
            "from this source",
        ),
        KafkaCase("type", b"k", good, binary(f"{t}-27", ce_type="order.lost"), "validation", "no adapter takes facts"),
        KafkaCase(
            "xml", b"k", b"<a/>", binary(f"{t}-28", content_type="text/xml"), "validation", "a content type that n"
        ),
        KafkaCase(
            "version", b"k", good, binary(f"{t}-29", ce_dataschema="x/order.delayed/v9"), "schema", "version 9 is not"
        ),
        KafkaCase(
            "forged diagnosis",
            b"k",
            b"junk",
            binary(f"{t}-30", ("x-factmesh", b"\xff"), ("x-null", None)),
            "decode",
            "not JSON",
        ),
        KafkaCase("root with NUL", b"k", b"junk", binary(f"{t}-31", *_opening(b"a\0b")), "decode", "not JSON"),
        KafkaCase(
            "root of 10 kB", b"k", b"junk", binary(f"{t}-32", *_opening(b"at:" + b"r" * 10_000)), "decode", "not J"
        ),
        KafkaCase(
            "root of no day",
            b"k",
            b"junk",
            binary(f"{t}-33", *_opening(b"id:ffffffff-ffff-8fff-bfff-ffffffffffff")),
            "decode",
            "not JSON",
        ),
    ]


def _opening(root: bytes) -> Headers:
    """What a replay has; here nobody replays."""
    return [("factmesh-root-id", root), ("factmesh-opening", b"1")]


def _values(t: str) -> list[KafkaCase]:
    old = (datetime.now(UTC) - timedelta(days=40)).isoformat(timespec="seconds")
    carrier = {"ce_source": CARRIER, "drop": "ce_dataschema"}
    now = noticed_at().strftime("%d.%m.%Y %H:%M:%S")
    return [
        KafkaCase("missing field", b"k", b'{"order_id": "O"}', binary(f"{t}-40"), "validation", "days_late: missing"),
        KafkaCase(
            "wrong type", b"k", data(days_late="two"), binary(f"{t}-41"), "validation", "field days_late: expected"
        ),
        KafkaCase("huge number", b"k", data(days_late=10**12), binary(f"{t}-42"), "validation", "a 32-bit integer"),
        KafkaCase("symbol", b"k", data(reason="ufo"), binary(f"{t}-43"), "validation", "field reason"),
        KafkaCase("naive", b"k", data(noticed_at="2026-11-20T10:00:00"), binary(f"{t}-44"), "validation", "no offset"),
        KafkaCase(
            "future", b"k", data(noticed_at="2199-01-01T00:00:00Z"), binary(f"{t}-45"), "validation", "the future"
        ),
        KafkaCase(
            "old", b"k", data(noticed_at=old), binary(f"{t}-46"), "stale", "older than the dedup horizon of 14 days"
        ),
        KafkaCase("NUL", b"k", data(order_id="O\0"), binary(f"{t}-47"), "validation", "the character U+0000"),
        KafkaCase("blank", b"k", data(order_id="  "), binary(f"{t}-48"), "validation", "text is required"),
        KafkaCase("too long", b"k", data(order_id="o" * 600), binary(f"{t}-49"), "validation", "more than 512"),
        KafkaCase("oversize", b"k", data(order_id="x" * 300_000), binary(f"{t}-50"), "validation", "more than 262144"),
        KafkaCase(
            "unmapped",
            b"k",
            of_carrier("ZZ", now),
            binary(f"{t}-51", **carrier),
            "validation",
            "table reasons does not tran",
        ),
        KafkaCase("NUL key", b"k", data(**{"a\0b": 1}), binary(f"{t}-52"), "validation", "unknown fields: a"),
    ]


def _structured(t: str) -> list[KafkaCase]:
    batch: Headers = [("content-type", b"application/cloudevents-batch+json")]
    return [
        KafkaCase("structured: array", b"k", b"[]", EVENT_JSON, "decode", "an event is a JSON object"),
        KafkaCase("structured: not UTF-8", b"k", b"\xff{}", EVENT_JSON, "decode", "not UTF-8 (byte 0)"),
        KafkaCase(
            "structured: id", b"k", structured("", id=7), EVENT_JSON, "validation", "id: text is expected, found int"
        ),
        KafkaCase(
            "structured: naive",
            b"k",
            structured(f"{t}-60", time="2026-01-01T00:00:00"),
            EVENT_JSON,
            "validation",
            "time: a timestamp without an offset",
        ),
        KafkaCase(
            "structured: name with NUL",
            b"k",
            structured(f"{t}-61", **{"a\0": {}}),
            EVENT_JSON,
            "validation",
            "text is exp",
        ),
        KafkaCase(
            "structured: value", b"k", structured(f"{t}-62", data={}), EVENT_JSON, "validation", "order_id: missing"
        ),
        KafkaCase("batch", b"k", b"[" + structured(f"{t}-63") + b"]", batch, "decode", "one event a record"),
    ]


def kafka_cases(tag: str) -> list[KafkaCase]:
    """Every case, with ids that begin with `tag`."""
    return [*_undecodable(tag), *_attributes(tag), *_values(tag), *_structured(tag)]


def junk_for_our_topics() -> list[tuple[bytes | None, bytes | None, Headers]]:
    """(key, value, headers) that nobody of ours would write."""
    return [
        (b"k", b"junk", []),
        (b"k", None, []),
        (b"", b"", [("x", None)]),
        (b"\xff", b"\0\0\0\0\1x", []),
        (b"k", b"\0\xff\xff\xff\xffx", _opening(b"a\0b")),
    ]
