"""The HTTP entrance: CloudEvents in three modes are prechecked, produced to `facts.raw`, and answered once durable.
No second path: what it accepts the Kafka handler handles like any record. It decides nothing that the handler does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID

import orjson
import structlog
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from factmesh import dlq, ids
from factmesh.clock import Clock
from factmesh.errors import FactmeshError, SchemaError, TransientError
from factmesh.kafka import BrokerError, Publisher
from factmesh.message import H_TRACEPARENT, Emission
from factmesh.metrics import Metrics
from factmesh.postgres import Pool, is_transient
from factmesh.registry import Registry
from factmesh.telemetry import Hop, messaging, new_traceparent, parse_traceparent
from factmesh.topics import VALUE_BYTES_MAX
from factmesh_intake import events, problems, reading, store, strict_json
from factmesh_intake.decide import accept
from factmesh_intake.events import Event
from factmesh_intake.model import STAGES, Desk, TooLargeError, TooSlowError, UnsupportedMediaError, stage_of

BODY_BYTES_MAX = VALUE_BYTES_MAX
BATCH_BYTES_MAX = 4 * VALUE_BYTES_MAX
IN_FLIGHT_MAX = 256
"""Requests that are read or wait for acknowledgements; more would only hold memory, so they are told to come back."""
BYTES_IN_FLIGHT_MAX = 64 * VALUE_BYTES_MAX
"""Bodies of those requests together: 256 of the largest batches would be a gigabyte."""
QUEUED_MAX = 10_000
"""Records in the producer's queue above which nothing more is taken: the broker is behind."""
BODY_S_MAX = 30.0
"""How long one request may take to send its body: callers that stall would use up what may be in flight."""
ACK_S_MAX = 10.0
"""Above what a healthy broker ever needs, below what callers wait."""
YIELD_EVERY = 20
"""Events of a batch that are checked before the loop's other work gets its turn."""

HeaderList = Sequence[tuple[str, str]]
_ABOUT = {"http.request.method": "POST", "http.route": "/facts", "url.path": "/facts"}

log = structlog.get_logger("factmesh.intake.http")


@dataclass(frozen=True)
class Entrance:
    """What the HTTP entrance works with."""

    desk: Desk
    registry: Registry
    publisher: Publisher
    pool: Pool
    clock: Clock
    metrics: Metrics
    topic: str


def make_app(entrance: Entrance) -> ASGIApp:
    """The application. `POST /facts` passes the framework by: its routing and middleware cost as much as the fact."""
    app = FastAPI(title="Factmesh intake", docs_url=None, redoc_url=None)
    desk = _Facts(entrance)
    post = desk.guarded("/facts", desk.post)
    app.add_route("/facts", post, methods=["POST"])
    app.add_route("/facts/{correlation_id}", desk.guarded("/facts/{correlation_id}", desk.get), methods=["GET"])
    app.add_route(problems.PATH + "{slug}", _page, methods=["GET"])
    app.add_exception_handler(HTTPException, _http_error)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/facts" and scope["method"] == "POST":
            response = await post(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await app(scope, receive, send)

    return answer


async def _page(request: Request) -> Response:
    problem = problems.BY_SLUG.get(request.path_params["slug"])
    if problem is None:
        return _problem(request, problems.BY_SLUG["not-found"])
    return PlainTextResponse(problems.page(problem))


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    slug = {404: "not-found", 405: "not-allowed"}.get(status, "error")
    return _problem(request, problems.BY_SLUG[slug])


def _problem(
    request: Request, problem: problems.Problem, error: BaseException | None = None, **members: Any
) -> Response:
    headers = {"Retry-After": str(problem.retry_after_s)} if problem.retry_after_s else {}
    body = problems.document(problem, _base_url(request), error, **members)
    return Response(orjson.dumps(body), problem.status, headers, problems.CONTENT_TYPE)


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def _base_url(request: Request) -> str:
    """What our own addresses begin with, as this caller sees us."""
    scope = request.scope
    root = scope.get("app_root_path", scope.get("root_path", ""))
    host = next((value for name, value in scope["headers"] if name == b"host"), None)
    return _base_url_of(scope.get("scheme", "http"), host, scope.get("server"), root)


@lru_cache(maxsize=256)  # callers know us under a few names; one who makes them up only misses
def _base_url_of(scheme: str, host: bytes | None, server: tuple[str, int] | None, root: str) -> str:
    headers = [(b"host", host)] if host is not None else []
    scope = {"type": "http", "scheme": scheme, "headers": headers, "server": server, "path": "/", "root_path": root}
    return str(Request(scope).base_url)


def _too_large(bytes_max: int) -> TooLargeError:
    return TooLargeError(f"more than {bytes_max} bytes in one request", hint="split it, or publish to Kafka")


class _Busy(Exception):
    """There is no room for this body now."""


def _give_up(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_exception(TimeoutError())


class _Facts:
    def __init__(self, entrance: Entrance) -> None:
        self._in = entrance
        self._in_flight = 0
        self._bytes_in_flight = 0
        self._sends = messaging(entrance.topic, "send")

    def guarded(
        self, route: str, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Every error becomes a problem document, every answer is counted."""

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            try:
                response = await handle(request)
            except FactmeshError as error:
                response = _problem(request, problems.of_error(error), error)
            except ClientDisconnect:
                # Nobody reads this answer: the caller hung up before its body was whole, and nothing was accepted.
                response = _problem(request, problems.BY_SLUG["unreadable"])
            except Exception as error:
                if is_transient(error):
                    response = _problem(request, problems.BY_SLUG["unavailable"])
                else:
                    # Frames only: the text and the locals of a bug may quote the payload (F5).
                    _, text, frames = dlq.describe(error)
                    log.error("intake.http_bug", route=route, error=text, stack=frames)
                    response = _problem(request, problems.BY_SLUG["error"])
            self._in.metrics.inc("factmesh_http_requests_total", route, str(response.status_code))
            self._in.metrics.observe("factmesh_http_seconds", time.perf_counter() - began, route)
            return response

        return answer

    # --- facts in ----------------------------------------------------------------------------------------------------

    async def post(self, request: Request) -> Response:
        if self._in_flight >= IN_FLIGHT_MAX or self._in.publisher.queued > QUEUED_MAX:
            return _problem(request, problems.BY_SLUG["busy"])
        self._in_flight += 1
        try:
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.scope["headers"]]
            first = dict(reversed(headers))
            came = first.get(H_TRACEPARENT)
            with Hop("POST /facts", came, "server", _ABOUT) as hop:
                response = await self._take(request, headers, first, hop.traceparent)
                if hop.recording:
                    hop.note(**{"http.response.status_code": response.status_code})
            return response
        except _Busy:
            return _problem(request, problems.BY_SLUG["busy"])
        finally:
            self._in_flight -= 1

    async def _take(
        self, request: Request, headers: HeaderList, first: Mapping[str, str], traceparent: str | None
    ) -> Response:
        mode = events.http_mode(headers)
        if not mode:
            raise UnsupportedMediaError(
                "content-type", "a CloudEvents format that is not spoken here", hint=f"send {events.EVENT_JSON}"
            )
        body = await self._body(request, first, BATCH_BYTES_MAX if mode == "batch" else BODY_BYTES_MAX)
        try:
            return await self._judge(request, mode, headers, first, body, traceparent)
        finally:
            self._bytes_in_flight -= len(body)

    async def _body(self, request: Request, first: Mapping[str, str], bytes_max: int) -> bytes:
        """The whole body, never more than `bytes_max` in memory. `first` holds the first header of each name."""
        encoding = first.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaError(
                "content-encoding", "a body that is compressed or encoded is not read", hint="send it as it is, without"
            )
        declared = first.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > bytes_max:
            raise _too_large(bytes_max)
        parts: list[bytes] = []
        size = 0
        more = True
        try:
            async with asyncio.timeout(BODY_S_MAX):
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part = message.get("body", b"")
                    size += len(part)
                    self._bytes_in_flight += len(part)
                    if size > bytes_max:
                        raise _too_large(bytes_max)
                    if self._bytes_in_flight > BYTES_IN_FLIGHT_MAX:
                        raise _Busy
                    parts.append(part)
                    more = message.get("more_body", False)
        except BaseException as error:
            self._bytes_in_flight -= size
            if isinstance(error, TimeoutError):
                raise TooSlowError(
                    f"the body did not come within {BODY_S_MAX:g} s", hint="nothing was accepted; send it again"
                ) from None
            raise
        return b"".join(parts)

    async def _judge(
        self,
        request: Request,
        mode: str,
        headers: HeaderList,
        first: Mapping[str, str],
        body: bytes,
        traceparent: str | None,
    ) -> Response:
        if mode == "batch":
            # Where the caller traces nothing, each event of a batch begins a trace of its own: one for each workflow.
            traced = parse_traceparent(first.get(H_TRACEPARENT)) is not None
            return await self._batch(request, events.from_http_batch(body), traceparent if traced else None)
        if mode == "structured":
            return await self._single(request, traceparent, lambda: events.from_json(strict_json.parse(body)))
        return await self._single(request, traceparent, lambda: events.from_http_binary(headers, body))

    async def _single(self, request: Request, traceparent: str | None, parse: Callable[[], Event]) -> Response:
        """One event: 202 after the acknowledgement of all replicas, or why not."""
        event: Event | None = None
        try:
            event = parse()
            await self._check(event)
            await self._durable([self._emission(event, traceparent)])
        except FactmeshError as error:
            problem = problems.of_error(error)
            self._count(problem.slug)
            known = _correlation(event) if event is not None else None
            return _problem(request, problem, error, correlation_id=known)
        self._count("accepted")
        accepted = _accepted(event, request)
        return _json(accepted, 202, {"Location": accepted["status_url"]})

    async def _batch(
        self, request: Request, parsed: Sequence[Event | FactmeshError], traceparent: str | None
    ) -> Response:
        """Each event judged alone; the good ones are produced together. 202, 207 for some, 422 for none."""
        results: list[dict[str, Any]] = []
        good: list[Event] = []
        base_url = _base_url(request)
        for number, item in enumerate(parsed):
            if number % YIELD_EVERY == 0:
                await asyncio.sleep(0)
            try:
                if isinstance(item, FactmeshError):
                    raise item
                await self._check(item)
            except TransientError:
                raise
            except FactmeshError as error:
                problem = problems.of_error(error)
                self._count(problem.slug)
                named = {"source": item.source, "id": item.id} if isinstance(item, Event) else {}
                body = problems.document(problem, base_url, error)
                results.append({"index": number, **named, "status": problem.status, "problem": body})
            else:
                good.append(item)
                results.append({"index": number, "status": 202, **_accepted(item, request)})
        if good:
            emissions = [self._emission(event, traceparent) for event in good]
            await self._durable(emissions)
            for _ in good:
                self._count("accepted")
        refused = len(results) - len(good)
        status = 202 if not refused else 207 if good else 422
        return _json({"accepted": len(good), "refused": refused, "results": results}, status)

    async def _check(self, event: Event) -> None:
        """The same questions that the handler asks; raises what is wrong."""
        schema_id = reading.missing_schema(event, self._in.registry)
        if schema_id is not None:
            try:
                await self._in.registry.by_id(schema_id)
            except SchemaError as error:
                # The place that it names is ours, a folder or an address: for the log, not for strangers.
                raise SchemaError(error.message, where=event.where, hint=error.hint) from error
        incoming = reading.read(event, self._in.registry)
        if event.content_type == events.AVRO:
            reading.body_hash(incoming)  # refuses a double that is not finite; in JSON there is none
        accept(self._in.desk, incoming, self._in.clock.now())

    async def _durable(self, emissions: Sequence[Emission]) -> None:
        """Durable, or TransientError. What timed out may still be written: the caller repeats it under the same id."""
        try:
            if len(emissions) == 1:
                waiting = self._in.publisher.send(emissions[0])
                end = asyncio.get_running_loop().call_later(ACK_S_MAX, _give_up, waiting)
                try:
                    await waiting
                finally:
                    end.cancel()
            else:
                async with asyncio.timeout(ACK_S_MAX):
                    await self._in.publisher.publish(emissions, patient=False)
        except (BrokerError, TimeoutError) as error:
            log.warning("intake.not_durable", events=len(emissions), error=str(error) or "no acknowledgement in time")
            raise TransientError(
                "the broker did not acknowledge it", hint="send it again under the same id; repeats are dropped"
            ) from error

    def _emission(self, event: Event, traceparent: str | None) -> Emission:
        own = event.extensions.get(H_TRACEPARENT)
        came = own if own is not None and parse_traceparent(own) is not None else traceparent
        with Hop(f"send {self._in.topic}", came, "producer", self._sends) as hop:
            if hop.recording:
                hop.note(**{"factmesh.correlation_id": _correlation(event)})
            carried = hop.traceparent or new_traceparent()
        headers = (*events.to_kafka(event), (H_TRACEPARENT, carried.encode()))
        return Emission(self._in.topic, f"{event.source} {event.id}".encode(), event.data, headers)

    def _count(self, answer: str) -> None:
        self._in.metrics.inc("factmesh_facts_total", "http", answer)

    # --- how far it is -----------------------------------------------------------------------------------------------

    async def get(self, request: Request) -> Response:
        try:
            correlation_id = UUID(request.path_params["correlation_id"])
        except ValueError:
            return _problem(request, problems.BY_SLUG["not-found"])
        rows = await store.progress_of(self._in.pool, correlation_id)
        if not rows:
            return _problem(request, problems.BY_SLUG["not-seen"], correlation_id=str(correlation_id))
        return _json(progress(rows))


def _correlation(event: Event) -> str:
    return str(ids.correlation_id(event.source, event.id))


def _accepted(event: Event, request: Request) -> dict[str, Any]:
    correlation_id = _correlation(event)
    return {
        "correlation_id": correlation_id,
        "status_url": f"{_base_url(request).rstrip('/')}/facts/{correlation_id}",
        "source": event.source,
        "id": event.id,
    }


def progress(rows: Sequence[Any]) -> dict[str, Any]:
    """The answer to "how far is my fact": its stage, what comes next and when it is due.

    Of several instances the one that is not at its end speaks for the fact; all are listed.
    """
    fact = rows[0]
    instances = [
        {
            "instance_id": str(row["instance_id"]),
            "workflow": row["workflow"],
            "stage": stage_of(row["status"]),
            "status": row["status"],
            "step": row["step"],
            "next_step": row["next_step"],
            "outcome": row["outcome"],
            "reason": row["instance_reason"],
            "due_by": store.iso(row["instance_due_by"]),
            "updated_at": store.iso(row["instance_updated_at"]),
        }
        for row in rows
        if row["instance_id"] is not None
    ]
    speaks = next((i for i in instances if i["stage"] != "ended"), instances[0] if instances else None)
    stage = speaks["stage"] if speaks else fact["stage"]
    said = speaks or {"reason": fact["reason"]}
    return {
        "correlation_id": str(fact["correlation_id"]),
        "source": fact["source"],
        "id": fact["source_id"],
        "type": fact["type"],
        "business_object_type": fact["business_object_type"],
        "business_object_id": fact["business_object_id"],
        "stage": stage,
        "next": STAGES[stage],
        "status": said.get("status"),
        "step": said.get("step"),
        "next_step": said.get("next_step"),
        "outcome": said.get("outcome"),
        "reason": said.get("reason"),
        "due_by": said.get("due_by") or store.iso(fact["due_by"]),
        "received_at": store.iso(fact["received_at"]),
        "updated_at": said.get("updated_at") or store.iso(fact["updated_at"]),
        "instances": instances,
    }
