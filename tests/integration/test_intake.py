"""Intake on a real broker and a real database: both entrances, the gate, quarantine and what is said of a fact.
The service runs as it is deployed; facts are published by a plain client that knows nothing of Factmesh.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fastavro
import httpx2
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from pydantic import SecretStr

from factmesh import ids
from factmesh.records import Records
from factmesh.registry import open_registry
from factmesh.service import Running, open_service
from factmesh.settings import Settings
from factmesh.stack import Stack
from factmesh_intake.service import SERVICE

pytestmark = pytest.mark.stack

PROJECT = Path(__file__).parents[2] / "examples" / "customer_onboarding"
TYPE = "customer.signed_up"
SHOP = "//shop.example/web"
PARTNER = "//partner.example/crm-export"
WAIT_S = 20.0
Headers = Mapping[str, str]


@dataclass
class Mesh:
    """One running intake with clients beside it."""

    running: Running
    stack: Stack
    prefix: str
    http: httpx2.AsyncClient
    producer: AIOKafkaProducer

    async def send(self, headers: Headers, value: bytes) -> None:
        pairs = [(k, v.encode()) for k, v in headers.items()]
        await self.producer.send_and_wait(f"{self.prefix}facts.raw", value=value, key=b"k", headers=pairs)

    async def read(self, topic: str, count: int) -> list[Any]:
        """The first `count` records of a topic, by a client that knows nothing of us; and that there are no more."""
        consumer = AIOKafkaConsumer(
            f"{self.prefix}{topic}" if not topic.startswith("dlq.") else f"dlq.{self.prefix}{topic[4:]}",
            bootstrap_servers=self.stack.bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        await consumer.start()
        found: list[Any] = []
        deadline = time.monotonic() + WAIT_S
        try:
            while len(found) < count and time.monotonic() < deadline:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
            for records in (await consumer.getmany(timeout_ms=500)).values():
                found += records
        finally:
            await consumer.stop()
        assert len(found) == count, f"{topic}: {len(found)} records, {count} expected"
        return found

    async def facts(self, count: int) -> list[dict[str, Any]]:
        records = Records(self.running.context.registry, {"fact": self.running.context.records.schema("fact")})
        schema = records.schema("fact")
        out = []
        for record in await self.read("factmesh.fact.v1", count):
            body = fastavro.schemaless_reader(io.BytesIO(record.value[5:]), schema.source, None)
            out.append({**body, "data": json.loads(body["data"]), "key": record.key.decode()})
        return sorted(out, key=lambda fact: str(fact["source_id"]))

    async def progress(self, correlation_id: str, stage: str) -> dict[str, Any]:
        """What the status URL says, once it says that stage."""
        deadline = time.monotonic() + WAIT_S
        while True:
            answer = await self.http.get(f"/facts/{correlation_id}")
            if answer.status_code == 200 and answer.json()["stage"] == stage:
                return dict(answer.json())
            assert time.monotonic() < deadline, f"never {stage}: {answer.status_code} {answer.text}"
            await asyncio.sleep(0.05)


@pytest.fixture
async def mesh(stack: Stack, namespace: str) -> AsyncIterator[Mesh]:
    dsn = await stack.provide_schema(f"{namespace}_intake")
    settings = Settings(
        namespace=namespace, project=PROJECT, kafka_bootstrap=stack.bootstrap, postgres_dsn=SecretStr(dsn)
    )
    async with contextlib.AsyncExitStack() as opened:
        running = await opened.enter_async_context(open_service(SERVICE, settings))
        http = await opened.enter_async_context(
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{running.http_port}", timeout=20)
        )
        producer = AIOKafkaProducer(bootstrap_servers=stack.bootstrap, acks="all")
        await producer.start()
        opened.push_async_callback(producer.stop)
        yield Mesh(running, stack, settings.topic_prefix, http, producer)


def signed_up(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A sign-up in version 2."""
    return {
        "customer_id": f"C-{number}",
        "email": "ada@example.org",
        "country": "AT",
        "signed_up_at": datetime.now(UTC).replace(microsecond=0).isoformat(),
        "given_name": "Ada",
        "family_name": "Lovelace",
        "plan": "premium",
        **changes,
    }


def attributes(id_: str, prefix: str = "ce_", source: str = SHOP, **more: str) -> dict[str, str]:
    given = {"specversion": "1.0", "id": id_, "source": source, "type": TYPE, **more}
    return {prefix + name: value for name, value in given.items()}


def json_kafka(id_: str, version: int = 2) -> dict[str, str]:
    return attributes(id_, dataschema=f"https://schemas.example/{TYPE}/v{version}") | {
        "content-type": "application/json"
    }


def exported(number: int) -> dict[str, Any]:
    """A sign-up as the partner's export has it."""
    return {
        "export": {"run": "x", "agent": "a.huber"},
        "record": {
            "crmNumber": f"P-{number}",
            "signedOn": datetime.now(UTC).strftime("%d.%m.%Y %H:%M:%S"),
            "tariff": "T20",
            "clientGroup": "GEW",
            "optIn": "",
            "contact": {
                "mail": "bob@example.org",
                "name": {"first": "Bob", "last": "Huber"},
                "phones": [{"use": "mobile", "numbers": [{"e164": "+436601"}, {"e164": "+436602"}]}],
            },
            "address": {"country": "de"},
        },
    }


async def test_every_mode_and_format_ends_as_one_canonical_fact(mesh: Mesh) -> None:
    """A1, A3, A5: Kafka binary and structured, Avro and JSON, two vendors, v1 and v2: one shape comes out."""
    registry = open_registry(project=PROJECT)
    v1 = await registry.by_version(TYPE, 1)
    out = io.BytesIO()
    now_ms = int(time.time() * 1000)
    fastavro.schemaless_writer(
        out,
        fastavro.parse_schema(dict(v1.source)),
        {
            "customer_id": "C-1",
            "email": "a@example.org",
            "country": "AT",
            "signed_up_at": now_ms,
            "full_name": "Ada Lovelace",
            "marketing": None,
            "plan": "premium",
        },
    )
    framed = b"\0" + struct.pack(">I", v1.id) + out.getvalue()
    await mesh.send(attributes("e1") | {"content-type": "application/avro"}, framed)
    await mesh.send(json_kafka("e2"), json.dumps(signed_up(2)).encode())
    structured = {
        **attributes("e3", "", PARTNER),
        "datacontenttype": "application/json",
        "data": exported(3),
    }
    await mesh.send({"content-type": "application/cloudevents+json"}, json.dumps(structured).encode())
    one, two, three = await mesh.facts(3)
    assert one["data"]["given_name"] == "Ada Lovelace"
    assert one["data"]["segment"] == "business"
    assert round(one["occurred_at"].timestamp() * 1000) == now_ms
    assert two["data"]["given_name"] == "Ada"
    assert three["data"]["phones"] == ["+436601", "+436602"]
    assert three["data"]["country"] == "DE"
    assert three["actor"] == "partner:a.huber"
    for number, fact in enumerate((one, two, three), start=1):
        assert fact["schema_version"] == 2
        assert fact["ce_type"] == TYPE
        assert fact["business_object_type"] == "customer"
        assert fact["key"] == fact["business_object_id"]
        assert fact["correlation_id"] == str(ids.correlation_id(fact["source"], f"e{number}"))
        assert (await mesh.progress(fact["correlation_id"], "accepted"))["id"] == f"e{number}"


async def test_http_is_answered_when_the_fact_is_durable(mesh: Mesh) -> None:
    """A2: 202 with a correlation id and a status URL; the fact is on facts.raw in the Kafka binding's binary mode."""
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    headers = attributes("h1", "ce-", dataschema=f"https://schemas.example/{TYPE}/v2") | {"traceparent": trace}
    answer = await mesh.http.post("/facts", headers=headers, json=signed_up(1))
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert answer.headers["location"] == body["status_url"]
    (raw,) = await mesh.read("facts.raw", 1)
    carried = {k: v.decode() for k, v in raw.headers}
    assert carried["ce_id"] == "h1"
    assert carried["ce_source"] == SHOP
    assert carried["content-type"] == "application/json"
    assert carried["traceparent"].split("-")[1] == "a" * 32
    status = await mesh.http.get(body["status_url"])
    if status.status_code == 404:
        assert int(status.headers["retry-after"]) > 0
    seen = await mesh.progress(body["correlation_id"], "accepted")
    assert seen["business_object_id"] == "C-1"
    assert "workflow" in seen["next"]
    again = await mesh.http.post("/facts", headers=headers, json=signed_up(1))
    assert again.json()["correlation_id"] == body["correlation_id"]


async def test_a_batch_is_answered_event_by_event(mesh: Mesh) -> None:
    """A1, A2: of a batch the good are accepted and each bad one is told why; nothing is lost and nothing hidden."""
    good = {**attributes("b1", ""), "dataschema": f"x:/{TYPE}/v2", "data": signed_up(1)}
    bad = {**attributes("b2", ""), "dataschema": f"x:/{TYPE}/v2", "data": signed_up(2, plan="gold")}
    answer = await mesh.http.post(
        "/facts",
        headers={"content-type": "application/cloudevents-batch+json"},
        content=json.dumps([good, bad, 7]).encode(),
    )
    assert answer.status_code == 207, answer.text
    body = answer.json()
    assert [r["status"] for r in body["results"]] == [202, 422, 400]
    assert body["accepted"] == 1
    assert "plan" in body["results"][1]["problem"]["detail"]
    assert [f["source_id"] for f in await mesh.facts(1)] == ["b1"]


async def test_the_same_id_is_accepted_once_and_another_body_is_a_conflict(mesh: Mesh) -> None:
    """A4: repeats are dropped by (source, id), a restamped ce_time too; another body is quarantined as a conflict."""
    body = signed_up(1)
    raw = json.dumps(body).encode()
    await mesh.send(json_kafka("d1"), raw)
    await mesh.facts(1)
    await mesh.send(json_kafka("d1") | {"ce_time": "2026-01-01T00:00:00Z"}, raw)
    await mesh.send(json_kafka("d1"), json.dumps({**body, "country": "DE"}).encode())
    (dead,) = await mesh.read("dlq.facts.raw", 1)
    headers = {k: v.decode() for k, v in dead.headers}
    assert headers["factmesh-dlq-reason"] == "conflict"
    assert json.loads(dead.value)["country"] == "DE"
    await mesh.facts(1)
    correlation_id = str(ids.correlation_id(SHOP, "d1"))
    assert (await mesh.progress(correlation_id, "accepted"))["business_object_id"] == "C-1"


BAD: dict[str, tuple[Headers, bytes, str]] = {
    "not avro": (attributes("p1") | {"content-type": "application/avro"}, b"\x00\x00\x00\x27\x10garbage", "decode"),
    "no frame": (attributes("p2") | {"content-type": "application/avro"}, b"garbage", "decode"),
    "unknown schema id": (
        attributes("p3") | {"content-type": "application/avro"},
        b"\0" + struct.pack(">I", 987654) + b"x",
        "schema",
    ),
    "torn json": (json_kafka("p4"), b'{"customer_id": ', "decode"),
    "repeated key": (json_kafka("p5"), b'{"a": 1, "a": 2}', "decode"),
    "missing field": (json_kafka("p6"), b'{"customer_id": "C"}', "validation"),
    "wrong type": (json_kafka("p7"), json.dumps(signed_up(1, email=7)).encode(), "validation"),
    "unknown version": (json_kafka("p8", 9), json.dumps(signed_up(1)).encode(), "schema"),
    "naive time": (
        json_kafka("p9"),
        json.dumps(signed_up(1, signed_up_at="2026-01-01T00:00:00")).encode(),
        "validation",
    ),
    "too old": (
        json_kafka("p10"),
        json.dumps(
            signed_up(1, signed_up_at=(datetime.now(UTC) - timedelta(days=15)).isoformat(timespec="seconds"))
        ).encode(),
        "stale",
    ),
    "future": (
        json_kafka("p11"),
        json.dumps(
            signed_up(1, signed_up_at=(datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds"))
        ).encode(),
        "validation",
    ),
    "unknown type": (json_kafka("p12") | {"ce_type": "order.lost"}, b"{}", "validation"),
    "unknown source": (json_kafka("p13") | {"ce_source": "//nobody.example"}, b"{}", "validation"),
    "no headers": ({}, b"{}", "decode"),
}


async def test_bad_input_is_quarantined_byte_for_byte_and_the_partition_moves_on(mesh: Mesh) -> None:
    """E1, issue "Bad input gets a clear answer and loses nothing": each kind with its reason; a good one passes."""
    for headers, value, _ in BAD.values():
        await mesh.send(headers, value)
    await mesh.send(json_kafka("good"), json.dumps(signed_up(1)).encode())
    dead = await mesh.read("dlq.facts.raw", len(BAD))
    by_value = {(r.value, dict(r.headers).get("ce_id")): r for r in dead}
    for name, (headers, value, reason) in BAD.items():
        id_ = headers.get("ce_id")
        record = by_value[value, id_.encode() if id_ else None]
        carried = {k: v.decode() for k, v in record.headers}
        assert carried["factmesh-dlq-reason"] == reason, (name, carried["__dlq.errors.message"])
        for header, text in headers.items():
            assert carried[header] == text, name
        if id_ is not None:
            told = await mesh.progress(str(ids.correlation_id(headers["ce_source"], id_)), "quarantined")
            assert told["reason"].startswith(reason), name
    assert [f["source_id"] for f in await mesh.facts(1)] == ["good"]


async def test_an_opening_of_a_stale_fact_is_the_recorded_acceptance(mesh: Mesh) -> None:
    """DESIGN 8: a fact older than the horizon never passes by itself, and passes when an operator opens it."""
    old = (datetime.now(UTC) - timedelta(days=20)).isoformat(timespec="seconds")
    value = json.dumps(signed_up(1, signed_up_at=old)).encode()
    await mesh.send(json_kafka("s1"), value)
    (dead,) = await mesh.read("dlq.facts.raw", 1)
    correlation_id = str(ids.correlation_id(SHOP, "s1"))
    await mesh.progress(correlation_id, "quarantined")
    root = ids.Root.stranger(SHOP, "s1").text
    group = dict(dead.headers)["__dlq.errors.group"].decode()
    opening = {"factmesh-root-id": root, "factmesh-opening": "1", "factmesh-group": group}
    await mesh.send(json_kafka("s1") | opening, value)
    (fact,) = await mesh.facts(1)
    assert fact["source_id"] == "s1"
    await mesh.progress(correlation_id, "accepted")


async def test_what_the_status_topic_says_is_what_the_sender_is_told(mesh: Mesh) -> None:
    """A2: stage, next step and due time follow the instance; a message with a lower sequence number changes nothing."""
    await mesh.send(json_kafka("w1"), json.dumps(signed_up(1)).encode())
    correlation_id = str(ids.correlation_id(SHOP, "w1"))
    await mesh.progress(correlation_id, "accepted")
    context = mesh.running.context
    instance = ids.entrance_id("test", "instance", int(time.time() * 1000))

    async def say(seq: int, **fields: Any) -> None:
        now_ms = int(time.time() * 1000)
        body = {
            "ce_id": str(ids.entrance_id("test", f"status {seq}", now_ms)),
            "ce_source": "/factmesh/orchestrator",
            "ce_type": "factmesh.status",
            "ce_time": now_ms,
            "cause_id": "test",
            "correlation_id": correlation_id,
            "actor": "a",
            "business_object_type": "customer",
            "business_object_id": "C-1",
            "instance_id": str(instance),
            "instance_seq": seq,
            "workflow": "w",
            "workflow_version": "1.0.0",
            "occurred_at": now_ms,
            **fields,
        }
        value = context.records.encode("status", body)
        await mesh.producer.send_and_wait(context.topic("status"), value=value, key=str(instance).encode())

    due_ms = int(datetime(2027, 1, 1, tzinfo=UTC).timestamp() * 1000)
    await say(2, status="running", step="b", next_step="c", due_by=due_ms)
    seen = await mesh.progress(correlation_id, "workflow")
    assert (seen["step"], seen["next_step"], seen["due_by"]) == ("b", "c", "2027-01-01T00:00:00.000Z")
    await say(1, status="running", step="a", next_step="b")
    await say(3, status="completed", outcome="done")
    seen = await mesh.progress(correlation_id, "ended")
    assert (seen["status"], seen["outcome"]) == ("completed", "done")


HTTP_JSON = {"content-type": "application/json"}
V2 = f"https://schemas.example/{TYPE}/v2"


def _http(id_: str = "x", **more: str) -> dict[str, str]:
    return attributes(id_, "ce-", **{"dataschema": V2, **more}) | HTTP_JSON


REFUSED: dict[str, tuple[Headers, bytes, int, str, str]] = {
    "torn json": (_http(), b'{"a": ', 400, "unreadable", "not JSON"),
    "repeated key": (_http(), b'{"a": 1, "a": 2}', 400, "unreadable", "'a' is there twice"),
    "nan": (_http(), b'{"a": NaN}', 400, "unreadable", "NaN"),
    "deep": (_http(), b"[" * 40 + b"]" * 40, 400, "unreadable", "nested deeper"),
    "no body": (_http(), b"", 422, "invalid", "data"),
    "no id": ({k: v for k, v in _http().items() if k != "ce-id"}, b"{}", 422, "invalid", "id: required"),
    "no attributes": (HTTP_JSON, b"{}", 422, "invalid", "specversion: required"),
    "other version of the specification": (_http(specversion="0.3"), b"{}", 422, "invalid", "specversion"),
    "naive ce-time": (_http(time="2026-01-01T00:00:00"), b"{}", 422, "naive-timestamp", "time: "),
    "missing field": (_http(), b'{"customer_id": "C"}', 422, "invalid", "field email: missing"),
    "unknown field": (_http(), json.dumps(signed_up(1, shoe=1)).encode(), 422, "invalid", "shoe"),
    "wrong type": (_http(), json.dumps(signed_up(1, email=1)).encode(), 422, "invalid", "field email"),
    "unknown symbol": (_http(), json.dumps(signed_up(1, plan="gold")).encode(), 422, "invalid", "field plan"),
    "naive timestamp": (
        _http(),
        json.dumps(signed_up(1, signed_up_at="2026-01-01T00:00:00")).encode(),
        422,
        "naive-timestamp",
        "signed_up_at",
    ),
    "too old": (
        _http(),
        json.dumps(signed_up(1, signed_up_at="2020-01-01T00:00:00Z")).encode(),
        422,
        "stale",
        "dedup horizon of 14 days",
    ),
    "future": (
        _http(),
        json.dumps(signed_up(1, signed_up_at="2199-01-01T00:00:00Z")).encode(),
        422,
        "future",
        "minutes",
    ),
    "unknown version": (_http(dataschema="x:/v7"), json.dumps(signed_up(1)).encode(), 422, "unknown-schema", "1, 2"),
    "unnamed version": (
        {k: v for k, v in _http().items() if k != "ce-dataschema"},
        json.dumps(signed_up(1)).encode(),
        422,
        "unknown-schema",
        f"{TYPE}/v2",
    ),
    "unknown schema id": (
        attributes("x", "ce-") | {"content-type": "application/avro"},
        b"\0\0\x0f\xff\xff1",
        422,
        "unknown-schema",
        "not registered",
    ),
    "not avro": (
        attributes("x", "ce-") | {"content-type": "application/avro"},
        b"garbage",
        400,
        "unreadable",
        "Confluent wire format",
    ),
    "unknown type": (_http(type="order.lost"), b"{}", 422, "unknown-type", "type: no adapter"),
    "unknown source": (_http(source="//nobody.example"), b"{}", 403, "source-not-allowed", "source: no adapter"),
    "unmapped code": (
        attributes("x", "ce-", PARTNER) | HTTP_JSON,
        json.dumps({**exported(1), "record": {**exported(1)["record"], "tariff": "T99"}}).encode(),
        422,
        "unmapped-value",
        "plan: a value (text of 3 characters)",
    ),
    "oversize data": (_http(), json.dumps(signed_up(1, full_name="x" * 300_000)).encode(), 413, "too-large", "262144"),
    "oversize body": (_http(), b"x" * 1_100_000, 413, "too-large", "1000000"),
    "media type": (
        attributes("x", "ce-") | {"content-type": "text/xml"},
        b"<a/>",
        415,
        "unsupported-media-type",
        "xml",
    ),
    "event format": (
        {"content-type": "application/cloudevents+avro"},
        b"x",
        415,
        "unsupported-media-type",
        "cloudevents",
    ),
}


async def test_what_is_refused_over_http_says_why_and_never_reaches_the_topic(mesh: Mesh) -> None:
    """A2, issue "Bad input gets a clear answer": each with its RFC 9457 document, whose type is a page that helps."""
    for name, (headers, body, status, slug, text) in REFUSED.items():
        answer = await mesh.http.post("/facts", headers=headers, content=body)
        assert answer.status_code == status, (name, answer.text)
        assert answer.headers["content-type"] == "application/problem+json", name
        problem = answer.json()
        assert problem["type"].endswith(f"/problems/{slug}"), (name, problem)
        assert problem["status"] == status
        assert problem["title"]
        if name not in {"media type", "event format"}:
            assert text in problem["detail"], (name, problem)
        assert "ada@example.org" not in answer.text, f"{name}: the answer repeats personal data"
        assert (await mesh.http.get(problem["type"])).status_code == 200
    await mesh.read("facts.raw", 0)


async def test_addresses_that_are_not_there_are_problems_too(mesh: Mesh) -> None:
    """A2: an unknown correlation id says when to ask again; other addresses and methods answer in the same form."""
    unknown = await mesh.http.get(f"/facts/{ids.correlation_id('//a', 'b')}")
    assert unknown.status_code == 404
    assert unknown.headers["retry-after"] == "2"
    assert unknown.json()["type"].endswith("not-seen")
    for answer in (await mesh.http.get("/facts/7"), await mesh.http.get("/nothing"), await mesh.http.put("/facts")):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.status_code in {404, 405}
