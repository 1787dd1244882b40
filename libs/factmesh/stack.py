"""The stack: one switch between the embedded Kafka and PostgreSQL and those of given addresses.
Only finding and starting it lives here; whoever gets a `Stack` cannot tell which kind it is.

    python -m factmesh.stack serve FOLDER WATCHED_PID [temporary]

runs the embedded stack for as long as that process lives; a temporary folder is removed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from factmesh.errors import SettingsError

if TYPE_CHECKING:
    from factmesh.embedded import EmbeddedKafka, EmbeddedPostgres

#: Roles of the embedded stack and of tests get this password; the embedded server trusts 127.0.0.1 without it.
DEVELOPMENT_PASSWORD = "factmesh"
STATE_FILE = "stack.json"
WATCH_INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Stack:
    """Where Kafka and PostgreSQL are. `postgres_dsn` is an administrator's: it makes roles, no service gets it."""

    bootstrap: str
    postgres_dsn: str
    registry_url: str | None = None

    def service_dsn(self, role: str) -> str:
        """The address for one service's role."""
        from factmesh.postgres import dsn_for_role

        return dsn_for_role(self.postgres_dsn, role, DEVELOPMENT_PASSWORD)

    async def provide_schema(self, schema: str) -> str:
        """A schema owned by a role of the same name, made if absent; returns that role's address."""
        from factmesh.postgres import ensure_role_and_schema

        await ensure_role_and_schema(self.postgres_dsn, schema, schema, DEVELOPMENT_PASSWORD)
        return self.service_dsn(schema)

    def environment(self) -> dict[str, str]:
        """What a child process needs to find the same stack as an external one."""
        found = {
            "FACTMESH_STACK": "external",
            "FACTMESH_KAFKA_BOOTSTRAP": self.bootstrap,
            "FACTMESH_POSTGRES_ADMIN_DSN": self.postgres_dsn,
        }
        return found | ({"FACTMESH_REGISTRY_URL": self.registry_url} if self.registry_url else {})


class EmbeddedStack:
    """Both servers over one folder: started side by side, stopped in order, durable between starts."""

    def __init__(self, data_dir: Path, kafka_port: int = 0, postgres_port: int = 0) -> None:
        try:
            from factmesh.embedded import EmbeddedKafka, EmbeddedPostgres
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"the embedded stack needs {error.name}, which is not installed",
                hint="pip install 'factmesh[embedded]', or set FACTMESH_STACK=external and give addresses",
            ) from error
        self.data_dir = data_dir.resolve()
        self.kafka: EmbeddedKafka = EmbeddedKafka(self.data_dir / "kafka", kafka_port)
        self.postgres: EmbeddedPostgres = EmbeddedPostgres(self.data_dir / "postgres", postgres_port)

    @property
    def stack(self) -> Stack:
        return Stack(self.kafka.bootstrap, self.postgres.dsn)

    def start(self) -> Stack:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as workers:
            kafka, postgres = workers.submit(self.kafka.start), workers.submit(self.postgres.start)
        failures = [error for error in (kafka.exception(), postgres.exception()) if error is not None]
        if failures:
            self.stop()
            raise failures[0]
        return self.stack

    def stop(self) -> None:
        self.kafka.stop()
        self.postgres.stop()

    def __enter__(self) -> Stack:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def kind_of_stack(environment: Mapping[str, str] = os.environ) -> str:
    """What the switch `FACTMESH_STACK` says: `embedded` unless set."""
    kind = environment.get("FACTMESH_STACK", "embedded")
    if kind not in ("embedded", "external"):
        raise SettingsError(f"FACTMESH_STACK is {kind!r}", hint="set it to embedded or external")
    return kind


def external_stack(environment: Mapping[str, str] = os.environ) -> Stack:
    """The stack of the given addresses; PostgreSQL's as an administrator, who makes the services' roles."""
    bootstrap = environment.get("FACTMESH_KAFKA_BOOTSTRAP", "")
    dsn = environment.get("FACTMESH_POSTGRES_ADMIN_DSN") or environment.get("FACTMESH_POSTGRES_DSN", "")
    missing = [
        name for name, value in (("FACTMESH_KAFKA_BOOTSTRAP", bootstrap), ("FACTMESH_POSTGRES_DSN", dsn)) if not value
    ]
    if missing:
        raise SettingsError(
            f"FACTMESH_STACK=external needs {' and '.join(missing)}",
            hint="give host:port of the brokers, and postgresql://user:password@host:port/database of a role that may"
            " create roles",
        )
    return Stack(bootstrap, dsn, environment.get("FACTMESH_REGISTRY_URL") or None)


@contextlib.contextmanager
def open_stack(data_dir: Path, environment: Mapping[str, str] = os.environ) -> Iterator[Stack]:
    """The stack that the switch asks for; an embedded one lives in `data_dir` and stops at the end of the block."""
    if kind_of_stack(environment) == "external":
        yield external_stack(environment)
        return
    with EmbeddedStack(data_dir) as stack:
        yield stack


def read_state(data_dir: Path) -> tuple[Stack, int] | None:
    """The stack that a `serve` process runs in this folder and its pid, or None while it is not up."""
    try:
        state = json.loads((data_dir / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Stack(**state["stack"]), int(state["pid"])


def serve(data_dir: Path, watched_pid: int, *, temporary: bool = False) -> None:
    """Run the embedded stack until the watched process ends or we are told to stop."""
    import psutil

    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    watched = psutil.Process(watched_pid)
    with EmbeddedStack(data_dir) as stack:
        partial = data_dir / f"{STATE_FILE}.new"
        partial.write_text(json.dumps({"stack": asdict(stack), "pid": os.getpid()}), encoding="utf-8")
        partial.replace(data_dir / STATE_FILE)
        while not done.wait(WATCH_INTERVAL_S) and watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
            pass
    (data_dir / STATE_FILE).unlink(missing_ok=True)
    if temporary:
        shutil.rmtree(data_dir, ignore_errors=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", folder, pid]:
            serve(Path(folder), int(pid))
        case ["serve", folder, pid, "temporary"]:
            serve(Path(folder), int(pid), temporary=True)
        case _:
            sys.exit(__doc__)
