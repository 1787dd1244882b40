"""CloudEvents as they may enter: every mode of both bindings, and everything that the specification forbids.
Requests and records are written out by hand, as a sender that has never heard of Factmesh would make them.
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh.errors import DecodeError, FactmeshError, ValidationError
from factmesh.message import Delivery
from factmesh_intake import events, strict_json
from factmesh_intake.events import Event
from factmesh_intake.model import FieldError, NaiveTimeError, UnsupportedMediaError

MINIMAL = {"specversion": "1.0", "id": "A234-1234-1234", "source": "/mycontext", "type": "com.example.someevent"}


def record(value: bytes | None, **headers: str) -> Delivery:
    pairs = tuple((name.replace("__", "-"), text.encode()) for name, text in headers.items())
    return Delivery("facts.raw", 3, 17, None, value, pairs)


def binary(value: bytes = b"{}", content_type: str = "application/json", **more: str) -> Delivery:
    headers = {f"ce_{k}": v for k, v in {**MINIMAL, **more}.items()}
    return record(value, content__type=content_type, **headers) if content_type else record(value, **headers)


# --- Kafka -----------------------------------------------------------------------------------------------------------


def test_kafka_binary_mode() -> None:
    """A1: attributes are ce_ headers, datacontenttype is content-type, the value is the data (Kafka binding 1.0.2)."""
    event = events.from_kafka(
        binary(
            b'{"a":1}',
            "application/json; charset=UTF-8",
            time="2020-11-03T12:34:56+01:00",
            subject="s",
            dataschema="https://x/v1",
            sequence="7",
        )
    )
    assert event == Event(
        id="A234-1234-1234",
        source="/mycontext",
        type="com.example.someevent",
        content_type="application/json",
        data=b'{"a":1}',
        time=datetime(2020, 11, 3, 11, 34, 56, tzinfo=UTC),
        subject="s",
        dataschema="https://x/v1",
        extensions={"sequence": "7"},
    )


@pytest.mark.parametrize(
    ("content_type", "value", "kind"),
    [
        ("application/avro", b"\0\0\0\0\x01x", events.AVRO),
        ("application/vnd.apache.avro", b"\0\0\0\0\x01x", events.AVRO),
        ("", b"\0\0\0\0\x01x", events.AVRO),
        ("", b"{}", events.JSON),
        ("application/vnd.example+json", b"{}", events.JSON),
        ("APPLICATION/JSON", b"{}", events.JSON),
    ],
)
def test_the_format_of_the_data_is_told_by_the_content_type(content_type: str, value: bytes, kind: str) -> None:
    """A1: JSON and Avro in the wire format; without a content type the first byte tells."""
    assert events.from_kafka(binary(value, content_type)).content_type == kind


def test_kafka_structured_mode() -> None:
    """A1: the whole event is the value; data is JSON, or any bytes in base64."""
    whole = {**MINIMAL, "data": {"a": 1.5, "b": None}, "count": 3, "flag": True, "subject": None}
    event = events.from_kafka(record(json.dumps(whole).encode(), content__type="application/cloudevents+json"))
    assert json.loads(event.data) == {"a": 1.5, "b": None}
    assert event.extensions == {"count": "3", "flag": "true"}
    framed = b"\0\0\0\0\x01x"
    whole = {**MINIMAL, "datacontenttype": "application/avro", "data_base64": base64.b64encode(framed).decode()}
    event = events.from_kafka(record(json.dumps(whole).encode(), content__type="application/cloudevents+json"))
    assert (event.content_type, event.data) == (events.AVRO, framed)


def test_what_goes_to_kafka_comes_back_the_same() -> None:
    """A1, section 2: HTTP is an entrance to the same topic, so what it produces reads as what it was given."""
    event = events.from_json({**MINIMAL, "time": "2020-01-01T00:00:00Z", "subject": "ü", "x1": "y", "data": [1]})
    again = events.from_kafka(Delivery("facts.raw", 0, 0, None, event.data, events.to_kafka(event)))
    assert again == event


# --- HTTP ------------------------------------------------------------------------------------------------------------


def http(body: bytes = b"{}", **more: str) -> Event:
    headers = {f"CE-{name}": text for name, text in {**MINIMAL, **more}.items()}
    return events.from_http_binary([*headers.items(), ("Content-Type", "application/json")], body)


def test_http_binary_mode_reads_headers_in_any_case() -> None:
    """A1: header names are case-insensitive (RFC 9110)."""
    event = http(subject="s")
    assert (event.id, event.subject, event.data) == ("A234-1234-1234", "s", b"{}")


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),  # the specification's own example
        ('"quoted \\"text\\""', 'quoted "text"'),
        ("100%25", "100%"),
        ("plain", "plain"),
    ],
)
def test_http_headers_are_unquoted_and_percent_decoded_once(sent: str, meant: str) -> None:
    """A1: CloudEvents HTTP binding, section 3.1.3.2."""
    assert http(subject=sent).subject == meant


@given(st.text(alphabet=st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=100))
def test_any_text_survives_the_http_encoding(text: str) -> None:
    """A1: percent-encoding and decoding are inverse for every text that an attribute may hold."""
    encoded = "".join(c if "!" <= c <= "~" and c not in '"%' else quote(c, safe="") for c in text)
    assert http(subject=encoded).subject == text


def test_http_modes_are_told_apart_by_the_content_type() -> None:
    """A1: structured, batch, binary; a format that is not spoken is none of them."""
    mode = events.http_mode
    assert mode([("content-type", "application/cloudevents+json; charset=utf-8")]) == "structured"
    assert mode([("Content-Type", "application/cloudevents-batch+json")]) == "batch"
    assert mode([("content-type", "application/json"), ("ce-id", "1")]) == "binary"
    assert mode([("content-type", "application/cloudevents+protobuf")]) == ""


def test_a_batch_judges_each_event_alone() -> None:
    """A2: one bad event does not take the others with it."""
    good = {**MINIMAL, "data": {}}
    one, two, three = events.from_http_batch(json.dumps([good, {**good, "id": ""}, good]).encode())
    assert isinstance(one, Event)
    assert isinstance(two, FieldError)
    assert two.field == "id"
    assert isinstance(three, Event)
    assert events.from_http_batch(b"[]") == []
    with pytest.raises(DecodeError, match="a batch is a JSON array"):
        events.from_http_batch(b"{}")
    with pytest.raises(ValidationError, match="more than 500"):
        events.from_http_batch(b"[" + b",".join([b"1"] * 501) + b"]")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delivery", "kind", "text"),
    [
        (record(None), DecodeError, "tombstone"),
        (record(b"{}"), DecodeError, "no CloudEvents headers"),
        (record(b"{}", content__type="application/cloudevents+avro"), DecodeError, "not spoken"),
        (record(b"[]", content__type="application/cloudevents+json"), DecodeError, "an event is a JSON object"),
        (record(b'{"a":1,"a":2}', content__type="application/cloudevents+json"), DecodeError, "twice"),
        (binary(b""), FieldError, "data: the event has no data"),
        (binary(content_type="text/plain"), UnsupportedMediaError, "content-type"),
        (binary(content_type="application/json; charset=latin-1"), FieldError, "not UTF-8"),
        (binary(id=""), FieldError, "id: required"),
        (binary(specversion="0.3"), FieldError, "specversion"),
        (binary(id="x" * 256), FieldError, "id: 256 characters, more than 255"),
        (binary(source="a b"), FieldError, "source: not a URI reference"),
        (binary(type="SignedUp"), FieldError, "type: not a fact type"),
        (binary(subject="a\u0000b"), FieldError, "subject: control characters"),
        (binary(subject="\ufffe"), FieldError, "subject: control characters"),
        (binary(time="2026-01-01T00:00:00"), NaiveTimeError, "time: a timestamp without an offset"),
        (binary(time="yesterday"), FieldError, "time: not an RFC 3339"),
        (binary(time="2026-02-30T00:00:00Z"), FieldError, "time: a date or time that does not exist"),
        (binary(Bad_Name="x"), FieldError, "not an attribute name"),
        (binary(datacontenttype="application/json"), FieldError, "send content-type"),
    ],
)
def test_what_the_specification_forbids_is_refused_with_its_place(
    delivery: Delivery, kind: type[FactmeshError], text: str
) -> None:
    """A1, issue "Bad input": the error says what is wrong, at which record, and what to do."""
    with pytest.raises(kind) as caught:
        events.from_kafka(delivery)
    assert text in str(caught.value)
    assert "facts.raw[3]@17" in str(caught.value)
    assert caught.value.hint


def test_a_header_that_is_there_twice_is_refused() -> None:
    """A1: which of the two is meant would be a guess."""
    twice = binary()
    doubled = Delivery("t", 0, 0, None, b"{}", (*twice.headers, ("ce_id", b"other")))
    with pytest.raises(FieldError, match="ce_id: the header is there twice"):
        events.from_kafka(doubled)
    with pytest.raises(FieldError, match="ce-id: the header is there twice"):
        events.from_http_binary([("ce-id", "1"), ("CE-ID", "2")], b"{}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": {}, "data_base64": "e30="}, "both there"),
        ({"data_base64": "!"}, "not base64"),
        ({"data_base64": 7}, "data_base64: text is expected"),
        ({}, "data: the event has no data"),
        ({"data": {}, "datacontenttype": "application/avro"}, "datacontenttype"),
        ({"data": 2**70}, "data: a number beyond 64 bits"),
        ({"data": {}, "id": 5}, "id: text is expected"),
        ({"data": {}, "nested": {}}, "nested: text is expected"),
        ({"data": {}, **{f"x{n}": "y" for n in range(33)}}, "33 extension attributes"),
    ],
)
def test_a_structured_event_is_held_to_its_format(change: dict[str, Any], text: str) -> None:
    """A1: CloudEvents JSON format 1.0.2; nothing is coerced."""
    with pytest.raises(FactmeshError, match=text):
        events.from_json({**MINIMAL, **change})


# --- JSON at the edge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'[{"b": {"a": 1, "a": 1}}]', "the key 'a' is there twice"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"1e999", "too large for a double"),
        (b"9" * 5000, "a number of 5000 characters"),
        (b"[" * 33 + b"]" * 33, "nested deeper than 32 levels"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "a byte order mark"),
        (b"{} {}", "not JSON"),
        (b'"\\ud800"', "a lone surrogate"),
        (b'{"\\ud800": 1}', "a lone surrogate"),
        (b'"a\nb"', "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_that_may_mean_two_things_is_refused(raw: bytes, text: str) -> None:
    """Issue "Bad input": repeated keys, NaN, depth and size are refused before anything reads them."""
    with pytest.raises(DecodeError, match=text) as caught:
        strict_json.parse(raw)
    assert caught.value.hint


def test_depth_counts_brackets_outside_of_texts_only() -> None:
    """A text full of brackets is no depth."""
    assert strict_json.parse(json.dumps({"a": '[{\\"' * 200}).encode()) == {"a": '[{\\"' * 200}
    assert strict_json.parse(b"[" * 32 + b"]" * 32)


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_PLAIN)
def test_json_reads_as_the_standard_library_reads_it(value: Any) -> None:
    """What is not refused is what any JSON reader makes of it."""
    raw = json.dumps(value).encode()
    assert strict_json.parse(raw) == json.loads(raw)


_CHARS = st.characters(exclude_categories=("Cc", "Cs", "Cn"))
_NAMES = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(lambda n: n not in events._CORE and n not in {"data"})


@given(
    id_=st.text(_CHARS, min_size=1, max_size=255),
    subject=st.none() | st.text(_CHARS, min_size=1, max_size=200),
    time=st.none() | st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 1)),  # noqa: DTZ001  hypothesis wants it so
    extensions=st.dictionaries(_NAMES, st.text(_CHARS, min_size=1, max_size=50), max_size=5),
    data=_PLAIN.filter(lambda v: v is not None),
)
def test_every_event_survives_the_way_to_the_topic(
    id_: str, subject: str | None, time: datetime | None, extensions: dict[str, str], data: Any
) -> None:
    """A1: structured over HTTP, then binary on Kafka: the same event, whatever is in it."""
    whole: dict[str, Any] = {**MINIMAL, **extensions, "id": id_, "data": data}
    if subject is not None:
        whole["subject"] = subject
    if time is not None:
        whole["time"] = time.isoformat()
    event = events.from_json(strict_json.parse(json.dumps(whole).encode()))
    again = events.from_kafka(Delivery("facts.raw", 0, 0, None, event.data, events.to_kafka(event)))
    assert again == event
    assert (again.id, again.subject, again.extensions) == (id_, subject, extensions)


@given(st.datetimes(timezones=st.sampled_from([UTC]) | st.timezones().map(lambda z: z)))
def test_an_instant_is_read_exactly(at: datetime) -> None:
    """A3: an offset is obeyed to the microsecond; the same text without it is refused."""
    offset = at.utcoffset()
    assert offset is not None
    if offset % timedelta(minutes=1) or not 1 < at.year < 9999:
        return
    text = at.isoformat()
    # In UTC, since Python calls a time that a clock shows twice unequal to the same instant in another zone.
    assert events.instant(text, "t").astimezone(UTC) == at.astimezone(UTC)
    with pytest.raises(NaiveTimeError):
        events.instant(at.replace(tzinfo=None).isoformat(), "t")
