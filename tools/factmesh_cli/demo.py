"""`factmesh demo`: 1,000 facts through a fresh mesh with failing systems, triage by public commands, reconciliation.
What is sent and what should come of it is the project's `demo.py`; the judge is the systems' own log, not the mesh.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from factmesh.clock import SystemClock
from factmesh.errors import SettingsError
from factmesh.stack import open_stack
from factmesh_cli.demo_plan import Effects, Fate, Plan, PlanFactory, Remedy, Sending
from factmesh_cli.demo_run import Display, Looking, SendLog, send, until_quiet
from factmesh_cli.dlq_show import SHORT
from factmesh_cli.mesh import Mesh, MeshError

app = typer.Typer(add_completion=False)
console = Console(soft_wrap=True, highlight=False)
NOT_HAPPENED_AFTER_S = 8.0
"""A "not happened" counts only once a request that was let go of can no longer be under way (in_flight_max_s)."""
HANDS = 3
"""Commands that one operator runs side by side."""
DIFFERENCES_SHOWN = 20
ENDED = ("completed", "rejected", "failed", "compensated", "cancelled")
TRIAGE_ROUNDS_MAX = 4


@app.callback(invoke_without_command=True)
def demo(
    project: Annotated[Path, typer.Option(envvar="FACTMESH_PROJECT", help="A project folder with a demo.py.")],
    count: Annotated[int, typer.Option(min=100, max=100_000, help="How many facts are sent.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed sends the same facts.")] = 1,
    keep: Annotated[bool, typer.Option(help="Keep the data folder: logs, topics, databases.")] = False,
) -> None:
    """Send facts through a fresh mesh on the embedded stack, triage what died, and reconcile. Exits 1 if it does not
    add up.
    """
    plan = load_plan(project)(count, seed, project.resolve())
    folder = Path(tempfile.mkdtemp(prefix="factmesh-demo-"))
    folder.chmod(0o755)
    try:
        with console.status("Kafka and PostgreSQL start (the first start on a machine fetches the broker, 45 MB)"):
            stack_context = open_stack(folder / "stack")
            stack = stack_context.__enter__()
        try:
            mesh = Mesh(folder / "run", stack, project.resolve())
            code = asyncio.run(run(mesh, plan))
        finally:
            stack_context.__exit__(None, None, None)
    finally:
        if keep:
            console.print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


def load_plan(project: Path) -> PlanFactory:
    """The function `plan` of the project's `demo.py`. Raises SettingsError where there is none."""
    path = project / "demo.py"
    spec = importlib.util.spec_from_file_location("factmesh_project_demo", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SettingsError("this project has no demo.py", where=str(project), hint="see factmesh_cli/demo_plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    factory: PlanFactory = module.plan
    return factory


async def run(mesh: Mesh, plan: Plan) -> int:
    """The whole story; the exit code."""
    clock, began = SystemClock(), SystemClock().monotonic()
    looking = Looking(mesh)
    try:
        try:
            with console.status("the services and the sandbox start"):
                await mesh.start()
        except MeshError as error:
            console.print(f"[red]{escape(str(error))}[/]")
            return 1
        await looking.open()
        console.print(f"mesh up: intake {mesh.url('intake')}, Kafka {mesh.stack.bootstrap}")
        display = Display(len(plan.sendings))
        with Live(display, console=console, refresh_per_second=4) as live:
            watching = asyncio.create_task(_watch(looking, display))
            log = await send(mesh, plan, mesh.run_dir / "generator.jsonl", lambda log: _sent(display, log))
            watching.cancel()
            await until_quiet(looking, display, live)
        console.print()
        rounds = 0
        while rounds < TRIAGE_ROUNDS_MAX and await triage(mesh, plan, rounds, clock):
            rounds += 1
            again = Display(len(plan.sendings))
            again.refused = log.refused
            again.progress.update(again.sent, completed=len(log.answers))
            with Live(again, console=console, refresh_per_second=4) as live:
                await until_quiet(looking, again, live)
            console.print()
        figures = await looking.figures()
        ok = reconcile(plan, log, figures, plan.observe(mesh.sandbox_log))
        console.print(f"{clock.monotonic() - began:.0f} s after the stack was up")
        return 0 if ok else 1
    finally:
        await looking.close()
        with console.status("stopping"):
            await mesh.stop()


def _sent(display: Display, log: SendLog) -> None:
    display.progress.update(display.sent, completed=len(log.answers))
    display.refused = log.refused


async def _watch(looking: Looking, display: Display) -> None:
    clock = SystemClock()
    while True:
        display.figures = await looking.figures()
        await clock.sleep(0.5)


# --- triage ----------------------------------------------------------------------------------------------------------


def command(mesh: Mesh, *words: str, show: bool = True, shown_max: int = 12) -> str:
    """Run one public command, printed as it is run, and show what it prints. Raises MeshError when it fails."""
    if show:
        console.print(f"[bold cyan]$ factmesh {escape(shlex.join(words))}[/]")
    arguments = [sys.executable, "-m", "factmesh_cli", *words, "--run-dir", str(mesh.run_dir)]
    environment = {**mesh.environment(), "COLUMNS": "140", "NO_COLOR": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise MeshError(f"factmesh {shlex.join(words)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    if show:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        for line in lines[:shown_max]:
            console.print(escape(line))
        if len(lines) > shown_max:
            console.print(f"… {len(lines) - shown_max} more lines")
    return done.stdout


def several(mesh: Mesh, commands: Sequence[Sequence[str]], *, shown: int, what: str) -> None:
    """Many commands of one kind: the first are shown, the others run side by side and are counted."""
    for words in commands[:shown]:
        command(mesh, *words, shown_max=30)
    rest = commands[shown:]
    with ThreadPoolExecutor(HANDS) as hands:
        for _ in hands.map(lambda words: command(mesh, *words, show=False), rest):
            pass
    if rest:
        console.print(f"… and {len(rest)} more were {what}")


async def triage(mesh: Mesh, plan: Plan, rounds: int, clock: SystemClock) -> bool:
    """One round by an operator's hands: correct, replay, resolve, discard. False where nothing was open."""
    records = json.loads(command(mesh, "dlq", "list", "--json", "--limit", "10000", show=False))
    if not records:
        return False
    for record in records:
        record["id"] = record["id"][:SHORT]  # as a person would type it
    console.rule("triage" if rounds == 0 else f"triage, round {rounds + 1}")
    command(mesh, "dlq", "groups", shown_max=40)
    by_id = {(s.source, s.id, s.fate): s for s in plan.sendings}
    _facts(mesh, records, by_id)
    _commands(mesh, [r for r in records if r["reason"] == "exhausted"])
    await _unknown(mesh, plan, [r for r in records if r["reason"] == "unknown"], clock)
    return True


def _sending(record: Mapping[str, Any], by_id: Mapping[tuple[str, str, Fate], Sending]) -> Sending | None:
    """The sending that a dead fact was, by its Kafka key: source and id, also of bytes that nobody can read."""
    source, _, id_ = str(record["key"]).partition(" ")
    return by_id.get((source, id_, Fate.DEAD))


def _facts(mesh: Mesh, records: Sequence[Mapping[str, Any]], by_id: Mapping[tuple[str, str, Fate], Sending]) -> None:
    """Dead facts, each by what the sender says of it: corrected, replayed as it is, or given up."""
    remedies: dict[Remedy, list[tuple[str, Sending]]] = {r: [] for r in Remedy}
    for record in records:
        if record["topic"].endswith("facts.raw"):
            sending = _sending(record, by_id)
            if sending is not None and sending.remedy is not None:
                remedies[sending.remedy].append((record["id"], sending))
    corrections = []
    for id_, sending in remedies[Remedy.CORRECT]:
        changes = [w for path, value in sending.correction.items() for w in ("--set", f"{path}={value}")]
        corrections.append(("dlq", "correct", id_, *changes, "--reason", sending.why, "--yes"))
    several(mesh, corrections, shown=1, what="corrected by the same command")
    again = [id_ for id_, _ in remedies[Remedy.CORRECT] + remedies[Remedy.REPLAY]]
    if again:
        command(mesh, "dlq", "replay", *again, "--dry-run", shown_max=4)
        command(mesh, "dlq", "replay", *again, "--yes", "--reason", "corrected, or accepted though late", shown_max=4)
    for why, ids in _by_why(remedies[Remedy.DISCARD]).items():
        command(mesh, "dlq", "discard", *ids, "--yes", "--reason", why, shown_max=3)


def _by_why(pairs: Iterable[tuple[str, Sending]]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for id_, sending in pairs:
        out.setdefault(sending.why, []).append(id_)
    return out


def _commands(mesh: Mesh, records: Sequence[Mapping[str, Any]]) -> None:
    """Commands that used up their policy while a system was ill: their steps run again."""
    if records:
        ids = [r["id"] for r in records]
        command(mesh, "dlq", "replay", *ids, "--yes", "--reason", "the system is well again", shown_max=4)


async def _unknown(mesh: Mesh, plan: Plan, records: Sequence[Mapping[str, Any]], clock: SystemClock) -> None:
    """Outcomes that nobody knows: the operator asks the system itself, here by its log, and says what it said."""
    if not records:
        return
    last = max(datetime.fromisoformat(r["failed_at"]) for r in records)
    under_way_s = NOT_HAPPENED_AFTER_S - (clock.now() - last).total_seconds()
    if under_way_s > 0:
        console.print(f"{len(records)} outcomes are unknown; a request may be under way for {under_way_s:.0f} s more")
        await clock.sleep(under_way_s)
    silent: list[str] = []
    happened: dict[str, list[str]] = {}
    for record in records:
        answer = plan.look(str(record["business_object_id"]), str(record["step"]), mesh.sandbox_log)
        if answer is None:
            silent.append(record["id"])
        else:
            happened.setdefault(json.dumps(answer), []).append(record["id"])
    why = "looked it up in the system"
    resolves = [
        ("dlq", "resolve", *ids, "--happened", output, "--reason", why, "--yes") for output, ids in happened.items()
    ]
    several(mesh, resolves, shown=2, what="resolved by the same command, each with its own answer")
    if silent:
        command(
            mesh, "dlq", "resolve", *silent, "--not-happened", "--retry", "--reason", why, "--yes", shown_max=4
        )


# --- reconciliation --------------------------------------------------------------------------------------------------


def reconcile(plan: Plan, log: SendLog, figures: Mapping[str, Any], observed: Mapping[str, Effects]) -> bool:
    """Print the sums and every difference; whether all add up."""
    instances: Mapping[str, int] = figures["instances"]
    records: Mapping[str, int] = figures["records"]
    sent, refused = len(log.answers), log.refused
    duplicates, dead, accepted = figures["duplicates"], figures["dead"], figures["accepted"]
    resting = records.get("open", 0) + records.get("failed_again", 0)
    running = sum(n for s, n in instances.items() if s in ("running", "waiting"))
    differences = _differences(plan.intended, observed)
    intended = sum(sum(e.effects.values()) + sum(e.mails.values()) for e in plan.intended.values())
    done = sum(sum(e.effects.values()) + sum(e.mails.values()) for e in observed.values())
    fates = {f: sum(1 for s in plan.sendings if s.fate is f) for f in Fate}
    saved = sum(1 for s in plan.sendings if s.remedy in (Remedy.CORRECT, Remedy.REPLAY))
    checks = [
        (
            f"sent {sent} = refused at once {refused} + duplicates {duplicates} + dead {dead} + accepted {accepted}",
            sent == len(plan.sendings) == refused + duplicates + dead + accepted,
        ),
        (f"refused at once {refused} = as generated {fates[Fate.REFUSED]}", refused == fates[Fate.REFUSED]),
        (f"duplicates {duplicates} = as generated {fates[Fate.DUPLICATE]}", duplicates == fates[Fate.DUPLICATE]),
        (
            f"dead {dead} = generated {fates[Fate.DEAD]} - corrected and replayed {saved}",
            dead == fates[Fate.DEAD] - saved,
        ),
        (
            f"accepted {accepted} = " + " + ".join(f"{s} {n}" for s, n in sorted(instances.items())),
            accepted == sum(instances.values()),
        ),
        (f"running or waiting {running} = 0, in quarantine without a verdict {resting} = 0", running + resting == 0),
        (f"effects in the systems' own log {done} = intended {intended}, each exactly once", not differences),
    ]
    table = Table(title="reconciliation", title_justify="left", show_header=False)
    for text, holds in checks:
        table.add_row("[green]holds[/]" if holds else "[bold red]DIFFERS[/]", text)
    console.print(table)
    for line in differences[:DIFFERENCES_SHOWN]:
        console.print(f"[red]{escape(line)}[/]")
    if len(differences) > DIFFERENCES_SHOWN:
        console.print(f"[red]… and {len(differences) - DIFFERENCES_SHOWN} more[/]")
    return all(holds for _, holds in checks)


def _differences(intended: Mapping[str, Effects], observed: Mapping[str, Effects]) -> list[str]:
    out = []
    nothing = Effects({}, {})
    for subject in sorted(intended.keys() | observed.keys()):
        wanted, found = intended.get(subject, nothing), observed.get(subject, nothing)
        for key in sorted(wanted.effects.keys() | found.effects.keys()):
            n, m = wanted.effects.get(key, 0), found.effects.get(key, 0)
            if n != m:
                out.append(f"{subject}: {'.'.join(key)} happened {m} times, intended {n}")
        for address in sorted(wanted.mails.keys() | found.mails.keys()):
            n, m = wanted.mails.get(address, 0), found.mails.get(address, 0)
            if n != m:
                out.append(f"{subject}: a mail to its address was sent {m} times, intended {n}")
    return out
