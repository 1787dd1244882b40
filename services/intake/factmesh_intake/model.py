"""What intake knows of a fact on its way in: as it was read, as the mesh carries it, and what may be wrong with it.
Frozen values and errors only; nothing here reads, maps or decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from factmesh.errors import SchemaError, ValidationError
from factmesh.values import frozen_value

FUTURE_TOLERANCE = timedelta(minutes=5)
"""How far a sender's clock may be ahead: more is a wrong zone or unit, which would make every SLA clock a lie."""
TEXT_CHARS_MAX = 512
"""Canonical identifiers (business object, actor, status) travel in every message, as keys and in indexes."""


class FieldError(ValidationError):
    """One attribute or field is not acceptable. It stands first in the message, so that causes group by it."""

    def __init__(self, field: str, message: str, *, hint: str = "", where: str = "") -> None:
        super().__init__(f"{field}: {message}", hint=hint, where=where)
        self.field = field


class UnmappedError(FieldError):
    """A value that the adapter's translation table does not hold: never a silent default (REQUIREMENTS A3)."""


class NaiveTimeError(FieldError):
    """A timestamp without offset or declared zone: nobody can say which instant it is."""


class FutureError(FieldError):
    """`occurred_at` lies further ahead than clocks differ."""


class UnsupportedMediaError(FieldError):
    """Neither JSON nor Avro."""


class UnknownTypeError(FieldError):
    """No adapter takes facts of that type from anyone."""


class SourceRefusedError(FieldError):
    """Facts of that type are taken, but not from that source."""


class VersionError(SchemaError):
    """A schema version that is not known, not named, or not accepted from that source."""


class TooLargeError(ValidationError):
    """More bytes than one fact may have."""


class TooSlowError(ValidationError):
    """A request whose body does not come."""


@frozen_value
class Incoming:
    """A fact as it was read with its writer's schema; what it means is still the vendor's.

    Attributes:
        subject, version: of the registered schema that the data is written in; None and 0 for a vendor's own shape.
        data: JSON-plain fields.
    """

    id: str
    source: str
    type: str
    data: Any
    bytes_size: int
    subject: str | None = None
    version: int = 0
    event_subject: str | None = None
    dataschema: str | None = None

    @property
    def where(self) -> str:
        return f"fact {self.id} of {self.source}"


@frozen_value
class Canonical:
    """A fact as the mesh carries it: one vocabulary for all vendors, `data` in the newest schema as compact JSON."""

    business_object_type: str
    business_object_id: str
    actor: str
    status: str | None
    due_by: int | None
    occurred_at: int
    schema_version: int
    data: bytes


class MapsFacts(Protocol):
    """From the vendor's shape to the canonical one: adapter, upcast, validation, each with its error."""

    def map(self, incoming: Incoming) -> Canonical: ...


@dataclass(frozen=True, slots=True)
class Desk:
    """What a decision needs besides the fact: constant while the process lives, part of what `load` returns."""

    mapper: MapsFacts
    horizon: timedelta


@frozen_value
class Progress:
    """What is said of one fact to the one who sent it: a row of `progress`."""

    correlation_id: str
    source: str
    source_id: str
    type: str
    stage: str
    business_object_type: str | None = None
    business_object_id: str | None = None
    due_by: datetime | None = None
    reason: str | None = None


@frozen_value
class Seen:
    """What a status message says of one instance: a row of `progress_instances`, unless a later one is there."""

    correlation_id: str
    instance_id: str
    instance_seq: int
    workflow: str
    status: str
    step: str | None
    next_step: str | None
    outcome: str | None
    reason: str | None
    due_by: datetime | None


#: Instance states after which nothing more comes (DESIGN section 10).
ENDED: frozenset[str] = frozenset({"completed", "rejected", "failed", "compensated", "cancelled"})

#: Stage of a fact -> what comes next, for the person who asks.
STAGES: Mapping[str, str] = {
    "accepted": "a workflow starts for it, if one awaits facts of this type",
    "quarantined": "an operator corrects and replays it, or discards it",
    "workflow": "the workflow goes on with the next step",
    "waiting": "a person acts: the workflow waits or rests",
    "ended": "nothing: the workflow has ended",
}


def stage_of(status: str) -> str:
    """The stage of a fact whose instance is in this state."""
    if status in ENDED:
        return "ended"
    return "waiting" if status in {"parked", "needs_resolution"} else "workflow"
