"""JSON judged by an Avro schema, strictly: facts that arrive as JSON become the record that Avro would have carried.
Pure; no codec lives here. Instants are RFC 3339 with an offset: a naive one is refused, never guessed.
"""

from __future__ import annotations

import base64
import binascii
import copy
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Context, Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from factmesh import avro_json_fast as fast
from factmesh.avro import Schema
from factmesh.avro_strict import INT_MAX, INT_MIN, LONG_MAX, LONG_MIN
from factmesh.errors import ValidationError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_NAIVE: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - what `local-timestamp` means: a wall clock without a zone
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)?")
_DECIMALS: Final = Context(prec=1_000)
"""The default context rounds at 28 digits, silently."""
_HINT: Final = "send what the schema says"
_TICK_US: Final[Mapping[str, int]] = {"millis": 1_000, "micros": 1}


class _Reader:
    """One walk over one value: the named types of the schema, and whose value it is."""

    def __init__(self, where: str, named: Mapping[str, Any]) -> None:
        self.where = where
        self.named = named

    def wrong(self, path: str, wanted: str, value: Any) -> ValidationError:
        found = "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)
        return ValidationError(f"field {path}: expected {wanted}, found {found}", where=self.where, hint=_HINT)

    def read(self, node: Any, value: Any, path: str) -> Any:
        if isinstance(node, list):
            return self.union(node, value, path)
        if isinstance(node, str):
            if node in _PRIMITIVES:
                return _PRIMITIVES[node](self, value, path)
            return self.read(self.named[node], value, path)
        logical = _LOGICAL.get(str(node.get("logicalType")))
        if logical is not None and isinstance(value, str):
            return logical(self, node, value, path)
        kind = node["type"]
        if kind == "record":
            return self.record(node, value, path)
        if kind == "enum":
            if not isinstance(value, str) or value not in node["symbols"]:
                raise self.wrong(path, f"one of {', '.join(node['symbols'])}", value)
            return value
        if kind == "array":
            if not isinstance(value, list):
                raise self.wrong(path, "an array", value)
            return [self.read(node["items"], v, f"{path}[{i}]") for i, v in enumerate(value)]
        if kind == "map":
            if not isinstance(value, Mapping):
                raise self.wrong(path, "an object", value)
            return {_text(self, k, path): self.read(node["values"], v, f"{path}.{k}") for k, v in value.items()}
        if kind == "fixed":
            raw = _bytes(self, value, path)
            if len(raw) != node["size"]:
                raise self.wrong(path, f"{node['size']} bytes in base64", value)
            return raw
        return self.read(kind, value, path)

    def record(self, node: Mapping[str, Any], value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.wrong(path or "(all)", "an object", value)
        out: dict[str, Any] = {}
        dot = f"{path}." if path else ""
        for field in node["fields"]:
            name = field["name"]
            if name in value:
                out[name] = self.read(field["type"], value[name], dot + name)
            elif "default" in field:
                out[name] = copy.deepcopy(field["default"])
            else:
                raise ValidationError(f"field {dot}{name}: missing", where=self.where, hint=_HINT)
        unknown = sorted(str(k) for k in value.keys() - out.keys())
        if unknown:
            raise ValidationError(
                f"unknown fields: {', '.join(dot + k for k in unknown)}",
                where=self.where,
                hint=f"the schema knows {', '.join(out)}",
            )
        return out

    def union(self, node: list[Any], value: Any, path: str) -> Any:
        if value is None and "null" in node:
            return None
        branches = [b for b in node if b != "null"]
        if len(branches) == 1:
            return self.read(branches[0], value, path)
        for branch in branches:
            try:
                return self.read(branch, value, path)
            except ValidationError:
                continue
        raise self.wrong(path, "one of the union's types", value)


_JSON_NAMES: Final[Mapping[type, str]] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text that is not",
    list: "an array",
    dict: "an object",
}


def _integer(low: int, high: int, wanted: str) -> Callable[[_Reader, Any, str], int]:
    def read(reader: _Reader, value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise reader.wrong(path, wanted, value)
        return value

    return read


def _number(reader: _Reader, value: Any, path: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise reader.wrong(path, "a finite number", value)
    return float(value)


def _text(reader: _Reader, value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise reader.wrong(path, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise reader.wrong(path, "text without lone surrogates", value) from None
    return value


def _bytes(reader: _Reader, value: Any, path: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else _raise(reader, path, value)
    except (binascii.Error, ValueError):
        raise reader.wrong(path, "bytes in base64", value) from None


def _raise(reader: _Reader, path: str, value: Any) -> bytes:
    raise reader.wrong(path, "bytes in base64", value)


def _boolean(reader: _Reader, value: Any, path: str) -> bool:
    if type(value) is not bool:
        raise reader.wrong(path, "true or false", value)
    return value


def _null(reader: _Reader, value: Any, path: str) -> None:
    if value is not None:
        raise reader.wrong(path, "null", value)


_PRIMITIVES: Final[Mapping[str, Callable[[_Reader, Any, str], Any]]] = {
    "null": _null,
    "boolean": _boolean,
    "int": _integer(INT_MIN, INT_MAX, "a 32-bit integer"),
    "long": _integer(LONG_MIN, LONG_MAX, "a 64-bit integer"),
    "float": _number,
    "double": _number,
    "bytes": _bytes,
    "string": _text,
}


def _instant(reader: _Reader, node: Mapping[str, Any], value: str, path: str) -> int:
    match = _RFC3339.fullmatch(value)
    if match is None:
        raise reader.wrong(path, "an instant like 2026-01-31T09:30:00Z", value)
    if match[2] is None:
        raise ValidationError(
            f"field {path}: the timestamp has no offset from UTC",
            where=reader.where,
            hint="add Z or an offset like +02:00: without one the instant can only be guessed",
        )
    try:
        instant = datetime.fromisoformat(value.upper())
        return (instant - _EPOCH) // timedelta(microseconds=_tick(node))
    except (ValueError, OverflowError):
        raise reader.wrong(path, "an instant that exists", value) from None


def _local_instant(reader: _Reader, node: Mapping[str, Any], value: str, path: str) -> int:
    match = _RFC3339.fullmatch(value)
    if match is None or match[2] is not None:
        raise reader.wrong(path, "a local time like 2026-01-31T09:30:00, without an offset", value)
    try:
        return (datetime.fromisoformat(value.upper()) - _EPOCH_NAIVE) // timedelta(microseconds=_tick(node))
    except ValueError:
        raise reader.wrong(path, "a local time that exists", value) from None


def _tick(node: Mapping[str, Any]) -> int:
    return _TICK_US[str(node["logicalType"]).rpartition("-")[2]]


def _date(reader: _Reader, node: Mapping[str, Any], value: str, path: str) -> int:
    try:
        if len(value) != 10:
            raise ValueError
        return date.fromisoformat(value).toordinal() - date(1970, 1, 1).toordinal()
    except ValueError:
        raise reader.wrong(path, "a date like 2026-01-31", value) from None


def _time(reader: _Reader, node: Mapping[str, Any], value: str, path: str) -> int:
    try:
        clock = time.fromisoformat(value)
    except ValueError:
        raise reader.wrong(path, "a time like 09:30:00", value) from None
    if clock.tzinfo is not None:
        raise reader.wrong(path, "a time without an offset", value)
    us = ((clock.hour * 60 + clock.minute) * 60 + clock.second) * 1_000_000 + clock.microsecond
    return us // _tick(node)


def _decimal(reader: _Reader, node: Mapping[str, Any], value: str, path: str) -> bytes:
    scale, precision = int(node.get("scale", 0)), int(node["precision"])
    try:
        number = Decimal(value)
        if not number.is_finite() or number.adjusted() > precision:
            raise ValueError  # before it is expanded: "1e999999999" is eleven bytes
        scaled = number.scaleb(scale, _DECIMALS)
        unscaled = int(scaled)
    except (InvalidOperation, ValueError, OverflowError):
        raise reader.wrong(path, "a decimal number", value) from None
    if unscaled != scaled or len(str(abs(unscaled))) > precision:
        raise reader.wrong(path, f"a decimal number of {precision} digits, {scale} of them after the point", value)
    size = node["size"] if node["type"] == "fixed" else (unscaled + (unscaled < 0)).bit_length() // 8 + 1
    return unscaled.to_bytes(int(size), "big", signed=True)


def _uuid(reader: _Reader, node: Mapping[str, Any], value: str, path: str) -> str | bytes:
    try:
        parsed = UUID(value)
    except ValueError:
        raise reader.wrong(path, "a UUID", value) from None
    return parsed.bytes if node["type"] == "fixed" else str(parsed)


_LOGICAL: Final[Mapping[str, Callable[[_Reader, Mapping[str, Any], str, str], Any]]] = {
    "timestamp-millis": _instant,
    "timestamp-micros": _instant,
    "local-timestamp-millis": _local_instant,
    "local-timestamp-micros": _local_instant,
    "date": _date,
    "time-millis": _time,
    "time-micros": _time,
    "decimal": _decimal,
    "uuid": _uuid,
}


def validate(schema: Schema, value: Any, where: str = "") -> dict[str, Any]:
    """The record that this JSON object says, ready for `avro.encode`. Raises ValidationError naming the field.

    Logical types may come as text (instants with an offset, dates, decimals, UUIDs) or as Avro's own integer.
    """
    try:
        return _compiled(schema)[0](value)  # type: ignore[no-any-return]
    except fast.NOT_PLAIN:
        pass  # below it is judged again, and what is wrong gets its words
    record = _Reader(where or schema.label, schema.named).read(schema.source, value, "")
    schema.check(record, where)
    return record  # type: ignore[no-any-return]


@lru_cache(maxsize=1_024)  # schemas in use at once; each is compiled in a millisecond
def _compiled(schema: Schema) -> tuple[fast.Convert, fast.Convert]:
    named = schema.named
    reader = _Reader(schema.label, named)
    read = fast.compile_reader(schema.source, named, lambda node, value: reader.read(node, value, ""))
    write = fast.compile_writer(schema.source, named, lambda node, value: _plain(node, value, "", named, ""))
    assert write is not None  # a schema is a record
    return read, write


# ── and back ──────────────────────────────────────────────────────────────────────────────────────────────────────


def to_json(schema: Schema, record: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A decoded record as JSON-plain data that `validate` reads back to the same record: instants as RFC 3339 in UTC.

    Raises ValidationError for an instant outside the years 1 to 9999, naming the field.
    """
    try:
        return _compiled(schema)[1](record)  # type: ignore[no-any-return]
    except fast.NOT_PLAIN:
        pass
    out = _plain(schema.source, record, "", schema.named, where or schema.label)
    return out  # type: ignore[no-any-return]


def _plain(node: Any, value: Any, path: str, named: Mapping[str, Any], where: str) -> Any:
    if value is None:
        return None
    if isinstance(node, list):
        return _plain_union(node, value, path, named, where)
    if isinstance(node, str):
        if node in named:
            return _plain(named[node], value, path, named, where)
        return base64.b64encode(value).decode() if node == "bytes" else value
    logical = str(node.get("logicalType"))
    if logical in _LOGICAL:
        return _plain_logical(node, logical, value, path, where)
    kind = node["type"]
    if kind == "record":
        dot = f"{path}." if path else ""
        fields = node["fields"]
        return {f["name"]: _plain(f["type"], value[f["name"]], dot + f["name"], named, where) for f in fields}
    if kind == "array":
        return [_plain(node["items"], v, f"{path}[{i}]", named, where) for i, v in enumerate(value)]
    if kind == "map":
        return {k: _plain(node["values"], v, f"{path}.{k}", named, where) for k, v in value.items()}
    if kind == "fixed":
        return base64.b64encode(value).decode()
    return value if kind == "enum" else _plain(kind, value, path, named, where)


def _plain_union(node: list[Any], value: Any, path: str, named: Mapping[str, Any], where: str) -> Any:
    branches = [b for b in node if b != "null"]
    if len(branches) == 1:
        return _plain(branches[0], value, path, named, where)
    for branch in branches:
        kind = branch["type"] if isinstance(branch, Mapping) else branch
        if type(value) in _PYTHON_TYPES.get(str(kind), (dict,)):
            return _plain(branch, value, path, named, where)
    raise ValidationError(f"field {path}: no branch of the union fits", where=where, hint=_HINT)


_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "boolean": (bool,),
    "int": (int,),
    "long": (int,),
    "float": (float, int),
    "double": (float, int),
    "string": (str,),
    "enum": (str,),
    "bytes": (bytes,),
    "fixed": (bytes,),
    "array": (list,),
}


def _plain_logical(node: Mapping[str, Any], logical: str, value: Any, path: str, where: str) -> Any:
    try:
        if logical.startswith("timestamp"):
            text = (_EPOCH + timedelta(microseconds=value * _tick(node))).isoformat(timespec=_timespec(node))
            return text.replace("+00:00", "Z")
        if logical.startswith("local"):
            return (_EPOCH_NAIVE + timedelta(microseconds=value * _tick(node))).isoformat(timespec=_timespec(node))
        if logical == "date":
            return date.fromordinal(value + date(1970, 1, 1).toordinal()).isoformat()
        if logical.startswith("time"):
            clock = _EPOCH_NAIVE + timedelta(microseconds=value * _tick(node))
            if clock.date() != _EPOCH_NAIVE.date():
                raise OverflowError
            return clock.time().isoformat(timespec=_timespec(node))
        if logical == "decimal":
            unscaled = Decimal(int.from_bytes(value, "big", signed=True))
            return format(unscaled.scaleb(-int(node.get("scale", 0)), _DECIMALS), "f")
        return str(UUID(bytes=value)) if isinstance(value, bytes) else str(UUID(value))
    except (OverflowError, ValueError):
        raise ValidationError(
            f"field {path}: {logical} out of range", where=where, hint="send a value that the calendar has"
        ) from None


def _timespec(node: Mapping[str, Any]) -> str:
    return "milliseconds" if _tick(node) == 1_000 else "microseconds"
