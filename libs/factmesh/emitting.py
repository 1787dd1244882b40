"""Turns what a decision publishes into bytes: the envelope completed, encoded, checked against its topic's size.
Pure but for the codec; nothing is sent from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

from factmesh import dlq, ids, topics
from factmesh.effects import Publish
from factmesh.errors import ValidationError
from factmesh.message import H_TRACEPARENT, Emission, Headers, rfc3339, to_ms
from factmesh.values import frozen_value

_ms_of = lru_cache(maxsize=64)(to_ms)  # all that a batch emits carries one instant
_CONSTANT_BYTES_MAX = 1024
"""The headers' names, and those of their values that no field of the record repeats."""

STATUS_DATASCHEMA = "urn:factmesh:schema:factmesh.status/v1"
"""CloudEvents wants an absolute URI here; a URN names the subject and version without promising a server."""


@frozen_value
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
        return self.emit_all((publish,), cause, now, ordinal)[0]

    def emit_all(self, publishes: Iterable[Publish], cause: Cause, now: datetime, first: int = 0) -> list[Emission]:
        """The emissions of a cause, numbered from `first`. Raises ValidationError for one that does not fit."""
        record = cause.record.get
        # What all of them share is put together once.
        shared: dict[str, Any] = {
            "ce_source": f"/factmesh/{self.service}",
            "ce_time": _ms_of(now),
            "traceparent": cause.traceparent,
            "cause_id": cause.cause_id.removeprefix("id:"),
            "correlation_id": str(record("correlation_id") or ""),
            "actor": str(record("actor") or ""),
            "business_object_type": str(record("business_object_type") or ""),
            "business_object_id": str(record("business_object_id") or ""),
            "instance_id": str(record("instance_id") or ""),
            "instance_seq": int(record("instance_seq") or 0),
        }
        trace: Headers = ((H_TRACEPARENT, cause.traceparent.encode()),) if cause.traceparent else ()
        stem = ""
        out = []
        for ordinal, publish in enumerate(publishes, first):
            body = shared.copy()
            if publish.record == "fact":
                del body["instance_id"], body["instance_seq"]
            if publish.id is not None:
                body["ce_id"] = str(publish.id)
            elif ordinal > ids.ORDINAL_MAX:
                raise ids.too_many(ordinal)
            else:
                stem = stem or ids.message_id_stem(self.service, cause.root, cause.opening, cause.instant_ms)
                body["ce_id"] = f"{stem}{ordinal:04x}"
            body["ce_type"] = f"factmesh.{publish.record}"
            body.update(publish.body)
            out.append(self._encoded(publish, body, trace))
        return out

    def _encoded(self, publish: Publish, body: Mapping[str, Any], headers: Headers) -> Emission:
        value = self.encode(publish.record, body)
        if publish.record == "status":
            headers = cloudevent_headers(body) + headers
        topic = topics.full_name(publish.topic, self.namespace)
        key = publish.key.encode()
        # Every header repeats a field of the value, but for a few constants: a light value has light headers.
        if 2 * len(value) + len(key) + _CONSTANT_BYTES_MAX > topics.VALUE_BYTES_MAX:
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


_SPECVERSION = ("ce_specversion", b"1.0")
_DATASCHEMA = ("ce_dataschema", STATUS_DATASCHEMA.encode())
_CONTENT_TYPE = ("content-type", b"application/avro")


def cloudevent_headers(body: Mapping[str, Any]) -> Headers:
    """CloudEvents 1.0, Kafka protocol binding, binary mode: for topics that others read."""
    head: Headers = (
        _SPECVERSION,
        ("ce_id", body["ce_id"].encode()),
        ("ce_source", body["ce_source"].encode()),
        ("ce_type", body["ce_type"].encode()),
        ("ce_time", rfc3339(int(body["ce_time"])).encode()),
    )
    subject = body.get("business_object_id")
    if subject:
        return (*head, ("ce_subject", subject.encode()), _DATASCHEMA, _CONTENT_TYPE)
    return (*head, _DATASCHEMA, _CONTENT_TYPE)


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
