"""A real Confluent-compatible schema registry for tests: AxonOps Schema Registry, built once per user with Go.
It is built and started here; no test and no fake of a registry lives here.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

VERSION = "v0.2.1"
MODULE = f"github.com/axonops/axonops-schema-registry/cmd/schema-registry@{VERSION}"
CACHE = Path.home() / ".cache" / "factmesh-test"
BUILD_TIMEOUT_S = 280.0
START_TIMEOUT_S = 20.0


class NoServerError(Exception):
    """The server cannot be had on this machine; the text says why."""


def binary() -> Path:
    """The server's binary, built at the first call of this user. Raises NoServerError when there is no Go."""
    path = CACHE / f"schema-registry-{VERSION}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "schema-registry.lock", timeout=BUILD_TIMEOUT_S):
        if path.exists():
            return path
        if shutil.which("go") is None:
            raise NoServerError("no Go toolchain on this machine: the contract with a real schema registry is UNTESTED")
        with tempfile.TemporaryDirectory(prefix="fm-go-", dir="/tmp") as scratch:
            for command in (
                ["go", "mod", "init", "scratch"],
                ["go", "get", "-tool", MODULE],
                ["go", "build", "-o", str(path.with_suffix(".new")), MODULE.partition("@")[0]],
            ):
                done = subprocess.run(
                    command, cwd=scratch, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
                )
                if done.returncode != 0:
                    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        path.with_suffix(".new").replace(path)
    return path


@contextmanager
def running(extra: str = "") -> Iterator[str]:
    """The URL of a fresh, empty server; it is stopped at the end. `extra` is more of its configuration."""
    program = binary()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fm-registry-", dir="/tmp") as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(f'server:\n  host: "127.0.0.1"\n  port: {port}\nstorage:\n  type: memory\n{extra}')
        with (Path(folder) / "log").open("wb") as log:
            server = subprocess.Popen([str(program), "--config", str(config)], stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}", server, Path(folder) / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(5)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, if only to say that it wants a password
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the registry did not start:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.05)
