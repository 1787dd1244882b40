"""Filing a death: which record it belongs to and what becomes of that record. Pure; the thread's lock is the caller's.
A death is never refused here: what cannot be placed becomes a record of its own, so that nothing on a DLQ is unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

from factmesh_quarantine.model import OPEN_STATES, Death, Event, Filed, Filing, Numbers, State, Thread, Verb, next_state


def file(thread: Thread, death: Death) -> Thread:
    """The thread with this death filed; a death that is filed already changes nothing."""
    if death.id in thread.deaths:
        return thread
    owner = thread.openings.get(death.number) if death.number > 0 else None
    if owner is None and death.is_resolution and thread.records:
        # The index was rebuilt and knows the command's record, not the act: the act was about that record.
        owner = max(thread.records, key=lambda r: (thread.records[r].dead, r))
        known = thread.records[owner]
        raised = replace(known, state=State.RESOLVED, raised=max(known.raised, death.number))
        thread = replace(thread, records={**thread.records, owner: raised})
    filed = _fail_again(thread, death, owner) if owner is not None else _new_record(thread, death)
    return replace(filed, deaths=filed.deaths | {death.id}, counter=max(filed.counter, death.number))


def _fail_again(thread: Thread, death: Death, record: UUID) -> Thread:
    """The opening that this record raised died: it is open again."""
    before = thread.records[record]
    if death.number <= before.dead or before.state in OPEN_STATES:
        # An older opening that died late, or twice. The record has moved on; the death is kept in its history.
        how, after = Filing.LATE, before
    else:
        state = next_state(before.state, Verb.DIE) if death.number == before.raised else before.state
        # A death proves the publication, whatever the tool lived to write down.
        how, after = Filing.AGAIN, Numbers(state, before.raised, max(before.published, death.number), death.number)
    event = Event(record, "died", death.number, before.state, after.state, death.dead.message)
    return replace(
        thread,
        records={**thread.records, record: after},
        filed=(*thread.filed, Filed(death, record, how)),
        history=(*thread.history, event),
    )


def _new_record(thread: Thread, death: Death) -> Thread:
    """A first death, a conflict, or an opening that this index never raised: raised = published = dead."""
    numbers = Numbers(State.OPEN, death.number, death.number, death.number)
    openings: Mapping[int, UUID] = thread.openings
    if death.number > 0:
        openings = {**openings, death.number: death.id}
    return replace(
        thread,
        records={**thread.records, death.id: numbers},
        openings=openings,
        filed=(*thread.filed, Filed(death, death.id, Filing.NEW)),
        history=(*thread.history, Event(death.id, "quarantined", death.number, None, State.OPEN, death.dead.message)),
    )
