"""What an attempt came to, and what that tells others: emissions, a dead letter with its park, marks of ledger rows.
Pure but for the codec; who may settle, and when it is written and published, is `claim_loop`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from factmesh import dlq, ids
from factmesh.claims import Claimed
from factmesh.effects import MarkLedger, Publish
from factmesh.emitting import Cause, Emitter, parked
from factmesh.errors import FactmeshError
from factmesh.message import Delivery, Emission
from factmesh.values import frozen_value


@dataclass(frozen=True, slots=True)
class Death:
    """The message behind a row goes to its DLQ with this settlement; the loop adds the park of its instance.

    Attributes:
        original: the delivery, byte for byte, with its coordinates.
        error: class, reason and text of why.
        record: the decoded message, for the diagnosis headers (`command_id`, `step`, `instance_id`, …).
        replayable: also mark its ledger row `dead`, so that an opening is handled as a message (the notifier's way);
            otherwise the record is answered by a signal or a resolution (the connector's way).
        opening: the number that it died under, where a person's word has opened it again since; else the delivery's.
        group: the consumer group that handles an opening, where it is not the service's main one.
    """

    original: Delivery
    root: str
    error: FactmeshError
    attempts: int
    first_failed_at: datetime
    record: Mapping[str, Any]
    replayable: bool = False
    opening: int | None = None
    group: str | None = None


@frozen_value
class Settlement:
    """What became of an attempt: `pending` (again at `due_at`), `done`, `failed` or `unknown`.

    `publish` derives its ids from (row id, epoch, ordinal) unless they are given; `cause` is the record they inherit.
    `save` is written by the settling statement, together for the whole batch, as the kind's `save` says.
    """

    state: str
    due_at: datetime | None = None
    progress: bytes | None = None
    publish: tuple[Publish, ...] = ()
    cause: Mapping[str, Any] = field(default_factory=dict)
    traceparent: str | None = None
    death: Death | None = None
    ledger: tuple[MarkLedger, ...] = ()
    save: Any = None

    def marks(self) -> Sequence[MarkLedger]:
        """What changes of earlier ledger rows with it."""
        death = self.death
        if death is None or not death.replayable:
            return self.ledger
        return (*self.ledger, MarkLedger(death.root, "dead", death.error.reason, str(death.error)))


@dataclass(frozen=True, slots=True)
class Teller:
    """Encodes what settlements of one kind emit. `stage` and `group` say in dead letters where they died."""

    emitter: Emitter
    stage: str
    group: str
    version: str

    def emissions(self, row: Claimed, settlement: Settlement, now: datetime) -> list[Emission]:
        """In the order of `publish`, then the dead letter and its park."""
        s = settlement
        if s.state == "pending" or not (s.publish or s.death):
            return []
        # Not the root of the message that made the row: epoch n of it is not opening n of that.
        id_ = str(row.id)
        cause = Cause("claim:" + id_, row.epoch, ids.instant_ms_of(row.id), "id:" + id_, s.cause, s.traceparent)
        out = self.emitter.emit_all(s.publish, cause, now)
        if s.death is not None:
            letter = self._letter(s.death, now)
            out.append(self.emitter.dead(letter))
            if letter.instance_id is not None:
                signal = parked(letter, ids.record_id(letter.root, letter.group), letter.instance_id)
                out.append(self.emitter.emit(signal, cause, len(out), now))
        return out

    def _letter(self, death: Death, now: datetime) -> dlq.DeadLetter:
        return dlq.dead_letter(
            death.original,
            death.error,
            root=death.root,
            opening=death.original.opening if death.opening is None else death.opening,
            group=death.group or self.group,
            stage=self.stage,
            first_failed_at=death.first_failed_at,
            failed_at=now,
            service_version=self.version,
            attempts=death.attempts,
            record=death.record,
        )
