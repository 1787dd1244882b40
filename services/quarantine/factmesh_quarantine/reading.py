"""A record of a DLQ topic as a death to file: its diagnosis headers, and what its bytes say where they can be decoded.
Never refuses: what something else wrote to a DLQ becomes a record of its own, about the DLQ topic itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from uuid import UUID

from factmesh import dlq, ids
from factmesh.errors import DecodeError, FactmeshError
from factmesh.ids import Root
from factmesh.message import Delivery, Message, from_ms
from factmesh.records import Records
from factmesh.topics import DLQ_PREFIX, topic_of
from factmesh_quarantine.model import Death

KIND = "death"


def dlq_topics(existing: Mapping[str, int], namespace: str) -> tuple[str, ...]:
    """The DLQ topics of this mesh among those that exist."""
    return tuple(
        sorted(
            name
            for name in existing
            if name.startswith(DLQ_PREFIX) and topic_of(name.removeprefix(DLQ_PREFIX), namespace) is not None
        )
    )


class Reader:
    """Reads DLQ records for one consumer group: the group that a foreign record is filed under."""

    def __init__(self, records: Records, group: str, service: str, version: str) -> None:
        self._records = records
        self._group = group
        self._service = service
        self._version = version

    def death(self, delivery: Delivery) -> Death:
        try:
            found = dlq.parse(delivery)
        except DecodeError as error:
            found = self._foreign(delivery, error)
        dead = found.dead
        thread, number = ids.record_id(dead.root, dead.group), dead.opening
        kind, workflow, resolution = None, None, False
        inner = self._inner(dead.original)
        if inner is not None:
            kind, workflow = inner.kind, inner.record.get("workflow")
            named = inner.record.get("record_id") if inner.kind == "resolution" else None
            if named:
                # A person's word on a command was refused: that command's record is open again.
                thread, number, resolution = UUID(named), int(inner.record["opening"]), True
        return Death(found.id, delivery, found.service, dead, thread, number, kind, workflow, resolution)

    def _inner(self, original: Delivery) -> Message | None:
        if self._records.needs_schema(original) is not None:
            return None
        try:
            return self._records.decode(original)
        except FactmeshError:
            # Most of what lies here cannot be decoded: that is why it does.
            return None

    def _foreign(self, delivery: Delivery, error: DecodeError) -> dlq.DeadRecord:
        at = from_ms(max(0, delivery.timestamp_ms)).astimezone(UTC)
        dead = dlq.dead_letter(
            delivery,
            error,
            root=Root.coordinates(delivery.topic, delivery.partition, delivery.offset).text,
            opening=0,
            group=self._group,
            stage=f"{self._service}/index",
            first_failed_at=at,
            failed_at=at,
            service_version=self._version,
        )
        return dlq.DeadRecord(dlq.dlq_id(self._service, dead), self._service, dead)


def as_message(death: Death) -> Message:
    """A death as the batch loop handles it: its root id is its `factmesh-dlq-id`, and a repeat is always a repeat."""
    root = Root(f"dlq:{death.id}")
    return Message(
        delivery=death.at,
        kind=KIND,
        root=root,
        id=None,
        opening=0,
        record={"death": death},
        hash=ids.body_hash(root.text),
        instant_ms=0,
    )


def death_of(message: Message) -> Death:
    """The inverse of `as_message`."""
    death = message.record["death"]
    assert isinstance(death, Death)
    return death
