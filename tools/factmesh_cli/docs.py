"""`factmesh docs`: writes the generated facts into the documentation, or says which of them drifted from the code.
A block between two comments, or a whole file, each has one generator in a table; prose is never touched.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from factmesh.errors import DefinitionError
from factmesh_cli import docs_asyncapi, docs_picture, docs_tables

app = typer.Typer(add_completion=False)

BLOCK = re.compile(
    r"(?P<begin><!-- generated: (?P<what>[^\n]+?) -->\n)(?P<body>.*?)(?P<end><!-- /generated -->)", re.DOTALL
)
#: What a block may ask for: `<!-- generated: NAME ARGUMENTS -->`. A generator gets the repository, the folder of the
#: page (links are relative to it) and the arguments.
SECTIONS: Mapping[str, Callable[[Path, Path, Sequence[str]], str]] = {
    "flow": docs_tables.flow,
    "topics": docs_tables.topic_table,
    "metrics": docs_tables.metric_table,
    "alerts": docs_tables.alert_table,
    "records": docs_tables.record_states,
    "settings": docs_tables.setting_table,
    "workflow": docs_tables.workflow_graph,
}
FILES: Mapping[str, Callable[[Path], str]] = {
    "docs/asyncapi.yaml": docs_asyncapi.text,
    "docs/flow.svg": docs_picture.text,
}
PAGES = ("README.md", "docs/**/*.md", "services/*/README.md", "tools/*/README.md", "examples/**/*.md")


@app.callback(invoke_without_command=True)
def docs(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; end with 1 where something drifted.")] = False,
    root: Annotated[Path, typer.Option(help="The repository.")] = Path("."),
) -> None:
    """Write what the documentation says of topics, metrics, settings, alerts and graphs anew from the code."""
    drifted = 0
    for path, before, after in pages(root):
        if before == after:
            continue
        drifted += 1
        name = str(path.relative_to(root))
        if check:
            typer.echo(f"{name} drifted from the code: run `factmesh docs`")
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), name, "generated", lineterm="", n=1)
            typer.echo("\n".join(list(lines)[:40]))
        else:
            path.write_text(after, encoding="utf-8")
            typer.echo(f"{name} written")
    if check and drifted:
        raise typer.Exit(1)


def pages(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Every page and generated file: its path, what it says, and what it ought to say."""
    for path in sorted({p for pattern in PAGES for p in root.glob(pattern)}):
        before = path.read_text(encoding="utf-8")
        yield path, before, filled(root, path, before)
    for name, make in FILES.items():
        path = root / name
        yield path, path.read_text(encoding="utf-8") if path.exists() else "", make(root)


def filled(root: Path, path: Path, text: str) -> str:
    """The page with every block written anew. Raises DefinitionError for a block that no generator makes."""

    def block(match: re.Match[str]) -> str:
        name, *arguments = match["what"].split()
        make = SECTIONS.get(name)
        if make is None:
            raise DefinitionError(
                f"no generator is called {name!r}", where=str(path), hint=f"one of {', '.join(SECTIONS)}"
            )
        return match["begin"] + make(root, path.parent, arguments).rstrip("\n") + "\n" + match["end"]

    return BLOCK.sub(block, text)
