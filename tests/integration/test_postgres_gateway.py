"""The PostgreSQL gateway against a real server: waiting, roles, migrations, transaction bounds, hints."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from factmesh import postgres
from factmesh.embedded import EmbeddedPostgres
from factmesh.embedded.process import free_port
from factmesh.errors import SettingsError
from factmesh.postgres import MigrationError, Migrations, Pool
from factmesh.stack import Stack


@pytest.fixture
async def dsn(stack: Stack, namespace: str) -> AsyncIterator[str]:
    yield await stack.provide_schema(f"{namespace}_svc")
    await postgres.drop_role_and_schema(stack.postgres_dsn, f"{namespace}_svc", f"{namespace}_svc")


@pytest.fixture
async def pool(dsn: str, namespace: str) -> AsyncIterator[Pool]:
    opened = await postgres.create_pool(dsn, schema=f"{namespace}_svc", transaction_timeout_s=1.0)
    yield opened
    await opened.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fm-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


async def test_a_role_reads_and_writes_its_own_schema_and_nothing_else(stack: Stack, namespace: str, dsn: str) -> None:
    """Issue 6.4, G4: a role per service. Another service's table, another schema, `public`, a temporary table and a new
    database are all refused; making the role again changes nothing."""
    other = await stack.provide_schema(f"{namespace}_other")
    assert await stack.provide_schema(f"{namespace}_svc") == dsn
    theirs = await postgres.connect(other, schema=f"{namespace}_other")
    await theirs.execute("CREATE TABLE secret (n int)")
    await theirs.close()
    ours = await postgres.connect(dsn, schema=f"{namespace}_svc")
    await ours.execute("CREATE TABLE mine (n int); INSERT INTO mine VALUES (1)")
    for statement in (
        f"SELECT * FROM {namespace}_other.secret",
        f"INSERT INTO {namespace}_other.secret VALUES (1)",
        f"CREATE TABLE {namespace}_other.x (n int)",
        "CREATE TABLE public.x (n int)",
        "CREATE TEMPORARY TABLE x (n int)",
        "CREATE SCHEMA x",
        "CREATE DATABASE x",
        "CREATE ROLE x",
    ):
        with pytest.raises(Exception, match="permission denied") as caught:
            await ours.execute(statement)
        assert postgres.sqlstate(caught.value) == "42501", statement
    await ours.close()
    await postgres.drop_role_and_schema(stack.postgres_dsn, f"{namespace}_other", f"{namespace}_other")


async def test_sessions_are_bounded_and_see_their_schema_only(pool: Pool, namespace: str) -> None:
    """DESIGN 3: READ COMMITTED, UTC, and `transaction_timeout` ends a slow transaction with a transient error."""
    assert await pool.fetchval("SHOW transaction_isolation") == "read committed"
    assert await pool.fetchval("SHOW search_path") == f'"{namespace}_svc"'
    assert await pool.fetchval("SHOW timezone") == "UTC"
    with pytest.raises(Exception) as caught:
        async with pool.acquire() as connection, connection.transaction():
            await connection.fetchval("SELECT pg_sleep(5)")
    assert postgres.is_transient(caught.value)
    assert await pool.fetchval("SELECT 1") == 1


async def test_a_transaction_left_open_gives_its_locks_back(pool: Pool, dsn: str, namespace: str) -> None:
    """DESIGN 3: a replica that stops inside a transaction holds its row lock for the timeout, not for ever."""
    await pool.execute("CREATE TABLE locked (n int); INSERT INTO locked VALUES (1)")
    stopped = await postgres.connect(dsn, schema=f"{namespace}_svc", transaction_timeout_s=1.0)
    await stopped.execute("BEGIN; SELECT * FROM locked FOR UPDATE")
    began = time.monotonic()
    patient = await postgres.connect(dsn, schema=f"{namespace}_svc")
    assert await patient.fetchval("UPDATE locked SET n = 2 RETURNING n") == 2
    assert 0.5 < time.monotonic() - began < 5.0
    await patient.close()
    stopped.terminate()


async def test_pinned_plans_hold_on_every_connection(dsn: str, namespace: str) -> None:
    """DESIGN 13.7: plans are pinned by session parameters, which survive the return to the pool."""
    pool = await postgres.create_pool(dsn, schema=f"{namespace}_svc", settings=postgres.PINNED_PLANS, size_max=1)
    for _ in range(2):
        assert await pool.fetchval("SHOW enable_hashjoin") == "off"
    await pool.close()


def write(folder: Path, name: str, sql: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(sql, encoding="utf-8")


async def test_racing_replicas_migrate_once(dsn: str, namespace: str, folder: Path) -> None:
    """Issue 6.4: migrations of the library and of the service, applied once however many replicas start together."""
    schema = f"{namespace}_svc"
    write(folder / "lib", "0001_ids.sql", "CREATE TABLE ids (id int PRIMARY KEY); SELECT pg_sleep(0.2);")
    write(folder / "svc", "0001_state.sql", "CREATE TABLE state (id int REFERENCES ids);")
    sources = [Migrations("library", folder / "lib"), Migrations("svc", folder / "svc")]
    done = await asyncio.gather(*(postgres.migrate(dsn, schema, sources) for _ in range(4)))
    assert sorted(map(len, done)) == [0, 0, 0, 2]
    write(folder / "svc", "0002_more.sql", "ALTER TABLE state ADD note text;")
    assert await postgres.migrate(dsn, schema, sources) == ["svc/0002_more.sql"]


async def test_a_changed_migration_is_refused_by_name(dsn: str, namespace: str, folder: Path) -> None:
    """Issue 6.4: what was applied never changes; the file and the way out are named, and nothing is applied."""
    schema, sources = f"{namespace}_svc", [Migrations("svc", folder / "svc")]
    write(folder / "svc", "0001_state.sql", "CREATE TABLE state (id int);")
    await postgres.migrate(dsn, schema, sources)
    write(folder / "svc", "0001_state.sql", "CREATE TABLE state (id bigint);")
    write(folder / "svc", "0002_more.sql", "CREATE TABLE more (id int);")
    with pytest.raises(
        MigrationError, match=r"0001_state\.sql: this migration was applied with other content"
    ) as caught:
        await postgres.migrate(dsn, schema, sources)
    assert "write the change as the next number" in str(caught.value)
    connection = await postgres.connect(dsn, schema=schema)
    assert await connection.fetchval("SELECT to_regclass('more')") is None
    await connection.close()


async def test_a_migration_that_fails_leaves_nothing(dsn: str, namespace: str, folder: Path) -> None:
    """Issue 6.4: each file and its record are one transaction; the error names the file and what PostgreSQL said."""
    schema, sources = f"{namespace}_svc", [Migrations("svc", folder / "svc")]
    write(folder / "svc", "0001_half.sql", "CREATE TABLE half (id int); SELECT nonsense;")
    with pytest.raises(MigrationError, match=r"0001_half\.sql: cannot be applied .*nonsense"):
        await postgres.migrate(dsn, schema, sources)
    write(folder / "svc", "0001_half.sql", "CREATE TABLE half (id int);")
    assert await postgres.migrate(dsn, schema, sources) == ["svc/0001_half.sql"]
    write(folder / "svc", "0003_gap.sql", "SELECT 1;")
    with pytest.raises(MigrationError, match=r"the numbers are \[1, 3\]"):
        await postgres.migrate(dsn, schema, sources)


async def test_hints_arrive_at_once_and_silence_is_bounded(dsn: str) -> None:
    """DESIGN 3b: NOTIFY is a hint, heard in milliseconds; without one, waiting ends in time."""
    sender = await postgres.connect(dsn)
    async with postgres.listen(dsn, "Some.Channel") as hints:
        assert not await hints.wait(0.05)
        began = time.monotonic()
        await postgres.notify(sender, "Some.Channel")
        assert await hints.wait(5)
        assert time.monotonic() - began < 1
        assert not await hints.wait(0.05)
    await sender.close()


async def test_hints_survive_the_loss_of_their_connection(stack: Stack, dsn: str, namespace: str) -> None:
    """DESIGN 3b: after a lost connection the listener is told to look (it may have missed hints), and hears again."""
    sender = await postgres.connect(dsn)
    admin = await postgres.connect(stack.postgres_dsn)
    async with postgres.listen(dsn, namespace, application=f"listen-{namespace}") as hints:
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", f"listen-{namespace}"
        )
        assert await hints.wait(5)
        await postgres.notify(sender, namespace)
        assert await hints.wait(5)
    await sender.close()
    await admin.close()


async def test_a_database_that_is_down_is_waited_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue 6, bad input: a database that is down at start is waited for with a clear message; then it goes on by
    itself. A pool outlives a restart of the database: the error in between is transient."""
    port = free_port()
    waiting = asyncio.create_task(postgres.create_pool(f"postgresql://postgres@127.0.0.1:{port}/postgres", size_max=1))
    await asyncio.sleep(0.6)
    assert not waiting.done()
    server = EmbeddedPostgres(folder, port)
    await asyncio.to_thread(server.start)
    try:
        pool = await asyncio.wait_for(waiting, 20)
        assert await pool.fetchval("SELECT 1") == 1
        await asyncio.to_thread(server.kill)
        with pytest.raises(Exception) as caught:
            await pool.fetchval("SELECT 1")
        assert postgres.is_transient(caught.value)
        await asyncio.to_thread(server.start)
        assert await pool.fetchval("SELECT 1") == 1
        await pool.close()
    finally:
        await asyncio.to_thread(server.stop)
    assert f"PostgreSQL at postgresql://postgres@127.0.0.1:{port}/postgres does not answer" in capsys.readouterr().out


async def test_a_role_that_is_not_there_is_said_and_not_waited_for(stack: Stack, namespace: str) -> None:
    """Issue 6, bad input: what no waiting cures ends the start, naming the address without its password."""
    with pytest.raises(SettingsError, match="refuses us: .*role .* does not exist") as caught:
        await postgres.create_pool(postgres.dsn_for_role(stack.postgres_dsn, f"{namespace}_nobody", "hidden"))
    assert "hidden" not in str(caught.value)
