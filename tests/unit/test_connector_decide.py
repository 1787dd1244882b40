"""Commands and resolutions as histories of messages and the effects that they must have; no row and no call is real."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from factmesh import ids
from factmesh.effects import Amend, Effect, MarkLedger, Publish, Schedule
from factmesh.errors import ConflictError, ErrorClass, FactmeshError, ValidationError
from factmesh.ids import Root
from factmesh.message import Delivery, Message, to_ms, unpack_delivery
from factmesh.retry import RetryPolicy
from factmesh_connector.decide import decide, object_key, result_id
from factmesh_connector.model import History, Key, Operation, Row, State, Strategy, Task, pack_task, unpack_task

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
COMMAND = ids.message_id("orchestrator", "id:x", 0, 0, to_ms(NOW))
INSTANCE = ids.message_id("intake", "id:y", 0, 0, to_ms(NOW))
KEY = ids.idempotency_key(INSTANCE, "pay", 0, 0)
OPERATION = Operation("charge", Strategy.NONE, in_flight_max_s=60, output_bytes_max=50, output_fields=("ref",))
CATALOGUE = {"bank": {"charge": OPERATION}}


def message(kind: str, **fields: Any) -> Message:
    record: dict[str, Any] = {
        "ce_id": str(COMMAND), "correlation_id": "c", "actor": "service:orchestrator", "traceparent": None,
        "business_object_type": "order", "business_object_id": "o-1", "instance_id": str(INSTANCE), "instance_seq": 3,
    }  # fmt: skip
    delivery = Delivery("factmesh.command.bank.v1", 1, 2, str(INSTANCE).encode(), b"the bytes")
    return Message(delivery, kind, Root.own(COMMAND), COMMAND, 0, {**record, **fields}, b"h" * 16, to_ms(NOW))


def command(**fields: Any) -> Message:
    body = {
        "workflow": "w", "workflow_version": "1.0.0", "step": "pay", "iteration": 0, "run": 0, "connector": "bank",
        "operation": "charge", "idempotency_key": str(KEY), "deadline": None, "retry": None, "body": b'{"b":1,"a":2}',
    }  # fmt: skip
    return message("command", **{**body, **fields})


def resolution(verdict: str, **fields: Any) -> Message:
    body = {
        "command_id": str(COMMAND), "verdict": verdict, "output": None, "reason": "looked it up", "actor": "user:ann",
        "entered_at": to_ms(NOW), "record_id": None, "opening": 1,
    }  # fmt: skip
    return message("resolution", **{**body, **fields})


def run(state: State, given: Message) -> tuple[State, Sequence[Effect]]:
    return decide(CATALOGUE, state, given, NOW)


def only(effects: Sequence[Effect], kind: type) -> Any:
    (found,) = [e for e in effects if isinstance(e, kind)]
    return found


def task() -> Task:
    _, effects = run(State(), command())
    return unpack_task(only(effects, Schedule).payload)[0]


def unknown(**more: Any) -> State:
    history = History(calls=2, ended_at=NOW)
    values: dict[str, Any] = {"state": "unknown", "epoch": 4, "task": task(), "history": history, "ended_at": NOW}
    return State(row=Row(**{**values, **more}))


def test_a_command_becomes_a_row_that_is_claimed_at_once() -> None:
    """DESIGN 5: a command is first a row, in its connector's kind, with the delivery byte for byte."""
    policy = RetryPolicy(attempts_max=3)
    state, effects = run(State(), command(retry=policy.model_dump_json().encode(), deadline=to_ms(NOW)))
    row = only(effects, Schedule)
    assert (row.kind, row.id, row.start_now, row.tag) == ("attempt.bank", COMMAND, True, INSTANCE)
    made, delivery = unpack_task(row.payload)
    assert unpack_delivery(delivery) == command().delivery
    assert (made.retry, made.deadline, json.loads(made.input)) == (policy, NOW, {"a": 2, "b": 1})
    assert state.key is not None
    assert state.key.command_id == COMMAND
    assert not [e for e in effects if isinstance(e, Publish)]


def test_nothing_shows_an_input() -> None:
    """F5: a task's repr, which an error or a log might take, holds no input and no business object."""
    assert "a" in json.loads(task().input)
    assert '"a"' not in repr(task())
    assert "o-1" not in repr(task())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"operation": "refund"}, "no operation bank.refund"),
        ({"connector": "post"}, "no operation post.charge"),
        ({"body": b"[]"}, "not a JSON object"),
        ({"body": b"\xff"}, "not JSON"),
        ({"body": b'{"a":NaN}'}, "not JSON"),
        ({"body": b'{"a":"\\ud800"}'}, "not JSON"),
        ({"body": b"[" * 100_000}, "not JSON"),
        ({"retry": b"{"}, "retry policy"),
        ({"retry": b'{"attempts_max": 3, "forever": true}'}, "forever"),
        ({"idempotency_key": "k"}, "idempotency_key is not a UUID"),
    ],
)
def test_a_command_that_cannot_be_carried_out_dies_with_its_reason(fields: Mapping[str, Any], text: str) -> None:
    """C3: what is wrong with a command is said, with its coordinates, and its class is validation."""
    with pytest.raises(ValidationError) as caught:
        run(State(), command(**fields))
    assert text in str(caught.value)
    assert "factmesh.command.bank.v1[1]@2" in str(caught.value)


def test_a_key_has_one_command_and_one_body_until_a_known_failure() -> None:
    """INV-K: judged by the content of the body, not by its spelling."""
    state, _ = run(State(), command())
    held = state.key
    assert held is not None
    other = UUID(int=COMMAND.int + 1)
    with pytest.raises(ConflictError, match="another body"):
        run(state, command(body=b'{"a":3}'))
    with pytest.raises(ConflictError, match="belongs to command"):
        run(State(key=Key(other, held.body_hash, known_failed=False)), command())
    run(state, command(body=b'{"a": 2, "b": 1}'))
    freed, _ = run(State(key=Key(other, b"other", known_failed=True)), command())
    assert freed.key == held


def test_messages_are_grouped_by_what_they_lock() -> None:
    """INV-F: commands by their key, resolutions by their command."""
    assert object_key(command()) == f"key:{KEY}"
    assert object_key(resolution("happened")) == f"row:{COMMAND}"
    with pytest.raises(ValidationError):
        object_key(message("status"))


def test_happened_settles_the_row_and_tells_the_output() -> None:
    """⚑ DESIGN 9: through the one write path, from `unknown` only, under a raised epoch, so that the result is new."""
    state, effects = run(unknown(), resolution("happened", output=b'{"ref": "r1"}'))
    assert only(effects, Amend) == Amend("attempt.bank", COMMAND, expected="unknown", state="done")
    result = only(effects, Publish)
    assert result.id == result_id(COMMAND, 5) != result_id(COMMAND, 4)
    told = {k: result.body[k] for k in ("outcome", "verdict", "epoch", "actor", "attempts", "step", "error_class")}
    assert told == {
        "outcome": "done", "verdict": "happened", "epoch": 5, "actor": "user:ann", "attempts": 2, "step": "pay",
        "error_class": None,
    }  # fmt: skip
    with pytest.raises(ValidationError, match="is done, not unknown"):
        run(state, resolution("happened", output=b'{"ref": "r1"}'))


@pytest.mark.parametrize(
    ("output", "text"),
    [(None, "without"), (b"{}", "lacks ref"), (b'"r1"', "not a JSON object"), (b'{"ref":"' + b"x" * 60 + b'"}', "50")],
)
def test_an_output_from_a_person_is_checked_like_any(output: bytes | None, text: str) -> None:
    """E2, B10: it has the declared fields and is capped; later steps read it as if the call had answered."""
    with pytest.raises(ValidationError, match=text):
        run(unknown(), resolution("happened", output=output))


def test_not_happened_waits_out_what_may_be_in_flight() -> None:
    """⚑ DESIGN 5, 9: by its entrance instant; before in_flight_max_s it is refused, and the text says until when."""
    early = to_ms(NOW + timedelta(seconds=59, milliseconds=999))
    with pytest.raises(ValidationError, match="2026-03-01T12:01:00"):
        run(unknown(), resolution("not_happened", entered_at=early))
    _, effects = run(unknown(), resolution("not_happened", entered_at=to_ms(NOW + timedelta(seconds=60))))
    assert only(effects, Amend).state == "failed"
    assert only(effects, Publish).body["error_class"] == ErrorClass.AMBIGUOUS
    # Without an attempt's own end, the row's last lease is what counts.
    later = unknown(history=History(), ended_at=NOW + timedelta(seconds=30))
    with pytest.raises(ValidationError, match="2026-03-01T12:01:30"):
        run(later, resolution("not_happened", entered_at=to_ms(NOW + timedelta(seconds=89))))


@pytest.mark.parametrize("state", ["pending", "leased", "done", "failed"])
@pytest.mark.parametrize("verdict", ["happened", "not_happened"])
def test_a_resolution_counts_while_the_row_is_unknown_only(state: str, verdict: str) -> None:
    """⚑ DESIGN 9: any other is refused and shown; nothing changes."""
    with pytest.raises(ValidationError, match=f"is {state}, not unknown"):
        run(unknown(state=state), resolution(verdict, output=b'{"ref": "r"}', entered_at=to_ms(NOW) + 10**9))


@pytest.mark.parametrize("verdict", ["happened", "not_happened"])
def test_what_has_no_row_is_not_resolved(verdict: str) -> None:
    """DESIGN 9: a command that died at once is replayed or discarded; there is no call to have a word on."""
    with pytest.raises(ValidationError, match="nothing to resolve"):
        run(State(disposition="dead"), resolution(verdict, output=b'{"ref": "r"}'))


def test_a_dead_command_is_discarded_with_a_result() -> None:
    """⚑ DESIGN 9: ledger `discarded`, result `failed`, so that its step does not wait for ever."""
    state, effects = run(State(disposition="dead"), resolution("discarded"))
    mark = only(effects, MarkLedger)
    assert (mark.root, mark.disposition) == (f"id:{COMMAND}", "discarded")
    result = only(effects, Publish)
    assert (result.body["outcome"], result.body["verdict"], result.id) == ("failed", "discarded", result_id(COMMAND, 0))
    with pytest.raises(ValidationError, match="only a dead one"):
        run(state, resolution("discarded"))


@pytest.mark.parametrize("state", [State(), State(disposition="done"), unknown(), unknown(state="done")])
def test_nothing_else_is_discarded(state: State) -> None:
    """⚑ DESIGN 9: an unknown must be resolved, a live command ends by itself, one that nobody knows is a mistake."""
    with pytest.raises(ValidationError):
        run(state, resolution("discarded"))


def test_an_unknown_verdict_is_refused() -> None:
    """Issue 6, bad input."""
    with pytest.raises(ValidationError, match="one of happened, not_happened, discarded"):
        run(unknown(), resolution("maybe"))


def test_a_torn_row_says_so() -> None:
    """INV-D: bytes that are no command are never taken for one."""
    raw = pack_task(task(), b"delivery")
    assert unpack_task(raw) == (task(), b"delivery")
    for torn in (b"", raw[:20], b"\x00\x00\x00\x00" + raw):
        with pytest.raises(FactmeshError):
            unpack_task(torn)


def test_a_result_has_an_id_that_nothing_else_has() -> None:
    """DESIGN 7: what opening n of a command emits (a park, a release) is never taken for the result of epoch n."""
    emitted = {
        ids.message_id("connector", f"id:{COMMAND}", n, k, ids.instant_ms_of(COMMAND))
        for n in range(9)
        for k in range(9)
    }
    assert not emitted & {result_id(COMMAND, n) for n in range(9)}
