"""Child processes of `factmesh up`: each has its log, none is left behind, one that ends is named."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from factmesh_cli.children import ChildError, Children

OBEYS = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0))\nprint('ready', flush=True)\ntime.sleep(60)"
)


def wait_for(path: Path, words: str) -> None:
    deadline = time.monotonic() + 10
    while words not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{path} never said {words!r}"
        time.sleep(0.02)


def test_children_are_stopped_in_order_and_say_what_they_said(tmp_path: Path) -> None:
    """G1: Ctrl-C ends the mesh by SIGTERM to every service, within its ten seconds; their words are in their logs."""
    with Children(tmp_path) as children:
        child = children.start("one", [sys.executable, "-c", OBEYS], {"FACTMESH_X": "1"})
        wait_for(child.log_path, "ready")
        children.check()
        began = time.monotonic()
        assert children.stop("one") == 0
        assert time.monotonic() - began < 5


def test_a_child_that_ends_by_itself_is_named_with_its_last_words(tmp_path: Path) -> None:
    """House habit 5: what happened, to which service, and where to read on."""
    with Children(tmp_path) as children:
        child = children.start("two", [sys.executable, "-c", "import sys; sys.exit('no broker')"], {})
        child.process.wait()
        with pytest.raises(ChildError, match=r"two\.log: two ended by itself .exit status 1.:\nno broker"):
            children.check()


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: nothing is left running, whatever a child does with SIGTERM."""
    monkeypatch.setattr("factmesh_cli.children.STOP_WAIT_S", 0.3)
    deaf = OBEYS.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
    children = Children(tmp_path)
    with children:
        child = children.start("deaf", [sys.executable, "-c", deaf], {})
        wait_for(child.log_path, "ready")
    assert child.process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child.process.pid, 0)
