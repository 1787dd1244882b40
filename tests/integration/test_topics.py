"""Topics before a service works with them: made where missing, refused where they would lose messages (DESIGN 8, 9)."""

from __future__ import annotations

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from factmesh import kafka
from factmesh.errors import SettingsError
from factmesh.kafka import TopicSpec, dlq_spec, ensure_topics
from factmesh.stack import Stack

pytestmark = pytest.mark.stack
DAY_MS = 86_400_000


def make(stack: Stack, name: str, **config: str) -> None:
    settings = {k.replace("_", "."): v for k, v in config.items()}
    new = NewTopic(name, num_partitions=1, replication_factor=1, config=settings)
    admin = AdminClient({"bootstrap.servers": stack.bootstrap})
    for future in admin.create_topics([new]).values():
        future.result()


async def test_what_is_missing_is_made_with_its_dlq(stack: Stack, namespace: str) -> None:
    """E1: every topic that is consumed has a DLQ with at least as many partitions; asking again changes nothing."""
    spec = TopicSpec(f"{namespace}.a", 3, 30, retention_days_max=7)
    for _ in range(2):
        await ensure_topics(stack.bootstrap, [spec, dlq_spec(spec)])
    there = await kafka.list_topics(stack.bootstrap)
    assert (there[f"{namespace}.a"], there[f"dlq.{namespace}.a"]) == (3, 3)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"cleanup_policy": "compact"}, "is compacted"),
        ({"cleanup_policy": "compact,delete"}, "is compacted"),
        ({"retention_ms": str(15 * DAY_MS)}, "for 15 days"),
        ({"retention_ms": "-1"}, "for ever"),
        ({"max_message_bytes": "5000000"}, "more than its DLQ"),
    ],
)
async def test_a_topic_that_would_lose_or_outlive_is_refused(
    stack: Stack, namespace: str, config: dict[str, str], says: str
) -> None:
    """DESIGN 2, 8, 9: a compacted topic, one that outlives the memory of ids, one whose copies do not fit a DLQ."""
    make(stack, f"{namespace}.a", **config)
    with pytest.raises(SettingsError, match=says) as refused:
        await ensure_topics(stack.bootstrap, [TopicSpec(f"{namespace}.a", 1, 14, retention_days_max=14)])
    assert refused.value.hint


async def test_a_dlq_that_is_too_small_is_refused(stack: Stack, namespace: str) -> None:
    """DESIGN 9: the DLQ copy always fits."""
    make(stack, f"dlq.{namespace}.a", max_message_bytes="1000000")
    with pytest.raises(SettingsError, match="1000000 bytes"):
        await ensure_topics(stack.bootstrap, [dlq_spec(TopicSpec(f"{namespace}.a", 1))])
