"""What is refused by the broker or by a deadlock is seen and tried again, not taken for done."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from factmesh.errors import ValidationError
from factmesh.kafka import Subscription
from factmesh_quarantine.acts import TRIES_MAX, Acts

WHERE = ("t", 0)


def subscription(answer: Sequence[Any]) -> Subscription:
    made = Subscription("127.0.0.1:1", group="g", topics=["t"], client_id="test")
    made._consumer = SimpleNamespace(commit=lambda **_: answer)
    return made


@pytest.mark.parametrize(("error", "counted"), [(None, True), ("stale member epoch", False)])
async def test_a_partition_that_refuses_a_commit_is_told(error: str | None, counted: bool) -> None:
    """INV-L: librdkafka raises nothing for one partition's refusal; it stands in the answer and must not count."""
    answer = [SimpleNamespace(topic="t", partition=0, error=error)]
    assert await subscription(answer).commit({WHERE: 7}) is counted


@pytest.mark.parametrize(("failures", "holds"), [(0, True), (TRIES_MAX - 1, True), (TRIES_MAX, False)])
async def test_publishing_an_act_is_tried_again_within_its_bound(failures: int, holds: bool) -> None:
    """E2: a deadlock with the filing of a record is tried again with the same bytes, a bounded number of times."""
    calls = 0

    async def once() -> int:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise ConnectionResetError
        return 1

    acts = Acts.__new__(Acts)
    if holds:
        assert await acts._again(once) == 1
    else:
        with pytest.raises(ConnectionResetError):
            await acts._again(once)
    assert calls == min(failures + 1, TRIES_MAX)


async def test_what_waiting_does_not_cure_is_raised_at_once() -> None:
    """E2: an error that is no transient one is not repeated."""
    calls = 0

    async def once() -> int:
        nonlocal calls
        calls += 1
        raise ValidationError("no")

    with pytest.raises(ValidationError):
        await Acts.__new__(Acts)._again(once)
    assert calls == 1
