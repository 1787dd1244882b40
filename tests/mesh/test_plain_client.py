"""Clients that know nothing of us read our topics and publish facts: Kafka's own tools, plain Avro, plain producers."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2
from confluent_kafka import Producer
from tests.support.order_mesh import CARRIER, DONE_S_MAX, WAREHOUSE, OrderMesh, noticed_at, warehouse_data
from tests.support.plain import kafka_tool, plain_decode, plain_encode, read_all
from tests.support.waiting import until

from factmesh.kafka import Publisher, TopicSpec, ensure_topics
from factmesh.message import Emission

pytestmark = pytest.mark.stack

#: Every topic of ours that this process uses, and the records that a reader finds there.
RECORDS: Mapping[str, str] = {
    "factmesh.fact.v1": "factmesh.fact/v1",
    "factmesh.command.orders.v1": "factmesh.command/v1",
    "factmesh.command.billing.v1": "factmesh.command/v1",
    "factmesh.command.notifier.v1": "factmesh.command/v1",
    "factmesh.result.v1": "factmesh.result/v1",
    "factmesh.signal.v1": "factmesh.signal/v1",
    "factmesh.status.v1": "factmesh.status/v1",
}
IN_OUR_ENVELOPE = {"ce_id", "ce_source", "ce_type", "ce_time", "correlation_id", "business_object_id"}


@pytest.fixture(scope="module")
async def finished(order_mesh: OrderMesh) -> OrderMesh:
    """One order through every step, and one whose credit note is refused: its instance is parked, by a signal."""
    await order_mesh.place("O-READ", tier="G", email="o-read@buyer.example")
    await order_mesh.place("O-REFUSED-1", tier="G", email="o-refused-1@buyer.example")
    for number in ("O-READ", "O-REFUSED-1"):
        assert (await order_mesh.post(f"fact-{number}", warehouse_data(number, 7))).status_code == 202
    await order_mesh.until_status("fact-O-READ", "completed")
    await order_mesh.until_status("fact-O-REFUSED-1", "parked")
    await order_mesh.until_mailed("o-read@buyer.example")
    return order_mesh


async def test_the_stock_console_consumer_reads_the_status_topic(finished: OrderMesh) -> None:
    """A1, F2: Kafka's own console consumer, which knows nothing of us, sees CloudEvents headers and the trace."""
    printed = await asyncio.to_thread(
        kafka_tool,
        "org.apache.kafka.tools.consumer.ConsoleConsumer",
        [
            *("--bootstrap-server", finished.stack.bootstrap),
            *("--topic", finished.topic("factmesh.status.v1")),
            *("--from-beginning", "--timeout-ms", "8000"),
            *("--formatter-property", "print.headers=true"),
            *("--formatter-property", "print.key=true"),
            *("--formatter-property", "print.value=false"),
        ],
    )
    done = await finished.progress("fact-O-READ")
    [instance] = [i["instance_id"] for i in done["instances"]]
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    ours = [dict(h.partition(":")[::2] for h in head.split(",")) for head, key in lines if key == instance]
    assert [h.get("ce_type") for h in ours][-1:] == ["workflow.completed"], printed[-2000:]
    assert len(ours) >= 2
    for headers in ours:
        assert headers["ce_specversion"] == "1.0"
        assert headers["ce_source"] == "/factmesh/orchestrator"
        assert headers["ce_type"].startswith("workflow.")
        assert headers["ce_dataschema"] == "urn:factmesh:schema:factmesh.status/v1"
        assert headers["ce_subject"] == "O-READ"
        assert headers["content-type"] == "application/avro"
        assert headers["ce_time"].endswith("Z")
        assert uuid.UUID(headers["ce_id"]).version == 8
        assert headers["traceparent"].startswith("00-")
    assert len({h["ce_id"] for h in ours}) == len(ours)


async def test_a_plain_avro_decoder_reads_every_topic(finished: OrderMesh) -> None:
    """DESIGN 7: the Apache `avro` package, with nothing but the schema files and their lock, reads what we write."""
    records = await read_all(finished.stack.bootstrap, [finished.topic(t) for t in RECORDS])
    seen: dict[str, int] = {}
    for record in records:
        name, body = plain_decode(record.value)
        short = record.topic.removeprefix(finished.mesh.prefix)
        assert name == RECORDS[short], f"{record.topic} carries {name}"
        assert body.keys() >= IN_OUR_ENVELOPE
        assert [h for h, _ in record.headers if h.startswith("ce_")] == [] or short == "factmesh.status.v1"
        key = body["business_object_id"] if short == "factmesh.fact.v1" else body["instance_id"]
        assert record.key == key.encode()
        seen[short] = seen.get(short, 0) + 1
    assert seen.keys() == RECORDS.keys()
    done = await finished.progress("fact-O-READ")
    [instance] = [i["instance_id"] for i in done["instances"]]
    bodies = [b for _, b in map(plain_decode, (r.value for r in records)) if b.get("instance_id") == instance]
    sequence = sorted(b["instance_seq"] for b in bodies if b["ce_type"].startswith("workflow."))
    assert len(set(sequence)) == len(sequence) >= 2
    assert {b["correlation_id"] for b in bodies} == {done["correlation_id"]}


async def test_a_dead_letter_holds_the_original_for_anybody(finished: OrderMesh) -> None:
    """E1: key, value and headers of a dead command are byte for byte those of its origin, and a plain decoder reads
    them; so are those of bytes that nobody can read.
    """
    junk = b"\x00\xff\xff\xff\xffnot avro"
    event_id = f"junk-{uuid.uuid4().hex[:8]}"
    headers = [("ce_specversion", b"1.0"), ("ce_id", event_id.encode()), ("ce_source", WAREHOUSE.encode())]
    headers += [("ce_type", b"order.delayed"), ("content-type", b"application/avro")]
    headers += [("x-twice", b"1"), ("x-twice", b"2")]
    producer = AIOKafkaProducer(bootstrap_servers=finished.stack.bootstrap)
    await producer.start()
    try:
        await producer.send_and_wait(finished.topic("facts.raw"), junk, b"any key", headers=headers)
    finally:
        await producer.stop()
    await until("the junk is quarantined", lambda: _stage(finished, event_id, "quarantined"), timeout_s=DONE_S_MAX)

    for topic, is_it in (
        ("factmesh.command.billing.v1", lambda r: b"O-REFUSED-1" in r.value),
        ("facts.raw", lambda r: r.value == junk),
    ):
        dead = [r for r in await read_all(finished.stack.bootstrap, [finished.mesh.dlq_name(topic)]) if is_it(r)]
        origins = await read_all(finished.stack.bootstrap, [finished.topic(topic)])
        [record] = dead
        at = (int(record.header("__dlq.errors.partition")), int(record.header("__dlq.errors.offset")))
        assert record.header("__dlq.errors.topic") == finished.topic(topic)
        [origin] = [o for o in origins if (o.partition, o.offset) == at]
        added = ("__dlq.errors.", "factmesh-dlq-", "kafka_dlt-original-topic")
        kept = tuple(h for h in record.headers if not h[0].startswith(added))
        assert (record.key, record.value, kept) == (origin.key, origin.value, origin.headers)
        if topic != "facts.raw":
            name, body = plain_decode(record.value)
            assert name == "factmesh.command/v1"
            assert body["operation"] == "issue_credit_note"
            assert record.header("factmesh-dlq-instance-id") == body["instance_id"]


async def _stage(mesh: OrderMesh, event_id: str, stage: str) -> bool:
    return (await mesh.progress(event_id)).get("stage") == stage


def _binary(event_id: str, source: str, kind: str) -> list[tuple[str, bytes]]:
    attributes = {"specversion": "1.0", "id": event_id, "source": source, "type": "order.delayed"}
    return [*((f"ce_{k}", v.encode()) for k, v in attributes.items()), ("content-type", kind.encode())]


def _publications(order: str) -> dict[str, tuple[str, list[tuple[str, bytes]], bytes]]:
    """The ways to say one fact by the CloudEvents Kafka binding: source, headers, value."""
    tag = uuid.uuid4().hex[:8]
    data = warehouse_data(order, 2)
    dataschema = ("ce_dataschema", b"order.delayed/v1")
    carried = {
        "hub": "VIE",
        "scannedAt": noticed_at().strftime("%d.%m.%Y %H:%M:%S"),
        "shipment": {"reference": order, "slip": {"days": 2, "code": "WX"}},
    }
    structured = {
        "specversion": "1.0",
        "id": f"{tag}-structured",
        "source": WAREHOUSE,
        "type": "order.delayed",
        "datacontenttype": "application/json",
        "dataschema": "order.delayed/v1",
        "data": data,
    }
    avro = plain_encode("order.delayed", {**data, "noticed_at": noticed_at()})
    return {
        f"{tag}-avro": (WAREHOUSE, _binary(f"{tag}-avro", WAREHOUSE, "application/avro"), avro),
        f"{tag}-json": (
            WAREHOUSE,
            [*_binary(f"{tag}-json", WAREHOUSE, "application/json; charset=utf-8"), dataschema],
            json.dumps(data).encode(),
        ),
        f"{tag}-own": (CARRIER, _binary(f"{tag}-own", CARRIER, "application/json"), json.dumps(carried).encode()),
        f"{tag}-structured": (
            WAREHOUSE,
            [("content-type", b"application/cloudevents+json; charset=UTF-8")],
            json.dumps(structured).encode(),
        ),
    }


@pytest.mark.parametrize("client", ["confluent-kafka", "aiokafka"])
async def test_facts_of_plain_clients_are_accepted(order_mesh: OrderMesh, client: str) -> None:
    """A1: the CloudEvents Kafka binding, binary with Avro, with JSON, with a vendor's own shape, and structured, from
    producers as they come out of the box: whatever their keys and partitioners.
    """
    order = f"O-{client.upper()}"
    await order_mesh.place(order, tier="S", email=f"{order.lower()}@buyer.example")
    facts = _publications(order)
    topic = order_mesh.topic("facts.raw")
    if client == "aiokafka":
        producer = AIOKafkaProducer(bootstrap_servers=order_mesh.stack.bootstrap)
        await producer.start()
        for event_id, (_, headers, value) in facts.items():
            await producer.send_and_wait(topic, value, event_id.encode(), headers=headers)
        await producer.stop()
    else:
        await asyncio.to_thread(_with_librdkafka, order_mesh.stack.bootstrap, topic, facts)
    for event_id, (source, _, _) in facts.items():
        # `onRepeat: ignore`: facts of an order whose instance is under way are accepted and start nothing.
        check = partial(_accepted, order_mesh, event_id, source)
        await until(f"{event_id} is accepted", check, timeout_s=DONE_S_MAX)
    await order_mesh.until_mailed(f"{order.lower()}@buyer.example")
    raw = {r.key: r for r in await read_all(order_mesh.stack.bootstrap, [topic])}
    assert {e.encode() for e in facts} <= raw.keys()


def _with_librdkafka(bootstrap: str, topic: str, facts: Mapping[str, tuple[str, list[Any], bytes]]) -> None:
    """Its default partitioner is CRC32, not Kafka's murmur2."""
    producer = Producer({"bootstrap.servers": bootstrap})
    failures: list[Any] = []
    for event_id, (_, headers, value) in facts.items():
        producer.produce(topic, value, event_id.encode(), headers=headers, on_delivery=lambda e, _m: failures.append(e))
    assert producer.flush(30) == 0
    assert failures == [None] * len(facts)


async def _accepted(mesh: OrderMesh, event_id: str, source: str) -> dict[str, Any] | None:
    found = await mesh.progress(event_id, source)
    assert found.get("stage") != "quarantined", found
    return found if found.get("business_object_id") else None


def _partition_of(key: bytes, count: int) -> int:
    """Kafka's own rule (org.apache.kafka.common.utils.Utils), as aiokafka ports it."""
    return int((murmur2(key) & 0x7FFFFFFF) % count)


async def test_our_producers_partition_as_kafkas_own_do(finished: OrderMesh) -> None:
    """DESIGN 2: one key lies on one partition whoever wrote it: ours, Java's, aiokafka's; all services' producers."""
    bootstrap = finished.stack.bootstrap
    topic, count = finished.topic("plain.v1"), 7
    await ensure_topics(bootstrap, [TopicSpec(topic, count, 1)])
    keys = [f"{i}-{uuid.uuid4()}-ä" for i in range(60)]
    await asyncio.to_thread(
        kafka_tool,
        "org.apache.kafka.tools.ConsoleProducer",
        [
            *("--bootstrap-server", bootstrap, "--topic", topic),
            *("--reader-property", "parse.key=true", "--reader-property", "key.separator=|"),
        ],
        "".join(f"{key}|of java\n" for key in keys),
    )
    publisher = Publisher(bootstrap, client_id="plain")
    try:
        await publisher.publish([Emission(topic, key.encode(), b"ours") for key in keys])
    finally:
        await publisher.close()
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await producer.start()
    for key in keys:
        await producer.send_and_wait(topic, b"of aiokafka", key.encode())
    await producer.stop()

    where: dict[bytes, dict[bytes, int]] = {}
    for record in await read_all(bootstrap, [topic]):
        assert record.key is not None
        where.setdefault(record.value, {})[record.key] = record.partition
    assert len(where[b"ours"]) == len(keys)
    assert where[b"ours"] == where[b"of java"] == where[b"of aiokafka"]
    assert len(set(where[b"ours"].values())) == count

    # What the services wrote while the instances ran: every keyed record lies where Java would have put it.
    written = await read_all(bootstrap, [finished.topic(t) for t in RECORDS])
    written += await read_all(bootstrap, [finished.mesh.dlq_name("factmesh.command.billing.v1")])
    assert len(written) > 20
    astray = [r for r in written if r.key is None or r.partition != _partition_of(r.key, 4)]
    assert astray == []
