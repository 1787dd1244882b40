"""The envelope and its headers, frozen: what came from Kafka byte for byte, what it says once decoded, what goes out.
No codec and no client lives here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID

from factmesh.errors import DecodeError
from factmesh.ids import Root
from factmesh.values import frozen_value

Headers = tuple[tuple[str, bytes | None], ...]

H_TRACEPARENT = "traceparent"
H_ROOT_ID = "factmesh-root-id"
H_OPENING = "factmesh-opening"
H_GROUP = "factmesh-group"
OPENING_HEADERS = frozenset({H_ROOT_ID, H_OPENING, H_GROUP})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@frozen_value
class Delivery:
    """One record as the broker gave it, byte for byte. `timestamp_ms` is Kafka's record timestamp."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    timestamp_ms: int = 0

    @property
    def where(self) -> str:
        """Its coordinates, as error texts and DLQ headers name them."""
        return f"{self.topic}[{self.partition}]@{self.offset}"

    def header(self, name: str) -> str | None:
        """The last header of that name as UTF-8 text, or None. Undecodable bytes read as None."""
        for key, raw in reversed(self.headers):
            if key == name and raw is not None:
                try:
                    return raw.decode()
                except UnicodeDecodeError:
                    return None
        return None

    @property
    def opening(self) -> int:
        """The number of the replay that this is; 0 is the message itself, also where the headers are no replay's."""
        raw = self.header(H_OPENING)
        if raw is None or Root.parse(self.header(H_ROOT_ID) or "") is None:
            return 0
        # ASCII and short: int() raises on "²", which is a digit, and on more than 4,300 of them.
        return int(raw) if raw.isascii() and raw.isdigit() and len(raw) <= 9 else 0

    @property
    def root_override(self) -> Root | None:
        """The root that a replay names; None on a message that is not one."""
        raw = self.header(H_ROOT_ID)
        return Root.parse(raw) if raw is not None and self.opening > 0 else None

    @property
    def original_headers(self) -> Headers:
        """The headers without those that a replay added."""
        return tuple((k, v) for k, v in self.headers if k not in OPENING_HEADERS)


@frozen_value
class Message:
    """A decoded message. `record` is the decoded Avro record (or canonical event); treat it as read-only.

    `kind` is the record's name (`fact`, `command`, `resolution`, `result`, `signal`, `status`, or what a service's
    own decoder says). `id` is the message's own id, None where the sender is a stranger: then `root` tells it apart.
    `hash` is the body hash by which conflicts are judged. `instant_ms` is when its root cause was first seen.
    """

    delivery: Delivery
    kind: str
    root: Root
    id: UUID | None
    opening: int
    record: Mapping[str, Any]
    hash: bytes
    instant_ms: int
    writer_schema_id: int | None = None
    own: Root | None = None
    """A stranger's own identity, where a replay's `root` is another one; services' own records leave it None."""

    def __getitem__(self, name: str) -> Any:
        return self.record[name]

    @property
    def instance_id(self) -> UUID | None:
        """The instance that the message is about, if its record names one."""
        raw = self.record.get("instance_id")
        return UUID(raw) if raw else None

    @property
    def traceparent(self) -> str | None:
        return self.record.get("traceparent") or None

    @property
    def where(self) -> str:
        return f"{self.kind} {self.id or self.root.text} at {self.delivery.where}"


@frozen_value
class Emission:
    """Bytes to publish, exactly as the ledger keeps them. `topic` is the full topic name, namespace included."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


_NUMBER = struct.Struct(">i").pack
_NONE = _NUMBER(-1)


_NAMES_MAX = 1024
_NAME_CHARS_MAX = 249
"""What Kafka lets a topic's name be; a stranger's header may be longer, and is not worth remembering."""
_names: dict[str, bytes] = {}
"""Names of topics and headers with their lengths before them: few, and each is packed many times a batch."""


def _named(text: str) -> bytes:
    raw = text.encode()
    packed = _NUMBER(len(raw)) + raw
    if len(text) <= _NAME_CHARS_MAX and len(_names) < _NAMES_MAX:
        _names[text] = packed
    return packed


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def number(self) -> int:
        (n,) = struct.unpack_from(">i", self.raw, self.at)
        self.at += 4
        return int(n)

    def take(self) -> bytes | None:
        n = self.number()
        if n < 0:
            return None
        if self.at + n > len(self.raw):
            raise DecodeError("packed bytes end early", hint="the ledger row was written by something else")
        part = self.raw[self.at : self.at + n]
        self.at += n
        return part

    def text(self) -> str:
        return (self.take() or b"").decode()


def pack(emissions: Sequence[Emission]) -> bytes | None:
    """Emissions as the ledger's `emitted` column holds them; None for none.

    Lengths come before bytes; a length of -1 stands for None, as in Kafka's own record format.
    """
    if not emissions:
        return None
    parts = [b"\x01", _NUMBER(len(emissions))]
    known = _names.get
    for e in emissions:
        key, value, headers = e.key, e.value, e.headers
        parts.append(known(e.topic) or _named(e.topic))
        parts += (_NONE,) if key is None else (_NUMBER(len(key)), key)
        parts += (_NONE,) if value is None else (_NUMBER(len(value)), value)
        parts.append(_NUMBER(len(headers)))
        for name, raw in headers:
            parts.append(known(name) or _named(name))
            parts += (_NONE,) if raw is None else (_NUMBER(len(raw)), raw)
    return b"".join(parts)


def unpack(raw: bytes | None) -> tuple[Emission, ...]:
    """The inverse of `pack`. Raises DecodeError when the bytes are not of this format."""
    if not raw:
        return ()
    if raw[0] != 1:
        raise DecodeError(f"packed emissions of unknown format {raw[0]}", hint="a newer version wrote this row")
    reader = _Reader(raw)
    reader.at = 1
    emissions = []
    for _ in range(reader.number()):
        topic, key, value = reader.text(), reader.take(), reader.take()
        headers = tuple((reader.text(), reader.take()) for _ in range(reader.number()))
        emissions.append(Emission(topic, key, value, headers))
    return tuple(emissions)


def pack_delivery(delivery: Delivery) -> bytes:
    """A delivery with its coordinates, for rows that may have to dead-letter it later."""
    head = struct.pack(">iqq", delivery.partition, delivery.offset, delivery.timestamp_ms)
    body = pack([Emission(delivery.topic, delivery.key, delivery.value, delivery.headers)])
    assert body is not None
    return head + body


def unpack_delivery(raw: bytes) -> Delivery:
    """The inverse of `pack_delivery`."""
    size = struct.calcsize(">iqq")
    partition, offset, timestamp_ms = struct.unpack_from(">iqq", raw)
    (e,) = unpack(raw[size:])
    return Delivery(e.topic, partition, offset, e.key, e.value, e.headers, timestamp_ms)


def to_ms(instant: datetime) -> int:
    """Unix milliseconds of an aware datetime."""
    # In whole numbers: through a float, one in a few hundred instants came back a millisecond earlier.
    return (instant - _EPOCH) // _MILLISECOND


def from_ms(ms: int) -> datetime:
    """The aware UTC datetime of Unix milliseconds."""
    return _EPOCH + ms * _MILLISECOND


@lru_cache(maxsize=64)  # all that a batch emits carries one instant
def rfc3339(ms: int) -> str:
    """Unix milliseconds as RFC 3339 text in UTC."""
    return from_ms(ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")
