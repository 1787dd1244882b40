"""What the ledger forgets, and what it never may (DESIGN 8)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from tests.support import kernel, toy

from factmesh import claims, ids, ledger
from factmesh.ids import Root
from factmesh.ledger import Row
from factmesh.message import Emission, pack
from factmesh.postgres import Connection
from factmesh.service import open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack

NOW = datetime.now(UTC)


def id_of(days_ago: float, name: str) -> UUID:
    return ids.entrance_id("t", name, int((NOW - timedelta(days=days_ago)).timestamp() * 1000))


async def put(conn: Connection, days: ledger.Days, days_ago: float, disposition: str) -> UUID:
    """One ledger row of that day that emitted something."""
    id_ = id_of(days_ago, disposition)
    await days.ensure(conn, {ids.day_of(id_)})
    emitted = pack([Emission("t", b"k", b"v")])
    await ledger.insert(conn, [Row(id_, None, 0, disposition, None, None, "t", 0, 0, None, "k", emitted=emitted)])
    return id_


async def test_days_go_whole_and_only_when_nothing_in_them_is_open(stack: Stack, namespace: str) -> None:
    """DESIGN 8: after the audit period; a day with a quarantined or unfinished row stays, however old it is."""
    async with open_service(toy.service(), await toy.settings(stack, namespace), http=False) as running:
        async with running.context.pool.acquire() as conn:
            days = ledger.Days()
            kept = {
                await put(conn, days, 30, "done"),
                await put(conn, days, 399, "done"),
                await put(conn, days, 410, "dead"),
                await put(conn, days, 411, "claimed"),
            }
            gone = {await put(conn, days, 401.5, "done"), await put(conn, days, 420, "discarded")}
            dropped = await ledger.expire(conn, NOW, horizon_days=14, audit_days=400)
            assert dropped == sorted(ledger.partition_name(ids.day_of(i)) for i in gone)
        assert {r["id"] for r in await kernel.ledger_rows(running)} == kept


async def test_emitted_bytes_live_for_the_horizon_and_rows_longer(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 8: a receiver remembers ids longer than its sender can emit them again; each statement takes a part."""
    monkeypatch.setattr(ledger, "EMPTY_ROWS_MAX", 2)
    async with open_service(toy.service(), await toy.settings(stack, namespace), http=False) as running:
        async with running.context.pool.acquire() as conn:
            days = ledger.Days()
            old = {await put(conn, days, 16 + n / 1000, d) for n in range(2) for d in ("done", "dead", "discarded")}
            young = await put(conn, days, 13, "done")
            emptied: set[str] = set()
            await ledger.expire(conn, NOW, horizon_days=14, audit_days=400, emptied=emptied)
        kept = {r["id"]: r["emitted"] is not None for r in await kernel.ledger_rows(running)}
        assert kept == {**dict.fromkeys(old, False), young: True}
        assert emptied == {ledger.partition_name(ids.day_of(id_)) for id_ in old}


async def test_the_gate_never_lets_a_stranger_in_twice(stack: Stack, namespace: str) -> None:
    """⚑ DESIGN 8: by first sight, over the whole horizon; a dead one stays, for an opening must find it."""
    async with open_service(toy.service(), await toy.settings(stack, namespace), http=False) as running:
        async with running.context.pool.acquire() as conn:
            days = ledger.Days()
            cases = {"young": (13.0, "done"), "edge": (14.01, "done"), "old": (15.5, "done"), "dead": (300.0, "dead")}
            first = {}
            for name, (days_ago, disposition) in cases.items():
                row = await put(conn, days, days_ago, disposition)
                await ledger.enter_fresh(conn, {f"ce:1:s:{name}": row})
                await conn.execute(
                    "UPDATE gate SET first_seen_at = $2 WHERE ledger_id = $1", row, NOW - timedelta(days=days_ago)
                )
                first[f"ce:1:s:{name}"] = row
            await ledger.expire(conn, NOW, horizon_days=14, audit_days=400)
            again = await ledger.resolve(conn, [Root(text) for text in first], NOW)
        # `edge` is a fact whose instant lay minutes ahead when it was first seen: intake would still take it for new.
        forgotten = [text for text, row in first.items() if again[text] != row]
        assert forgotten == ["ce:1:s:old"]


async def test_settled_rows_go_and_unknown_or_unpublished_ones_stay(stack: Stack, namespace: str) -> None:
    """DESIGN 9: an unknown outcome waits for its person, one that is not published for its replica."""
    async with open_service(toy.service(), await toy.settings(stack, namespace), http=False) as running:
        states = [("done", True), ("failed", True), ("unknown", True), ("done", False), ("pending", False)]
        async with running.context.pool.acquire() as conn:
            for n, (state, published) in enumerate(states):
                await conn.execute(
                    "INSERT INTO claims (id, kind, state, due_at, payload, settled_at)"
                    " VALUES ($1, 'x', $2, $3, '', $4)",
                    UUID(int=n),
                    state,
                    None if published else NOW,
                    NOW - timedelta(days=30),
                )
            await claims.expire(conn, 14)
        assert {r["id"].int for r in await kernel.claims_rows(running)} == {2, 3, 4}
