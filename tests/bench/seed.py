"""Fills the services' own tables with copies of what a real run left there, so that they are as large as after months.
Only rows are copied, by set; ids, and whatever is unique, are made new in the shape of the old. Nothing is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

SAMPLE_WORKFLOWS = 1_000
ROWS_A_STATEMENT = 100_000
GROWS_FROM = 0.02
"""Rows a workflow from which on a table counts as one that grows with the work; definitions and marks do not."""

TABLES = """
SELECT c.oid::int AS oid, c.relname AS name FROM pg_class c
 WHERE c.relnamespace = $1::text::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 2"""

COLUMNS = """
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
       EXISTS (SELECT FROM pg_index i
                WHERE i.indrelid = a.attrelid AND i.indisunique AND a.attnum = ANY (i.indkey)) AS is_unique
  FROM pg_attribute a
 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' AND a.attidentity = ''
 ORDER BY a.attnum"""

MOVED = (
    "overlay(overlay(md5({0}::text || k) placing lpad(to_hex(t), 12, '0') || '8' from 1 for 13)"
    " placing '8' from 17 for 1)::uuid"
)
"""An id of ours (UUID version 8, milliseconds first) moved to the instant `t`, with a hash of its own."""


@dataclass(frozen=True)
class _Table:
    """One table that grows: how many rows a workflow leaves, where the sample lies, and what a copy of a row is."""

    name: str
    sample: str
    rows: int
    rows_a_workflow: float
    columns: Sequence[str]
    values: Sequence[str]


class Seeder:
    """Over the schemas of one mesh whose workflows so far are all completed."""

    def __init__(self, dsn: str, schemas: Sequence[str], say: Callable[[str], None]) -> None:
        self._dsn, self._schemas, self._say = dsn, schemas, say
        self._copies = 0

    async def to(self, present: int, wanted: int, *, analyze: bool) -> dict[str, Any]:
        """Rows as of `wanted` workflows, where there are those of `present` real and copied ones.

        With `analyze`, as autovacuum would have done on the way.
        """
        began = time.monotonic()
        rows = sum(await asyncio.gather(*(self._schema(s, present, wanted, analyze) for s in self._schemas)))
        admin: Any = await asyncpg.connect(self._dsn)
        await admin.execute("CHECKPOINT")
        await admin.close()
        took = time.monotonic() - began
        self._say(f"  {rows:,} rows of {wanted - present:,} workflows copied in {took:.0f} s")
        return {"workflows": wanted, "rows": rows, "seconds": round(took, 1)}

    async def _schema(self, schema: str, present: int, wanted: int, analyze: bool) -> int:
        """One service's tables, on a connection of its own."""
        connection: Any = await asyncpg.connect(self._dsn, server_settings={"synchronous_commit": "off"})
        rows = 0
        try:
            for table in await self._tables(connection, schema, present):
                rows += await self._fill(connection, table, wanted - present)
                if analyze:
                    await connection.execute(f"VACUUM (ANALYZE) {table.name}")
                await connection.execute(f"DROP TABLE {table.sample}")
        finally:
            await connection.close()
        return rows

    async def _tables(self, connection: Any, schema: str, present: int) -> list[_Table]:
        found = []
        for row in await connection.fetch(TABLES, schema):
            # In a schema that is there: a new one, a temporary one too, has every session plan everything again.
            name, sample = f'"{schema}"."{row["name"]}"', f'public."seed_{schema}_{row["name"]}"'
            count = await connection.fetchval(f"SELECT count(*) FROM {name}")
            if count / present < GROWS_FROM:
                continue
            limit = max(1, int(SAMPLE_WORKFLOWS * count / present))
            columns = await connection.fetch(COLUMNS, row["oid"])
            # A copied row that is due would be taken for work.
            settled = "WHERE due_at IS NULL" if any(c["name"] == "due_at" for c in columns) else ""
            await connection.execute(f"CREATE UNLOGGED TABLE {sample} AS SELECT * FROM {name} {settled} LIMIT {limit}")
            values = [await self._copy(connection, sample, c) for c in columns]
            if not any(c["is_unique"] and v != _plain(c) for v, c in zip(values, columns, strict=True)):
                await connection.execute(f"DROP TABLE {sample}")
                continue  # nothing in its key can be made new: not a table of workflows
            names = [f'"{c["name"]}"' for c in columns]
            rows = await connection.fetchval(f"SELECT count(*) FROM {sample}")
            if not rows:
                await connection.execute(f"DROP TABLE {sample}")
                continue
            found.append(_Table(name, sample, rows, count / present, names, values))
        return found

    @staticmethod
    async def _copy(connection: Any, sample: str, column: Any) -> str:
        """The expression of one column of copy `k`, which lies at the instant `t` (ms)."""
        name = _plain(column)
        if column["type"] == "uuid":
            ours = await connection.fetchval(f"SELECT bool_and(substr({name}::text, 15, 1) = '8') FROM {sample} s")
            return MOVED.format(name) if ours else f"md5({name}::text || k)::uuid"
        if column["type"] == "text" and (column["is_unique"] or column["name"].endswith("_id")):
            return f"{name} || '-' || k"
        if column["is_unique"] and column["type"] == "bigint":
            return f"{name} + k * 1000000"
        return name

    async def _fill(self, connection: Any, table: _Table, workflows: int) -> int:
        """Copy after copy, oldest first, all between midnight and now: ids lie as they would after a busy day."""
        copies = max(1, round(workflows * table.rows_a_workflow / table.rows))
        now_ms = int(time.time() * 1000)
        midnight_ms = now_ms - now_ms % 86_400_000
        span_ms = int((now_ms - midnight_ms) * 0.9)
        first = self._first_copy(table)
        a_time = max(1, ROWS_A_STATEMENT // table.rows)
        for low in range(0, copies, a_time):
            high = min(low + a_time, copies) - 1
            await connection.execute(
                f"INSERT INTO {table.name} ({', '.join(table.columns)}) SELECT {', '.join(table.values)} "
                f"FROM (SELECT k + {first} AS k, {midnight_ms} + {span_ms} * k / {copies} AS t "
                f"FROM generate_series({low}::bigint, {high}) AS k) AS n CROSS JOIN {table.sample} s"
            )
        return copies * table.rows

    def _first_copy(self, table: _Table) -> int:
        """Copies of a later call must not meet those of an earlier one."""
        self._copies += 10_000_000
        return self._copies


def _plain(column: Any) -> str:
    return f's."{column["name"]}"'
