"""Topics made where they are missing, and refused where they cannot be worked with; waiting for a broker that is down.
Nothing is produced or consumed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from factmesh.errors import SettingsError
from factmesh.kafka.common import RECORD_OVERHEAD_BYTES_MAX, WAIT_MAX_S, BrokerError, log
from factmesh.topics import DLQ_BYTES_MAX, DLQ_PREFIX, VALUE_BYTES_MAX

DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic that must be there."""

    name: str
    partitions: int
    retention_days: int = 14
    value_bytes_max: int = VALUE_BYTES_MAX
    retention_days_max: int | None = None
    """How long its receivers remember ids: a topic that keeps messages longer is refused (DESIGN section 8)."""


def dlq_spec(origin: TopicSpec) -> TopicSpec:
    """The DLQ of a topic: at least as many partitions, and a copy of anything on it fits."""
    return TopicSpec(DLQ_PREFIX + origin.name, origin.partitions, origin.retention_days, DLQ_BYTES_MAX)


def _refuse(spec: TopicSpec, config: Mapping[str, Any]) -> None:
    """Raise SettingsError for a topic that would lose messages, or deliver them when nobody remembers their ids."""
    policy = str(config["cleanup.policy"].value)
    if "compact" in policy:
        raise SettingsError(
            f"topic {spec.name} is compacted (cleanup.policy={policy})",
            hint="set cleanup.policy=delete: compaction drops messages that were never handled",
        )
    bytes_max = int(config["max.message.bytes"].value)
    if spec.name.startswith(DLQ_PREFIX):
        if bytes_max < DLQ_BYTES_MAX:
            raise SettingsError(
                f"topic {spec.name} takes messages of {bytes_max} bytes (max.message.bytes)",
                hint=f"raise it to {DLQ_BYTES_MAX + RECORD_OVERHEAD_BYTES_MAX}: a DLQ copy must always fit",
            )
    elif bytes_max > DLQ_BYTES_MAX:
        raise SettingsError(
            f"topic {spec.name} takes messages of {bytes_max} bytes (max.message.bytes), more than its DLQ",
            hint=f"lower it to at most {DLQ_BYTES_MAX}: a DLQ copy must always fit",
        )
    kept_ms = int(config["retention.ms"].value)
    if spec.retention_days_max is not None and not 0 <= kept_ms <= spec.retention_days_max * DAY_MS:
        kept = "for ever" if kept_ms < 0 else f"for {kept_ms / DAY_MS:g} days"
        raise SettingsError(
            f"topic {spec.name} keeps messages {kept} (retention.ms), ids are remembered for {spec.retention_days_max}",
            hint="shorten retention.ms, or raise FACTMESH_DEDUP_HORIZON_DAYS (facts) or FACTMESH_AUDIT_DAYS",
        )


def _admin(bootstrap: str) -> AdminClient:
    config: dict[str, Any] = {"bootstrap.servers": bootstrap, "log_level": 0, "error_cb": lambda _error: None}
    return AdminClient(config)


async def wait_for_broker(bootstrap: str) -> None:
    """Return when the brokers answer; say so once a try while they do not."""
    admin = _admin(bootstrap)
    wait_s, attempt = 0.25, 0
    while True:
        try:
            await asyncio.to_thread(admin.list_topics, timeout=5)
            return
        except KafkaException as error:
            attempt += 1
            log.warning(
                "kafka.waiting",
                message=f"Kafka at {bootstrap} does not answer; trying again in {wait_s:g} s, for as long as it takes",
                error=str(error.args[0]),
                attempt=attempt,
            )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_MAX_S)


async def ensure_topics(bootstrap: str, specs: Sequence[TopicSpec], *, replication: int = -1) -> None:
    """Create what is missing, each with its DLQ given by the caller, and refuse what cannot be worked with.

    Raises SettingsError for a topic that is compacted, outlives the memory of ids, or does not fit its DLQ.
    """
    admin = _admin(bootstrap)

    def work() -> None:
        there = admin.list_topics(timeout=10).topics
        new = [
            NewTopic(
                s.name,
                num_partitions=s.partitions,
                replication_factor=replication,
                config={
                    "cleanup.policy": "delete",
                    "retention.ms": str(min(s.retention_days, s.retention_days_max or s.retention_days) * DAY_MS),
                    "max.message.bytes": str(s.value_bytes_max + RECORD_OVERHEAD_BYTES_MAX),
                },
            )
            for s in specs
            if s.name not in there
        ]
        if new:
            for name, future in admin.create_topics(new, operation_timeout=15).items():
                try:
                    future.result()
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                        raise BrokerError(
                            f"topic {name} cannot be created: {error.args[0].str()}",
                            hint="create it by hand or give the service's principal the right to",
                        ) from error
        wanted = [ConfigResource(ResourceType.TOPIC, s.name) for s in specs]
        by_name = {s.name: s for s in specs}
        for resource, future in admin.describe_configs(wanted, request_timeout=15).items():
            _refuse(by_name[resource.name], future.result())

    wait_s = 0.25
    while True:
        try:
            await asyncio.to_thread(work)
            return
        except KafkaException as error:
            # A topic that was just created may be unknown to the next request for a moment.
            log.warning("kafka.topics_waiting", error=str(error.args[0]))
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_MAX_S)


async def list_topics(bootstrap: str) -> dict[str, int]:
    """Every topic with its number of partitions."""
    metadata = await asyncio.to_thread(_admin(bootstrap).list_topics, timeout=10)
    return {name: len(t.partitions) for name, t in metadata.topics.items()}
