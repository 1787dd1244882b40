"""For one pair of the benchmark alone: services whose connections keep the first generic plan that the planner makes.
Python imports this at start when its folder is on the path; new pools lose the planner's switches and plan but once.
"""

from __future__ import annotations

from typing import Any

import asyncpg

_create_pool = asyncpg.create_pool


def create_pool(*args: Any, server_settings: dict[str, str] | None = None, **rest: Any) -> Any:
    kept = {k: v for k, v in (server_settings or {}).items() if not k.startswith("enable_")}
    return _create_pool(*args, server_settings={**kept, "plan_cache_mode": "force_generic_plan"}, **rest)


asyncpg.create_pool = create_pool
