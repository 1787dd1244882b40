"""The Kafka gateway: an idempotent producer that never drops, a consumer on one owned thread, topics made and checked.
The only importer of confluent_kafka; nothing is decoded or decided here.
"""

from factmesh.kafka.admin import TopicSpec, dlq_spec, ensure_topics, list_topics, wait_for_broker
from factmesh.kafka.common import RECORD_OVERHEAD_BYTES_MAX, BrokerError, Coordinates
from factmesh.kafka.consumer import Subscription
from factmesh.kafka.inspection import backlog, end_offsets, read_all
from factmesh.kafka.producer import Publisher

__all__ = [
    "RECORD_OVERHEAD_BYTES_MAX",
    "BrokerError",
    "Coordinates",
    "Publisher",
    "Subscription",
    "TopicSpec",
    "backlog",
    "dlq_spec",
    "end_offsets",
    "ensure_topics",
    "list_topics",
    "read_all",
    "wait_for_broker",
]
