"""The publisher against a broker that refuses: what was acknowledged is not published again, what was not is, whole."""

from __future__ import annotations

import asyncio

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from factmesh import kafka
from factmesh.kafka.common import BrokerError
from factmesh.message import Emission
from factmesh.stack import Stack
from factmesh.topics import DLQ_BYTES_MAX

pytestmark = pytest.mark.stack
LIMIT = "max.message.bytes"


async def _make(stack: Stack, name: str, limit: int) -> AdminClient:
    admin = AdminClient({"bootstrap.servers": stack.bootstrap})
    made = admin.create_topics([NewTopic(name, 1, 1, config={LIMIT: str(limit)})], operation_timeout=15)
    await asyncio.to_thread(made[name].result)
    return admin


async def _allow(admin: AdminClient, name: str) -> None:
    entry = ConfigEntry(LIMIT, "1000000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    for future in admin.incremental_alter_configs([resource]).values():
        await asyncio.to_thread(future.result)


async def test_only_what_failed_is_published_again_headers_and_all(stack: Stack, namespace: str) -> None:
    """INV-L: a publish returns when all is acknowledged, and the acknowledged part of it went out once."""
    good, small = f"{namespace}.good", f"{namespace}.small"
    await _make(stack, good, 1_000_000)
    admin = await _make(stack, small, 1_000)
    retries: list[int] = []
    publisher = kafka.Publisher(stack.bootstrap, client_id="test", on_retry=retries.append)
    headers = (("traceparent", b"00-1"), ("empty", None))
    large = [Emission(small, b"%d" % n, b"x" * 5_000, headers) for n in range(3)]
    waiting = asyncio.create_task(publisher.publish([Emission(good, b"k", b"v"), *large, Emission(good, None, None)]))
    while not retries:
        await asyncio.sleep(0.02)
    assert not waiting.done()
    await _allow(admin, small)
    async with asyncio.timeout(30):
        await waiting
    assert max(retries) <= 3
    found = await kafka.read_all(stack.bootstrap, [good, small])
    assert sorted((d.key or b"", d.value or b"") for d in found if d.topic == good) == [(b"", b""), (b"k", b"v")]
    assert {(d.key, d.value, d.headers) for d in found if d.topic == small} == {
        (e.key, e.value, headers) for e in large
    }
    await publisher.close()


async def test_the_impatient_hear_of_the_first_failure(stack: Stack, namespace: str) -> None:
    """An entrance answers its caller: nothing is tried again behind its back, and others' publishing is not held up."""
    small = f"{namespace}.small"
    await _make(stack, small, 1_000)
    publisher = kafka.Publisher(stack.bootstrap, client_id="test")
    for value in (b"x" * 5_000, b"x" * (DLQ_BYTES_MAX + 200_000)):  # refused by the broker; not even taken
        with pytest.raises(BrokerError, match="not published: .*try again when the broker answers"):
            await publisher.publish([Emission(small, b"k", b"v"), Emission(small, b"k", value)], patient=False)
    await publisher.publish([Emission(small, b"k", b"after")])
    await publisher.publish([])
    values = [d.value for d in await kafka.read_all(stack.bootstrap, [small])]
    assert values[-1] == b"after"
    assert set(values) <= {b"v", b"after"}
    await publisher.close()


async def test_a_full_queue_holds_the_publisher_back(stack: Stack, namespace: str) -> None:
    """Back-pressure: more emissions than the producer's queue takes wait for room, in order, and none is lost."""
    name = f"{namespace}.many"
    await _make(stack, name, 1_000_000)
    publisher = kafka.Publisher(stack.bootstrap, client_id="test")
    config = {**publisher._config, "queue.buffering.max.messages": 50}
    await publisher.close()
    publisher = kafka.Publisher(stack.bootstrap, client_id="test")
    publisher._config = config
    publisher._renew(publisher._producer)
    async with asyncio.timeout(30):
        await publisher.publish([Emission(name, b"k", b"%d" % n) for n in range(400)])
    found = await kafka.read_all(stack.bootstrap, [name])
    assert [d.value for d in found] == [b"%d" % n for n in range(400)]
    await publisher.close()
