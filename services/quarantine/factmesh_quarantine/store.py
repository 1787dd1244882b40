"""Set-based load and save of threads and their records; every write comes from a load under the thread's lock (INV-F).
The statements stand in `store.sql`; what a death means is decided in `decide`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from factmesh.message import pack_delivery
from factmesh.postgres import Connection, load_sql
from factmesh_quarantine.decide import file
from factmesh_quarantine.model import Death, Filed, Filing, Numbers, State, Thread

SQL = load_sql(__file__, "store.sql")
INDEX = "quarantine index"


async def load(conn: Connection, deaths: Sequence[Death], now: datetime) -> dict[UUID, Thread]:
    """The threads of these deaths, locked, creating absent ones."""
    wanted = sorted({d.thread for d in deaths})
    await conn.execute(SQL.enter_threads, wanted)
    threads = {r["id"]: Thread(r["id"], now, r["counter"]) for r in await conn.fetch(SQL.lock_threads, wanted)}
    records: dict[UUID, dict[UUID, Numbers]] = {t: {} for t in threads}
    for r in await conn.fetch(SQL.read_records, wanted):
        records[r["thread"]][r["id"]] = Numbers(State(r["state"]), r["raised"], r["published"], r["dead"])
    openings: dict[UUID, dict[int, UUID]] = {t: {} for t in threads}
    for r in await conn.fetch(SQL.read_openings, wanted):
        openings[r["thread"]].setdefault(r["number"], r["record"])
    known = frozenset(r["id"] for r in await conn.fetch(SQL.read_deaths, [d.id for d in deaths]))
    return {t: replace(threads[t], records=records[t], openings=openings[t], deaths=known) for t in sorted(threads)}


async def save(conn: Connection, threads: Iterable[Thread]) -> int:
    """What filing changed, in this transaction. Returns how many deaths were new to the index."""
    changed = [t for t in threads if t.filed]
    filed = [(t, f) for t in changed for f in t.filed]
    if not filed:
        return 0
    now = changed[0].at
    await conn.execute(SQL.save_threads, [t.id for t in changed], [t.counter for t in changed])
    new = [_row(t, f, now) for t, f in filed if f.how is Filing.NEW]
    if new:
        await conn.executemany(SQL.insert_records, new)
    again = [_change(t, f, now) for t, f in filed if f.how is Filing.AGAIN]
    if again:
        await conn.executemany(SQL.update_records, again)
    await conn.execute(
        SQL.insert_deaths,
        [f.death.id for _, f in filed],
        [f.record for _, f in filed],
        [f.death.number for _, f in filed],
        [f.death.at.topic for _, f in filed],
        [f.death.at.partition for _, f in filed],
        [f.death.at.offset for _, f in filed],
    )
    events = [e for t in changed for e in t.history]
    await conn.execute(
        SQL.insert_history,
        [e.record for e in events],
        now,
        INDEX,
        [e.event for e in events],
        [e.number for e in events],
        [e.before for e in events],
        [e.after for e in events],
        [e.detail for e in events],
    )
    numbered = [f.death for _, f in filed if f.death.number > 0]
    if numbered:
        await conn.execute(SQL.mark_acts_dead, [d.thread for d in numbered], [d.number for d in numbered], now)
    return len(filed)


async def save_progress(conn: Connection, deaths: Iterable[Death]) -> None:
    """Every offset below these is filed as well: partitions are read in order, and each batch from where one ended."""
    ends: dict[tuple[str, int], int] = {}
    for d in deaths:
        at = (d.at.topic, d.at.partition)
        ends[at] = max(ends.get(at, 0), d.at.offset + 1)
    await conn.execute(SQL.save_progress, [t for t, _ in ends], [p for _, p in ends], list(ends.values()))


async def file_all(conn: Connection, deaths: Sequence[Death], now: datetime) -> int:
    """File deaths in one transaction of the caller: load, decide, save, for readers without the batch loop."""
    state = await load(conn, deaths, now)
    for death in deaths:
        state[death.thread] = file(state[death.thread], death)
    new = await save(conn, state.values())
    await save_progress(conn, deaths)
    return new


def _row(thread: Thread, filed: Filed, now: datetime) -> tuple[object, ...]:
    death, dead = filed.death, filed.death.dead
    n, o = thread.records[filed.record], dead.original
    # Several deaths of one record in one batch: the row is inserted as the first left it, updates follow.
    first = Numbers(State.OPEN, death.number, death.number, death.number) if n.raised != death.number else n
    owner = f"workflow:{death.workflow}" if death.workflow else f"service:{death.service}"
    return (
        filed.record, thread.id, dead.root.encode(), dead.group, first.state, first.raised, first.published, first.dead,
        owner, o.topic, o.partition, o.offset, dead.reason, dead.error_class, dead.stage, dead.step,
        dead.exception_type, dead.fingerprint, dead.message, dead.stack, dead.attempts, death.service,
        dead.service_version, dead.first_failed_at, dead.failed_at, dead.instance_id, dead.correlation_id,
        dead.trace_id, dead.command_id, dead.business_object_type, dead.business_object_id, death.kind,
        death.workflow, pack_delivery(o), now,
    )  # fmt: skip


def _change(thread: Thread, filed: Filed, now: datetime) -> tuple[object, ...]:
    death, dead = filed.death, filed.death.dead
    n = thread.records[filed.record]
    return (
        filed.record, n.state, n.raised, n.published, n.dead, dead.message, dead.failed_at, now, dead.error_class,
        dead.exception_type, dead.stage, dead.stack, dead.attempts, dead.fingerprint, not death.is_resolution,
        dead.reason, dead.original.partition, dead.original.offset, dead.step, dead.instance_id, dead.command_id,
        dead.original.topic,
    )  # fmt: skip
