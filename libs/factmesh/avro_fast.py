"""Generated code for flat records, which ours are: the same bytes as the vendor's codec in a fraction of its time.
An accelerator only: whatever is not plainly right raises here, and the strict path judges it and words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, Final

FIELDS_MAX: Final = 64
"""Generated functions stay of a size that a person can print and read."""
_SHORT: Final = 4096
_TIMES_MAX: Final = 256
"""Instants that are remembered with their bytes: all that a batch emits carries a few."""


class NotPlainError(Exception):
    """The strict path must judge this value; also raised as IndexError, KeyError, TypeError or ValueError."""


#: What the generated functions raise where the strict path has to look.
NOT_PLAIN: Final = (NotPlainError, IndexError, KeyError, TypeError, ValueError, AttributeError)

Encode = Callable[[Mapping[str, Any]], bytes]
Decode = Callable[[bytes], dict[str, Any]]


def zigzag(n: int) -> bytes:
    """Avro's variable-length form of a 64-bit integer."""
    z = (n << 1) ^ (n >> 63)
    if 0x8_0000_0000 <= z < 0x400_0000_0000:  # six bytes: every timestamp from 1970 to 2039
        return bytes(
            (z & 127 | 128, z >> 7 & 127 | 128, z >> 14 & 127 | 128, z >> 21 & 127 | 128, z >> 28 & 127 | 128, z >> 35)
        )
    out = bytearray()
    while z > 127:
        out.append(z & 127 | 128)
        z >>= 7
    out.append(z)
    return bytes(out)


def unzigzag(b: bytes, i: int) -> tuple[int, int]:
    """The integer at `i` and the index after it. Raises where it is longer than ten bytes or not the shortest form."""
    byte = b[i]
    i += 1
    z = byte & 127
    shift = 7
    while byte > 127:
        if shift > 63:  # a megabyte of 0xff would otherwise be added up as one number
            raise NotPlainError
        byte = b[i]
        i += 1
        z |= (byte & 127) << shift
        shift += 7
    if shift > 7 and (byte == 0 or z >> 64):
        raise NotPlainError
    return (z >> 1) ^ -(z & 1), i


@lru_cache(_TIMES_MAX)
def _six(raw: bytes) -> int | None:
    """The integer that these six bytes are; None where they are not one."""
    try:
        n, size = unzigzag(raw, 0)
    except (NotPlainError, IndexError):
        return None
    return n if size == 6 else None


def _unlength(b: bytes, i: int) -> tuple[int, int]:
    """A length of more than one byte, and the index after it."""
    n, i = unzigzag(b, i)
    if n < 0:
        raise NotPlainError
    return n, i


_SCOPE: Final[Mapping[str, Any]] = {
    "NotPlainError": NotPlainError,
    "short": tuple(zigzag(n) for n in range(_SHORT)),
    "zigzag": zigzag,
    "stamp": lru_cache(_TIMES_MAX)(zigzag),
    "six": _six,
    "unzigzag": unzigzag,
    "unlength": _unlength,
    # From a text's length in one byte to the index behind it; None, and so a TypeError, for what is no such length.
    "behind": tuple(None if n & 129 else (n >> 1) + 1 for n in range(256)),
}
_KINDS: Final = frozenset({"string", "bytes", "long", "int", "boolean", "time"})
_BITS: Final = {"long": 63, "time": 63, "int": 31}


class Field:
    """One flat field as the generators see it; `v` is the name of its value in generated code."""

    __slots__ = ("kind", "name", "nullable", "v")

    def __init__(self, name: str, kind: str, nullable: bool, v: str) -> None:
        self.name, self.kind, self.nullable, self.v = name, kind, nullable, v


def plan(fields: list[dict[str, Any]], times: Collection[str] = ()) -> list[Field] | None:
    """The fields of a record, those in `times` as instants; None where one is not flat.

    The names come from a schema that was parsed, so they are identifiers and cannot carry code.
    """
    out = []
    for n, field in enumerate(fields):
        kind, nullable, name = field["type"], False, str(field["name"])
        if isinstance(kind, list):
            if len(kind) != 2 or kind[0] != "null":
                return None
            kind, nullable = kind[1], True
        if not isinstance(kind, str) or kind not in _KINDS or not name.isidentifier():
            return None
        out.append(Field(name, "time" if kind == "long" and name in times else kind, nullable, f"v{n}"))
    return out if 0 < len(out) <= FIELDS_MAX else None


def write_lines(field: Field, bounds: tuple[int, int] | None = None) -> tuple[list[str], list[str]]:
    """Lines that check a value and make its parts, and the names of these parts in the order of the bytes.

    `bounds` are those of an instant, both included.
    """
    v, kind = field.v, field.kind
    if kind in ("string", "bytes"):
        parts = [f"{v}n", f"{v}e"]
        lines = [
            f"if type({v}) is not {'str' if kind == 'string' else 'bytes'}: raise NotPlainError",
            f"{v}e = {v}.encode()" if kind == "string" else f"{v}e = {v}",
            f"n = len({v}e)",
            f"{v}n = short[n] if n < {_SHORT} else zigzag(n)",
        ]
    elif kind == "boolean":
        parts = [f"{v}e"]
        lines = [f"if type({v}) is not bool: raise NotPlainError", f"{v}e = b'\\1' if {v} else b'\\0'"]
    else:
        low, high = bounds if bounds and kind == "time" else (-(1 << _BITS[kind]), (1 << _BITS[kind]) - 1)
        parts = [f"{v}e"]
        lines = [
            f"if type({v}) is not int or not {low} <= {v} <= {high}: raise NotPlainError",
            f"{v}e = stamp({v})" if kind == "time" else f"{v}e = short[{v}] if 0 <= {v} < {_SHORT} else zigzag({v})",
        ]
    if not field.nullable:
        return lines, parts
    empty = " = ".join([f"{v}b", *parts, "b''"])
    lines = [f"if {v} is None:", f" {empty}", f" {v}b = b'\\0'", "else:", f" {v}b = b'\\2'", *(f" {x}" for x in lines)]
    return lines, [f"{v}b", *parts]


def read_lines(field: Field, bounds: tuple[int, int] | None = None, *, short: bool = False) -> list[str]:
    """Lines that take the value at `b[i]` and move `i` behind it. `n & 129`: negative, or longer than one byte.

    `short` reads texts of less than 64 characters, from `s`, which is `b` as Latin-1: who uses it checks for ASCII.
    """
    v, kind = field.v, field.kind
    if kind == "string" and short:
        lines = [f"{v} = s[i + 1:(i := i + behind[b[i]])]"]
    elif kind in ("string", "bytes"):
        lines = [
            "n = b[i]",
            "if n & 129: n, i = unlength(b, i)",
            "else: n >>= 1; i += 1",
            "j = i + n",
            f"{v} = b[i:j].decode()" if kind == "string" else f"{v} = b[i:j]",
            "i = j",
        ]
    elif kind == "boolean":
        lines = ["n = b[i]; i += 1", "if n > 1: raise NotPlainError", f"{v} = n == 1"]
    elif kind == "time":
        low, high = bounds or (-(1 << 63), (1 << 63) - 1)
        lines = [
            f"{v} = six(b[i:i + 6]); i += 6",
            f"if {v} is None:",
            f" {v}, i = unzigzag(b, i - 6)",
            f" if not {low} <= {v} <= {high}: raise NotPlainError",
        ]
    else:
        lines = [f"{v} = b[i]", f"if {v} & 129:", f" {v}, i = unzigzag(b, i)"]
        lines += [f" if not {-(1 << 31)} <= {v} < {1 << 31}: raise NotPlainError"] if kind == "int" else []
        lines += [f"else: {v} >>= 1; i += 1"]
    if field.nullable:
        head = ["n = b[i]; i += 1", f"if n == 0: {v} = None", "elif n != 2: raise NotPlainError", "else:"]
        lines = head + [f" {line}" for line in lines]
    return lines


def record_of(fields: list[Field]) -> str:
    """The record as an expression."""
    return "{" + ", ".join(f"{f.name!r}: {f.v}" for f in fields) + "}"


def compile_source(name: str, argument: str, lines: list[str], scope: Mapping[str, Any]) -> Any:
    """The function of these lines."""
    found: dict[str, Any] = {**_SCOPE, **scope}
    exec("\n".join([f"def {name}({argument}):", *(f" {line}" for line in lines)]), found)
    return found[name]


def compile_flat(
    fields: list[dict[str, Any]], prefix: bytes, times: Collection[str] = ()
) -> tuple[Encode, Decode] | None:
    """Encoder and decoder of a record whose fields are plain or optional; None where some field is not.

    `times` are the fields that hold instants, if that is known: they repeat, and are remembered with their bytes.
    """
    flat = plan(fields, times)
    if flat is None:
        return None
    write, joined, read = [f"if len(r) != {len(flat)}: raise NotPlainError"], ["prefix"], [f"i = {len(prefix)}"]
    for field in flat:
        lines, parts = write_lines(field)
        write += [f"{field.v} = r[{field.name!r}]", *lines]
        joined += parts
        read += read_lines(field)
    write.append(f"return b''.join(({', '.join(joined)}))")
    # A slice past the end is short, not an error: the index then stands behind the end.
    read += ["if i != len(b): raise NotPlainError", f"return {record_of(flat)}"]
    scope = {"prefix": prefix}
    return compile_source("encode", "r", write, scope), compile_source("decode", "b", read, scope)
