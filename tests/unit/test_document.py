"""JSON as definitions, states and bodies are written and read: the same as the standard library's, at less cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh.document import canonical_json, compact_json, read_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=12,
)


def told(call: Any, *given: Any, **named: Any) -> tuple[str, str]:
    """What came, or which error with which text."""
    try:
        return ("value", repr(call(*given, **named)))
    except Exception as error:
        return (type(error).__name__, str(error))


@settings(max_examples=500, deadline=None)
@given(values)
def test_what_is_written_is_what_the_standard_library_writes(value: object) -> None:
    """INV-K: the bytes of a body, which its hash is over, do not depend on how fast they were written."""
    plain: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    assert told(canonical_json, value) == told(lambda v: json.dumps(v, sort_keys=True, **plain).encode(), value)
    assert told(compact_json, value) == told(lambda v: json.dumps(v, **plain).encode(), value)


@settings(max_examples=500, deadline=None)
@given(values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=12))
def test_what_is_read_is_what_the_standard_library_reads(raw: bytes) -> None:
    """Bad input: whatever the bytes are, the value or the error is the one that json.loads gives."""
    assert told(read_json, raw) == told(json.loads, raw)


@pytest.mark.parametrize(
    "raw", [b"", b" {} ", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), "1".encode("utf-16-le"), b"{} x", b"NaN", b'"\xff"',
            b"1e999", b'{"a":1,"a":2}', b"[" * 3000]
)  # fmt: skip
def test_bytes_that_are_not_plain_are_judged_by_the_standard_library(raw: bytes) -> None:
    """Bad input: other encodings, blanks around, text behind, and depth."""
    assert told(read_json, raw) == told(json.loads, raw)
