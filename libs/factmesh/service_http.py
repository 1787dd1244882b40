"""The HTTP side of a service's process: health, readiness, metrics, and whatever routes the service brings.
No route of a service lives here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from factmesh import ledger
from factmesh.errors import SettingsError

if TYPE_CHECKING:
    from factmesh.service import Running


HEAD_BYTES_MAX = 65_536
"""What a request may send without getting on: a head or trailers without end. The other parser has the same bound."""


class _Protocol(HttpToolsProtocol):
    """The vendor's parser in C, a third of the other's price, with the bound that it lacks."""

    _moved = False
    _idle_bytes = 0

    def on_headers_complete(self) -> None:
        self._moved = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        self._moved = False
        super().data_received(data)
        self._idle_bytes = 0 if self._moved else self._idle_bytes + len(data)
        if self._idle_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")


class _Server(uvicorn.Server):
    """Signals are the service's business: it stops the loops first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def serve(running: Running, app: ASGIApp | None) -> uvicorn.Server:
    """Listen and answer `/healthz`, `/readyz`, `/metrics` and the service's own routes.

    Sets `running.http_port` and adds the server's task. Raises SettingsError where the port is taken.
    """
    context = running.context

    async def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "alive", "service": context.service, "version": context.version})

    async def readyz(_request: Request) -> Response:
        problems = running.problems()
        if not problems:
            try:
                async with asyncio.timeout(2.0), context.pool.acquire() as conn:
                    await ledger.alive(conn)
            except Exception as error:
                problems.append(f"the database does not answer: {type(error).__name__}")
        body = {"status": "ready" if not problems else "not ready", "problems": problems}
        return JSONResponse(body, status_code=503 if problems else 200)

    async def metrics(_request: Request) -> Response:
        return Response(context.metrics.render(), media_type="text/plain; version=0.0.4")

    platform = {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}
    platform_app = Starlette(routes=[Route(path, answer) for path, answer in platform.items()])

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        # A mount would ask every request of the service the way through a second framework: 50 µs of CPU.
        chosen = platform_app if app is None or scope.get("path") in platform else app
        await chosen(scope, receive, send)

    settings = context.settings
    sock = socket.socket(socket.AF_INET6 if ":" in settings.http_host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.http_host, settings.http_port))
    except OSError as error:
        sock.close()
        raise SettingsError(
            f"cannot listen on {settings.http_host}:{settings.http_port}: {error.strerror}",
            hint="set FACTMESH_HTTP_PORT to a free port, or 0",
        ) from error
    running.http_port = sock.getsockname()[1]
    config = uvicorn.Config(
        dispatch,
        http=_Protocol,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    running.tasks.append(task)
    while not server.started and not task.done():
        await asyncio.sleep(0.005)
    return server
