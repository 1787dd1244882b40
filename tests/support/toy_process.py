"""The toy as a process of its own: `kill` as a value ends the interpreter while it is decoded, as bad input can."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

from tests.support import toy

from factmesh.message import Delivery, Message
from factmesh.service import Context, Parts, Service, run

EXIT = 9


def service() -> Service:
    base = toy.service()
    if os.environ.get("TOY_HANGS"):
        # As a client's thread does whose broker is gone: Python waits for it at the end.
        threading.Thread(target=time.sleep, args=(60,)).start()

    async def build(context: Context) -> Parts:
        parts = await base.build(context)
        (handler,) = parts.handlers
        decode = handler.decode

        def deadly(delivery: Delivery) -> Message:
            if delivery.value == b"kill":
                os._exit(EXIT)
            return decode(delivery)

        return Parts((replace(handler, decode=deadly),), parts.claims)

    return Service(base.name, build, base.migrations)


if __name__ == "__main__":
    run(service())
