"""`factmesh dlq`: list, groups, show, correct, replay, resolve, discard, assign, stats over the quarantine index.
Options, printing and exit codes live here; what an act does is the quarantine service's `acts`.

Exit codes: 0 done; 1 some records were refused or skipped; 2 the command could not be carried out; 130 interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from factmesh.errors import FactmeshError, Reason, ValidationError
from factmesh.message import unpack_delivery
from factmesh.postgres import Record
from factmesh.telemetry import setup_logging
from factmesh_cli import dlq_edit, dlq_operate, dlq_show
from factmesh_cli.dlq_filter import Wanted, instant_of
from factmesh_cli.dlq_index import Index, catch_up, load_settings, open_index, read_addresses
from factmesh_quarantine import queries
from factmesh_quarantine.acts import RefusedError, correction_of
from factmesh_quarantine.messages import Person

app = typer.Typer(name="dlq", help="Find out what is quarantined and bring it back.", no_args_is_help=True)

RATE = 50.0
"""Replays a second unless told: fast enough for people, slow enough to see a wrong idea fail."""
PLAN_ROWS = 40
"""Lines of a dry run on a terminal; `--json` has all."""

RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="The folder of a running `factmesh up`: addresses come from there.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
Ids = Annotated[list[str] | None, typer.Argument(help="Record ids, or their first characters.", show_default=False)]
By = Annotated[str, typer.Option("--by", help="Who acts.", show_default="you")]
Why = Annotated[str, typer.Option("--reason", help="Why, for the audit.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Topic = Annotated[str | None, typer.Option("--topic", help="Part of the origin topic's name.")]
Cause = Annotated[str | None, typer.Option("--cause", help="Fingerprint, or its first digits (see `groups`).")]
WhyDead = Annotated[Reason | None, typer.Option("--dead-of", help="Why they are quarantined.")]
WhyDeadRead = Annotated[Reason | None, typer.Option("--dead-of", "--reason", help="Why they are quarantined.")]
Instance = Annotated[UUID | None, typer.Option("--instance", help="Workflow instance.")]
Since = Annotated[str | None, typer.Option("--since", help="RFC 3339 instant, or an age: 30m, 12h, 7d.")]
Workflow = Annotated[str | None, typer.Option("--workflow", help="Workflow, where the message names it.")]
Owner = Annotated[str | None, typer.Option("--owner", help="Owner.")]
In = Annotated[
    list[str] | None, typer.Option("--state", help="State, repeatable; `all`. [default: open, failed_again]")
]
All = Annotated[bool, typer.Option("--all", help="Every open record.")]
Rate = Annotated[float, typer.Option("--rate", help="At most so many a second.", min=0.01, max=10_000)]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print what would happen, change nothing.")]
Resume = Annotated[UUID | None, typer.Option("--resume", help="Go on with an operation that was stopped.")]


@contextmanager
def _speaking() -> Iterator[None]:
    """An error that people can act on ends the command with its text and code 2, not with a stack trace."""
    try:
        yield
    except FactmeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@contextlib.asynccontextmanager
async def _index(run_dir: Path | None, *, quiet: bool) -> AsyncIterator[Index]:
    """The index, open and up to the end of every DLQ topic; what a killed run left unpublished is published."""
    given = read_addresses(run_dir) if run_dir is not None else {}
    async with open_index(load_settings(given)) as index:
        with _progress(quiet) as bar:
            task = bar.add_task("reading the DLQ topics", total=None)
            new = await catch_up(index, lambda done, total: bar.update(task, completed=done, total=total))
            bar.update(task, visible=False)
        if new and not quiet:
            typer.echo(f"{new} newly quarantined message(s)", err=True)
        left = await dlq_operate.publish_left_over(index)
        if left:
            typer.echo(f"{left} act(s) that were raised before and not published are published now", err=True)
        yield index


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=dlq_show.console(stderr=True),
        transient=True,
        disable=quiet,
    )


def _run(work: Callable[[Index], Awaitable[int]], run_dir: Path | None, *, quiet: bool = False) -> None:
    """One command: open, catch up, work, exit code."""

    # Whatever waits (a database that is down) says so on standard error: standard output is the answer alone.
    setup_logging("factmesh-dlq", level="warning", fmt="console")

    async def main() -> int:
        async with _index(run_dir, quiet=quiet) as index:
            return await work(index)

    with _speaking():
        code = asyncio.run(main())
    if code:
        raise typer.Exit(code)


# --- reads -----------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    ids: Ids = None, topic: Topic = None, reason: WhyDeadRead = None, cause: Cause = None, instance: Instance = None,
    state: In = None, since: Since = None, workflow: Workflow = None, owner: Owner = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=queries.ROWS_MAX)] = 100,
    json_: Json = False, run_dir: RunDir = None,
) -> None:  # fmt: skip
    """What is quarantined: open records, unless another state is asked for. `*` marks a corrected one."""
    wanted = Wanted(ids, topic, reason, cause, instance, state, since, workflow, owner)

    async def work(index: Index) -> int:
        rows = await queries.list_records(index.pool, await wanted.filter(index), limit)
        if json_:
            dlq_show.print_json([dlq_show.as_json(r) for r in rows])
        else:
            dlq_show.console().print(dlq_show.records_table(rows, index.clock.now()))
            more = " (the first; --limit shows more)" if len(rows) == limit else ""
            typer.echo(f"{len(rows)} record(s){more}", err=True)
        return 0

    _run(work, run_dir, quiet=json_)


@app.command()
def groups(
    topic: Topic = None, reason: WhyDeadRead = None, instance: Instance = None, state: In = None, since: Since = None,
    workflow: Workflow = None, owner: Owner = None, json_: Json = False, run_dir: RunDir = None,
) -> None:  # fmt: skip
    """Records grouped by cause: equal failures up to ids, numbers and quoted values."""
    wanted = Wanted(None, topic, reason, None, instance, state, since, workflow, owner)

    async def work(index: Index) -> int:
        rows = await queries.list_groups(index.pool, await wanted.filter(index))
        if json_:
            dlq_show.print_json([{k: dlq_show.plain(v) for k, v in r.items()} for r in rows])
        else:
            dlq_show.console().print(dlq_show.groups_table(rows, index.clock.now()))
        return 0

    _run(work, run_dir, quiet=json_)


@app.command()
def show(id_: Annotated[str, typer.Argument(metavar="ID")], json_: Json = False, run_dir: RunDir = None) -> None:
    """One record: diagnosis, headers, decoded value, correction as a diff, history."""

    async def work(index: Index) -> int:
        row = await index.acts.read(index.pool, await queries.find(index.pool, id_))
        history, acts = await queries.story(index.pool, row["id"])
        if not json_:
            await dlq_show.show(dlq_show.console(), index.registry, row, history, acts, str(index.acts.way(row)))
            return 0
        out = dlq_show.as_json(row) | {"way_back": str(index.acts.way(row))}
        if row["original"] is not None:
            original = unpack_delivery(row["original"])
            seen = await dlq_edit.view(index.registry, original.value)
            out |= {"value": seen.data, "value_kind": seen.label, "trouble": seen.trouble}
            out["value_hex"] = None if original.value is None else original.value.hex()
            out["headers"] = [[n, None if v is None else v.decode("utf-8", "replace")] for n, v in original.headers]
        out["history"] = [{k: dlq_show.plain(v) for k, v in h.items()} for h in history]
        dlq_show.print_json(out)
        return 0

    _run(work, run_dir, quiet=json_)


@app.command()
def stats(since: Since = None, json_: Json = False, run_dir: RunDir = None) -> None:
    """States by owner, how many replays helped, and how long recovery takes."""

    async def work(index: Index) -> int:
        figures = await queries.stats(index.pool, None if since is None else instant_of(since, index.clock.now()))
        if json_:
            dlq_show.print_json(figures)
            return 0
        dlq_show.console().print(dlq_show.stats_table(figures))
        replays, recovery = figures["replays"], figures["recovery"]
        rate = "-" if replays["success_rate"] is None else f"{replays['success_rate']:.1%}"
        typer.echo(f"replays: {replays['published']} published, {replays['failed_again']} failed again, success {rate}")
        if recovery["records"]:
            mean, median = recovery["mean_s"], recovery["median_s"]
            typer.echo(f"recovery: mean {mean:.0f} s, median {median:.0f} s over {recovery['records']} record(s)")
        return 0

    _run(work, run_dir, quiet=json_)


# --- acts on one record ----------------------------------------------------------------------------------------------


@app.command()
def correct(
    id_: Annotated[str, typer.Argument(metavar="ID")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="PATH=VALUE of the decoded value.")] = None,
    header: Annotated[list[str] | None, typer.Option("--header", help="NAME=VALUE; NAME= removes it.")] = None,
    file: Annotated[Path | None, typer.Option("--file", exists=True, dir_okay=False, help="The new value.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="--file holds the bytes themselves, not JSON.")] = False,
    schema: Annotated[str | None, typer.Option("--schema", help="Write with SUBJECT/vN, or a schema id.")] = None,
    by: By = "", reason: Why = "corrected", yes: Yes = False, run_dir: RunDir = None,
) -> None:  # fmt: skip
    """Replace the value or headers of the next replay. The original is kept. Without options, opens $EDITOR."""

    async def work(index: Index) -> int:
        row = await index.acts.read(index.pool, await queries.find(index.pool, id_))
        if row["original"] is None:
            raise RefusedError("its bytes are past their retention", where=f"record {row['id']}")
        index.acts.check_correctable(row)  # before a person is shown a diff and asked
        original, before = unpack_delivery(row["original"]), correction_of(row)
        value, headers = (original.value, original.headers) if before is None else (before.value, before.headers)
        new_headers = dlq_edit.set_headers(headers, header or [])
        if file is not None and raw:
            new: bytes | None = await asyncio.to_thread(file.read_bytes)
        elif set_ or file is not None or schema or not header:
            new = await _corrected(index, value, set_ or [], file, schema)
        else:
            new = value
        changes = await dlq_show.changes(index.registry, original.value, original.headers, new, new_headers)
        dlq_show.print_diff(dlq_show.console(), changes)
        if (new, new_headers) == (value, headers):
            typer.echo("nothing was changed", err=True)
            return 1
        if not yes and not typer.confirm("Keep this correction for the next replay?", err=True):
            return 1
        await index.acts.correct(row, new, new_headers, Person(by or getpass.getuser(), reason, index.clock.now()))
        typer.echo(f"corrected; `factmesh dlq replay {str(row['id'])[:13]}` sends it", err=True)
        return 0

    _run(work, run_dir)


async def _corrected(
    index: Index, value: bytes | None, sets: list[str], file: Path | None, schema: str | None
) -> bytes:
    seen = await dlq_edit.view(index.registry, value)
    if schema is not None:
        subject, _, version = schema.rpartition("/v")
        found = await (
            index.registry.by_id(int(schema)) if schema.isdigit() else index.registry.by_version(subject, int(version))
        )
        seen = dlq_edit.written_with(seen, found)
    data = seen.data
    if file is not None:
        try:
            data = json.loads(await asyncio.to_thread(file.read_bytes))
        except ValueError as error:
            raise ValidationError(
                f"not JSON: {error}", where=str(file), hint="--raw takes the bytes as they are"
            ) from None
    for assignment in sets:
        data = dlq_edit.set_path(data, assignment)
    if file is None and not sets and schema is None:
        edited = await asyncio.to_thread(_edit, dlq_edit.pretty(seen), ".txt" if seen.kind == "text" else ".json")
        if edited is not None:
            try:
                data = edited.rstrip("\n") if seen.kind == "text" else json.loads(edited)
            except ValueError as error:
                raise ValidationError(f"what you wrote is not JSON: {error}", hint="nothing was changed") from None
    return dlq_edit.encode(seen, data)


def _edit(text: str, suffix: str) -> str | None:
    """What a person leaves in their editor, or None if they left it as it was."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.NamedTemporaryFile("w+", suffix=suffix, encoding="utf-8") as draft:
        draft.write(text + "\n")
        draft.flush()
        try:
            code = subprocess.run([*shlex.split(command), draft.name], check=False).returncode
        except OSError as error:
            raise ValidationError(
                f"cannot start {command!r}: {error.strerror}", hint="set EDITOR, or use --set"
            ) from None
        if code:
            raise ValidationError(f"{command!r} ended with {code}", hint="nothing was changed")
        edited = Path(draft.name).read_text(encoding="utf-8")
    return None if edited.rstrip("\n") == text.rstrip("\n") else edited


@app.command()
def resolve(
    ids: Annotated[list[str], typer.Argument(help="Record ids, or their first characters.")],
    reason: Annotated[str, typer.Option("--reason", help="How you know, for the audit.")],
    happened: Annotated[str | None, typer.Option("--happened", help="It happened; its answer as JSON.")] = None,
    not_happened: Annotated[bool, typer.Option("--not-happened", help="It did not happen.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="With --not-happened: run the step again.")] = False,
    by: By = "", yes: Yes = False, run_dir: RunDir = None,
) -> None:  # fmt: skip
    """Say whether an unknown outcome happened. Such a command is never simply replayed."""

    async def work(index: Index) -> int:
        if (happened is None) == (not not_happened):
            raise ValidationError("say either --happened OUTPUT or --not-happened")
        output = None
        if happened is not None:
            try:
                output = dlq_edit.compact(json.loads(happened))
            except ValueError as error:
                raise ValidationError(
                    f"the output is not JSON: {error}", hint="--happened '{}' if it has none"
                ) from None
        verdict = "not_happened" if not_happened else "happened"
        records = [await queries.find(index.pool, i) for i in ids]
        if not yes and not typer.confirm(f"Record {len(records)} command(s) as {verdict.replace('_', ' ')}?", err=True):
            return 1
        refused = 0
        for record in records:
            person = Person(by or getpass.getuser(), reason, index.clock.now())
            try:
                async with index.pool.acquire() as conn, conn.transaction():
                    raised = await index.acts.resolve(conn, record, person, verdict=verdict, output=output, retry=retry)
                await index.acts.publish_act(raised.act, index.clock.now)
                typer.echo(f"{record}: {verdict} (opening {raised.number})")
            except RefusedError as error:
                refused += 1
                typer.echo(f"refused: {error}", err=True)
        if refused < len(records):
            typer.echo("a word that does not count (said too early, a wrong output) opens its record again", err=True)
        return 1 if refused else 0

    _run(work, run_dir)


@app.command()
def assign(
    ids: Annotated[list[str], typer.Argument(help="Record ids, or their first characters.")],
    to: Annotated[str, typer.Option("--to", help="The new owner.")],
    by: By = "", run_dir: RunDir = None,
) -> None:  # fmt: skip
    """Give records an owner."""

    async def work(index: Index) -> int:
        for i in ids:
            await index.acts.assign(
                await queries.find(index.pool, i), to, Person(by or getpass.getuser(), "", index.clock.now())
            )
        return 0

    _run(work, run_dir)


# --- acts on many ----------------------------------------------------------------------------------------------------


@app.command()
def replay(
    ids: Ids = None, topic: Topic = None, reason_dead: WhyDead = None, cause: Cause = None, instance: Instance = None,
    since: Since = None, workflow: Workflow = None, owner: Owner = None, all_: All = False,
    rate: Rate = RATE, dry_run: Dry = False, resume: Resume = None, by: By = "", reason: Why = "replayed",
    yes: Yes = False, json_: Json = False, run_dir: RunDir = None,
) -> None:  # fmt: skip
    """Send messages again, corrected where they were corrected: one, a group (`--cause`), or what a filter finds."""
    wanted = Wanted(ids, topic, reason_dead, cause, instance, None, since, workflow, owner)
    bulk = partial(_bulk, verb="replay", wanted=wanted, all_=all_, rate=rate, dry_run=dry_run, resume=resume)
    _run(partial(bulk, by=by, reason=reason, yes=yes, as_json=json_), run_dir, quiet=json_)


@app.command()
def discard(
    reason: Annotated[str, typer.Option("--reason", help="Why it is given up, for the audit.")],
    ids: Ids = None, topic: Topic = None, reason_dead: WhyDead = None, cause: Cause = None, instance: Instance = None,
    since: Since = None, workflow: Workflow = None, owner: Owner = None, all_: All = False,
    rate: Rate = RATE, dry_run: Dry = False, resume: Resume = None, by: By = "",
    yes: Yes = False, json_: Json = False, run_dir: RunDir = None,
) -> None:  # fmt: skip
    """Give messages up for good. Whoever waits for one is told."""
    wanted = Wanted(ids, topic, reason_dead, cause, instance, None, since, workflow, owner)
    bulk = partial(_bulk, verb="discard", wanted=wanted, all_=all_, rate=rate, dry_run=dry_run, resume=resume)
    _run(partial(bulk, by=by, reason=reason, yes=yes, as_json=json_), run_dir, quiet=json_)


async def _bulk(
    index: Index, *, verb: str, wanted: Wanted, all_: bool, rate: float, dry_run: bool, resume: UUID | None,
    by: str, reason: str, yes: bool, as_json: bool,
) -> int:  # fmt: skip
    """Replay or discard: plan, ask, then a resumable operation."""
    by = by or getpass.getuser()
    if resume is not None:
        operation = await dlq_operate.find(index, resume)
        if operation.verb != verb:
            raise ValidationError(f"operation {resume} is a {operation.verb}", hint=f"`factmesh dlq {operation.verb}`")
        return await _operate(index, operation, by, rate, as_json)
    if wanted.is_empty and not all_:
        raise ValidationError("nothing was selected", hint="name ids, a filter such as --cause, or --all")
    found = await wanted.filter(index)
    rows: Sequence[Record] = await queries.list_records(index.pool, found)
    plans = await dlq_operate.plan(index, rows, verb, by, reason, index.clock.now())
    possible = [p for p in plans if not p.refused]
    if dry_run:
        if as_json:
            dlq_show.print_json(dlq_show.plan_json(plans))
        else:
            dlq_show.console().print(dlq_show.plan_table(plans[:PLAN_ROWS]))
            typer.echo(
                f"dry run: {len(possible)} of {len(plans)} record(s) would be {verb}ed; nothing was changed", err=True
            )
        return 0
    for p in plans:
        if p.refused:
            typer.echo(f"{p.row['id']}: {p.refused}", err=True)
    if not possible:
        typer.echo("nothing to do", err=True)
        return 1 if plans else 0
    if not yes and not typer.confirm(f"{verb.capitalize()} {len(possible)} record(s), {rate:g} a second?", err=True):
        return 1
    cohort = [p.row["id"] for p in possible]
    operation = await dlq_operate.begin(index, verb, by, reason, found.text, cohort)
    if len(cohort) > 1:
        typer.echo(f"operation {operation.id}; if it is stopped: factmesh dlq {verb} --resume {operation.id}", err=True)
    code = await _operate(index, operation, by, rate, as_json)
    return code or (1 if len(possible) < len(plans) else 0)


async def _operate(index: Index, operation: dlq_operate.Operation, by: str, rate: float, as_json: bool) -> int:
    act = index.acts.replay if operation.verb == "replay" else index.acts.discard
    before = await dlq_operate.tally(index, operation)
    steps: list[dict[str, Any]] = []
    with _progress(as_json) as bar:
        task = bar.add_task(operation.verb, total=before.total, completed=before.total - before.left)

        def told(step: dlq_operate.Step) -> None:
            bar.advance(task)
            number = step.raised.number if step.raised is not None else None
            steps.append({"id": str(step.record), "opening": number, "refused": step.refused or None})
            if step.refused:
                bar.console.print(f"{step.record}: {step.refused}", markup=False)

        after = await dlq_operate.run(index, operation, act, by, rate=rate, told=told)
    if as_json:
        dlq_show.print_json(
            {
                "operation": str(operation.id),
                "total": after.total,
                "done": after.raised,
                "skipped": after.skipped,
                "steps": steps,
            }
        )
    else:
        typer.echo(f"{operation.verb}: {after.raised} done, {after.skipped} skipped, of {after.total}")
    return 1 if any(s["refused"] for s in steps) else 0


if __name__ == "__main__":
    app()
