"""The notifier's values, frozen: what a channel declares, what a send's row carries, what is known of its attempts.
No I/O and no decision lives here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from factmesh import ids
from factmesh.errors import DecodeError, ErrorClass
from factmesh.retry import RetryPolicy

KIND_PREFIX = "send."
RECIPIENTS_MAX = 50
"""More is a mailing, not a notification: it belongs to a system that is made for it."""


class ChannelKind(StrEnum):
    """How a channel carries a notification."""

    SMTP = "smtp"
    WEBHOOK = "webhook"
    LOG = "log"


#: Whether the receiver can tell a repeat: a webhook's by its id, a log line by its. Mail servers look at nothing.
REPEATABLE: dict[ChannelKind, bool] = {ChannelKind.SMTP: False, ChannelKind.WEBHOOK: True, ChannelKind.LOG: True}
#: How many timeouts one attempt may take: SMTP has one until the content, and one for the answer to it.
TIMEOUTS: dict[ChannelKind, int] = {ChannelKind.SMTP: 2, ChannelKind.WEBHOOK: 1, ChannelKind.LOG: 1}


@dataclass(frozen=True, slots=True)
class Channel:
    """What decides about a channel's attempts, whoever carries them out."""

    name: str
    kind: ChannelKind
    timeout_s: float = 10.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    #: How long after we let go of an attempt it may still be carried out.
    in_flight_max_s: float = 60.0
    #: How long a receiver remembers the id of a delivery; used where a repeat is safe only.
    key_valid_s: float = 86_400.0

    @property
    def repeatable(self) -> bool:
        return REPEATABLE[self.kind]

    @property
    def longest_s(self) -> float:
        """What one attempt may take at most."""
        return TIMEOUTS[self.kind] * self.timeout_s

    @property
    def claim_kind(self) -> str:
        """Rows of each channel are a kind of their own, so that a sick one holds up only itself (INV-P)."""
        return KIND_PREFIX + self.name


@dataclass(frozen=True, slots=True)
class Rule:
    """Who is told when an instance of a workflow comes into a state (REQUIREMENTS D3)."""

    name: str
    workflow: str
    statuses: frozenset[str]
    channel: str
    to: tuple[str, ...] = field(repr=False)
    template: str | None = None


class Text(Protocol):
    """A rendered message."""

    @property
    def subject(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def html(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the decisions are made over: channels, owner rules, and the templates as a function."""

    channels: Mapping[str, Channel]
    render: Callable[[str, Mapping[str, Any]], Text]
    rules: tuple[Rule, ...] = ()

    def rules_for(self, workflow: str) -> tuple[Rule, ...]:
        return tuple(r for r in self.rules if r.workflow in ("*", workflow))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Task(_Frozen):
    """A notification as its row carries it: rendered, so that every attempt sends the same."""

    id: UUID
    channel: str
    template: str
    to: tuple[str, ...] = Field(repr=False)
    subject: str = Field(repr=False)
    text: str = Field(repr=False)
    html: str | None = Field(default=None, repr=False)
    data: str = Field(default="{}", repr=False, description="what the step passed, compact JSON")
    at: datetime = Field(description="when it was asked for; its date in every attempt")
    correlation_id: str
    actor: str
    business_object_type: str
    business_object_id: str = Field(repr=False)
    instance_id: UUID
    instance_seq: int
    workflow: str
    step: str
    status: str | None = Field(default=None, description="of a notice to an owner: the state that it tells of")
    deadline: datetime | None = None
    retry: RetryPolicy | None = None
    in_flight_max_s: float
    traceparent: str | None = None
    root: str
    group: str | None = Field(default=None, description="the consumer group of its message, where not the main one")

    @property
    def notice(self) -> bool:
        """Whether it tells an owner about a workflow, rather than being a step of it."""
        return self.status is not None


class History(_Frozen):
    """What is known of a notification's attempts so far; the row's `progress`."""

    settled: int = Field(default=0, description="attempts of the row that are accounted for here")
    sends: int = Field(default=0, description="attempts that went out or may have")
    first_attempt_at: datetime | None = None
    first_failed_at: datetime | None = None
    ambiguous_since: datetime | None = Field(
        default=None, description="start of the oldest attempt that may have worked; None when none may have"
    )
    ended_at: datetime | None = Field(default=None, description="when we let go of the last one that may have worked")
    error_class: ErrorClass | None = None
    error_message: str | None = None
    opening: int | None = Field(default=None, description="number of the person's word that made it be sent again")

    @property
    def tainted(self) -> bool:
        """Whether an attempt is among them that is not known to have failed."""
        return self.ambiguous_since is not None

    def to_bytes(self) -> bytes:
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> History:
        return cls() if raw is None else cls.model_validate_json(raw)


def pack_task(task: Task, delivery: bytes) -> bytes:
    """A row's payload: the notification, and the delivery byte for byte in case it must go to the DLQ."""
    head = task.model_dump_json(exclude_none=True).encode()
    return struct.pack(">I", len(head)) + head + delivery


def unpack_task(raw: bytes) -> tuple[Task, bytes]:
    """The inverse of `pack_task`."""
    size = struct.unpack_from(">I", raw)[0] if len(raw) >= 4 else 0
    if not 0 < size <= len(raw) - 4:
        raise DecodeError("a row does not hold a notification", hint="something else wrote this row")
    return Task.model_validate_json(raw[4 : 4 + size]), raw[4 + size :]


@dataclass(frozen=True, slots=True)
class Row:
    """A notification's row as a resolution meets it, under its lock."""

    kind: str
    state: str
    task: Task
    history: History
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class State:
    """What a message of the command topic is decided over: nothing for a command, its row for a resolution."""

    row: Row | None = None
    disposition: str | None = None


@dataclass(frozen=True, slots=True)
class Watched:
    """The highest sequence number of an instance that this service has seen; readers outside ignore a lower one."""

    seq: int = -1


@dataclass(frozen=True, slots=True)
class Sent:
    """One attempt, for the table of sends: saved in its settlement's transaction."""

    channel: str
    template: str
    recipients: int
    recipients_hash: bytes
    at: datetime
    ms: int
    ended: str


def recipients_hash(to: tuple[str, ...]) -> bytes:
    """By which two sends to the same people are known as such, without saying who they are."""
    return ids.body_hash("recipients", *sorted(address.lower() for address in to))
