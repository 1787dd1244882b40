"""CloudEvents 1.0 as they may enter: Kafka and HTTP bindings, binary, structured and batch, into one frozen `Event`.
Pure. Attributes are checked by the letter of the specification; what the data means is the adapters' matter.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from datetime import datetime
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from factmesh.errors import DecodeError, ValidationError
from factmesh.message import Delivery
from factmesh.values import frozen_value
from factmesh_intake import strict_json
from factmesh_intake.model import FieldError, NaiveTimeError, UnsupportedMediaError

EVENT_JSON = "application/cloudevents+json"
BATCH_JSON = "application/cloudevents-batch+json"
AVRO_TYPES = frozenset(
    {"application/avro", "avro/binary", "application/vnd.apache.avro", "application/vnd.confluent.avro"}
)
JSON = "application/json"
AVRO = "application/avro"

KAFKA_PREFIX = "ce_"
HTTP_PREFIX = "ce-"

CHARS_MAX: Mapping[str, int] = {"id": 255, "source": 512, "type": 128, "subject": 1024, "dataschema": 1024, "time": 64}
"""Long enough for URIs and ids in use, short enough that every one fits a header, an index and a log line."""
EXTENSIONS_MAX = 32
EXTENSION_CHARS_MAX = 1024
BATCH_EVENTS_MAX = 500
"""One request is one wait for acknowledgements; more belongs on the Kafka topic."""

_NAME = re.compile(r"[a-z0-9]{1,64}")
_TYPE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_URI_REFERENCE = re.compile(r"(?:[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})+")
_RFC3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(?:\.\d{1,9})?(?P<offset>[Zz]|[+-]\d{2}:\d{2})?")
#: Control characters and noncharacters, which a CloudEvents String must not hold (1.0.2, section "Type System").
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_CORE = frozenset({"specversion", "id", "source", "type", "time", "subject", "dataschema", "datacontenttype"})


@frozen_value
class Event:
    """One event. `data` is the bytes of its payload in `content_type`, exactly one of `JSON` or `AVRO`."""

    id: str
    source: str
    type: str
    content_type: str
    data: bytes
    time: datetime | None = None
    subject: str | None = None
    dataschema: str | None = None
    extensions: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """How error texts name it."""
        return f"event {self.id} of {self.source}"


def media_type(content_type: str | None) -> str:
    """The media type without parameters, in lower case; "" for none. Raises ValidationError for a charset not UTF-8."""
    head, *parameters = (content_type or "").split(";")
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "charset" and value.strip('" ').lower() not in {"utf-8", "utf8"}:
            raise FieldError("content-type", "a charset that is not UTF-8", hint="encode it as UTF-8")
    return head.strip().lower()


def instant(text: str, name: str) -> datetime:
    """The aware datetime of an RFC 3339 text. Raises FieldError naming the field; one without offset is refused."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise FieldError(name, "not an RFC 3339 timestamp", hint="write it like 2026-03-01T09:30:00Z")
    if match["offset"] is None:
        raise NaiveTimeError(
            name,
            "a timestamp without an offset: nobody can say which instant it is",
            hint="add Z or an offset like +01:00, or declare the zone in the adapter",
        )
    text = text.upper()
    if "." in text:
        text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise FieldError(name, "a date or time that does not exist", hint="correct it") from None


# --- Kafka binding ---------------------------------------------------------------------------------------------------


def from_kafka(delivery: Delivery) -> Event:
    """The event of a record on `facts.raw`. Raises DecodeError or ValidationError naming its coordinates."""
    try:
        if delivery.value is None:
            raise DecodeError(
                "a record without a value (a tombstone)", hint="facts.raw is not compacted; publish an event"
            )
        kind = media_type(delivery.header("content-type"))
        if kind == EVENT_JSON:
            return from_json(strict_json.parse(delivery.value))
        if kind.startswith("application/cloudevents"):
            raise DecodeError(
                "a CloudEvents format that is not spoken here",
                hint=f"use binary mode or {EVENT_JSON}, one event a record",
            )
        return _binary(_kafka_attributes(delivery), kind, delivery.value)
    except (DecodeError, ValidationError) as error:
        raise _at(error, delivery.where) from None


def identity_of(delivery: Delivery) -> tuple[str, str] | None:
    """(source, id) from binary-mode headers alone, for a record whose value nobody can read; else None."""
    source, event_id = delivery.header("ce_source"), delivery.header("ce_id")
    return (source, event_id) if source and event_id else None


def to_kafka(event: Event) -> tuple[tuple[str, bytes], ...]:
    """The headers of the Kafka binding's binary mode; the value is `event.data` as it is."""
    given: list[tuple[str, str | None]] = [
        ("ce_specversion", "1.0"),
        ("ce_id", event.id),
        ("ce_source", event.source),
        ("ce_type", event.type),
        ("ce_time", event.time.isoformat() if event.time else None),
        ("ce_subject", event.subject),
        ("ce_dataschema", event.dataschema),
        ("content-type", event.content_type),
        *((KAFKA_PREFIX + name, value) for name, value in event.extensions.items()),
    ]
    return tuple((name, value.encode()) for name, value in given if value is not None)


def _kafka_attributes(delivery: Delivery) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, raw in delivery.headers:
        if not name.startswith(KAFKA_PREFIX) or raw is None:
            continue
        short = name[len(KAFKA_PREFIX) :]
        if short in found:
            raise FieldError(name, "the header is there twice", hint="send each attribute once")
        try:
            found[short] = raw.decode()
        except UnicodeDecodeError:
            raise DecodeError("the header is not UTF-8", where=name, hint="encode it as UTF-8") from None
    if not found:
        raise DecodeError(
            "no CloudEvents headers and not structured mode",
            hint=f"send ce_specversion, ce_id, ce_source, ce_type, or content-type {EVENT_JSON}",
        )
    return found


# --- HTTP binding ----------------------------------------------------------------------------------------------------


def http_mode(headers: Iterable[tuple[str, str]]) -> str:
    """`structured`, `batch`, `binary`, or "" for a format of events that is not spoken here."""
    names = {name.lower(): value for name, value in headers}
    kind = media_type(names.get("content-type"))
    if kind == EVENT_JSON:
        return "structured"
    if kind == BATCH_JSON:
        return "batch"
    return "" if kind.startswith("application/cloudevents") else "binary"


def from_http_binary(headers: Iterable[tuple[str, str]], body: bytes) -> Event:
    """The event of a binary-mode request; header names in any case."""
    found: dict[str, str] = {}
    content_type: str | None = None
    for raw_name, value in headers:
        name = raw_name.lower()
        if name == "content-type":
            content_type = value
        elif name.startswith(HTTP_PREFIX):
            short = name[len(HTTP_PREFIX) :]
            if short in found:
                raise FieldError(name, "the header is there twice", hint="send each attribute once")
            found[short] = _header_text(name, value)
    return _binary(found, media_type(content_type), body)


def from_http_batch(body: bytes) -> list[Event | DecodeError | ValidationError]:
    """The events of a batch in order, each judged alone. Raises DecodeError where the batch itself cannot be read."""
    items = strict_json.parse(body)
    if not isinstance(items, list):
        raise DecodeError("a batch is a JSON array of events", hint=f"send one event as {EVENT_JSON}")
    if len(items) > BATCH_EVENTS_MAX:
        raise ValidationError(
            f"{len(items)} events in one batch, more than {BATCH_EVENTS_MAX}", hint="split it, or publish to Kafka"
        )
    events: list[Event | DecodeError | ValidationError] = []
    for item in items:
        try:
            events.append(from_json(item))
        except (DecodeError, ValidationError) as error:
            events.append(error)
    return events


def _header_text(name: str, value: str) -> str:
    """Unquoted, then percent-decoded once (CloudEvents HTTP binding 1.0.2, section 3.1.3.2)."""
    text = value.strip()
    if text.isascii() and "%" not in text and not text.startswith('"'):
        return text
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    try:
        # Starlette hands headers out as Latin-1; bytes beyond ASCII are not legal there and must have been encoded.
        return unquote_to_bytes(text.encode("ascii")).decode()
    except UnicodeError:
        raise DecodeError("not percent-encoded UTF-8", where=name, hint="percent-encode it as UTF-8") from None


# --- JSON event format -----------------------------------------------------------------------------------------------


def from_json(value: Any) -> Event:
    """The event of a parsed JSON object (CloudEvents JSON format 1.0.2)."""
    if not isinstance(value, dict):
        raise DecodeError("an event is a JSON object", hint='send {"specversion": "1.0", …}')
    found: dict[str, str] = {}
    for name, given in value.items():
        if name in {"data", "data_base64"} or given is None:
            continue
        if isinstance(given, bool):
            given = "true" if given else "false"
        elif isinstance(given, int) and name not in _CORE:
            given = str(given)
        if not isinstance(given, str):
            raise FieldError(name[:64], f"text is expected, found {type(given).__name__}", hint="send text")
        found[name] = given
    return _event(found, *_json_data(value, media_type(found.get("datacontenttype"))))


def _json_data(value: Mapping[str, Any], kind: str) -> tuple[str, bytes]:
    """(content type, data) of a structured event: `data` holds JSON, `data_base64` any bytes, never both."""
    encoded = value.get("data_base64")
    if encoded is not None:
        if value.get("data") is not None:
            raise FieldError("data", "data and data_base64 are both there", hint="send one of them")
        if not isinstance(encoded, str):
            raise FieldError("data_base64", "text is expected", hint="send base64 (RFC 4648)")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise DecodeError("not base64", where="data_base64", hint="send base64 with padding (RFC 4648)") from None
        return _content_type(kind, raw), raw
    if value.get("data") is None:
        raise FieldError("data", "the event has no data", hint="a fact without data says nothing; send it")
    if not (kind == "" or kind == JSON or kind.endswith("+json")):
        raise FieldError(
            "datacontenttype", "data is JSON but datacontenttype says otherwise", hint="use data_base64 for Avro"
        )
    try:
        return JSON, orjson.dumps(value["data"])
    except orjson.JSONEncodeError:
        raise FieldError("data", "a number beyond 64 bits", hint="send it as text") from None


# --- attributes ------------------------------------------------------------------------------------------------------


def _binary(found: dict[str, str], kind: str, data: bytes) -> Event:
    """In binary mode the transport's own content type is the attribute `datacontenttype`."""
    if "datacontenttype" in found:
        raise FieldError("datacontenttype", "not a header of binary mode", hint="send content-type")
    return _event(found, _content_type(kind, data), data)


def _content_type(kind: str, data: bytes) -> str:
    if not data:
        raise FieldError("data", "the event has no data", hint="a fact without data says nothing; send it")
    if kind in AVRO_TYPES:
        return AVRO
    if kind == JSON or kind.endswith("+json"):
        return JSON
    if kind in {"", "application/octet-stream"}:
        # The wire format begins with a zero byte, which no JSON text can.
        return AVRO if data[0] == 0 else JSON
    raise UnsupportedMediaError(
        "content-type", "a content type that no fact has", hint=f"send {JSON}, or {AVRO} in Confluent wire format"
    )


def _event(found: Mapping[str, str], content_type: str, data: bytes) -> Event:
    for name in ("specversion", "id", "source", "type"):
        if not found.get(name):
            raise FieldError(name, "required and missing or empty", hint="CloudEvents 1.0 requires it")
    if found["specversion"] != "1.0":
        raise FieldError("specversion", "not a version that is spoken here", hint="send 1.0")
    for name, text in found.items():
        (_check_again if name in _REPEATED else _check_attribute)(name, text)
    extensions = {name: text for name, text in found.items() if name not in _CORE}
    if len(extensions) > EXTENSIONS_MAX:
        raise ValidationError(f"{len(extensions)} extension attributes, more than {EXTENSIONS_MAX}", hint="send fewer")
    time = found.get("time")
    return Event(
        id=found["id"],
        source=found["source"],
        type=found["type"],
        content_type=content_type,
        data=data,
        time=instant(time, "time") if time else None,
        subject=found.get("subject") or None,
        dataschema=found.get("dataschema") or None,
        extensions=extensions,
    )


def _check_attribute(name: str, text: str) -> None:
    if name not in _CORE and not _NAME.fullmatch(name):
        raise FieldError(name[:64], "not an attribute name of CloudEvents", hint="lower-case letters and digits only")
    if len(text) > (limit := CHARS_MAX.get(name, EXTENSION_CHARS_MAX)):
        raise FieldError(name, f"{len(text)} characters, more than {limit}", hint="shorten it")
    if not (text.isascii() and text.isprintable()) and _FORBIDDEN.search(text):
        raise FieldError(name, "control characters or noncharacters", hint="remove them")
    if name == "type" and not _TYPE.fullmatch(text):
        raise FieldError(name, "not a fact type", hint="types are noun.verb_past, in lower case")
    if name in {"source", "dataschema"} and not _URI_REFERENCE.fullmatch(text):
        raise FieldError(name, "not a URI reference", hint="percent-encode what RFC 3986 does not allow")


_REPEATED = frozenset({"specversion", "source", "type", "dataschema", "datacontenttype"})
#: What all events of one sender share is judged once; of what is refused nothing is kept.
_check_again = lru_cache(maxsize=512)(_check_attribute)


def _at(error: DecodeError | ValidationError, where: str) -> DecodeError | ValidationError:
    """The same error, with the record's coordinates as its place."""
    error.where = f"{where}, {error.where}" if error.where else where
    return error
