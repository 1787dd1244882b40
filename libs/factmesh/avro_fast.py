"""Generated code for flat records, which ours are: the same bytes as the vendor's codec in a third of its time.
An accelerator only: whatever is not plainly right raises here, and the strict path judges it and words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

FIELDS_MAX: Final = 64
"""Generated functions stay of a size that a person can print and read."""
_SHORT: Final = 4096


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


_LENGTHS: Final = tuple(zigzag(n) for n in range(_SHORT))


def _length(n: int) -> bytes:
    return _LENGTHS[n] if n < _SHORT else zigzag(n)


_KINDS: Final = frozenset({"string", "bytes", "long", "int", "boolean"})


def _plan(fields: list[dict[str, Any]]) -> list[tuple[str, str, bool]] | None:
    """(name, kind, nullable) of each field; None where one is not flat."""
    plan = []
    for field in fields:
        kind, nullable = field["type"], False
        if isinstance(kind, list):
            if len(kind) != 2 or kind[0] != "null":
                return None
            kind, nullable = kind[1], True
        if not isinstance(kind, str) or kind not in _KINDS:
            return None
        plan.append((str(field["name"]), kind, nullable))
    return plan


_WRITE: Final[Mapping[str, tuple[str, ...]]] = {
    "string": ("if type(v) is not str: raise NotPlainError", "e = v.encode()", "o += (length(len(e)), e)"),
    "bytes": ("if type(v) is not bytes: raise NotPlainError", "o += (length(len(v)), v)"),
    "long": (f"if type(v) is not int or not {-(1 << 63)} <= v < {1 << 63}: raise NotPlainError", "o.append(zigzag(v))"),
    "int": (f"if type(v) is not int or not {-(1 << 31)} <= v < {1 << 31}: raise NotPlainError", "o.append(zigzag(v))"),
    "boolean": ("if type(v) is not bool: raise NotPlainError", "o.append(b'\\1' if v else b'\\0')"),
}
_TAKE: Final = (
    "n = b[i]; i += 1",
    "if n > 127: n, i = unzigzag(b, i - 1)",
    "elif n & 1: raise NotPlainError",
    "else: n >>= 1",
    "if n < 0: raise NotPlainError",
    "j = i + n",
)
_READ: Final[Mapping[str, tuple[str, ...]]] = {
    "string": (*_TAKE, "v = b[i:j].decode(); i = j"),
    "bytes": (*_TAKE, "v = b[i:j]; i = j"),
    "long": ("v, i = unzigzag(b, i)",),
    "int": ("v, i = unzigzag(b, i)", f"if not {-(1 << 31)} <= v < {1 << 31}: raise NotPlainError"),
    "boolean": ("v = b[i]; i += 1", "if v > 1: raise NotPlainError", "v = v == 1"),
}


def compile_flat(fields: list[dict[str, Any]], prefix: bytes) -> tuple[Encode, Decode] | None:
    """Encoder and decoder of a record whose fields are plain or optional; None where some field is not.

    The names come from a schema that was parsed, so they are identifiers and cannot carry code.
    """
    plan = _plan(fields)
    if not plan or len(plan) > FIELDS_MAX or not all(name.isidentifier() for name, _, _ in plan):
        return None
    write = ["def encode(r):", f" if len(r) != {len(plan)}: raise NotPlainError", " o = [prefix]"]
    read = ["def decode(b):", f" i = {len(prefix)}", " r = {}"]
    for name, kind, nullable in plan:
        write.append(f" v = r[{name!r}]")
        pad = " "
        if nullable:
            write += [" if v is None: o.append(b'\\0')", " else:", "  o.append(b'\\2')"]
            read += [" n = b[i]; i += 1", " if n == 0: v = None", " elif n != 2: raise NotPlainError", " else:"]
            pad = "  "
        write += [pad + line for line in _WRITE[kind]]
        read += [pad + line for line in _READ[kind]]
        read.append(f" r[{name!r}] = v")
    write.append(" return b''.join(o)")
    # A slice past the end is short, not an error: the index then stands behind the end.
    read += [" if i != len(b): raise NotPlainError", " return r"]
    scope: dict[str, Any] = {
        "NotPlainError": NotPlainError,
        "length": _length,
        "zigzag": zigzag,
        "unzigzag": unzigzag,
        "prefix": prefix,
    }
    exec("\n".join([*write, *read]), scope)
    return scope["encode"], scope["decode"]
