"""What is measured by looking: instances that need a person, and for how long the oldest of each kind has.
Reads one small table now and then; no decision and no message depends on it.
"""

from __future__ import annotations

import asyncio

from factmesh.metrics import Metrics
from factmesh.postgres import Pool, is_transient
from factmesh_orchestrator.store import SQL

LOOK_EVERY_S = 5.0


class Attention:
    """Keeps the gauges of attention; what needed a person and no longer does is set to zero."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool, self._metrics = pool, metrics
        self._seen: set[tuple[str, str]] = set()

    async def look(self) -> None:
        """Measure once."""
        found = {(r["workflow"], r["status"]): r for r in await self._pool.fetch(SQL.attention_counts)}
        for workflow, status in self._seen | found.keys():
            row = found.get((workflow, status))
            self._metrics.set("factmesh_attention", row["n"] if row else 0, workflow, status)
            self._metrics.set("factmesh_attention_seconds", row["oldest_s"] if row else 0, workflow, status)
        self._seen |= found.keys()

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.look()
            except Exception as error:
                if not is_transient(error):
                    raise
            await asyncio.sleep(LOOK_EVERY_S)
