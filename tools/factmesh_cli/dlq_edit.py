"""Quarantined bytes as something that people can read and correct, and back to bytes of the same kind.
Avro keeps its schema id, JSON stays JSON; what can be neither is shown as it is and replaced only as a whole.
"""

from __future__ import annotations

import base64
import copy
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from factmesh import avro, avro_json
from factmesh.avro import Schema
from factmesh.errors import FactmeshError, ValidationError
from factmesh.message import Headers
from factmesh.registry import Registry


@dataclass(frozen=True, slots=True)
class View:
    """A value as people see it.

    Attributes:
        kind: `avro`, `json`, `text`, `bytes` or `none`.
        data: JSON-plain for avro and json, text for text, None otherwise.
        schema: the writer's, for avro.
        json_fields: the bytes fields of an avro record that hold JSON; they are shown, and edited, as JSON.
        trouble: why it could not be decoded as what it claims to be.
    """

    kind: str
    data: Any
    schema: Schema | None = None
    json_fields: frozenset[str] = frozenset()
    trouble: str | None = None
    raw: bytes | None = None

    @property
    def label(self) -> str:
        return self.schema.label if self.schema is not None else self.kind


async def view(registry: Registry, value: bytes | None) -> View:
    """Decode for people; never raises for bytes, it tells the trouble."""
    if value is None:
        return View("none", None)
    if len(value) >= avro.PREFIX_BYTES and value[0] == avro.MAGIC:
        try:
            schema = await registry.by_id(avro.peek_schema_id(value))
            return _avro(schema, avro.decode(value, schema), value)
        except FactmeshError as error:
            return View("bytes", None, trouble=str(error), raw=value)
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        return View("bytes", None, trouble=f"neither Avro in the Confluent wire format nor UTF-8: {error}", raw=value)
    try:
        return View("json", json.loads(text), raw=value)
    except ValueError:
        return View("text", text, raw=value)


def _avro(schema: Schema, record: dict[str, Any], value: bytes) -> View:
    data = avro_json.to_json(schema, record)
    json_fields = set()
    for name, raw in record.items():
        if isinstance(raw, bytes):
            try:
                data[name] = json.loads(raw)
            except ValueError:
                continue
            json_fields.add(name)
    return View("avro", data, schema, frozenset(json_fields), raw=value)


def written_with(seen: View, schema: Schema) -> View:
    """The same data, to be written with another schema: for bytes whose own schema is not the right one."""
    data = seen.data if seen.kind in ("avro", "json") else None
    fields = {f["name"] for f in schema.source["fields"] if "bytes" in _types(f["type"])}
    return replace(seen, kind="avro", schema=schema, data=data, json_fields=frozenset(fields))


def _types(node: Any) -> tuple[str, ...]:
    return tuple(
        str(b["type"]) if isinstance(b, dict) else str(b) for b in (node if isinstance(node, list) else [node])
    )


def encode(seen: View, data: Any) -> bytes:
    """Bytes of corrected data, of the kind of the view. Raises ValidationError naming the field that does not fit."""
    if seen.kind == "avro":
        assert seen.schema is not None
        if not isinstance(data, dict):
            raise ValidationError(f"an Avro record is a JSON object, not {type(data).__name__}")
        plain = dict(data)
        for name in seen.json_fields:
            value = plain.get(name)
            if isinstance(value, dict | list):
                plain[name] = base64.b64encode(compact(value)).decode()
        return avro.encode(seen.schema, avro_json.validate(seen.schema, plain))
    if seen.kind == "json":
        return compact(data)
    if seen.kind == "text" and isinstance(data, str):
        return data.encode()
    raise ValidationError(
        "these bytes cannot be edited as text", hint="give the whole value: --file with --schema, or --file with --raw"
    )


def compact(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def pretty(seen: View) -> str:
    """What is shown, diffed and opened in an editor."""
    if seen.kind in ("avro", "json"):
        return json.dumps(seen.data, ensure_ascii=False, indent=2)
    if seen.kind == "text":
        return str(seen.data)
    return "(no value)" if seen.raw is None else _dump(seen.raw)


def _dump(raw: bytes, bytes_max: int = 512) -> str:
    lines = []
    for at in range(0, min(len(raw), bytes_max), 16):
        part = raw[at : at + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in part)
        lines.append(f"{at:06x}  {part.hex(' '):<47}  {text}")
    more = len(raw) - bytes_max
    return "\n".join([*lines, f"… {more} more bytes"] if more > 0 else lines)


_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def set_path(data: Any, assignment: str) -> Any:
    """`data.items[0].price=12` applied to a copy: the value is JSON where it reads as JSON, else text.

    Raises ValidationError for a path that leads nowhere; the last name of a path may be new.
    """
    path, equals, text = assignment.partition("=")
    steps = [int(m[2]) if m[2] else m[1] for m in _STEP.finditer(path)]
    if not equals or not steps or "".join(_show(s) for s in steps).lstrip(".") != path:
        raise ValidationError(f"{assignment!r} is not PATH=VALUE", hint="e.g. --set data.country=DE or items[0].n=3")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    out = copy.deepcopy(data)
    at = out
    for n, step in enumerate(steps):
        there = "".join(_show(s) for s in steps[: n + 1]).lstrip(".")
        if isinstance(step, int):
            fits = isinstance(at, list) and step < len(at)
        else:
            fits = isinstance(at, dict) and (n == len(steps) - 1 or step in at)
        if not fits:
            raise ValidationError(f"there is no {there} in this value", hint="`factmesh dlq show` shows what there is")
        if n == len(steps) - 1:
            at[step] = value
        else:
            at = at[step]
    return out


def _show(step: str | int) -> str:
    return f"[{step}]" if isinstance(step, int) else f".{step}"


def set_headers(headers: Headers, assignments: Sequence[str]) -> Headers:
    """`name=value` replaces every header of that name, `name=` removes it."""
    out = list(headers)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValidationError(f"{assignment!r} is not NAME=VALUE", hint="NAME= removes the header")
        first = next((i for i, (n, _) in enumerate(out) if n == name), len(out))
        kept = [(n, v) for n, v in out if n != name]
        out = [*kept[:first], (name, value.encode()), *kept[first:]] if value else kept
    return tuple(out)


def diff(before: str, after: str, name: str) -> list[str]:
    """The lines of a unified diff; empty when nothing changed."""
    return list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), f"{name} (original)", f"{name} (corrected)", lineterm=""
        )
    )


def headers_text(headers: Headers) -> str:
    """One header a line; bytes that are not text in hexadecimal."""
    return "\n".join(f"{name}: {_text(value)}" for name, value in headers)


def _text(value: bytes | None) -> str:
    if value is None:
        return "(null)"
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"0x{value.hex()}"
