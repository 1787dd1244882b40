"""What the parts of the Kafka gateway share: bounds, the error, and a record as the broker gave it.
No client is opened here.
"""

from __future__ import annotations

from typing import Any

import structlog

from factmesh.errors import FactmeshError
from factmesh.message import Delivery

log = structlog.get_logger("factmesh.kafka")

WAIT_MAX_S = 5.0
RECORD_OVERHEAD_BYTES_MAX = 65_536
Coordinates = tuple[str, int]
"""(topic, partition)."""


class BrokerError(FactmeshError):
    """The broker refuses in a way that waiting does not cure."""


def delivery_of(message: Any) -> Delivery:
    return Delivery(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        tuple(message.headers() or ()),
        message.timestamp()[1],
    )
