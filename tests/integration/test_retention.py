"""What is kept for how long: the gate, the ledger's days and bytes, and settled rows, on the real tables."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

import factmesh
from factmesh import claims, ids, ledger
from factmesh.postgres import Connection, Migrations, connect, migrate
from factmesh.stack import Stack

pytestmark = pytest.mark.stack

HORIZON_DAYS, AUDIT_DAYS = 14, 400
NOW = datetime.now(UTC)


@pytest.fixture
async def conn(stack: Stack, namespace: str) -> AsyncIterator[Connection]:
    schema = f"{namespace}_kept"
    dsn = await stack.provide_schema(schema)
    await migrate(dsn, schema, [Migrations("factmesh", Path(factmesh.__file__).with_name("migrations"))])
    connection = await connect(dsn, schema=schema, application="test")
    try:
        yield connection
    finally:
        await connection.close()


def days_ago(days: int) -> datetime:
    return NOW - timedelta(days=days)


async def row(conn: Connection, days: int, disposition: str) -> UUID:
    """A ledger row of a day, with emitted bytes, and its line in the gate."""
    at = days_ago(days)
    id_ = ids.entrance_id("test", uuid4().hex, int(at.timestamp() * 1000))
    await ledger.Days().ensure(conn, [at.date()])
    await conn.execute(
        'INSERT INTO ledger (id, disposition, topic, partition, "offset", kind, emitted)'
        " VALUES ($1, $2, 't', 0, 0, 'k', 'e')",
        id_,
        disposition,
    )
    await conn.execute("INSERT INTO gate (hash, ledger_id, first_seen_at) VALUES ($1, $2, $3)", uuid4(), id_, at)
    return id_


async def expire(conn: Connection) -> list[str]:
    return await ledger.expire(conn, NOW, horizon_days=HORIZON_DAYS, audit_days=AUDIT_DAYS)


async def gated(conn: Connection) -> set[UUID]:
    return {r["ledger_id"] for r in await conn.fetch("SELECT ledger_id FROM gate")}


async def test_strangers_ids_live_for_the_horizon_and_dead_ones_longer(conn: Connection) -> None:
    """DESIGN 8: by first sight; an opening must find a `dead` row, however long it took an operator."""
    young, old, dead = await row(conn, 13, "done"), await row(conn, 15, "done"), await row(conn, 100, "dead")
    await expire(conn)
    assert await gated(conn) == {young, dead}
    assert old in {r["id"] for r in await conn.fetch("SELECT id FROM ledger")}


async def test_emitted_bytes_live_for_the_horizon_and_their_rows_for_the_audit(conn: Connection) -> None:
    """DESIGN 8: every receiver remembers ids longer than its sender can emit them again."""
    young, old = await row(conn, 13, "done"), await row(conn, 16, "done")
    assert await expire(conn) == []
    found = {r["id"]: r["emitted"] for r in await conn.fetch("SELECT id, emitted FROM ledger")}
    assert found == {young: b"e", old: None}


async def test_a_day_is_dropped_whole_when_nothing_of_it_is_open(conn: Connection) -> None:
    """DESIGN 8: after the audit period, but never with a quarantined row in it."""
    await row(conn, AUDIT_DAYS + 10, "done")
    dead = await row(conn, AUDIT_DAYS + 5, "dead")
    beside = await row(conn, AUDIT_DAYS + 5, "done")
    last = await row(conn, AUDIT_DAYS - 1, "done")
    assert await expire(conn) == [ledger.partition_name(days_ago(AUDIT_DAYS + 10).date())]
    assert {r["id"] for r in await conn.fetch("SELECT id FROM ledger")} == {dead, beside, last}
    await conn.execute("UPDATE ledger SET disposition = 'discarded' WHERE id = $1", dead)
    assert await expire(conn) == [ledger.partition_name(days_ago(AUDIT_DAYS + 5).date())]
    assert await expire(conn) == []


async def test_settled_rows_live_for_the_horizon_and_unknown_ones_until_somebody_looks(conn: Connection) -> None:
    """DESIGN 8 and 9: nothing that is due, unpublished or unknown is forgotten."""
    old = days_ago(HORIZON_DAYS + 1)
    kept = {}
    for state, due_at, settled_at in (
        ("done", None, old),
        ("failed", None, old),
        ("done", None, NOW),
        ("done", NOW, old),
        ("unknown", None, old),
        ("pending", old, None),
        ("leased", old, None),
    ):
        kept[id_ := uuid4()] = (state, due_at is None, settled_at == old)
        await conn.execute(
            "INSERT INTO claims (id, kind, state, due_at, payload, settled_at) VALUES ($1, 'k', $2, $3, '', $4)",
            id_,
            state,
            due_at,
            settled_at,
        )
    await claims.expire(conn, HORIZON_DAYS)
    left = {r["id"] for r in await conn.fetch("SELECT id FROM claims")}
    assert {kept[i] for i in kept.keys() - left} == {("done", True, True), ("failed", True, True)}
    assert len(left) == 5
