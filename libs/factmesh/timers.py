"""Timers: claims rows whose work is to publish a signal with a derived id; firing twice is harmless.
What a timer means is the orchestrator's; this only carries it from its due row to the signal topic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh import ids
from factmesh.claim_loop import ClaimKind, Settlement
from factmesh.claims import Claimed
from factmesh.effects import Publish, Schedule

KIND = "timer"
LEASE_S = 15.0
CONCURRENCY = 500


def timer(
    id_: UUID, due_at: datetime, *, signal: str, key: str, fields: Mapping[str, Any], envelope: Mapping[str, Any]
) -> Schedule:
    """A timer that fires `signal` with `fields` at `due_at`. A re-armed timer needs a new id.

    `envelope` holds what the signal inherits: correlation_id, actor, business_object_type, business_object_id,
    instance_id, instance_seq, as far as they are known.
    """
    payload = {"signal": signal, "key": key, "fields": dict(fields), "envelope": dict(envelope)}
    return Schedule(KIND, id_, ids.canonical_json(payload), due_at=due_at)


async def fire(row: Claimed) -> Settlement:
    """The work of a due timer: done, and its signal published. No clock is asked: PostgreSQL judged it due."""
    payload = json.loads(row.payload)
    body = {"signal": payload["signal"], "body": ids.canonical_json(payload["fields"])}
    # The id derives from the timer alone, not from the lease's epoch: firing twice is one signal.
    id_ = ids.message_id("timer", f"id:{row.id}", 0, 0, ids.instant_ms_of(row.id))
    publish = Publish("signal", "signal", payload["key"], body, id=id_)
    envelope = payload["envelope"]
    return Settlement("done", publish=(publish,), cause=envelope, traceparent=envelope.get("traceparent"))


def kind() -> ClaimKind:
    """The claim loop of timers."""
    return ClaimKind(KIND, fire, lease_s=LEASE_S, concurrency=CONCURRENCY)
