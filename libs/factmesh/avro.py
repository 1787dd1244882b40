"""The Avro codec: the only importer of fastavro; schemas in, Confluent-framed bytes out, and back, strictly.
No registry and no file is read here, and nothing here knows what a record means.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from struct import error as struct_error
from typing import Any, Final

import fastavro
from fastavro.read import SchemaResolutionError

from factmesh import avro_fast, records_fast
from factmesh.avro_strict import (
    MisfitError,
    compile_record,
    has_mutable_default,
    named_types,
    refuse_bombs,
    refuse_naive,
    strip_logical,
)
from factmesh.errors import DecodeError, SchemaError, ValidationError

MAGIC: Final = 0
PREFIX_BYTES: Final = 5
SCHEMA_BYTES_MAX: Final = 1_000_000

# What fastavro raises on bytes or values that do not fit the schema, seen by fuzzing; anything else is a bug.
_MISFITS: Final = (EOFError, IndexError, ValueError, TypeError, KeyError, OverflowError, struct_error, AttributeError)


class Schema:
    """One parsed version of one subject. Equal objects are the same object; treat `source` as read-only.

    Attributes:
        subject: the registry's name for its versions, `factmesh.<record>` or `<noun>.<verb_past>`; "" if unregistered.
        version: 1, 2, … inside the subject; 0 if unregistered.
        id: the schema id in the wire format; 0 if unregistered.
        source: the schema as JSON-plain data, logical types included.
        name: the record's unqualified name, e.g. `fact`.
        fullname: with its namespace.
        named: the types inside that have names, by name and by full name.
    """

    __slots__ = (
        "_check",
        "_fast",
        "_logical",
        "_mutable_defaults",
        "_plain",
        "_prefix",
        "field_names",
        "fullname",
        "id",
        "name",
        "named",
        "source",
        "subject",
        "version",
    )

    def __init__(self, source: Mapping[str, Any], *, subject: str = "", version: int = 0, id: int = 0) -> None:
        self.source = dict(source)
        self.subject = subject
        self.version = version
        self.id = id
        where = self.label
        if source.get("type") != "record":
            raise SchemaError("the top level must be a record", where=where, hint="wrap it in a record with one field")
        self.name = str(source.get("name", "")).rpartition(".")[2]
        refuse_bombs(self.source, where)
        try:
            self._logical: Any = fastavro.parse_schema(copy.deepcopy(self.source), {})
            plain: Any = fastavro.parse_schema(strip_logical(self.source), {})
        except (fastavro.schema.SchemaParseException, fastavro.schema.UnknownType, *_MISFITS) as error:
            raise SchemaError(
                f"not a valid Avro schema: {type(error).__name__}: {error}", where=where, hint="correct the .avsc"
            ) from error
        self._plain = plain
        self.fullname = str(plain["name"])
        self.field_names: tuple[str, ...] = tuple(f["name"] for f in self.source["fields"])
        self.named = named_types(self.source)
        self._check = compile_record(plain, dict(plain["__named_schemas"]))
        self._mutable_defaults = has_mutable_default(plain)
        self._prefix = bytes([MAGIC]) + id.to_bytes(4, "big")
        self._fast = avro_fast.compile_flat(plain["fields"], self._prefix)

    @property
    def label(self) -> str:
        """What error texts call it."""
        name = self.subject or str(self.source.get("name", "?"))
        return f"{name}/v{self.version} (schema id {self.id})" if self.id else name

    @property
    def text(self) -> str:
        """The schema as compact JSON, logical types included, as a registry is given it."""
        return json.dumps(self.source, separators=(",", ":"), ensure_ascii=False)

    def registered(self, *, subject: str, version: int, id: int) -> Schema:
        """The same schema under the name and id that a registry gave it."""
        return Schema(self.source, subject=subject, version=version, id=id)

    def check(self, record: Any, where: str = "") -> None:
        """Raise ValidationError unless every field is there, is of exactly its type and in range, and nothing more."""
        try:
            self._check(record, "")
        except MisfitError as misfit:
            raise ValidationError(
                f"{misfit}", where=where or self.label, hint="send what the schema says, or register a new version"
            ) from None

    def compile(self, rules: records_fast.Rules) -> tuple[records_fast.Encode, records_fast.Read] | None:
        """Generated code that checks and hashes by these rules too; None where the record is not flat."""
        return records_fast.compile_checked(self._plain["fields"], self._prefix, rules)

    def __repr__(self) -> str:
        return f"<Schema {self.label}>"


def load_json(raw: str | bytes, where: str) -> Any:
    """JSON of a schema file or lock; duplicate keys and NaN are refused."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            names = sorted({k for k, _ in items if [n for n, _ in items].count(k) > 1})
            raise ValueError(f"duplicate key {', '.join(names)}")
        return out

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    if len(raw) > SCHEMA_BYTES_MAX:
        raise SchemaError(f"{len(raw)} bytes, at most {SCHEMA_BYTES_MAX}", where=where, hint="split the schema")
    try:
        return json.loads(raw, object_pairs_hook=pairs, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not JSON: {error}", where=where, hint="correct the file") from None


def parse(raw: str | bytes | Mapping[str, Any], *, subject: str = "", version: int = 0, id: int = 0) -> Schema:
    """A schema from its JSON. Raises SchemaError when it is not one, or could be a decode bomb."""
    source = raw if isinstance(raw, Mapping) else load_json(raw, f"{subject}/v{version}" if subject else "schema")
    if not isinstance(source, Mapping):
        raise SchemaError("the top level must be a record", where=subject, hint="wrap it in a record with one field")
    return Schema(source, subject=subject, version=version, id=id)


# ── the wire ──────────────────────────────────────────────────────────────────────────────────────────────────────


def peek_schema_id(value: bytes | None, where: str = "") -> int:
    """The writer's schema id of a framed value. Raises DecodeError when it is not in the Confluent wire format."""
    if value is None:
        raise DecodeError("no value (a tombstone)", where=where, hint="send a record; topics here are never compacted")
    if len(value) < PREFIX_BYTES or value[0] != MAGIC:
        raise DecodeError(
            f"not in the Confluent wire format: {len(value)} bytes beginning 0x{value[:1].hex() or '-'},"
            " wanted magic byte 0x00 and a 4-byte schema id",
            where=where,
            hint="serialize with a schema registry serializer",
        )
    return int.from_bytes(value[1:PREFIX_BYTES], "big")


def encode(schema: Schema, record: Mapping[str, Any], where: str = "") -> bytes:
    """Framed bytes of a complete record. Raises ValidationError that names the field which does not fit."""
    if schema._fast is not None:
        try:
            return schema._fast[0](record)
        except avro_fast.NOT_PLAIN:
            pass  # the strict path words what is wrong
    schema.check(record, where)
    return _write(schema, schema._plain, record, where)


def encode_logical(schema: Schema, record: Mapping[str, Any], where: str = "") -> bytes:
    """As `encode`, from Python values of the logical types; every datetime must be aware. Not for the hot path."""
    refuse_naive(record, "", where or schema.label)
    value = _write(schema, schema._logical, record, where)
    schema.check(_read(value, PREFIX_BYTES, schema, schema, False, where), where)
    return value


def decode(value: bytes, writer: Schema, reader: Schema | None = None, where: str = "") -> dict[str, Any]:
    """The record of a framed value as the reader (or the writer itself) sees it; timestamps are integers.

    Raises DecodeError for bytes that are not what the writer's schema says, torn or trailing ones too.
    """
    seen = peek_schema_id(value, where)
    if writer.id and seen != writer.id:
        raise DecodeError(f"written with schema id {seen}, not with {writer.label}", where=where)
    if writer._fast is not None and (reader is None or reader is writer):
        try:
            return writer._fast[1](value)
        except avro_fast.NOT_PLAIN:
            pass  # the strict path judges it
    return _read(value, PREFIX_BYTES, writer, reader or writer, False, where)


def decode_logical(value: bytes, writer: Schema, reader: Schema | None = None, where: str = "") -> dict[str, Any]:
    """As `decode`, with aware datetimes, decimals and UUIDs for logical types. Not for the hot path."""
    peek_schema_id(value, where)
    return _read(value, PREFIX_BYTES, writer, reader or writer, True, where)


def decode_bare(data: bytes, writer: Schema, reader: Schema | None = None, where: str = "") -> dict[str, Any]:
    """As `decode`, for a value that carries no frame."""
    return _read(data, 0, writer, reader or writer, False, where)


def encode_bare(schema: Schema, record: Mapping[str, Any], where: str = "") -> bytes:
    """As `encode`, without the frame."""
    return encode(schema, record, where)[PREFIX_BYTES:]


def resolve(record: Mapping[str, Any], writer: Schema, reader: Schema, where: str = "") -> dict[str, Any]:
    """A record of one version as another version sees it, by Avro's rules of resolution (REQUIREMENTS A5)."""
    return _read(encode(writer, record, where), PREFIX_BYTES, writer, reader, False, where)


def _write(schema: Schema, parsed: Any, record: Mapping[str, Any], where: str) -> bytes:
    out = io.BytesIO()
    out.write(schema._prefix)
    try:
        fastavro.schemaless_writer(out, parsed, record, strict=True)
    except _MISFITS as error:
        raise ValidationError(
            f"does not fit its schema: {error}", where=where or schema.label, hint="send what the schema says"
        ) from error
    return out.getvalue()


def _read(value: bytes, start: int, writer: Schema, reader: Schema, logical: bool, where: str) -> dict[str, Any]:
    source = io.BytesIO(value)
    source.seek(start)
    same = writer is reader
    record: Any
    try:
        if logical:
            record = fastavro.schemaless_reader(source, writer._logical, None if same else reader._logical)
        else:
            record = fastavro.schemaless_reader(source, writer._plain, None if same else reader._plain)
    except SchemaResolutionError as error:
        raise SchemaError(
            f"{writer.label} cannot be read as {reader.label}: {error}",
            where=where,
            hint="run `factmesh schema check`: versions of a subject must be compatible both ways",
        ) from error
    except _MISFITS as error:
        raise DecodeError(
            f"bytes do not fit {writer.label} at byte {source.tell()}: {type(error).__name__} {error}".rstrip(),
            where=where,
            hint="the sender wrote with another schema than it named, or the value is torn",
        ) from error
    left = len(value) - source.tell()
    if left:
        raise DecodeError(
            f"{left} bytes are left over after {writer.label}",
            where=where,
            hint="the sender wrote with another schema than it named",
        )
    if not same and reader._mutable_defaults:
        # fastavro hands out the schema's own default objects: changing one would change every later record.
        record = copy.deepcopy(record)
    if not logical:
        try:
            reader._check(record, "")
        except MisfitError as misfit:
            raise DecodeError(f"{misfit}", where=where, hint=f"{writer.label} does not allow it") from None
    return dict(record) if type(record) is not dict else record
