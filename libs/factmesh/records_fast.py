"""Generated code for our own records: what decoding and encoding check and hash, in one function each.
An accelerator only, as `avro_fast` is: what is not plainly right raises, and `records` judges it and words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

from factmesh.avro_fast import NOT_PLAIN, Field, compile_source, plan, read_lines, record_of, write_lines

HASH_PERSON: Final = b"fm.record.body"
_HEX: Final = "0123456789abcdef"
#: Turns a UUID's text into its form, and anything that has no place in one into `x`.
_FORM_OF: Final = bytes(ord("h") if chr(c) in _HEX else c if chr(c) in "- " else ord("x") for c in range(256))
_FORM: Final = "hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh"

_HASHER: Final = blake2b(digest_size=16, person=HASH_PERSON)


@lru_cache(4096)  # of one record's texts most have always the same lengths
def _lengths(*of: int) -> str:
    return str([*of])


Encode = Callable[[Mapping[str, Any]], bytes]
Read = Callable[[bytes], tuple[dict[str, Any], bytes]]


@dataclass(frozen=True, slots=True)
class Rules:
    """What our own records ask of their fields beyond Avro's types, and what their body hash is made of."""

    uuids: frozenset[str]
    times: frozenset[str]
    time_bounds: tuple[int, int]
    hashed_texts: tuple[str, ...]
    hashed_numbers: tuple[str, ...]
    hashed_others: tuple[str, ...]
    """The other hashed fields; they are left out where they are at their default."""


def compile_checked(fields: list[dict[str, Any]], prefix: bytes, rules: Rules) -> tuple[Encode, Read] | None:
    """An encoder that may be given a record without its null defaults, and a reader of record and body hash.

    None where the record, or what its hash is made of, is not flat.
    """
    flat = plan(fields, rules.times)
    if flat is None:
        return None
    defaults = {str(f["name"]): f["default"] for f in fields if "default" in f}
    if any(value is not None for value in defaults.values()):
        return None
    if {f.name for f in flat if f.nullable} != set(defaults):
        return None  # the hash takes a null that is no default for a text
    scope = {"prefix": prefix, "form_of": _FORM_OF, "lengths": _lengths, "hasher": _HASHER, "NOT_PLAIN": NOT_PLAIN}
    encode = compile_source("encode", "r", _encode_lines(flat, defaults, rules), scope)
    scope["read_any"] = compile_source("read_any", "b", _read_lines(flat, rules, len(prefix), short=False), scope)
    lines = [f" {line}" for line in _read_lines(flat, rules, len(prefix), short=True)]
    return encode, compile_source("read", "b", ["try:", *lines, "except NOT_PLAIN: return read_any(b)"], scope)


def _encode_lines(flat: list[Field], defaults: Mapping[str, Any], rules: Rules) -> list[str]:
    lines, joined = ["k = len(r)", "get = r.get"], ["prefix"]
    for field in flat:
        body, parts = write_lines(field, rules.time_bounds)
        if field.name in defaults:
            lines += [f"{field.v} = get({field.name!r})", f"if {field.v} is not None or {field.name!r} in r: k -= 1"]
        else:
            lines.append(f"{field.v} = r[{field.name!r}]")
        lines += body
        joined += parts
    texts = [f.v for f in flat if f.kind == "string" and not f.nullable]
    lines += [f"if k != {len(flat) - len(defaults)}: raise NotPlainError", *_judge_lines(flat, rules, texts)]
    return [*lines, f"return b''.join(({', '.join(joined)}))"]


def _read_lines(flat: list[Field], rules: Rules, start: int, *, short: bool) -> list[str]:
    lines = [f"i = {start}", *(["s = b.decode('latin-1')"] if short else [])]
    for field in flat:
        lines += read_lines(field, rules.time_bounds, short=short)
    texts = [f.v for f in flat if f.kind == "string" and not f.nullable and f.name not in rules.hashed_texts]
    lines += ["if i != len(b): raise NotPlainError", *_judge_lines(flat, rules, texts, short=short)]
    return [*lines, *_hash_lines(flat, rules, short=short)]


def _text_lines(v: str, *, ascii: bool) -> str:
    return f"if '\\0' in {v}{f' or not {v}.isascii()' if ascii else ''}: raise NotPlainError"


def _together(texts: list[str]) -> str:
    return f't = f"{"".join(f"{{{v}}}" for v in texts)}"'


def _judge_lines(flat: list[Field], rules: Rules, texts: list[str], *, short: bool = False) -> list[str]:
    """No NUL in these texts, nor in those that may be null; UUIDs are UUIDs.

    All at once. The form holds one blank fewer than there are UUIDs, which are those between them: none has its own.
    """
    lines = [_together(texts), _text_lines("t", ascii=short)] if texts else []
    for field in flat:
        if field.kind == "string" and field.nullable:
            lines += [f"if {field.v} is not None:", " " + _text_lines(field.v, ascii=short)]
    uuids = [f for f in flat if f.name in rules.uuids]
    always = [f.v for f in uuids if not f.nullable]
    if always:
        together = " ".join(f"{{{v}}}" for v in always)
        form = " ".join([_FORM] * len(always)).encode()
        lines.append(f"if f'{together}'.encode().translate(form_of) != {form!r}: raise NotPlainError")
    for field in uuids:
        if field.nullable:
            form = _FORM.encode()
            lines.append(f"if {field.v} is not None and {field.v}.encode().translate(form_of) != {form!r}:")
            lines.append(" raise NotPlainError")
    return lines


def _hash_lines(flat: list[Field], rules: Rules, *, short: bool) -> list[str]:
    """The body hash as `records` defines it, from the values at hand; the texts are looked through for NUL here."""
    by_name = {f.name: f for f in flat}
    texts = [by_name[name].v for name in rules.hashed_texts]
    numbers = "".join(f"{{{by_name[name].v}}}, " for name in rules.hashed_numbers)
    numbers = numbers[:-1] if len(rules.hashed_numbers) == 1 else numbers[:-2]  # as Python writes a tuple
    lengths = f"{{lengths({', '.join(f'len({t})' for t in texts)})}}"
    lines = [_together(texts), _text_lines("t", ascii=short)]
    lines.append(f"h = hasher.copy(); h.update(f'{lengths}({numbers}){{t}}'.encode())")
    for name in rules.hashed_others:
        field = by_name[name]
        raw = field.v if field.kind == "bytes" else f"str({field.v}).encode()"
        put = f"w = {raw}; h.update(b'{name}=%d:' % len(w)); h.update(w)"
        lines.append(f"if {field.v} is not None: {put}" if field.nullable else put)
    return [*lines, f"return {record_of(flat)}, h.digest()"]
