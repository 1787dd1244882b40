"""`factmesh demo` as a person runs it: a fresh stack, failing systems, triage by public commands, a reconciliation.
The sums are checked twice: that they hold, and that a wrong expectation is found and named.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_onboarding"
DEMO_S_MAX = 420.0
"""Generous: the demo brings a stack of its own to a machine that may be busy with other tests."""
LINES = (
    "sent {n} = refused at once ",
    "refused at once ",
    "duplicates ",
    "dead ",
    "accepted ",
    "running or waiting 0 = 0, in quarantine without a verdict 0 = 0",
    "effects in the systems' own log ",
)

#: Appended to a copy of the project's `demo.py`: one expectation is off by one.
SABOTAGE = """

_honest = plan


def plan(count, seed, project):
    import dataclasses

    made = _honest(count, seed, project)
    subject = min(made.intended)
    effects = made.intended[subject]
    wrong = Effects({**effects.effects, ("risk", "check"): 2}, effects.mails)
    return dataclasses.replace(made, intended={**made.intended, subject: wrong})
"""


def demo(project: Path, count: int, folder: Path) -> tuple[int, str]:
    """The exit code and what was printed. Its data lie in `folder`, so that what is left behind can be seen."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")}
    environment |= {"COLUMNS": "200", "NO_COLOR": "1", "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "factmesh_cli", "demo", "--project", str(project), "--count", str(count)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=DEMO_S_MAX)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        raise AssertionError(f"not done within {DEMO_S_MAX:g} s:\n{printed[-3000:]}") from None
    finally:
        process.kill()
    return process.returncode, printed


def verdicts(printed: str) -> list[tuple[str, str]]:
    """The lines of the reconciliation: what is said of each, and the line."""
    return [(m[1], m[2].strip()) for m in re.finditer(r"\b(holds|DIFFERS)\s*│\s*([^│\n]+)", printed)]


def test_the_demo_adds_up(tmp_path: Path) -> None:
    """Issue 6, shown by: every line of the reconciliation holds, the exit code is 0, nothing is left behind."""
    code, printed = demo(EXAMPLE, 150, tmp_path)
    found = verdicts(printed)
    assert [verdict for verdict, _ in found] == ["holds"] * len(LINES), printed[-4000:]
    for (_, line), begins in zip(found, LINES, strict=True):
        assert line.startswith(begins.format(n=150)), line
    assert code == 0, printed[-4000:]
    for verb in ("groups", "correct", "replay", "discard"):
        assert f"$ factmesh dlq {verb}" in printed, f"{verb} was not shown as it was run"
    assert list(tmp_path.glob("factmesh-demo-*")) == []


def test_a_wrong_expectation_is_named(tmp_path: Path) -> None:
    """Issue 6, shown by: a reconciliation that cannot fail proves nothing. One effect too many is expected."""
    project = Path(shutil.copytree(EXAMPLE, tmp_path / "project"))
    with (project / "demo.py").open("a", encoding="utf-8") as file:
        file.write(SABOTAGE)
    code, printed = demo(project, 100, tmp_path)
    found = verdicts(printed)
    assert code == 1, printed[-4000:]
    assert [verdict for verdict, _ in found] == ["holds"] * (len(LINES) - 1) + ["DIFFERS"], printed[-4000:]
    named = re.findall(r"\S+: \S+ happened \d+ times, intended \d+", printed)
    assert len(named) == 1, named
    assert named[0].endswith(": risk.check happened 1 times, intended 2")
