"""The operator of the mesh tests: brings every open record to an end with the public functions behind `factmesh dlq`.
What really happened it learns from the sandbox's log, as a person would by a phone call; it never writes to a service.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tests.support import evidence

from factmesh.message import unpack_delivery
from factmesh.topics import COMMAND_NOTIFIER, FACTS_RAW, topic_of
from factmesh_cli import dlq_edit
from factmesh_cli.demo_plan import Fate, Plan, Remedy, Sending
from factmesh_cli.dlq_index import Index, catch_up, load_settings, open_index, read_addresses
from factmesh_cli.dlq_operate import publish_left_over
from factmesh_cli.mesh import Mesh
from factmesh_quarantine import queries
from factmesh_quarantine.acts import RefusedError
from factmesh_quarantine.messages import Person
from factmesh_quarantine.model import Way


class Operator:
    """One person over one mesh. `in_flight_s`: how long after a death a call of it may still be under way."""

    def __init__(self, mesh: Mesh, plan: Plan, in_flight_s: float) -> None:
        self.mesh, self.plan = mesh, plan
        self.in_flight = timedelta(seconds=in_flight_s)
        self.acts: Counter[str] = Counter()
        self._dead: Mapping[tuple[str | None, str | None, bytes | None], Sending] = {
            (s.source, s.id, s.body): s for s in plan.sendings if s.fate is Fate.DEAD
        }

    async def until_all_is_done(self, look: evidence.Books, timeout_s: float) -> None:
        """Act, wait for quiet, look again: what died again, or was resolved too early, comes up once more."""
        deadline = time.monotonic() + timeout_s
        settings = load_settings(read_addresses(self.mesh.run_dir))
        async with open_index(settings) as index:
            while True:
                await publish_left_over(index)
                await catch_up(index)
                rows = await queries.list_records(index.pool, queries.Filter())
                if not rows:
                    return
                left = [f"{r['topic']} {r['reason']} {r['state']}: {r['message']}" for r in rows[:5]]
                assert time.monotonic() < deadline, f"{len(rows)} records are still open: {left}"
                for row in rows:
                    await self._act(index, row)
                await evidence.quiet(look, timeout_s=max(1.0, deadline - time.monotonic()))

    async def _act(self, index: Index, row: Any) -> None:
        person = Person("operator", "looked into the system", index.clock.now())
        if index.acts.way(row) is Way.RESOLUTION:
            wait = row["failed_at"] + self.in_flight - index.clock.now()
            await asyncio.sleep(max(0.0, wait.total_seconds()))
            await self._resolve(index, row)
        elif topic_of(row["topic"], self.mesh.prefix) is FACTS_RAW:
            await self._fact(index, row, person)
        else:
            await self._replay(index, row, person)

    async def _resolve(self, index: Index, row: Any) -> None:
        person = Person("operator", "looked into the system", index.clock.now())
        output = self.plan.look(row["business_object_id"], row["step"], self.mesh.sandbox_log)
        # A notification that did not happen is sent again by itself; a command gets a new run of its step.
        retry = output is None and topic_of(row["topic"], self.mesh.prefix) is not COMMAND_NOTIFIER
        verdict = "not_happened" if output is None else "happened"
        async with index.pool.acquire() as conn, conn.transaction():
            raised = await index.acts.resolve(
                conn,
                row["id"],
                person,
                verdict=verdict,
                output=None if output is None else dlq_edit.compact(dict(output)),
                retry=retry,
            )
        await index.acts.publish_act(raised.act, index.clock.now)
        self.acts[f"{verdict} {row['step']}"] += 1

    async def _fact(self, index: Index, row: Any, person: Person) -> None:
        original = unpack_delivery(row["original"])
        sending = self._dead.get((original.header("ce_source"), original.header("ce_id"), original.value))
        assert sending is not None, f"the generator expected no death of {original.where}: {row['message']}"
        if sending.remedy is Remedy.DISCARD:
            async with index.pool.acquire() as conn, conn.transaction():
                await index.acts.discard(conn, row["id"], person)
            self.acts["discard"] += 1
            return
        if sending.remedy is Remedy.CORRECT:
            seen = await dlq_edit.view(index.registry, original.value)
            data = seen.data
            for path, value in sending.correction.items():
                data = dlq_edit.set_path(data, f"{path}={value}")
            await index.acts.correct(row, dlq_edit.encode(seen, data), original.headers, person)
        await self._replay(index, row, person)

    async def _replay(self, index: Index, row: Any, person: Person) -> None:
        try:
            async with index.pool.acquire() as conn, conn.transaction():
                raised = await index.acts.replay(conn, row["id"], person)
        except RefusedError as error:
            raise AssertionError(f"no way back for {row['topic']} {row['reason']}: {error}") from error
        await index.acts.publish_act(raised.act, index.clock.now)
        self.acts[str(raised.verb)] += 1
