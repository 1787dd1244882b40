"""A connection that a loop holds may be ended by the server at any instant; the loop gets another, and goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from factmesh import postgres
from factmesh.held import Held
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


@pytest.mark.parametrize("wait_s", [0.0, 0.001, 0.05], ids=["at once", "soon", "after it is noticed"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in a transaction"])
@pytest.mark.parametrize("then", ["get", "give back"])
async def test_a_held_connection_that_the_server_ends(
    stack: Stack, namespace: str, then: str, busy: bool, wait_s: float
) -> None:
    """G7: neither asking for it nor giving it back is an error then; another one is got, and works."""
    schema = f"{namespace}held"
    pool = await postgres.create_pool(await stack.provide_schema(schema), schema=schema, size_max=2)
    held = Held(pool)
    try:
        for _ in range(3):
            conn: Any = await held.get()
            pid = await conn.fetchval("SELECT pg_backend_pid()")
            if busy:
                await conn.execute("BEGIN")
            async with pool.acquire() as other:
                await other.fetchval("SELECT pg_terminate_backend($1)", pid)
            await asyncio.sleep(wait_s)
            if then == "give back":
                await held.give_back()
            again = None
            for _ in range(20):  # until it is noticed, a statement meets the end: transient, and tried again
                try:
                    again = await (await held.get()).fetchval("SELECT pg_backend_pid()")
                    break
                except Exception as error:
                    if not postgres.is_transient(error):
                        raise
                    await held.give_back()
            assert again not in (None, pid)
            await held.give_back()
    finally:
        await asyncio.wait_for(pool.close(), 10)
