"""Set-based saves and the one read of intake's own tables, `store.sql` beside it. Nothing is decided here.
The rows are written by guarded upserts, so that nothing has to be loaded and locked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from uuid import UUID

from factmesh import dlq, ids
from factmesh.batch import Change, Dead
from factmesh.effects import Publish
from factmesh.errors import FactmeshError, Reason, reason_of
from factmesh.message import Message, from_ms
from factmesh.postgres import Connection, Pool, Record, load_sql
from factmesh_intake.events import identity_of
from factmesh_intake.model import Desk, Incoming, Progress, Seen

SQL = load_sql(__file__, "store.sql")
FORGET_MAX = 1_000
"""Rows removed in one statement, so that retention never holds locks for long."""


async def save_facts(conn: Connection, changes: Sequence[Change[Desk]]) -> None:
    """Accepted facts become visible in the transaction that emits them."""
    rows: dict[str, Progress] = {}
    for change in changes:
        for message, effects in change.steps:
            for effect in effects:
                if isinstance(effect, Publish):
                    row = _accepted(message["incoming"], effect)
                    rows[row.correlation_id] = row
    await _put(conn, rows)


def _accepted(incoming: Incoming, publish: Publish) -> Progress:
    body = publish.body
    return Progress(
        correlation_id=body["correlation_id"],
        source=incoming.source,
        source_id=incoming.id,
        type=incoming.type,
        stage="accepted",
        business_object_type=body["business_object_type"],
        business_object_id=body["business_object_id"],
        due_by=from_ms(body["due_by"]) if body["due_by"] is not None else None,
    )


async def save_dead(conn: Connection, dead: Sequence[Dead]) -> None:
    """Quarantined facts become visible too, where their sender's id can be told.

    A conflict says nothing of the fact that is in force under that id, so it changes no row.
    """
    rows: dict[str, Progress] = {}
    for one in dead:
        row = _quarantined(one)
        if row is not None:
            rows[row.correlation_id] = row
    await _put(conn, rows)


def _quarantined(dead: Dead) -> Progress | None:
    reason = reason_of(dead.error)
    if reason is Reason.CONFLICT:
        return None
    if dead.message is not None:
        incoming: Incoming = dead.message["incoming"]
        source, source_id, type_ = incoming.source, incoming.id, incoming.type
    else:
        identity = identity_of(dead.delivery)
        if identity is None:
            return None
        source, source_id = identity
        type_ = dead.delivery.header("ce_type") or "unknown"
    text = dead.error.message if isinstance(dead.error, FactmeshError) else "an error of ours"
    return Progress(
        correlation_id=str(ids.correlation_id(source, source_id)),
        source=dlq.clean(source),
        source_id=dlq.clean(source_id),
        type=dlq.clean(type_),
        stage="quarantined",
        reason=dlq.clean(f"{reason}: {text}"),
    )


async def _put(conn: Connection, rows: Mapping[str, Progress]) -> None:
    if not rows:
        return
    order = [rows[i] for i in sorted(rows)]
    await conn.execute(
        SQL.put_progress,
        [r.correlation_id for r in order],
        [r.source for r in order],
        [r.source_id for r in order],
        [r.type for r in order],
        [r.stage for r in order],
        [r.business_object_type for r in order],
        [r.business_object_id for r in order],
        [r.due_by for r in order],
        [r.reason for r in order],
    )


async def save_status(conn: Connection, changes: Sequence[Change[None]]) -> None:
    """What instances say of themselves, the highest sequence number of each: the others are not looked at further."""
    latest: dict[tuple[str, str], Message] = {}
    for change in changes:
        for message, _ in change.steps:
            record = message.record
            key = (record["correlation_id"], record["instance_id"])
            known = latest.get(key)
            if known is None or known.record["instance_seq"] < record["instance_seq"]:
                latest[key] = message
    if not latest:
        return
    order = [seen_in(latest[key]) for key in sorted(latest)]
    await conn.execute(
        SQL.put_instances,
        [s.correlation_id for s in order],
        [s.instance_id for s in order],
        [s.instance_seq for s in order],
        [s.workflow for s in order],
        [s.status for s in order],
        [s.step for s in order],
        [s.next_step for s in order],
        [s.outcome for s in order],
        [s.reason for s in order],
        [s.due_by for s in order],
    )


def seen_in(message: Message) -> Seen:
    """What a status record says."""
    due_by = message["due_by"]
    return Seen(
        correlation_id=message["correlation_id"],
        instance_id=message["instance_id"],
        instance_seq=message["instance_seq"],
        workflow=message["workflow"],
        status=message["status"],
        step=message["step"],
        next_step=message["next_step"],
        outcome=message["outcome"],
        reason=message["reason"],
        due_by=from_ms(due_by) if due_by is not None else None,
    )


async def progress_of(pool: Pool, correlation_id: UUID) -> Sequence[Record]:
    """The rows of `get_progress`; empty for a fact that nobody has seen yet."""
    return await pool.fetch(SQL.get_progress, correlation_id)


async def forget(pool: Pool, before: date) -> int:
    """Remove what entered before that day, a bounded piece at a time; how much it was."""
    total = 0
    for query in (SQL.forget_progress, SQL.forget_instances):
        while True:
            gone = int(await pool.fetchval(query, before, FORGET_MAX))
            total += gone
            if gone < FORGET_MAX:
                break
    return total


def iso(instant: datetime | None) -> str | None:
    """RFC 3339 in UTC, as answers carry instants."""
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z") if instant is not None else None
