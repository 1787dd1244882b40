"""W3 on DBOS: three steps whose work is nothing, started in the process that runs them, which is its cheapest way in.
Run by an interpreter that has `dbos`, never by ours; it does what a line of JSON on its input says, and answers in one.

    python dbos_w3.py NAME DATABASE_URL async|threads
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from typing import Any

from dbos import DBOS, SetWorkflowID

NAME, URL, STYLE = sys.argv[1:4]
CONFIG: Any = {
    "name": "bench",
    "system_database_url": URL,
    "executor_id": NAME,
    "application_version": "1",
    "sys_db_pool_size": 20,
    "log_level": "ERROR",
    "run_admin_server": False,
    "enable_otlp": False,
}
WORKERS_MAX = 512


@DBOS.step()
async def act(reference: str, amount: int) -> dict[str, int]:
    return {"amount": amount}


@DBOS.workflow()
async def w3(fact: dict[str, Any]) -> int:
    done = await act(fact["reference"], fact["amount"])
    done = await act(fact["reference"], done["amount"])
    done = await act(fact["reference"], done["amount"])
    return done["amount"]


@DBOS.step()
def act_in_thread(reference: str, amount: int) -> dict[str, int]:
    return {"amount": amount}


@DBOS.workflow()
def w3_in_thread(fact: dict[str, Any]) -> int:
    done = act_in_thread(fact["reference"], fact["amount"])
    done = act_in_thread(fact["reference"], done["amount"])
    done = act_in_thread(fact["reference"], done["amount"])
    return done["amount"]


class Run:
    """One stretch: the ids of its workflows and how long each took."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.data: dict[str, Any] = order["data"]
        self.ends = time.monotonic() + order["seconds"]
        self.left: int = order["count"]
        self.lock = threading.Lock()
        self.latencies: list[float] = []

    def next(self) -> dict[str, Any] | None:
        with self.lock:
            self.left -= 1
            if self.left < 0 or time.monotonic() >= self.ends:
                return None
            counter[0] += 1
            return {**self.data, "reference": f"{NAME}-{counter[0]}"}

    async def many(self, n: int) -> None:
        async def one() -> None:
            while (fact := self.next()) is not None:
                began = time.monotonic()
                with SetWorkflowID(fact["reference"]):
                    await w3(fact)
                self.latencies.append((time.monotonic() - began) * 1000)

        await asyncio.gather(*(one() for _ in range(n)))

    def in_thread(self) -> None:
        while (fact := self.next()) is not None:
            began = time.monotonic()
            with SetWorkflowID(fact["reference"]):
                w3_in_thread(fact)
            self.latencies.append((time.monotonic() - began) * 1000)


counter = [int(time.time()) * 1_000_000]


async def main() -> None:
    DBOS(config=CONFIG)
    DBOS.launch()
    print(json.dumps({"ready": True}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        run, began = Run(order), time.monotonic()
        n = min(order["window"], WORKERS_MAX)
        if STYLE == "async":
            await run.many(n)
        else:
            threads = [threading.Thread(target=run.in_thread) for _ in range(n)]
            for thread in threads:
                thread.start()
            while any(t.is_alive() for t in threads):
                await asyncio.sleep(0.01)
        print(json.dumps({"seconds": time.monotonic() - began, "latencies_ms": run.latencies}), flush=True)
    DBOS.destroy()


if __name__ == "__main__":
    asyncio.run(main())
