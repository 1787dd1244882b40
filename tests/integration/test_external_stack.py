"""The other half of the switch: the same tests, given addresses, run on a stack that they did not start.
What is external to the inner session here is the stack of the outer one; nothing starts a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from factmesh.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
CHOSEN = (
    "tests/integration/test_stack.py::test_the_session_stack_answers",
    "tests/integration/test_redrive.py",
)
INNER_S_MAX = 240.0


def test_the_same_tests_run_on_given_addresses(stack: Stack, tmp_path: Path) -> None:
    """Issue 6.2: FACTMESH_STACK=external and what `factmesh stack run` prints are all that a session needs; it passes
    without starting servers of its own.
    """
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("FACTMESH_", "PYTEST_"))
    } | stack.environment()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHOSEN],
        cwd=ROOT,
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=INNER_S_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert list(tmp_path.glob("fm-stack-*")) == [], "it started a stack of its own"
