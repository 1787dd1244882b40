"""What people ask the index: lists, groups, one record's story, and the figures of recovery. Reads only.
The tool and the console show the same answers; nothing here changes a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh.errors import ValidationError
from factmesh.ids import canonical_json
from factmesh.postgres import Pool, Record, load_sql
from factmesh_quarantine.model import OPEN_STATES, State

SQL = load_sql(__file__, "queries.sql")
ROWS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records; what is None does not filter."""

    ids: tuple[UUID, ...] | None = None
    topic: str | None = None
    reason: str | None = None
    fingerprint: str | None = None
    instance: UUID | None = None
    states: tuple[State, ...] | None = tuple(sorted(OPEN_STATES))
    since: datetime | None = None
    workflow: str | None = None
    owner: str | None = None

    def arguments(self, limit: int) -> tuple[Any, ...]:
        return (
            None if self.ids is None else list(self.ids),
            self.topic,
            self.reason,
            self.fingerprint,
            self.instance,
            None if self.states is None else [str(s) for s in self.states],
            self.since,
            self.workflow,
            self.owner,
            limit,
        )

    @property
    def text(self) -> str:
        """For the audit: the filter as JSON."""
        return canonical_json({k: _plain(v) for k, v in asdict(self).items() if v is not None}).decode()

    @property
    def is_open_only(self) -> bool:
        return self.states is not None and set(self.states) <= OPEN_STATES


def _plain(value: object) -> object:
    return [str(v) for v in value] if isinstance(value, tuple) else str(value)


async def list_records(pool: Pool, wanted: Filter, limit: int = ROWS_MAX) -> Sequence[Record]:
    return await pool.fetch(SQL.list, *wanted.arguments(limit))


async def list_groups(pool: Pool, wanted: Filter, limit: int = ROWS_MAX) -> Sequence[Record]:
    return await pool.fetch(SQL.groups, *wanted.arguments(limit))


async def find(pool: Pool, prefix: str) -> UUID:
    """The one record whose id begins so. Raises ValidationError for none and for several."""
    rows = await pool.fetch(SQL.by_prefix, prefix.lower())
    if len(rows) != 1:
        what = "no record has" if not rows else "several records have"
        raise ValidationError(f"{what} an id that begins {prefix!r}", hint="`factmesh dlq list` shows the ids")
    found: UUID = rows[0]["id"]
    return found


async def story(pool: Pool, record: UUID) -> tuple[Sequence[Record], Sequence[Record]]:
    """History and acts of one record."""
    return await pool.fetch(SQL.history, record), await pool.fetch(SQL.acts, record)


async def stats(pool: Pool, since: datetime | None) -> dict[str, Any]:
    """The figures of E3: states by owner, replay success, mean time to recovery."""
    owners: dict[str, dict[str, int]] = {}
    for row in await pool.fetch(SQL.owners):
        owners.setdefault(row["owner"], {})[row["state"]] = row["records"]
    success, recovery = await pool.fetchrow(SQL.success, since), await pool.fetchrow(SQL.recovery, since)
    assert success is not None
    assert recovery is not None
    published, died = success["published"] - success["due"], success["died"]
    return {
        "owners": owners,
        "replays": {
            "published": published,
            "failed_again": died,
            "due": success["due"],
            "success_rate": None if not published else (published - died) / published,
        },
        "recovery": {k: recovery[k] for k in ("records", "mean_s", "median_s", "longest_s")},
    }
