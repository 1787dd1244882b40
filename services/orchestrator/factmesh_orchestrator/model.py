"""The state of an instance and of the business object that is locked for it, frozen, and the table of legal moves.
Nothing here decides or reads anything: `decide` moves these values on, `store` keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

from factmesh.errors import IllegalTransitionError
from factmesh.values import frozen_value

STATE_VERSION = 1
"""Raised when the kept form changes; `Instance.from_json` reads every version that was ever written."""


class Status(StrEnum):
    """What an instance shows (DESIGN section 10)."""

    RUNNING = "running"
    WAITING = "waiting"
    PARKED = "parked"
    NEEDS_RESOLUTION = "needs_resolution"
    COMPLETED = "completed"
    REJECTED = "rejected"
    FAILED = "failed"
    COMPENSATED = "compensated"
    CANCELLED = "cancelled"


STATUSES: Mapping[str, Status] = {status.value: status for status in Status}
ENDED = frozenset({Status.COMPLETED, Status.REJECTED, Status.FAILED, Status.COMPENSATED, Status.CANCELLED})
ATTENTION = frozenset({Status.PARKED, Status.NEEDS_RESOLUTION})
"""What operators look for: these have a row in a small table of their own."""


class Event(StrEnum):
    """What moves an instance."""

    START = "start"
    AWAIT = "await"
    WAKE = "wake"
    STEP_FAILED = "step_failed"
    RETRY = "retry"
    PARK = "park"
    RELEASE = "release"
    DISCARD = "discard"
    COMPLETE = "complete"
    REJECT = "reject"
    FAIL = "fail"
    COMPENSATE = "compensate"
    CANCEL = "cancel"


class Former(StrEnum):
    """A target that is not a state: the one that the instance had underneath."""

    FORMER = "former"


FORMER = Former.FORMER

_ENDS = {
    Event.COMPLETE: Status.COMPLETED,
    Event.REJECT: Status.REJECTED,
    Event.FAIL: Status.FAILED,
    Event.COMPENSATE: Status.COMPENSATED,
    Event.CANCEL: Status.CANCELLED,
}
END_EVENTS: Mapping[Status, Event] = {status: event for event, status in _ENDS.items()}

#: The state machine. `None` is "not there yet". What is not in the table is illegal, raises and changes nothing.
TRANSITIONS: Mapping[tuple[Status | None, Event], Status] = {
    (None, Event.START): Status.RUNNING,
    (Status.RUNNING, Event.AWAIT): Status.WAITING,
    (Status.WAITING, Event.WAKE): Status.RUNNING,
    (Status.RUNNING, Event.STEP_FAILED): Status.NEEDS_RESOLUTION,
    (Status.WAITING, Event.STEP_FAILED): Status.NEEDS_RESOLUTION,
    (Status.NEEDS_RESOLUTION, Event.RETRY): Status.RUNNING,
    **{
        (status, event): end
        for status in (Status.RUNNING, Status.WAITING, Status.NEEDS_RESOLUTION)
        for event, end in _ENDS.items()
    },
}

#: Quarantined messages lie over the state without changing it: what is shown while any is left (DESIGN section 9).
OVERLAYS: Mapping[tuple[Status, Event], Status | Former] = {
    (Status.RUNNING, Event.PARK): Status.PARKED,
    (Status.WAITING, Event.PARK): Status.PARKED,
    (Status.NEEDS_RESOLUTION, Event.PARK): Status.PARKED,
    (Status.PARKED, Event.RELEASE): FORMER,
    (Status.PARKED, Event.DISCARD): Status.NEEDS_RESOLUTION,
    (Status.RUNNING, Event.DISCARD): Status.NEEDS_RESOLUTION,
    (Status.WAITING, Event.DISCARD): Status.NEEDS_RESOLUTION,
}


def advance(status: Status | None, event: Event, where: object = "") -> Status:
    """The state after `event`. Raises IllegalTransitionError for a pair that the table does not hold."""
    target = TRANSITIONS.get((status, event))
    if target is None:
        raise IllegalTransitionError(
            f"an instance that is {status or 'not started'} cannot {event}",
            where=f"instance {where}" if where else "",
            hint="nothing was changed; this is a bug in the orchestrator, report it with the message's id",
        )
    return target


def shown_moves() -> frozenset[tuple[Status, Status]]:
    """Every pair of states that may follow one another as readers of the status topic see them."""
    base = {(a, b) for (a, _), b in TRANSITIONS.items() if a is not None}
    open_states = {Status.RUNNING, Status.WAITING, Status.NEEDS_RESOLUTION}
    moves = set(base) | {(a, b) for (a, _), b in OVERLAYS.items() if isinstance(b, Status)}
    moves |= {(Status.PARKED, s) for s in open_states}  # the state that it had
    # While one is shown over it, the state underneath goes on: it ends, or is seen when the last one is gone.
    moves |= {(over, end) for over in ATTENTION for end in ENDED}
    moves |= {(Status.NEEDS_RESOLUTION, s) for s in (Status.RUNNING, Status.WAITING)}
    # One message may take it through several states; readers see the last one only.
    moves |= {(Status.WAITING, Status.WAITING), (Status.RUNNING, Status.RUNNING)}
    return frozenset(moves)


class Park(NamedTuple):
    """One quarantined record of an instance: numbers that only rise, so that no order and no repeat matters."""

    parked: int = -1
    released: int = -1
    discarded: int = -1
    command_id: str | None = None

    def merge(self, other: Park) -> Park:
        """Both together: idempotent, commutative, associative."""
        return Park(
            max(self.parked, other.parked),
            max(self.released, other.released),
            max(self.discarded, other.discarded),
            max(self.command_id or "", other.command_id or "") or None,
        )

    @property
    def is_parked(self) -> bool:
        """A release cancels lower parks, a discard those up to its own opening."""
        return self.parked >= 0 and self.parked >= self.released and self.parked > self.discarded

    @property
    def is_discarded(self) -> bool:
        """Given up for good: no higher opening of it was ever handled."""
        return self.discarded >= 0 and self.discarded >= self.released


NO_PARK = Park()


class StepState(NamedTuple):
    """What became of one step so far. `status` is `active | done | failed | skipped`."""

    status: str
    runs: int = 1
    output: Any = None
    command_id: str | None = None
    error_class: str | None = None
    error_message: str | None = None


class Outstanding(NamedTuple):
    """A command whose result counts."""

    step: str
    run: int


class Timer(NamedTuple):
    """A timer whose firing counts."""

    step: str
    name: str


class Await(NamedTuple):
    """A fact that a step waits for: only one with this type wakes it."""

    step: str
    type: str


class KeptRetry(NamedTuple):
    """A person's retry of a command that is still outstanding: it waits for the result (DESIGN section 9).

    `root` and `original` (packed delivery, base64) let it be dead-lettered should the retry turn out moot, on behalf
    of the quarantine record that `record_root` and `record_group` name.
    """

    record_id: str
    opening: int
    root: str
    original: str
    record_root: str = ""
    record_group: str = ""


@frozen_value
class Instance:
    """One running workflow. Its mappings are never changed in place: whoever moves it on makes new ones.

    Instants are Unix milliseconds, as in the records. `base` is the state without its quarantined messages; what is
    shown is `status`. `kept_bytes` is what its input and outputs weigh. `resolved` are commands that a person
    settled: every park of theirs is cancelled.
    """

    id: UUID
    workflow: str
    version: str
    definition_hash: str
    base: Status
    seq: int
    business_object_type: str
    business_object_id: str
    correlation_id: str
    actor: str
    fact_id: str
    input: Any
    step: str | None
    started_at: int
    occurred_at: int
    due_by: int | None
    kept_bytes: int = 0
    steps: Mapping[str, StepState] = field(default_factory=dict)
    commands: Mapping[str, Outstanding] = field(default_factory=dict)
    timers: Mapping[str, Timer] = field(default_factory=dict)
    awaits: tuple[Await, ...] = ()
    retries: Mapping[str, KeptRetry] = field(default_factory=dict)
    parks: Mapping[str, Park] = field(default_factory=dict)
    resolved: tuple[str, ...] = ()
    outcome: str | None = None
    reason: str | None = None
    ended_at: int | None = None

    @property
    def status(self) -> Status:
        """What it shows: any park left is `parked`, else any discard left `needs_resolution`, else its own state."""
        if not self.parks or self.base in ENDED:
            return self.base
        left = [p for p in self.parks.values() if p.command_id not in self.resolved]
        if any(p.is_parked for p in left):
            return Status.PARKED
        if any(p.is_discarded for p in left):
            return Status.NEEDS_RESOLUTION
        return self.base

    @property
    def ended(self) -> bool:
        return self.base in ENDED

    @property
    def has_park(self) -> bool:
        """Whether a quarantined message of it is still to be replayed, resolved or discarded."""
        return any(p.is_parked and p.command_id not in self.resolved for p in self.parks.values())

    def to_json(self) -> dict[str, Any]:
        """JSON-plain data; what is empty is left out."""
        raw: dict[str, Any] = {
            "v": STATE_VERSION,
            "workflow": self.workflow,
            "version": self.version,
            "definition_hash": self.definition_hash,
            "base": self.base,
            "seq": self.seq,
            "business_object_type": self.business_object_type,
            "business_object_id": self.business_object_id,
            "correlation_id": self.correlation_id,
            "actor": self.actor,
            "fact_id": self.fact_id,
            "input": self.input,
            "step": self.step,
            "started_at": self.started_at,
            "occurred_at": self.occurred_at,
            "due_by": self.due_by,
            "kept_bytes": self.kept_bytes,
            "id": str(self.id),
        }
        for name, value in (
            ("steps", self.steps), ("commands", self.commands), ("timers", self.timers), ("retries", self.retries),
            ("parks", self.parks),
        ):  # fmt: skip
            if value:
                raw[name] = {key: list(item) for key, item in value.items()}
        if self.awaits:
            raw["awaits"] = [list(a) for a in self.awaits]
        if self.resolved:
            raw["resolved"] = self.resolved
        if self.outcome is not None:
            raw["outcome"] = self.outcome
        if self.reason is not None:
            raw["reason"] = self.reason
        if self.ended_at is not None:
            raw["ended_at"] = self.ended_at
        return raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], id_: UUID | None = None) -> Instance:
        """The inverse of `to_json`; `id_` where it is at hand. Raises IllegalTransitionError for a newer version's."""
        if raw["v"] > STATE_VERSION:
            raise IllegalTransitionError(
                f"kept state of version {raw['v']}, this release reads up to {STATE_VERSION}",
                where=f"instance {raw.get('id')}",
                hint="a newer orchestrator wrote it: finish the roll-out, or roll this replica forward",
            )
        get = raw.get
        # By position: keyword arguments are a third of what making one costs.
        return cls(
            id_ or UUID(raw["id"]),
            raw["workflow"],
            raw["version"],
            raw["definition_hash"],
            STATUSES[raw["base"]],
            raw["seq"],
            raw["business_object_type"],
            raw["business_object_id"],
            raw["correlation_id"],
            raw["actor"],
            raw["fact_id"],
            raw["input"],
            raw["step"],
            raw["started_at"],
            raw["occurred_at"],
            raw["due_by"],
            raw["kept_bytes"],
            _made(StepState, get("steps")),
            _made(Outstanding, get("commands")),
            _made(Timer, get("timers")),
            tuple([Await._make(a) for a in get("awaits", ())]),
            _made(KeptRetry, get("retries")),
            _made(Park, get("parks")),
            tuple(get("resolved", ())),
            get("outcome"),
            get("reason"),
            get("ended_at"),
        )


def _made(kind: Any, raw: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: kind._make(item) for key, item in raw.items()} if raw else {}


class KeptFact(NamedTuple):
    """A fact that waits under its object: for a step that will ask for it, or for its turn to start a workflow.

    `record` is what decisions need of it, JSON-plain. `original` (packed delivery, base64) goes to the DLQ when it
    goes stale; of a queued one it is empty. `workflow` is what a queued one starts. `timer` is its horizon.
    """

    id: str
    type: str
    root: str
    instant_ms: int
    record: Mapping[str, Any]
    original: str = ""
    workflow: str = ""
    timer: str = ""


class ObjectKey(NamedTuple):
    """A business object: what the batch loop locks."""

    type: str
    id: str


@frozen_value
class ObjectState:
    """One business object under its lock: facts that wait, who is active on it, and the instances that were loaded, by
    the text of their ids.

    `definitions` is what the decision needs to know of the deployed workflows; it is shared, and never written.
    """

    key: ObjectKey
    kept: tuple[KeptFact, ...] = ()
    queue: tuple[KeptFact, ...] = ()
    active: Mapping[UUID, str] = field(default_factory=dict)
    instances: Mapping[str, Instance] = field(default_factory=dict)
    definitions: Any = None

    def row(self) -> dict[str, Any]:
        """What waits under the object, JSON-plain; empty where nothing does. Instances are rows of their own."""
        row: dict[str, Any] = {}
        if self.kept:
            row["kept"] = [list(fact) for fact in self.kept]
        if self.queue:
            row["queue"] = [list(fact) for fact in self.queue]
        return {"v": STATE_VERSION, **row} if row else row

    @classmethod
    def from_row(
        cls,
        key: ObjectKey,
        raw: Mapping[str, Any],
        active: Mapping[UUID, str],
        instances: Mapping[str, Instance] | None = None,
        definitions: Any = None,
    ) -> ObjectState:
        """The inverse of `row`, with the instances that were loaded."""
        kept = tuple([KeptFact._make(f) for f in raw.get("kept", ())])
        queue = tuple([KeptFact._make(f) for f in raw.get("queue", ())])
        return cls(key, kept, queue, active, instances or {}, definitions)


def diagram() -> str:
    """The state machine as a Mermaid diagram, from the tables."""
    lines = ["stateDiagram-v2"]
    arrows: dict[tuple[str, str], list[str]] = {}
    for (source, event), target in TRANSITIONS.items():
        arrows.setdefault((str(source or "[*]"), str(target)), []).append(str(event))
    for (over, event), shown in OVERLAYS.items():
        targets = [Status.RUNNING, Status.WAITING, Status.NEEDS_RESOLUTION] if isinstance(shown, Former) else [shown]
        for target in targets:
            arrows.setdefault((str(over), str(target)), []).append(str(event))
    for (a, b), events in arrows.items():
        lines.append(f"    {a} --> {b}: {', '.join(events)}")
    lines += [f"    {end} --> [*]" for end in sorted(ENDED)]
    return "\n".join(lines) + "\n"
