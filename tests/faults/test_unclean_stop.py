"""Input that kills the interpreter is found by the processes that come after, and dies instead of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.faults.dies_of_bytes import BYTES
from tests.support import toy

from factmesh import dlq, kafka
from factmesh.batch_loop import KILLED_ATTEMPTS_MAX
from factmesh.kafka import Publisher
from factmesh.message import Emission
from factmesh.service import open_service
from factmesh.settings import Settings
from factmesh.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
LIFE_S_MAX = 60.0


@contextmanager
def process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")},
        "FACTMESH_SERVICE": settings.service,
        "FACTMESH_NAMESPACE": settings.namespace,
        "FACTMESH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "FACTMESH_POSTGRES_DSN": settings.postgres_dsn.get_secret_value(),
    }
    argv = [sys.executable, "-m", "tests.faults.dies_of_bytes"]
    child = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.wait(15)


async def test_bytes_that_kill_the_process_are_dead_lettered_by_a_later_one(stack: Stack, namespace: str) -> None:
    """DESIGN 3: after an unclean stop messages go one by one with a durable mark; at the limit the culprit is dead.

    The first process dies with a batch in hand and marks nothing; then each marks before it decodes.
    """
    settings = await toy.settings(stack, namespace)
    async with open_service(toy.service(), settings) as running:
        topic = running.context.topic("result")
        good = [toy.asking(running, "result", "o", do="count") for _ in range(6)]
        names = [running.context.topic("result"), running.context.topic("fact")]
        group = running.context.group
    publisher = Publisher(stack.bootstrap, client_id="test")
    try:
        await publisher.publish([*good[:3], Emission(topic, b"o", BYTES), *good[3:]])
    finally:
        await publisher.close()

    deaths, records = 0, []
    while not records and deaths <= KILLED_ATTEMPTS_MAX + 1:
        with process(settings) as child:
            for _ in range(int(LIFE_S_MAX / 0.2)):
                if child.poll() is not None:
                    break
                if await kafka.backlog(stack.bootstrap, group, names) == 0:
                    break
                await asyncio.sleep(0.2)
            records = [dlq.parse(d) for d in await kafka.read_all(stack.bootstrap, ["dlq." + topic])]
            if not records:
                assert child.poll() == -signal.SIGKILL
                deaths += 1
    assert deaths == KILLED_ATTEMPTS_MAX + 1
    (record,) = records
    assert record.dead.original.value == BYTES
    assert f"{KILLED_ATTEMPTS_MAX} processes died with this message in hand" in record.dead.message

    async with open_service(toy.service(), settings) as running:
        assert await toy.counts(running) == {"o": 6}
        async with running.context.pool.acquire() as conn:
            assert await conn.fetchval("SELECT count(*) FROM attempt_mark") == 0
