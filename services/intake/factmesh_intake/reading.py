"""Reads the data of an event with its writer's schema: Avro in the Confluent wire format, or strict JSON.
Also where projects' adapter files and fact schemas become a `Mapper`, once, at start. No mapping happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from factmesh import avro, avro_json, ids, records
from factmesh.document import Document
from factmesh.errors import DefinitionError, FactmeshError, ValidationError
from factmesh.evaluation import Expressions
from factmesh.ids import Root
from factmesh.message import H_TRACEPARENT, Delivery, Message
from factmesh.registry import Registry
from factmesh_intake import adapters, events, mapping, strict_json
from factmesh_intake.events import Event
from factmesh_intake.mapping import Mapper
from factmesh_intake.model import Incoming


def needs_schema(delivery: Delivery, registry: Registry) -> int | None:
    """The schema id that must be fetched before `decode`; None where nothing is missing or the bytes say none."""
    value = delivery.value or b""
    if value[:1] == b"\0":
        return records.fact_needs_schema(registry, value)
    if b"data_base64" not in value:
        return None  # a frame inside of JSON is base64; everything else is spared a second parsing
    try:
        return missing_schema(events.from_kafka(delivery), registry)
    except FactmeshError:
        return None  # decode says what is wrong with it


def missing_schema(event: Event, registry: Registry) -> int | None:
    """The schema id that must be fetched before `read`."""
    return records.fact_needs_schema(registry, event.data) if event.content_type == events.AVRO else None


def read(event: Event, registry: Registry) -> Incoming:
    """The event's data as JSON-plain values. Raises DecodeError, SchemaError or ValidationError naming the event.

    Avro data is seen as the JSON that its schema says (instants as RFC 3339), so that adapters see one form of it.
    """
    subject: str | None = None
    version = 0
    data: Any
    if event.content_type == events.AVRO:
        writer, record = records.decode_fact(registry, event.data, event.where)
        subject, version = writer.subject, writer.version
        data = avro_json.to_json(writer, record, event.where)
    else:
        data = strict_json.parse(event.data, where=event.where)
    return Incoming(
        id=event.id,
        source=event.source,
        type=event.type,
        data=data,
        bytes_size=len(event.data),
        subject=subject,
        version=version,
        event_subject=event.subject,
        dataschema=event.dataschema,
    )


def body_hash(incoming: Incoming) -> bytes:
    """What tells two bodies under one id apart: the type, the version and the values, however they were encoded.

    `ce_time` is no part of it, senders restamp it; a business instant is, as part of the data (DESIGN section 7).
    """
    named = mapping.version_in(incoming.dataschema) if incoming.dataschema else None
    version = str(incoming.version or (named[1] if named else ""))
    try:
        data = canonical(incoming.data)
    except ValueError:
        raise ValidationError(
            "a number that is not finite, which JSON cannot carry", where=incoming.where, hint="send null"
        ) from None
    return ids.body_hash(incoming.type, version, incoming.event_subject or "", data)


def canonical(data: Any) -> bytes:
    """`ids.canonical_json`. Where there is no float, whose digits the two write differently, orjson writes the same."""
    if _no_float(data):
        try:
            return orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
        except TypeError:
            pass  # a number beyond 64 bits
    return ids.canonical_json(data)


_PLAIN = frozenset({str, int, bool, type(None)})


def _no_float(data: Any) -> bool:
    kind = type(data)
    if kind is dict:
        return all([type(v) in _PLAIN or _no_float(v) for v in data.values()])
    if kind is list:
        return all([type(v) in _PLAIN or _no_float(v) for v in data])
    return kind in _PLAIN


def decode(delivery: Delivery, registry: Registry) -> Message:
    """The message of a record on `facts.raw`. Raises DecodeError, SchemaError or ValidationError: it is poison."""
    event = events.from_kafka(delivery)
    try:
        incoming = read(event, registry)
        hashed = body_hash(incoming)
    except FactmeshError as error:
        error.where = f"{delivery.where}, {error.where}" if error.where else delivery.where
        raise
    own = Root.stranger(event.source, event.id)
    return Message(
        delivery=delivery,
        kind="cloudevent",
        root=delivery.root_override or own,
        own=own,
        id=None,
        opening=delivery.opening,
        record={
            "incoming": incoming,
            "correlation_id": str(ids.correlation_id(event.source, event.id)),
            "traceparent": delivery.header(H_TRACEPARENT) or event.extensions.get(H_TRACEPARENT),
        },
        hash=hashed,
        instant_ms=0,
        writer_schema_id=avro.peek_schema_id(event.data) if event.content_type == events.AVRO else None,
    )


async def build_mapper(documents: Sequence[Document], registry: Registry, expressions: Expressions) -> Mapper:
    """All adapters and upcasts of a project, compiled, with every version of the schemas that they speak of."""
    compiled: list[adapters.CompiledAdapter] = []
    steps: list[adapters.CompiledUpcast] = []
    names: set[str] = set()
    for document in documents:
        model = adapters.read(document)
        if isinstance(model, adapters.Upcast):
            steps.append(adapters.compile_upcast(model, document, expressions))
            continue
        if model.adapter in names:
            raise DefinitionError(f"two adapters are called {model.adapter}", where=document.where(), hint="rename one")
        names.add(model.adapter)
        compiled.append(adapters.compile_adapter(model, document, expressions))
    schemas = {}
    for type_ in {c.model.type for c in compiled}:
        versions = await registry.versions(type_)
        schemas[type_] = {version: await registry.by_version(type_, version) for version in versions}
    return Mapper(compiled, steps, schemas, expressions)
