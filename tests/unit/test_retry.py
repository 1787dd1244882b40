"""When an attempt is repeated: within the policy, its caps and the deadline, and the same each time it is asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh.errors import ErrorClass
from factmesh.retry import RetryPolicy, Stop, Wait, jitter, next_step

START = datetime(2026, 1, 1, tzinfo=UTC)
POLICIES = st.builds(
    RetryPolicy,
    attempts_max=st.integers(1, 1000),
    base_s=st.floats(0.001, 3600),
    factor=st.floats(1, 10),
    delay_max_s=st.floats(0.001, 86400),
    total_max_s=st.floats(0.001, 30 * 86400),
)
IDS = st.uuids()
RETRIED = st.sampled_from([ErrorClass.TRANSIENT, ErrorClass.THROTTLED, ErrorClass.AMBIGUOUS])
SECONDS = st.floats(0, 30 * 86400)


@given(POLICIES, IDS, RETRIED, st.integers(1, 1001), SECONDS)
def test_a_wait_stays_within_every_cap(
    policy: RetryPolicy, id_: UUID, kind: ErrorClass, attempt: int, elapsed_s: float
) -> None:
    """C4, INV-B: no attempt beyond the last, no delay past the cap or at once, none past the total time."""
    now = START + timedelta(seconds=elapsed_s)
    step = next_step(kind, attempt, policy, now, id_=id_, first_attempt_at=START)
    if attempt >= policy.attempts_max:
        assert isinstance(step, Stop)
    if isinstance(step, Wait):
        delay_s = (step.at - now).total_seconds()
        assert delay_s <= policy.delay_max_s + 1e-6
        assert delay_s >= min(policy.base_s, policy.delay_max_s) / 2 - 1e-6
        assert step.at <= START + timedelta(seconds=policy.total_max_s)


@given(POLICIES, IDS, SECONDS, st.integers(1, 999), SECONDS)
def test_no_attempt_comes_at_or_after_the_deadline(
    policy: RetryPolicy, id_: UUID, elapsed_s: float, attempt: int, deadline_s: float
) -> None:
    """B4: a command that is late is not tried again."""
    now, deadline = START + timedelta(seconds=elapsed_s), START + timedelta(seconds=deadline_s)
    step = next_step(ErrorClass.TRANSIENT, attempt, policy, now, id_=id_, first_attempt_at=START, deadline=deadline)
    if isinstance(step, Wait):
        assert step.at < deadline


@given(POLICIES, IDS, RETRIED, st.floats(allow_nan=True, allow_infinity=True), st.integers(1, 999))
def test_retry_after_is_a_lower_bound_whatever_it_says(
    policy: RetryPolicy, id_: UUID, kind: ErrorClass, retry_after_s: float, attempt: int
) -> None:
    """C3: never earlier than asked; where that lies past the caps, stop. Nothing that a server sends raises."""
    step = next_step(kind, attempt, policy, START, id_=id_, first_attempt_at=START, retry_after_s=retry_after_s)
    if isinstance(step, Wait) and retry_after_s == retry_after_s:
        assert (step.at - START).total_seconds() >= retry_after_s - 1e-6
    if retry_after_s > policy.total_max_s:
        assert isinstance(step, Stop)


@given(POLICIES, IDS)
def test_the_attempts_of_a_command_that_never_works_are_counted(policy: RetryPolicy, id_: UUID) -> None:
    """INV-B: followed to its end, never more attempts than the policy, never longer than its total time."""
    now, attempts = START, 1
    while isinstance(
        step := next_step(ErrorClass.TRANSIENT, attempts, policy, now, id_=id_, first_attempt_at=START), Wait
    ):
        assert step.at > now
        now, attempts = step.at, attempts + 1
    assert attempts <= policy.attempts_max
    assert now - START <= timedelta(seconds=policy.total_max_s)


@given(IDS, st.integers(1, 1000))
def test_jitter_is_a_fraction_that_repeats(id_: UUID, attempt: int) -> None:
    """The same attempt of the same command waits the same, on whichever replica."""
    assert 0 <= jitter(id_, attempt) < 1
    assert jitter(id_, attempt) == jitter(UUID(int=id_.int), attempt)


def test_jitter_spreads_commands_that_failed_together() -> None:
    """INV-P: a thousand that fail at one instant do not come back at one instant (each tenth gets its share)."""
    tenths = [0] * 10
    for n in range(1000):
        tenths[int(jitter(UUID(int=n), 1) * 10)] += 1
    assert all(50 < n < 160 for n in tenths), tenths


@pytest.mark.parametrize(
    "kind", sorted(set(ErrorClass) - {ErrorClass.TRANSIENT, ErrorClass.THROTTLED, ErrorClass.AMBIGUOUS})
)
def test_the_class_decides(kind: ErrorClass) -> None:
    """C3: what repeating cannot cure is not repeated, and the answer says why."""
    step = next_step(kind, 1, RetryPolicy(), START, id_=UUID(int=1), first_attempt_at=START)
    assert isinstance(step, Stop)
    assert str(kind) in step.why


def test_a_high_attempt_of_a_steep_policy_is_a_wait() -> None:
    """10 to the power of 400 is no float: the ceiling is the cap, not an exception."""
    policy = RetryPolicy(attempts_max=1000, factor=10, base_s=1, delay_max_s=2, total_max_s=30 * 86400)
    assert isinstance(
        next_step(ErrorClass.TRANSIENT, 400, policy, START, id_=UUID(int=1), first_attempt_at=START), Wait
    )
