"""What is refused by the broker or by a deadlock is seen and tried again, not taken for done."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from factmesh.errors import ValidationError
from factmesh.kafka import Subscription
from factmesh.kafka import consumer as gateway
from factmesh_quarantine.acts import TRIES_MAX, Acts

WHERE = ("t", 0)


def subscription(answer: Sequence[Any]) -> Any:
    made: Any = Subscription("127.0.0.1:1", group="g", topics=["t"], client_id="test")
    made._consumer = SimpleNamespace(commit=lambda **_: answer, list_topics=lambda timeout: None)
    return made


@pytest.mark.parametrize(("error", "counted"), [(None, True), ("stale member epoch", False)])
async def test_a_partition_that_refuses_a_commit_is_told(error: str | None, counted: bool) -> None:
    """INV-L: librdkafka raises nothing for one partition's refusal; it stands in the answer and must not count."""
    answer = [SimpleNamespace(topic="t", partition=0, error=error)]
    assert await subscription(answer).commit({WHERE: 7}) is counted


class Stuck:
    """A client that lost its coordinator: every commit hangs, other questions are answered while the broker is up."""

    def __init__(self, up: bool) -> None:
        self.up = up
        self.free = threading.Event()
        self.closed = threading.Event()

    def commit(self, **_: Any) -> Sequence[Any]:
        self.free.wait(30)
        assert not self.closed.is_set(), "closed under a call that still ran"
        return ()

    def list_topics(self, timeout: float) -> None:
        if not self.up:
            raise RuntimeError("no broker")

    def close(self) -> None:
        self.closed.set()


class Fresh:
    def __init__(self, config: Any) -> None:
        self.subscribed: list[str] = []

    def subscribe(self, topics: list[str], **_: Any) -> None:
        self.subscribed = topics

    def commit(self, **_: Any) -> Sequence[Any]:
        return ()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("up", [True, False])
async def test_a_consumer_that_lost_its_coordinator_is_replaced(up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-L, G7: a commit that hangs stops nobody; if the broker answers otherwise, a new consumer goes on. While the
    broker is down, it is waited for."""
    monkeypatch.setattr(gateway, "COMMIT_S_MAX", 0.05)
    monkeypatch.setattr(gateway, "RENEW_AFTER_S", 0.1)
    monkeypatch.setattr(gateway, "Consumer", Fresh)
    made: Any = Subscription("127.0.0.1:1", group="g", topics=["t"], client_id="test")
    stuck = Stuck(up)
    made._consumer = stuck
    made.assigned = {WHERE}
    outcomes = [await made.commit({WHERE: 7}) for _ in range(6)]
    assert outcomes[:2] == [False, False] and outcomes[-1] is up
    if up:
        assert isinstance(made._consumer, Fresh) and made._consumer.subscribed == ["t"]
        assert made.assigned == set(), "what the old one held is the group's to give"
        assert not stuck.closed.is_set(), "its commits still hang: it may not be freed under them"
    else:
        assert made._consumer is stuck
    stuck.free.set()
    await made.close()
    assert stuck.closed.wait(5)


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
