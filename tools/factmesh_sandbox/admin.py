"""The sandbox's own routes: switching faults, the log's summary, health.
They act on the sandbox only; no declared system is served here.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from factmesh_sandbox.journal import Journal
from factmesh_sandbox.switchboard import Switchboard


def admin_app(journal: Journal, switchboard: Switchboard) -> Starlette:
    """The application for `/_faults`, `/_log/summary` and `/healthz`."""

    async def show(request: Request) -> JSONResponse:
        return JSONResponse(switchboard.shown())

    async def put(request: Request) -> JSONResponse:
        name = request.path_params["system"]
        try:
            return JSONResponse(await switchboard.put(name, json.loads(await request.body())))
        except KeyError:
            return _problem(404, f"there is nothing named {name}; known: {', '.join(switchboard.shown())}")
        except ValueError as error:
            return _problem(422, f"fault rules of {name}: {error}; nothing was changed")

    async def revert(request: Request) -> JSONResponse:
        name = request.path_params["system"]
        try:
            return JSONResponse(await switchboard.revert(name))
        except KeyError:
            return _problem(404, f"there is nothing named {name}; known: {', '.join(switchboard.shown())}")

    async def summary(request: Request) -> JSONResponse:
        return JSONResponse(journal.summary())

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/_faults", show, methods=["GET"]),
            Route("/_faults/{system}", put, methods=["PUT"]),
            Route("/_faults/{system}", revert, methods=["DELETE"]),
            Route("/_log/summary", summary, methods=["GET"]),
            Route("/healthz", health, methods=["GET"]),
        ]
    )


def _problem(status: int, detail: str) -> JSONResponse:
    body: dict[str, Any] = {"type": "about:blank", "title": "The request was refused", "status": status}
    return JSONResponse({**body, "detail": detail}, status_code=status, media_type="application/problem+json")
