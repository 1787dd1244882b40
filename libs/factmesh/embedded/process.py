"""A server process under its guard: start, stop, kill, and the trace that it leaves for whoever comes next.
Nothing here knows Kafka or PostgreSQL; a data directory has one owner at a time, judged by a lock that dies with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from factmesh.errors import ErrorClass, FactmeshError

#: Asked to stop, a server gets this long before it is killed. Both are durable either way.
STOP_WAIT_S = 10.0
LOG_TAIL_LINES = 25


class EmbeddedError(FactmeshError):
    """The embedded stack cannot do what it was asked; the text says which part and where its log is."""

    error_class = ErrorClass.TRANSIENT


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class DirectoryLock:
    """One owner of a data directory. The kernel lets go when the owner dies, however it dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise EmbeddedError(
                f"another process (pid {owner}) runs its stack on this directory",
                where=str(self._path.parent),
                hint="stop it, or give another data directory",
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _ends(process: psutil.Process) -> bool:
    """Whether it ends in time. A zombie has ended: its parent may be stopped and not know."""
    deadline = time.monotonic() + STOP_WAIT_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


class ServerProcess:
    """One server under its guard, with a log file and a state file beside its data."""

    def __init__(self, name: str, directory: Path, stop_signal: signal.Signals = signal.SIGTERM) -> None:
        self.name = name
        self.log_path = directory / f"{name}.log"
        self._state_path = directory / f"{name}.pid.json"
        self._stop_signal = stop_signal
        self._guard: subprocess.Popen[bytes] | None = None
        self._server: psutil.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server is not None else None

    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None and self._server is not None

    def start(self, command: Sequence[str], *, env: Mapping[str, str], user: str | None = None) -> None:
        """Run `command`, as `user` if given, under a guard that outlives neither it nor us."""
        guard = [sys.executable, "-S", "-E", str(Path(__file__).with_name("guard.py"))]
        with self.log_path.open("ab") as log:
            self._guard = subprocess.Popen(
                [*guard, str(int(self._stop_signal)), str(STOP_WAIT_S), user or "", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(env),
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        line = self._guard.stdout.readline()
        if not line.strip():
            raise EmbeddedError(f"{self.name} could not be started: {self.tail()}", where=str(self.log_path))
        with contextlib.suppress(psutil.NoSuchProcess):
            self._server = psutil.Process(int(line))
            state = {"pid": self._server.pid, "created": self._server.create_time()}
            self._state_path.write_text(json.dumps(state), encoding="utf-8")

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Until `ready`; a server that ends before, or is not ready in time, is an error with the end of its log."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.running():
                raise EmbeddedError(f"{self.name} ended while it started:\n{self.tail()}", where=str(self.log_path))
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"{self.name} was not ready in {timeout_s:g} s:\n{self.tail()}", where=str(self.log_path)
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Let it end in order; kill it after `STOP_WAIT_S`."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(STOP_WAIT_S + 5.0)
        except subprocess.TimeoutExpired:
            self.kill()
        self._forget()

    def kill(self) -> None:
        """SIGKILL, as a crash would: nothing is flushed or said."""
        if self._server is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (*self._server.children(recursive=True), self._server):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        if self._guard is not None:
            assert self._guard.stdin is not None
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
            self._guard.wait(STOP_WAIT_S)
        self._forget()

    def _forget(self) -> None:
        if self._guard is not None and self._guard.stdout is not None:
            self._guard.stdout.close()
        self._guard = None
        self._server = None
        self._state_path.unlink(missing_ok=True)

    def end_stale(self) -> None:
        """A server of this directory that outlived its owner is stopped: the lock says that nobody else wants it."""
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
            stale = psutil.Process(int(state["pid"]))
            if abs(stale.create_time() - float(state["created"])) > 0.01:  # the number belongs to someone else now
                raise psutil.NoSuchProcess(stale.pid)
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            self._state_path.unlink(missing_ok=True)
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            stale.send_signal(self._stop_signal)
            if not _ends(stale):
                stale.kill()
                _ends(stale)
        self._state_path.unlink(missing_ok=True)

    def tail(self) -> str:
        """The last lines of its log."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-LOG_TAIL_LINES:])
