"""Our own records: kinds, envelopes and body hashes over the Avro codec; facts' own schemas are read here too.
No client and no clock lives here, and a decode never waits: `needs_schema` says what must be fetched before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import orjson

from factmesh import avro, schema_files
from factmesh.avro import Schema
from factmesh.avro_fast import NOT_PLAIN
from factmesh.avro_strict import strip_logical
from factmesh.errors import DecodeError, SchemaError, TransientError, ValidationError
from factmesh.ids import INSTANT_MS_MAX, Root, instant_ms_of, is_ours, uuid_of
from factmesh.message import Delivery, Message
from factmesh.records_fast import HASH_PERSON, Encode, Read, Rules
from factmesh.registry import Registry

SUBJECT_PREFIX: Final = "factmesh."
INSTANT_MS_MIN: Final = -62_135_596_800_000
"""The first millisecond of year 1: below it PostgreSQL and datetime disagree about what exists."""
UUID_FIELDS: Final = frozenset({"ce_id", "instance_id", "command_id", "idempotency_key", "record_id"})
MAY_BE_EMPTY: Final = frozenset({"instance_id"})
"""A signal about a fact that started nothing yet has no instance."""
UNHASHED: Final = frozenset({"ce_time", "traceparent", "instance_seq"})
"""What may differ between true repeats: senders restamp them. `occurred_at` is never left out (DESIGN section 7)."""
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class _Shape:
    """What decoding asks of one version of a record, beyond Avro's types; compiled once."""

    __slots__ = ("_numbers_of", "_others", "_texts_of", "defaults", "encode", "read", "texts", "times", "uuids")

    def __init__(self, schema: Schema) -> None:
        fields = schema.source["fields"]
        self.defaults = {f["name"]: f["default"] for f in fields if "default" in f}
        self.uuids = tuple(f["name"] for f in fields if f["name"] in UUID_FIELDS)
        self.times = tuple(f["name"] for f in fields if _is_time(f["type"]))
        self.texts = tuple(f["name"] for f in fields if "string" in _branches(f["type"]))
        required = {f["name"]: f["type"] for f in fields if "default" not in f and f["name"] not in UNHASHED}
        texts = sorted(n for n, t in required.items() if t == "string")
        numbers = sorted(n for n, t in required.items() if _branches(t)[0] in ("int", "long"))
        self._texts_of = _tuple_getter(texts)
        self._numbers_of = _tuple_getter(numbers)
        self._others = tuple(
            (n, self.defaults.get(n, _ABSENT))
            for n in sorted(schema.field_names)
            if n not in UNHASHED
            and not (n in required and (required[n] == "string" or _branches(required[n])[0] in ("int", "long")))
        )
        rules = Rules(
            uuids=frozenset(self.uuids),
            times=frozenset(self.times),
            time_bounds=(INSTANT_MS_MIN, INSTANT_MS_MAX),
            hashed_texts=tuple(texts),
            hashed_numbers=tuple(numbers),
            hashed_others=tuple(name for name, _ in self._others),
        )
        fast = schema.compile(rules)
        self.encode: Encode | None = fast[0] if fast else None
        self.read: Read | None = fast[1] if fast else None

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Raise ValidationError for ids that are none, instants outside the calendar, and NUL in a text."""
        for name in self.uuids:
            raw = record[name]
            if raw is not None and not _UUID.fullmatch(raw) and not (raw == "" and name in MAY_BE_EMPTY):
                raise _wrong(name, "is not a UUID in lower case", where)
        for name in self.times:
            ms = record[name]
            if ms is not None and not INSTANT_MS_MIN <= ms <= INSTANT_MS_MAX:
                raise _wrong(name, "is not an instant of the years 1 to 9999 in Unix milliseconds", where)
        for name in self.texts:
            text = record[name]
            if text is not None and "\0" in text:
                raise _wrong(name, "holds a NUL character, which PostgreSQL cannot store", where)

    def hash(self, record: Mapping[str, Any]) -> bytes:
        """16 bytes over the fields that a repeat keeps. A field at its default is left out, so that a version which
        adds a field does not turn the repeats of older messages into conflicts; those without a default are the same
        in all versions. Lengths come before texts: no two bodies read the same.
        """
        texts = self._texts_of(record)
        parts = [f"{[len(t) for t in texts]}{self._numbers_of(record)}{''.join(texts)}".encode()]
        for name, default in self._others:
            value = record[name]
            if value != default:
                raw = value if type(value) is bytes else str(value).encode()
                parts.append(f"{name}={len(raw)}:".encode())
                parts.append(raw)
        return blake2b(b"".join(parts), digest_size=16, person=HASH_PERSON).digest()


class _Absent:
    """Stands for `no default`; equal to nothing."""


_ABSENT: Final = _Absent()


@dataclass(frozen=True, slots=True)
class _Route:
    """How bytes of one writer's schema are read: `writer is reader` where both say the same."""

    id: int
    kind: str
    writer: Schema
    reader: Schema
    writer_shape: _Shape
    reader_shape: _Shape


class Records:
    """The platform's records, written with the newest version that this code carries, read from any registered one.

    The reader is this code's version, not the registry's newest: after a rollback old code meets newer bytes.
    """

    def __init__(self, registry: Registry, own: Mapping[str, Schema]) -> None:
        self._registry = registry
        self._own = dict(own)
        self._shapes = {kind: _Shape(schema) for kind, schema in own.items()}
        self._by_fullname = {schema.fullname: kind for kind, schema in own.items()}
        self._routes: dict[int, _Route] = {}
        self._plain: dict[bytes, tuple[_Route, Read]] = {}

    @classmethod
    async def open(cls, registry: Registry, schemas_dir: Path | None = None) -> Records:
        """Ready to encode: each own schema under the id that the registry gave it.

        Raises SchemaError when one is not registered, TransientError when the registry cannot be asked.
        """
        newest: dict[str, Schema] = {}
        for file in schema_files.read_dir(schemas_dir or schema_files.platform_dir()):
            newest[file.schema.subject.removeprefix(SUBJECT_PREFIX)] = file.schema
        return cls(registry, {kind: await registry.find(schema) for kind, schema in newest.items()})

    @property
    def kinds(self) -> frozenset[str]:
        """The names of our records."""
        return frozenset(self._own)

    def schema(self, kind: str) -> Schema:
        """The newest version of a record that this code knows."""
        found = self._own.get(kind)
        if found is None:
            raise SchemaError(f"no record is called {kind!r}", hint=f"one of {', '.join(sorted(self._own))}")
        return found

    def encode(self, kind: str, body: Mapping[str, Any]) -> bytes:
        """Framed bytes; fields that have a default may be left out. Raises ValidationError naming the field."""
        shape = self._shapes.get(kind)
        if shape is not None and shape.encode is not None:
            try:
                return shape.encode(body)
            except NOT_PLAIN:
                pass  # what follows judges it and words what is wrong
        schema = self.schema(kind)
        shape = self._shapes[kind]
        record = {**shape.defaults, **body}
        value = avro.encode(schema, record, kind)
        shape.check(record, kind)
        return value

    def needs_schema(self, delivery: Delivery) -> int | None:
        """The schema id that `await registry.by_id(…)` must fetch before `decode`; None when nothing is missing."""
        value = delivery.value
        if value is None or len(value) < avro.PREFIX_BYTES or value[0] != avro.MAGIC:
            return None
        id = int.from_bytes(value[1 : avro.PREFIX_BYTES], "big")
        return None if id in self._routes or self._registry.cached(id) is not None else id

    def decode(self, delivery: Delivery) -> Message:
        """One of our records as a message. Raises DecodeError, SchemaError or ValidationError: poison, each of them."""
        value = delivery.value
        plain = self._plain.get(value[: avro.PREFIX_BYTES]) if value is not None else None
        if plain is not None and value is not None:
            route, read = plain
            try:
                record, hashed = read(value)
            except NOT_PLAIN:
                pass  # what follows judges it and words what is wrong
            else:
                return self._message(delivery, route, record, hashed)
        where = delivery.where
        id = avro.peek_schema_id(value, where)
        assert value is not None
        route = self._routes.get(id) or self._route(id, where)
        written = avro.decode(value, route.writer, None, where)
        hashed = route.writer_shape.hash(written)
        record = written
        if route.writer is not route.reader:
            record = avro.decode(value, route.writer, route.reader, where)
        route.reader_shape.check(record, where)
        return self._message(delivery, route, record, hashed)

    def _message(self, delivery: Delivery, route: _Route, record: dict[str, Any], hashed: bytes) -> Message:
        own_text = record["ce_id"]
        own_id = uuid_of(int(own_text.replace("-", ""), 16))
        instant_ms = instant_ms_of(own_id)
        if not is_ours(own_id) or instant_ms > INSTANT_MS_MAX:
            raise _wrong("ce_id", "is not an id of ours (UUID version 8 that begins with an instant)", delivery.where)
        opened = delivery.root_override if delivery.headers else None
        return Message(
            delivery,
            route.kind,
            opened or Root(f"id:{own_text}", own_id),  # Root.own, without formatting the id again
            own_id,
            delivery.opening if opened else 0,
            record,
            hashed,
            instant_ms,
            route.id,
        )

    def expect(self, kinds: Collection[str]) -> Callable[[Delivery], Message]:
        """A decoder for a topic that carries these kinds only; another kind is a DecodeError."""
        for kind in kinds:
            self.schema(kind)
        wanted = frozenset(kinds)

        def decode(delivery: Delivery) -> Message:
            message = self.decode(delivery)
            if message.kind not in wanted:
                raise DecodeError(
                    f"a {message.kind} record on a topic for {', '.join(sorted(wanted))}",
                    where=delivery.where,
                    hint="its producer used the wrong topic: discard it there and send it to the right one",
                )
            return message

        return decode

    def _route(self, id: int, where: str) -> _Route:
        writer = self._registry.cached(id)
        if writer is None:
            raise TransientError(
                f"schema id {id} has not been fetched yet", where=where, hint="await registry.by_id first"
            )
        kind = self._by_fullname.get(writer.fullname)
        if kind is None:
            raise DecodeError(
                f"written with {writer.label}, which is no record of the platform",
                where=where,
                hint=f"this topic carries {', '.join(sorted(self._own))}",
            )
        reader = self._own[kind]
        if strip_logical(writer.source) == strip_logical(reader.source):
            # Not `writer is reader` only: a server gives back another object, and identity is the fast path.
            writer = reader.registered(subject=reader.subject, version=reader.version, id=id)
            reader = writer
        route = _Route(id, kind, writer, reader, _Shape(writer), _Shape(reader))
        self._routes[id] = route
        if writer is reader and route.reader_shape.read is not None:
            self._plain[bytes([avro.MAGIC]) + id.to_bytes(4, "big")] = (route, route.reader_shape.read)
        return route


def read_json(message: Message, field: str) -> dict[str, Any]:
    """A bytes field of a message as the JSON object that it must be. Raises ValidationError naming the field."""
    raw = message.record.get(field)
    try:
        value = orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError as error:
        raise _wrong(field, f"is not JSON: {error}", message.where) from None
    if not isinstance(value, dict):
        raise _wrong(field, f"is not a JSON object but {type(value).__name__}", message.where)
    return value


def fact_needs_schema(registry: Registry, value: bytes | None) -> int | None:
    """The schema id that must be fetched before `decode_fact`; None when it is at hand or the bytes name none."""
    if value is None or len(value) < avro.PREFIX_BYTES or value[0] != avro.MAGIC:
        return None
    id = int.from_bytes(value[1 : avro.PREFIX_BYTES], "big")
    return None if registry.cached(id) is not None else id


def decode_fact(registry: Registry, value: bytes | None, where: str = "") -> tuple[Schema, dict[str, Any]]:
    """The writer's schema of a fact's framed data, and the record as it was written; timestamps are integers.

    The next version's view of it: `avro.resolve(record, writer, reader)`; as JSON: `avro_json.to_json(writer, record)`.
    """
    id = avro.peek_schema_id(value, where)
    assert value is not None
    writer = registry.cached(id)
    if writer is None:
        raise TransientError(f"schema id {id} has not been fetched yet", where=where, hint="await registry.by_id first")
    if writer.subject.startswith(SUBJECT_PREFIX):
        raise DecodeError(
            f"written with {writer.label}, which is a record between our services and no fact",
            where=where,
            hint="write the fact with its own schema",
        )
    return writer, avro.decode(value, writer, None, where)


def _wrong(field: str, what: str, where: str) -> ValidationError:
    return ValidationError(f"field {field} {what}", where=where, hint="correct the field and replay the message")


def _tuple_getter(names: list[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """The values of these names as a tuple, also of one name or none."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda record: tuple(record[n] for n in names)


def _branches(node: Any) -> tuple[str, ...]:
    kinds = node if isinstance(node, list) else [node]
    return tuple(str(k["type"]) if isinstance(k, Mapping) else str(k) for k in kinds)


def _is_time(node: Any) -> bool:
    if isinstance(node, list):
        return any(_is_time(branch) for branch in node)
    return isinstance(node, Mapping) and node.get("logicalType") == "timestamp-millis"
