"""Each topic, its key, DLQ, producer and consumers, in one table; names with the namespace come from here alone.
No client lives here: `kafka` creates and checks what this table says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from factmesh.errors import SettingsError

VALUE_BYTES_MAX = 1_000_000
"""What one message may weigh on any topic but a DLQ: Kafka's default of 1 MiB less room for headers and framing."""
DLQ_BYTES_MAX = 4_194_304
"""A DLQ copy always fits: the origin's maximum, diagnosis headers, and room to spare (DESIGN section 9)."""
DATA_BYTES_MAX = 262_144
"""What the `data` of one fact may weigh: it is carried again inside the canonical fact and a command's input."""
PARTITIONS = 4
"""Few: twelve doubled the latency of the embedded broker on two cores (DESIGN section 13)."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One row of the table. `name` may end in `<connector>`: then it is a family with one topic a connector."""

    short: str
    name: str
    key: str
    carries: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    partitions: int = PARTITIONS
    retention_days: int = 14

    def of(self, namespace: str = "", connector: str = "") -> str:
        """The full name, e.g. `factmesh.command.billing.v1`. Raises SettingsError for a family without a member."""
        if "<connector>" in self.name and not connector:
            raise SettingsError(f"topic {self.name} is a family", hint="name the connector")
        return namespace + self.name.replace("<connector>", connector)

    @property
    def key_is_instance(self) -> bool:
        """Whether the key alone tells the instance, even of bytes that cannot be decoded."""
        return self.key == "instance id"


FACTS_RAW = Topic("facts.raw", "facts.raw", "upstream's choice", ("cloudevent",), ("upstream", "intake"), ("intake",))
FACT = Topic("fact", "factmesh.fact.v1", "business object id", ("fact",), ("intake",), ("orchestrator",))
COMMAND = Topic(
    "command",
    "factmesh.command.<connector>.v1",
    "instance id",
    ("command", "resolution"),
    ("orchestrator", "quarantine"),
    ("connector",),
)
COMMAND_NOTIFIER = Topic(
    "command.notifier",
    "factmesh.command.notifier.v1",
    "instance id",
    ("command", "resolution"),
    ("orchestrator", "quarantine"),
    ("notifier",),
)
RESULT = Topic("result", "factmesh.result.v1", "instance id", ("result",), ("connector",), ("orchestrator",))
SIGNAL = Topic(
    "signal",
    "factmesh.signal.v1",
    "instance id",
    ("signal",),
    ("intake", "orchestrator", "connector", "notifier", "quarantine", "console", "tool"),
    ("orchestrator",),
)
STATUS = Topic("status", "factmesh.status.v1", "instance id", ("status",), ("orchestrator",), ("notifier", "intake"))

TOPICS: tuple[Topic, ...] = (FACTS_RAW, FACT, COMMAND, COMMAND_NOTIFIER, RESULT, SIGNAL, STATUS)
BY_SHORT = {t.short: t for t in TOPICS}
DLQ_PREFIX = "dlq."


@lru_cache(maxsize=256)  # each emission names its topic
def full_name(short: str, namespace: str = "") -> str:
    """The full name of a short one: `fact`, `result`, …, `command.<connector>`. Raises SettingsError if unknown."""
    topic = BY_SHORT.get(short)
    if topic is not None:
        return topic.of(namespace)
    family, _, connector = short.partition(".")
    if family == COMMAND.short and connector:
        return COMMAND.of(namespace, connector)
    raise SettingsError(f"no topic is called {short!r}", hint=f"one of {', '.join(BY_SHORT)}, command.<connector>")


def dlq_of(name: str) -> str:
    """The DLQ of a full topic name. The namespace stays in front of the whole: `dlq.` + name."""
    return DLQ_PREFIX + name


def topic_of(name: str, namespace: str = "") -> Topic | None:
    """The table's row for a full topic name, or None."""
    bare = name.removeprefix(namespace)
    for topic in TOPICS:
        if topic.name == bare:
            return topic
    head, _, tail = COMMAND.name.partition("<connector>")
    if bare.startswith(head) and bare.endswith(tail):
        return COMMAND
    return None


def connector_of(name: str, namespace: str = "") -> str:
    """The member of the command family that a full topic name belongs to, or ""."""
    head, _, tail = COMMAND.name.partition("<connector>")
    bare = name.removeprefix(namespace)
    return bare[len(head) : -len(tail)] if bare.startswith(head) and bare.endswith(tail) else ""


def names(shorts: Sequence[str], namespace: str = "") -> tuple[str, ...]:
    """Full names of several short ones."""
    return tuple(full_name(s, namespace) for s in shorts)
