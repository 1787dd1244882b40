"""The toy service in a process of its own, whose interpreter is gone the moment it decodes certain bytes.
What a fault in a C extension does: no exception, no handler, no clean stop.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace

from tests.support import toy

from factmesh.message import Delivery, Message
from factmesh.service import Context, Parts, Service, run
from factmesh.settings import Settings

BYTES = b"these bytes kill"


def service() -> Service:
    whole = toy.service()

    async def build(context: Context) -> Parts:
        parts = await whole.build(context)
        (handler,) = parts.handlers

        def decode(delivery: Delivery) -> Message:
            if delivery.value == BYTES:
                os.kill(os.getpid(), signal.SIGKILL)
            return handler.decode(delivery)

        return replace(parts, handlers=(replace(handler, decode=decode),))

    return replace(whole, build=build)


if __name__ == "__main__":
    run(service(), Settings())  # type: ignore[call-arg]
