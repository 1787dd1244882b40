"""Child processes of `factmesh up` and `factmesh demo`: started with a log file each, watched, stopped in order.
Nothing is restarted here: a service that ends by itself is an error that a person should see.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from factmesh.errors import FactmeshError

#: A service promises to stop within 10 s of SIGTERM; a little more for a machine that is busy.
STOP_WAIT_S = 12.0
LOG_TAIL_LINES = 20


class ChildError(FactmeshError):
    """A child could not be started or ended by itself; the text holds the end of its log."""


@dataclass
class Child:
    """One process with its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def tail(self) -> str:
        """The last lines that it wrote."""
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])


@dataclass
class Children:
    """A set of children. Used as a context manager, it leaves none behind."""

    log_dir: Path
    children: dict[str, Child] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop_all()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Run `command` with `environment` on top of ours; what it says goes to `<log_dir>/<name>.log`."""
        path = self.log_dir / f"{name}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop the children in order
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        child = Child(name, process, path)
        self.children[name] = child
        return child

    def check(self) -> None:
        """Raise if one of them ended by itself."""
        for child in self.children.values():
            code = child.process.poll()
            if code is not None:
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                raise ChildError(
                    f"{child.name} ended by itself ({how}):\n{child.tail()}",
                    where=str(child.log_path),
                    hint="the whole log is in that file",
                )

    def stop(self, name: str) -> int | None:
        """SIGTERM, then SIGKILL after `STOP_WAIT_S`; returns the exit status."""
        child = self.children.pop(name)
        _end([child], STOP_WAIT_S)
        return child.process.returncode

    def stop_all(self) -> list[str]:
        """Stop all at once, the last started first; returns those that had to be killed."""
        children = list(reversed(self.children.values()))
        self.children.clear()
        return _end(children, STOP_WAIT_S)


def _end(children: Sequence[Child], wait_s: float) -> list[str]:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()
    deadline, killed = time.monotonic() + wait_s, []
    for child in children:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
            killed.append(child.name)
    return killed


def _end_with_parent() -> None:
    """On Linux a child of a killed `factmesh up` is told to stop. Start children from the main thread: it counts."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def service_command(service: str) -> list[str]:
    """The command of a service in this environment, whether or not its scripts are on the path."""
    return [sys.executable, "-m", f"factmesh_{service}"]
