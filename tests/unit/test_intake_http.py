"""The HTTP entrance when the broker is gone or too much is in flight: nothing is said to be durable that is not.
The producer is the real one, pointed at an address where nobody listens.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from starlette.requests import Request

from factmesh.clock import SystemClock
from factmesh.expressions import default_expressions
from factmesh.kafka import Publisher
from factmesh.metrics import Metrics
from factmesh.postgres import Pool
from factmesh.project import Project
from factmesh.registry import open_registry
from factmesh_intake import http, problems, reading
from factmesh_intake.model import Desk

PROJECT = Path(__file__).parents[2] / "examples" / "customer_onboarding"
HEADERS = {
    "ce-specversion": "1.0",
    "ce-id": "1",
    "ce-source": "//shop.example/web",
    "ce-type": "customer.signed_up",
    "ce-dataschema": "x:/customer.signed_up/v2",
    "content-type": "application/json",
}


def body() -> bytes:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"customer_id": "C", "email": "e@example.org", "country": "AT", "signed_up_at": at}).encode()


def _port_of_nobody() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    registry = open_registry(project=PROJECT)
    documents = list(Project.load(PROJECT).adapters.values())
    mapper = await reading.build_mapper(documents, registry, default_expressions())
    publisher = Publisher(f"127.0.0.1:{_port_of_nobody()}", client_id="test")
    entrance = http.Entrance(
        desk=Desk(mapper, timedelta(days=14)),
        registry=registry,
        publisher=publisher,
        pool=cast(Pool, None),  # no request of these tests reads the database
        clock=SystemClock(),
        metrics=Metrics(),
        topic="facts.raw",
    )
    transport: Any = httpx2.ASGITransport(app=http.make_app(entrance))
    async with httpx2.AsyncClient(transport=transport, base_url="http://intake") as made:
        yield made
    await publisher.close(0.1)


async def test_without_a_broker_the_caller_is_told_to_come_back(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A2: nothing is acknowledged before it is durable; 503 with Retry-After, and the same id may be sent again."""
    monkeypatch.setattr(http, "ACK_S_MAX", 0.3)
    answer = await client.post("/facts", headers=HEADERS, content=body())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["type"].endswith("/problems/unavailable")
    assert "same id" in answer.json()["detail"]
    batch = [
        {k.removeprefix("ce-"): v for k, v in HEADERS.items() if k.startswith("ce-")} | {"data": json.loads(body())}
    ]
    answer = await client.post(
        "/facts", headers={"content-type": "application/cloudevents-batch+json"}, content=json.dumps(batch).encode()
    )
    assert answer.status_code == 503


async def test_each_of_many_callers_is_told_that_the_broker_is_gone(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A2: callers at the same time wait each for its own acknowledgement, and none is told that of another."""
    monkeypatch.setattr(http, "ACK_S_MAX", 0.3)
    answers = await asyncio.gather(
        *(client.post("/facts", headers={**HEADERS, "ce-id": f"id-{n}"}, content=body()) for n in range(20)),
        client.post("/facts", headers={**HEADERS, "ce-type": "nobody.asked"}, content=body()),
    )
    assert [a.status_code for a in answers] == [503] * 20 + [422]
    assert len({a.json()["correlation_id"] for a in answers}) == 21


@pytest.mark.parametrize("host", [b"mesh.example:81", b"[::1]:8080", b"a b", b"", b"\xff", b"x:99999", None])
@pytest.mark.parametrize("server", [("10.0.0.1", 8080), ("10.0.0.1", 80), ("::1", 80), None])
@pytest.mark.parametrize("root", [{}, {"root_path": "/in"}, {"root_path": "/in/x", "app_root_path": "/in"}])
def test_addresses_are_told_as_the_caller_sees_us(host: bytes | None, server: Any, root: dict[str, str]) -> None:
    """A2: what is remembered of a caller's name for us is what the framework makes of it, a forged one too."""
    headers = [(b"accept", b"x"), *([(b"host", host), (b"host", b"second")] if host is not None else [])]
    for scheme in ("http", "https"):
        scope = {"type": "http", "scheme": scheme, "server": server, "headers": headers, "path": "/x", **root}
        assert http._base_url(Request(scope)) == str(Request(scope).base_url)


async def test_only_the_hot_route_passes_the_framework_by(client: httpx2.AsyncClient) -> None:
    """A2: other methods and addresses are refused as ever, with a problem document."""
    answer = await client.get("/facts")
    assert (answer.status_code, answer.json()["type"]) == (405, "http://intake/problems/not-allowed")
    answer = await client.post("/facts/", headers=HEADERS, content=body(), follow_redirects=False)
    assert answer.status_code in (307, 404)
    answer = await client.get("/nothing")
    assert (answer.status_code, answer.json()["status"]) == (404, 404)


async def test_requests_in_flight_are_bounded(client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 3, back-pressure: above the bound nothing is read, and the caller is told when to come back."""
    monkeypatch.setattr(http, "IN_FLIGHT_MAX", 0)
    answer = await client.post("/facts", headers=HEADERS, content=body())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["type"].endswith("/problems/busy")


async def test_the_bytes_of_all_bodies_are_bounded_together(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 3, back-pressure: many large bodies at once are told to come back, and what they held is given back."""
    monkeypatch.setattr(http, "BYTES_IN_FLIGHT_MAX", 300_000)
    monkeypatch.setattr(http, "BODY_S_MAX", 0.5)
    go = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b" " * 140_000
        await go.wait()

    held = [asyncio.create_task(client.post("/facts", headers=HEADERS, content=half())) for _ in range(2)]
    await asyncio.sleep(0.1)
    answer = await client.post("/facts", headers=HEADERS, content=b" " * 140_000)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["type"].endswith("/problems/busy")
    told = await asyncio.gather(*held)
    assert [one.status_code for one in told] == [408, 408]
    answer = await client.post("/facts", headers=HEADERS, content=b" " * 290_000)
    assert answer.status_code == 400
    answer = await client.post("/facts", headers=HEADERS, content=b" " * 290_000)
    assert answer.status_code == 400


async def test_a_streamed_body_is_cut_off_at_its_bound(client: httpx2.AsyncClient) -> None:
    """A2: a body without Content-Length is never read further than a fact may be large."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100_000
            yield b" " * 100_000

    answer = await client.post("/facts", headers=HEADERS, content=endless())
    assert answer.status_code == 413
    assert sent < 2 * http.BODY_BYTES_MAX


async def test_a_body_that_does_not_come_is_not_waited_for(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input: callers that stall do not use up what may be in flight; nothing of theirs is accepted."""
    monkeypatch.setattr(http, "BODY_S_MAX", 0.1)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    answer = await client.post("/facts", headers=HEADERS, content=stalling())
    assert answer.status_code == 408
    assert answer.json()["type"].endswith("/problems/too-slow")
    assert "within 0.1 s" in answer.json()["detail"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity"])
async def test_a_compressed_body_is_refused_by_its_name(client: httpx2.AsyncClient, encoding: str) -> None:
    """Bad input: the answer names the encoding (RFC 9110, 415), not the bytes that it makes."""
    answer = await client.post(
        "/facts", headers={**HEADERS, "content-encoding": encoding}, content=gzip.compress(body())
    )
    assert answer.status_code == 415
    assert answer.json()["field"] == "content-encoding"
    assert "send it as it is" in answer.json()["detail"]


def test_every_problem_has_its_page() -> None:
    """A2: the type of a problem leads to what the caller does next."""
    for problem in problems.TABLE:
        page = problems.page(problem)
        assert problem.advice in page
        assert str(problem.status) in page
        assert problems.document(problem, "http://a/")["type"] == f"http://a/problems/{problem.slug}"
    assert len(problems.BY_SLUG) == len(problems.TABLE)


def test_a_bug_tells_nobody_the_payload() -> None:
    """F5: the text of an exception that is not ours may quote what it choked on, so it stays inside."""
    problem = problems.of_error(KeyError("secret@example.org"))
    assert problem.status == 500
    assert "secret" not in json.dumps(problems.document(problem, "http://a", KeyError("secret@example.org")))
