"""A service as a process: what kills it is found, and a stop is an end within ten seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support import kernel, toy, toy_process
from tests.support.waiting import until

from factmesh import kafka
from factmesh.batch_loop import KILLED_ATTEMPTS_MAX
from factmesh.message import Emission
from factmesh.service import STOP_S_MAX, Running, open_service
from factmesh.settings import Settings
from factmesh.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def start(settings: Settings, **changed: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "FACTMESH_NAMESPACE": settings.namespace,
        "FACTMESH_SERVICE": "toy",
        "FACTMESH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "FACTMESH_POSTGRES_DSN": settings.postgres_dsn.get_secret_value(),
        "FACTMESH_LOG_LEVEL": "warning",
        "PYTHONPATH": str(ROOT),
        **changed,
    }
    return subprocess.Popen([sys.executable, "-m", "tests.support.toy_process"], cwd=ROOT, env=environment)


async def test_input_that_kills_the_process_is_found_and_quarantined(stack: Stack, namespace: str) -> None:
    """DESIGN 3: after an unclean stop one by one, marked before decoding; at the limit the DLQ."""

    def make(running: Running) -> list[Emission]:
        first, last = (toy.asking(running, "result", name, do="count") for name in ("first", "last"))
        elsewhere = [toy.asking(running, "fact", f"f{n}", do="count") for n in range(30)]
        topic = running.context.topic("result")
        around = [Emission(topic, b"p", m.value) for m in (first, last)]
        return [around[0], Emission(topic, b"p", b"kill"), around[1], *elsewhere]

    emissions = await kernel.make_topics(stack, namespace, make)
    await kernel.send(stack, emissions)
    settings = await toy.settings(stack, namespace)
    dlq = f"dlq.{emissions[0].topic}"
    deaths = 0
    process = start(settings)
    try:
        deadline = time.monotonic() + 200
        while not await kafka.read_all(stack.bootstrap, [dlq]):
            assert time.monotonic() < deadline, f"{deaths} deaths and no record"
            if process.poll() is not None:
                assert process.returncode == toy_process.EXIT
                deaths += 1
                process = start(settings)
            await asyncio.sleep(0.2)
    finally:
        process.terminate()
        process.wait(20)
    assert deaths == 1 + KILLED_ATTEMPTS_MAX
    async with open_service(toy.service(), settings) as running:
        await kernel.idle(running)
        assert await toy.counts(running) == {"first": 1, "last": 1} | {f"f{n}": 1 for n in range(30)}
        (record,) = await kernel.dead_of(running)
        assert record.dead.original.value == b"kill"
        assert record.dead.attempts == KILLED_ATTEMPTS_MAX
        assert "processes died with this message in hand" in record.dead.message


@pytest.mark.parametrize("database_answers", [True, False])
async def test_a_stop_takes_less_than_ten_seconds(stack: Stack, namespace: str, database_answers: bool) -> None:
    """DESIGN 3: SIGTERM with messages in hand; also while the database is gone, when nothing can be finished."""

    def make(running: Running) -> list[Emission]:
        return [toy.asking(running, "result", f"o{n}", do="count") for n in range(200)]

    await kernel.send(stack, await kernel.make_topics(stack, namespace, make))
    settings = await toy.settings(stack, namespace)
    async with kernel.Proxy(settings.postgres_dsn.get_secret_value()).running() as proxy:
        process = start(settings, FACTMESH_POSTGRES_DSN=proxy.dsn)
        try:
            await asyncio.sleep(6)
            if not database_answers:
                proxy.down = True
                proxy.cut_all()
                await asyncio.sleep(1)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)

            async def ended() -> bool:
                return process.poll() is not None

            await until("the process has ended", ended, timeout_s=STOP_S_MAX + 5)
            assert time.monotonic() - began < STOP_S_MAX
            assert process.returncode == 0
        finally:
            process.kill()
    async with open_service(toy.service(), settings) as running:
        await kernel.idle(running)
        assert await toy.counts(running) == {f"o{n}": 1 for n in range(200)}
        assert len({m.id for m in toy.decoded(running, await kernel.on_topic(running, "status"))}) == 200


async def test_a_stop_does_not_wait_for_a_broker_that_takes_nothing(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 3: what is committed and not acknowledged holds its offsets, not the stop; the next start publishes it."""
    settings = await toy.settings(stack, namespace)
    gate = kernel.PublishGate(monkeypatch, b"o")
    async with open_service(toy.service(), settings) as running:
        await running.context.publisher.publish([toy.asking(running, "result", "k", do="count")])
        message = toy.asking(running, "result", "o", do="count")
        await running.context.publisher.publish([Emission(message.topic, b"k", message.value)])

        async def held() -> bool:
            return gate.held == 1

        await until("the batch is committed and not published", held)
        began = time.monotonic()
    assert time.monotonic() - began < STOP_S_MAX
    monkeypatch.undo()
    async with open_service(toy.service(), settings) as running:
        await kernel.idle(running)
        assert await toy.counts(running) == {"k": 1, "o": 1}
        assert {d.key for d in await kernel.on_topic(running, "status")} == {b"k", b"o"}
    gate.open.set()


async def test_a_thread_that_hangs_does_not_hold_the_stop(stack: Stack, namespace: str) -> None:
    """DESIGN 3: a client's thread waits for a broker that is gone; the process ends in time all the same."""
    process = start(await toy.settings(stack, namespace), TOY_HANGS="1")
    try:
        await asyncio.sleep(6)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)

        async def ended() -> bool:
            return process.poll() is not None

        await until("the process has ended", ended, timeout_s=STOP_S_MAX + 5)
        assert time.monotonic() - began < STOP_S_MAX
        assert process.returncode == 0
    finally:
        process.kill()
