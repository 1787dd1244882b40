"""The event loop of our processes: uvloop where it is installed, which is everywhere but on Windows, else asyncio's.
Nothing else runs here. A statement costs half of the CPU time on it, a transaction of one statement a third.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def _factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: slower, and otherwise the same
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on the loop of our processes."""
    with asyncio.Runner(loop_factory=_factory()) as runner:
        return runner.run(main)
