"""What becomes of time: a due timer is published as a signal, and instances past their maximum age are told so.
Nothing is decided here; a signal counts only if the instance still waits for it, so firing twice is harmless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import structlog

from factmesh import ids
from factmesh.claim_loop import ClaimKind, Settlement
from factmesh.claims import Claimed
from factmesh.effects import Publish
from factmesh.emitting import Cause
from factmesh.message import to_ms
from factmesh.postgres import is_transient
from factmesh.service import Context
from factmesh_orchestrator.decide import MAX_AGE
from factmesh_orchestrator.store import SQL, Store
from factmesh_orchestrator.turn import SERVICE, TIMER_KIND

log = structlog.get_logger("factmesh.orchestrator.timers")

LEASE_S = 30.0
AGE_SWEEP_S = 600.0
"""How late an instance may learn that it is too old; maximum ages are days."""
SWEEP_ROWS_MAX = 1_000


async def fire(row: Claimed) -> Settlement:
    """A due timer becomes its signal, under one id however often it fires."""
    record: dict[str, Any] = orjson.loads(row.payload)
    key = record["instance_id"] or record["business_object_id"]
    body = {**record, "body": ids.canonical_json(record["body"])}
    id_ = ids.message_id(f"{SERVICE}/{TIMER_KIND}", str(row.id), 0, 0, ids.instant_ms_of(row.id))
    return Settlement("done", publish=(Publish("signal", "signal", key, body, id_),), cause=record)


TIMERS = ClaimKind(TIMER_KIND, fire, lease_s=LEASE_S)


class Ageing:
    """Looks for open instances past their maximum age and signals each once a process; the ledger knows repeats.

    Ids lie in the order of their facts, so a walk by key from where nothing open is left costs no index on a column
    that changes, which a timer row for every instance, or an index over open ones, would.
    """

    def __init__(self, context: Context, store: Store) -> None:
        self._context, self._store = context, store
        self._from = UUID(int=0)

    async def run(self) -> None:
        """For ever, every `AGE_SWEEP_S`."""
        while True:
            try:
                while await self.sweep(self._context.clock.now()) == SWEEP_ROWS_MAX:
                    pass
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning("ageing.waiting", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(AGE_SWEEP_S)

    async def sweep(self, now: datetime) -> int:
        """One page of the walk; how many open instances it held."""
        ages = [d.max_age_ms for d in self._store.definitions.by_version.values()]
        if not ages:
            return 0
        before = UUID(int=(to_ms(now) - min(ages)) << 80)
        async with self._context.pool.acquire() as conn:
            rows = await conn.fetch(SQL.open_before, self._from, before, SWEEP_ROWS_MAX)
            await self._store.know(conn, {(r["workflow"], r["workflow_version"]) for r in rows})
        emissions, passed = [], True
        for row in rows:
            deployed = self._store.definitions.of(row["workflow"], row["workflow_version"])
            if ids.instant_ms_of(row["id"]) + deployed.max_age_ms > to_ms(now):
                passed = False
                continue
            emissions.append(self._context.emitter.emit(_aged(row), _cause(row["id"]), 0, now))
            if passed:
                self._from = row["id"]
        await self._context.publisher.publish(emissions)
        return len(rows) if passed else 0


def _aged(row: Any) -> Publish:
    body: Mapping[str, Any] = {"timer_id": "", "name": MAX_AGE, "step": None}
    record = {
        "ce_type": "signal.timer_fired",
        "correlation_id": row["correlation_id"],
        "actor": f"service:{SERVICE}",
        "business_object_type": row["object_type"],
        "business_object_id": row["object_id"],
        "instance_id": str(row["id"]),
        "instance_seq": row["seq"],
        "signal": "timer_fired",
        "body": ids.canonical_json(body),
    }
    return Publish("signal", "signal", str(row["id"]), record)


def _cause(instance: UUID) -> Cause:
    """One cause for one instance's age: the same signal whenever, and by whichever replica, it is found."""
    return Cause(f"age:{instance}", 0, ids.instant_ms_of(instance), str(instance), {}, None)
