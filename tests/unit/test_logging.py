"""Log lines hold ids and frames, never what a message or an exception quotes."""

from __future__ import annotations

import json
import subprocess
import sys

#: In a process of its own: logging is set up once, for good.
LOGS = """
import asyncio, logging, threading
import structlog
from factmesh import telemetry
telemetry.setup_logging("thing")
log = structlog.get_logger("thing")
def fails():
    raise ValueError("private@buyer.example")
try:
    fails()
except ValueError as error:
    log.error("own", exc_info=True)
    log.error("own", exc_info=error)
    logging.getLogger("a.vendor").exception("of a vendor")
async def main():
    async def forgotten():
        fails()
    task = asyncio.create_task(forgotten())
    await asyncio.sleep(0.01)
    del task
asyncio.run(main())
thread = threading.Thread(target=lambda: log.info("of a thread", correlation_id="c-1"))
thread.start()
thread.join()
"""


def test_no_exception_text_reaches_a_log_line() -> None:
    """F5: of an exception its type and frames are logged, of our own loggers, a vendor's and asyncio's; each line is
    one JSON object that names its service, from whatever thread.
    """
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, timeout=60, check=True)
    assert "private@" not in done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == [
        "own", "own", "of a vendor", "Task exception was never retrieved", "of a thread"
    ]  # fmt: skip
    assert {line["service"] for line in lines} == {"thing"}
    for line in lines[:4]:
        assert line["error"].startswith("a bug: ValueError at ")
        assert "fails" in line["stack"]
    assert lines[4]["correlation_id"] == "c-1"
