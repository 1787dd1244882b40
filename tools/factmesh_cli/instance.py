"""`factmesh instance`: list, count, show instances through the orchestrator's views, and end one by hand.
Reads views only; what changes an instance goes as a signal, the one write path, and is awaited here.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table

from factmesh import ids, kafka
from factmesh.clock import SystemClock
from factmesh.effects import Publish
from factmesh.emitting import Cause, Emitter
from factmesh.errors import FactmeshError, SettingsError, ValidationError
from factmesh.message import rfc3339, to_ms
from factmesh.postgres import Pool, Record, create_pool, load_sql
from factmesh.records import Records
from factmesh.registry import open_registry
from factmesh.settings import Settings
from factmesh_cli.dlq_index import load_settings, read_addresses
from factmesh_cli.dlq_show import escape

app = typer.Typer(name="instance", help="Show workflow instances, and end one by hand.", no_args_is_help=True)
SQL = load_sql(__file__, "instance.sql")
ENDS = ("failed", "cancelled", "completed", "rejected")
APPLIED_S_MAX = 20.0
"""How long `end` waits to see that its signal was applied."""

RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="The folder of a running `factmesh up`: addresses come from there.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The instance's id, or its first characters.")]


@dataclass(frozen=True)
class Opened:
    """What a command needs."""

    settings: Settings
    pool: Pool


@contextlib.asynccontextmanager
async def opened(run_dir: Path | None) -> AsyncIterator[Opened]:
    """The orchestrator's schema with its role. Raises SettingsError where it never started."""
    given = read_addresses(run_dir) if run_dir is not None else {}
    settings = load_settings(given)
    dsn = given.get("FACTMESH_ORCHESTRATOR_DSN") or os.environ.get("FACTMESH_ORCHESTRATOR_DSN")
    schema = settings.schema_name("orchestrator")
    pool = await create_pool(
        dsn or settings.postgres_dsn.get_secret_value(), schema=schema, application="factmesh-instance", size_max=2
    )
    try:
        if await pool.fetchval(SQL.is_there) is None:
            raise SettingsError(
                f"there are no instances in schema {schema}",
                hint="start factmesh-orchestrator once, and give its role's address in FACTMESH_ORCHESTRATOR_DSN",
            )
        yield Opened(settings, pool)
    finally:
        await pool.close()


def _run(work: Callable[[Opened], Awaitable[int]], run_dir: Path | None) -> None:
    async def go() -> int:
        async with opened(run_dir) as o:
            return await work(o)

    try:
        code = asyncio.run(go())
    except FactmeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if code:
        raise typer.Exit(code)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return rfc3339(to_ms(value))
    return str(value) if isinstance(value, UUID) else value


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


@app.command("list")
def list_(
    status: Annotated[list[str] | None, typer.Option("--status", help="Of this status; repeatable.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Only what needs a person.")] = False,
    workflow: Annotated[str | None, typer.Option("--workflow", help="Of this workflow.")] = None,
    object_id: Annotated[str | None, typer.Option("--object", help="Of this business object id.")] = None,
    correlation: Annotated[str | None, typer.Option("--correlation", help="With this correlation id.")] = None,
    counts: Annotated[bool, typer.Option("--counts", help="Only how many of each status.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=100_000)] = 50,
    json_: Json = False,
    run_dir: RunDir = None,
) -> None:
    """Instances, newest first."""

    async def work(o: Opened) -> int:
        if counts:
            rows = await o.pool.fetch(SQL.counts)
        else:
            rows = await o.pool.fetch(SQL.list, status or None, workflow, object_id, correlation, attention, limit)
        if json_:
            _print_json([{k: _plain(v) for k, v in row.items()} for row in rows])
        elif counts:
            _table(rows, ("workflow", "workflow_version", "status", "n"))
        else:
            _table(rows, ("id", "workflow", "workflow_version", "object_id", "status", "step", "started_at", "due_by"))
        return 0

    _run(work, run_dir)


def _table(rows: list[Record], columns: tuple[str, ...]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(escape(str(_plain(row[c]))) if row[c] is not None else "" for c in columns))
    Console(soft_wrap=True, highlight=False).print(table)


async def _find(o: Opened, id_: str) -> Record:
    text = id_.strip().lower().replace("%", "").replace("_", "")
    rows = await o.pool.fetch(SQL.find, text)
    if len(rows) != 1:
        what = "no instance" if not rows else "more than one instance"
        raise ValidationError(f"{what} begins with {text!r}", hint="see `factmesh instance list`")
    return rows[0]


@app.command()
def show(id_: IdArgument, json_: Json = False, run_dir: RunDir = None) -> None:
    """One instance: where it is, its steps, what is outstanding, what is quarantined."""

    async def work(o: Opened) -> int:
        row = await _find(o, id_)
        state = json.loads(await o.pool.fetchval(SQL.state, row["id"]))
        if json_:
            _print_json({**{k: _plain(v) for k, v in row.items()}, "state": state})
        else:
            _show(row, state)
        return 0

    _run(work, run_dir)


def _show(row: Record, state: dict[str, Any]) -> None:
    out = Console(soft_wrap=True, highlight=False)
    for name, value in row.items():
        if value is not None:
            out.print(f"{name.replace('_', ' '):<18} {escape(str(_plain(value)))}")
    out.print("\nsteps")
    for name, (status, runs, _output, command_id, error_class, error_message) in state.get("steps", {}).items():
        error = f"  {error_class}: {error_message}" if error_class else ""
        command = f"  command {command_id}" if command_id else ""
        out.print(escape(f"  {name:<20} {status:<8} run {runs}{command}{error}"))
    for title, key in (("outstanding commands", "commands"), ("timers", "timers"), ("kept retries", "retries")):
        if state.get(key):
            out.print(f"\n{title}")
            for id_, fields in state[key].items():
                out.print(escape(f"  {id_}  {' '.join(map(str, fields[:2]))}"))
    if state.get("parks"):
        out.print("\nquarantined records (highest opening parked, released, discarded; -1 is never)")
        for record, (parked, released, discarded, command_id) in state["parks"].items():
            of = f"  command {command_id}" if command_id else ""
            out.print(escape(f"  {record}  {parked} {released} {discarded}{of}"))
        out.print(f"\nwhat to do about them: factmesh dlq list --instance {row['id']}")


@app.command()
def end(
    id_: IdArgument,
    status: Annotated[str, typer.Option("--status", help=f"How it ends: {', '.join(ENDS)}.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit and the status topic.")],
    by: Annotated[str, typer.Option("--by", help="Who acts; you, unless given.")] = "",
    run_dir: RunDir = None,
) -> None:
    """End an instance that is parked or needs resolution, as settled by hand. Ends with 1 where it was refused."""

    async def work(o: Opened) -> int:
        row = await _find(o, id_)
        if status not in ENDS:
            raise ValidationError(f"an instance is not ended as {status!r}", hint=f"one of {', '.join(ENDS)}")
        if row["attention_since"] is None:
            raise ValidationError(
                f"instance {row['id']} is {row['status']}",
                hint="only what is parked or needs_resolution is ended by hand",
            )
        await _send_end(o, row, status, reason, by or getpass.getuser())
        after = await _until_ended(o, row["id"])
        if after["ended_at"] is None:
            typer.echo(
                f"instance {row['id']} is still {after['status']}: a command of it is outstanding (see `factmesh"
                " instance show`; resolve, replay or discard its record), or the orchestrator is not running",
                err=True,
            )
            return 1
        typer.echo(f"instance {row['id']} ended as {after['status']}")
        return 0

    _run(work, run_dir)


async def _send_end(o: Opened, row: Record, status: str, reason: str, by: str) -> None:
    now = SystemClock().now()
    settings = o.settings
    registry = open_registry(url=settings.registry_url, schemas_dir=settings.schemas_dir, project=settings.project)
    try:
        records = await Records.open(registry, settings.schemas_dir)
        await kafka.wait_for_broker(settings.kafka_bootstrap)
        publisher = kafka.Publisher(settings.kafka_bootstrap, client_id="factmesh-instance")
        try:
            root = f"end:{row['id']}:{status}:{by}"
            body = {
                "ce_type": "signal.end_instance",
                "correlation_id": row["correlation_id"],
                "actor": f"person:{by}",
                "business_object_type": row["object_type"],
                "business_object_id": row["object_id"],
                "instance_id": str(row["id"]),
                "instance_seq": row["seq"],
                "signal": "end_instance",
                "body": ids.canonical_json({"status": status, "reason": reason}),
            }
            publish = Publish("signal", "signal", str(row["id"]), body)
            emitter = Emitter("tool", settings.topic_prefix, records.encode)
            cause = Cause(root, 0, to_ms(now), root, {}, None)
            await publisher.publish([emitter.emit(publish, cause, 0, now)])
        finally:
            await publisher.close()
    finally:
        await registry.close()


async def _until_ended(o: Opened, id_: UUID) -> Record:
    """The instance once it has ended, or as it is when the bound is over."""
    clock = SystemClock()
    deadline = clock.monotonic() + APPLIED_S_MAX
    while True:
        row = (await o.pool.fetch(SQL.find, str(id_)))[0]
        if row["ended_at"] is not None or clock.monotonic() > deadline:
            return row
        await clock.sleep(0.1)
