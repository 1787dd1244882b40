"""One stack for the whole session, shared by all xdist workers, and a namespace for each test.
What a single tier needs stands in that tier's conftest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from hypothesis import settings

from factmesh.stack import Stack, external_stack, kind_of_stack, read_state

STACK_START_TIMEOUT_S = 240.0  # the first start on a machine fetches the broker's jars
# The same examples in every run, so that a change that did not cause a failure does not meet it, and no deadline, which
# would be a timing. FACTMESH_TESTS_RANDOM=1 looks for new ones; what it finds becomes an example of its test.
settings.register_profile("factmesh", derandomize=not os.environ.get("FACTMESH_TESTS_RANDOM"), deadline=None)
settings.load_profile("factmesh")

_SESSION = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"fm-stack-{_SESSION[:12]}"


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Real Kafka and PostgreSQL: embedded, or those of FACTMESH_STACK=external. Never stop or kill this one."""
    if kind_of_stack() == "external":
        yield external_stack()
        return
    folder = _folder()
    folder.mkdir(mode=0o755, exist_ok=True)
    with FileLock(folder / "starting.lock", timeout=STACK_START_TIMEOUT_S):
        found = read_state(folder) or _start(folder)
    yield found[0]


def _start(folder: Path) -> tuple[Stack, int]:
    # Under xdist the session is the workers' parent: the first worker to need the stack may be the first to end.
    session_pid = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    with (folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "factmesh.stack", "serve", str(folder), str(session_pid), "temporary"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + STACK_START_TIMEOUT_S
    while (found := read_state(folder)) is None:
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            pytest.exit(f"the embedded stack did not start:\n{(folder / 'serve.log').read_text()}", returncode=3)
        time.sleep(0.05)
    return found


def pytest_configure(config: pytest.Config) -> None:
    # The controller learns the id that its workers see; it alone cleans up, when all of them are done.
    global _SESSION
    if not hasattr(config, "workerinput"):
        manager = config.pluginmanager.getplugin("dsession")
        node_manager = getattr(manager, "nodemanager", None)
        _SESSION = getattr(node_manager, "testrunuid", _SESSION)


def pytest_sessionstart(session: pytest.Session) -> None:
    pytest_configure(session.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    pytest_configure(session.config)
    folder = _folder()
    found = read_state(folder)
    if found is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(found[1])
            server.terminate()
            server.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def namespace() -> str:
    """A short name that no other test has: the prefix of this test's topics, groups, schemas and roles."""
    return f"t{uuid.uuid4().hex[:8]}"
