"""`factmesh schema`: check, lint, lock, release, register and show the schemas of the platform and of a project.
Printing and exit codes live here; the rules are `factmesh.schemas_check`'s, the files `factmesh.schema_files`'s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from factmesh import avro, schema_files, schemas_check
from factmesh.errors import FactmeshError
from factmesh.registry import HttpRegistry
from factmesh.schema_files import LockEntry, SchemaFile

app = typer.Typer(name="schema", help="Check, lock, release, register and show schemas.", no_args_is_help=True)

FoldersArgument = Annotated[
    list[Path] | None, typer.Argument(help="Schema directories; the platform's own if absent.", show_default=False)
]
ProjectOption = Annotated[
    Path | None, typer.Option("--project", "-p", envvar="FACTMESH_PROJECT", help="Add the schemas of this project.")
]
UrlOption = Annotated[
    str, typer.Option("--url", envvar="FACTMESH_REGISTRY_URL", help="A Confluent-compatible schema registry.")
]


@contextmanager
def _speaking() -> Iterator[None]:
    """An error that people can act on ends the command with its text and code 2, not with a stack trace."""
    try:
        yield
    except FactmeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _folders(given: list[Path] | None, project: Path | None) -> list[Path]:
    folders = list(given) if given else [schema_files.platform_dir()]
    if project is not None:
        folders.append(project / "schemas")
    return folders


def _judge(folders: list[Path], *, compatibility: bool) -> None:
    findings = schemas_check.judge(folders, compatibility=compatibility)
    for finding in findings:
        typer.echo(str(finding))
    if findings:
        typer.echo(f"{len(findings)} finding(s)", err=True)
        raise typer.Exit(1)
    files = schema_files.read_dirs(folders)
    drafts = [f.key for f in files if not f.lock.released]
    typer.echo(f"{len(files)} schema version(s) in order" + (f", drafts: {', '.join(drafts)}" if drafts else ""))


@app.command()
def check(folders: FoldersArgument = None, project: ProjectOption = None) -> None:
    """Lint, and check compatibility FULL_TRANSITIVE. Ends with 1 if anything forbids a release."""
    with _speaking():
        _judge(_folders(folders, project), compatibility=True)


@app.command()
def lint(folders: FoldersArgument = None, project: ProjectOption = None) -> None:
    """The rules over files alone, without the compatibility check."""
    with _speaking():
        _judge(_folders(folders, project), compatibility=False)


@app.command()
def lock(folder: Annotated[Path, typer.Argument(help="A schema directory.")]) -> None:
    """Give every version without an id the next free one: as a draft, still to be changed."""
    with _speaking():
        path = folder / schema_files.LOCK_NAME
        entries = schema_files.read_lock(folder) if path.exists() else {}
        found = schema_files.sources(folder)
        for key in sorted(found.keys() - entries.keys(), key=_in_order):
            subject, _, version = key.rpartition("/v")
            avro.parse(found[key][1], subject=subject, version=int(version))
            platform = subject.startswith(schemas_check.PLATFORM_PREFIX)
            entries[key] = LockEntry(schema_files.next_id(entries, platform=platform))
            typer.echo(f"{key}: id {entries[key].id}")
        schema_files.write_lock(folder, entries)


def _in_order(key: str) -> tuple[str, int]:
    subject, _, version = key.rpartition("/v")
    return subject, int(version)


@app.command()
def release(folder: Annotated[Path, typer.Argument(help="A schema directory.")]) -> None:
    """Make every draft immutable: its hash enters the lock. Checks first, and ends with 1 if a rule forbids it."""
    with _speaking():
        _judge([folder], compatibility=True)
        entries = schema_files.read_lock(folder)
        for file in schema_files.read_dir(folder):
            if not file.lock.released:
                entries[file.key] = LockEntry(file.lock.id, schema_files.digest_of(file.schema.source))
                typer.echo(f"{file.key}: released")
        schema_files.write_lock(folder, entries)


@app.command()
def register(url: UrlOption, folders: FoldersArgument = None, project: ProjectOption = None) -> None:
    """Put every version into a registry, under the ids of the lock where it allows that. May be repeated."""
    with _speaking():
        files = schema_files.read_dirs(_folders(folders, project))
        others = asyncio.run(_register(url, files))
    if others:
        typer.echo(f"the registry gave {others} schema(s) ids of its own: producers look theirs up there", err=True)


async def _register(url: str, files: tuple[SchemaFile, ...]) -> int:
    others = 0
    async with HttpRegistry(url) as registry:
        for file in files:
            found = await registry.register(file.schema)
            others += found.id != file.lock.id
            note = "" if found.id == file.lock.id else f" (the lock says {file.lock.id})"
            typer.echo(f"{file.key}: id {found.id}{note}")
    return others


@app.command()
def show(
    what: Annotated[
        str | None, typer.Argument(help="<subject>/v<version>, a subject, or an id; all if absent.")
    ] = None,
    folders: FoldersArgument = None,
    project: ProjectOption = None,
) -> None:
    """List the schemas, or print one."""
    with _speaking():
        files = schema_files.read_dirs(_folders(folders, project))
    if what is None:
        for f in files:
            typer.echo(f"{f.lock.id:>6}  {f.key:<40} {'released' if f.lock.released else 'draft'}")
        return
    found = [f for f in files if what in (f.key, f.schema.subject, str(f.lock.id))]
    if not found:
        typer.echo(f"error: no schema {what} (list them: factmesh schema show)", err=True)
        raise typer.Exit(2)
    typer.echo(json.dumps(found[-1].schema.source, indent=2, ensure_ascii=False))
