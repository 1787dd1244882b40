"""Other engines on W3, each from its registry in a folder of its own under build/, at the best of a few settings.
How they are installed, started, loaded and read; what each does with a workflow is beside this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
from tests.bench.http_load import answer
from tests.bench.load import Facts, Sample
from tests.bench.meter import cpu_s

from factmesh_cli.mesh import free_port

HERE = Path(__file__).parent
HOME = HERE.parents[2] / "build/peers"
PYTHON_PACKAGES = ("dbos==3.4.0", "restate-sdk==1.3.0", "hypercorn==0.18.0", "uvloop==0.23.0")
NPM_PACKAGES = ("@restatedev/restate-server@1.7.12",)
READY_S_MAX = 60.0
STOP_S_MAX = 10.0
CALLERS_MAX = 1000
"""Restate's default bound on concurrent invocations of a partition's invoker."""


def install() -> None:
    """Both peers, once; a second call does nothing. Nothing of them is in our locks or our environment."""
    stamp, wanted = HOME / "installed", "\n".join((*PYTHON_PACKAGES, *NPM_PACKAGES))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(HOME, ignore_errors=True)
    (HOME / "npm").mkdir(parents=True)
    print(f"installing {wanted.replace(chr(10), ', ')} into {HOME} …", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(HOME / "venv")], check=True)
    pip = [str(HOME / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *PYTHON_PACKAGES], check=True)
    (HOME / "npm/package.json").write_text('{"private": true}', encoding="utf-8")
    subprocess.run(["npm", "install", "--silent", "--no-save", *NPM_PACKAGES], cwd=HOME / "npm", check=True)
    stamp.write_text(wanted, encoding="utf-8")


def _binary() -> Path:
    """The server itself, not the script of the package that starts it: what is measured is its own process."""
    found = sorted(HOME.glob("npm/node_modules/@restatedev/restate-server-*/bin/restate-server"))
    assert found, f"no restate-server below {HOME}/npm: remove {HOME} and start again"
    return found[0]


@dataclass
class Peer:
    """One engine at one setting: how it is loaded, and its processes."""

    setting: str
    pids: Mapping[str, Sequence[int]]

    async def run(self, window: int, seconds: float, count: int = 1_000_000_000) -> Sample:
        """`window` workflows at once, for so many seconds or until `count` were begun; each runs to its end."""
        raise NotImplementedError

    def spent(self) -> dict[str, float]:
        return {name: sum(cpu_s(psutil.Process(p)) for p in pids) for name, pids in self.pids.items()}


class Dbos(Peer):
    """Some processes, each of which starts and runs its part of the workflows."""

    def __init__(self, setting: str, drivers: Sequence[asyncio.subprocess.Process], postgres: int) -> None:
        super().__init__(setting, {"dbos": [d.pid for d in drivers], "postgres": [postgres]})
        self.drivers = drivers
        self.facts = Facts("dbos")

    async def run(self, window: int, seconds: float, count: int = 1_000_000_000) -> Sample:
        used = self.drivers[:window]
        data = self.facts.data("")
        parts = [window // len(used) + (i < window % len(used)) for i in range(len(used))]
        for driver, part in zip(used, parts, strict=True):
            order = {"window": part, "seconds": seconds, "count": count // len(used), "data": data}
            assert driver.stdin is not None
            driver.stdin.write(json.dumps(order).encode() + b"\n")
        answers = await asyncio.gather(*(_line(d, seconds + READY_S_MAX) for d in used))
        latencies = [ms for a in answers for ms in a["latencies_ms"]]
        return Sample(max(a["seconds"] for a in answers), len(latencies), latencies)


async def _line(process: asyncio.subprocess.Process, within_s: float) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(within_s):
        line = await process.stdout.readline()
    assert line, "the peer's process ended: see its log in the run's folder"
    found: dict[str, Any] = json.loads(line)
    return found


@asynccontextmanager
async def dbos(dsn: str, postgres: int, folder: Path, processes: int, style: str) -> AsyncIterator[Peer]:
    """Over a database of its own in the same PostgreSQL."""
    name = f"dbos_{style}_{processes}"
    admin = await asyncpg.connect(dsn)
    await admin.execute(f'CREATE DATABASE "{name}"')
    await admin.close()
    url = urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
    drivers: list[asyncio.subprocess.Process] = []
    try:
        for n in range(processes):
            argv = [str(HOME / "venv/bin/python"), str(HERE / "dbos_w3.py"), f"{name}{n}", url, style]
            with (folder / f"{name}_{n}.log").open("wb") as log:
                pipe = asyncio.subprocess.PIPE
                driver = await asyncio.create_subprocess_exec(
                    *argv, stdin=pipe, stdout=pipe, stderr=log, cwd=folder, limit=1 << 26
                )
            drivers.append(driver)
            await _line(driver, READY_S_MAX)  # one after another: the first makes the tables
        yield Dbos(f"{processes} process{'es' if processes > 1 else ''}, {style}", drivers, postgres)
    finally:
        for driver in drivers:
            with contextlib.suppress(ProcessLookupError):
                driver.kill()
            await driver.wait()


class Restate(Peer):
    """One server and its service; facts are posted to the server's entrance and answered when they are done."""

    def __init__(self, setting: str, address: tuple[str, int], pids: Mapping[str, Sequence[int]], dedup: bool) -> None:
        super().__init__(setting, pids)
        self.address, self.dedup = address, dedup
        self.facts = Facts(f"r{time.time_ns() % 10_000_000}")
        self.callers: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, window: int, seconds: float, count: int = 1_000_000_000) -> Sample:
        window = min(window, CALLERS_MAX)
        while len(self.callers) < window:
            self.callers.append(await asyncio.open_connection(*self.address))
        began = time.monotonic()
        latencies: list[float] = []
        left = count

        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal left
            while left > 0 and (sent := time.monotonic()) < began + seconds:
                left -= 1
                writer.write(self._request())
                status = await answer(reader)
                assert status == "200", f"Restate answered {status}"
                latencies.append((time.monotonic() - sent) * 1000)

        await asyncio.gather(*(one(*caller) for caller in self.callers[:window]))
        return Sample(time.monotonic() - began, len(latencies), latencies)

    def _request(self) -> bytes:
        reference = self.facts.reference()
        body = self.facts.json(reference)
        once = f"idempotency-key: {reference}\r\n" if self.dedup else ""
        head = f"POST /w3/run HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{once}"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@asynccontextmanager
async def restate(folder: Path, partitions: int, workers: int, dedup: bool) -> AsyncIterator[Peer]:
    """A server of one node as its binary comes, with so many partitions, and its service under hypercorn."""
    name = f"restate_{partitions}_{workers}_{'dedup' if dedup else 'bare'}"
    ingress, admin, node, service = (free_port() for _ in range(4))
    environment = {
        **os.environ,
        "RESTATE_DISABLE_TELEMETRY": "true",
        "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
        "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
        "RESTATE_LISTEN_MODE": "tcp",
    }
    server_argv = [str(_binary()), "--base-dir", str(folder / name), "--bind-address", f"127.0.0.1:{node}"]
    server_argv += ["--default-num-partitions", str(partitions), "--no-logo", "--log-filter", "warn"]
    (folder / f"{name}.toml").write_text(
        f'bind = "127.0.0.1:{service}"\nworkers = {workers}\nworker_class = "uvloop"\n'
        "h2_max_concurrent_streams = 2147483647\nkeep_alive_max_requests = 2147483647\n"
        "keep_alive_timeout = 2147483647\n",
        encoding="utf-8",
    )
    service_argv = [str(HOME / "venv/bin/python"), "-m", "hypercorn", "-c", str(folder / f"{name}.toml")]
    async with AsyncExitStack() as running:
        pids = {}
        for what, argv in (("restate", server_argv), ("service", [*service_argv, "restate_w3:app"])):
            log = running.enter_context((folder / f"{name}_{what}.log").open("wb"))
            process = await asyncio.create_subprocess_exec(*argv, env=environment, cwd=HERE, stdout=log, stderr=log)
            running.push_async_callback(_end, process)
            pids[what] = [process.pid]
        await _registered(admin, service)
        setting = f"{partitions} partition{'s' if partitions > 1 else ''}, {workers} hypercorn"
        peer = Restate(setting + (", idempotency key" if dedup else ""), ("127.0.0.1", ingress), pids, dedup)
        try:
            yield peer
        finally:
            for _, writer in peer.callers:
                writer.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP_S_MAX)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _registered(admin: int, service: int) -> None:
    """Tell the server where its service is, as soon as both are there."""
    body = json.dumps({"uri": f"http://127.0.0.1:{service}"}).encode()
    head = "POST /deployments HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    deadline = time.monotonic() + READY_S_MAX
    status = "no answer"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", admin)
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            status = await answer(reader)
            writer.close()
            if status in ("200", "201"):
                await asyncio.sleep(1.0)  # the entrance learns of it a moment later
                return
        await asyncio.sleep(0.3)
    raise AssertionError(f"Restate does not take its service within {READY_S_MAX:g} s: {status}")


# --- measuring --------------------------------------------------------------------------------------------------------

DBOS_SETTINGS = ((1, "async"), (2, "async"), (1, "threads"), (2, "threads"))
RESTATE_SETTINGS = ((1, 1, False), (1, 2, False), (1, 2, True), (24, 2, False))


@dataclass(frozen=True)
class PeerPlan:
    """How long each setting takes: some windows of so many seconds, after a warm-up of as many."""

    windows: Sequence[int] = (16, 64, 256, 800)
    seconds: float = 8.0
    alone_n: int = 60


async def measure(peer: Peer, plan: PeerPlan) -> dict[str, Any]:
    """Alone, then rising windows until more of them brings nothing, with what a workflow costs there."""
    await peer.run(plan.windows[0], plan.seconds)
    alone = await peer.run(1, READY_S_MAX, plan.alone_n)
    tried: list[dict[str, Any]] = []
    for window in plan.windows:
        before = peer.spent()
        sample = await peer.run(window, plan.seconds)
        spent = {name: round((s - before[name]) * 1000 / sample.completed, 3) for name, s in peer.spent().items()}
        tried.append({"window": window, **sample.summary(), "cost": {"cpu_ms": spent}})
        if len(tried) > 1 and tried[-1]["per_s"] < tried[-2]["per_s"]:
            break
    return {
        "setting": peer.setting,
        "alone": alone.summary(),
        "saturation": {"knee": max(tried, key=lambda t: float(t["per_s"])), "tried": tried},
    }


async def measure_all(stack: Any, plan: PeerPlan, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Each peer at each setting; the best setting of each is what ratios are made with."""
    await asyncio.to_thread(install)
    here = folder / "peers"
    here.mkdir()
    opened: list[tuple[str, AbstractAsyncContextManager[Peer]]] = []
    dsn, postgres = stack.stack.postgres_dsn, stack.postgres.pid
    opened += [("dbos", dbos(dsn, postgres, here, n, style)) for n, style in DBOS_SETTINGS]
    opened += [("restate", restate(here, *setting)) for setting in RESTATE_SETTINGS]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, context in opened:
        async with context as peer:
            one = await measure(peer, plan)
        found.setdefault(name, []).append(one)
        knee = one["saturation"]["knee"]
        say(f"{name}, {one['setting']}: {knee['per_s']} workflows/s, alone p50 {one['alone']['p50']} ms")
    best = {name: max(ones, key=lambda o: float(o["saturation"]["knee"]["per_s"])) for name, ones in found.items()}
    out: dict[str, Any] = {name: {**best[name], "settings": found[name]} for name in found}
    return {**out, "versions": [*PYTHON_PACKAGES, *NPM_PACKAGES]}
