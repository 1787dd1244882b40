"""`factmesh workflow deploy` and `factmesh workflow test`: definitions into a mesh, and cases without one.
Printing and exit codes live here; what a deployment means is the orchestrator's `store`, what a case means its `cases`.
"""

from __future__ import annotations

import asyncio
import getpass
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer

from factmesh import yaml
from factmesh.errors import DefinitionError, FactmeshError, SettingsError
from factmesh.expressions import default_expressions
from factmesh.postgres import Migrations, connect, migrate
from factmesh.project import Project
from factmesh.workflow import compile_workflow
from factmesh.workflow.linter import errors_of
from factmesh_cli.dlq_index import read_addresses
from factmesh_orchestrator.cases import Verdict, parse_cases, run_case
from factmesh_orchestrator.definitions import deployed
from factmesh_orchestrator.model import diagram
from factmesh_orchestrator.service import MIGRATIONS, offered_plugins, texts_of
from factmesh_orchestrator.store import deploy as deploy_one

app = typer.Typer()

BEGIN, END = "<!-- states:begin -->", "<!-- states:end -->"

PathArgument = Annotated[Path, typer.Argument(help="A project folder, or one file of it.", exists=True)]


def project_of(path: Path) -> tuple[Project, tuple[str, int] | None]:
    """The project that a path lies in, and the workflow version that it names, if it names one."""
    path = path.resolve()
    if path.is_dir():
        return Project.load(path), None
    # PROJECT/workflows/NAME/vN.yaml or vN.cases.yaml
    if len(path.parents) < 3 or path.parents[1].name != "workflows":
        raise DefinitionError(
            "is neither a project folder nor a file in its workflows/", where=str(path), hint="give the project folder"
        )
    project = Project.load(path.parents[2])
    for name, major in project.workflow_documents:
        if name == path.parent.name and path.name in (f"v{major}.yaml", f"v{major}.cases.yaml"):
            return project, (name, major)
    raise DefinitionError("is no version of a workflow", where=str(path), hint="name it vN.yaml or vN.cases.yaml")


def commit_of(folder: Path) -> str:
    """The commit that the folder is at, marked where a file differs from it; `unknown` outside of a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@app.command()
def deploy(
    path: PathArgument,
    dsn: Annotated[
        str, typer.Option(envvar=["FACTMESH_ORCHESTRATOR_DSN", "FACTMESH_POSTGRES_DSN"], help="As its role.")
    ] = "",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="The folder of a running `factmesh up`: addresses come from there.")
    ] = None,
    namespace: Annotated[str, typer.Option(envvar="FACTMESH_NAMESPACE", help="The mesh's namespace.")] = "",
    by: Annotated[str | None, typer.Option(help="Who deploys; you, unless given.")] = None,
    commit: Annotated[str | None, typer.Option(help="The definition's commit; the folder's, unless given.")] = None,
    connector: Annotated[
        list[str] | None, typer.Option("--connector", help="A connector that is declared elsewhere; may be repeated.")
    ] = None,
) -> None:
    """Lint, then store definitions and make them current. A running orchestrator picks them up at once."""
    try:
        given = read_addresses(run_dir) if run_dir is not None else {}
        dsn = given.get("FACTMESH_ORCHESTRATOR_DSN", dsn)
        namespace = given.get("FACTMESH_NAMESPACE", namespace)
        if not dsn:
            raise SettingsError("no database is named", hint="give --dsn, FACTMESH_ORCHESTRATOR_DSN, or --run-dir")
        project, only = project_of(path)
        _lint(project, only, {*(connector or ()), *offered_plugins()})
        texts = {key: text for key, text in texts_of(project).items() if only in (None, key)}
        who, what = by or f"person:{getpass.getuser()}", commit or commit_of(project.root)
        schema = f"{namespace}_orchestrator" if namespace else "orchestrator"
        for line in asyncio.run(_deploy(dsn, schema, project, texts, who, what)):
            typer.echo(line)
    except FactmeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _lint(project: Project, only: tuple[str, int] | None, plugins: Collection[str]) -> None:
    findings = errors_of(project.lint(default_expressions(), only=only[0] if only else None, plugins=plugins))
    for finding in findings:
        typer.echo(str(finding), err=True)
    if findings:
        raise DefinitionError(f"{len(findings)} rule(s) are broken, nothing was deployed", where=str(project.root))


async def _deploy(
    dsn: str, schema: str, project: Project, texts: Mapping[tuple[str, int], str], by: str, commit: str
) -> list[str]:
    library = Path(yaml.__file__).with_name("migrations")
    await migrate(dsn, schema, [Migrations("factmesh", library), Migrations("orchestrator", MIGRATIONS)])
    connection = await connect(dsn, schema=schema, application="factmesh-deploy")
    lines = []
    try:
        for (name, major), text in texts.items():
            act = await deploy_one(connection, schema, text, project.policies, by=by, commit=commit)
            lines.append(f"{name} {project.workflow(name, major).version}: {act} ({by}, commit {commit})")
    finally:
        await connection.close()
    return lines


@app.command("test")
def test_cases(path: PathArgument) -> None:
    """Run the cases beside the workflows, without any broker. Ends with 1 where one does not hold."""
    try:
        project, only = project_of(path)
        verdicts = {
            key: run_cases(project, key) for key in sorted(project.case_files) if only in (None, key)
        }
    except FactmeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    failed = 0
    for (name, major), of in verdicts.items():
        for verdict in of:
            failed += bool(verdict.problems)
            typer.echo(f"{'FAILED' if verdict.problems else 'ok    '} {name} v{major}: {verdict.name}")
            for problem in verdict.problems:
                typer.echo(f"         {problem}")
    total = sum(map(len, verdicts.values()))
    typer.echo(f"{total} case(s): {total - failed} hold, {failed} do not")
    if failed or not total:
        raise typer.Exit(1)


def run_cases(project: Project, key: tuple[str, int]) -> list[Verdict]:
    """Every case of one version."""
    compiled = compile_workflow(project.workflow(*key), default_expressions())
    version = deployed(compiled, project.policies, "unknown")
    return [run_case(version, case) for case in parse_cases(yaml.load(project.case_files[key])).cases]


@app.command()
def states(
    check: Annotated[bool, typer.Option("--check", help="Compare with the file; end with 1 where it differs.")] = False,
    file: Annotated[Path, typer.Option("--file", help="Where it stands.")] = Path("services/orchestrator/README.md"),
) -> None:
    """Draw the states of an instance from the transition table into the orchestrator's README."""
    drawn = f"{BEGIN}\n```mermaid\n{diagram()}```\n{END}"
    text = file.read_text(encoding="utf-8")
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        typer.echo(f"error: {file} has no {BEGIN} … {END}", err=True)
        raise typer.Exit(2)
    wanted = text[:begin] + drawn + text[end + len(END) :]
    if not check:
        file.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        typer.echo(f"error: {file} is not what the transition table says (run: factmesh workflow states)", err=True)
        raise typer.Exit(1)
