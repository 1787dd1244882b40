"""A mesh of real processes over a run folder: the services and, where the project has one, its sandbox.
Starting, finding, killing and stopping them lives here; `up`, the demo and the mesh tests are its users.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from factmesh.errors import FactmeshError
from factmesh.stack import Stack
from factmesh.topics import DLQ_PREFIX

SERVICES: Final = ("intake", "orchestrator", "connector", "notifier", "quarantine")
ADDRESSES_FILE: Final = "addresses.env"
PORTS_FILE: Final = "ports.json"
SANDBOX_FILE: Final = "sandbox.json"
START_S_MAX: Final = 60.0
STOP_S_MAX: Final = 12.0
"""A service stops within 10 s of SIGTERM; what is still there after this is killed, which loses nothing."""
_PR_SET_PDEATHSIG: Final = 1


class MeshError(FactmeshError):
    """A process of the mesh did not start, or ended by itself."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    """In the child, before it runs: SIGTERM when the parent is gone, so that nothing is left behind (Linux)."""
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Member:
    """One process of the mesh; `argv` and `environment` are kept so that a killed one can be started again."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.process is not None and self.running:
            self.process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        if self.process is not None:
            self.process.wait(timeout_s)

    def tail(self, lines: int = 15) -> str:
        """The end of its log, for error texts."""
        try:
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


@dataclass
class Mesh:
    """All processes over one stack. `namespace` sets one mesh apart from others on the same stack."""

    run_dir: Path
    stack: Stack
    project: Path
    namespace: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    sandbox: dict[str, Any] = field(default_factory=dict)

    # --- addresses ---------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        return f"{self.namespace}." if self.namespace else ""

    def schema(self, service: str) -> str:
        return f"{self.namespace}_{service}" if self.namespace else service

    def dsn(self, service: str) -> str:
        return self.stack.service_dsn(self.schema(service))

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.members[service].port}"

    def environment(self, service: str = "quarantine") -> dict[str, str]:
        """What a service, or the tool, needs to find everything."""
        found = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")},
            "FACTMESH_KAFKA_BOOTSTRAP": self.stack.bootstrap,
            "FACTMESH_POSTGRES_DSN": self.dsn(service),
            "FACTMESH_PROJECT": str(self.project),
            "FACTMESH_DEPLOY_ON_START": "true",
            "PYTHONUNBUFFERED": "1",
            **self._of_sandbox(),
            **self.settings,
        }
        if self.namespace:
            found["FACTMESH_NAMESPACE"] = self.namespace
        if self.stack.registry_url:
            found["FACTMESH_REGISTRY_URL"] = self.stack.registry_url
        return found

    def _of_sandbox(self) -> dict[str, str]:
        """Where the project's declared systems are, by the names that its files refer to: NAME_URL, NAME_TOKEN, …"""
        if not self.sandbox:
            return {}
        from factmesh_sandbox.config import load_config

        config = load_config(self.project / "sandbox.yaml")
        out = {f"{_variable(n)}_URL": url for n, url in self.sandbox["systems"].items()}
        out |= {f"{_variable(n)}_URL": url for n, url in self.sandbox.get("webhooks", {}).items()}
        for system in config.systems:
            if system.auth is not None:
                out[f"{_variable(system.name)}_TOKEN"] = system.auth.bearer
        for receiver in config.webhooks:
            out[f"{_variable(receiver.name)}_SECRET"] = receiver.secret
        if self.sandbox.get("smtp_port"):
            out["SMTP_HOST"] = str(self.sandbox["smtp_host"])
            out["SMTP_PORT"] = str(self.sandbox["smtp_port"])
        return out

    # --- life --------------------------------------------------------------------------------------------------------

    async def start(self, services: Sequence[str] = SERVICES, *, sandbox: bool = True) -> None:
        """Roles and schemas, the sandbox, then the services side by side; returns when all are ready.

        Raises MeshError with the end of the log of the one that did not come up.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for service in services:
            await self.stack.provide_schema(self.schema(service))
        if sandbox and (self.project / "sandbox.yaml").exists():
            await self._start_sandbox()
        ports = self._ports(services)
        for service in services:
            self.add(service, ports[service])
        for service in services:
            self.members[service].start()
        self._write_addresses()
        await self.until_ready(services)

    def add(
        self, service: str, port: int, name: str | None = None, settings: Mapping[str, str] | None = None
    ) -> Member:
        """A member that is not started yet; a second replica has a name of its own."""
        name = name or service
        environment = {**self.environment(service), "FACTMESH_HTTP_PORT": str(port), **(settings or {})}
        argv = (sys.executable, "-m", f"factmesh_{service}")
        member = Member(name, argv, environment, self.run_dir / f"{name}.log", port)
        self.members[name] = member
        return member

    def _ports(self, services: Sequence[str]) -> dict[str, int]:
        """The ports that it had before, so that addresses stay; free ones otherwise."""
        path = self.run_dir / PORTS_FILE
        try:
            known: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        ports = {s: known[s] if s in known and _is_free(known[s]) else free_port() for s in services}
        path.write_text(json.dumps(ports), encoding="utf-8")
        return ports

    async def _start_sandbox(self) -> None:
        announce = self.run_dir / SANDBOX_FILE
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(announce.read_text(encoding="utf-8"))
        announce.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "factmesh_sandbox", "--config", str(self.project / "sandbox.yaml")]
        argv += ["--log", str(self.run_dir / "sandbox.sqlite"), "--announce", str(announce)]
        for option, key in (("--http-port", "http_port"), ("--smtp-port", "smtp_port")):
            if before.get(key) and _is_free(int(before[key])):
                argv += [option, str(before[key])]
        member = Member("sandbox", argv, os.environ, self.run_dir / "sandbox.log")
        self.members["sandbox"] = member
        member.start()
        deadline = time.monotonic() + START_S_MAX
        while not announce.exists():
            self._fail_if_ended(member)
            if time.monotonic() > deadline:
                raise MeshError(f"the sandbox did not start within {START_S_MAX:g} s", where=str(member.log))
            await asyncio.sleep(0.05)
        self.sandbox = json.loads(announce.read_text(encoding="utf-8"))
        member.port = int(self.sandbox["http_port"])

    @property
    def sandbox_log(self) -> Path:
        """The sandbox's own log of calls and effects."""
        return self.run_dir / "sandbox.sqlite"

    def _write_addresses(self) -> None:
        """For people and the tool: `set -a; . addresses.env`, or `factmesh dlq --run-dir`."""
        environment = self.environment()
        lines = [
            f"FACTMESH_KAFKA_BOOTSTRAP={self.stack.bootstrap}",
            f"FACTMESH_POSTGRES_DSN={self.dsn('quarantine')}",
            f"FACTMESH_POSTGRES_ADMIN_DSN={self.stack.postgres_dsn}",
            f"FACTMESH_PROJECT={self.project}",
            f"FACTMESH_NAMESPACE={self.namespace}",
        ]
        if self.stack.registry_url:
            lines.append(f"FACTMESH_REGISTRY_URL={self.stack.registry_url}")
        for service in SERVICES:
            if service in self.members:
                lines.append(f"FACTMESH_{service.upper()}_URL={self.url(service)}")
                lines.append(f"FACTMESH_{service.upper()}_DSN={self.dsn(service)}")
        if self.sandbox:
            lines.append(f"FACTMESH_SANDBOX_URL={self.sandbox['http']}")
            lines.append(f"FACTMESH_SANDBOX_LOG={self.sandbox_log}")
            lines += [f"{k}={environment[k]}" for k in ("SMTP_HOST", "SMTP_PORT") if k in environment]
        (self.run_dir / ADDRESSES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")

    async def until_ready(self, names: Sequence[str], timeout_s: float = START_S_MAX) -> None:
        """Return when `/readyz` of each says so. Raises MeshError for one that ended or does not come up."""
        deadline = time.monotonic() + timeout_s
        for name in names:
            member = self.members[name]
            while not await _ready(member.port):
                self._fail_if_ended(member)
                if time.monotonic() > deadline:
                    raise MeshError(
                        f"{name} is not ready after {timeout_s:g} s; its log ends:\n{member.tail()}",
                        where=str(member.log),
                    )
                await asyncio.sleep(0.1)

    @staticmethod
    def _fail_if_ended(member: Member) -> None:
        if not member.running:
            code = member.process.returncode if member.process is not None else None
            raise MeshError(f"{member.name} ended with {code}; its log ends:\n{member.tail()}", where=str(member.log))

    def kill(self, name: str) -> None:
        """SIGKILL, as a crash; nothing is said to it."""
        member = self.members[name]
        member.signal(signal.SIGKILL)
        member.wait(STOP_S_MAX)

    def restart(self, name: str) -> None:
        """Start a stopped or killed member again, on its old port."""
        self.members[name].start()

    def ended(self) -> list[Member]:
        """Members that ended by themselves."""
        return [m for m in self.members.values() if m.process is not None and not m.running]

    async def stop(self) -> None:
        """SIGTERM to the services, then to the sandbox; whoever is there after the grace is killed."""
        for names in ([n for n in self.members if n != "sandbox"], ["sandbox"]):
            members = [self.members[n] for n in names if n in self.members]
            for member in members:
                member.signal(signal.SIGCONT)
                member.signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_S_MAX
            for member in members:
                while member.running and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)
                member.signal(signal.SIGKILL)
                if member.process is not None:
                    member.wait(STOP_S_MAX)

    def dlq_name(self, topic: str) -> str:
        """The DLQ of a topic of this mesh, by the topic's name without the namespace."""
        return f"{DLQ_PREFIX}{self.prefix}{topic}"


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


async def _ready(port: int) -> bool:
    """One look at `/readyz`, over a bare socket: no client library for a status line."""
    try:
        async with asyncio.timeout(3.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
        return b" 200 " in line
    except (OSError, TimeoutError):
        return False
