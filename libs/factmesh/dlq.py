"""Quarantine: how a dead message is dressed for `dlq.<topic>`, read back, and restored for a replay (DESIGN section 9).
Pure. Key, value and original headers pass through byte for byte; nothing here publishes, stores or decides to give up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from traceback import extract_tb
from uuid import UUID

from factmesh import ids
from factmesh.errors import DecodeError, ErrorClass, FactmeshError, Reason, class_of, reason_of
from factmesh.message import H_GROUP, H_OPENING, H_ROOT_ID, OPENING_HEADERS, Delivery, Emission, Headers
from factmesh.topics import DLQ_PREFIX, dlq_of

MESSAGE_CHARS_MAX = 2000
"""An error text for people; longer ones are cut so that a DLQ copy always fits its topic."""
STACK_FRAMES_MAX = 20
"""The innermost frames of a bug: file, line and function only, never values."""
NAME_CHARS_MAX = 512
"""Every other header that we write."""
INT_MAX = 2**31 - 1
LONG_MAX = 2**63 - 1

P = "factmesh-dlq-"
KAFKA_PREFIX = "__dlq.errors."
ALIAS_TOPIC = "kafka_dlt-original-topic"
_ALIASES = frozenset({ALIAS_TOPIC})


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that is set aside, and the diagnosis that goes with it.

    Attributes:
        original: the delivery that died, byte for byte.
        root: text of the root that its numbers count under; of a conflict, the root of the id that it fought over.
        opening: the opening under which it died; 0 is the message itself.
        group: the consumer group that gave it up.
        stage: service and handler, e.g. `connector/commands`.
        message: for people; never payload.
        stack: frames of a bug, innermost last, or None.
    """

    original: Delivery
    root: str
    opening: int
    group: str
    reason: Reason
    error_class: ErrorClass
    stage: str
    exception_type: str
    message: str
    first_failed_at: datetime
    failed_at: datetime
    service_version: str
    fingerprint: str
    attempts: int = 1
    step: str | None = None
    instance_id: UUID | None = None
    correlation_id: str | None = None
    trace_id: str | None = None
    command_id: UUID | None = None
    business_object_type: str | None = None
    business_object_id: str | None = None
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class DeadRecord:
    """A record of a DLQ topic, read back: which death it is, and what was said of it."""

    id: UUID
    service: str
    dead: DeadLetter


@dataclass(frozen=True, slots=True)
class Correction:
    """What an operator replaces in an opening. The original is kept beside it, never overwritten."""

    value: bytes | None
    headers: Headers


def dlq_id(service: str, dead: DeadLetter) -> UUID:
    """One id for each death: a redelivery of the same death derives the same one.

    A conflict's numbers count under the root that it fought over, so its coordinates tell it from that root's own.
    """
    coordinates = dead.original.where if dead.reason is Reason.CONFLICT else ""
    death = ids.canonical_json([service, dead.root, dead.opening, coordinates])
    return ids.record_id(death.decode(), dead.group)


_NOISE = re.compile(
    r"""(?x)
    [0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}   # ids
    | \b0x[0-9a-fA-F]+\b
    | \b(?=[0-9a-fA-F]*[0-9])[0-9a-fA-F]{8,}\b             # hashes
    | '[^']*' | "[^"]*" | `[^`]*`                          # quoted values
    | [-+]?\d[\d.,:TZ+-]*                                  # numbers, instants
    """
)


def fingerprint_of(exception_type: str, message: str, reason: Reason, stage: str, step: str | None) -> str:
    """16 hex digits that are equal for failures of one cause: ids, numbers and quoted values do not count."""
    normal = " ".join(_NOISE.sub("#", message).split())
    return ids.fingerprint(stage, step or "", str(reason), exception_type, normal)


def describe(error: BaseException) -> tuple[str, str, str | None]:
    """(exception type, text for people, stack) of any exception.

    The text of an error of ours is written for people; that of a bug may quote the payload, so only its type and the
    places it passed are told.
    """
    name = type(error).__qualname__
    if isinstance(error, FactmeshError):
        return name, clean(str(error), MESSAGE_CHARS_MAX), None
    frames = extract_tb(error.__traceback__)[-STACK_FRAMES_MAX:]
    lines = [f"{_short(f.filename)}:{f.lineno} {f.name}" for f in frames]
    at = f" at {lines[-1]}" if lines else ""
    return name, clean(f"a bug: {name}{at}", MESSAGE_CHARS_MAX), "\n".join(lines) or None


def _short(filename: str) -> str:
    return "/".join(PurePath(filename).parts[-3:])


def dead_letter(
    original: Delivery,
    error: BaseException,
    *,
    root: str,
    opening: int,
    group: str,
    stage: str,
    first_failed_at: datetime,
    failed_at: datetime,
    service_version: str,
    attempts: int = 1,
    step: str | None = None,
    record: Mapping[str, object] | None = None,
) -> DeadLetter:
    """The dead letter of an exception. `record` is the decoded message, where it could be decoded."""
    exception_type, message, stack = describe(error)
    reason = reason_of(error)
    about = record or {}
    text = {k: str(v) for k, v in about.items() if isinstance(v, str | UUID) and v}
    step = step or text.get("step")
    return DeadLetter(
        original=original,
        root=root,
        opening=opening,
        group=group,
        reason=reason,
        error_class=class_of(error),
        stage=stage,
        step=step,
        exception_type=exception_type,
        message=message,
        attempts=attempts,
        first_failed_at=first_failed_at,
        failed_at=failed_at,
        service_version=service_version,
        fingerprint=fingerprint_of(exception_type, getattr(error, "message", message), reason, stage, step),
        instance_id=_uuid(text.get("instance_id")),
        correlation_id=text.get("correlation_id"),
        trace_id=trace_id_of(text.get("traceparent") or original.header("traceparent")),
        command_id=_uuid(text.get("command_id")),
        business_object_type=text.get("business_object_type"),
        business_object_id=text.get("business_object_id"),
        stack=stack,
    )


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id of a W3C `traceparent`, or None."""
    parts = (traceparent or "").split("-")
    return parts[1] if len(parts) >= 4 and re.fullmatch(r"[0-9a-f]{32}", parts[1]) else None


def clean(text: str, chars_max: int = NAME_CHARS_MAX) -> str:
    """Text that a header, a terminal and PostgreSQL all take: no control characters, at most `chars_max` long."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return plain if len(plain) <= chars_max else plain[: chars_max - 1] + "…"


def is_added(name: str) -> bool:
    """Whether a header of that name is diagnosis, which a repeated failure replaces: they never grow."""
    return name.startswith((P, KAFKA_PREFIX)) or name in _ALIASES


def original_headers(headers: Headers) -> Headers:
    """What the message had before it died or was replayed, in order, byte for byte."""
    return tuple((k, v) for k, v in headers if not is_added(k) and k not in OPENING_HEADERS)


def record(dead: DeadLetter, service: str) -> Emission:
    """The record for `dlq.<topic>`: the original byte for byte, and the headers of DESIGN section 9."""
    o = dead.original
    fields: list[tuple[str, object]] = [
        (f"{KAFKA_PREFIX}topic", o.topic),
        (f"{KAFKA_PREFIX}partition", o.partition),
        (f"{KAFKA_PREFIX}offset", o.offset),
        (f"{KAFKA_PREFIX}group", dead.group),
        (f"{KAFKA_PREFIX}delivery.count", dead.attempts),
        (f"{KAFKA_PREFIX}message", clean(dead.message, MESSAGE_CHARS_MAX)),
        (ALIAS_TOPIC, o.topic),
        (f"{P}id", dlq_id(service, dead)),
        (f"{P}root-id", dead.root),
        (f"{P}opening", dead.opening),
        (f"{P}replay-count", dead.opening),
        (f"{P}reason", dead.reason),
        (f"{P}error-class", dead.error_class),
        (f"{P}service", clean(service)),
        (f"{P}service-version", clean(dead.service_version)),
        (f"{P}stage", clean(dead.stage)),
        (f"{P}step", _optional(dead.step)),
        (f"{P}exception-type", clean(dead.exception_type)),
        (f"{P}fingerprint", dead.fingerprint),
        (f"{P}first-failed-at", _instant(dead.first_failed_at)),
        (f"{P}failed-at", _instant(dead.failed_at)),
        (f"{P}attempts", dead.attempts),
        (f"{P}original-timestamp-ms", o.timestamp_ms),
        (f"{P}instance-id", dead.instance_id),
        (f"{P}correlation-id", _optional(dead.correlation_id)),
        (f"{P}trace-id", _optional(dead.trace_id)),
        (f"{P}command-id", dead.command_id),
        (f"{P}business-object-type", _optional(dead.business_object_type)),
        (f"{P}business-object-id", _optional(dead.business_object_id)),
        (f"{P}stack", dead.stack and clean(dead.stack, MESSAGE_CHARS_MAX)),
    ]
    added = tuple((name, str(value).encode()) for name, value in fields if value is not None)
    return Emission(dlq_of(o.topic), o.key, o.value, original_headers(o.headers) + added)


def _optional(text: str | None) -> str | None:
    return clean(text) if text else None


def _instant(at: datetime) -> str:
    """RFC 3339, UTC, microseconds: reads back as the same instant."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


class _Fields:
    """The diagnosis headers of one DLQ record; whatever is missing or torn is a DecodeError that names it."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery

    def optional(self, name: str) -> str | None:
        value = self.delivery.header(name)
        return None if value is None else clean(value, MESSAGE_CHARS_MAX)

    def text(self, name: str) -> str:
        return clean(self.exact(name), MESSAGE_CHARS_MAX)

    def exact(self, name: str) -> str:
        value = self.delivery.header(name)
        if value is None:
            raise DecodeError(
                f"no header {name}",
                where=self.delivery.where,
                hint="not a record that Factmesh quarantined: something else writes to this DLQ topic",
            )
        return value

    def number(self, name: str, most: int = INT_MAX) -> int:
        value = self.text(name)
        if not re.fullmatch(r"-?[0-9]{1,19}", value) or not -1 <= int(value) <= most:
            raise self._torn(name, value)
        return int(value)

    def instant(self, name: str) -> datetime:
        value = self.text(name)
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            raise self._torn(name, value) from None
        if at.tzinfo is None:
            raise self._torn(name, value)
        return at.astimezone(UTC)

    def uuid(self, name: str) -> UUID:
        value = self.text(name)
        found = _uuid(value)
        if found is None:
            raise self._torn(name, value)
        return found

    def _torn(self, name: str, value: str) -> DecodeError:
        return DecodeError(
            f"header {name} says {clean(value, 80)!r}", where=self.delivery.where, hint="the record was altered"
        )


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


def parse(delivery: Delivery) -> DeadRecord:
    """A record of a DLQ topic, read back. Raises DecodeError, naming what is missing, for one that is not ours."""
    f = _Fields(delivery)
    topic = f.text(f"{KAFKA_PREFIX}topic")
    if delivery.topic.startswith(DLQ_PREFIX) and delivery.topic != dlq_of(topic):
        raise DecodeError(f"says it died on {clean(topic, 80)!r}", where=delivery.where, hint="it lies on a wrong DLQ")
    try:
        reason, error_class = Reason(f.text(f"{P}reason")), ErrorClass(f.text(f"{P}error-class"))
    except ValueError as error:
        raise DecodeError(clean(str(error), 120), where=delivery.where, hint="a newer version wrote it") from None
    dead = DeadLetter(
        original=Delivery(
            topic,
            f.number(f"{KAFKA_PREFIX}partition"),
            f.number(f"{KAFKA_PREFIX}offset", LONG_MAX),
            delivery.key,
            delivery.value,
            original_headers(delivery.headers),
            f.number(f"{P}original-timestamp-ms", LONG_MAX),
        ),
        root=f.exact(f"{P}root-id"),
        opening=f.number(f"{P}opening"),
        group=f.text(f"{KAFKA_PREFIX}group"),
        reason=reason,
        error_class=error_class,
        stage=f.text(f"{P}stage"),
        step=f.optional(f"{P}step"),
        exception_type=f.text(f"{P}exception-type"),
        message=f.text(f"{KAFKA_PREFIX}message"),
        attempts=f.number(f"{P}attempts"),
        first_failed_at=f.instant(f"{P}first-failed-at"),
        failed_at=f.instant(f"{P}failed-at"),
        service_version=f.text(f"{P}service-version"),
        fingerprint=f.text(f"{P}fingerprint"),
        instance_id=_uuid(f.optional(f"{P}instance-id")),
        correlation_id=f.optional(f"{P}correlation-id"),
        trace_id=f.optional(f"{P}trace-id"),
        command_id=_uuid(f.optional(f"{P}command-id")),
        business_object_type=f.optional(f"{P}business-object-type"),
        business_object_id=f.optional(f"{P}business-object-id"),
        stack=f.optional(f"{P}stack"),
    )
    return DeadRecord(f.uuid(f"{P}id"), f.text(f"{P}service"), dead)


def restore(dead: DeadLetter, opening: int, correction: Correction | None = None) -> Emission:
    """Opening number `opening` of a dead message: key, value and headers exactly, and the three opening headers."""
    original = dead.original
    value = original.value if correction is None else correction.value
    headers = original_headers(original.headers if correction is None else correction.headers)
    added: Headers = (
        (H_ROOT_ID, dead.root.encode()),
        (H_OPENING, str(opening).encode()),
        (H_GROUP, dead.group.encode()),
    )
    return Emission(original.topic, original.key, value, headers + added)
