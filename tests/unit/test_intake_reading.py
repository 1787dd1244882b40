"""What two bodies under one id are compared by, and what a status says: the quick way says the same as the slow one.
Conflicts are judged by these bytes across years and releases, so they must not depend on how they were made.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import ids
from factmesh.batch import Change
from factmesh.errors import ValidationError
from factmesh.ids import Root
from factmesh.message import Delivery, Message
from factmesh_intake import reading, store
from factmesh_intake.decide import decide_status

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**64), 2**64),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e16, 1e22, 1e-5, 1.5e-5, 0.0001, -0.0, 5e-324, 1.7976931348623157e308]),
    st.text(),
    st.sampled_from(["\x00\x1f\x7f\x80", '"\\/\b\f\n\r\t', "\u2028\u2029", "\ud7ff\ue000\U0010ffff"]),
)
KEYS = st.text(max_size=4) | st.sampled_from(["a", "B", "é", "\ue000", "\U0001f600", "\uffff"])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)


@given(VALUES)
def test_the_bytes_of_a_body_are_those_of_ids(value: Any) -> None:
    """A4, DESIGN 7: the quick canonical JSON is the slow one byte for byte, and both read back as the value."""
    made = reading.canonical(value)
    assert made == ids.canonical_json(value)
    assert json.loads(made) == value


def test_texts_that_no_encoding_carries_are_refused_as_ever() -> None:
    """A4: a lone surrogate and a number that is not finite have no canonical bytes."""
    for value in ({"a": "\ud800"}, {"a": float("nan")}, [float("inf")]):
        with pytest.raises(ValueError, match=r".+"):
            reading.canonical(value)


FACT = "5f1b54ae-8a6b-8c3e-9c7b-3f3380a96849"
INSTANCE = "019ab54a-e8a6-8c3e-9c7b-3f3380a90000"


def status(seq: int, **changes: Any) -> Message:
    record = {
        "correlation_id": FACT, "instance_id": INSTANCE, "instance_seq": seq, "workflow": "w", "status": f"s{seq}",
        "step": None, "next_step": None, "outcome": None, "reason": None, "due_by": None, **changes,
    }  # fmt: skip
    return Message(Delivery("status", 0, seq, None, b""), "status", Root("id:x"), None, 0, record, b"", 0)


class _Connection:
    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    async def execute(self, _query: str, *columns: Any) -> None:
        self.given.append(tuple(zip(*columns, strict=True)))


async def test_of_one_instance_only_the_latest_word_is_written() -> None:
    """Issue 7: a batch tells one row an instance whatever the order of its messages, in the order of the keys."""
    other = INSTANCE.replace("0000", "0001")
    words = [status(3), status(1), status(4), status(2), status(7, instance_id=other), status(6, instance_id=other)]
    conn: Any = _Connection()
    await store.save_status(conn, [Change("", None, None, [(m, ()) for m in words])])
    (rows,) = conn.given
    assert [(row[1], row[2], row[4]) for row in rows] == [(INSTANCE, 4, "s4"), (other, 7, "s7")]
    await store.save_status(conn, [])
    assert len(conn.given) == 1


@pytest.mark.parametrize("field", ["correlation_id", "instance_id"])
@pytest.mark.parametrize("text", ["", "x", FACT.upper(), "{" + FACT + "}", FACT + "\n"])
def test_a_status_of_nobody_is_dead_with_its_field_named(field: str, text: str) -> None:
    """C4: what would fail the whole batch in the database kills its message alone, before."""
    now = datetime.now(UTC)
    with pytest.raises(ValidationError, match=f"{field}: not a UUID"):
        decide_status(None, status(1, **{field: text}), now)
    assert decide_status(None, status(1), now) == (None, ())
