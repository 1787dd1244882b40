"""Topics are made as the table says, and one that would lose messages is refused at start (DESIGN 2)."""

from __future__ import annotations

import asyncio

import pytest
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from factmesh import kafka
from factmesh.errors import SettingsError
from factmesh.kafka.producer import PARTITIONER
from factmesh.message import Emission
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def test_a_compacted_topic_is_refused_with_what_to_do(stack: Stack, namespace: str) -> None:
    """DESIGN 2: compaction drops messages that were never handled: the service does not start."""
    admin = AdminClient({"bootstrap.servers": stack.bootstrap})
    name = f"{namespace}.facts.raw"
    made = admin.create_topics([NewTopic(name, 1, 1, config={"cleanup.policy": "compact"})], operation_timeout=15)
    await asyncio.to_thread(made[name].result)
    with pytest.raises(SettingsError, match="compacted") as caught:
        await kafka.ensure_topics(stack.bootstrap, [kafka.TopicSpec(name, 1)])
    assert name in str(caught.value)
    assert "cleanup.policy=delete" in str(caught.value)


async def test_a_key_lies_where_kafkas_own_clients_put_it(stack: Stack, namespace: str) -> None:
    """DESIGN 2: murmur2, as every client but librdkafka by default: one key never lies on two partitions."""
    assert PARTITIONER == "murmur2_random"
    name = f"{namespace}.t"
    await kafka.ensure_topics(stack.bootstrap, [kafka.TopicSpec(name, 4)])
    publisher = kafka.Publisher(stack.bootstrap, client_id="test")
    keys = [b"%d" % n for n in range(40)]
    await publisher.publish([Emission(name, key, b"v") for key in keys])
    await publisher.close()
    found = {d.key: d.partition for d in await kafka.read_all(stack.bootstrap, [name])}
    assert found == {key: (murmur2(key) & 0x7FFFFFFF) % 4 for key in keys}


def murmur2(data: bytes) -> int:
    """MurmurHash2 as Kafka's Java client seeds it, from its description: an oracle that shares no code with ours."""
    multiplier, word = 0x5BD1E995, 0xFFFFFFFF
    hashed = (0x9747B28C ^ len(data)) & word
    whole = len(data) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * multiplier & word
        hashed = hashed * multiplier & word ^ ((k ^ k >> 24) * multiplier & word)
    rest = data[whole:]
    if rest:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * multiplier & word
    hashed = (hashed ^ hashed >> 13) * multiplier & word
    return hashed ^ hashed >> 15
