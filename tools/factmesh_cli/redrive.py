"""`factmesh redrive`: publish again what the services emitted since an instant, after Kafka itself lost data.
The bytes are the ledgers' own; receivers drop what they have (DESIGN section 3, "Redrive"). Nothing is decided anew.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from factmesh import claims, ledger
from factmesh.errors import SettingsError, ValidationError
from factmesh.kafka import Publisher, wait_for_broker
from factmesh.message import Emission, unpack
from factmesh.postgres import Connection, Pool, create_pool, sqlstate
from factmesh_cli.dlq_index import load_settings, read_addresses
from factmesh_cli.mesh import SERVICES

app = typer.Typer(add_completion=False)
console = Console(highlight=False)
PAGE = 500
NO_SUCH_SCHEMA = frozenset({"42P01", "42501", "3F000"})
"""Undefined table, insufficient privilege, no such schema (PostgreSQL, appendix A)."""
Page = Callable[[Connection, datetime, tuple[datetime, UUID], int], Awaitable[list[tuple[datetime, UUID, bytes]]]]


@dataclass(frozen=True)
class Source:
    """One service's ledger, or the outcomes of its claims."""

    service: str
    what: str
    pool: Pool
    page: Page
    total: int


@app.callback(invoke_without_command=True)
def redrive(
    since: Annotated[str, typer.Option(help="RFC 3339 instant with offset: shortly before what Kafka lost.")],
    service: Annotated[list[str] | None, typer.Option(help="Only this service's emissions; repeatable.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only emissions to topics whose name contains this.")] = None,
    rate: Annotated[float, typer.Option(min=1, max=100_000, help="At most so many messages a second.")] = 1000.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, publish nothing.")] = False,
    run_dir: Annotated[Path | None, typer.Option("--run-dir", help="The folder of a running `factmesh up`.")] = None,
) -> None:
    """Publish again everything that the services emitted since an instant. Safe to repeat: receivers drop what they
    have. Emitted bytes are kept for the dedup horizon.
    """
    try:
        instant = datetime.fromisoformat(since)
    except ValueError:
        raise ValidationError(f"{since!r} is no RFC 3339 instant", hint="like 2026-03-01T09:30:00+01:00") from None
    if instant.tzinfo is None:
        raise ValidationError(f"{since!r} has no offset", hint="add Z or +01:00: whose nine o'clock is meant?")
    given = read_addresses(run_dir) if run_dir is not None else {}
    raise typer.Exit(asyncio.run(_run(given, instant.astimezone(UTC), service, topic, rate, dry_run)))


async def _run(
    given: dict[str, str], since: datetime, only: list[str] | None, topic: str | None, rate: float, dry_run: bool
) -> int:
    settings = load_settings(given)
    unknown = set(only or ()) - set(SERVICES)
    if unknown:
        raise SettingsError(f"no service is called {', '.join(unknown)}", hint=f"one of {', '.join(SERVICES)}")
    pools: list[Pool] = []
    publisher: Publisher | None = None
    try:
        sources: list[Source] = []
        for name in only or SERVICES:
            variable = f"FACTMESH_{name.upper()}_DSN"
            dsn = given.get(variable) or os.environ.get(variable) or settings.postgres_dsn.get_secret_value()
            pool = await create_pool(dsn, schema=settings.schema_name(name), application="factmesh-redrive", size_max=1)
            pools.append(pool)
            try:
                async with pool.acquire() as conn:
                    rows = await ledger.count_emitted_since(conn, since)
                    outcomes = await claims.count_outcomes_since(conn, since)
            except Exception as error:
                if sqlstate(error) not in NO_SUCH_SCHEMA:
                    raise
                raise SettingsError(
                    f"this role sees no ledger in schema {settings.schema_name(name)}",
                    hint=f"set {variable} to the service's own address, or name the services that run with --service",
                ) from None
            sources.append(Source(name, "ledger", pool, ledger.emitted_since, rows))
            sources.append(Source(name, "outcomes", pool, claims.outcomes_since, outcomes))
        if not dry_run:
            await wait_for_broker(settings.kafka_bootstrap)
            publisher = Publisher(settings.kafka_bootstrap, client_id="factmesh-redrive")
        total = sum([await _redrive(source, since, topic, rate, publisher) for source in sources])
        console.print(f"{total} messages {'would be' if dry_run else 'were'} published again")
        return 0
    finally:
        if publisher is not None:
            await publisher.close()
        for pool in pools:
            await pool.close()


async def _redrive(source: Source, since: datetime, topic: str | None, rate: float, publisher: Publisher | None) -> int:
    """One source, page by page; how many messages."""
    after, count = (since, UUID(int=0)), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{source.service}: {source.what}", total=source.total)
        while True:
            async with source.pool.acquire() as conn:
                page = await source.page(conn, since, after, PAGE)
            if not page:
                return count
            emissions = [e for _, _, packed in page for e in unpack(packed) if topic is None or topic in e.topic]
            if publisher is not None:
                await _at_rate(publisher, emissions, rate)
            count += len(emissions)
            after = (page[-1][0], page[-1][1])
            progress.advance(task, len(page))


async def _at_rate(publisher: Publisher, emissions: list[Emission], rate: float) -> None:
    step = max(1, int(rate / 10))
    for first in range(0, len(emissions), step):
        began = time.monotonic()
        part = emissions[first : first + step]
        await publisher.publish(part)
        await asyncio.sleep(max(0.0, len(part) / rate - (time.monotonic() - began)))
