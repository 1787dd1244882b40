"""What follows: before a call, after a call, after a question. Three literal tables and the functions that read them.
Pure. The law behind every row: failed means known not to have worked, and `none` is never called after a maybe.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from factmesh import retry
from factmesh.errors import RETRYABLE, ErrorClass
from factmesh.retry import RetryPolicy
from factmesh_connector.model import History, Operation, Strategy


class Move(StrEnum):
    """What is done next with a command."""

    CALL = "call"
    ASK = "ask"
    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Answer(StrEnum):
    """What a call's end says about its effect."""

    WORKED = "worked"
    REFUSED = "refused"
    """Known not to have worked, and the same again would not either."""
    NOT_YET = "not_yet"
    """Known not to have worked; the same again may."""
    MAYBE = "maybe"


class Found(StrEnum):
    """What a question says about the calls before it."""

    FOUND = "found"
    ABSENT = "absent"
    ABSENT_TOO_EARLY = "absent_too_early"
    """Not there, but a call may still be in flight: says nothing (DESIGN section 5)."""
    NO_ANSWER = "no_answer"


class Next(NamedTuple):
    """A move. `at` goes with WAIT (None: at once), `output` with DONE; `stopped` says why no call may follow."""

    move: Move
    at: datetime | None = None
    why: str = ""
    stopped: str | None = None
    output: bytes | None = None


K, L, N = Strategy.KEY, Strategy.LOOKUP, Strategy.NONE

#: (strategy, an earlier call may have worked) -> (an attempt is admitted, none is admitted any more)
BEFORE: dict[tuple[Strategy, bool], tuple[Move, Move]] = {
    (K, False): (Move.CALL, Move.FAILED),
    (K, True): (Move.CALL, Move.UNKNOWN),  # with the same key, while the downstream remembers it
    (L, False): (Move.CALL, Move.FAILED),
    (L, True): (Move.ASK, Move.ASK),
    (N, False): (Move.CALL, Move.FAILED),
    (N, True): (Move.UNKNOWN, Move.UNKNOWN),
}

#: (strategy, answer, an earlier call may have worked) -> (another attempt is allowed, the retries have stopped)
AFTER_CALL: dict[tuple[Strategy, Answer, bool], tuple[Move, Move]] = {
    (K, Answer.WORKED, False): (Move.DONE, Move.DONE),
    (K, Answer.WORKED, True): (Move.DONE, Move.DONE),
    (K, Answer.REFUSED, False): (Move.FAILED, Move.FAILED),
    (K, Answer.REFUSED, True): (Move.UNKNOWN, Move.UNKNOWN),
    (K, Answer.NOT_YET, False): (Move.WAIT, Move.FAILED),
    (K, Answer.NOT_YET, True): (Move.WAIT, Move.UNKNOWN),
    (K, Answer.MAYBE, False): (Move.WAIT, Move.UNKNOWN),
    (K, Answer.MAYBE, True): (Move.WAIT, Move.UNKNOWN),
    (L, Answer.WORKED, False): (Move.DONE, Move.DONE),
    (L, Answer.WORKED, True): (Move.DONE, Move.DONE),
    (L, Answer.REFUSED, False): (Move.FAILED, Move.FAILED),
    (L, Answer.REFUSED, True): (Move.ASK, Move.ASK),
    (L, Answer.NOT_YET, False): (Move.WAIT, Move.FAILED),
    (L, Answer.NOT_YET, True): (Move.ASK, Move.ASK),
    (L, Answer.MAYBE, False): (Move.ASK, Move.ASK),
    (L, Answer.MAYBE, True): (Move.ASK, Move.ASK),
    (N, Answer.WORKED, False): (Move.DONE, Move.DONE),
    (N, Answer.WORKED, True): (Move.DONE, Move.DONE),
    (N, Answer.REFUSED, False): (Move.FAILED, Move.FAILED),
    (N, Answer.REFUSED, True): (Move.UNKNOWN, Move.UNKNOWN),
    (N, Answer.NOT_YET, False): (Move.WAIT, Move.FAILED),
    (N, Answer.NOT_YET, True): (Move.UNKNOWN, Move.UNKNOWN),
    (N, Answer.MAYBE, False): (Move.UNKNOWN, Move.UNKNOWN),
    (N, Answer.MAYBE, True): (Move.UNKNOWN, Move.UNKNOWN),
}

#: answer to a question -> (a call is still allowed, none is). Only ABSENT clears what may have worked.
AFTER_ASK: dict[Found, tuple[Move, Move]] = {
    Found.FOUND: (Move.DONE, Move.DONE),
    Found.ABSENT: (Move.CALL, Move.FAILED),
    Found.ABSENT_TOO_EARLY: (Move.WAIT, Move.WAIT),
    Found.NO_ANSWER: (Move.WAIT, Move.UNKNOWN),
}


def answer_of(error_class: ErrorClass | None) -> Answer:
    """What a call that ended with this class says; None is success. A bug of ours after the call says nothing."""
    if error_class is None:
        return Answer.WORKED
    if error_class in (ErrorClass.AMBIGUOUS, ErrorClass.BUG):
        return Answer.MAYBE
    return Answer.NOT_YET if error_class in RETRYABLE else Answer.REFUSED


def before(operation: Operation, history: History, now: datetime, refused: str | None) -> Next:
    """What an attempt begins with. `refused` is why no call is admitted any more, or None."""
    stopped = history.stopped or refused
    move = BEFORE[operation.strategy, history.tainted][0 if stopped is None else 1]
    since = history.ambiguous_since
    if move is Move.CALL and since is not None and now >= since + timedelta(seconds=operation.key_valid_s):
        why = f"the call of {since.isoformat()} may have worked; its key is honoured for {operation.key_valid_s:g} s"
        return Next(Move.UNKNOWN, why=why)
    if move is Move.UNKNOWN and stopped is None:
        return Next(move, why="an earlier call may have worked, and a repeat is not declared safe")
    return Next(move, why=stopped or "", stopped=stopped)


def after_call(
    operation: Operation,
    policy: RetryPolicy,
    history: History,
    error_class: ErrorClass | None,
    now: datetime,
    *,
    id_: UUID,
    deadline: datetime | None,
    retry_after_s: float | None = None,
) -> Next:
    """What follows a call. `history` is the one before it, but counts it in `calls`."""
    answer = answer_of(error_class)
    further: retry.Wait | retry.Stop = retry.Stop("")
    if error_class is not None:
        further = retry.next_step(
            # A bug of ours after a call is repeated as a maybe, where a repeat is safe.
            ErrorClass.AMBIGUOUS if answer is Answer.MAYBE else error_class,
            history.calls,
            policy,
            now,
            id_=id_,
            first_attempt_at=history.first_attempt_at or now,
            deadline=deadline,
            retry_after_s=retry_after_s,
        )
    stopped = further.why if isinstance(further, retry.Stop) else None
    move = AFTER_CALL[operation.strategy, answer, history.tainted][0 if stopped is None else 1]
    if move is Move.ASK:
        # Never in the same breath: the downstream may need a moment to show what it did. A question is no call, so
        # neither deadline nor attempts stop it; they only decide what may follow "not found".
        pause_s = timedelta(seconds=min(policy.base_s, policy.delay_max_s))
        at = further.at if isinstance(further, retry.Wait) else now + pause_s
        return Next(Move.WAIT, at=at, why="it is asked whether it worked", stopped=stopped)
    if move is Move.WAIT and isinstance(further, retry.Wait):
        since = history.ambiguous_since or (now if answer is Answer.MAYBE else None)
        if since is not None and operation.strategy is K and further.at >= since + timedelta(
            seconds=operation.key_valid_s
        ):
            return Next(Move.UNKNOWN, why="the key is not honoured any more when the next attempt would come")
        return Next(Move.WAIT, at=further.at)
    return Next(move, why=stopped or "")


def after_ask(
    operation: Operation,
    policy: RetryPolicy,
    history: History,
    found: Found,
    error_class: ErrorClass | None,
    now: datetime,
    *,
    id_: UUID,
    refused: str | None,
    retry_after_s: float | None = None,
) -> Next:
    """What follows a question. `refused` is why no call is admitted any more, or None; `history.asks` counts this."""
    stopped = history.stopped or refused
    if found is Found.NO_ANSWER:
        further = retry.next_step(
            error_class or ErrorClass.AMBIGUOUS,
            history.asks,
            policy,
            now,
            id_=id_,
            first_attempt_at=history.first_ask_at or now,
            retry_after_s=retry_after_s,
        )
        if isinstance(further, retry.Wait):
            return Next(Move.WAIT, at=further.at, stopped=history.stopped)
        return Next(AFTER_ASK[found][1], why=f"whether it worked could not be learned: {further.why}")
    move = AFTER_ASK[found][0 if stopped is None else 1]
    if move is Move.WAIT:
        return Next(move, at=counts_from(operation.in_flight_max_s, history.ended_at, now), stopped=history.stopped)
    return Next(move, why=stopped or "", stopped=stopped)


def counts_from(in_flight_max_s: float, ended_at: datetime | None, now: datetime) -> datetime:
    """From when on "not found" counts: `in_flight_max_s` after we let go of the last call (DESIGN section 5)."""
    return (ended_at or now) + timedelta(seconds=in_flight_max_s)
