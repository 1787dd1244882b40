"""What happens on the socket: real resets, held connections, torn answers, and the way to reach the transport.
Nothing here decides which fault strikes; it only makes one happen as a network would.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Linger on, for no time: closing sends RST instead of FIN and drops what was not sent.
_LINGER_ZERO = struct.pack("ii", 1, 0)


class SandboxProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also hands the connection to the application, so that it can be broken on purpose."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember the transport in the state that each request's scope gets a copy of."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


def transport_of(scope: Scope) -> asyncio.Transport:
    """The connection that a request came over."""
    transport = scope["state"]["transport"]
    assert isinstance(transport, asyncio.Transport)
    return transport


def reset(transport: asyncio.BaseTransport) -> None:
    """End the connection with a TCP RST: the peer sees `connection reset by peer`."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()


async def reset_and_leave(scope: Scope, receive: Receive) -> None:
    """Reset a request's connection and wait until the server has noticed, so that it sends nothing of its own."""
    reset(transport_of(scope))
    await gone(receive)


async def gone(receive: Receive) -> None:
    """Return when the caller has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def hold(scope: Scope, receive: Receive, hold_s: float) -> None:
    """Keep the connection open in silence until the caller leaves; after `hold_s` it is reset."""
    try:
        await asyncio.wait_for(gone(receive), hold_s)
    except TimeoutError:
        await reset_and_leave(scope, receive)


async def tear(scope: Scope, receive: Receive, send: Send, status: int, content_type: str, payload: bytes) -> None:
    """Send the head and half of the body that it promises, then close."""
    await send(_start(status, content_type, {}, max(2, len(payload))))
    await send({"type": "http.response.body", "body": payload[: len(payload) // 2], "more_body": True})
    transport_of(scope).close()
    await gone(receive)


async def respond(send: Send, status: int, content_type: str, headers: dict[str, str], payload: bytes) -> None:
    """Send a whole answer."""
    await send(_start(status, content_type, headers, len(payload)))
    await send({"type": "http.response.body", "body": payload})


def _start(status: int, content_type: str, headers: dict[str, str], length: int) -> Message:
    sent = [(b"content-type", content_type.encode()), (b"content-length", str(length).encode())]
    sent += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": sent}
