"""What follows an attempt to notify: two literal tables and the functions that read them.
Pure. The law behind every row: failed means known not to have worked, and what cannot be told apart is never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from factmesh import retry
from factmesh.errors import RETRYABLE, ErrorClass
from factmesh.retry import RetryPolicy
from factmesh_notifier.model import Channel, History


class Move(StrEnum):
    """What is done next with a notification."""

    SEND = "send"
    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Answer(StrEnum):
    """What an attempt's end says about it."""

    WORKED = "worked"
    REFUSED = "refused"
    """Known not to have worked, and the same again would not either."""
    NOT_YET = "not_yet"
    """Known not to have worked; the same again may."""
    MAYBE = "maybe"


@dataclass(frozen=True, slots=True)
class Next:
    """A move. `at` goes with WAIT (None: at once); `why` is for people."""

    move: Move
    at: datetime | None = None
    why: str = ""


#: (a repeat is safe, an earlier attempt may have worked) -> (an attempt is admitted, none is admitted any more)
BEFORE: dict[tuple[bool, bool], tuple[Move, Move]] = {
    (True, False): (Move.SEND, Move.FAILED),
    (True, True): (Move.SEND, Move.UNKNOWN),  # under the same id, while receivers remember it
    (False, False): (Move.SEND, Move.FAILED),
    (False, True): (Move.UNKNOWN, Move.UNKNOWN),
}

#: (a repeat is safe, answer, an earlier attempt may have worked) -> (another is allowed, the retries have stopped)
AFTER: dict[tuple[bool, Answer, bool], tuple[Move, Move]] = {
    (True, Answer.WORKED, False): (Move.DONE, Move.DONE),
    (True, Answer.WORKED, True): (Move.DONE, Move.DONE),
    (True, Answer.REFUSED, False): (Move.FAILED, Move.FAILED),
    (True, Answer.REFUSED, True): (Move.UNKNOWN, Move.UNKNOWN),
    (True, Answer.NOT_YET, False): (Move.WAIT, Move.FAILED),
    (True, Answer.NOT_YET, True): (Move.WAIT, Move.UNKNOWN),
    (True, Answer.MAYBE, False): (Move.WAIT, Move.UNKNOWN),
    (True, Answer.MAYBE, True): (Move.WAIT, Move.UNKNOWN),
    (False, Answer.WORKED, False): (Move.DONE, Move.DONE),
    (False, Answer.WORKED, True): (Move.DONE, Move.DONE),
    (False, Answer.REFUSED, False): (Move.FAILED, Move.FAILED),
    (False, Answer.REFUSED, True): (Move.UNKNOWN, Move.UNKNOWN),
    (False, Answer.NOT_YET, False): (Move.WAIT, Move.FAILED),
    (False, Answer.NOT_YET, True): (Move.UNKNOWN, Move.UNKNOWN),
    (False, Answer.MAYBE, False): (Move.UNKNOWN, Move.UNKNOWN),
    (False, Answer.MAYBE, True): (Move.UNKNOWN, Move.UNKNOWN),
}


def answer_of(error_class: ErrorClass | None) -> Answer:
    """What an attempt that ended with this class says; None is success. A bug of ours says nothing of what went out."""
    if error_class is None:
        return Answer.WORKED
    if error_class in (ErrorClass.AMBIGUOUS, ErrorClass.BUG):
        return Answer.MAYBE
    return Answer.NOT_YET if error_class in RETRYABLE else Answer.REFUSED


def before(channel: Channel, history: History, now: datetime, refused: str | None) -> Next:
    """What an attempt begins with. `refused` is why none is admitted any more, or None."""
    move = BEFORE[channel.repeatable, history.tainted][0 if refused is None else 1]
    if move is Move.SEND and _forgotten(channel, history, now):
        why = f"an attempt may have worked, and receivers remember its id for {channel.key_valid_s:g} s only"
        return Next(Move.UNKNOWN, why=why)
    if move is Move.UNKNOWN and refused is None:
        return Next(move, why="an earlier attempt may have worked, and the receiver could not tell a repeat")
    return Next(move, why=refused or "")


def after(
    channel: Channel,
    policy: RetryPolicy,
    history: History,
    error_class: ErrorClass | None,
    now: datetime,
    *,
    id_: UUID,
    deadline: datetime | None,
    retry_after_s: float | None = None,
) -> Next:
    """What follows an attempt. `history` is the one before it, but counts it in `sends`."""
    answer = answer_of(error_class)
    further: retry.Wait | retry.Stop = retry.Stop("")
    if error_class is not None:
        further = retry.next_step(
            ErrorClass.AMBIGUOUS if answer is Answer.MAYBE else error_class,
            history.sends,
            policy,
            now,
            id_=id_,
            first_attempt_at=history.first_attempt_at or now,
            deadline=deadline,
            retry_after_s=retry_after_s,
        )
    stopped = isinstance(further, retry.Stop)
    move = AFTER[channel.repeatable, answer, history.tainted][1 if stopped else 0]
    if move is Move.WAIT and isinstance(further, retry.Wait):
        since = history.ambiguous_since or (now if answer is Answer.MAYBE else None)
        if _forgotten(channel, history.model_copy(update={"ambiguous_since": since}), further.at):
            return Next(Move.UNKNOWN, why="receivers do not remember its id any more when the next attempt would come")
        return Next(Move.WAIT, at=further.at)
    return Next(move, why=further.why if isinstance(further, retry.Stop) else "")


def _forgotten(channel: Channel, history: History, at: datetime) -> bool:
    since = history.ambiguous_since
    return since is not None and at >= since + timedelta(seconds=channel.key_valid_s)


def counts_from(in_flight_max_s: float, ended_at: datetime | None, now: datetime) -> datetime:
    """From when on "not happened" counts: `in_flight_max_s` after we let go of the last attempt (DESIGN section 5)."""
    return (ended_at or now) + timedelta(seconds=in_flight_max_s)
