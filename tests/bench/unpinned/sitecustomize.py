"""For one pair of the benchmark alone: services whose connections may choose any plan, as if nobody had pinned them.
Python imports this at start when its folder is on the path; it takes the planner's switches out of new pools.
"""

from __future__ import annotations

from typing import Any

import asyncpg

_create_pool = asyncpg.create_pool


def create_pool(*args: Any, server_settings: dict[str, str] | None = None, **rest: Any) -> Any:
    kept = {k: v for k, v in (server_settings or {}).items() if not k.startswith(("enable_", "plan_"))}
    return _create_pool(*args, server_settings=kept, **rest)


asyncpg.create_pool = create_pool
