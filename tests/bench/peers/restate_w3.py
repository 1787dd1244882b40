"""W3 on Restate: a handler of three durable steps whose work is nothing, each in the journal before the next begins.
Served by an interpreter that has `restate-sdk` (`hypercorn restate_w3:app`), never by ours; nothing is measured here.
"""

from __future__ import annotations

from typing import Any

import restate

service = restate.Service("w3")


async def act(reference: str, amount: int) -> dict[str, int]:
    return {"amount": amount}


@service.handler()
async def run(ctx: restate.Context, fact: dict[str, Any]) -> int:
    done = await ctx.run_typed("first", act, reference=fact["reference"], amount=fact["amount"])
    done = await ctx.run_typed("second", act, reference=fact["reference"], amount=done["amount"])
    done = await ctx.run_typed("third", act, reference=fact["reference"], amount=done["amount"])
    return done["amount"]


app = restate.app([service])
