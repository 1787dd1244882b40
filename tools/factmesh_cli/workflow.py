"""`factmesh workflow`: lint, draw, export the definitions of a project folder, and their JSON Schema.
Printing and exit codes live here; the rules, the drawing and the schema are `factmesh.workflow`'s.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from factmesh.errors import FactmeshError
from factmesh.expressions import default_expressions
from factmesh.project import Project
from factmesh.workflow import graph
from factmesh.workflow.linter import Finding, errors_of
from factmesh.workflow.schema import schema_text
from factmesh_cli.neighbours import neighbour_findings

app = typer.Typer(name="workflow", help="Lint, draw, export and deploy workflow definitions.", no_args_is_help=True)

ProjectOption = Annotated[
    Path, typer.Option("--project", "-p", envvar="FACTMESH_PROJECT", help="The project folder.", show_envvar=True)
]
VersionOption = Annotated[
    int | None, typer.Option("--version", "-v", help="Major version (the N of vN.yaml); the highest if absent.", min=1)
]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file, not to the terminal.")]


class Drawing(StrEnum):
    MERMAID = "mermaid"
    DOT = "dot"


class Report(StrEnum):
    TEXT = "text"
    JSON = "json"


@contextmanager
def _speaking() -> Iterator[None]:
    """An error that people can act on ends the command with its text and code 2, not with a stack trace."""
    try:
        yield
    except FactmeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def lint(
    project: ProjectOption,
    name: Annotated[str | None, typer.Argument(help="One workflow; all of the project if absent.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    report: Annotated[Report, typer.Option("--format", help="How to print the findings.")] = Report.TEXT,
    connector: Annotated[
        list[str] | None, typer.Option("--connector", help="A connector that is declared elsewhere; may be repeated.")
    ] = None,
) -> None:
    """Check workflows, and the connectors, adapters, channels and templates that they need, against the rules.

    Ends with 1 if a rule is broken that forbids a deployment, with 2 if the project cannot be loaded.
    """
    with _speaking():
        loaded = Project.load(project)
        if name is not None and all(known != name for known, _ in loaded.workflow_documents):
            loaded.workflow(name)
        plugins = {*(connector or ()), *(entry.name for entry in entry_points(group="factmesh.connectors"))}
        findings = loaded.lint(default_expressions(), only=name, plugins=plugins)
        if name is None:
            findings = (*neighbour_findings(loaded), *findings)
    checked = sum(1 for known, _ in loaded.workflow_documents if name in (None, known))
    errors = errors_of(findings)
    _print_findings(findings, report)
    if report is Report.TEXT:
        warnings = len(findings) - len(errors)
        typer.echo(f"{checked} workflow version(s) checked: {len(errors)} error(s), {warnings} warning(s)")
    if errors or (strict and findings):
        raise typer.Exit(1)


def _print_findings(findings: tuple[Finding, ...], report: Report) -> None:
    if report is Report.JSON:
        rows = [
            {"rule": f.rule, "severity": f.severity, "where": f.where, "message": f.message, "hint": f.hint}
            for f in findings
        ]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for finding in findings:
        typer.echo(str(finding))


@app.command()
def draw(
    project: ProjectOption,
    name: Annotated[str, typer.Argument(help="The workflow.")],
    version: VersionOption = None,
    drawing: Annotated[Drawing, typer.Option("--format", help="The drawing's language.")] = Drawing.MERMAID,
    output: OutputOption = None,
) -> None:
    """Draw a workflow as a graph: Mermaid, or Graphviz dot."""
    with _speaking():
        workflow = Project.load(project).workflow(name, version)
        text = graph.dot(workflow) if drawing is Drawing.DOT else graph.mermaid(workflow)
    _put(text, output)


@app.command()
def export(
    project: ProjectOption,
    name: Annotated[str, typer.Argument(help="The workflow.")],
    version: VersionOption = None,
    output: OutputOption = None,
) -> None:
    """Write a workflow as JSON with its content hash, for other tools and for a comparison of environments."""
    with _speaking():
        workflow = Project.load(project).workflow(name, version)
    bundle = {
        "namespace": workflow.namespace,
        "name": workflow.name,
        "version": workflow.version,
        "content_hash": workflow.content_hash,
        "definition": workflow.source.data,
    }
    _put(json.dumps(bundle, indent=2, ensure_ascii=False) + "\n", output)


@app.command()
def schema(
    check: Annotated[bool, typer.Option("--check", help="Compare with the file; end with 1 where it differs.")] = False,
    file: Annotated[Path, typer.Option("--file", help="The file.")] = Path("schemas/workflow.schema.json"),
    stdout: Annotated[bool, typer.Option("--print", help="Print it, and leave the file alone.")] = False,
) -> None:
    """Generate the JSON Schema of workflow files from the models."""
    text = schema_text()
    if stdout:
        typer.echo(text, nl=False)
    elif not check:
        _put(text, file)
    elif not file.is_file() or file.read_text(encoding="utf-8") != text:
        typer.echo(f"error: {file} is not what the models say (run: factmesh workflow schema)", err=True)
        raise typer.Exit(1)


def _put(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        typer.echo(f"error: {output} cannot be written: {error.strerror} (name another --output)", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"wrote {output}", err=True)


def _add_deploy_commands() -> None:
    """`deploy` and `test` speak with the orchestrator's schema and core; their module adds its own commands here."""
    if importlib.util.find_spec("factmesh_cli.workflow_deploy") is not None:
        module = importlib.import_module("factmesh_cli.workflow_deploy")
        app.registered_commands.extend(module.app.registered_commands)


_add_deploy_commands()
