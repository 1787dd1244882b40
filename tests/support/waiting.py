"""Waiting for what the mesh does by itself, with a bound and a text that says what was waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def until(
    what: str, check: Callable[[], Awaitable[Any]], *, timeout_s: float = 30.0, every_s: float = 0.1
) -> Any:
    """The first true value of `check`."""
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while time.monotonic() < deadline:
        last = await check()
        if last:
            return last
        await asyncio.sleep(every_s)
    raise AssertionError(f"not within {timeout_s:g} s: {what}; last seen: {last!r}")
