"""The connector's values, frozen: what an operation declares, what a command's row carries, what is known of its calls.
No I/O and no decision lives here.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from factmesh.errors import DecodeError, ErrorClass
from factmesh.retry import RetryPolicy

#: What an answer may leave in the ledger, the state of an instance and a result: declared fields, not documents.
OUTPUT_BYTES_MAX = 65_536
#: The calls that a row remembers one by one; what came between the first and the last ones is only counted.
CALLS_KEPT_MAX = 20
KIND_PREFIX = "attempt."


class Strategy(StrEnum):
    """How a repeat is made safe (REQUIREMENTS C2)."""

    KEY = "key"
    LOOKUP = "lookup"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Operation:
    """What decides about an operation's attempts, whoever carries them out."""

    name: str
    strategy: Strategy
    timeout_s: float = 10.0
    lookup_timeout_s: float = 10.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    #: How long after we let go of a call the downstream may still carry it out.
    in_flight_max_s: float = 60.0
    #: How long the downstream remembers a key; used by strategy `key` only.
    key_valid_s: float = 86_400.0
    sensitive: bool = False
    output_bytes_max: int = OUTPUT_BYTES_MAX
    #: The fields that its output always has; what a person says has happened must have them too.
    output_fields: tuple[str, ...] = ()

    @property
    def longest_s(self) -> float:
        """What one attempt may take at most: a question before it, and the call."""
        return self.timeout_s + (self.lookup_timeout_s if self.strategy is Strategy.LOOKUP else 0.0)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Task(_Frozen):
    """A command as its row carries it, so that an attempt needs no schema and no ledger."""

    command_id: UUID
    connector: str
    operation: str
    input: str = Field(repr=False)
    idempotency_key: UUID
    correlation_id: str
    actor: str
    business_object_type: str
    business_object_id: str = Field(repr=False)
    instance_id: UUID
    instance_seq: int
    step: str
    workflow: str
    deadline: datetime | None = None
    retry: RetryPolicy | None = None
    in_flight_max_s: float
    traceparent: str | None = None
    root: str
    opening: int = 0


class Call(_Frozen):
    """One call that was made: when, how long, and how it ended (REQUIREMENTS C7)."""

    at: datetime
    ms: int
    what: str
    ended: str


class History(_Frozen):
    """What is known of a command's attempts so far; the row's `progress`."""

    settled: int = Field(default=0, description="attempts of the row that are accounted for here, calls or not")
    calls: int = Field(default=0, description="calls that went out or may have")
    first_attempt_at: datetime | None = None
    first_failed_at: datetime | None = None
    ambiguous_since: datetime | None = Field(
        default=None, description="start of the oldest call that may have worked; None when none may have"
    )
    ended_at: datetime | None = Field(default=None, description="when we let go of the last call that may have worked")
    asks: int = Field(default=0, description="questions in a row that got no usable answer")
    first_ask_at: datetime | None = None
    stopped: str | None = Field(default=None, description="why no further call is made; what is left is to ask")
    error_class: ErrorClass | None = None
    error_message: str | None = None
    log: tuple[Call, ...] = ()

    @property
    def tainted(self) -> bool:
        """Whether a call is among them that is not known to have failed."""
        return self.ambiguous_since is not None

    def with_call(self, call: Call) -> History:
        """The history with one more call in its log; the first and the newest ones are kept."""
        log = (*self.log, call)
        if len(log) > CALLS_KEPT_MAX:
            log = (*log[: CALLS_KEPT_MAX // 2], *log[-(CALLS_KEPT_MAX // 2) :])
        return self.model_copy(update={"log": log})

    def to_bytes(self) -> bytes:
        return self.model_dump_json(exclude_defaults=True).encode()

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> History:
        return cls() if raw is None else cls.model_validate_json(raw)


def pack_task(task: Task, delivery: bytes) -> bytes:
    """A row's payload: the command, and the delivery byte for byte in case it must go to the DLQ."""
    head = task.model_dump_json(exclude_none=True).encode()
    return struct.pack(">I", len(head)) + head + delivery


def unpack_task(raw: bytes) -> tuple[Task, bytes]:
    """The inverse of `pack_task`."""
    size = struct.unpack_from(">I", raw)[0] if len(raw) >= 4 else 0
    if not 0 < size <= len(raw) - 4:
        raise DecodeError("a command's row does not hold a command", hint="something else wrote this row")
    return Task.model_validate_json(raw[4 : 4 + size]), raw[4 + size :]


@dataclass(frozen=True, slots=True)
class Key:
    """Who holds an idempotency key: calls under it carry one body, until a known failure (INV-K)."""

    command_id: UUID
    body_hash: bytes
    known_failed: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A command's row as a resolution meets it, under its lock."""

    state: str
    epoch: int
    task: Task
    history: History
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class State:
    """What a message of a command topic is decided over: its key's holder, or its command's row."""

    key: Key | None = None
    row: Row | None = None
    disposition: str | None = None


Catalogue = Mapping[str, Mapping[str, Operation]]
"""Operations by connector and name."""


def operation_of(catalogue: Catalogue, connector: str, name: str) -> Operation | None:
    """The operation, or None where nothing of that name is declared."""
    return catalogue.get(connector, {}).get(name)


def result_body(
    task: Task,
    outcome: str,
    epoch: int,
    history: History,
    *,
    at: datetime,
    output: bytes | None = None,
    verdict: str | None = None,
) -> dict[str, Any]:
    """The fields of a `result` record; the error of the last failure is told only where the command failed."""
    began = history.first_attempt_at or at
    failed = outcome == "failed"
    return {
        "ce_type": f"factmesh.command.{outcome}",
        "correlation_id": task.correlation_id,
        "business_object_type": task.business_object_type,
        "business_object_id": task.business_object_id,
        "instance_id": str(task.instance_id),
        "instance_seq": task.instance_seq,
        "command_id": str(task.command_id),
        "step": task.step,
        "idempotency_key": str(task.idempotency_key),
        "outcome": outcome,
        "output": output,
        "error_class": str(history.error_class) if failed and history.error_class else None,
        "error_message": history.error_message if failed else None,
        "attempts": history.calls,
        "duration_ms": max(0, int((at - began).total_seconds() * 1000)),
        "verdict": verdict,
        "epoch": epoch,
    }
