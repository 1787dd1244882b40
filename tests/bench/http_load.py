"""Posts W3's facts to intake over plain keep-alive connections, for the figure of the HTTP entrance.
A client of a few lines in a process of its own, so that what is measured is the server; it tells what it cost itself.

    python -m tests.bench.http_load URL RUN CONNECTIONS SECONDS RATE      rate 0: each as soon as it is answered
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.bench.load import SOURCE, TYPE, Facts, percentile

ANSWER_S_MAX = 30.0
"""What is not answered so long after the end of a run is not waited for."""


@dataclass
class Posts:
    """What one run of posts came to."""

    rate: float
    seconds: float = 0.0
    cpu_s: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        values = {name: round(percentile(self.latencies_ms, share), 2) for name, share in shares.items()}
        n = len(self.latencies_ms)
        rate, cpu_ms = round(n / self.seconds, 1), round(self.cpu_s * 1000 / max(1, n), 3)
        asked = round(self.rate, 1)
        return {"per_s": rate, "n": n, "asked_per_s": asked, "refused": self.refused, "client_cpu_ms": cpu_ms, **values}


class Facts202:
    """The bytes of posts, one after another; only the number in them differs, so that a post costs no encoding."""

    def __init__(self, run: str, host: str) -> None:
        self._facts = Facts(run)
        mark = self._facts.reference()
        body = self._facts.json(mark)
        head = (
            f"POST /facts HTTP/1.1\r\nHost: {host}\r\nce-specversion: 1.0\r\nce-id: {mark}\r\nce-source: {SOURCE}\r\n"
            f"ce-type: {TYPE}\r\nce-dataschema: https://bench.example/schemas/{TYPE}/v1\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._parts = (head.encode() + body).split(mark.encode())

    def next(self) -> bytes:
        return self._facts.reference().encode().join(self._parts)


class _Caller(asyncio.Protocol):
    """One connection: a post, its answer, the next."""

    def __init__(self, run: _Run) -> None:
        self._run, self._due, self._buffer = run, 0.0, b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def post(self) -> None:
        """The next one, when it is due."""
        run = self._run
        now = time.monotonic()
        due = run.next_due(now)
        if due >= run.ends:
            run.finished()
        elif due > now:
            asyncio.get_running_loop().call_later(due - now, self._write, due)
        else:
            self._write(due)

    def _write(self, due: float) -> None:
        self._due = due
        self._transport.write(self._run.facts.next())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        lower = self._buffer[:head].lower()
        mark = lower.find(b"content-length:")
        length = int(lower[mark + 15 :].split(b"\r\n", 1)[0]) if mark >= 0 else 0
        if len(self._buffer) < head + 4 + length:
            return
        status, self._buffer = self._buffer[9:12].decode(), b""
        self._run.answered(status, self._due)
        self.post()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._run.done.is_set():
            self._run.out.refused["lost"] = self._run.out.refused.get("lost", 0) + 1
            self._run.finished()


class _Run:
    """All callers of one run, which take the facts in turn."""

    def __init__(self, url: str, run: str, connections: int, seconds: float, rate: float) -> None:
        self.out = Posts(rate)
        self.facts = Facts202(run, urlsplit(url).netloc)
        self.done = asyncio.Event()
        self._left, self._rate, self._n = connections, rate, 0
        self.began = time.monotonic()
        self.ends = self.began + seconds

    def next_due(self, now: float) -> float:
        """At a rate a latency counts from when the fact was due, even if nobody was free to send it."""
        due = self.began + self._n / self._rate if self._rate else now
        self._n += 1
        return due

    def answered(self, status: str, due: float) -> None:
        if status == "202":
            self.out.latencies_ms.append((time.monotonic() - due) * 1000)
        else:
            self.out.refused[status] = self.out.refused.get(status, 0) + 1

    def finished(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.out.seconds = time.monotonic() - self.began
            self.done.set()


async def _posts(url: str, name: str, connections: int, seconds: float, rate: float) -> Posts:
    address, loop = urlsplit(url), asyncio.get_running_loop()
    run = _Run(url, name, connections, seconds, rate)
    where = str(address.hostname), int(address.port or 80)
    callers = [await loop.create_connection(lambda: _Caller(run), *where) for _ in range(connections)]
    gc.freeze()
    spent = time.process_time()
    run.began = time.monotonic()
    run.ends = run.began + seconds
    for _, caller in callers:
        caller.post()
    async with asyncio.timeout(seconds + ANSWER_S_MAX):
        await run.done.wait()
    run.out.cpu_s = time.process_time() - spent
    for transport, _ in callers:
        transport.close()
    return run.out


async def posts(url: str, run: str, *, connections: int, seconds: float, rate: float = 0.0) -> dict[str, Any]:
    """`connections` callers, each posts its next fact when it has its answer; or all together at `rate` a second.

    In a process of its own. Acknowledged is what was answered 202.
    """
    argv = [sys.executable, "-m", "tests.bench.http_load", url, run, str(connections), str(seconds), str(rate)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0, "the HTTP generator failed, see above"
    found: dict[str, Any] = json.loads(out)
    return found


async def answer(reader: asyncio.StreamReader) -> str:
    """The status of one whole answer, for other servers' clients."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    length = next((int(v) for k, _, v in (line.partition(":") for line in lines) if k.lower() == "content-length"), 0)
    await reader.readexactly(length)
    return lines[0].split(" ")[1]


if __name__ == "__main__":
    given = sys.argv[1:]
    ran = asyncio.run(_posts(given[0], given[1], int(given[2]), float(given[3]), float(given[4])))
    print(json.dumps(ran.summary()))
