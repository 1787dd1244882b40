"""What becomes of a fact, and what a status message tells: pure. The gate against repeats is the library's ledger.
No I/O and no clock here; the HTTP entrance asks the same function before it accepts a fact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from factmesh.effects import Effect, Note, Publish
from factmesh.errors import FactmeshError, StaleError, ValidationError
from factmesh.message import Message, from_ms
from factmesh_intake.model import FUTURE_TOLERANCE, Canonical, Desk, FutureError, Incoming

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def accept(desk: Desk, incoming: Incoming, now: datetime, *, opening: int = 0) -> Canonical:
    """The canonical fact, if it may enter now. Raises what is wrong with it, naming the fact.

    An opening is an operator's recorded acceptance of an old fact: only then is the horizon waived (DESIGN section 8).
    """
    try:
        canonical = desk.mapper.map(incoming)
        occurred_at = from_ms(canonical.occurred_at)
        if occurred_at > now + FUTURE_TOLERANCE:
            raise FutureError(
                "occurred_at",
                f"more than {_minutes(FUTURE_TOLERANCE)} minutes in the future",
                hint="check the sender's clock, zone and unit",
            )
        if opening == 0 and occurred_at < now - desk.horizon:
            raise StaleError(
                f"occurred_at: older than the dedup horizon of {desk.horizon.days} days, so it cannot be proved new",
                hint="an operator who knows that it is new replays it; that is recorded as the acceptance",
            )
    except FactmeshError as error:
        error.where = error.where or incoming.where
        raise
    return canonical


def _minutes(span: timedelta) -> int:
    return int(span.total_seconds() // 60)


def decide_fact(desk: Desk, message: Message, now: datetime) -> tuple[Desk, Sequence[Effect]]:
    """One canonical fact on its way to the workflows."""
    incoming: Incoming = message["incoming"]
    canonical = accept(desk, incoming, now, opening=message.opening)
    body = {
        "ce_type": incoming.type,
        "correlation_id": message["correlation_id"],
        "actor": canonical.actor,
        "business_object_type": canonical.business_object_type,
        "business_object_id": canonical.business_object_id,
        "status": canonical.status,
        "due_by": canonical.due_by,
        "occurred_at": canonical.occurred_at,
        "received_at": message.instant_ms,
        "schema_version": canonical.schema_version,
        "source": incoming.source,
        "source_id": incoming.id,
        "data": canonical.data,
    }
    note = {
        "type": incoming.type,
        "schema_version": canonical.schema_version,
        "business_object_type": canonical.business_object_type,
        "business_object_id": canonical.business_object_id,
        "actor": canonical.actor,
    }
    return desk, (Publish("fact", "fact", key=canonical.business_object_id, body=body), Note(note))


def decide_status(state: None, message: Message, now: datetime) -> tuple[None, Sequence[Effect]]:
    """Nothing is emitted: what the message says is saved for those who ask about their fact."""
    for name in ("correlation_id", "instance_id"):
        if not _ID.fullmatch(message.record[name]):
            raise ValidationError(
                f"{name}: not a UUID in lower case",
                where=message.where,
                hint="only the orchestrator writes status; look there",
            )
    return None, ()
