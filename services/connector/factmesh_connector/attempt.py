"""One attempt of a command: claimed, admitted, called or asked, classified, and settled by what `follow` says.
The edge between rows and connectors; no table of decisions and no HTTP lives here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import structlog

from factmesh.claim_loop import Death, Settlement
from factmesh.claims import Claimed
from factmesh.clock import Clock
from factmesh.effects import Publish
from factmesh.errors import ErrorClass, FactmeshError, Reason, TransientError
from factmesh.message import unpack_delivery
from factmesh.metrics import Metrics
from factmesh.retry import RetryPolicy
from factmesh.telemetry import Hop, carried
from factmesh_connector import follow
from factmesh_connector.decide import result_id
from factmesh_connector.follow import Found, Move, Next
from factmesh_connector.model import Call, Hand, History, Operation, Strategy, Task, result_body, unpack_task
from factmesh_connector.protocol import CallContext, CallFailed, Connector

log = structlog.get_logger("factmesh.connector")

#: Between the end of a call and its settlement: the lease must still be ours then.
SETTLE_MARGIN_S = 5.0
DONE = "done"
#: Not orjson: that takes instants and UUIDs for JSON, and NaN for null, where a plug-in's mistake must be seen.
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


class LeaseTooShort(TransientError):
    """Nothing was sent: what is left of the lease does not cover the timeout, so somebody else may begin meanwhile."""


class CommandFailed(FactmeshError):
    """A command ended, and every call of it is known not to have worked."""

    reason = Reason.EXHAUSTED


class CommandUnknown(FactmeshError):
    """A command whose outcome a person must find out."""

    error_class = ErrorClass.AMBIGUOUS
    reason = Reason.UNKNOWN


class Made(NamedTuple):
    """The calls and questions of an attempt, for the table of calls: saved in the settlement's transaction."""

    operation: str
    calls: tuple[Call, ...]


def admit(task: Task, policy: RetryPolicy, history: History, now: datetime) -> str | None:
    """Why no further call of this command may begin, or None. Limits, breakers and budgets will live here."""
    if task.deadline is not None and now >= task.deadline:
        return f"the deadline {task.deadline.isoformat()} has passed"
    if history.calls >= policy.attempts_max:
        return f"all {policy.attempts_max} attempts are used up"
    return None


def accounted(history: History, row: Claimed, lease_s: float) -> History:
    """The history with the leases that ended without a settlement: each may have made a call that worked.

    When a lost lease began is not recorded; the latest one began `lease_s` before it ended, earlier ones not before
    the row did. A key's age is judged by the oldest, so that the doubt never makes a key look younger than it is.
    """
    lost = row.attempts - 1 - history.settled
    if lost <= 0 and not row.interrupted:
        return history
    ended_at = row.last_lease_ended_at or row.claimed_at
    began_at = ended_at - timedelta(seconds=lease_s) if lost <= 1 else row.created_at
    since = began_at if history.ambiguous_since is None else min(began_at, history.ambiguous_since)
    return history._replace(
        settled=row.attempts - 1,
        calls=history.calls + max(1, lost),
        first_attempt_at=history.first_attempt_at or began_at,
        first_failed_at=history.first_failed_at or ended_at,
        ambiguous_since=since,
        ended_at=ended_at,
        error_class=ErrorClass.AMBIGUOUS,
        error_message="an attempt was cut off before its outcome was recorded",
    )


@dataclass(slots=True)
class _Attempt:
    """What one attempt works with."""

    row: Claimed
    task: Task
    input: dict[str, Any]
    connector: Connector
    operation: Operation
    policy: RetryPolicy
    #: When the claim was sent, in this process's monotonic seconds: from then on it carries PostgreSQL's clock on.
    #: That runs ahead by the claim's round trip at most: better than a retry before its `Retry-After`.
    began: float
    #: The latest reading of both clocks; taken anew after whatever waited.
    at: float
    now: datetime
    traceparent: str | None
    calls: list[Call] = field(default_factory=list)


class Attempts:
    """The work of the claim kinds `attempt.<connector>`."""

    def __init__(
        self, connectors: Mapping[str, Connector], clock: Clock, metrics: Metrics, leases_s: Mapping[str, float]
    ) -> None:
        self._connectors = connectors
        self._clock = clock
        self._metrics = metrics
        self._leases_s = leases_s

    async def work(self, row: Claimed) -> Settlement:
        """One attempt, from the claim to what is to be settled."""
        task, input_ = row.hand or _in_hand(row.payload)
        connector = self._connectors[task.connector]
        declared = connector.operations.get(task.operation)
        # Gone from the file since the command was accepted: nothing may be called, and nothing known is forgotten.
        operation = declared or Operation(task.operation, Strategy.NONE, in_flight_max_s=task.in_flight_max_s)
        lease_s = self._leases_s[row.kind]
        began, policy = row.lease_ends - lease_s, task.retry or operation.retry
        attempt = _Attempt(
            row, task, input_, connector, operation, policy, began, began, row.claimed_at, task.traceparent
        )
        history = accounted(History.from_bytes(row.progress), row, lease_s)
        now = self._look(attempt)
        gone = None if declared else f"operation {task.connector}.{task.operation} is not declared any more"
        then = follow.before(operation, history, now, gone or admit(task, policy, history, now))
        came, sampled = carried(task.traceparent)
        if not sampled:
            attempt.traceparent = came or task.traceparent
            return self._settlement(attempt, *await self._carry_out(attempt, history, then))
        about = {
            "factmesh.command_id": task.command_id,
            "factmesh.instance_id": task.instance_id,
            "factmesh.attempt": row.attempts,
        }
        with Hop(f"{task.connector}.{task.operation}", task.traceparent, "client", about) as hop:
            attempt.traceparent = hop.traceparent or task.traceparent
            history, then = await self._carry_out(attempt, history, then)
            hop.note(**{"factmesh.move": str(then.move)})
        return self._settlement(attempt, history, then)

    async def _carry_out(self, attempt: _Attempt, history: History, then: Next) -> tuple[History, Next]:
        """What the attempt begins with, and what follows it."""
        try:
            if then.move is Move.ASK:
                history, then = await self._ask(attempt, history)
            if then.move is Move.CALL:
                history, then = await self._call(attempt, history)
        except LeaseTooShort as error:
            log.warning("connector.lease_too_short", **_ids(attempt.task), error=str(error))
            then = Next(Move.WAIT, at=None)
        return history, then

    def _look(self, attempt: _Attempt) -> datetime:
        """The time, by PostgreSQL's clock as this process carries it on."""
        attempt.at = self._clock.monotonic()
        attempt.now = attempt.row.claimed_at + timedelta(0, attempt.at - attempt.began)
        return attempt.now

    def _context(self, attempt: _Attempt, timeout_s: float) -> CallContext:
        task, row = attempt.task, attempt.row

        def covered() -> None:
            """⚑ Immediately before the first byte: does the lease still cover the timeout?"""
            left_s = row.lease_ends - self._clock.monotonic()
            if left_s < timeout_s:
                raise LeaseTooShort(
                    f"{left_s:.1f} s of the lease are left and a call may take {timeout_s:g} s; nothing was sent",
                    where=f"command {task.command_id}",
                    hint="the attempt is claimed again at once",
                )

        command = {
            "idempotency_key": task.idempotency_key,
            "correlation_id": task.correlation_id,
            "business_object_type": task.business_object_type,
            "business_object_id": task.business_object_id,
            "instance_id": task.instance_id,
            "workflow": task.workflow,
            "step": task.step,
        }
        return CallContext(task.idempotency_key, task.correlation_id, attempt.traceparent, command, covered)

    # --- outside -----------------------------------------------------------------------------------------------------

    async def _call(self, attempt: _Attempt, history: History) -> tuple[History, Next]:
        """The call, and what follows it."""
        task, operation = attempt.task, attempt.operation
        ctx = self._context(attempt, operation.timeout_s)
        ctx.before_first_byte()
        began_at, began = attempt.now, attempt.at
        output: bytes | None = None
        error: FactmeshError | None = None
        try:
            output = _checked(operation, await attempt.connector.call(task.operation, attempt.input, ctx))
        except LeaseTooShort:
            raise
        except FactmeshError as failure:
            error = failure
        except Exception as bug:
            error = self._bug(attempt, bug)
        now = self._look(attempt)
        call = self._note(attempt, "call", began_at, attempt.at - began, error)
        history = history.with_call(
            call, calls=history.calls + 1, first_attempt_at=history.first_attempt_at or began_at
        )
        if error is not None:
            history = history._replace(error_class=error.error_class, error_message=str(error))
        then = follow.after_call(
            operation,
            attempt.policy,
            history,
            error.error_class if error is not None else None,
            now,
            id_=attempt.row.id,
            deadline=task.deadline,
            retry_after_s=getattr(error, "retry_after_s", None),
        )
        if error is None:
            return history, _with_output(then, output)
        history = history._replace(first_failed_at=history.first_failed_at or now)
        if follow.answer_of(error.error_class) is follow.Answer.MAYBE:
            history = history._replace(ambiguous_since=history.ambiguous_since or began_at, ended_at=now)
        return history, then

    async def _ask(self, attempt: _Attempt, history: History) -> tuple[History, Next]:
        """The question whether an earlier call worked, and what follows it."""
        task, operation = attempt.task, attempt.operation
        ctx = self._context(attempt, operation.lookup_timeout_s)
        ctx.before_first_byte()
        began_at, began = attempt.now, attempt.at
        output: bytes | None = None
        error: FactmeshError | None = None
        found = Found.NO_ANSWER
        try:
            answer = await attempt.connector.look_up(task.operation, json.loads(task.input), ctx)
            if answer is not None:
                output, found = _checked(operation, answer), Found.FOUND
            elif began_at >= follow.counts_from(operation.in_flight_max_s, history.ended_at, began_at):
                found = Found.ABSENT
            else:
                found = Found.ABSENT_TOO_EARLY
        except LeaseTooShort:
            raise
        except FactmeshError as failure:
            error = failure
        except Exception as bug:
            error = self._bug(attempt, bug)
        # A failed question tells nothing of the calls: the error that people read stays the calls' own.
        now = self._look(attempt)
        call = self._note(attempt, "ask", began_at, attempt.at - began, error)
        asks = history.asks + 1 if found is Found.NO_ANSWER else 0
        history = history.with_call(
            call, asks=asks, first_ask_at=(history.first_ask_at or began_at) if asks else None
        )
        then = follow.after_ask(
            operation,
            attempt.policy,
            history,
            found,
            error.error_class if error is not None else None,
            now,
            id_=attempt.row.id,
            refused=admit(task, attempt.policy, history, now),
            retry_after_s=getattr(error, "retry_after_s", None),
        )
        if found is Found.ABSENT:
            # Known now: none of the calls worked.
            history = history._replace(ambiguous_since=None, ended_at=None)
        return history, _with_output(then, output)

    def _bug(self, attempt: _Attempt, bug: Exception) -> FactmeshError:
        """An exception that is no FactmeshError: its text may quote anything, so only its type is told."""
        log.error("connector.bug", **_ids(attempt.task), exception=type(bug).__qualname__)
        task = attempt.task
        return CallFailed(
            f"{task.connector}.{task.operation} raised {type(bug).__qualname__}",
            ErrorClass.BUG,
            hint="a connector must raise FactmeshErrors; until it is corrected the outcome counts as unknown",
        )

    def _note(
        self, attempt: _Attempt, what: str, began_at: datetime, seconds: float, error: FactmeshError | None
    ) -> Call:
        """Record a call with its duration (C7): in the table of calls and the metrics, a failed one in the log too."""
        task = attempt.task
        ended = DONE if error is None else str(error.error_class)
        call = Call(began_at, int(seconds * 1000), what, ended)
        attempt.calls.append(call)
        self._metrics.inc("factmesh_calls_total", task.connector, task.operation, ended)
        self._metrics.observe("factmesh_call_seconds", seconds, task.connector, task.operation)
        if error is not None:
            log.info(
                "connector.call",
                **_ids(task),
                what=what,
                attempt=attempt.row.attempts,
                ended=ended,
                ms=call.ms,
                error=error.message,
            )
        return call

    # --- settling ----------------------------------------------------------------------------------------------------

    def _settlement(self, attempt: _Attempt, history: History, then: Next) -> Settlement:
        task, row, now = attempt.task, attempt.row, attempt.now
        made = Made(f"{task.connector}.{task.operation}", tuple(attempt.calls)) if attempt.calls else None
        if then.move is Move.DONE:
            # Nothing follows that would ask for the history; the table of calls keeps it longer than the row is kept.
            told = self._result(attempt, "done", history, now, then.output)
            return Settlement(
                "done", publish=(told,), cause=_record(task), traceparent=attempt.traceparent, save=made
            )
        history = history._replace(settled=row.attempts, stopped=then.stopped or history.stopped)
        if then.move is Move.WAIT:
            return Settlement("pending", due_at=then.at, progress=history.to_bytes(), save=made)
        error = _ending(task, history, then)
        history = history._replace(
            error_class=error.error_class,
            error_message=error.message,
            first_failed_at=history.first_failed_at or now,
        )
        death = Death(
            original=unpack_delivery(unpack_task(row.payload)[1]),
            root=task.root,
            error=error,
            attempts=max(1, history.calls),
            first_failed_at=history.first_failed_at or now,
            record={**_record(task), "traceparent": attempt.traceparent},
        )
        failed = then.move is Move.FAILED
        return Settlement(
            str(then.move),
            progress=history.to_bytes(),
            publish=(self._result(attempt, "failed", history, now, None),) if failed else (),
            cause=_record(task),
            traceparent=attempt.traceparent,
            death=death,
            save=made,
        )

    def _result(
        self, attempt: _Attempt, outcome: str, history: History, now: datetime, output: bytes | None
    ) -> Publish:
        task, row = attempt.task, attempt.row
        body = result_body(task, outcome, row.epoch, history, at=now, output=output)
        body["actor"] = f"service:{task.connector}"
        return Publish("result", "result", task.instance_id, body, id=result_id(row.id, row.epoch))


def _in_hand(payload: bytes) -> Hand:
    """The command of a row that was claimed from the table: one that waited, or that another process wrote."""
    task, _ = unpack_task(payload)
    return Hand(task, json.loads(task.input))


def _with_output(then: Next, output: bytes | None) -> Next:
    return then._replace(output=output) if then.move is Move.DONE else then


def _checked(operation: Operation, output: Mapping[str, Any]) -> bytes:
    """A connector's output as bytes. One that cannot be kept is no failure of the call: it worked."""
    try:
        if not isinstance(output, Mapping):
            raise TypeError("not a mapping")
        raw = _ENCODER.encode(dict(output)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CallFailed(
            f"the output of {operation.name} is not a JSON object ({type(error).__name__})",
            ErrorClass.AMBIGUOUS,
            hint="correct the connector, or resolve with the output",
        ) from None
    if len(raw) > operation.output_bytes_max:
        raise CallFailed(
            f"the output of {operation.name} has {len(raw)} bytes, at most {operation.output_bytes_max} are kept",
            ErrorClass.AMBIGUOUS,
            hint="keep declared fields only, or resolve with the output",
        )
    return raw


def _ending(task: Task, history: History, then: Next) -> FactmeshError:
    """Why a command ended without having worked for certain, for its DLQ record and its result; no payload."""
    last = history.error_message or "no call was made"
    text = f"{last}; {then.why}" if then.why else last
    error_class = history.error_class or ErrorClass.TRANSIENT
    where = f"command {task.command_id} ({task.connector}.{task.operation})"
    if then.move is Move.UNKNOWN:
        hint = "find out whether it happened, then: factmesh dlq resolve --happened OUTPUT | --not-happened"
        return CommandUnknown(text, where=where, hint=hint)
    return CommandFailed(
        text, where=where, hint="correct the cause, then retry the step", error_class=error_class
    )


def _ids(task: Task) -> dict[str, str]:
    """What every log line carries; never the input."""
    return {
        "correlation_id": task.correlation_id,
        "instance_id": task.instance_id,
        "message_id": task.command_id,
        "operation": f"{task.connector}.{task.operation}",
    }


def _record(task: Task) -> dict[str, Any]:
    """The command's fields that emissions inherit and diagnosis headers show."""
    return {
        "command_id": task.command_id,
        "correlation_id": task.correlation_id,
        "actor": task.actor,
        "business_object_type": task.business_object_type,
        "business_object_id": task.business_object_id,
        "instance_id": task.instance_id,
        "instance_seq": task.instance_seq,
        "step": task.step,
    }
