"""From the vendor's shape to the canonical fact: choose the adapter, name the version, upcast, validate, carry as JSON.
Pure once built: everything it needs was compiled and read at start. No bytes of a stranger are parsed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import orjson

from factmesh import avro, avro_json
from factmesh.errors import DefinitionError
from factmesh.evaluation import Expressions
from factmesh.message import to_ms
from factmesh.topics import DATA_BYTES_MAX
from factmesh_intake.adapters import CompiledAdapter, CompiledUpcast
from factmesh_intake.events import instant
from factmesh_intake.model import (
    TEXT_CHARS_MAX,
    Canonical,
    FieldError,
    Incoming,
    SourceRefusedError,
    TooLargeError,
    UnknownTypeError,
    UnmappedError,
    VersionError,
)

_VERSION = re.compile(r"(?:(?P<subject>[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+)/)?v(?P<version>[1-9][0-9]{0,3})$")
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f]")
_INSTANT_MS_MAX = to_ms(datetime(9999, 1, 1, tzinfo=UTC))
Versions = Mapping[int, avro.Schema]


@lru_cache(maxsize=512)  # all events of one sender share it
def version_in(dataschema: str) -> tuple[str | None, int] | None:
    """(subject or None, version) that a `dataschema` URI ends in, like `https://…/order.delayed/v2`; else None."""
    try:
        match = _VERSION.search(urlsplit(dataschema).path)
    except ValueError:  # "//[": a reference by its characters, and no address
        return None
    return (match["subject"], int(match["version"])) if match else None


@dataclass(frozen=True, slots=True)
class _Type:
    """Everything of one type of fact."""

    adapters: tuple[CompiledAdapter, ...]
    versions: Versions
    newest: int
    upcasts: Mapping[int, CompiledUpcast]


class Mapper:
    """Implements `model.MapsFacts` over all adapters, upcasts and schemas of a project."""

    def __init__(
        self,
        adapters: Sequence[CompiledAdapter],
        upcasts: Sequence[CompiledUpcast],
        schemas: Mapping[str, Versions],
        expressions: Expressions,
    ) -> None:
        self._expressions = expressions
        self._types: dict[str, _Type] = {}
        for name in sorted({a.model.type for a in adapters}):
            versions = schemas.get(name) or {}
            mine = tuple(a for a in adapters if a.model.type == name)
            steps = [u for u in upcasts if u.model.upcast == name]
            _check_type(name, mine, steps, versions)
            # Exact sources first, then the longest prefix: the most particular adapter wins.
            order = sorted(mine, key=lambda a: (a.model.source.endswith("*"), -len(a.model.source)))
            newest = max(versions)
            self._types[name] = _Type(tuple(order), versions, newest, {u.model.from_version: u for u in steps})

    @property
    def types(self) -> tuple[str, ...]:
        """The types of fact that anyone may send."""
        return tuple(self._types)

    def map(self, incoming: Incoming) -> Canonical:
        """The canonical fact. Raises ValidationError or SchemaError naming the field; `where` names the fact."""
        type_, adapter = self._adapter(incoming)
        where = incoming.where
        if incoming.bytes_size > DATA_BYTES_MAX:
            raise TooLargeError(
                f"{incoming.bytes_size} bytes of data, more than {DATA_BYTES_MAX}",
                where=where,
                hint="send a reference to the document instead of the document",
            )
        event = {
            "id": incoming.id,
            "source": incoming.source,
            "type": incoming.type,
            "subject": incoming.event_subject,
            "dataschema": incoming.dataschema,
        }
        sent = incoming.data
        if adapter.model.produces is not None:
            version = adapter.model.produces
            scope = self._expressions.scope({"event": event, "data": incoming.data})
            sent = {name: compiled(scope) for name, compiled in adapter.data.items()}
        else:
            version = _version(adapter, incoming)
        record = avro_json.validate(type_.versions[version], sent, where)
        record = self._upcast(type_, version, record, where)
        fields = avro_json.to_json(type_.versions[type_.newest], record, where)
        data = orjson.dumps(fields)
        if len(data) > DATA_BYTES_MAX:
            raise TooLargeError(
                f"{len(data)} bytes of canonical data, more than {DATA_BYTES_MAX}",
                where=where,
                hint="send a reference to the document instead of the document",
            )
        scope = self._expressions.scope({"event": event, "data": incoming.data, "fact": fields})
        found = {name: compiled(scope) for name, compiled in adapter.canonical.items()}
        return Canonical(
            business_object_type=_text(found, "business_object_type"),
            business_object_id=_text(found, "business_object_id"),
            actor=_text(found, "actor"),
            status=_text(found, "status") if found["status"] is not None else None,
            due_by=_instant_ms(found, "due_by") if found["due_by"] is not None else None,
            occurred_at=_instant_ms(found, "occurred_at"),
            schema_version=type_.newest,
            data=data,
        )

    def _adapter(self, incoming: Incoming) -> tuple[_Type, CompiledAdapter]:
        type_ = self._types.get(incoming.type)
        if type_ is None:
            raise UnknownTypeError(
                "type",
                "no adapter takes facts of this type",
                where=incoming.where,
                hint="add an adapter to the project, or correct the type",
            )
        for adapter in type_.adapters:
            if adapter.takes(incoming.source):
                return type_, adapter
        raise SourceRefusedError(
            "source",
            "no adapter takes facts of this type from this source",
            where=incoming.where,
            hint="add an adapter for the source to the project, or correct it",
        )

    def _upcast(self, type_: _Type, version: int, record: dict[str, Any], where: str) -> dict[str, Any]:
        for step in range(version, type_.newest):
            old, new = type_.versions[step], type_.versions[step + 1]
            resolved = avro.resolve(record, old, new, where)
            upcast = type_.upcasts.get(step)
            declared = upcast.set if upcast is not None else {}
            _refuse_lost_symbols(record, resolved, declared)
            if declared:
                plain = avro_json.to_json(new, resolved, where)
                scope = self._expressions.scope({"data": avro_json.to_json(old, record, where), "resolved": plain})
                plain.update({name: compiled(scope) for name, compiled in declared.items()})
                resolved = avro_json.validate(new, plain, where)
            record = resolved
        return record


def _check_type(
    name: str, adapters: Iterable[CompiledAdapter], upcasts: Sequence[CompiledUpcast], versions: Versions
) -> None:
    """What can be known at start is refused at start, naming the file's own words."""
    if not versions:
        raise DefinitionError(
            f"no schema is registered for {name}", where=f"adapters of {name}", hint=f"add schemas/{name}/v1.avsc"
        )
    if sorted(versions) != list(range(1, max(versions) + 1)):
        raise DefinitionError(f"versions of {name} are {sorted(versions)}", hint="they must be 1, 2, 3, …, each there")
    sources: set[str] = set()
    for adapter in adapters:
        model = adapter.model
        if model.source in sources:
            raise DefinitionError(f"two adapters take {name} from {model.source}", where=model.adapter, hint="keep one")
        sources.add(model.source)
        for version in (*model.accepts, *([model.produces] if model.produces else [])):
            if version not in versions:
                raise DefinitionError(
                    f"version {version} of {name} is not registered", where=f"adapter {model.adapter}", hint="add it"
                )
        if model.produces is not None:
            _check_fields(set(adapter.data), versions[model.produces], f"adapter {model.adapter}", complete=True)
    for upcast in upcasts:
        step = upcast.model
        if step.to_version not in versions:
            raise DefinitionError(
                f"version {step.to_version} of {name} is not registered", where=f"upcast of {name}", hint="add it"
            )
        _check_fields(set(upcast.set), versions[step.to_version], f"upcast of {name} to v{step.to_version}")
    if [u.model.from_version for u in upcasts] != list(dict.fromkeys(u.model.from_version for u in upcasts)):
        raise DefinitionError(
            f"two upcasts of {name} from the same version", where=f"upcast of {name}", hint="keep one"
        )


def _check_fields(named: set[str], schema: avro.Schema, where: str, *, complete: bool = False) -> None:
    if unknown := named - set(schema.field_names):
        raise DefinitionError(
            f"{schema.label} has no field {', '.join(sorted(unknown))}", where=where, hint="correct it"
        )
    required = {f["name"] for f in schema.source["fields"] if "default" not in f}
    if complete and (missing := required - named):
        raise DefinitionError(
            f"{schema.label} requires {', '.join(sorted(missing))}", where=where, hint="say where it comes from"
        )


def _version(adapter: CompiledAdapter, incoming: Incoming) -> int:
    """Which version of the fact's schema the data is written in, as its sender says."""
    named = version_in(incoming.dataschema) if incoming.dataschema else None
    if incoming.subject is not None:
        if incoming.subject != incoming.type:
            raise VersionError(
                f"written with the schema of {incoming.subject}, which is not the event's type",
                where=incoming.where,
                hint="send the type whose schema it is",
            )
        if named is not None and named[1] != incoming.version:
            raise VersionError(
                f"written in version {incoming.version}, but dataschema says {named[1]}",
                where=incoming.where,
                hint="correct dataschema, or leave it out: the bytes name their schema",
            )
        version: int | None = incoming.version
    elif named is not None:
        if named[0] not in (None, incoming.type):
            raise VersionError(
                f"dataschema names {named[0]}, which is not the event's type", where=incoming.where, hint="correct it"
            )
        version = named[1]
    else:
        version = adapter.model.unnamed_version
    if version is None:
        raise VersionError(
            "the sender does not say which version of the schema the data is in",
            where=incoming.where,
            hint=f"send dataschema ending in {incoming.type}/v{max(adapter.model.accepts)}",
        )
    if version not in adapter.model.accepts:
        accepted = ", ".join(map(str, adapter.model.accepts))
        raise VersionError(
            f"version {version} is not accepted from this source",
            where=incoming.where,
            hint=f"send one of: {accepted}",
        )
    return version


def _refuse_lost_symbols(old: Any, new: Any, declared: Mapping[str, object], path: str = "") -> None:
    """Avro resolution reads an enum symbol that the reader lacks as the enum's default. Here that is an error (A3)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name, value in old.items():
            if name in new and not (path == "" and name in declared):
                _refuse_lost_symbols(value, new[name], declared, f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list):
        for one, other in zip(old, new, strict=True):
            _refuse_lost_symbols(one, other, declared, f"{path}[]")
    elif isinstance(old, str) and isinstance(new, str) and old != new:
        raise UnmappedError(
            path,
            "a symbol that the next version of the schema does not have",
            hint="translate it in the upcast's `set`",
        )


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found[name]
    if not isinstance(value, str) or not value.strip():
        kind = "empty text" if isinstance(value, str) else "null" if value is None else type(value).__name__
        raise FieldError(name, f"text is required, the adapter made {kind}", hint="correct the adapter or the sender")
    if len(value) > TEXT_CHARS_MAX:
        raise FieldError(name, f"{len(value)} characters, more than {TEXT_CHARS_MAX}", hint="send a shorter identifier")
    if not (value.isascii() and value.isprintable()) and _FORBIDDEN.search(value):
        raise FieldError(name, "control characters", hint="remove them at the sender")
    return value


def _instant_ms(found: Mapping[str, Any], name: str) -> int:
    """Milliseconds from an Avro timestamp or an RFC 3339 text with its offset."""
    value = found[name]
    if isinstance(value, str):
        value = to_ms(instant(value, name))
    if isinstance(value, bool) or not isinstance(value, int):
        kind = "null" if value is None else type(value).__name__
        raise FieldError(name, f"an instant is required, the adapter made {kind}", hint="use `time` in the adapter")
    if not 0 <= value <= _INSTANT_MS_MAX:
        raise FieldError(name, "not Unix milliseconds of a sensible instant", hint="mind the unit: milliseconds")
    return value
