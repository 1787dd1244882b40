"""Turns what a decision publishes into bytes: the envelope completed, encoded, checked against its topic's size.
Pure but for the codec; nothing is sent from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh import dlq, ids, topics
from factmesh.effects import Publish
from factmesh.errors import ValidationError
from factmesh.message import Emission, Headers, rfc3339, to_ms

_INHERITED = ("correlation_id", "actor", "business_object_type", "business_object_id")
_OF_INSTANCE = ("instance_id", "instance_seq")

STATUS_DATASCHEMA = "urn:factmesh:schema:factmesh.status/v1"
"""CloudEvents wants an absolute URI here; a URN names the subject and version without promising a server."""


@dataclass(frozen=True, slots=True)
class Cause:
    """What an emission goes back to: the root and opening that its id derives from, and the record it inherits from."""

    root: str
    opening: int
    instant_ms: int
    cause_id: str
    record: Mapping[str, Any]
    traceparent: str | None


@dataclass(frozen=True)
class Emitter:
    """Encodes for one service. `encode(record name, body) -> bytes` is the codec of our own records."""

    service: str
    namespace: str
    encode: Callable[[str, Mapping[str, Any]], bytes]

    def emit(self, publish: Publish, cause: Cause, ordinal: int, now: datetime) -> Emission:
        """The `ordinal`-th emission of a cause. Raises ValidationError for one that does not fit its topic."""
        id_ = publish.id or ids.message_id(self.service, cause.root, cause.opening, ordinal, cause.instant_ms)
        body: dict[str, Any] = {
            "ce_id": str(id_),
            "ce_source": f"/factmesh/{self.service}",
            "ce_type": f"factmesh.{publish.record}",
            "ce_time": to_ms(now),
            "traceparent": cause.traceparent,
            "cause_id": cause.cause_id.removeprefix("id:"),
        }
        for name in _INHERITED:
            body[name] = str(cause.record.get(name) or "")
        if publish.record != "fact":
            body["instance_id"] = str(cause.record.get("instance_id") or "")
            body["instance_seq"] = int(cause.record.get("instance_seq") or 0)
        body.update(publish.body)
        topic = topics.full_name(publish.topic, self.namespace)
        value = self.encode(publish.record, body)
        headers: Headers = (("traceparent", cause.traceparent.encode()),) if cause.traceparent else ()
        if publish.record == "status":
            headers = cloudevent_headers(body) + headers
        key = publish.key.encode()
        weight = len(value) + len(key) + sum(len(n) + len(v or b"") for n, v in headers)
        if weight > topics.VALUE_BYTES_MAX:
            raise ValidationError(
                f"the {publish.record} that this would emit weighs {weight} bytes",
                where=topic,
                hint=f"at most {topics.VALUE_BYTES_MAX} fit: keep large content elsewhere and pass a reference",
            )
        return Emission(topic, key, value, headers)

    def dead(self, letter: dlq.DeadLetter) -> Emission:
        """The record for `dlq.<topic>`."""
        return dlq.record(letter, self.service)


def cloudevent_headers(body: Mapping[str, Any]) -> Headers:
    """CloudEvents 1.0, Kafka protocol binding, binary mode: for topics that others read."""
    time = rfc3339(int(body["ce_time"]))
    pairs = (
        ("ce_specversion", "1.0"),
        ("ce_id", body["ce_id"]),
        ("ce_source", body["ce_source"]),
        ("ce_type", body["ce_type"]),
        ("ce_time", time),
        ("ce_subject", body.get("business_object_id") or ""),
        ("ce_dataschema", STATUS_DATASCHEMA),
        ("content-type", "application/avro"),
    )
    return tuple((k, v.encode()) for k, v in pairs if v)


def signal(kind: str, instance: UUID, fields: Mapping[str, Any]) -> Publish:
    """A signal to an instance; only the orchestrator knows more of it than its id."""
    return Publish(
        "signal",
        "signal",
        str(instance),
        {"signal": kind, "instance_id": str(instance), "body": ids.canonical_json(dict(fields))},
    )


def parked(letter: dlq.DeadLetter, record_id: UUID, instance: UUID) -> Publish:
    """A message of this instance lies in quarantine (H1)."""
    return signal(
        "message_parked",
        instance,
        {
            "record_id": str(record_id),
            "opening": letter.opening,
            "reason": str(letter.reason),
            "step": letter.step,
            "command_id": str(letter.command_id) if letter.command_id else None,
            "fingerprint": letter.fingerprint,
            "topic": letter.original.topic,
        },
    )


def released(record_id: UUID, opening: int, instance: UUID) -> Publish:
    """A quarantined message of this instance was handled after all."""
    return signal("message_released", instance, {"record_id": str(record_id), "opening": opening})
