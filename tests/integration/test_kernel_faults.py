"""What breaks while a batch is in hand: the database, a handler, one message, the process. Nothing lost, none twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from pydantic import SecretStr
from tests.support import kernel, toy
from tests.support.waiting import until

from factmesh.batch import Change
from factmesh.effects import Amend, Effect
from factmesh.errors import TransientError
from factmesh.message import Emission, Message
from factmesh.postgres import Connection
from factmesh.service import Running, open_service
from factmesh.stack import Stack

pytestmark = pytest.mark.stack


async def ordered(stack: Stack, namespace: str, *names: str, **body: Any) -> None:
    """These objects' messages lie in one partition before the service starts: they come as one batch."""

    def make(running: Running) -> list[Emission]:
        return [replace(toy.asking(running, "result", n, do="count", **body), key=b"p") for n in names]

    await kernel.send(stack, await kernel.make_topics(stack, namespace, make))


async def test_an_unknown_commit_outcome_is_found_out(stack: Stack, namespace: str) -> None:
    """DESIGN 3, INV-X, INV-L: cut off after the COMMIT, the batch is repeated: no effect twice, each one published."""
    names = [f"o{n}" for n in range(20)]
    await ordered(stack, namespace, *names)
    settings = await toy.settings(stack, namespace)
    async with kernel.Proxy(settings.postgres_dsn.get_secret_value()).running() as proxy:
        behind = settings.model_copy(update={"postgres_dsn": SecretStr(proxy.dsn)})
        saves = 0

        async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
            nonlocal saves
            saves += 1
            if saves == 1:
                proxy.cut_after_commits = 1
            await toy.save(conn, changes)

        async with open_service(toy.service(save=save), behind) as running:
            await kernel.idle(running)
            assert proxy.cuts == 1
            assert await toy.counts(running) == dict.fromkeys(names, 1)
            statuses = toy.decoded(running, await kernel.on_topic(running, "status"))
            assert len({m.id for m in statuses}) == len(statuses) == 20
            assert {r["disposition"] for r in await kernel.ledger_rows(running)} == {"done"}


async def test_a_database_that_goes_away_and_comes_back(stack: Stack, namespace: str) -> None:
    """INV-L: both loops wait and go on by themselves; nothing is dead, nothing twice; the claim loop settles on."""
    settings = await toy.settings(stack, namespace)
    async with kernel.Proxy(settings.postgres_dsn.get_secret_value()).running() as proxy:
        behind = settings.model_copy(update={"postgres_dsn": SecretStr(proxy.dsn)})
        toil = toy.Toil(lease_s=3.0)
        async with open_service(toy.service(toil), behind) as running:
            for round_ in range(3):
                sent = [toy.asking(running, "result", f"o{n}", do=d) for n in range(10) for d in ("count", "work")]
                await running.context.publisher.publish(sent)
                await asyncio.sleep(0.1 * round_)
                proxy.down = True
                proxy.cut_all()
                await asyncio.sleep(0.7)
                proxy.down = False
            await kernel.idle(running)

            async def settled() -> bool:
                rows = await kernel.claims_rows(running)
                return len(rows) == 30 and all(r["state"] == "done" and not r["unpublished"] for r in rows)

            await until("every row is settled and published", settled, timeout_s=60)
            assert await toy.counts(running) == {f"o{n}": 6 for n in range(10)}
            assert await kernel.dead_of(running) == []
            assert not [t for t in running.tasks if t.done()]
            assert running.context.claims.loops["toil"]._free == 8


async def test_a_handler_that_raises_kills_its_culprit_only(stack: Stack, namespace: str) -> None:
    """DESIGN 3: halved down to the one; attempts count for it alone; at the limit it is dead, the rest done."""
    names = [f"o{n}" for n in range(15)]
    await ordered(stack, namespace, *names[:9], "bad", *names[9:])
    seen: list[list[str]] = []

    async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
        seen.append([c.key for c in changes])
        if "bad" in seen[-1]:
            raise RuntimeError("cannot save this")
        await toy.save(conn, changes)

    async with open_service(toy.service(save=save), await toy.settings(stack, namespace)) as running:
        await kernel.idle(running)
        assert {k: n for k, n in (await toy.counts(running)).items() if n} == dict.fromkeys(names, 1)
        (record,) = await kernel.dead_of(running)
        assert (record.dead.reason, record.dead.attempts) == ("bug", 3)
        assert "cannot save" not in record.dead.message  # F5
        assert seen.count(["bad"]) == 3
        assert any("bad" in keys and len(keys) > 1 for keys in seen)


async def test_a_unique_violation_of_the_services_own_is_no_repeat(stack: Stack, namespace: str) -> None:
    """INV-L: the rerun on the slow path finds that the id is fresh: the message is dead, never taken for handled."""
    await ordered(stack, namespace, "a", "bad", "b")

    async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
        await toy.save(conn, changes)
        if any(c.key == "bad" for c in changes):
            await conn.execute("INSERT INTO thing (key, n) VALUES ('bad', 9)")

    async with open_service(toy.service(save=save), await toy.settings(stack, namespace)) as running:
        await kernel.idle(running)
        assert {k: n for k, n in (await toy.counts(running)).items() if n} == {"a": 1, "b": 1}
        assert [r.dead.reason for r in await kernel.dead_of(running)] == ["bug"]
        assert Counter(r["disposition"] for r in await kernel.ledger_rows(running)) == {"done": 2, "dead": 1}


async def test_what_waiting_cures_is_never_dead(stack: Stack, namespace: str) -> None:
    """DESIGN 6: a transient error of a decision retries the batch as long as it takes; so does a lost connection."""
    await ordered(stack, namespace, "a", "b", "c")
    left = 6

    def decide(state: int, message: Message, now: datetime) -> tuple[int, Sequence[Effect]]:
        nonlocal left
        if left > 0 and message["business_object_id"] == "b":
            left -= 1
            raise TransientError("a definition is being replaced")
        return toy.decide(state, message, now)

    async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
        nonlocal left
        if left == 0:
            left = -1
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        await toy.save(conn, changes)

    async with open_service(toy.service(decide=decide, save=save), await toy.settings(stack, namespace)) as running:
        await kernel.idle(running)
        assert left == -1
        assert await toy.counts(running) == {"a": 1, "b": 1, "c": 1}
        assert await kernel.dead_of(running) == []


async def test_a_deadlock_is_waited_out(stack: Stack, namespace: str) -> None:
    """DESIGN 3: PostgreSQL ends one of two transactions; its batch is tried again, and both are counted."""
    settings = await toy.settings(stack, namespace)
    both = asyncio.Barrier(2)
    met = 0

    async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
        nonlocal met
        if met < 2:
            met += 1
            mine, other = ("x", "y") if met == 1 else ("y", "x")
            await conn.execute("SELECT pg_advisory_xact_lock(hashtext($1 || current_schema()))", mine)
            async with asyncio.timeout(20):
                await both.wait()
            await conn.execute("SELECT pg_advisory_xact_lock(hashtext($1 || current_schema()))", other)
        await toy.save(conn, changes)

    async with (
        open_service(toy.service(save=save), settings) as one,
        open_service(toy.service(save=save), settings, http=False) as two,
    ):

        async def shared() -> bool:
            return all(len(r.batch_loops[0]._subscription.assigned) == 4 for r in (one, two))

        await until("each has its share", shared)
        sent = [toy.asking(one, t, f"o{n}", do="count") for n in range(12) for t in ("result", "fact")]
        await one.context.publisher.publish(sent)
        await kernel.idle(one)
        assert await toy.counts(one) == {f"o{n}": 2 for n in range(12)}
        retried = [b'why="transient"' in r.context.metrics.render() for r in (one, two)]
        assert any(retried)
        assert await kernel.dead_of(one) == []


async def test_a_batch_that_never_fits_its_transactions_time_is_halved(stack: Stack, namespace: str) -> None:
    """DESIGN 3: `transaction_timeout` frees locks; a batch too slow for it must not be tried whole for ever."""
    names = [f"o{n}" for n in range(16)]
    await ordered(stack, namespace, *names)

    async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
        await conn.execute("SELECT pg_sleep($1)", 0.12 * len(changes))
        await toy.save(conn, changes)

    settings = await toy.settings(stack, namespace, transaction_timeout_s=1.0)
    async with open_service(toy.service(save=save), settings) as running:
        await kernel.idle(running)
        assert await toy.counts(running) == dict.fromkeys(names, 1)
        assert await kernel.dead_of(running) == []


async def test_an_amendment_from_a_wrong_state_undoes_all_and_finds_its_culprit(stack: Stack, namespace: str) -> None:
    """INV-F: a decision that is wrong about a row's state changes nothing, of the batch neither; it alone is dead."""
    await ordered(stack, namespace, "a", "bad", "b")

    def decide(state: int, message: Message, now: datetime) -> tuple[int, Sequence[Effect]]:
        state, effects = toy.decide(state, message, now)
        if message["business_object_id"] == "bad":
            assert message.id is not None
            effects = [*effects, Amend("toil", message.id, expected="unknown", state="done")]
        return state, effects

    async with open_service(toy.service(decide=decide), await toy.settings(stack, namespace)) as running:
        await kernel.idle(running)
        assert {k: n for k, n in (await toy.counts(running)).items() if n} == {"a": 1, "b": 1}
        assert [r.dead.exception_type for r in await kernel.dead_of(running)] == ["IllegalTransitionError"]
        assert {m["business_object_id"] for m in toy.decoded(running, await kernel.on_topic(running, "status"))} == {
            "a",
            "b",
        }
