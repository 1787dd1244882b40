"""Set-based load and save: rows that resolutions are about, instances whose owners are told, the log of attempts.
The SQL is in `store.sql`; the ledger's and the claims' statements stay their modules' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from uuid import UUID

from factmesh import claims, ids, ledger
from factmesh.batch import Change
from factmesh.claims import Along, Claimed, ClaimRow
from factmesh.message import Message
from factmesh.postgres import Connection, load_sql
from factmesh_notifier.model import History, Row, Sent, State, Watched, unpack_task

SQL = load_sql(__file__, "store.sql")


async def load(conn: Connection, messages: Sequence[Message], now: datetime) -> Mapping[str, State]:
    """The rows that resolutions are about, locked; of absent ones, what the ledger says."""
    wanted = sorted({UUID(m["command_id"]) for m in messages if m.kind == "resolution"})
    if not wanted:
        return {}
    rows = await claims.lock(conn, wanted)
    absent = [id_ for id_ in wanted if id_ not in rows]
    dispositions: dict[UUID, str] = {}
    if absent:
        dispositions = {r["id"]: r["disposition"] for r in await conn.fetch(ledger.SQL.read_rows, absent)}
    return {f"row:{id_}": State(_row(rows.get(id_)), dispositions.get(id_)) for id_ in wanted}


def _row(row: ClaimRow | None) -> Row | None:
    if row is None:
        return None
    task, _ = unpack_task(row.payload)
    return Row(row.kind, row.state, task, History.from_bytes(row.progress), row.lease_ended_at)


async def save(conn: Connection, changes: Sequence[Change[State]]) -> None:
    """Nothing: rows are changed by the effects, by the library."""


async def load_watched(
    key: Callable[[Message], str], conn: Connection, messages: Sequence[Message], now: datetime
) -> Mapping[str, Watched]:
    """What was seen of the instances that have a rule, locked, creating absent ones."""
    wanted = sorted({UUID(k) for m in messages if (k := key(m))})
    if not wanted:
        return {}
    await conn.execute(SQL.enter_watched, wanted)
    return {str(r["instance_id"]): Watched(r["seq"]) for r in await conn.fetch(SQL.lock_watched, wanted)}


async def save_watched(conn: Connection, changes: Sequence[Change[Watched]]) -> None:
    """The numbers that rose."""
    risen = [(UUID(c.key), c.after.seq) for c in changes if c.key and c.after != c.before]
    if risen:
        await conn.execute(SQL.save_watched, [i for i, _ in risen], [n for _, n in risen])


def save_sends(settled: Sequence[tuple[Claimed, Sent]]) -> Along:
    """These attempts, appended by the statement that settles them."""
    args = (
        [row.id for row, _ in settled],
        [row.epoch for row, _ in settled],
        [sent.channel for _, sent in settled],
        [sent.template for _, sent in settled],
        [sent.recipients for _, sent in settled],
        [sent.recipients_hash for _, sent in settled],
        [sent.at for _, sent in settled],
        [sent.ms for _, sent in settled],
        [sent.ended for _, sent in settled],
    )
    return Along(SQL.insert_sends, args)


async def expire(conn: Connection, first_kept: date) -> None:
    """Both tables go with the audit period, by the day in their ids."""
    bound = ids.first_id_of(first_kept)
    await conn.execute(SQL.expire_sends, bound)
    await conn.execute(SQL.expire_watched, bound)
