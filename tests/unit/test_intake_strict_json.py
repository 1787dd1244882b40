"""Strangers' JSON: the parser that is fast for plain texts says of every text what the strict one says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from factmesh.errors import DecodeError
from factmesh_intake import strict_json

TEXT = st.text(st.sampled_from('ab:,"{}[]\\ é😀\x00\x7f\ud800/'), max_size=5)
NUMBERS = st.sampled_from(
    [
        "0",
        "-0",
        "1",
        "-1",
        "01",
        "1.",
        "1.5",
        "1e5",
        "1E400",
        "0.1000000000000000055511151231257827",
        "-",
        ".5",
        "NaN",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        "Infinity",
        "-Infinity",
        "9" * 41,
    ]
)
LITERALS = st.sampled_from(["true", "false", "null", "nul", '"', "", "\ufeff"])
SPACE = st.sampled_from(["", "", " ", "\n\t", "\x0c"])


def _objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    keys = st.sampled_from(["a", "b", "a:b", "", "\\u0061", "é"])
    pairs = st.lists(st.tuples(keys, SPACE, inner), max_size=4)
    return pairs.map(lambda items: "{" + ",".join(f'"{k}":{s}{v}' for k, s, v in items) + "}")


def _lists(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]")


LEAVES = st.one_of(NUMBERS, LITERALS, TEXT.map(json.dumps), TEXT.map(lambda t: f'"{t}"'))
TEXTS = st.recursive(LEAVES, lambda inner: st.one_of(_objects(inner), _lists(inner)), max_leaves=8)


def outcome(raw: bytes, parse: Any) -> tuple[str, str, str]:
    """The value with its types and its order, or the error's words."""
    try:
        return ("value", repr(parse(raw)), "")
    except DecodeError as error:
        return ("refused", error.message, error.hint)


@given(TEXTS, SPACE)
@example('{"a":1,"a":2}', "")
@example('{"a":"\\u003a","a":2}', "")
@example('{"a":":","b":{"a:b":1}}', "")
@example("[" * 32 + "]" * 32, "")
@example("[" * 33 + "]" * 33, "")
@example('{"a":' * 33 + "1" + "}" * 33, "")
@example("[" * 5000, "")
@example('"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["', "")
def test_the_fast_parser_equals_the_strict_one(text: str, space: str) -> None:
    """A1: the same values, of the same types and in the same order, and the same refusals in the same words."""
    raw = (space + text + space).encode("utf-8", "surrogatepass")
    assert outcome(raw, strict_json.parse) == outcome(raw, lambda r: strict_json._strictly(r, ""))


@given(st.binary(max_size=24))
def test_bytes_that_are_no_json_are_judged_the_same(raw: bytes) -> None:
    """A1: neither parser takes bytes that the other refuses."""
    assert outcome(raw, strict_json.parse) == outcome(raw, lambda r: strict_json._strictly(r, ""))


def test_plain_texts_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 7: what facts mostly are does not meet the strict parser; a repeated key and an escape do."""

    def refuse(raw: bytes, where: str) -> Any:
        raise AssertionError(raw)

    monkeypatch.setattr(strict_json, "_strictly", refuse)
    assert strict_json.parse(b'{"at": "2026-01-01T10:00:00Z", "n": [1, true, null, {"x:y": "z"}]}')
    for raw in (b'{"a": 1, "a": 1}', b'{"a": "\\u0062"}', b'{"a": 1.5}', b"[1"):
        with pytest.raises(AssertionError):
            strict_json.parse(raw)
