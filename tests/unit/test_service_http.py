"""What a client sends before its request is whole is bounded: the server under every service, without a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from factmesh import service_http
from factmesh.service_http import HEAD_BYTES_MAX


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(
        _app, http=service_http._Protocol, host="127.0.0.1", port=0, log_level="critical", lifespan="off"
    )
    server = service_http._Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def _ask(port: int, parts: list[bytes]) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        return head.split(b"\r\n")[0] + b" " + await reader.readexactly(length)
    finally:
        writer.close()


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
TRAILED = HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"


@pytest.mark.parametrize("begin", [HEAD, TRAILED], ids=["head", "trailers"])
@pytest.mark.parametrize("endless", [b"b" * 4_096, b"x-a: a\r\n" * 500], ids=["one", "many"])
async def test_a_head_that_does_not_end_is_cut_off(port: int, begin: bytes, endless: bytes) -> None:
    """DESIGN 3, back-pressure: neither a header nor headers without end fill the memory, nor those after a body."""
    parts = [begin + b"x-a: ", *[endless] * (HEAD_BYTES_MAX // len(endless) + 2)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.002)
        answer = await asyncio.wait_for(reader.read(100), 10)
    except ConnectionError:
        return  # it hung up before all was sent
    finally:
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400"), answer


async def test_a_body_in_the_smallest_chunks_gets_on(port: int) -> None:
    """What is framed wastefully is slow, not refused: the bound is on what brings nothing."""
    chunks = b"1\r\nx\r\n" * 30_000
    parts = [HEAD + b"transfer-encoding: chunked\r\n\r\n", chunks[:100_000], chunks[100_000:], b"0\r\n\r\n"]
    assert await _ask(port, parts) == b"HTTP/1.1 200 OK 30000"


async def test_what_is_within_the_bounds_is_answered(port: int) -> None:
    """Large bodies, heads in pieces and several requests on one connection are none of that bound's business."""
    head = b"POST / HTTP/1.1\r\nHost: x\r\ncontent-length: %d\r\n" % (4 * HEAD_BYTES_MAX)
    body = [b"x" * HEAD_BYTES_MAX] * 4
    assert await _ask(port, [head, b"x-a: " + b"a" * 30_000, b"\r\n\r\n", *body]) == b"HTTP/1.1 200 OK 262144"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nx-a: " + b"a" * 40_000 + b"\r\ncontent-length: 1\r\n\r\nx")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(1) == b"1"
    writer.close()
