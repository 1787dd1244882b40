"""What is measured: the real services, and the ideal loop, each over topics and tables of its own on one stack.
How they are started, found and stopped; nothing is sent and nothing is measured here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from factmesh.kafka.admin import TopicSpec, dlq_spec, ensure_topics
from factmesh.stack import Stack
from factmesh.topics import PARTITIONS
from factmesh_cli.mesh import Mesh, free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVICES = ("intake", "orchestrator", "connector")
READY_S_MAX = 60.0
STOP_S_MAX = 12.0


@dataclass
class System:
    """One running system: where its facts enter, where it tells what became of them, and its processes."""

    name: str
    prefix: str
    pids: Mapping[str, Sequence[int]]
    """By the name in the table; all replicas of a service under one."""
    http: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def topic_in(self) -> str:
        return f"{self.prefix}facts.raw"

    @property
    def topic_status(self) -> str:
        return f"{self.prefix}factmesh.status.v1"


TOPICS = ("facts.raw", "factmesh.fact.v1", "factmesh.command.noop.v1", "factmesh.result.v1", "factmesh.status.v1")
"""The topics of W3."""


@dataclass(frozen=True)
class Shape:
    """How the real services are set up, where it is not the plain way."""

    partitions: int = PARTITIONS
    replicas: Mapping[str, int] = field(default_factory=dict)
    steps: int = 3
    plans_pinned: bool = True


class _Traced(Mesh):
    """Sampled spans go to a file of each service, so that they are paid for."""

    def environment(self, service: str = "quarantine") -> dict[str, str]:
        found = super().environment(service)
        return {**found, "FACTMESH_TRACE_FILE": str(self.run_dir / f"{service}.spans")}


def project_of(steps: int, folder: Path) -> Path:
    """The project beside this file, or a copy whose workflow has so many calls one after another."""
    if steps == 3:
        return HERE / "project"
    shutil.copytree(HERE / "project", folder)
    path = folder / "workflows/w3/v1.yaml"
    head, _, _ = path.read_text(encoding="utf-8").partition("  - first:")
    lines, amount = [], "input.amount"
    for n in range(steps):
        lines += [f"  - s{n}:", "      call: noop.act"]
        lines += [f"      with: {{reference: '${{ input.reference }}', amount: '${{ {amount} }}'}}"]
        amount = f"steps.s{n}.amount"
    path.write_text("\n".join([head + lines[0], *lines[1:], "      then: end", ""]), encoding="utf-8")
    (folder / "workflows/w3/v1.cases.yaml").unlink()
    return folder


@asynccontextmanager
async def ours(
    stack: Stack,
    folder: Path,
    name: str,
    overrides: Mapping[str, str],
    shape: Shape | None = None,
    services: Sequence[str] = SERVICES,
) -> AsyncIterator[System]:
    """The real services, each a process, over the project folder beside this file and its plug-in."""
    shape = shape or Shape()
    settings = {
        "FACTMESH_CONNECTORS": "noop",
        "FACTMESH_TRACE_SAMPLE_RATIO": "0.01",
        "FACTMESH_CONCURRENCY": "500",
        **overrides,
    }
    if shape.partitions != PARTITIONS:  # the services take topics as they find them
        made = [TopicSpec(f"{name}.{t}", shape.partitions) for t in TOPICS]
        await ensure_topics(stack.bootstrap, [*made, *map(dlq_spec, made)])
    paths = [str(HERE / "plugin"), *([] if shape.plans_pinned else [str(HERE / "unpinned")])]
    path = os.pathsep.join(p for p in (*paths, os.environ.get("PYTHONPATH", "")) if p)
    project = project_of(shape.steps, folder / f"{name}.project")
    mesh = _Traced(folder / name, stack, project, name, {**settings, "PYTHONPATH": path})
    try:
        await mesh.start(services, sandbox=False)
        more = [(s, f"{s}-{n}") for s, count in shape.replicas.items() for n in range(2, count + 1)]
        for service, replica in more:
            mesh.add(service, free_port(), replica).start()
        await mesh.until_ready([replica for _, replica in more])
        pids: dict[str, list[int]] = {s: [] for s in services}
        for member, service in [(s, s) for s in services] + [(r, s) for s, r in more]:
            process = mesh.members[member].process
            assert process is not None
            pids[service].append(process.pid)
        yield System("ours", mesh.prefix, pids, mesh.url("intake"), settings)
        ended = mesh.ended()
        assert not ended, f"{ended[0].name} ended during the run:\n{ended[0].tail()}"
    finally:
        await mesh.stop()


@asynccontextmanager
async def ideal(
    stack: Stack, folder: Path, name: str, overrides: Mapping[str, str] | None = None
) -> AsyncIterator[System]:
    """The hand-written loop, each hop a process."""
    prefix, settings = f"{name}.", {"IDEAL_STATUSES": "2", "IDEAL_BATCH_MAX": "500", **(overrides or {})}
    admin = AdminClient({"bootstrap.servers": stack.bootstrap})
    for made in admin.create_topics([NewTopic(prefix + t, PARTITIONS, 1) for t in TOPICS]).values():
        await asyncio.to_thread(made.result, 30)
    (folder / name).mkdir()
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for role in SERVICES:
            dsn = await stack.provide_schema(f"{name}_{role}")
            connection = await asyncpg.connect(dsn)
            await connection.execute((HERE / "ideal/tables.sql").read_text(encoding="utf-8"))
            await connection.close()
            where = {"IDEAL_BOOTSTRAP": stack.bootstrap, "IDEAL_DSN": dsn, "IDEAL_PREFIX": prefix}
            processes[role] = _start(role, {**settings, **where}, folder / name / f"{role}.log")
        for role, process in processes.items():
            await _until_ready(role, process, folder / name / f"{role}.log")
        yield System("ideal", prefix, {r: [p.pid] for r, p in processes.items()}, settings=settings)
        for role, process in processes.items():
            assert process.poll() is None, f"{role} ended: {(folder / name / f'{role}.log').read_text()[-2000:]}"
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for process in processes.values():
            try:
                await asyncio.to_thread(process.wait, STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(role: str, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.bench.ideal.loop", role]
    with log.open("wb") as out:
        return subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out)


async def _until_ready(role: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(READY_S_MAX / 0.1)):
        text = await asyncio.to_thread(log.read_text, encoding="utf-8", errors="replace")
        if "ready" in text:
            return
        assert process.poll() is None, f"{role} ended: {text[-2000:]}"
        await asyncio.sleep(0.1)
    raise AssertionError(f"{role} got no partitions within {READY_S_MAX:g} s")
