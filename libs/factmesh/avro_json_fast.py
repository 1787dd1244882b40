"""Both directions of `avro_json` compiled from a schema, for values that are plainly right: JSON as it mostly comes.
An accelerator only: whatever is not plainly right raises here, and `avro_json` judges it and words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, Final

from factmesh.avro_strict import INT_MAX, INT_MIN, LONG_MAX, LONG_MIN, MisfitError, compile_check
from factmesh.errors import ValidationError

Convert = Callable[[Any], Any]
Slowly = Callable[[Any, Any], Any]
"""The careful way for one node and one value: from a schema's type and a value to the converted value."""


class NotPlainError(Exception):
    """The careful path must judge this value."""


#: What the compiled functions raise where the careful path has to look.
NOT_PLAIN: Final = (NotPlainError, MisfitError, ValidationError, KeyError, TypeError, ValueError, OverflowError)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ABSENT: Final = object()


def _text(value: Any) -> str:
    if type(value) is not str:
        raise NotPlainError
    if not value.isascii():
        value.encode()  # a lone surrogate raises
    return value


def _int(value: Any) -> int:
    if type(value) is not int or not INT_MIN <= value <= INT_MAX:
        raise NotPlainError
    return value


def _long(value: Any) -> int:
    if type(value) is not int or not LONG_MIN <= value <= LONG_MAX:
        raise NotPlainError
    return value


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise NotPlainError
    return value


_READ: Final[Mapping[str, Convert]] = {"string": _text, "int": _int, "long": _long, "boolean": _boolean}
_TICK_US: Final[Mapping[str, int]] = {"timestamp-millis": 1_000, "timestamp-micros": 1}
#: Types whose values are the same in JSON.
_SAME: Final = frozenset({"null", "boolean", "int", "long", "float", "double", "string"})


# ── JSON to the record ────────────────────────────────────────────────────────────────────────────────────────────


def compile_reader(node: Any, named: Mapping[str, Any], slowly: Slowly) -> Convert:
    """From a JSON value to the value of this type, checked as `Schema.check` would; raises one of NOT_PLAIN."""
    if isinstance(node, str):
        plain = _READ.get(node)
        if plain is not None:
            return plain
        if node in named:
            return compile_reader(named[node], named, slowly)
    elif isinstance(node, Mapping):
        kind = node["type"]
        if "logicalType" in node:
            plain = _READ.get(kind) if isinstance(kind, str) else None
            careful = _careful(node, named, slowly)
            if plain is None or kind == "string":
                return careful
            return lambda value: careful(value) if type(value) is str else plain(value)
        if kind == "record":
            return _record_reader(node, named, slowly)
        if kind == "array":
            return _array(compile_reader(node["items"], named, slowly))
        if isinstance(kind, str) and kind in _READ:
            return _READ[kind]
    elif len(node) == 2 and "null" in node:
        only = compile_reader(node[1] if node[0] == "null" else node[0], named, slowly)
        return lambda value: None if value is None else only(value)
    return _careful(node, named, slowly)


def _careful(node: Any, named: Mapping[str, Any], slowly: Slowly) -> Convert:
    check = compile_check(node, named)

    def read(value: Any) -> Any:
        found = slowly(node, value)
        check(found, "")
        return found

    return read


def _array(item: Convert) -> Convert:
    def read(value: Any) -> list[Any]:
        if type(value) is not list:
            raise NotPlainError
        return [item(v) for v in value]

    return read


def _record_reader(node: Mapping[str, Any], named: Mapping[str, Any], slowly: Slowly) -> Convert:
    fields = [(f["name"], compile_reader(f["type"], named, slowly), _default(f, named)) for f in node["fields"]]

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise NotPlainError
        out: dict[str, Any] = {}
        found = len(value)
        for name, field, default in fields:
            if name in value:
                out[name] = field(value[name])
                found -= 1
            elif default is _ABSENT:
                raise NotPlainError
            else:
                out[name] = default
        if found:
            raise NotPlainError  # fields that the schema does not know
        return out

    return read


def _default(field: Mapping[str, Any], named: Mapping[str, Any]) -> Any:
    """A default that may be handed out as it is; what could be changed, or does not pass the check, goes carefully."""
    default = field.get("default", _ABSENT)
    if type(default) not in (str, int, bool, type(None)):
        return _ABSENT
    try:
        compile_check(field["type"], named)(default, "")
    except MisfitError:
        return _ABSENT
    return default


# ── the record to JSON ────────────────────────────────────────────────────────────────────────────────────────────


def compile_writer(node: Any, named: Mapping[str, Any], slowly: Slowly) -> Convert | None:
    """From a decoded value to JSON-plain data; None where they are the same. Raises one of NOT_PLAIN."""
    if isinstance(node, str):
        if node in named:
            return compile_writer(named[node], named, slowly)
        return None if node in _SAME else lambda value: slowly(node, value)
    if isinstance(node, Mapping):
        kind, logical = node["type"], str(node.get("logicalType"))
        if logical in _TICK_US and kind == "long":
            return _instant_writer(_TICK_US[logical])
        if "logicalType" not in node:
            if kind == "record":
                return _record_writer(node, named, slowly)
            if kind == "array":
                item = compile_writer(node["items"], named, slowly)
                return list if item is None else lambda value: [None if v is None else item(v) for v in value]
            if isinstance(kind, str) and (kind == "enum" or kind in _SAME):
                return None
    elif len(node) == 2 and "null" in node:
        return compile_writer(node[1] if node[0] == "null" else node[0], named, slowly)
    return lambda value: slowly(node, value)


def _instant_writer(tick_us: int) -> Convert:
    timespec = "milliseconds" if tick_us == 1_000 else "microseconds"

    def write(value: Any) -> str:
        # Without the last six characters, which are "+00:00".
        return (_EPOCH + timedelta(microseconds=value * tick_us)).isoformat(timespec=timespec)[:-6] + "Z"

    return write


def _record_writer(node: Mapping[str, Any], named: Mapping[str, Any], slowly: Slowly) -> Convert:
    names = tuple(f["name"] for f in node["fields"])
    written = [(f["name"], compile_writer(f["type"], named, slowly)) for f in node["fields"]]
    changed = tuple((name, convert) for name, convert in written if convert is not None)
    if len(names) < 2:
        return lambda value: slowly(node, value)
    take = itemgetter(*names)

    def write(value: Any) -> dict[str, Any]:
        out = dict(zip(names, take(value), strict=True))
        for name, convert in changed:
            if out[name] is not None:
                out[name] = convert(out[name])
        return out

    return write
