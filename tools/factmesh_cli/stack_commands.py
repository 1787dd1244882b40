"""`factmesh stack`: the embedded servers alone, their jars, and the roles of a mesh on any PostgreSQL.
No service is started here; that is `factmesh up`.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from factmesh.errors import SettingsError
from factmesh.postgres import ensure_role_and_schema, redacted

app = typer.Typer(no_args_is_help=True, help="The embedded Kafka and PostgreSQL, and the roles of a mesh.")
SERVICES = ("intake", "orchestrator", "connector", "notifier", "quarantine")


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Where both keep their data; durable between starts.")] = Path(".factmesh"),
    kafka_port: Annotated[int, typer.Option(help="0: the one it had, or a free one.")] = 0,
    postgres_port: Annotated[int, typer.Option(help="0: the one it had, or a free one.")] = 0,
) -> None:
    """Run Kafka and PostgreSQL until Ctrl-C and print their addresses as settings."""
    from factmesh.stack import EmbeddedStack

    done = threading.Event()
    with EmbeddedStack(data, kafka_port, postgres_port) as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: done.set())
        for name, value in stack.environment().items():
            typer.echo(f"export {name}={value}")
        while not done.wait(1.0):
            pass


@app.command()
def fetch() -> None:
    """Fetch and check the broker's jars now: for images, and for machines that go offline later."""
    try:
        from factmesh.embedded.jars import cache_dir, ensure_jars
    except ModuleNotFoundError as error:
        raise SettingsError(f"{error.name} is not installed", hint="pip install 'factmesh[embedded]'") from error
    typer.echo(f"{len(ensure_jars())} jars, checked, in {cache_dir()}")


@app.command()
def roles(
    admin_dsn: Annotated[str, typer.Option(envvar="FACTMESH_POSTGRES_ADMIN_DSN", help="A role that may create roles.")],
    password: Annotated[
        str | None, typer.Option(envvar="FACTMESH_ROLE_PASSWORD", help="The services' password; none: trust only.")
    ] = None,
    namespace: Annotated[str, typer.Option(envvar="FACTMESH_NAMESPACE", help="Prefix of schemas and roles.")] = "",
) -> None:
    """Give each service a role and a schema of its own, and nothing else. Idempotent."""

    async def ensure() -> None:
        for service in SERVICES:
            name = f"{namespace}_{service}" if namespace else service
            await ensure_role_and_schema(admin_dsn, name, name, password)
            typer.echo(f"{name}: schema and role at {redacted(admin_dsn)}")

    asyncio.run(ensure())
