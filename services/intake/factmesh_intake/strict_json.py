"""JSON as it may enter: no repeated keys, no NaN or infinity, bounded in depth and size, text that UTF-8 can carry.
Only the parser for strangers' bytes lives here; what we write ourselves is written with orjson.
"""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8 as BOM
from typing import Any

import orjson

from factmesh.errors import DecodeError

DEPTH_MAX = 32
"""Deeper than any fact that a person designed, far below the interpreter's recursion limit."""
NUMBER_CHARS_MAX = 40
"""A 64-bit integer has 20 characters and a double 24; longer digits are an attack on `int()` or text in disguise."""


def parse(raw: bytes, *, where: str = "") -> Any:
    """The value of one JSON text. Raises DecodeError saying what is wrong and where in the text, never quoting it."""
    if b"\\" not in raw:
        try:
            value = orjson.loads(raw)
            if _colons(value, DEPTH_MAX) == raw.count(b":"):
                return value
        except (orjson.JSONDecodeError, _Unsure):
            pass
    return _strictly(raw, where)


class _Unsure(Exception):
    """Only the strict parser can tell whether this may enter."""


def _colons(value: Any, depth_left: int) -> int:
    """How many colons the text of this value has, if it has no escapes: one a key, and those inside of texts.

    A text with more of them repeats a key, which orjson does not tell. Floats are unsure: digits may be lost in them.
    """
    kind = type(value)
    if kind is str:
        return value.count(":")  # type: ignore[no-any-return]
    if kind is int or value is None or kind is bool:
        return 0
    if kind is float or depth_left == 0:
        raise _Unsure
    if kind is list:
        return sum([_colons(item, depth_left - 1) for item in value])
    found = len(value)
    for key, item in value.items():
        found += key.count(":") + (item.count(":") if type(item) is str else _colons(item, depth_left - 1))
    return found


def _strictly(raw: bytes, where: str) -> Any:
    if raw.startswith(BOM):
        raise DecodeError(
            "the JSON begins with a byte order mark, which is no JSON", where=where, hint="save it as UTF-8 without BOM"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError(
            f"the JSON is not UTF-8 (byte {error.start})", where=where, hint="encode it as UTF-8"
        ) from None
    _check_depth(text, where)
    try:
        value = _DECODER.decode(text)
    except _Refused as error:
        raise DecodeError(str(error), where=where, hint=error.hint) from None
    except json.JSONDecodeError as error:
        raise DecodeError(
            f"not JSON: {error.msg} at line {error.lineno} column {error.colno}",
            where=where,
            hint="send one JSON value and nothing after it",
        ) from None
    # `"\ud800"` is legal JSON and no legal text: it would fail later, at the first encoder that meets it.
    if "\\u" in text and _has_lone_surrogate(value):
        raise DecodeError("a lone surrogate in a JSON text", where=where, hint="send well-formed Unicode")
    return value


class _Refused(ValueError):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key[:64]!r} is there twice in one object", "send each key once")
            seen.add(key)
    return made


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is not a JSON number", "send null, or leave the field out")


def _float(digits: str) -> float:
    if len(digits) > NUMBER_CHARS_MAX:
        raise _Refused(f"a number of {len(digits)} characters", "send it as text")
    number = float(digits)
    if not math.isfinite(number):
        raise _Refused("a number too large for a double", "send it as text")
    return number


def _int(digits: str) -> int:
    if len(digits) > NUMBER_CHARS_MAX:
        raise _Refused(f"a number of {len(digits)} characters", "send it as text")
    return int(digits)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int, strict=True
)


def _check_depth(text: str, where: str) -> None:
    """Before parsing, so that the parser's own recursion is bounded. Brackets inside strings do not count."""
    if text.count("[") + text.count("{") <= DEPTH_MAX:
        return
    depth = 0
    inside = escaped = False
    for char in text:
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char == '"':
            inside = True
        elif char in "[{":
            depth += 1
            if depth > DEPTH_MAX:
                raise DecodeError(f"the JSON is nested deeper than {DEPTH_MAX} levels", where=where, hint="flatten it")
        elif char in "]}":
            depth -= 1


def _has_lone_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return any(_has_lone_surrogate(k) or _has_lone_surrogate(v) for k, v in value.items())
    if isinstance(value, list):
        return any(_has_lone_surrogate(v) for v in value)
    return False
