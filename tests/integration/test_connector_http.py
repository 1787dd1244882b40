"""What real sockets do to a call, and what a YAML connector makes of it: classes, headers, escapes, secrets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from factmesh import yaml
from factmesh.clock import SystemClock
from factmesh.errors import ErrorClass, FactmeshError, ValidationError
from factmesh.expressions import default_expressions
from factmesh.http_client import AmbiguousError, HttpClient, NotSentError, Request
from factmesh_connector import declared, yaml_connector
from factmesh_connector.protocol import CallContext, CallFailed
from factmesh_connector.yaml_connector import YamlConnector

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
TIMEOUT_S = 0.4


def said(status: int, body: object = None, headers: str = "", kind: str = "application/json") -> Answer:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(raw)}\r\n{headers}\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()

    return answer


def reset(writer: asyncio.StreamWriter) -> None:
    """A real RST, not a tidy end."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def reset_after_request(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reset(writer)


async def tidy_close(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def hang(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def slow_body(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each single read is fast enough; the whole is not."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n")
    for _ in range(100):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def torn_body(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()


async def no_http(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-hello\r\n\r\n")
    await writer.drain()


@dataclass
class Server:
    port: int = 0
    answer: Answer = field(default_factory=lambda: said(200, {}))
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def header(self, name: str) -> str | None:
        for line in self.heads[-1].split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name:
                return value
        return None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = 0
                for line in head.split("\r\n"):
                    if line.lower().startswith("content-length:"):
                        length = int(line.partition(":")[2])
                self.heads.append(head.rstrip("\r\n"))
                self.bodies.append(await reader.readexactly(length))
                await self.answer(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            writer.close()
        except asyncio.CancelledError:
            writer.transport.abort()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await made.serve(reader, writer)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    yield made
    listening.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def http() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()


# --- the client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [reset_after_request, tidy_close, hang, slow_body, torn_body, no_http], ids=lambda a: a.__name__
)
async def test_what_breaks_after_the_first_byte_is_ambiguous(server: Server, http: HttpClient, answer: Answer) -> None:
    """C3: whatever ends an exchange once the request is on its way, the server has it and may carry it out."""
    server.answer = answer
    began = asyncio.get_running_loop().time()
    with pytest.raises(AmbiguousError, match="may have been carried out") as caught:
        await http.send(Request("POST", server.url + "/secret-path", body=b"{}"), timeout_s=TIMEOUT_S)
    assert len(server.bodies) == 1
    assert asyncio.get_running_loop().time() - began < TIMEOUT_S + 1
    assert "secret-path" not in str(caught.value)


async def test_what_breaks_before_the_first_byte_was_not_sent(http: HttpClient) -> None:
    """C3: a refused connection, a name that does not resolve and a connect that times out are known failures."""
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    with pytest.raises(NotSentError, match="nothing was sent") as caught:
        await http.send(Request("POST", f"http://127.0.0.1:{port}/", body=b"{}"), timeout_s=TIMEOUT_S)
    assert caught.value.error_class is ErrorClass.TRANSIENT
    with pytest.raises(NotSentError):
        await http.send(Request("POST", "http://nowhere.invalid/", body=b"{}"), timeout_s=5)
    # A backlog of 0 that is full leaves connects unanswered.
    closed.listen(0)
    fill = [socket.socket() for _ in range(8)]
    for one in fill:
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    with pytest.raises(NotSentError, match="within"):
        await http.send(Request("POST", f"http://127.0.0.1:{port}/", body=b"{}"), timeout_s=TIMEOUT_S)
    for one in (*fill, closed):
        one.close()


async def test_the_check_before_the_first_byte_keeps_it_from_leaving(server: Server, http: HttpClient) -> None:
    """⚑ DESIGN 5: what the check raises is raised, on new and kept connections, and the server has seen nothing."""

    class Refused(Exception):
        pass

    def refuse() -> None:
        raise Refused

    for fresh in (True, False):
        server.heads.clear()
        with pytest.raises(Refused):
            await http.send(
                Request("POST", server.url, body=b"{}"), timeout_s=5, before_first_byte=refuse, fresh=fresh
            )
        await asyncio.sleep(0.05)
        assert server.heads == []
        # The pool is none the worse for it.
        assert (await http.send(Request("POST", server.url, body=b"{}"), timeout_s=5)).status == 200


async def test_fresh_requests_share_no_connection(server: Server, http: HttpClient) -> None:
    """C2: what must not be repeated does not ride on a connection that the server may be closing."""
    for _ in range(3):
        await http.send(Request("GET", server.url), timeout_s=5, fresh=True)
    assert server.connections == 3
    for _ in range(3):
        await http.send(Request("GET", server.url), timeout_s=5)
    assert server.connections == 4


async def test_no_redirect_and_no_cookie_is_followed(server: Server, http: HttpClient) -> None:
    """C7: a call goes where the connector says, as whom the connector says."""
    server.answer = said(302, {}, f"location: {server.url}/elsewhere\r\nset-cookie: session=1\r\n")
    assert (await http.send(Request("POST", server.url, body=b"{}"), timeout_s=5)).status == 302
    server.answer = said(200, {})
    await http.send(Request("GET", server.url), timeout_s=5)
    assert len(server.heads) == 2
    assert server.header("cookie") is None


async def test_an_answer_without_end_is_cut(server: Server, http: HttpClient) -> None:
    """F5, bounds: memory has a limit, whatever a downstream sends."""
    server.answer = said(200, b"x" * 5000)
    with pytest.raises(AmbiguousError, match="more than 1000 bytes"):
        await http.send(Request("GET", server.url), timeout_s=5, response_bytes_max=1000)


# --- the YAML connector ----------------------------------------------------------------------------------------------

FILE = """
connector: shop
base_url: ref+env://SHOP_URL
auth: {bearer: ref+env://SHOP_TOKEN}
timeout_s: 0.4
errors: {statuses: {409: transient}}
translations: {words: {NEU: open, FERTIG: done}}
operations:
  order:
    request:
      method: POST
      path: /orders/${ input.id }/lines
      query: {tag: '${ input.tags }', gone: null}
      headers: {X-Tenant: '${ input.tenant }'}
      body: {amount: '${ input.amount }', ref: '${ command.idempotency_key }'}
    response:
      output: {order: '${ response.body.order }', state: '${ response.body.state }'}
      translate: {state: words}
    idempotency: {strategy: key, key_valid_s: 60}
    errors:
      statuses: {422: conflict, 5xx: transient, 500: ambiguous}
      bodies: [{when: '${ response.body.code == "FULL" }', class: throttled}]
    output_bytes_max: 200
  book:
    request: {method: POST, path: /book, body: {id: '${ input.id }'}}
    response: {output: {booking: '${ response.body.booking }'}}
    idempotency:
      strategy: lookup
      request: {method: GET, path: /book, query: {id: '${ input.id }'}}
      found: '${ size(response.body.items) > 0 }'
      output: {booking: '${ response.body.items[0].booking }'}
"""
INPUT = {"id": "a/b ?ü", "tags": ["x", "y"], "tenant": "t1", "amount": 3}
TOKEN = "s3cret-token-value"


def nothing() -> None:
    """No lease to check."""


CTX = CallContext("key-1", "corr-1", "00-" + "1" * 32 + "-" + "2" * 16 + "-01", {"idempotency_key": "key-1"}, nothing)


@pytest.fixture
def shop(server: Server, http: HttpClient) -> YamlConnector:
    document = yaml.parse(FILE, file="shop.yaml")
    return yaml_connector.build(
        declared.parse(document, stem="shop"),
        document,
        http=http,
        clock=SystemClock(),
        expressions=default_expressions(),
        environ={"SHOP_URL": server.url + "/api/", "SHOP_TOKEN": TOKEN},
    )


async def test_a_call_carries_what_it_must(server: Server, shop: YamlConnector) -> None:
    """C1, C7: mapped and escaped request, idempotency key, correlation id, trace context, bearer; translated answer."""
    server.answer = said(201, {"order": 7, "state": "NEU", "more": "left out"})
    assert await shop.call("order", INPUT, CTX) == {"order": 7, "state": "open"}
    assert server.heads[-1].startswith("POST /api/orders/a%2Fb%20%3F%C3%BC/lines?tag=x&tag=y HTTP/1.1")
    assert json.loads(server.bodies[-1]) == {"amount": 3, "ref": "key-1"}
    sent = {name: server.header(name) for name in ("idempotency-key", "x-correlation-id", "traceparent", "x-tenant")}
    assert sent == {
        "idempotency-key": "key-1", "x-correlation-id": "corr-1", "traceparent": CTX.traceparent, "x-tenant": "t1",
    }  # fmt: skip
    assert server.header("authorization") == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    ("status", "body", "error_class"),
    [
        (400, {}, "validation"), (401, {}, "permission"), (403, {}, "permission"), (404, {}, "not_found"),
        (405, {}, "validation"), (408, {}, "transient"), (409, {}, "transient"), (412, {}, "conflict"),
        (422, {}, "conflict"), (429, {}, "throttled"), (500, {}, "ambiguous"), (502, {}, "transient"),
        (503, {}, "transient"), (303, {}, "ambiguous"), (304, {}, "ambiguous"), (400, {"code": "FULL"}, "throttled"),
        (200, {"code": "FULL"}, "throttled"), (400, b"{not json", "validation"), (200, b"{not json", "ambiguous"),
        (200, b'{"order": NaN, "state": "NEU"}', "ambiguous"), (200, {"order": 1}, "ambiguous"),
        (200, {"order": 1, "state": "UNBEKANNT"}, "ambiguous"), (200, b"", "ambiguous"),
        (200, {"order": "x" * 300, "state": "NEU"}, "ambiguous"),
    ],
)  # fmt: skip
async def test_an_answer_is_classified_by_the_tables(
    server: Server, shop: YamlConnector, status: int, body: object, error_class: str
) -> None:
    """C3, C2: body rules, exact statuses, hundreds, the connector's table, the default; a success whose answer cannot
    be used (broken, unmapped, untranslated, too large) worked, so it is ambiguous and never a failure."""
    server.answer = said(status, body)
    with pytest.raises(CallFailed) as caught:
        await shop.call("order", INPUT, CTX)
    assert caught.value.error_class == error_class
    assert f"shop.order answered {status}" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error_class"), [(500, "ambiguous"), (502, "ambiguous"), (504, "ambiguous"), (503, "transient")]
)
async def test_without_a_promise_a_server_error_says_nothing(
    server: Server, shop: YamlConnector, status: int, error_class: str
) -> None:
    """⚑ C3: a 500 may come after the work; only the downstream's own promise, in the table, makes it a failure."""
    server.answer = said(status, {})
    with pytest.raises(CallFailed) as caught:
        await shop.call("book", {"id": "1"}, CTX)
    assert caught.value.error_class == error_class


async def test_retry_after_is_read_in_both_forms(server: Server, shop: YamlConnector) -> None:
    """C3: `Retry-After` is obeyed, in seconds and as a date; nonsense is passed over."""
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    for text, low, high in (("7", 7, 7), (soon, 28, 30.1), ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0)):
        server.answer = said(429, {}, f"retry-after: {text}\r\n")
        with pytest.raises(CallFailed) as caught:
            await shop.call("order", INPUT, CTX)
        assert caught.value.retry_after_s is not None
        assert low <= caught.value.retry_after_s <= high
    server.answer = said(429, {}, "retry-after: soon\r\n")
    with pytest.raises(CallFailed) as caught:
        await shop.call("order", INPUT, CTX)
    assert caught.value.retry_after_s is None


@pytest.mark.parametrize(
    "change", [{"id": ""}, {"id": ".."}, {"id": None}, {"tenant": "a\r\nx: y"}, {"tags": [{"a": 1}]}], ids=str
)
async def test_input_that_cannot_be_sent_is_a_known_failure(
    server: Server, shop: YamlConnector, change: dict[str, object]
) -> None:
    """C3: data cannot leave its path segment or its header; such a call is refused before anything is sent."""
    with pytest.raises(FactmeshError) as caught:
        await shop.call("order", {**INPUT, **change}, CTX)
    assert caught.value.error_class is ErrorClass.VALIDATION
    assert server.heads == []
    missing = {k: v for k, v in INPUT.items() if k != "amount"}
    with pytest.raises(FactmeshError) as caught:
        await shop.call("order", missing, CTX)
    assert caught.value.error_class is ErrorClass.VALIDATION


async def test_a_look_up_says_found_absent_or_nothing(server: Server, shop: YamlConnector) -> None:
    """C2: found gives the operation's own output; an empty list and a 404 are a no; any other answer is none."""
    server.answer = said(200, {"items": [{"booking": "b-1"}]})
    assert await shop.look_up("book", {"id": "1"}, CTX) == {"booking": "b-1"}
    assert server.heads[-1].startswith("GET /api/book?id=1 ")
    server.answer = said(200, {"items": []})
    assert await shop.look_up("book", {"id": "1"}, CTX) is None
    server.answer = said(404, {})
    assert await shop.look_up("book", {"id": "1"}, CTX) is None
    for broken in (said(500, {}), said(200, {"thing": 1}), said(401, {}), reset_after_request):
        server.answer = broken
        with pytest.raises(FactmeshError):
            await shop.look_up("book", {"id": "1"}, CTX)


async def test_no_error_tells_a_secret_or_a_payload(server: Server, shop: YamlConnector) -> None:
    """F5: no text that goes into logs, results or DLQ headers holds the token, the input or the answer."""
    private = {**INPUT, "id": "anna@example.org", "tenant": "tenant-77"}
    answers = (
        said(500, {"echo": "anna@example.org"}), said(200, {"order": "anna@example.org"}), reset_after_request, hang,
        said(200, {"order": 1, "state": "anna@example.org"}), said(401, {"token": TOKEN}),
    )  # fmt: skip
    for answer in answers:
        server.answer = answer
        with pytest.raises(FactmeshError) as caught:
            await shop.call("order", private, CTX)
        text = f"{caught.value!s} {caught.value!r}"
        for hidden in (TOKEN, "anna", "tenant-77"):
            assert hidden not in text
    for shown in (repr(shop), repr(Request("GET", server.url + "/anna", {"Authorization": TOKEN}))):
        assert TOKEN not in shown
        assert "anna" not in shown


async def test_a_header_that_is_no_header_is_refused_before_it_leaves(server: Server, http: HttpClient) -> None:
    """C3: h11 refuses an illegal header before it writes; that is a known failure."""
    with pytest.raises(ValidationError, match="not a valid HTTP request"):
        await http.send(Request("GET", server.url, {"X-A": "a\nb"}), timeout_s=5)
    assert server.heads == []
