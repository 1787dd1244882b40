"""Wires the sandbox together and runs it until it is told to stop: sockets, announcement, the two servers.
No behaviour of a system is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from factmesh.clock import Clock, SystemClock
from factmesh.errors import SettingsError
from factmesh_sandbox.admin import admin_app
from factmesh_sandbox.http_edge import HttpEdge
from factmesh_sandbox.journal import Journal
from factmesh_sandbox.model import SandboxFile
from factmesh_sandbox.smtp_edge import SmtpEdge
from factmesh_sandbox.switchboard import Switchboard
from factmesh_sandbox.wire import SandboxProtocol

#: Held connections (hang, no_answer) are cut off after this long when the sandbox is told to stop.
STOP_GRACE_S = 1
#: More connections than this get 503 from the server itself: memory stays bounded.
CONNECTIONS_MAX = 5_000


@dataclass(frozen=True, slots=True)
class Options:
    """Where to listen and what to write. Port 0 takes any free one."""

    log: Path
    host: str = "127.0.0.1"
    http_port: int = 0
    smtp_port: int = 0
    announce: Path | None = None


class _Server(uvicorn.Server):
    """uvicorn that leaves the signals to us: its own handling kills the process before the log is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(file: SandboxFile, options: Options, clock: Clock | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        SettingsError: an address is taken, or the log cannot be opened.
    """
    used = clock or SystemClock()
    http = _listen(options.host, options.http_port)
    smtp = _listen(options.host, options.smtp_port)
    journal = Journal(options.log, file)
    try:
        switchboard = Switchboard(file, journal)
        edge = HttpEdge(file, journal, switchboard, used, admin_app(journal, switchboard))
        config = uvicorn.Config(
            edge, http=SandboxProtocol, lifespan="off", log_config=None, access_log=False, ws="none",
            limit_concurrency=CONNECTIONS_MAX, timeout_keep_alive=75, timeout_graceful_shutdown=STOP_GRACE_S,
            backlog=4096, server_header=False, date_header=False,
        )  # fmt: skip
        server = _Server(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, setattr, server, "should_exit", True)
        mail = SmtpEdge(file.mail, journal, switchboard, used)
        mail_server = await loop.create_server(mail.protocol, sock=smtp)
        # Both sockets listen already: a caller who reads the announcement at once is queued, never refused.
        _announce(file, options, http, smtp)
        await server.serve(sockets=[http])
        mail_server.close()
    finally:
        journal.close()


def _listen(host: str, port: int) -> socket.socket:
    # Named IPPROTO_TCP: asyncio turns Nagle's delay off only for sockets that say so (40 ms an answer otherwise).
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen: {error}", where=f"{host}:{port}", hint="give another port, or 0 for any free one"
        ) from error
    return listener


def _announce(file: SandboxFile, options: Options, http: socket.socket, smtp: socket.socket) -> None:
    http_port, smtp_port = http.getsockname()[1], smtp.getsockname()[1]
    base = f"http://{options.host}:{http_port}"
    said: dict[str, Any] = {
        "pid": os.getpid(),
        "log": str(options.log.absolute()),
        "http": base,
        "http_port": http_port,
        "smtp_host": options.host,
        "smtp_port": smtp_port,
        "systems": {system.name: f"{base}/{system.name}" for system in file.systems},
        "webhooks": {webhook.name: f"{base}/{webhook.name}" for webhook in file.webhooks},
    }
    text = json.dumps(said)
    if options.announce is not None:
        # Renamed into place: a reader never sees half of it.
        partial = options.announce.with_name(options.announce.name + ".part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(options.announce)
    print(text, flush=True)
