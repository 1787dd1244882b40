"""A connector whose work is nothing: what is left of a call is what the platform spends on it.
Found by its entry point, as any plug-in of another team; the folder beside it is what an installer would write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factmesh_connector.protocol import CallContext, Operation, Strategy


class Noop:
    """One operation that answers with a small dict."""

    name = "noop"
    operations: Mapping[str, Operation] = {"act": Operation("act", Strategy.KEY)}

    async def call(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any]:
        ctx.before_first_byte()
        return {"amount": input["amount"]}

    async def look_up(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any] | None:
        raise AssertionError("strategy `key` asks nothing")

    async def close(self) -> None:
        return None
