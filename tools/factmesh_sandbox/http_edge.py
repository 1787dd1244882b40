"""The HTTP side: declared systems and webhook receivers, each call met by its fault, logged, and then answered.
Which fault and which answer is decided elsewhere; here their order is kept: log first, answer after.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import Any

from starlette.types import ASGIApp

from factmesh.clock import Clock
from factmesh_sandbox import wire
from factmesh_sandbox.journal import Journal, JournalError, Row
from factmesh_sandbox.model import AFTER_WORK, FaultRule, SandboxFile, System, Webhook
from factmesh_sandbox.switchboard import Switchboard
from factmesh_sandbox.systems import Answer, Matched, Request, Systems, problem, read_query
from factmesh_sandbox.webhooks import refusal
from factmesh_sandbox.wire import Receive, Scope, Send

#: A request body larger than this is refused with 413.
BODY_BYTES_MAX = 1_000_000
#: What a fault that answers says, before the work.
_STATUS = {"throttled": 429, "server_error": 500, "unavailable": 503}
_TITLE = {429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Visit:
    """One request on its way through: who it is in the log, and the socket that it came over."""

    scope: Scope
    receive: Receive
    send: Send
    request: Request
    seq: int
    arrived: datetime
    system: str
    operation: str | None
    subject: str | None

    def row(self, *, status: int | None, answered: bool, fault: FaultRule | None, replayed: bool = False) -> Row:
        """The call's row for the log."""
        throttle = fault if fault and fault.fault in ("throttled", "unavailable") else None
        return "add_call", {
            "seq": self.seq, "at": self.arrived.isoformat(), "system": self.system, "operation": self.operation,
            "method": self.request.method, "path": self.request.path,
            "idempotency_key": self.request.idempotency_key(), "correlation_id": self.request.correlation_id(),
            "traceparent": self.request.headers.get("traceparent"), "subject": self.subject,
            "body_sha256": self.request.body_sha256(), "fault": fault.fault if fault else None,
            "retry_after_s": _retry_after_s(throttle) if throttle else None,
            "status": status, "replayed": replayed, "answered": answered,
        }  # fmt: skip


class HttpEdge:
    """The ASGI application of the sandbox; `admin` serves what begins with `/_` and the health route."""

    def __init__(
        self, file: SandboxFile, journal: Journal, switchboard: Switchboard, clock: Clock, admin: ASGIApp
    ) -> None:
        self._journal = journal
        self._switchboard = switchboard
        self._clock = clock
        self._admin = admin
        self._systems = Systems(file, journal)
        self._webhooks = {webhook.name: webhook for webhook in file.webhooks}
        self._in_flight: dict[tuple[str, str], asyncio.Future[None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path.startswith("/_") or path == "/healthz":
            await self._admin(scope, receive, send)
            return
        try:
            request = await _read(scope, receive)
        except _GoneError:
            return
        if request is None:
            await self._send(send, problem(413, "Content Too Large", f"at most {BODY_BYTES_MAX} bytes"))
            return
        try:
            await self._serve(scope, receive, send, request)
        except JournalError as error:
            await self._send(send, problem(503, "Service Unavailable", f"{error}; nothing was done, call again"))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request: Request) -> None:
        first = request.path.lstrip("/").split("/", 1)[0]
        system, webhook = self._systems.system_of(request.path), self._webhooks.get(first)
        visit = Visit(
            scope, receive, send, request, self._journal.call_seq(), self._clock.now(), system=first, operation=None,
            subject=None,
        )  # fmt: skip
        if webhook and request.path.rstrip("/") == f"/{webhook.name}":
            await self._serve_webhook(visit, webhook)
        elif system:
            await self._serve_system(visit, system)
        else:
            await self._answer(visit, problem(404, "Not Found", f"there is no system at {request.path}"), None)

    async def _serve_webhook(self, visit: Visit, webhook: Webhook) -> None:
        if visit.request.method != "POST":
            await self._answer(visit, problem(405, "Method Not Allowed", "deliver with POST", allow="POST"), None)
            return
        headers, body = visit.request.headers, visit.request.raw
        webhook_id = headers.get("webhook-id")
        visit = replace(visit, operation="receive", subject=webhook_id)
        why = refusal(
            webhook.secret, headers, body, now_epoch_s=visit.arrived.timestamp(), tolerance_s=webhook.tolerance_s
        )

        def work() -> Answer:
            delivery = {
                "seq": self._journal.webhook_seq(), "at": self._clock.now().isoformat(), "receiver": webhook.name,
                "webhook_id": webhook_id, "verified": why is None, "refusal": why,
                "body": body.decode("utf-8", "replace"), "call": visit.seq,
            }  # fmt: skip
            answer = Answer(200, {"received": True}) if why is None else problem(401, "Unauthorized", why)
            return replace(answer, rows=(("add_webhook", delivery),))

        await self._meet(visit, self._switchboard.strike(webhook.name, "receive", webhook_id), work)

    async def _serve_system(self, visit: Visit, system: System) -> None:
        matched = self._systems.match(system, visit.request)
        if isinstance(matched, Answer):
            await self._answer(visit, matched, None)
            return
        visit = replace(visit, operation=matched.operation.name, subject=matched.subject)
        fault = self._switchboard.strike(system.name, matched.operation.name, matched.subject)
        if fault and await self._struck_before(visit, fault):
            return
        key = visit.request.idempotency_key() if system.idempotency == "honour" else None
        if key is None or matched.operation.effect is None:
            await self._work(visit, matched, fault)
            return
        slot = (system.name, key)
        while (busy := self._in_flight.get(slot)) is not None:
            if system.concurrent == "conflict":
                detail = f"a request with Idempotency-Key {key} is being worked on"
                await self._answer(visit, problem(409, "Conflict", detail, code="key_in_flight"), fault)
                return
            await asyncio.wait({busy})
        self._in_flight[slot] = done = asyncio.get_running_loop().create_future()
        try:
            await self._work(visit, matched, fault, done)
        finally:
            self._release(slot, done)

    def _release(self, slot: tuple[str, str], done: asyncio.Future[None]) -> None:
        if not done.done():
            done.set_result(None)
        if self._in_flight.get(slot) is done:
            del self._in_flight[slot]

    async def _work(
        self, visit: Visit, matched: Matched, fault: FaultRule | None, done: asyncio.Future[None] | None = None
    ) -> None:
        def work() -> Answer:
            now = self._clock.now()
            known = self._systems.recorded(matched, visit.request, now_epoch_s=now.timestamp())
            if known is not None:
                return known
            return self._systems.perform(
                matched, visit.request, call=visit.seq, at=now.isoformat(), now_epoch_s=now.timestamp()
            )

        def committed() -> None:
            # The key is free as soon as its answer is recorded: a held answer must not hold the key too.
            if done is not None:
                self._release((visit.system, str(visit.request.idempotency_key())), done)

        await self._after(visit, fault, work, committed)

    async def _meet(self, visit: Visit, fault: FaultRule | None, work: Callable[[], Answer]) -> None:
        if not (fault and await self._struck_before(visit, fault)):
            await self._after(visit, fault, work, lambda: None)

    async def _struck_before(self, visit: Visit, fault: FaultRule) -> bool:
        """Carry out a fault that strikes before the work; False when the work is to be done."""
        if fault.fault in _STATUS:
            status = _STATUS[fault.fault]
            headers = _retry_after(fault, self._clock.now())
            answer = problem(status, _TITLE[status], f"declared fault {fault.fault}; nothing was done")
            await self._answer(visit, replace(answer, headers=headers), fault)
            return True
        if fault.fault == "reset_before":
            await self._journal.commit(visit.row(status=None, answered=False, fault=fault))
            await wire.reset_and_leave(visit.scope, visit.receive)
            return True
        if fault.fault == "hang":
            await self._journal.commit(visit.row(status=None, answered=False, fault=fault))
            await wire.hold(visit.scope, visit.receive, fault.hold_s)
            return True
        return False

    async def _after(
        self, visit: Visit, fault: FaultRule | None, work: Callable[[], Answer], committed: Callable[[], None]
    ) -> None:
        if fault and fault.fault == "slow":
            # The work comes after the wait and is done even when the caller has gone: an effect may be late.
            await self._clock.sleep(fault.delay_s)
        answer = work()
        if fault is None or fault.fault not in AFTER_WORK:
            await self._answer(visit, answer, fault, committed)
            return
        told = fault.fault == "malformed"
        row = visit.row(
            status=answer.status if fault.fault in ("malformed", "partial") else None,
            answered=told, fault=fault, replayed=answer.replayed,
        )  # fmt: skip
        await self._journal.commit(row, *answer.rows)
        committed()
        payload = answer.payload()
        if fault.fault == "reset_after":
            await wire.reset_and_leave(visit.scope, visit.receive)
        elif fault.fault == "no_answer":
            await wire.hold(visit.scope, visit.receive, fault.hold_s)
        elif fault.fault == "partial":
            await wire.tear(visit.scope, visit.receive, visit.send, answer.status, answer.content_type, payload)
        else:
            torn = payload[: max(1, len(payload) // 2)] + b"\x00<garbage"
            await wire.respond(visit.send, answer.status, answer.content_type, dict(answer.headers), torn)

    async def _answer(
        self, visit: Visit, answer: Answer, fault: FaultRule | None, committed: Callable[[], None] = lambda: None
    ) -> None:
        row = visit.row(status=answer.status, answered=True, fault=fault, replayed=answer.replayed)
        await self._journal.commit(row, *answer.rows)
        committed()
        if wire.transport_of(visit.scope).is_closing():
            await self._journal.commit(("mark_unanswered", {"seq": visit.seq}))
            return
        await self._send(visit.send, answer)

    async def _send(self, send: Send, answer: Answer) -> None:
        await wire.respond(send, answer.status, answer.content_type, dict(answer.headers), answer.payload())


class _GoneError(Exception):
    """The caller left before the request was whole: it is not a call, and half of a body is never worked on."""


async def _read(scope: Scope, receive: Receive) -> Request | None:
    """The request with its whole body, or None when it is too large. _GoneError: the caller left while sending it."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > BODY_BYTES_MAX:
            return None
        if not message.get("more_body", False):
            break
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return Request(scope["method"], scope["path"], read_query(scope["query_string"]), headers, b"".join(chunks))


def _retry_after_s(fault: FaultRule) -> int | None:
    if fault.retry_after_s is None and fault.fault == "throttled":
        return 1
    return fault.retry_after_s


def _retry_after(fault: FaultRule, now: datetime) -> dict[str, str]:
    seconds = _retry_after_s(fault) if fault.fault != "server_error" else None
    if seconds is None:
        return {}
    if fault.retry_after_form == "seconds":
        return {"retry-after": str(seconds)}
    # An HTTP date has whole seconds: rounded up, so that a caller who obeys it never comes early.
    due = now.replace(microsecond=0) + timedelta(seconds=seconds + math.ceil(now.microsecond / 1e6))
    return {"retry-after": format_datetime(due, usegmt=True)}
