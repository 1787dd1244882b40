"""(class, attempt, policy, now) -> wait | stop: the one place that says whether and when an attempt is repeated.
Pure: the jitter's randomness is derived from the command's id, so that the same attempt waits the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from factmesh.errors import RETRYABLE, ErrorClass


class RetryPolicy(BaseModel):
    """Exponential backoff with full jitter, capped in attempts and in total time (REQUIREMENTS C4).

    The defaults are safe for a call over a network: about 4 minutes of trying, never more than 6 calls.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attempts_max: int = Field(default=6, ge=1, le=1000)
    base_s: float = Field(default=0.5, gt=0, le=3600)
    factor: float = Field(default=2.0, ge=1, le=10)
    delay_max_s: float = Field(default=60.0, gt=0, le=86400)
    total_max_s: float = Field(default=240.0, gt=0, le=30 * 86400)


@dataclass(frozen=True, slots=True)
class Wait:
    """Try again at `at`."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Stop:
    """Do not try again; `why` is for people."""

    why: str


def jitter(id_: UUID, attempt: int) -> float:
    """A number in [0, 1) that only the command and the attempt decide."""
    h = blake2b(id_.bytes + attempt.to_bytes(4, "big"), digest_size=8, person=b"fm.jitter").digest()
    return int.from_bytes(h, "big") / 2.0**64


def next_step(
    error_class: ErrorClass,
    attempt: int,
    policy: RetryPolicy,
    now: datetime,
    *,
    id_: UUID,
    first_attempt_at: datetime,
    deadline: datetime | None = None,
    retry_after_s: float | None = None,
) -> Wait | Stop:
    """What follows the failed attempt number `attempt` (1 is the first).

    Full jitter after "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), with a floor of half the base
    so that a retry never follows at once. `Retry-After` (RFC 9110, 10.2.3) is obeyed: it is a lower bound, and where
    it lies past the caps the answer is to stop.
    """
    if error_class not in RETRYABLE and error_class is not ErrorClass.AMBIGUOUS:
        return Stop(f"an error of class {error_class} is not retried")
    if attempt >= policy.attempts_max:
        return Stop(f"all {policy.attempts_max} attempts are used up")
    # In logarithms: 10 to the power of 400 is no float.
    grown = math.log(policy.base_s) + (attempt - 1) * math.log(policy.factor)
    ceiling_s = policy.delay_max_s if grown >= math.log(policy.delay_max_s) else math.exp(grown)
    delay_s = max(min(policy.base_s, policy.delay_max_s) / 2, jitter(id_, attempt) * ceiling_s)
    if retry_after_s is not None:
        # Whatever a stranger sent, the sum below must be an instant.
        delay_s = max(delay_s, min(retry_after_s, 2 * policy.total_max_s))
    at = now + timedelta(seconds=delay_s)
    if at > first_attempt_at + timedelta(seconds=policy.total_max_s):
        return Stop(f"the next attempt would come after {policy.total_max_s:g} s of trying")
    if deadline is not None and at >= deadline:
        return Stop(f"the deadline {deadline.isoformat()} comes before the next attempt")
    return Wait(at)
