"""One attempt from claim to settlement, with connectors written in Python: what a plug-in does wrong, the lease before
the first byte, and what a row keeps. No socket, no database, a clock that stands still.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from factmesh import ids
from factmesh.claim_loop import Settlement
from factmesh.claims import Claimed
from factmesh.clock import ManualClock
from factmesh.errors import ErrorClass, ValidationError
from factmesh.message import Delivery, pack_delivery, to_ms
from factmesh.metrics import Metrics
from factmesh.retry import RetryPolicy
from factmesh_connector.attempt import Attempts
from factmesh_connector.model import Hand, History, Operation, Strategy, Task, pack_task, unpack_task
from factmesh_connector.protocol import CallContext, CallFailed

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LEASE_S = 30.0
COMMAND = ids.message_id("orchestrator", "id:x", 0, 0, to_ms(NOW))
Does = Callable[[CallContext], Awaitable[Any]]


class Scripted:
    """A plug-in whose calls do what the test says."""

    name = "odd"

    def __init__(self, strategy: Strategy, *calls: Does, look_up: Does | None = None) -> None:
        self.operations: Mapping[str, Operation] = {"do": Operation("do", strategy, key_valid_s=600)}
        self.calls = list(calls)
        self.asked = look_up
        self.made = 0

    async def call(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any]:
        self.made += 1
        result: Mapping[str, Any] = await self.calls.pop(0)(ctx)
        return result

    async def look_up(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any] | None:
        assert self.asked is not None
        result: Mapping[str, Any] | None = await self.asked(ctx)
        return result

    async def close(self) -> None:
        """Nothing is held."""


def gives(value: Any) -> Does:
    async def does(ctx: CallContext) -> Any:
        ctx.before_first_byte()
        return value

    return does


def fails(error: Exception) -> Does:
    async def does(_ctx: CallContext) -> Any:
        raise error

    return does


def row(attempts: int = 1, progress: bytes | None = None, **more: Any) -> Claimed:
    task = Task(
        command_id=str(COMMAND), connector="odd", operation=more.pop("operation", "do"), input='{"id": 1}',
        idempotency_key=str(COMMAND), correlation_id="c", actor="a", business_object_type="t", business_object_id="o",
        instance_id=str(COMMAND), instance_seq=1, step="s", workflow="w", in_flight_max_s=60, root=f"id:{COMMAND}",
        deadline=more.pop("deadline", None), retry=RetryPolicy(attempts_max=3),
    )  # fmt: skip
    values: dict[str, Any] = {
        "id": COMMAND, "kind": "attempt.odd", "epoch": 7, "attempts": attempts, "interrupted": False,
        "payload": pack_task(task, pack_delivery(Delivery("t", 0, 0, b"k", b"v"))), "progress": progress,
        "created_at": NOW, "claimed_at": NOW, "lease_ends": LEASE_S,
    }  # fmt: skip
    return Claimed(**{**values, **more})


def work(connector: Scripted, claimed: Claimed) -> Settlement:
    attempts = Attempts({"odd": connector}, ManualClock(NOW), Metrics(), {"attempt.odd": LEASE_S})
    return asyncio.run(attempts.work(claimed))


def outcome(settlement: Settlement) -> Mapping[str, Any]:
    (published,) = settlement.publish
    return published.body


def test_a_success_is_told_with_what_the_settlement_needs() -> None:
    """DESIGN 5, C7: one result whose id comes from command and epoch, and the call with its duration."""
    settlement = work(Scripted(Strategy.NONE, gives({"did": 1})), row())
    assert (settlement.state, settlement.death) == ("done", None)
    told = outcome(settlement)
    assert (told["outcome"], told["epoch"], json.loads(told["output"])) == ("done", 7, {"did": 1})
    assert settlement.publish[0].id == ids.message_id("connector", f"result:{COMMAND}", 7, 0, to_ms(NOW))
    assert [(c.what, c.ended) for c in settlement.save.calls] == [("call", "done")]


@pytest.mark.parametrize("does", [gives({"did": 1}), fails(CallFailed("gone", ErrorClass.AMBIGUOUS))])
def test_what_is_handed_on_in_memory_changes_nothing(does: Does) -> None:
    """B2: the attempt of the process that wrote the row ends as it would from the table."""
    claimed = row()
    task, _ = unpack_task(claimed.payload)
    for strategy in Strategy:
        handed = replace(claimed, hand=Hand(task, json.loads(task.input)))
        one, other = (work(Scripted(strategy, does), r) for r in (handed, claimed))
        assert replace(one, death=None) == replace(other, death=None)
        assert (one.death is None) == (other.death is None)
        if one.death is not None and other.death is not None:
            assert (str(one.death.error), one.death.original) == (str(other.death.error), other.death.original)


@pytest.mark.parametrize(
    "does",
    [
        fails(RuntimeError("token s3cret")),
        fails(KeyError("s3cret")),
        fails(CallFailed("gone", ErrorClass.AMBIGUOUS)),
        gives("not a mapping"),
        gives({"at": datetime(2026, 1, 1, tzinfo=UTC)}),
        gives({"x": float("nan")}),
        gives({"x": "y" * 70_000}),
    ],
)
def test_what_a_plug_in_does_wrong_is_no_failure_of_the_call(does: Does) -> None:
    """C2, C3: an exception that is not ours and an output that cannot be kept say nothing about the effect: unknown
    for `none`, a repeat under the key for `key`; and no text of theirs is passed on."""
    settlement = work(Scripted(Strategy.NONE, does), row())
    assert settlement.state == "unknown"
    assert settlement.publish == ()
    assert settlement.death is not None
    assert "s3cret" not in str(settlement.death.error)
    again = work(Scripted(Strategy.KEY, does), row())
    assert again.state == "pending"
    assert again.due_at is not None and again.due_at > NOW
    assert b"s3cret" not in (again.progress or b"")


def test_a_known_failure_of_a_plug_in_fails() -> None:
    """C3: the class that it raises decides."""
    settlement = work(Scripted(Strategy.NONE, fails(ValidationError("no such thing"))), row())
    assert settlement.state == "failed"
    assert (outcome(settlement)["outcome"], outcome(settlement)["error_class"]) == ("failed", "validation")
    assert settlement.death is not None
    assert str(settlement.death.error.reason) == "exhausted"


def test_no_byte_leaves_on_a_lease_that_does_not_cover_the_call() -> None:
    """⚑ DESIGN 5: the row goes back at once, nothing counts as a call, and nothing is held against it."""
    connector = Scripted(Strategy.NONE, gives({}))
    settlement = work(connector, row(lease_ends=9.0))
    assert (settlement.state, settlement.due_at, connector.made) == ("pending", None, 0)
    history = History.from_bytes(settlement.progress)
    assert (history.calls, history.tainted, history.settled) == (0, False, 1)

    async def late(ctx: CallContext) -> Any:
        clock.advance(25)
        ctx.before_first_byte()
        raise AssertionError("the first byte left")

    clock = ManualClock(NOW)
    attempts = Attempts({"odd": Scripted(Strategy.NONE, late)}, clock, Metrics(), {"attempt.odd": LEASE_S})
    settlement = asyncio.run(attempts.work(row()))
    assert (settlement.state, History.from_bytes(settlement.progress).calls) == ("pending", 0)


def test_a_lost_lease_is_judged_before_anything_is_called() -> None:
    """⚑ B2: `none` is unknown without a call; `lookup` asks, and a call may follow a counted no only."""
    lost = {"interrupted": True, "last_lease_ended_at": NOW - timedelta(seconds=100)}
    blind = Scripted(Strategy.NONE)
    assert work(blind, row(2, **lost)).state == "unknown"
    found = Scripted(Strategy.LOOKUP, look_up=gives({"did": 2}))
    assert json.loads(outcome(work(found, row(2, **lost)))["output"]) == {"did": 2}
    absent = Scripted(Strategy.LOOKUP, gives({"did": 3}), look_up=gives(None))
    assert json.loads(outcome(work(absent, row(2, **lost)))["output"]) == {"did": 3}
    early = Scripted(Strategy.LOOKUP, look_up=gives(None))
    settlement = work(early, row(2, interrupted=True, last_lease_ended_at=NOW - timedelta(seconds=59)))
    assert (settlement.state, settlement.due_at, early.made) == ("pending", NOW + timedelta(seconds=1), 0)
    assert (blind.made, found.made, absent.made) == (0, 0, 1)


def test_an_operation_that_is_gone_ends_by_what_is_known() -> None:
    """B2, ⚑: a file that lost an operation does not turn a maybe into a failure, nor leave a row for ever."""
    connector = Scripted(Strategy.KEY)
    clean = work(connector, row(operation="gone"))
    assert (clean.state, connector.made) == ("failed", 0)
    assert "is not declared any more" in outcome(clean)["error_message"]
    maybe = work(connector, row(2, operation="gone", interrupted=True, last_lease_ended_at=NOW))
    assert (maybe.state, connector.made) == ("unknown", 0)


def test_the_history_goes_on_over_attempts() -> None:
    """C4: attempts, the first failure and the last error survive in the row; the policy's end tells both."""
    error = CallFailed("odd.do answered 503", ErrorClass.TRANSIENT)
    progress: bytes | None = None
    for attempt in (1, 2):
        settlement = work(Scripted(Strategy.KEY, fails(error)), row(attempt, progress))
        assert settlement.state == "pending"
        progress = settlement.progress
    settlement = work(Scripted(Strategy.KEY, fails(error)), row(3, progress))
    assert settlement.state == "failed"
    told = outcome(settlement)
    assert (told["attempts"], told["error_class"]) == (3, "transient")
    assert told["error_message"] == "odd.do answered 503; all 3 attempts are used up"
    assert len(History.from_bytes(settlement.progress).log) == 3


def test_no_call_begins_after_the_deadline() -> None:
    """B4: nothing is called, and the result says so."""
    connector = Scripted(Strategy.NONE)
    settlement = work(connector, row(deadline=NOW))
    assert (settlement.state, connector.made) == ("failed", 0)
    assert "deadline" in outcome(settlement)["error_message"]
    assert UUID(outcome(settlement)["command_id"]) == COMMAND
