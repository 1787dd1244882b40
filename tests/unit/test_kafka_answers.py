"""Acknowledgements for callers who wait each for its own: many at once, one wake-up, one that fails fails alone.
The producer is the real one where an address can stand for the broker that is gone.
"""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from confluent_kafka import KafkaError

from factmesh.kafka import BrokerError, Publisher
from factmesh.kafka.producer import _Answers
from factmesh.message import Emission


async def test_one_that_fails_fails_alone() -> None:
    """Issue 7: acknowledgements that come in one burst are handed out each to its own caller."""
    loop = asyncio.get_running_loop()
    answers = _Answers(loop)
    waiting = [loop.create_future() for _ in range(300)]

    def burst() -> None:
        for number, one in enumerate(waiting):
            answers.put(one, KafkaError(KafkaError._MSG_TIMED_OUT) if number % 100 == 7 else None)

    waiting[3].cancel()  # its caller has gone
    thread = threading.Thread(target=burst)
    thread.start()
    told = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
    thread.join()
    failed = [n for n, one in enumerate(told) if isinstance(one, BrokerError)]
    assert failed == [7, 107, 207]
    assert all(one is None for n, one in enumerate(told) if n not in (3, *failed))


async def test_no_answer_is_left_behind_whatever_the_threads_do() -> None:
    """Issue 7: an answer that comes while others are being handed out wakes the loop again."""
    loop = asyncio.get_running_loop()
    answers = _Answers(loop)

    def put_all(part: list[asyncio.Future[None]]) -> None:
        for one in part:
            answers.put(one, None)

    for _ in range(50):
        waiting = [loop.create_future() for _ in range(40)]
        threads = [threading.Thread(target=put_all, args=(waiting[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(asyncio.gather(*waiting), 10)


async def test_a_loop_is_woken_once_for_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 7: what costs is the wake-up across threads; a burst has one."""
    loop = asyncio.get_running_loop()
    wakes = 0
    real = loop.call_soon_threadsafe

    def counted(*args: object) -> object:
        nonlocal wakes
        wakes += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    answers = _Answers(loop)
    waiting = [loop.create_future() for _ in range(100)]
    for one in waiting:
        answers.put(one, None)
    await asyncio.gather(*waiting)
    assert wakes == 1


async def test_without_a_broker_nothing_is_acknowledged() -> None:
    """A2: a caller waits until it gives up, or until the producer does; what no broker took never counts as taken."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    publisher = Publisher(f"127.0.0.1:{port}", client_id="test")
    try:
        waiting = [publisher.send(Emission("facts.raw", b"k", b"v", (("a", b"b"),))) for _ in range(3)]
        assert publisher.queued >= 3
        _, pending = await asyncio.wait(waiting, timeout=0.3)
        assert len(pending) == 3
        publisher._producer.purge()
        told = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        assert [type(one) for one in told] == [BrokerError] * 3
        too_large = publisher.send(Emission("facts.raw", b"k", b"v" * 10_000_000))
        with pytest.raises(BrokerError, match="not published"):
            await too_large
    finally:
        await publisher.close(0.1)
