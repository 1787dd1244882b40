"""Sends a plan's facts through both entrances and watches the mesh until it is quiet, showing how far it is.
Nothing is judged here; that is `demo`'s reconciliation, from the generator's own log and the systems' own log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from factmesh.clock import SystemClock
from factmesh.errors import FactmeshError
from factmesh.http_client import HttpClient, Request
from factmesh.kafka import Publisher, backlog
from factmesh.message import Emission
from factmesh.postgres import Pool, create_pool, load_sql
from factmesh_cli.demo_plan import Plan, Sending
from factmesh_cli.mesh import Mesh

SQL = load_sql(__file__, "demo.sql")
LANES = 24
"""Facts under way at the entrances at once. One id has one lane, so that a repeat never overtakes its original."""
QUIET_LOOKS = 3
LOOK_EVERY_S = 0.5
QUIET_S_MAX = 240.0


@dataclass
class Looking:
    """Read-only pools on the services' schemas."""

    mesh: Mesh
    pools: dict[str, Pool] = field(default_factory=dict)

    async def open(self) -> None:
        for service in ("intake", "orchestrator", "connector", "notifier", "quarantine"):
            self.pools[service] = await create_pool(
                self.mesh.dsn(service), schema=self.mesh.schema(service), application="factmesh-demo", size_max=1
            )

    async def close(self) -> None:
        for pool in self.pools.values():
            await pool.close()

    async def figures(self) -> dict[str, Any]:
        """Everything that the display and the reconciliation count."""
        facts = f"{self.mesh.prefix}facts.raw"
        received = {r["disposition"]: r for r in await self.pools["intake"].fetch(SQL.received, facts)}
        instances = {r["status"]: r["n"] for r in await self.pools["orchestrator"].fetch(SQL.instances)}
        waiting: Counter[str] = Counter()
        for service in ("connector", "notifier"):
            row = await self.pools[service].fetchrow(SQL.waiting)
            assert row is not None
            waiting.update({k: int(row[k]) for k in ("working", "retrying", "due")})
        records = {r["state"]: r["n"] for r in await self.pools["quarantine"].fetch(SQL.quarantined)}
        messages = {d: int(r["messages"]) for d, r in received.items()}
        deliveries = sum(int(r["deliveries"]) for r in received.values())
        return {
            "deliveries": deliveries,
            "duplicates": deliveries - sum(messages.values()),
            "accepted": messages.get("done", 0),
            "dead": messages.get("dead", 0),
            "instances": instances,
            "records": records,
            **waiting,
        }


class Display:
    """The live picture: a bar for what is sent, and the figures beside it."""

    def __init__(self, total: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self.sent = self.progress.add_task("facts sent", total=total)
        self.done = self.progress.add_task("facts settled", total=total)
        self.figures: Mapping[str, Any] = {}
        self.refused = 0
        self.total = total

    def __rich__(self) -> Group:
        return Group(self.progress, self._table())

    def _table(self) -> Table:
        f, table = self.figures, Table.grid(padding=(0, 3), pad_edge=False)
        instances: Mapping[str, int] = f.get("instances", {})
        records: Mapping[str, int] = f.get("records", {})
        open_records = records.get("open", 0) + records.get("failed_again", 0)
        ended = sum(instances.get(s, 0) for s in ("completed", "rejected", "failed", "cancelled", "compensated"))
        table.add_row(
            f"facts in [bold]{f.get('deliveries', 0)}[/]",
            f"refused at once [bold]{self.refused}[/]",
            f"duplicates dropped [bold]{f.get('duplicates', 0)}[/]",
            f"quarantined [bold red]{open_records}[/]",
        )
        table.add_row(
            f"running [bold]{instances.get('running', 0) + instances.get('waiting', 0)}[/]",
            f"completed [bold green]{instances.get('completed', 0)}[/]",
            f"rejected [bold]{instances.get('rejected', 0)}[/]",
            f"retrying [bold yellow]{f.get('retrying', 0)}[/], parked [bold yellow]{instances.get('parked', 0)}[/]",
        )
        settled = self.refused + f.get("duplicates", 0) + f.get("dead", 0) + ended + instances.get("parked", 0)
        self.progress.update(self.done, completed=min(settled, self.total))
        return table


@dataclass
class SendLog:
    """The generator's own log: what was answered to each sending."""

    answers: dict[int, int] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        return sum(1 for status in self.answers.values() if 400 <= status < 500)


async def send(mesh: Mesh, plan: Plan, path: Path, on_answer: Callable[[SendLog], None]) -> SendLog:
    """Send everything, in order for each id, side by side otherwise.

    The log is written to `path` as JSON lines, each before its sending and again with its answer.
    """
    log = SendLog()
    http = HttpClient(connections_max=LANES)
    publisher = Publisher(mesh.stack.bootstrap, client_id="factmesh-demo")
    lanes: list[list[tuple[int, Sending]]] = [[] for _ in range(LANES)]
    for n, sending in enumerate(plan.sendings):
        lanes[crc32(f"{sending.source} {sending.id}".encode()) % LANES].append((n, sending))
    facts = f"{mesh.prefix}facts.raw"
    with path.open("w", encoding="utf-8") as out:

        def note(n: int, s: Sending, status: int | None) -> None:
            line = {"n": n, "entrance": s.entrance, "source": s.source, "id": s.id, "fate": s.fate, "status": status}
            out.write(json.dumps(line) + "\n")
            out.flush()

        async def run(lane: Sequence[tuple[int, Sending]]) -> None:
            for n, sending in lane:
                note(n, sending, None)
                if sending.entrance == "http":
                    status = await _post(http, f"{mesh.url('intake')}/facts", sending)
                else:
                    await publisher.publish([_record(facts, sending)])
                    status = 0
                log.answers[n] = status
                note(n, sending, status)
                on_answer(log)

        try:
            await asyncio.gather(*(run(lane) for lane in lanes))
        finally:
            await http.close()
            await publisher.close()
    return log


async def _post(http: HttpClient, url: str, sending: Sending) -> int:
    """The status that was given; where none or a 5xx was, the same fact is posted again, as any sender may."""
    clock, wait_s = SystemClock(), 0.2
    request = Request("POST", url, sending.headers, body=sending.body)
    while True:
        with contextlib.suppress(FactmeshError):
            answer = await http.send(request, timeout_s=30.0)
            if answer.status < 500:
                return answer.status
        await clock.sleep(wait_s)
        wait_s = min(wait_s * 2, 5.0)


def _record(topic: str, sending: Sending) -> Emission:
    headers = tuple((k, v.encode()) for k, v in sending.headers.items())
    return Emission(topic, f"{sending.source} {sending.id}".encode(), sending.body, headers)


async def until_quiet(looking: Looking, display: Display, live: Live) -> dict[str, Any]:
    """Until nothing is due, running or unread for several looks. Returns the last figures; they tell if it gave up."""
    mesh, quiet, clock = looking.mesh, 0, SystemClock()
    deadline = clock.monotonic() + QUIET_S_MAX
    figures: dict[str, Any] = {}
    while clock.monotonic() < deadline:
        figures = await looking.figures()
        display.figures = figures
        live.refresh()
        moving = figures["instances"].get("running", 0) + figures["due"]
        if moving == 0 and await unread(mesh) == 0:
            quiet += 1
            if quiet >= QUIET_LOOKS:
                return figures
        else:
            quiet = 0
        await clock.sleep(LOOK_EVERY_S)
    return figures


async def unread(mesh: Mesh) -> int:
    """Messages that the services' groups have not committed."""
    p = mesh.prefix
    groups = {
        f"{p}factmesh-intake": [f"{p}facts.raw"],
        f"{p}factmesh-orchestrator": [f"{p}factmesh.{t}.v1" for t in ("fact", "result", "signal")],
        f"{p}factmesh-notifier": [f"{p}factmesh.command.notifier.v1"],
    }
    return sum([await backlog(mesh.stack.bootstrap, group, names) for group, names in groups.items()])
