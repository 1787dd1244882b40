"""The messages that carry a person's act: a retry, a resolution, a discard, in the platform's own records.
Ids derive from the record and the number, instants are those of the act: the same act has the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh import ids
from factmesh.avro import encode
from factmesh.errors import ValidationError
from factmesh.message import Emission, to_ms
from factmesh.registry import Registry
from factmesh.topics import SIGNAL

SOURCE = "/factmesh/quarantine"
VERDICTS = ("happened", "not_happened", "discarded")


@dataclass(frozen=True, slots=True)
class Person:
    """Who acts, when and why; `operation` is the bulk act that this is part of."""

    by: str
    reason: str
    at: datetime
    operation: UUID | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person says of a command; `output` is what it would have answered, compact JSON, with `happened` only."""

    verdict: str
    output: bytes | None


@dataclass(frozen=True, slots=True)
class About:
    """What the messages of one record's acts have in common. `record_id` is the thread: as the instance knows it.

    `traceparent` is that of the message that died: an act goes on in its tree, below the hop that had sent it.
    """

    record_id: UUID
    root: str
    group: str
    instance_id: UUID
    correlation_id: str | None
    business_object_type: str | None
    business_object_id: str | None
    traceparent: str | None = None


def _envelope(about: About, type_: str, number: int, person: Person) -> dict[str, Any]:
    return {
        "ce_id": str(ids.entrance_id(type_, f"{about.record_id}:{number}", to_ms(person.at))),
        "ce_source": SOURCE,
        "ce_type": type_,
        "ce_time": to_ms(person.at),
        "traceparent": about.traceparent,
        "cause_id": about.root.removeprefix("id:"),
        "correlation_id": about.correlation_id or "",
        "actor": f"person:{person.by}",
        "business_object_type": about.business_object_type or "",
        "business_object_id": about.business_object_id or "",
        "instance_id": str(about.instance_id),
        "instance_seq": 0,
    }


async def signal(
    registry: Registry, namespace: str, about: About, name: str, number: int, body: Mapping[str, Any], person: Person
) -> Emission:
    """One signal to the record's instance."""
    schema = await registry.by_version("factmesh.signal", 1)
    record = _envelope(about, f"factmesh.signal.{name}", number, person)
    record |= {"signal": name, "body": ids.canonical_json(body)}
    return Emission(SIGNAL.of(namespace), str(about.instance_id).encode(), encode(schema, record))


async def retry_step(
    registry: Registry, namespace: str, about: About, command: UUID, number: int, person: Person
) -> Emission:
    """`retry-step(command id, opening)`: the orchestrator makes a new run of the step, under a new key."""
    body = {
        "command_id": str(command),
        "record_id": str(about.record_id),
        "root_id": about.root,
        "group": about.group,
        "opening": number,
        "reason": person.reason,
    }
    return await signal(registry, namespace, about, "retry_step", number, body, person)


async def message_discarded(registry: Registry, namespace: str, about: About, number: int, person: Person) -> Emission:
    """The instance will not get this message any more."""
    body = {"record_id": str(about.record_id), "opening": number, "reason": person.reason}
    return await signal(registry, namespace, about, "message_discarded", number, body, person)


async def resolution(
    registry: Registry, topic: str, about: About, command: UUID, number: int, said: Verdict, person: Person
) -> Emission:
    """A person's word on a command, on the command's own topic: one write path, here too."""
    if said.verdict not in VERDICTS:
        raise ValidationError(f"no verdict is called {said.verdict!r}", hint=f"one of {', '.join(VERDICTS)}")
    schema = await registry.by_version("factmesh.resolution", 1)
    record = _envelope(about, "factmesh.resolution", number, person)
    record |= {
        "command_id": str(command),
        "verdict": said.verdict,
        "output": said.output if said.verdict == "happened" else None,
        "reason": person.reason,
        "entered_at": to_ms(person.at),
        "record_id": str(about.record_id),
        "opening": number,
    }
    return Emission(topic, str(about.instance_id).encode(), encode(schema, record))
