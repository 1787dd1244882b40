"""The filter options of `factmesh dlq`, as given on the command line, and what they ask of the index.
No printing and no SQL lives here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from factmesh.errors import Reason, ValidationError
from factmesh_cli.dlq_index import Index
from factmesh_quarantine import queries
from factmesh_quarantine.model import State

_AGE = re.compile(r"(\d+)([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The filter options of one call, as given."""

    ids: list[str] | None = None
    topic: str | None = None
    reason: Reason | None = None
    cause: str | None = None
    instance: UUID | None = None
    states: list[str] | None = None
    since: str | None = None
    workflow: str | None = None
    owner: str | None = None

    @property
    def is_empty(self) -> bool:
        rest = (self.topic, self.reason, self.cause, self.instance, self.since, self.workflow, self.owner)
        return not self.ids and all(v is None for v in rest)

    async def filter(self, index: Index) -> queries.Filter:
        ids = None
        if self.ids:
            ids = tuple([await queries.find(index.pool, i) for i in self.ids])
        return queries.Filter(
            ids=ids,
            topic=self.topic,
            reason=None if self.reason is None else str(self.reason),
            fingerprint=self.cause,
            instance=self.instance,
            states=_states(self.states, named=bool(self.ids)),
            since=None if self.since is None else instant_of(self.since, index.clock.now()),
            workflow=self.workflow,
            owner=self.owner,
        )


def _states(given: Sequence[str] | None, named: bool) -> tuple[State, ...] | None:
    """Open ones unless told; a record that is named by its id is shown in any state."""
    if not given:
        return None if named else queries.Filter().states
    if "all" in given:
        return None
    try:
        return tuple(State(s) for s in given)
    except ValueError as error:
        raise ValidationError(str(error), hint=f"one of {', '.join(State)}, all") from None


def instant_of(text: str, now: datetime) -> datetime:
    """`30m`, `12h`, `7d` ago, or an RFC 3339 instant with an offset. Raises ValidationError."""
    age = _AGE.fullmatch(text)
    if age:
        return now - timedelta(seconds=int(age[1]) * _UNIT_S[age[2]])
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValidationError(
            f"{text!r} is not an instant with an offset, nor an age", hint="e.g. 2026-03-01T12:00Z, 2h"
        )
    return at.astimezone(UTC)
