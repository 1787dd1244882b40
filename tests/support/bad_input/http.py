"""Requests that a careless or hostile caller may send to `POST /facts`, besides those of the intake's own tests.
What is answered stands beside each.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

from tests.support.bad_input.kafka import data, structured
from tests.support.order_mesh import WAREHOUSE

EVENT = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"


@dataclass(frozen=True)
class HttpCase:
    """One request, and the problem document that answers it."""

    name: str
    headers: dict[str, str]
    body: bytes
    status: int
    slug: str
    says: str


def attributes(**changes: str) -> dict[str, str]:
    """The headers of binary mode, changed by name (`content_type` is content-type, `id` is ce-id)."""
    made = {
        "ce-specversion": "1.0",
        "ce-id": "bad",
        "ce-source": WAREHOUSE,
        "ce-type": "order.delayed",
        "ce-dataschema": "x/order.delayed/v1",
        "content-type": "application/json",
    }
    for name, value in changes.items():
        plain = name.replace("_", "-")
        made[plain if plain.startswith(("content", "ce-")) else f"ce-{plain}"] = value
    return made


def http_cases() -> list[HttpCase]:
    good = data()
    many = json.dumps([1] * 10_000).encode()
    return [
        HttpCase("text", attributes(content_type="text/plain"), good, 415, "unsupported-media-type", "content-type"),
        HttpCase(
            "form",
            attributes(content_type="multipart/form-data; boundary=x"),
            b"--x",
            415,
            "unsupported-media-type",
            "send application/json",
        ),
        HttpCase("charset", attributes(content_type="application/json; charset=utf-16"), good, 422, "invalid", "UTF-8"),
        HttpCase(
            "gzip",
            attributes(content_encoding="gzip"),
            gzip.compress(good),
            415,
            "unsupported-media-type",
            "content-encoding: a body that is compressed",
        ),
        HttpCase("gzip unsaid", attributes(), gzip.compress(good), 400, "unreadable", "not UTF-8"),
        HttpCase("bom", attributes(), b"\xef\xbb\xbf" + good, 400, "unreadable", "byte order mark"),
        HttpCase("blank", attributes(), b"   ", 400, "unreadable", "not JSON"),
        HttpCase("null", attributes(), b"null", 422, "invalid", "expected an object, found null"),
        HttpCase("array", attributes(), b"[]", 422, "invalid", "expected an object, found an array"),
        HttpCase("2 MB", attributes(), b"x" * 2_000_000, 413, "too-large", "more than 1000000 bytes"),
        HttpCase("deep", attributes(), b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "unreadable", "nested deeper"),
        HttpCase("digits", attributes(), b'{"days_late": ' + b"9" * 5000 + b"}", 400, "unreadable", "5000 characters"),
        HttpCase("infinite", attributes(), b'{"days_late": 1e400}', 400, "unreadable", "too large for a double"),
        HttpCase("float", attributes(), data(days_late=1.0), 422, "invalid", "field days_late: expected a 32-bit"),
        HttpCase("bool", attributes(), data(days_late=True), 422, "invalid", "found a boolean"),
        HttpCase("NUL", attributes(), data(order_id="O\0"), 422, "invalid", "U+0000"),
        HttpCase("line break", attributes(), data(order_id="O\r\n"), 422, "invalid", "control characters"),
        HttpCase(
            "year 9999", attributes(), data(noticed_at="9999-12-31T23:59:59-23:59"), 422, "invalid", "out of range"
        ),
        HttpCase(
            "id of 10 kB", attributes(id="i" * 10_000), good, 422, "invalid", "id: 10000 characters, more than 255"
        ),
        HttpCase("header injection", attributes(id="a%0d%0aX-Evil: 1"), good, 422, "invalid", "id: control characters"),
        HttpCase("encoded NUL", attributes(id="a%00b"), good, 422, "invalid", "id: control characters"),
        HttpCase("emoji in source", attributes(source="//x/%F0%9F%98%80"), good, 422, "invalid", "not a URI reference"),
        HttpCase(
            "source not allowed", attributes(source="//evil.example"), good, 403, "source-not-allowed", "no adapter"
        ),
        HttpCase(
            "40 extensions", attributes(**{f"e{n}": "y" for n in range(40)}), good, 422, "invalid", "40 extension"
        ),
        HttpCase("forged opening", attributes(factmesh_opening="5"), good, 422, "invalid", "not an attribute name"),
        HttpCase("structured nothing", {"content-type": EVENT}, b"{}", 422, "invalid", "no data"),
        HttpCase(
            "structured naive",
            {"content-type": EVENT},
            structured("s", time="2026-01-01T00:00:00"),
            422,
            "naive-timestamp",
            "time: a timestamp without an offset",
        ),
        HttpCase(
            "batch of 10,000", {"content-type": BATCH}, many, 422, "invalid", "10000 events in one batch, more than"
        ),
        HttpCase("batch of 5 MB", {"content-type": BATCH}, b" " * 5_000_000, 413, "too-large", "more than 4000000"),
        HttpCase("batch of one object", {"content-type": BATCH}, structured("s"), 400, "unreadable", "a JSON array"),
    ]
