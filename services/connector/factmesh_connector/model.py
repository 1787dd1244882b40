"""The connector's values, frozen: what an operation declares, what a command's row carries, what is known of its calls.
No I/O and no decision lives here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

import orjson

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


class Task(NamedTuple):
    """A command as its row carries it, so that an attempt needs no schema and no ledger. Ids are canonical text."""

    command_id: str
    connector: str
    operation: str
    input: str
    idempotency_key: str
    correlation_id: str
    actor: str
    business_object_type: str
    business_object_id: str
    instance_id: str
    instance_seq: int
    step: str
    workflow: str
    in_flight_max_s: float
    root: str
    opening: int = 0
    deadline: datetime | None = None
    retry: RetryPolicy | None = None
    traceparent: str | None = None

    def __repr__(self) -> str:
        """What an error or a log may take: no input and no business object (F5)."""
        return f"Task({self.connector}.{self.operation}, command {self.command_id})"


class Call(NamedTuple):
    """One call that was made: when, how long, and how it ended (REQUIREMENTS C7)."""

    at: datetime
    ms: int
    what: str
    ended: str


class History(NamedTuple):
    """What is known of a command's attempts so far; the row's `progress`.

    Attributes:
        settled: attempts of the row that are accounted for here, calls or not.
        calls: calls that went out or may have.
        ambiguous_since: start of the oldest call that may have worked; None when none may have.
        ended_at: when we let go of the last call that may have worked.
        asks: questions in a row that got no usable answer.
        stopped: why no further call is made; what is left is to ask.
    """

    settled: int = 0
    calls: int = 0
    first_attempt_at: datetime | None = None
    first_failed_at: datetime | None = None
    ambiguous_since: datetime | None = None
    ended_at: datetime | None = None
    asks: int = 0
    first_ask_at: datetime | None = None
    stopped: str | None = None
    error_class: ErrorClass | None = None
    error_message: str | None = None
    log: tuple[Call, ...] = ()

    @property
    def tainted(self) -> bool:
        """Whether a call is among them that is not known to have failed."""
        return self.ambiguous_since is not None

    def with_call(self, call: Call, **changes: Any) -> History:
        """The history with one more call in its log, and other fields changed; the first and the newest are kept."""
        log = (*self.log, call)
        if len(log) > CALLS_KEPT_MAX:
            log = (*log[: CALLS_KEPT_MAX // 2], *log[-(CALLS_KEPT_MAX // 2) :])
        return self._replace(log=log, **changes)

    def to_bytes(self) -> bytes:
        """JSON by field names, without what is not known."""
        said: dict[str, Any] = {
            name: value
            for name, value, initial in zip(self._fields, self, NOTHING, strict=True)
            if value != initial
        }
        if self.log:
            said["log"] = [call._asdict() for call in self.log]
        return orjson.dumps(said, option=orjson.OPT_UTC_Z)

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> History:
        """The inverse of `to_bytes`; a name that another version wrote is passed over."""
        if raw is None:
            return NOTHING
        said = _known(cls._fields, orjson.loads(raw))
        for name in ("first_attempt_at", "first_failed_at", "ambiguous_since", "ended_at", "first_ask_at"):
            if said.get(name) is not None:
                said[name] = datetime.fromisoformat(said[name])
        if said.get("error_class") is not None:
            said["error_class"] = ErrorClass(said["error_class"])
        said["log"] = tuple(
            Call(datetime.fromisoformat(c["at"]), c["ms"], c["what"], c["ended"]) for c in said.get("log", ())
        )
        return cls(**said)


NOTHING = History()
"""Of a row that nobody has worked on yet."""


def _known(names: tuple[str, ...], said: dict[str, Any]) -> dict[str, Any]:
    return {name: said[name] for name in names if name in said}


class Hand(NamedTuple):
    """A row's command in memory, for the process that has just written the row. `input` is the attempt's to change."""

    task: Task
    input: dict[str, Any]


@lru_cache(maxsize=256)
def _plain(policy: RetryPolicy) -> dict[str, Any]:
    return policy.model_dump()


def pack_task(task: Task, delivery: bytes) -> bytes:
    """A row's payload: the command as JSON by field names, and the delivery byte for byte in case it must die."""
    said = task._asdict()
    for name in ("deadline", "retry", "traceparent"):
        if said[name] is None:
            del said[name]
    if task.retry is not None:
        said["retry"] = _plain(task.retry)
    head = orjson.dumps(said, option=orjson.OPT_UTC_Z)
    return b"".join((len(head).to_bytes(4, "big"), head, delivery))


def unpack_task(raw: bytes) -> tuple[Task, bytes]:
    """The inverse of `pack_task`; a name that another version wrote is passed over."""
    size = int.from_bytes(raw[:4], "big") if len(raw) >= 4 else 0
    if not 0 < size <= len(raw) - 4:
        raise DecodeError("a command's row does not hold a command", hint="something else wrote this row")
    said = _known(Task._fields, orjson.loads(raw[4 : 4 + size]))
    if said.get("deadline") is not None:
        said["deadline"] = datetime.fromisoformat(said["deadline"])
    if said.get("retry") is not None:
        said["retry"] = RetryPolicy.model_validate(said["retry"])
    return Task(**said), raw[4 + size :]


class Key(NamedTuple):
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


class State(NamedTuple):
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
    began = history.first_attempt_at
    failed = outcome == "failed"
    return {
        "ce_type": f"factmesh.command.{outcome}",
        "correlation_id": task.correlation_id,
        "business_object_type": task.business_object_type,
        "business_object_id": task.business_object_id,
        "instance_id": task.instance_id,
        "instance_seq": task.instance_seq,
        "command_id": task.command_id,
        "step": task.step,
        "idempotency_key": task.idempotency_key,
        "outcome": outcome,
        "output": output,
        "error_class": str(history.error_class) if failed and history.error_class else None,
        "error_message": history.error_message if failed else None,
        "attempts": history.calls,
        "duration_ms": 0 if began is None else max(0, int((at - began).total_seconds() * 1000)),
        "verdict": verdict,
        "epoch": epoch,
    }
