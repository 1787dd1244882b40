"""The loop of our processes: the fast one where it is installed, asyncio's own where it is not."""

from __future__ import annotations

import asyncio
import sys

import pytest

from factmesh import event_loop


async def _module() -> str:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_it_is_the_fast_one_where_there_is_one() -> None:
    """A service's process runs on uvloop: half of the CPU time of a statement."""
    pytest.importorskip("uvloop")
    assert event_loop.run(_module()) == "uvloop"


def test_and_asyncios_own_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no uvloop: the same program runs, slower."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loop.run(_module()) == "asyncio"
