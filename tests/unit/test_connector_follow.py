"""What follows an attempt, over every strategy, outcome and history: the tables by their laws, and whole lives of
commands against a downstream that is simulated. Nothing here touches a socket or a database.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh.claims import Claimed
from factmesh.errors import ErrorClass
from factmesh.retry import RetryPolicy
from factmesh_connector import follow
from factmesh_connector.attempt import accounted
from factmesh_connector.follow import AFTER_ASK, AFTER_CALL, BEFORE, Answer, Found, Move
from factmesh_connector.model import Call, History, Operation, Strategy

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ID = UUID("0192f000-0000-8000-8000-000000000001")
ENDS = {Move.DONE, Move.FAILED, Move.UNKNOWN}


def test_the_tables_are_total() -> None:
    """C2: every strategy, answer and history has its row; a pair that nobody thought of cannot come up."""
    assert set(BEFORE) == set(itertools.product(Strategy, (False, True)))
    assert set(AFTER_CALL) == set(itertools.product(Strategy, Answer, (False, True)))
    assert set(AFTER_ASK) == set(Found)


def test_no_row_fails_what_may_have_worked() -> None:
    """⚑ DESIGN 5: failed means known not to have worked, whatever the strategy, the deadline or the retries say."""
    for (_, tainted), moves in BEFORE.items():
        assert not (tainted and Move.FAILED in moves)
    for (_, answer, tainted), moves in AFTER_CALL.items():
        if tainted or answer is Answer.MAYBE:
            assert Move.FAILED not in moves
    assert Move.FAILED not in {m for found in Found if found is not Found.ABSENT for m in AFTER_ASK[found]}


def test_no_row_calls_again_what_cannot_be_repeated() -> None:
    """C2: after a call that may have worked, `none` never calls and `lookup` asks first."""
    assert BEFORE[Strategy.NONE, True] == (Move.UNKNOWN, Move.UNKNOWN)
    assert BEFORE[Strategy.LOOKUP, True] == (Move.ASK, Move.ASK)
    for answer in Answer:
        if answer is not Answer.WORKED:
            assert AFTER_CALL[Strategy.NONE, answer, True] == (Move.UNKNOWN, Move.UNKNOWN)
    assert AFTER_CALL[Strategy.NONE, Answer.MAYBE, False] == (Move.UNKNOWN, Move.UNKNOWN)
    assert Move.CALL not in {m for found in Found if found is not Found.ABSENT for m in AFTER_ASK[found]}


def test_known_failures_end_failed_and_not_in_a_persons_hands() -> None:
    """C3: an error that says that nothing was done ends `failed` at once, or when the retries stop."""
    for strategy in Strategy:
        assert AFTER_CALL[strategy, Answer.REFUSED, False] == (Move.FAILED, Move.FAILED)
        assert AFTER_CALL[strategy, Answer.NOT_YET, False] == (Move.WAIT, Move.FAILED)
        assert BEFORE[strategy, False] == (Move.CALL, Move.FAILED)


@pytest.mark.parametrize(
    ("error_class", "answer"),
    [
        (None, Answer.WORKED),
        (ErrorClass.TRANSIENT, Answer.NOT_YET),
        (ErrorClass.THROTTLED, Answer.NOT_YET),
        (ErrorClass.VALIDATION, Answer.REFUSED),
        (ErrorClass.PERMISSION, Answer.REFUSED),
        (ErrorClass.CONFLICT, Answer.REFUSED),
        (ErrorClass.NOT_FOUND, Answer.REFUSED),
        (ErrorClass.AMBIGUOUS, Answer.MAYBE),
        (ErrorClass.BUG, Answer.MAYBE),
    ],
)
def test_a_class_says_whether_it_worked(error_class: ErrorClass | None, answer: Answer) -> None:
    """C3: the class alone decides; a bug of ours during a call says nothing about its effect."""
    assert follow.answer_of(error_class) is answer


def test_a_key_is_not_used_after_it_has_run_out() -> None:
    """⚑ DESIGN 5: an ambiguous attempt older than `key_valid_s` ends unknown, before the call and before the wait."""
    operation = Operation("op", Strategy.KEY, key_valid_s=60)
    young = History(ambiguous_since=NOW - timedelta(seconds=59), calls=1)
    old = History(ambiguous_since=NOW - timedelta(seconds=60), calls=1)
    assert follow.before(operation, young, NOW, None).move is Move.CALL
    assert follow.before(operation, old, NOW, None).move is Move.UNKNOWN
    slow = RetryPolicy(base_s=3600, delay_max_s=3600, total_max_s=100_000)
    then = follow.after_call(operation, slow, young, ErrorClass.TRANSIENT, NOW, id_=ID, deadline=None)
    assert then.move is Move.UNKNOWN


def test_a_question_is_asked_although_deadline_and_attempts_are_over() -> None:
    """⚑ DESIGN 5: `lookup` asks once more first; neither a deadline nor exhausted retries change that."""
    operation = Operation("op", Strategy.LOOKUP, in_flight_max_s=30)
    policy = RetryPolicy(attempts_max=1)
    history = History(calls=1, first_attempt_at=NOW)
    then = follow.after_call(operation, policy, history, ErrorClass.AMBIGUOUS, NOW, id_=ID, deadline=NOW)
    assert (then.move, then.stopped is not None) == (Move.WAIT, True)
    tainted = history._replace(ambiguous_since=NOW, ended_at=NOW, stopped=then.stopped)
    assert follow.before(operation, tainted, NOW, "the deadline has passed").move is Move.ASK


def test_not_found_counts_only_after_the_time_in_flight() -> None:
    """⚑ DESIGN 5: an absence seen earlier waits until exactly then, and then asks again."""
    operation = Operation("op", Strategy.LOOKUP, in_flight_max_s=30)
    history = History(calls=1, ambiguous_since=NOW, ended_at=NOW + timedelta(seconds=5))
    then = follow.after_ask(
        operation,
        RetryPolicy(),
        history,
        Found.ABSENT_TOO_EARLY,
        None,
        NOW + timedelta(seconds=6),
        id_=ID,
        refused=None,
    )
    assert (then.move, then.at) == (Move.WAIT, NOW + timedelta(seconds=35))


CLASSES = [None, *ErrorClass]
FOUND = list(Found)


@given(
    strategy=st.sampled_from(Strategy),
    attempts_max=st.integers(1, 4),
    ends=st.lists(st.sampled_from(CLASSES), min_size=1, max_size=12),
    answers=st.lists(st.sampled_from(FOUND), min_size=1, max_size=12),
    cut_off=st.sets(st.integers(0, 11)),
    deadline_s=st.none() | st.integers(0, 120),
)
def test_whole_lives_keep_the_laws(
    strategy: Strategy,
    attempts_max: int,
    ends: list[ErrorClass | None],
    answers: list[Found],
    cut_off: set[int],
    deadline_s: int | None,
) -> None:
    """INV-X, INV-B, ⚑: any order of outcomes, answers and lost leases ends; never `failed` over a maybe, never a second
    call of `none` after one, never more calls than the policy allows."""
    operation = Operation("op", strategy, in_flight_max_s=10, key_valid_s=600)
    policy = RetryPolicy(attempts_max=attempts_max)
    deadline = None if deadline_s is None else NOW + timedelta(seconds=deadline_s)
    history, now = History(), NOW
    maybe_worked = 0
    sent_after_maybe = 0
    sent = 0
    for step in range(200):
        refused = "over" if history.calls >= policy.attempts_max or (deadline and now >= deadline) else None
        then = follow.before(operation, history, now, refused)
        if then.move is Move.ASK:
            found = answers[step % len(answers)]
            if found is Found.ABSENT_TOO_EARLY and now >= follow.counts_from(
                operation.in_flight_max_s, history.ended_at, now
            ):
                found = Found.ABSENT  # as an attempt tells the two apart: by the instant at which it asked
            asks = history.asks + 1 if found is Found.NO_ANSWER else 0
            first = now if asks == 1 else history.first_ask_at
            history = history._replace(asks=asks, first_ask_at=first)
            then = follow.after_ask(operation, policy, history, found, None, now, id_=ID, refused=refused)
            if found is Found.ABSENT:
                maybe_worked = 0
                history = history._replace(ambiguous_since=None, ended_at=None)
        if then.move is Move.CALL:
            sent += 1
            sent_after_maybe += 1 if maybe_worked else 0
            end = ErrorClass.AMBIGUOUS if step in cut_off else ends[step % len(ends)]
            before = history._replace(calls=history.calls + 1, first_attempt_at=history.first_attempt_at or now)
            then = follow.after_call(operation, policy, before, end, now, id_=ID, deadline=deadline)
            history = before
            if follow.answer_of(end) is Answer.MAYBE:
                maybe_worked += 1
                history = history._replace(ambiguous_since=history.ambiguous_since or now, ended_at=now)
        history = history._replace(stopped=then.stopped or history.stopped)
        if then.move in ENDS:
            break
        assert then.move is Move.WAIT
        assert then.at is not None and then.at >= now
        now = max(then.at, now + timedelta(milliseconds=1))
    else:
        # Only a downstream that says "not there yet" for ever keeps a question alive for ever; this one does not move.
        assert set(answers) <= {Found.ABSENT_TOO_EARLY}
        return
    assert sent <= attempts_max
    if then.move is Move.FAILED:
        assert maybe_worked == 0
    if strategy is Strategy.NONE:
        assert sent_after_maybe == 0
    if strategy is Strategy.LOOKUP:
        assert sent_after_maybe == 0, "it is asked before every repeat, and only a no lets it call"


def row(attempts: int, *, interrupted: bool, ended_at: datetime | None) -> Claimed:
    return Claimed(ID, "attempt.x", attempts, attempts, interrupted, b"", None, NOW, NOW, 0.0, ended_at)


def test_a_lost_lease_counts_as_a_call_that_may_have_worked() -> None:
    """B2, ⚑: what a killed process did is unknown, so its attempt taints the history and uses up an attempt."""
    ended = NOW + timedelta(seconds=40)
    history = accounted(History(settled=1, calls=1), row(3, interrupted=True, ended_at=ended), 30)
    assert (history.tainted, history.calls, history.ended_at) == (True, 2, ended)
    assert history.ambiguous_since == ended - timedelta(seconds=30)
    several = accounted(History(), row(4, interrupted=True, ended_at=ended), 30)
    assert several.ambiguous_since == NOW, "of several lost leases the oldest may be as old as the row"
    assert several.calls == 3


def test_settled_attempts_are_not_lost_ones() -> None:
    """C4: an attempt that was settled is not taken for a lost one when the row is claimed again."""
    history = History(settled=2, calls=2)
    assert accounted(history, row(3, interrupted=False, ended_at=NOW), 30) == history


def test_the_history_keeps_its_first_and_newest_calls_and_its_bytes() -> None:
    """C7: a row's own list of calls is bounded, and reads back as it was written."""
    history = History()
    for n in range(50):
        history = history.with_call(Call(at=NOW, ms=n, what="call", ended="transient"))
    assert [c.ms for c in history.log] == [*range(10), *range(40, 50)]
    assert History.from_bytes(history.to_bytes()) == history
    assert History.from_bytes(None) == History()
