"""The Service value and `run`: one asyncio process with its pool, loops and HTTP, started in order and stopped clean.
No service's logic lives here; a service is a value, never a subclass.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp

from factmesh import claims, event_loop, ledger, telemetry, topics
from factmesh import settings as settings_module
from factmesh.batch import Deciding, Handler, Runner
from factmesh.batch_loop import BatchLoop
from factmesh.claim_loop import ClaimKind, ClaimLoop, ClaimRuntime
from factmesh.clock import Clock, SystemClock
from factmesh.emitting import Emitter
from factmesh.errors import FactmeshError
from factmesh.kafka import Publisher, Subscription, TopicSpec, dlq_spec, ensure_topics, wait_for_broker
from factmesh.metrics import Metrics
from factmesh.postgres import PINNED_PLANS, Migrations, Pool, connect, create_pool, is_transient, migrate
from factmesh.records import Records
from factmesh.registry import DirectoryRegistry, HttpRegistry, Registry
from factmesh.schema_files import platform_dir
from factmesh.service_http import serve
from factmesh.settings import Settings

log = structlog.get_logger("factmesh.service")

STOP_S_MAX = 10.0
"""A stop takes no longer (SIGTERM to exit); what is not finished by then is repeated after the next start."""
STOP_BATCHES_S = 3.0
STOP_CLAIMS_S = 3.5
STOP_TASKS_S = 1.0
STOP_CLOSE_S = 0.5
"""Its parts, each at its worst: the batch in hand and its acknowledgements; calls under way and their settlements;
the loops' own ends; and each of the four connections to be closed. With a database or broker that is down, all of them
run out, and their sum must stay below the whole."""
HOUSEKEEPING_S = 3600.0
GAUGES_S = 5.0
POOL_CONNECTIONS_MAX = 12


@dataclass(frozen=True)
class Context:
    """What a service's wiring is given: every gateway, opened."""

    service: str
    version: str
    settings: Settings
    clock: Clock
    pool: Pool
    registry: Registry
    records: Records
    publisher: Publisher
    emitter: Emitter
    metrics: Metrics
    claims: ClaimRuntime
    dsn: str
    schema: str
    group: str

    def topic(self, short: str) -> str:
        """The full name of a topic of this mesh."""
        return topics.full_name(short, self.settings.topic_prefix)

    async def ensure_topics(self, shorts: Sequence[str]) -> None:
        """Make topics, each with its DLQ, where they are missing."""
        specs = [
            TopicSpec(
                self.topic(s),
                topics.COMMAND.partitions,
                topics.COMMAND.retention_days,
                retention_days_max=self.settings.audit_days,
            )
            for s in shorts
        ]
        await ensure_topics(self.settings.kafka_bootstrap, [*specs, *map(dlq_spec, specs)])


@dataclass
class Parts:
    """What a service is made of."""

    handlers: tuple[Handler[Any], ...] = ()
    claims: tuple[ClaimKind, ...] = ()
    app: ASGIApp | None = None
    background: tuple[Callable[[], Awaitable[None]], ...] = ()
    topics: tuple[str, ...] = ()
    """Short names of topics that it needs besides the fixed ones of the table: `command.<connector>`."""


@dataclass(frozen=True)
class Service:
    """A service as a value: its name, its wiring, where its migrations lie, and its settings' type."""

    name: str
    build: Callable[[Context], Awaitable[Parts]]
    migrations: Path
    settings: type[Settings] = Settings


@dataclass
class Running:
    """One service while it runs: in its own process by `run`, or inside a test or tool by `open_service`."""

    context: Context
    batch_loops: list[BatchLoop] = field(default_factory=list)
    http_port: int = 0
    ready: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Why it is not ready; empty when it is."""
        out = [] if self.ready else ["starting"]
        for loop in self.batch_loops:
            for topic, partition in sorted(loop.halted):
                out.append(f"{topic}[{partition}] is halted: too much of it died")
        out += [f"{t.get_name()} ended" for t in self.tasks if t.done()]
        return out


def _version() -> str:
    try:
        return metadata.version("factmesh")
    except metadata.PackageNotFoundError:
        return "0"


def _registry(settings: Settings) -> Registry:
    if settings.registry_url:
        return HttpRegistry(settings.registry_url)
    folders = [settings.schemas_dir or platform_dir()]
    if settings.project is not None and (settings.project / "schemas").is_dir():
        folders.append(settings.project / "schemas")
    return DirectoryRegistry(folders)


async def _patiently(what: str, work: Callable[[], Awaitable[Any]]) -> Any:
    """Wait out what waiting cures, saying so; everything else is raised."""
    wait_s = 0.25
    while True:
        try:
            return await work()
        except Exception as error:
            transient = is_transient(error) or (
                isinstance(error, FactmeshError) and error.error_class.value == "transient"
            )
            if not transient:
                raise
            log.warning("service.waiting", message=f"{what}; trying again in {wait_s:g} s", error=str(error))
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, 5.0)


async def _open(service: Service, settings: Settings, clock: Clock, stack: contextlib.AsyncExitStack) -> Context:
    """Gateways in order: the database (waited for) and its migrations, the registry, the broker (waited for)."""
    name = settings.service if settings.service != "factmesh" else service.name
    schema = settings.schema_name(name.replace("-", "_"))
    dsn = settings.postgres_dsn.get_secret_value()
    sources = [
        Migrations("factmesh", Path(__file__).with_name("migrations")),
        Migrations(service.name, service.migrations),
    ]
    await _patiently("the database is not ready for migrations", lambda: migrate(dsn, schema, sources))
    pool = await create_pool(
        dsn,
        schema=schema,
        application=f"factmesh-{name}",
        size_min=2,
        size_max=POOL_CONNECTIONS_MAX,
        transaction_timeout_s=settings.transaction_timeout_s,
        settings=PINNED_PLANS,
    )
    stack.push_async_callback(_close_pool, pool)
    registry = _registry(settings)
    stack.push_async_callback(registry.close)
    records = await _patiently(
        "the schema registry does not answer", lambda: Records.open(registry, settings.schemas_dir)
    )
    await wait_for_broker(settings.kafka_bootstrap)
    fixed = [
        TopicSpec(
            t.of(settings.topic_prefix),
            t.partitions,
            t.retention_days,
            # Strangers' ids live for the dedup horizon, our own for the audit period.
            retention_days_max=settings.dedup_horizon_days if t is topics.FACTS_RAW else settings.audit_days,
        )
        for t in topics.TOPICS
        if t is not topics.COMMAND
    ]
    await ensure_topics(settings.kafka_bootstrap, [*fixed, *map(dlq_spec, fixed)])
    metrics = Metrics()
    publisher = Publisher(
        settings.kafka_bootstrap,
        client_id=f"factmesh-{name}",
        on_retry=lambda n: metrics.inc("factmesh_publish_retries_total", by=n),
    )
    stack.push_async_callback(publisher.close, STOP_CLOSE_S)
    return Context(
        service=name,
        version=_version(),
        settings=settings,
        clock=clock,
        pool=pool,
        registry=registry,
        records=records,
        publisher=publisher,
        emitter=Emitter(name, settings.topic_prefix, records.encode),
        metrics=metrics,
        claims=ClaimRuntime(),
        dsn=dsn,
        schema=schema,
        group=f"{settings.topic_prefix}factmesh-{name}",
    )


async def _close_pool(pool: Pool) -> None:
    try:
        async with asyncio.timeout(STOP_CLOSE_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


@contextlib.asynccontextmanager
async def open_service(
    service: Service, settings: Settings, *, clock: Clock | None = None, http: bool = True
) -> AsyncIterator[Running]:
    """Start a service in this process; on leaving, stop it clean. Raises what `build` raises, nothing left open."""
    clock = clock or SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        context = await _open(service, settings, clock, stack)
        parts = await service.build(context)
        if parts.topics:
            await context.ensure_topics(parts.topics)
        mark_conn = await connect(context.dsn, schema=context.schema, application=f"factmesh-{context.service}-mark")
        stack.push_async_callback(_quietly, lambda: mark_conn.close(timeout=STOP_CLOSE_S))
        mark = ledger.ProcessMark(mark_conn, socket.gethostname())
        unclean = await mark.enter()
        if unclean:
            log.warning("service.unclean", message="an earlier process did not stop cleanly; beginning one by one")
        stack.push_async_callback(_quietly, mark.leave)
        running = Running(context)
        loops = [_claim_loop(context, kind) for kind in parts.claims]
        for loop in loops:
            context.claims.loops[loop.kind.name] = loop
        running.batch_loops = [_batch_loop(context, h, unclean) for h in parts.handlers]
        server = await serve(running, parts.app) if http else None
        work: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            *((f"claims:{loop.kind.name}", loop.run) for loop in loops),
            *((f"batches:{b.label}", b.run) for b in running.batch_loops),
            *((f"background:{n}", b) for n, b in enumerate(parts.background)),
            ("housekeeping", lambda: _housekeeping(context)),
            ("gauges", lambda: _gauges(context)),
        ]
        running.tasks += [asyncio.create_task(_guarded(run()), name=name) for name, run in work]
        running.ready = True
        context.metrics.set("factmesh_up", 1, context.service)
        log.info("service.started", http=f"http://{settings.http_host}:{running.http_port}", unclean=unclean)
        try:
            yield running
        finally:
            running.ready = False
            await _stop(running, loops, server)


async def _guarded(work: Awaitable[None]) -> None:
    await work


async def _quietly(work: Callable[[], Awaitable[Any]]) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(STOP_CLOSE_S):
            await work()


async def _stop(running: Running, loops: Sequence[ClaimLoop], server: uvicorn.Server | None) -> None:
    """Stop polling, finish the batch and the running attempts, commit, leave the group; within `STOP_S_MAX`."""
    if server is not None:
        server.should_exit = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_BATCHES_S):
            await asyncio.gather(*(b.stop() for b in running.batch_loops), return_exceptions=True)
    # After the batches: the last of them may have begun rows, and somebody must settle those.
    await asyncio.gather(*(loop.stop(STOP_CLAIMS_S) for loop in loops), return_exceptions=True)
    for task in running.tasks:
        if not task.get_name().startswith("batches:"):
            task.cancel()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_TASKS_S):
            await asyncio.gather(*running.tasks, return_exceptions=True)
            await asyncio.gather(*(b.close() for b in running.batch_loops), return_exceptions=True)
    for task in running.tasks:
        task.cancel()
    telemetry.flush()
    log.info("service.stopped")


def _group(context: Context, handler: str) -> str:
    return f"{context.group}-{handler}" if handler else context.group


def _claim_loop(context: Context, kind: ClaimKind) -> ClaimLoop:
    return ClaimLoop(
        kind,
        service=context.service,
        group=_group(context, kind.handler),
        version=context.version,
        pool=context.pool,
        publisher=context.publisher,
        emitter=context.emitter,
        clock=context.clock,
        metrics=context.metrics,
    )


def _batch_loop(context: Context, handler: Handler[Any], careful: bool) -> BatchLoop:
    group = _group(context, handler.name)
    settings = context.settings

    def subscribe(group: str, names: Sequence[str], drain: Callable[[], Awaitable[None]]) -> Subscription:
        return Subscription(
            settings.kafka_bootstrap,
            group=group,
            topics=names,
            client_id=f"factmesh-{context.service}",
            protocol=settings.group_protocol,
            drain=drain,
        )

    deciding = Deciding(
        service=context.service,
        group=group,
        version=context.version,
        handler=handler,
        emitter=context.emitter,
        lease_s=context.claims.lease_s,
    )
    runner = Runner(deciding, settings.audit_days)
    return BatchLoop(
        runner,
        pool=context.pool,
        publisher=context.publisher,
        registry=context.registry,
        claims=context.claims,
        clock=context.clock,
        metrics=context.metrics,
        batch_max=settings.batch_max,
        subscribe=subscribe,
        careful=careful,
        halt_on_flood=settings.halt_on_flood,
    )


# --- periodic work ---------------------------------------------------------------------------------------------------


async def _housekeeping(context: Context) -> None:
    """Retention, and tomorrow's partition before tomorrow needs it."""
    settings = context.settings
    days = ledger.Days()
    emptied: set[str] = set()
    while True:
        try:
            now = context.clock.now()
            async with context.pool.acquire() as conn:
                await days.ensure(conn, {now.date(), (now + timedelta(days=1)).date()})
                horizon_days, audit_days = settings.dedup_horizon_days, settings.audit_days
                dropped = await ledger.expire(
                    conn, now, horizon_days=horizon_days, audit_days=audit_days, emptied=emptied
                )
                await claims.expire(conn, settings.dedup_horizon_days)
            for name in dropped:
                log.info("ledger.day_dropped", partition=name)
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("service.housekeeping", error=str(error))
        await asyncio.sleep(HOUSEKEEPING_S)


async def _gauges(context: Context) -> None:
    """What is measured by looking: waiting and unknown rows."""
    seen: set[tuple[str, str]] = set()
    while True:
        try:
            async with context.pool.acquire() as conn:
                rows = await claims.counts(conn)
            now = {(kind, state) for kind, state, _, _ in rows}
            for kind, state in seen - now:
                context.metrics.set("factmesh_claims", 0, kind, state)
            late: dict[str, float] = {kind: 0.0 for kind, _ in seen | now}
            for kind, state, n, late_s in rows:
                context.metrics.set("factmesh_claims", n, kind, state)
                late[kind] = max(late[kind], late_s or 0.0)
            for kind, late_s in late.items():
                context.metrics.set("factmesh_claims_late_seconds", late_s, kind)
            seen |= now
        except Exception as error:
            if not is_transient(error):
                raise
        await asyncio.sleep(GAUGES_S)


# --- the process -----------------------------------------------------------------------------------------------------


def run(service: Service, given: Settings | None = None) -> None:
    """Run a service until SIGTERM or SIGINT. Exits 2 with a clear text when it cannot start as configured."""
    try:
        settings = given or settings_module.load(service.settings)
        telemetry.setup_logging(service.name, level=settings.log_level, fmt=settings.log_format)
        telemetry.setup_tracing(
            service.name,
            version=_version(),
            sample_ratio=settings.trace_sample_ratio,
            trace_file=settings.trace_file,
            otlp_endpoint=settings.otlp_endpoint,
        )
        event_loop.run(_run(service, settings))
    except FactmeshError as error:
        sys.stderr.write(f"factmesh-{service.name}: {error}\n")
        raise SystemExit(2) from None


async def _run(service: Service, settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    waiting = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(_serve(service, settings, stop))
    # A stop while the database or the broker is being waited for must not wait with it.
    await asyncio.wait({waiting, starting}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        end = threading.Timer(STOP_S_MAX - 0.3, _cut)
        end.daemon = True
        end.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S_MAX - 0.6):
                await asyncio.shield(starting)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
    waiting.cancel()
    starting.result()


def _cut() -> None:
    """The end of a stop that hangs: a client's thread may wait for a broker that is gone, and Python waits for it."""
    log.warning("service.stop_cut", message=f"not stopped in {STOP_S_MAX:g} s; the next start repeats the rest")
    os._exit(0)


async def _serve(service: Service, settings: Settings, stop: asyncio.Event) -> None:
    async with open_service(service, settings) as running:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({stopped, *running.tasks}, return_when=asyncio.FIRST_COMPLETED)
        if stopped not in done:
            for task in done:
                task.result()
            names = ", ".join(t.get_name() for t in done)
            raise FactmeshError(f"{names} ended by itself", hint="this is a bug; the process must be started again")

