"""A command's row and its history as bytes: what an earlier version wrote is read; what memory holds, the row says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from factmesh import ids
from factmesh.effects import Schedule
from factmesh.errors import ErrorClass
from factmesh.ids import Root
from factmesh.message import Delivery, Message, to_ms
from factmesh.retry import RetryPolicy
from factmesh_connector.decide import decide
from factmesh_connector.model import Call, History, Operation, State, Strategy, Task, pack_task, unpack_task

NOW = datetime(2026, 3, 1, 12, 0, 0, 1500, tzinfo=UTC)
ID = "019ca957-5600-8abc-8def-0123456789ab"
TASK = Task(
    command_id=ID, connector="bank", operation="charge", input='{"a":2,"n":"ü \\" 1.50"}', idempotency_key=ID,
    correlation_id="c", actor="a", business_object_type="t", business_object_id="o", instance_id=ID, instance_seq=3,
    step="pay", workflow="w", in_flight_max_s=60.0, root=f"id:{ID}", opening=2, deadline=NOW,
    retry=RetryPolicy(attempts_max=3, base_s=0.25), traceparent="00-x",
)  # fmt: skip
HISTORY = History(
    settled=2, calls=2, first_attempt_at=NOW, first_failed_at=NOW, ambiguous_since=NOW,
    ended_at=NOW + timedelta(seconds=1), asks=1, first_ask_at=NOW, stopped="over", error_class=ErrorClass.AMBIGUOUS,
    error_message="odd ü", log=(Call(NOW, 5, "call", "ambiguous"), Call(NOW, 5, "ask", "done")),
)  # fmt: skip

#: As version 0.1.0 wrote them, byte for byte.
OLD_HEAD = (
    '{"command_id":"019ca957-5600-8abc-8def-0123456789ab","connector":"bank","operation":"charge",'
    '"input":"{\\"a\\":2,\\"n\\":\\"ü \\\\\\" 1.50\\"}","idempotency_key":"019ca957-5600-8abc-8def-0123456789ab",'
    '"correlation_id":"c","actor":"a","business_object_type":"t","business_object_id":"o",'
    '"instance_id":"019ca957-5600-8abc-8def-0123456789ab","instance_seq":3,"step":"pay","workflow":"w",'
    '"deadline":"2026-03-01T12:00:00.001500Z","retry":{"attempts_max":3,"base_s":0.25,"factor":2.0,'
    '"delay_max_s":60.0,"total_max_s":240.0},"in_flight_max_s":60.0,"traceparent":"00-x",'
    '"root":"id:019ca957-5600-8abc-8def-0123456789ab","opening":2}'
).encode()
OLD_HISTORY = (
    '{"settled":2,"calls":2,"first_attempt_at":"2026-03-01T12:00:00.001500Z",'
    '"first_failed_at":"2026-03-01T12:00:00.001500Z","ambiguous_since":"2026-03-01T12:00:00.001500Z",'
    '"ended_at":"2026-03-01T12:00:01.001500Z","asks":1,"first_ask_at":"2026-03-01T12:00:00.001500Z","stopped":"over",'
    '"error_class":"ambiguous","error_message":"odd ü","log":[{"at":"2026-03-01T12:00:00.001500Z","ms":5,'
    '"what":"call","ended":"ambiguous"},{"at":"2026-03-01T12:00:00.001500Z","ms":5,"what":"ask","ended":"done"}]}'
).encode()


def packed(head: bytes) -> bytes:
    return len(head).to_bytes(4, "big") + head + b"the delivery"


def test_rows_of_an_earlier_version_are_read_and_it_reads_ours() -> None:
    """B2, rolling deploys: both versions write the same fields in the same spelling."""
    assert unpack_task(packed(OLD_HEAD)) == (TASK, b"the delivery")
    ours = pack_task(TASK, b"the delivery")
    head = ours[4 : -len(b"the delivery")]
    assert json.loads(head) == json.loads(OLD_HEAD)
    assert History.from_bytes(OLD_HISTORY) == HISTORY
    assert HISTORY.to_bytes() == OLD_HISTORY


def test_a_name_of_a_later_version_is_passed_over() -> None:
    """B2: a row that waits survives a rollback."""
    later = {**json.loads(OLD_HEAD), "invented": [1]}
    assert unpack_task(packed(json.dumps(later).encode()))[0] == TASK
    assert History.from_bytes(b'{"calls":1,"invented":{}}') == History(calls=1)


instants = st.integers(0, 2**52).map(lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us))
texts = st.text(st.characters(exclude_categories=["Cs"]))
calls = st.builds(Call, instants, st.integers(0, 2**31 - 1), st.sampled_from(["call", "ask"]), texts)


@given(
    st.builds(
        History, settled=st.integers(0, 9), calls=st.integers(0, 9), first_attempt_at=st.none() | instants,
        ambiguous_since=st.none() | instants, asks=st.integers(0, 9), stopped=st.none() | texts,
        error_class=st.none() | st.sampled_from(ErrorClass), error_message=st.none() | texts,
        log=st.lists(calls, max_size=3).map(tuple),
    )
)  # fmt: skip
def test_a_history_reads_back_as_it_was_written(history: History) -> None:
    """C4, B4: nothing of what is known of the attempts is lost between two of them."""
    assert History.from_bytes(history.to_bytes()) == history


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
OPERATION = Operation("charge", Strategy.NONE)


def command(body: bytes) -> Message:
    record: dict[str, Any] = {
        "ce_id": ID, "correlation_id": "c", "actor": "a", "traceparent": None, "business_object_type": "t",
        "business_object_id": "o", "instance_id": ID, "instance_seq": 3, "workflow": "w", "step": "pay",
        "connector": "bank", "operation": "charge", "idempotency_key": ID, "deadline": None, "retry": None,
        "body": body,
    }  # fmt: skip
    delivery = Delivery("factmesh.command.bank.v1", 1, 2, ID.encode(), b"the bytes")
    return Message(delivery, "command", Root.own(UUID(ID)), UUID(ID), 0, record, b"h" * 16, to_ms(NOW))


@given(st.dictionaries(texts, plain, max_size=5), st.booleans(), st.sampled_from([(",", ":"), (", ", ": ")]))
def test_a_body_has_one_hash_and_one_value_however_it_is_spelt(
    value: dict[str, Any], sort: bool, separators: tuple[str, str]
) -> None:
    """INV-K: the short way for canonical bodies and the long way for all others agree, with the hash that earlier
    versions stored under the key too; what is handed on in memory is what the row says."""
    raw = json.dumps(value, sort_keys=sort, separators=separators, ensure_ascii=False).encode()
    state, effects = decide({"bank": {"charge": OPERATION}}, State(), command(raw), NOW)
    (row,) = [e for e in effects if isinstance(e, Schedule)]
    assert state.key is not None
    assert state.key.body_hash == ids.body_hash("bank", "charge", ids.canonical_json(value))
    task, _ = unpack_task(row.payload)
    assert task == row.hand.task
    assert task.input == json.dumps(json.loads(raw), separators=(",", ":"), ensure_ascii=False)
    assert ids.canonical_json(json.loads(task.input)) == ids.canonical_json(row.hand.input) == ids.canonical_json(value)
