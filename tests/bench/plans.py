"""What each statement costs a workflow on a young database and on a grown one: a plan that went bad shows here.
The server itself tells durations, in its log, for some seconds; the log and the tables' counters are read, not judged.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg

FACTOR = 3.0
FLOOR_MS = 0.05
FLOOR_BLOCKS = 50.0
"""A statement, or a table, went bad when its cost a workflow is `FACTOR` times what it was, and no trifle."""

FLUSH_S = 1.5
"""A backend tells its counters at most once a second."""

TOUCHED = """
SELECT t.schemaname || '.' || regexp_replace(t.relname, '_\\d{8}$', '_<day>') AS name,
       sum(t.seq_scan)::bigint AS scans, sum(t.seq_tup_read + coalesce(t.idx_tup_fetch, 0))::bigint AS rows,
       sum(b.heap_blks_hit + b.heap_blks_read + coalesce(b.idx_blks_hit + b.idx_blks_read, 0))::bigint AS blocks
  FROM pg_stat_user_tables t JOIN pg_statio_user_tables b USING (relid)
 WHERE t.schemaname LIKE $1 GROUP BY 1"""

_LINE = re.compile(r"^(?P<role>\S*)\|LOG: +duration: (?P<ms>[\d.]+) ms(?: +\w+ [^:]*: | +statement: )(?P<sql>.*)$")
_SETTINGS = {"log_min_duration_statement": "0", "log_parameter_max_length": "0", "log_line_prefix": "'%u|'"}


@dataclass(frozen=True)
class Touch:
    """What was read of each table since the server began, and where its log ends."""

    tables: Mapping[str, Mapping[str, int]]
    log_bytes: int


class Observer:
    """Over the schemas of one mesh, whose names begin with `prefix`."""

    def __init__(self, dsn: str, log: Path, prefix: str) -> None:
        self._dsn, self._log, self._prefix = dsn, log, prefix

    async def begin(self) -> Touch:
        """Durations are logged from here on."""
        connection: Any = await asyncpg.connect(self._dsn)
        for name, value in _SETTINGS.items():
            await connection.execute(f"ALTER SYSTEM SET {name} = {value}")
        await connection.execute("SELECT pg_reload_conf()")
        await asyncio.sleep(FLUSH_S)
        touched = await self._touched(connection)
        await connection.close()
        return touched

    async def end(self, before: Touch, workflows: int) -> dict[str, Any]:
        """What each statement took and each table was touched, a workflow; nothing is logged any more."""
        await asyncio.sleep(FLUSH_S)
        connection: Any = await asyncpg.connect(self._dsn)
        for name in _SETTINGS:
            await connection.execute(f"ALTER SYSTEM RESET {name}")
        await connection.execute("SELECT pg_reload_conf()")
        after = await self._touched(connection)
        await connection.close()
        tables = {}
        for name, counts in after.tables.items():
            was = before.tables.get(name, {})
            tables[name] = {k: round((v - was.get(k, 0)) / workflows, 3) for k, v in counts.items()}
        statements = await asyncio.to_thread(self._statements, before.log_bytes, after.log_bytes)
        for spent in statements.values():
            spent["ms"] = round(spent["ms"] / workflows, 5)
        return {"workflows": workflows, "statements": statements, "tables": tables}

    async def _touched(self, connection: Any) -> Touch:
        rows = await connection.fetch(TOUCHED, self._prefix.replace("_", "\\_") + "%")
        tables = {r["name"].removeprefix(self._prefix): {k: r[k] for k in ("scans", "rows", "blocks")} for r in rows}
        return Touch(tables, self._log.stat().st_size)

    def _statements(self, start: int, end: int) -> dict[str, dict[str, Any]]:
        """By role and text: calls, and milliseconds of parsing, binding and running together."""
        with self._log.open("rb") as log:
            log.seek(start)
            text = log.read(end - start).decode("utf-8", errors="replace")
        found: dict[str, dict[str, Any]] = {}
        for whole in re.sub(r"\n\t", " ", text).splitlines():
            match = _LINE.match(whole)
            if match is None or not match["role"].startswith(self._prefix):
                continue
            sql = " ".join(match["sql"].split())
            spent = found.setdefault(f"{match['role'].removeprefix(self._prefix)}: {sql}", {"calls": 0, "ms": 0.0})
            spent["ms"] += float(match["ms"])
            spent["calls"] += " execute " in whole or " statement: " in whole
        return found


def gone_bad(young: Mapping[str, Any], grown: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Statements and tables whose cost grew by more than the factor, the worst first.

    A statement's both a workflow and a call: batches may differ, and what runs by the clock is no workflow's. If all of
    them got slower, the machine did: that much is taken off.
    """
    out: list[dict[str, Any]] = []
    both = [(w, young["statements"][w], s) for w, s in grown["statements"].items() if w in young["statements"]]
    # The wait for the disk is no plan's.
    both = [b for b in both if not b[0].split(": ", 1)[-1].upper().startswith(("COMMIT", "BEGIN"))]
    calls = {w: _a_call(now, grown) / max(_a_call(was, young), 1e-6) for w, was, now in both}
    slower = max(1.0, median(calls.values())) if calls else 1.0
    for what, was, now in both:
        dearer = now["ms"] > FACTOR * slower * was["ms"] and calls[what] > FACTOR * slower
        if dearer and now["ms"] - was["ms"] > FLOOR_MS:
            out.append({"what": what, "unit": "ms", "young": was["ms"], "grown": now["ms"]})
    for what, now in grown["tables"].items():
        blocks = young["tables"].get(what, {}).get("blocks", 0.0)
        if now["blocks"] - blocks > FLOOR_BLOCKS and now["blocks"] > FACTOR * blocks:
            out.append({"what": what, "unit": "blocks", "young": blocks, "grown": now["blocks"]})
    return sorted(out, key=lambda o: -float(o["grown"]) / max(float(o["young"]), 1e-3))


def _a_call(spent: Mapping[str, Any], when: Mapping[str, Any]) -> float:
    return float(spent["ms"]) * int(when["workflows"]) / max(1, int(spent["calls"]))
