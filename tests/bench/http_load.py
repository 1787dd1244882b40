"""Posts W3's facts to intake over plain keep-alive connections, for the figure of the HTTP entrance.
A client of a few lines, so that what is measured is the server; it speaks no more of HTTP than this server needs.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.bench.load import SOURCE, TYPE, Facts, percentile


@dataclass
class Posts:
    """What one run of posts came to."""

    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        values = {name: round(percentile(self.latencies_ms, share), 2) for name, share in shares.items()}
        rate = round(len(self.latencies_ms) / self.seconds, 1)
        return {"per_s": rate, "n": len(self.latencies_ms), "refused": self.refused, **values}


async def posts(url: str, run: str, *, connections: int, seconds: float, rate: float = 0.0) -> Posts:
    """`connections` callers, each posts its next fact when it has its answer; or all together at `rate` a second.

    At a rate a latency counts from when the fact was due. Acknowledged is what was answered 202.
    """
    facts, out = Facts(run), Posts()
    address = urlsplit(url)
    began = time.monotonic()
    n = 0

    async def caller() -> None:
        nonlocal n
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            while (now := time.monotonic()) < began + seconds:
                due = began + n / rate if rate else now
                n += 1
                if due > now:
                    await asyncio.sleep(due - now)
                writer.write(_request(facts, address.netloc))
                status = await _answer(reader)
                if status == "202":
                    out.latencies_ms.append((time.monotonic() - due) * 1000)
                else:
                    out.refused[status] = out.refused.get(status, 0) + 1
        finally:
            writer.close()

    async with asyncio.TaskGroup() as callers:
        for _ in range(connections):
            callers.create_task(caller())
    out.seconds = time.monotonic() - began
    return out


def _request(facts: Facts, host: str) -> bytes:
    reference = facts.reference()
    body = facts.json(reference)
    head = (
        f"POST /facts HTTP/1.1\r\nHost: {host}\r\nce-specversion: 1.0\r\nce-id: {reference}\r\nce-source: {SOURCE}\r\n"
        f"ce-type: {TYPE}\r\nce-dataschema: https://bench.example/schemas/{TYPE}/v1\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _answer(reader: asyncio.StreamReader) -> str:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    length = next((int(v) for k, _, v in (line.partition(":") for line in lines) if k.lower() == "content-length"), 0)
    await reader.readexactly(length)
    return lines[0].split(" ")[1]
