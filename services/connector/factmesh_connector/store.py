"""Set-based load and save of what commands and resolutions are decided over: keys, rows, ledger dispositions.
The SQL is in `store.sql`; the ledger's and the claims' statements stay their modules' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from uuid import UUID

from factmesh import claims, ids, ledger
from factmesh.batch import Change
from factmesh.claims import Along, Claimed, ClaimRow
from factmesh.message import Message
from factmesh.postgres import Connection, is_unique_violation, load_sql
from factmesh_connector.attempt import Made
from factmesh_connector.model import History, Key, Row, State, unpack_task

SQL = load_sql(__file__, "store.sql")
#: A bound on memory only: what is dropped is tried the other way first.
LOOKED_FOR_MAX = 10_000


class Store:
    """What one handler loads and saves.

    A fresh command nearly always brings a key that nobody holds. So keys are not looked for: they are inserted, and
    one that is held raises the unique violation, upon which the batch is run again and every key of it is read and
    locked first. Safety lies in the table's constraint; what is remembered here only says which way is tried first.
    """

    def __init__(self) -> None:
        self._looked_for: set[str] = set()

    async def load(self, conn: Connection, messages: Sequence[Message], now: datetime) -> Mapping[str, State]:
        """What the messages are about, locked: keys first, then rows, each sorted."""
        states: dict[str, State] = {}
        resolved = {UUID(m["command_id"]) for m in messages if m.kind == "resolution"}
        wanted = {
            key
            for m in messages
            if m.kind == "command" and ((key := m["idempotency_key"]) in self._looked_for or m.opening > 0)
        }
        keys = await conn.fetch(SQL.lock_keys, sorted(wanted)) if wanted else []
        about = sorted(resolved | {key["command_id"] for key in keys})
        rows: Mapping[UUID, ClaimRow] = await claims.lock(conn, about) if about else {}
        for key in keys:
            holder = rows.get(key["command_id"])
            failed = holder is not None and holder.state == "failed"
            states[f"key:{key['idempotency_key']}"] = State(key=Key(key["command_id"], key["body_hash"], failed))
        absent = sorted(id_ for id_ in resolved if id_ not in rows)
        dispositions: dict[UUID, str] = {}
        if absent:
            dispositions = {r["id"]: r["disposition"] for r in await conn.fetch(ledger.SQL.read_rows, absent)}
        for id_ in resolved:
            row = rows.get(id_)
            states[f"row:{id_}"] = State(row=None if row is None else _row(row), disposition=dispositions.get(id_))
        return states

    async def save(self, conn: Connection, changes: Sequence[Change[State]]) -> None:
        """Keys that changed hands; rows are changed by the effects, by the library."""
        fresh: list[tuple[str, Key]] = []
        passed: list[tuple[str, Key]] = []
        for change in changes:
            before = change.before.key if change.before is not None else None
            after = change.after.key
            if after is not None and after != before:
                (fresh if before is None else passed).append((change.key.removeprefix("key:"), after))
        if passed:
            await conn.execute(SQL.pass_keys, *_columns(passed))
        if not fresh:
            return
        try:
            await conn.execute(SQL.insert_keys, *_columns(fresh))
        except Exception as error:
            if is_unique_violation(error):
                if len(self._looked_for) > LOOKED_FOR_MAX:
                    self._looked_for.clear()
                self._looked_for.update(key for key, _ in fresh)
            raise
        if self._looked_for:
            self._looked_for.difference_update(key for key, _ in fresh)


def _columns(keys: Sequence[tuple[str, Key]]) -> tuple[list[str], list[UUID], list[bytes]]:
    return [i for i, _ in keys], [k.command_id for _, k in keys], [k.body_hash for _, k in keys]


def _row(row: ClaimRow) -> Row:
    task, _ = unpack_task(row.payload)
    return Row(row.state, row.epoch, task, History.from_bytes(row.progress), row.lease_ended_at)


def save_calls(settled: Sequence[tuple[Claimed, Made]]) -> Along:
    """Every call of these attempts with its duration (C7), appended by the statement that settles them."""
    lines = [
        (row.id, row.epoch, n, made.operation, call)
        for row, made in settled
        for n, call in enumerate(made.calls)
    ]
    args = (
        [line[0] for line in lines],
        [line[1] for line in lines],
        [line[2] for line in lines],
        [line[3] for line in lines],
        [line[4].what for line in lines],
        [line[4].at for line in lines],
        [line[4].ms for line in lines],
        [line[4].ended for line in lines],
    )
    return Along(SQL.insert_calls, args)


async def expire(conn: Connection, first_kept: date) -> None:
    """Keys and calls go with the audit period, by the day in their ids."""
    bound = ids.first_id_of(first_kept)
    await conn.execute(SQL.expire_keys, bound)
    await conn.execute(SQL.expire_calls, bound)
