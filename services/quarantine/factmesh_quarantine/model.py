"""The quarantine index's state, frozen, and its one transition table: what may happen to a record in which state.
No I/O lives here; `decide` files deaths and `acts` asks this table before it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from factmesh.dlq import DeadLetter
from factmesh.errors import IllegalTransitionError, Reason
from factmesh.ids import Root
from factmesh.message import Delivery
from factmesh.topics import COMMAND, COMMAND_NOTIFIER, topic_of

NAME = "quarantine"
"""The service's name: of its schema, its role and its group."""


class State(StrEnum):
    OPEN = "open"
    REPLAYED = "replayed"
    RESOLVED = "resolved"
    DISCARDED = "discarded"
    FAILED_AGAIN = "failed_again"


class Verb(StrEnum):
    """What a person does about a record, or what happens to it (`die`).

    `give_up` is the discard of a command that never became a row: it ends the command, so it has a number and can die.
    """

    REPLAY = "replay"
    RETRY_STEP = "retry_step"
    RESOLVE = "resolve"
    DISCARD = "discard"
    GIVE_UP = "give_up"
    DIE = "die"


#: state, verb -> state. What is not here is illegal and changes nothing.
TRANSITIONS: Mapping[tuple[State, Verb], State] = {
    (State.OPEN, Verb.REPLAY): State.REPLAYED,
    (State.OPEN, Verb.RETRY_STEP): State.REPLAYED,
    (State.OPEN, Verb.RESOLVE): State.RESOLVED,
    (State.OPEN, Verb.DISCARD): State.DISCARDED,
    (State.FAILED_AGAIN, Verb.REPLAY): State.REPLAYED,
    (State.FAILED_AGAIN, Verb.RETRY_STEP): State.REPLAYED,
    (State.FAILED_AGAIN, Verb.RESOLVE): State.RESOLVED,
    (State.FAILED_AGAIN, Verb.DISCARD): State.DISCARDED,
    (State.OPEN, Verb.GIVE_UP): State.DISCARDED,
    (State.FAILED_AGAIN, Verb.GIVE_UP): State.DISCARDED,
    (State.DISCARDED, Verb.DIE): State.FAILED_AGAIN,
    (State.REPLAYED, Verb.DIE): State.FAILED_AGAIN,
    (State.RESOLVED, Verb.DIE): State.FAILED_AGAIN,
}

OPEN_STATES = frozenset({State.OPEN, State.FAILED_AGAIN})


def next_state(state: State, verb: Verb) -> State:
    """The state after the verb. Raises IllegalTransitionError for a pair that the table does not hold."""
    after = TRANSITIONS.get((state, verb))
    if after is None:
        raise IllegalTransitionError(
            f"a record that is {state} cannot {verb}", hint="look at it again: somebody may have been faster"
        )
    return after


@dataclass(frozen=True, slots=True)
class Numbers:
    """What filing needs to know of a record that is there."""

    state: State
    raised: int
    published: int
    dead: int

    @property
    def is_open(self) -> bool:
        return self.raised == self.dead and self.state is not State.DISCARDED


@dataclass(frozen=True, slots=True)
class Death:
    """One record of a DLQ topic, read.

    Attributes:
        id: its `factmesh-dlq-id`.
        at: where it lies on the DLQ.
        thread: `ids.record_id(root, group)` that its number counts under; of a refused resolution, its command's.
        number: the opening under which it died.
        kind: the record's name and `workflow` its workflow, where the bytes can be decoded.
        is_resolution: a person's word on a command was refused; the command's record is open again, nothing else.
    """

    id: UUID
    at: Delivery
    service: str
    dead: DeadLetter
    thread: UUID
    number: int
    kind: str | None = None
    workflow: str | None = None
    is_resolution: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a record's history."""

    record: UUID
    event: str
    number: int
    before: State | None
    after: State
    detail: str


class Filing(StrEnum):
    """What a death did: made a record, opened one again, or came too late to change one."""

    NEW = "new"
    AGAIN = "again"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Filed:
    """A death and the record that it went to."""

    death: Death
    record: UUID
    how: Filing


@dataclass(frozen=True, slots=True)
class Thread:
    """Every record of one (root, group), as loaded under its lock, and what this batch changed.

    Attributes:
        at: the instant of the batch.
        counter: the highest opening number given out.
        openings: number -> the record that raised it.
        deaths: the ids of deaths that are filed already.
        filed, history: what this batch adds.
    """

    id: UUID
    at: datetime
    counter: int = 0
    records: Mapping[UUID, Numbers] = field(default_factory=dict)
    openings: Mapping[int, UUID] = field(default_factory=dict)
    deaths: frozenset[UUID] = frozenset()
    filed: tuple[Filed, ...] = ()
    history: tuple[Event, ...] = ()


class Way(StrEnum):
    """How a record is brought back."""

    OPENING = "opening"
    RETRY_STEP = "retry_step"
    RESOLUTION = "resolution"


def way_back(topic: str, reason: str, namespace: str) -> Way:
    """Commands are not replayed once they were rows (DESIGN section 9); everything else is an opening.

    A notification has no result and no step that waits for it: an exhausted one is opened like any message.
    """
    if reason == Reason.UNKNOWN:
        return Way.RESOLUTION
    if reason == Reason.EXHAUSTED and topic_of(topic, namespace) is COMMAND:
        return Way.RETRY_STEP
    return Way.OPENING


def discard_ends_command(topic: str, reason: str, root: str, namespace: str) -> UUID | None:
    """The command that a discard has to end with a resolution: one that died before it became a row.

    A conflict's twin is another body under the id of a command that lives: giving up the twin must not end it. Nobody
    waits for an unknown notification, so that one may be ended; any other unknown command was a row.
    """
    kind = topic_of(topic, namespace)
    if kind not in (COMMAND, COMMAND_NOTIFIER) or reason in (Reason.EXHAUSTED, Reason.CONFLICT):
        return None
    return None if reason == Reason.UNKNOWN and kind is COMMAND else Root(root).id


def may_discard(topic: str, reason: str, state: State, namespace: str) -> bool:
    """An unknown command is resolved, not discarded, unless a person's word on it was refused already.

    Its connector may no longer hold it as unknown; then only a discard can close the record.
    """
    is_unknown = way_back(topic, reason, namespace) is Way.RESOLUTION
    return not is_unknown or state is State.FAILED_AGAIN or topic_of(topic, namespace) is COMMAND_NOTIFIER
