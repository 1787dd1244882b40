"""Gathers what the judge reads: topics from offset 0, the schemas, the sandbox's own log; and waits for quiet.
Reads only, with the administrator's address where no service would be allowed to; it judges nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.support.judge import ClaimRow, Evidence, InstanceRow, LedgerRow, RecordRow, Sent

from factmesh import kafka
from factmesh.message import Delivery, Message
from factmesh.postgres import Connection, connect, load_sql
from factmesh.records import Records
from factmesh.registry import open_registry
from factmesh.topics import DLQ_PREFIX, FACTS_RAW
from factmesh_cli.demo_plan import Effects
from factmesh_cli.mesh import Mesh
from factmesh_orchestrator.model import Status
from factmesh_quarantine.model import State
from factmesh_sandbox.log import open_log

SQL = load_sql(__file__, "evidence.sql")
LEDGERS = ("intake", "orchestrator", "connector", "notifier")
CLAIMS = ("orchestrator", "connector", "notifier")
STILL_S = 2.0
"""Nothing moved for this long: what waits in a queue between two looks would have moved."""


class Books:
    """Connections to look into every schema of one mesh."""

    def __init__(self, mesh: Mesh, services: Sequence[str]) -> None:
        self.mesh = mesh
        self.services = services
        self.connections: dict[str, Connection] = {}

    async def fetch(self, service: str, query: str, *arguments: Any) -> list[Any]:
        """Rows of one schema; a database that was stopped meanwhile is connected to again."""
        for attempt in range(3):
            try:
                if service not in self.connections:
                    dsn, schema = self.mesh.stack.postgres_dsn, self.mesh.schema(service)
                    self.connections[service] = await connect(dsn, schema=schema, application="judge")
                return list(await self.connections[service].fetch(query, *arguments))
            except Exception:
                self.connections.pop(service, None)
                if attempt == 2:
                    raise
        raise AssertionError("unreachable: the loop above returns or raises")

    async def close(self) -> None:
        for connection in self.connections.values():
            with contextlib.suppress(Exception):
                await connection.close()


@contextlib.asynccontextmanager
async def books(mesh: Mesh, services: Sequence[str] = LEDGERS) -> AsyncIterator[Books]:
    found = Books(mesh, services)
    try:
        yield found
    finally:
        await found.close()


def groups(mesh: Mesh) -> Mapping[str, str]:
    """Consumer group -> short topic whose backlog says that it is behind; connectors' groups are named after them."""
    prefix, out = mesh.prefix, {}
    out[f"{prefix}factmesh-intake"] = FACTS_RAW.of(prefix)
    out[f"{prefix}factmesh-intake-status"] = f"{prefix}factmesh.status.v1"
    out[f"{prefix}factmesh-notifier"] = f"{prefix}factmesh.command.notifier.v1"
    for file in sorted((mesh.project / "connectors").glob("*.yaml")):
        out[f"{prefix}factmesh-connector-{file.stem}"] = f"{prefix}factmesh.command.{file.stem}.v1"
    for topic in ("fact", "result", "signal"):
        out[f"{prefix}factmesh-orchestrator {topic}"] = f"{prefix}factmesh.{topic}.v1"
    return out


async def backlog(mesh: Mesh) -> dict[str, int]:
    """Messages that each group has still to commit; empty when nobody is behind."""
    behind = {}
    for group, topic in groups(mesh).items():
        n = await kafka.backlog(mesh.stack.bootstrap, group.partition(" ")[0], [topic])
        if n:
            behind[group] = n
    return behind


async def quiet(look: Books, *, instances: int = 0, timeout_s: float) -> None:
    """Return when nothing moves by itself any more: no message waits, no row is due, no instance runs.

    `instances` is how many there must be at least; the error says what still moved.
    """
    deadline, still_since = time.monotonic() + timeout_s, None
    state: dict[str, Any] = {}
    while time.monotonic() < deadline:
        state = await moving(look)
        at_rest = not state["moving"] and not state["busy"] and state["instances"] >= instances
        if at_rest and not await backlog(look.mesh):
            still_since = still_since or time.monotonic()
            if time.monotonic() - still_since >= STILL_S:
                return
        else:
            still_since = None
        await asyncio.sleep(0.5)
    stuck = [dict(r) for r in await look.fetch("orchestrator", SQL.stuck)]
    tails = "\n".join(f"--- {m.name}\n{m.tail(6)}" for m in look.mesh.members.values() if m.name != "sandbox")
    behind = await backlog(look.mesh)
    # What it waited for comes last: of a long text only the end is shown by those who shorten it.
    raise AssertionError(f"{tails}\nnot quiet within {timeout_s:g} s: {state}, behind: {behind}, moving: {stuck}")


async def moving(look: Books) -> dict[str, Any]:
    """How much is under way."""
    (row,) = await look.fetch("orchestrator", SQL.running)
    busy = {}
    for service in CLAIMS:
        if service in look.services:
            (due,) = await look.fetch(service, SQL.busy)
            if due["n"]:
                busy[service] = due["n"]
    return {"instances": row["n"], "moving": row["moving"], "ended": row["ended"], "busy": busy}


async def gather(look: Books, sent: Sequence[Sent], intended: Mapping[str, Effects], *, final: bool) -> Evidence:
    """Everything, now."""
    mesh = look.mesh
    existing = await kafka.list_topics(mesh.stack.bootstrap)
    names = [t for t in existing if t.removeprefix(DLQ_PREFIX).startswith(mesh.prefix) and not t.startswith("__")]
    deliveries = await kafka.read_all(mesh.stack.bootstrap, names)
    deliveries.sort(key=lambda d: (d.topic, d.partition, d.offset))
    evidence = Evidence(
        namespace=mesh.prefix,
        final=final,
        sent=sent,
        intended=intended,
        messages=await decoded(mesh, deliveries),
        deliveries={d.where: d for d in deliveries},
        dead=[d for d in deliveries if d.topic.startswith(DLQ_PREFIX)],
    )
    with open_log(mesh.sandbox_log) as log:
        evidence = replace(evidence, calls=log.calls(), effects=log.effects(), mails=log.mails())
    return await _schemas(look, evidence)


async def decoded(mesh: Mesh, deliveries: Sequence[Delivery]) -> list[Message]:
    """Our own records among them, decoded."""
    registry = open_registry(url=mesh.stack.registry_url, project=mesh.project)
    try:
        records = await Records.open(registry)
        raw = FACTS_RAW.of(mesh.prefix)
        own = [d for d in deliveries if not d.topic.startswith(DLQ_PREFIX) and d.topic != raw]
        for d in own:
            missing = records.needs_schema(d)
            if missing is not None:
                await registry.by_id(missing)
        return [records.decode(d) for d in own]
    finally:
        await registry.close()


async def _schemas(look: Books, evidence: Evidence) -> Evidence:
    ledger = [
        LedgerRow(s, r["id"], r["disposition"], r["topic"], r["opening"], json.loads(r["note"]) if r["note"] else None)
        for s in look.services
        for r in await look.fetch(s, SQL.ledger)
    ]
    claims = [
        ClaimRow(s, r["id"], r["kind"], r["state"], r["due"])
        for s in CLAIMS
        if s in look.services
        for r in await look.fetch(s, SQL.claims)
    ]
    instances = [_instance(r) for r in await look.fetch("orchestrator", SQL.instances)]
    records = [_record(r) for r in await look.fetch("quarantine", SQL.records)]
    filed = frozenset(r["id"] for r in await look.fetch("quarantine", SQL.deaths))
    return replace(evidence, ledger=ledger, claims=claims, instances=instances, records=records, filed=filed)


def _instance(r: Any) -> InstanceRow:
    state = json.loads(r["state"])
    waits_for = len(state.get("awaits", ())) + sum(
        1 for step, _name in state.get("timers", {}).values() if step and step == state["step"]
    )
    return InstanceRow(r["id"], Status(r["status"]), r["seq"], r["object_id"], r["correlation_id"], waits_for)


def _record(r: Any) -> RecordRow:
    return RecordRow(
        id=r["id"],
        root=bytes(r["root"]).decode(),
        state=State(r["state"]),
        topic=r["topic"],
        reason=r["reason"],
        instance_id=r["instance_id"],
        object_id=r["business_object_id"],
        raised=r["raised"],
        published=r["published"],
        unpublished_acts=r["unpublished"],
    )
