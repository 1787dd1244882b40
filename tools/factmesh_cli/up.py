"""`factmesh up`: the whole mesh on the embedded stack until Ctrl-C, durable in its folder.
Starting the parts is `mesh`'s and the stack's; here is what a person sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from factmesh.errors import SettingsError
from factmesh.stack import open_stack
from factmesh_cli.mesh import Mesh, MeshError

app = typer.Typer(add_completion=False)
console = Console()
LOOK_EVERY_S = 1.0


@app.callback(invoke_without_command=True)
def up(
    project: Annotated[
        Path, typer.Option(envvar="FACTMESH_PROJECT", help="The project folder: schemas, workflows, connectors, …")
    ],
    data: Annotated[Path, typer.Option(help="Where everything is kept; started again, it goes on from there.")] = Path(
        ".factmesh"
    ),
    sandbox: Annotated[bool, typer.Option(help="Also run the project's sandbox of external systems.")] = True,
) -> None:
    """Run the whole mesh until Ctrl-C. Stopped or killed and started again, it goes on where it was."""
    if not project.is_dir():
        raise SettingsError(f"{project} is not a folder", hint="give the project with --project")
    data.mkdir(parents=True, exist_ok=True)
    console.print(f"Kafka and PostgreSQL start in [bold]{data.resolve()}[/] (the first start fetches the broker)")
    with open_stack(data / "stack") as stack:
        mesh = Mesh((data / "run").resolve(), stack, project.resolve())
        raise typer.Exit(asyncio.run(_run(mesh, sandbox)))


async def _run(mesh: Mesh, sandbox: bool) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        starting = asyncio.create_task(mesh.start(sandbox=sandbox))
        stopping = asyncio.create_task(stop.wait())
        with console.status("the services start"):
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            starting.cancel()
            return 0
        try:
            starting.result()
        except MeshError as error:
            console.print(f"[red]{error}[/]")
            return 1
        show(mesh)
        return await _watch(mesh, stop)
    finally:
        with console.status("stopping; what is in hand is finished or comes again"):
            await mesh.stop()


async def _watch(mesh: Mesh, stop: asyncio.Event) -> int:
    """Until told to stop. A service that ends by itself is said and started again: nothing it had is lost."""
    while not stop.is_set():
        for member in mesh.ended():
            console.print(f"[yellow]{member.name} ended and is started again; its log ends:[/]\n{member.tail(5)}")
            member.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await stop.wait()
    return 0


def show(mesh: Mesh) -> None:
    """The addresses to use."""
    table = Table(title="factmesh is up — Ctrl-C stops it, nothing is lost", title_justify="left", show_header=False)
    table.add_row("publish facts (HTTP)", f"{mesh.url('intake')}/facts")
    table.add_row("Kafka", mesh.stack.bootstrap)
    for name in mesh.members:
        if name not in ("sandbox",):
            table.add_row(f"{name}: health, metrics", f"{mesh.url(name)}/readyz  {mesh.url(name)}/metrics")
    if mesh.sandbox:
        table.add_row("sandbox: calls, effects", f"{mesh.sandbox['http']}/_log/summary")
    table.add_row("logs", str(mesh.run_dir))
    table.add_row("for the command factmesh", f"set -a; . {mesh.run_dir}/addresses.env; set +a")
    console.print(table)
