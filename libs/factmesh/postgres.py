"""The PostgreSQL gateway: pools, named SQL files, migrations, roles and hints, and what each database error means.
Nobody else imports asyncpg; no ledger, claim or service SQL lives here, only what every schema shares.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import structlog

from factmesh.errors import ErrorClass, FactmeshError, SettingsError
from factmesh.sql_files import Queries, SqlFileError, load_sql, parse_sql

__all__ = [
    "PINNED_PLANS", "Connection", "Hints", "MigrationError", "Migrations", "Pool", "Queries", "Record", "SqlFileError",
    "connect", "create_pool", "drop_role_and_schema", "dsn_for_role", "ensure_role_and_schema", "is_data_error",
    "is_timeout", "is_transient", "is_unique_violation", "listen", "load_sql", "migrate", "notify", "parse_sql",
    "redacted", "sqlstate", "wait_until_alive",
]  # fmt: skip

log = structlog.get_logger("factmesh.postgres")

#: The longest wait between two tries to reach a database that is down, and between two looks at a hinted table.
RECONNECT_WAIT_MAX_S = 5.0
#: One try to connect; a host that swallows packets must not hold a start for minutes.
CONNECT_TIMEOUT_S = 10.0
#: Above the server's own `transaction_timeout`, so that a dead network, not a slow query, is what trips it.
CLIENT_GRACE_S = 10.0

#: For `create_pool(settings=…)`: plans made on empty tables are wrong for ever when they are generic, so the services'
#: connections allow index scans and nested loops only (measured: 90 instead of 3,600 us a workflow, DESIGN 13.7).
PINNED_PLANS: Mapping[str, str] = {
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
    "jit": "off",
}


class Record(Protocol):
    """A row: by column name or position."""

    def __getitem__(self, key: str | int) -> Any: ...
    def __len__(self) -> int: ...
    def keys(self) -> Iterable[str]: ...
    def values(self) -> Iterable[Any]: ...
    def items(self) -> Iterable[tuple[str, Any]]: ...


class Connection(Protocol):
    """The part of a connection that Factmesh uses."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str: ...
    async def executemany(self, command: str, args: Iterable[Sequence[Any]]) -> None: ...
    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]: ...
    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None: ...
    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any: ...
    async def copy_records_to_table(
        self, table_name: str, *, records: Iterable[Sequence[Any]], columns: Sequence[str] | None = None
    ) -> str: ...
    def transaction(
        self, *, isolation: str | None = None, readonly: bool = False, deferrable: bool = False
    ) -> AbstractAsyncContextManager[Any]: ...
    def is_closed(self) -> bool: ...
    async def close(self, *, timeout: float | None = None) -> None: ...
    def terminate(self) -> None: ...


class Pool(Protocol):
    """The part of a pool that Factmesh uses. `acquire` is an async context manager."""

    def acquire(self, *, timeout: float | None = None) -> AbstractAsyncContextManager[Connection]: ...
    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str: ...
    async def executemany(self, command: str, args: Iterable[Sequence[Any]]) -> None: ...
    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]: ...
    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None: ...
    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any: ...
    async def close(self) -> None: ...
    def terminate(self) -> None: ...


_SQL = load_sql(__file__, "postgres.sql")


# --- what an error means ---------------------------------------------------------------------------------------------

#: SQLSTATE classes and codes after which the same batch, tried again unchanged, may succeed. 40: deadlock,
#: serialization, unknown completion; 08: connection; 53: resources; 57P: shutdown; 25006: a standby after a failover.
_TRANSIENT_CLASSES = ("08", "40", "53", "57P")
_TRANSIENT_CODES = frozenset({"57014", "25P03", "25P04", "25006", "55P03", "58030"})


def sqlstate(error: BaseException) -> str | None:
    """The five characters that PostgreSQL gave, or None."""
    state = getattr(error, "sqlstate", None) if isinstance(error, asyncpg.PostgresError) else None
    return state if isinstance(state, str) else None


def is_transient(error: BaseException) -> bool:
    """Whether to try the whole transaction again: lost connection, unknown commit outcome, deadlock, timeout."""
    state = sqlstate(error)
    if state is not None:
        # A plan made before a migration of a newer replica: the client has dropped it when it raises this.
        outdated = isinstance(error, asyncpg.InvalidCachedStatementError)
        return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_CODES or outdated
    if isinstance(error, asyncpg.InterfaceError):
        return "connection is closed" in str(error) or "connection was closed" in str(error)
    if isinstance(error, asyncpg.InternalClientError):
        # A server that is stopped says so on idle connections too. Until the socket's end is seen, the client takes
        # that word for an unfinished operation of its own, and the next statement meets this: a connector ended by it.
        stopped = str(error).startswith("cannot switch to state")
        return stopped or isinstance(error, asyncpg.OutdatedSchemaCacheError)
    return isinstance(error, OSError | TimeoutError | EOFError | asyncpg.PostgresConnectionError)


def is_given_back(error: BaseException) -> bool:
    """The pool has that connection back already: the server ended it, or it was lost, while somebody still held it."""
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError)


def is_timeout(error: BaseException) -> bool:
    """The transaction took too long, by the server's bound or ours: a smaller one may fit.

    The server ends the connection with it: what is raised is that the transaction cannot be left any more, and before
    it a lost connection, in whose text alone the client keeps the server's last word.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TimeoutError) or sqlstate(seen) == "57014" or "transaction timeout" in str(seen):
            return True
        seen = seen.__context__
    return False


def is_unique_violation(error: BaseException, constraint: str | None = None) -> bool:
    """A row with that key is there already; of `constraint` only, if given (partitions append to its name)."""
    if sqlstate(error) != "23505":
        return False
    name = str(getattr(error, "constraint_name", "") or "")
    return constraint is None or name == constraint


def is_data_error(error: BaseException) -> bool:
    """The values themselves are refused, by PostgreSQL or already by the client's encoder: trying again cannot help."""
    state = sqlstate(error)
    if state is not None:
        return state.startswith("22") or (state.startswith("23") and state != "23505")
    return isinstance(error, asyncpg.DataError)


# --- connections -----------------------------------------------------------------------------------------------------

T = TypeVar("T")


def redacted(dsn: str) -> str:
    """The address without the password: what may be logged."""
    parts = urlsplit(dsn)
    if parts.password is None:
        return dsn
    address = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{address}"))


def dsn_for_role(dsn: str, role: str, password: str | None = None) -> str:
    """The same database as another role."""
    parts = urlsplit(dsn)
    who = quote(role, safe="") + (f":{quote(password, safe='')}" if password is not None else "")
    return urlunsplit(parts._replace(netloc=f"{who}@{parts.netloc.rpartition('@')[2]}"))


async def _until_reachable(dsn: str, connect: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Try until the database answers, however long; say so once a try. What waiting cannot cure is raised at once."""
    wait_s = 0.25
    for attempt in range(1, 1_000_000_000):
        try:
            if urlsplit(dsn).scheme not in ("postgresql", "postgres"):
                raise ValueError  # the client takes an empty address for its own default, and would wait there
            result = await connect()
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError) as error:
            raise SettingsError(
                f"PostgreSQL at {redacted(dsn)} refuses us: {error}",
                hint="create the role and database, or correct FACTMESH_POSTGRES_DSN",
                error_class=ErrorClass.PERMISSION,
            ) from error
        except (asyncpg.ClientConfigurationError, OverflowError, ValueError):
            # What stands there may be a password in the wrong place: it is not repeated.
            raise SettingsError(
                "the address of PostgreSQL cannot be read",
                hint="write it as postgresql://role:password@host:port/database, reserved characters percent-encoded",
            ) from None
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning(
                f"PostgreSQL at {redacted(dsn)} does not answer; trying again every few seconds until it does",
                wait_s=wait_s,
                error=f"{type(error).__name__}: {error}",
                attempt=attempt,
            )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RECONNECT_WAIT_MAX_S)
        else:
            if attempt > 1:
                log.info(f"PostgreSQL at {redacted(dsn)} answers, going on", attempt=attempt)
            return result
    raise AssertionError("unreachable: the loop above ends by returning or raising")


def _session(schema: str | None, application: str, timeout_s: float, extra: Mapping[str, str]) -> dict[str, str]:
    settings = {
        "application_name": application[:63],
        "default_transaction_isolation": "read committed",
        "timezone": "UTC",
        # Frees the locks of a replica that was stopped in the middle (PostgreSQL 17 and later).
        "transaction_timeout": f"{int(timeout_s * 1000)}ms",
        "idle_in_transaction_session_timeout": f"{int(timeout_s * 1000)}ms",
    }
    if schema is not None:
        settings["search_path"] = '"' + schema.replace('"', '""') + '"'
    return {**settings, **extra}


async def _keep(_connection: Any) -> None:
    """Nothing to reset between uses: settings are given at connect, and saving the round trip is 0.2 ms a batch."""


async def create_pool(
    dsn: str,
    *,
    schema: str | None = None,
    application: str = "factmesh",
    size_min: int = 1,
    size_max: int = 8,
    transaction_timeout_s: float = 20.0,
    settings: Mapping[str, str] | None = None,
) -> Pool:
    """A pool whose connections see `schema` only, READ COMMITTED, with bounded transactions.

    Waits for a database that is down. `settings` are session parameters of every connection (`PINNED_PLANS`).
    Nothing may change a session's state on a pooled connection: it is not reset between uses.
    """

    async def connect() -> Pool:
        pool: Pool = await asyncpg.create_pool(
            dsn,
            min_size=size_min,
            max_size=size_max,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=transaction_timeout_s + CLIENT_GRACE_S,
            max_inactive_connection_lifetime=0,
            statement_cache_size=500,
            max_cached_statement_lifetime=0,
            reset=_keep,
            server_settings=_session(schema, application, transaction_timeout_s, settings or {}),
        )
        return pool

    return await _until_reachable(dsn, connect)


async def connect(
    dsn: str, *, schema: str | None = None, application: str = "factmesh", transaction_timeout_s: float = 0.0
) -> Connection:
    """One connection of its own, waiting for a database that is down; 0 means no bound on its transactions."""

    async def open_connection() -> Connection:
        connection: Connection = await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, server_settings=_session(schema, application, transaction_timeout_s, {})
        )
        return connection

    return await _until_reachable(dsn, open_connection)


# --- schemas and roles -----------------------------------------------------------------------------------------------


async def ensure_role_and_schema(admin_dsn: str, schema: str, role: str, password: str | None = None) -> None:
    """Give `role` a schema that it owns and nothing else: no other schema, not `public`, no temporary tables.

    Idempotent and safe to race. Without a password the role can log in only where the server trusts the address.
    """
    admin = await connect(admin_dsn, application="factmesh-admin")
    try:
        async with admin.transaction():
            await admin.execute(_SQL.lock_roles)
            for row in await admin.fetch(_SQL.own_schema_statements, schema, role, password):
                await admin.execute(row["statement"])
    finally:
        await admin.close()


async def drop_role_and_schema(admin_dsn: str, schema: str, role: str) -> None:
    """Remove both with everything in them: for namespaces of tests."""
    admin = await connect(admin_dsn, application="factmesh-admin")
    try:
        async with admin.transaction():
            await admin.execute(_SQL.lock_roles)
            for row in await admin.fetch(_SQL.drop_schema_statements, schema, role):
                await admin.execute(row["statement"])
    finally:
        await admin.close()


# --- migrations ------------------------------------------------------------------------------------------------------

_MIGRATION_FILE = re.compile(r"^(\d{4})_([a-z0-9_]+)\.sql$")


class MigrationError(FactmeshError):
    """The schema and the files disagree, or a file cannot be applied: the service does not start."""


@dataclass(frozen=True, slots=True)
class Migrations:
    """One folder of numbered files, `0001_name.sql`. The namespace says whose they are: the library's, a service's."""

    namespace: str
    directory: Path


@dataclass(frozen=True, slots=True)
class _File:
    namespace: str
    number: int
    path: Path
    sql: str
    sha256: str


def _read_migrations(source: Migrations) -> list[_File]:
    files: list[_File] = []
    for path in sorted(source.directory.glob("*.sql")):
        match = _MIGRATION_FILE.match(path.name)
        if match is None:
            raise MigrationError("a migration is named NNNN_what_it_does.sql", where=str(path), hint="rename the file")
        sql = path.read_text(encoding="utf-8")  # universal newlines: the hash is the same on every platform
        digest = hashlib.sha256(sql.encode()).hexdigest()
        files.append(_File(source.namespace, int(match.group(1)), path, sql, digest))
    numbers = [file.number for file in files]
    if numbers != list(range(1, len(files) + 1)):
        raise MigrationError(
            f"the numbers are {numbers}, they must be 1, 2, 3, … each once",
            where=str(source.directory),
            hint="renumber",
        )
    return files


def _pending(files: Sequence[_File], applied: Mapping[tuple[str, int], str]) -> list[_File]:
    """What is still to be applied, after checking that nothing applied was changed since."""
    for file in files:
        recorded = applied.get((file.namespace, file.number))
        if recorded is not None and recorded != file.sha256:
            raise MigrationError(
                f"this migration was applied with other content (sha256 {recorded[:12]}…, the file has"
                f" {file.sha256[:12]}…)",
                where=str(file.path),
                hint="an applied migration never changes: restore the file and write the change as the next number",
            )
    return [file for file in files if (file.namespace, file.number) not in applied]


async def migrate(dsn: str, schema: str, sources: Sequence[Migrations]) -> list[str]:
    """Bring `schema` up to the files of `sources`, in their order; returns what was applied now.

    Replicas race for a session advisory lock on a connection of its own, one migrates and the others find it done.
    Each file runs in one transaction with its record. Rows of a newer version are left alone: an old replica may run.
    """
    files = [file for source in sources for file in _read_migrations(source)]
    connection = await connect(dsn, schema=schema, application="factmesh-migrate")
    done: list[str] = []
    try:
        await connection.execute(_SQL.lock_migrations, schema)
        try:
            await connection.execute(_SQL.create_migrations_table)
        except (asyncpg.InvalidSchemaNameError, asyncpg.InsufficientPrivilegeError) as error:
            raise SettingsError(
                f"schema {schema} is not there, or not this role's: {error}",
                where=f"PostgreSQL at {redacted(dsn)}",
                hint="`factmesh stack roles` makes each service's role and schema",
                error_class=ErrorClass.PERMISSION,
            ) from error
        rows = await connection.fetch(_SQL.applied_migrations)
        for file in _pending(files, {(row["namespace"], row["number"]): row["sha256"] for row in rows}):
            label = f"{file.namespace}/{file.path.name}"
            try:
                async with connection.transaction():
                    await connection.execute(file.sql)
                    await connection.execute(
                        _SQL.record_migration, file.namespace, file.number, file.path.stem, file.sha256
                    )
            except asyncpg.PostgresError as error:
                if is_transient(error):
                    raise
                raise MigrationError(
                    f"cannot be applied to schema {schema}: {error}",
                    where=str(file.path),
                    hint="nothing of this file was kept; correct it and start again",
                ) from error
            log.info("migration applied", schema=schema, migration=label)
            done.append(label)
        await connection.execute(_SQL.unlock_migrations, schema)
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)
    return done


# --- hints -----------------------------------------------------------------------------------------------------------


class Hints:
    """Wake-ups for those who look at due rows. A hint may be lost or early: who waits looks again within 5 s anyway."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Until a hint or `timeout_s` (5 s at most); True for a hint. Query after this, never before only."""
        try:
            async with asyncio.timeout(min(timeout_s, RECONNECT_WAIT_MAX_S)):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


@contextlib.asynccontextmanager
async def listen(dsn: str, channel: str, *, application: str = "factmesh-listen") -> AsyncIterator[Hints]:
    """Hints of `channel` (global in a database: put the schema's name in it), over losses of the connection.

    The body starts once LISTEN is in force, so that what is queried inside it has no gap before the first hint.
    """
    hints, ready = Hints(), asyncio.Event()

    async def keep_listening() -> None:
        while True:
            connection: Any = await connect(dsn, application=application)
            closed = asyncio.Event()
            try:
                connection.add_termination_listener(lambda *_, closed=closed: closed.set())
                await connection.add_listener(channel, lambda *_: hints.set())  # LISTEN, the name quoted
                ready.set()
                hints.set()  # what was notified while nobody listened is found by looking
                await closed.wait()
            except Exception as error:
                if not is_transient(error):
                    raise
            finally:
                connection.terminate()
            log.warning(
                "the connection for hints is gone; reconnecting, and looking without hints until then", channel=channel
            )
            await asyncio.sleep(0.25)

    task = asyncio.create_task(keep_listening(), name=f"listen:{channel}")
    try:
        first = asyncio.create_task(ready.wait())
        await asyncio.wait({task, first}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if task.done():
            await task
        hints._event.clear()
        yield hints
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def notify(connection: Connection, channel: str) -> None:
    """Tell who listens that there is something to look at, when this transaction commits."""
    await connection.execute(_SQL.notify, channel)


async def wait_until_alive(dsn: str) -> None:
    """Return when the database serves."""
    connection = await connect(dsn)
    try:
        await connection.fetchval(_SQL.alive)
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)
