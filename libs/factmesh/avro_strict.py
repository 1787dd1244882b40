"""What strict Avro means here, as checks compiled from a schema: exact types, ranges, no decode bombs, no naive times.
Pure: no codec lives here; `avro` calls these around the vendor's codec, which is loose where these are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from factmesh.errors import SchemaError, ValidationError

SCHEMA_DEPTH_MAX: Final = 32
"""Types inside types; recursion is refused, so that no value nests deeper than its schema does."""
INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1
LONG_MIN, LONG_MAX = -(1 << 63), (1 << 63) - 1
PRIMITIVES: Final = frozenset({"null", "boolean", "int", "long", "float", "double", "bytes", "string"})
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOGICAL_ATTRIBUTES: Final = frozenset({"logicalType", "precision", "scale"})

Check = Callable[[Any, str], None]


def strip_logical(node: Any) -> Any:
    """The schema without logical types: the bytes are the same, and both directions take half the time."""
    if isinstance(node, list):
        return [strip_logical(n) for n in node]
    if not isinstance(node, Mapping):
        return node
    kind = node.get("type")
    out = {k: v for k, v in node.items() if k not in _LOGICAL_ATTRIBUTES and k != "doc"}
    if kind == "record":
        out["fields"] = [{**_without_doc(f), "type": strip_logical(f["type"])} for f in node.get("fields", ())]
    elif kind == "array":
        out["items"] = strip_logical(node.get("items"))
    elif kind == "map":
        out["values"] = strip_logical(node.get("values"))
    elif isinstance(kind, str) and kind in PRIMITIVES:
        return kind
    elif isinstance(kind, (Mapping, list)):
        return strip_logical(kind)
    return out


def _without_doc(field: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in field.items() if k != "doc"}


# ── strictness that fastavro's writer lacks: it truncates floats, takes "" for false and a string for an array ─────


class MisfitError(Exception):
    """A value that is not of its type; becomes ValidationError or DecodeError by the direction."""


def _misfit(path: str, wanted: str, value: Any) -> MisfitError:
    return MisfitError(f"field {path or '(record)'}: expected {wanted}, found {_shown(value)}")


def _shown(value: Any) -> str:
    """A value's type, and its size or range where that is what is wrong: never the value, it may be personal data."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "an integer out of range" if not LONG_MIN <= value <= LONG_MAX else "an integer"
    return "null" if value is None else type(value).__name__


def _one_of(kinds: tuple[type, ...], wanted: str) -> Check:
    def check(value: Any, path: str) -> None:
        if type(value) not in kinds:
            raise _misfit(path, wanted, value)

    return check


def _check_int(value: Any, path: str) -> None:
    if type(value) is not int or not INT_MIN <= value <= INT_MAX:
        raise _misfit(path, "a 32-bit integer", value)


def _check_long(value: Any, path: str) -> None:
    if type(value) is not int or not LONG_MIN <= value <= LONG_MAX:
        raise _misfit(path, "a 64-bit integer", value)


_CHECKS: Final[Mapping[str, Check]] = {
    "null": _one_of((type(None),), "null"),
    "boolean": _one_of((bool,), "a boolean"),
    "int": _check_int,
    "long": _check_long,
    "float": _one_of((float, int), "a number"),
    "double": _one_of((float, int), "a number"),
    "bytes": _one_of((bytes,), "bytes"),
    "string": _one_of((str,), "a string"),
}


def compile_check(node: Any, named: Mapping[str, Any]) -> Check:
    """The check of one type of a parsed schema."""
    if isinstance(node, list):
        return _compile_union(node, named)
    kind = node if isinstance(node, str) else node["type"]
    if kind in _CHECKS:
        return _CHECKS[kind]
    if isinstance(node, str):
        return compile_check(named[node], named)
    if kind == "record":
        return compile_record(node, named)
    if kind == "enum":
        return _compile_enum(node)
    if kind == "fixed":
        return _compile_fixed(node)
    if kind in ("array", "map"):
        return _compile_many(node, named, kind)
    return compile_check(kind, named)


def _compile_enum(node: Mapping[str, Any]) -> Check:
    symbols = frozenset(node["symbols"])

    def check(value: Any, path: str) -> None:
        if type(value) is not str or value not in symbols:
            raise _misfit(path, f"one of {', '.join(sorted(symbols))}", value)

    return check


def _compile_fixed(node: Mapping[str, Any]) -> Check:
    size = int(node["size"])

    def check(value: Any, path: str) -> None:
        if type(value) is not bytes or len(value) != size:
            raise _misfit(path, f"{size} bytes", value)

    return check


def _compile_many(node: Mapping[str, Any], named: Mapping[str, Any], kind: str) -> Check:
    if kind == "array":
        item = compile_check(node["items"], named)

        def check_array(value: Any, path: str) -> None:
            if type(value) is not list:
                raise _misfit(path, "an array", value)
            for i, v in enumerate(value):
                item(v, f"{path}[{i}]")

        return check_array
    entry = compile_check(node["values"], named)

    def check_map(value: Any, path: str) -> None:
        if type(value) is not dict:
            raise _misfit(path, "a map", value)
        for k, v in value.items():
            if type(k) is not str:
                raise _misfit(f"{path} (key)", "a string", k)
            entry(v, f"{path}[…]")

    return check_map


def _compile_union(node: list[Any], named: Mapping[str, Any]) -> Check:
    checks = [compile_check(branch, named) for branch in node]
    nullable = "null" in node
    others = [c for c, branch in zip(checks, node, strict=True) if branch != "null"]
    if nullable and len(others) == 1:
        only = others[0]

        def check_optional(value: Any, path: str) -> None:
            if value is not None:
                only(value, path)

        return check_optional

    def check_union(value: Any, path: str) -> None:
        for check in checks:
            try:
                check(value, path)
            except MisfitError:
                continue
            return
        raise _misfit(path, "one of the union's types", value)

    return check_union


def compile_record(node: Mapping[str, Any], named: Mapping[str, Any]) -> Check:
    fields = [(str(f["name"]), compile_check(f["type"], named)) for f in node["fields"]]
    size = len(fields)
    names = frozenset(n for n, _ in fields)

    def check(value: Any, path: str) -> None:
        if not isinstance(value, Mapping):
            raise _misfit(path, "a record", value)
        dot = f"{path}." if path else ""
        for name, field_check in fields:
            if name not in value:
                raise MisfitError(f"field {dot}{name}: missing")
            field_check(value[name], dot + name)
        if len(value) != size:
            unknown = ", ".join(sorted(str(n) for n in value if n not in names))
            raise MisfitError(f"{path or 'record'}: unknown fields: {unknown}")

    return check


# ── schemas that would make a decoder allocate without bound ──────────────────────────────────────────────────────


def refuse_bombs(source: Mapping[str, Any], where: str) -> None:
    """Raise SchemaError for recursion, for too deep a nesting, and for arrays whose items take no bytes."""
    named: dict[str, Any] = {}

    def name_of(node: Mapping[str, Any], space: str) -> tuple[str, str]:
        name = str(node.get("name", ""))
        space = name.rpartition(".")[0] if "." in name else str(node.get("namespace", space))
        return (name if "." in name else f"{space}.{name}" if space else name), space

    def floor(node: Any, space: str, inside: tuple[str, ...]) -> int:
        """The fewest bytes that a value of this type takes."""
        if len(inside) > SCHEMA_DEPTH_MAX:
            raise SchemaError(f"types nest deeper than {SCHEMA_DEPTH_MAX}", where=where, hint="flatten the schema")
        if isinstance(node, list):
            return 1 + min((floor(b, space, (*inside, "union")) for b in node), default=0)
        if isinstance(node, str):
            if node in PRIMITIVES:
                return {"null": 0, "float": 4, "double": 8}.get(node, 1)
            full = node if "." in node or not space else f"{space}.{node}"
            full = full if full in named or full in inside else node
            if full in inside:
                raise SchemaError(
                    f"type {full} contains itself", where=where, hint="recursion is a decode bomb: nest by id"
                )
            return int(named.get(full, 1))
        if not isinstance(node, Mapping):
            raise SchemaError(f"not a type: {node!r}", where=where, hint="correct the .avsc")
        return floor_of_complex(node, space, inside)

    def floor_of_complex(node: Mapping[str, Any], space: str, inside: tuple[str, ...]) -> int:
        kind = node.get("type")
        if kind in ("record", "error"):
            full, space = name_of(node, space)
            fields = node.get("fields")
            if not isinstance(fields, list) or not all(isinstance(f, Mapping) and "type" in f for f in fields):
                raise SchemaError(f"record {full} has no list of fields", where=where, hint="correct the .avsc")
            for name in (*full.split("."), *(str(f.get("name", "")) for f in fields)):
                if not _NAME.fullmatch(name):
                    raise SchemaError(f"{name!r} is not a valid Avro name", where=where, hint="letters, digits and _")
            named[full] = sum(floor(f["type"], space, (*inside, full)) for f in fields)
            return int(named[full])
        if kind == "array":
            if floor(node.get("items"), space, (*inside, "array")) == 0:
                raise SchemaError(
                    "an array of items that take no bytes",
                    where=where,
                    hint="five bytes could claim billions: count them in a long",
                )
            return 1
        if kind == "map":
            floor(node.get("values"), space, (*inside, "map"))
            return 1
        if kind in ("fixed", "enum"):
            full, _ = name_of(node, space)
            size = node.get("size", 0) if kind == "fixed" else 1
            named[full] = size if isinstance(size, int) and size >= 0 else 0
            return int(named[full])
        return floor(kind, space, (*inside, "type"))

    floor(source, "", ())


def named_types(source: Mapping[str, Any]) -> dict[str, Any]:
    """Every named type of a schema, under its name and under its full name."""
    named: dict[str, Any] = {}

    def visit(node: Any, space: str) -> None:
        if isinstance(node, list):
            for branch in node:
                visit(branch, space)
        if not isinstance(node, Mapping):
            return
        if node.get("type") in ("record", "enum", "fixed"):
            name = str(node["name"])
            space = str(node.get("namespace", space))
            named[name] = named[f"{space}.{name}" if space and "." not in name else name] = node
        for field in node.get("fields", ()):
            visit(field["type"], space)
        for inner in ("items", "values", "type"):
            visit(node.get(inner), space)

    visit(source, "")
    return named


def has_mutable_default(node: Any) -> bool:
    if isinstance(node, list):
        return any(has_mutable_default(n) for n in node)
    if not isinstance(node, Mapping):
        return False
    for f in node.get("fields", ()):
        if isinstance(f.get("default"), (list, dict)) or has_mutable_default(f.get("type")):
            return True
    return has_mutable_default(node.get("items")) or has_mutable_default(node.get("values"))


def refuse_naive(value: Any, path: str, where: str) -> None:
    if isinstance(value, datetime) and value.tzinfo is None:
        raise ValidationError(
            f"field {path}: a timestamp without an offset",
            where=where,
            hint="attach the zone: it means nothing without",
        )
    if isinstance(value, Mapping):
        for k, v in value.items():
            refuse_naive(v, f"{path}.{k}" if path else str(k), where)
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            refuse_naive(v, f"{path}[{i}]", where)
