"""One trace a workflow over every process, and what logs, metrics and probes say, and must never say."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from opentelemetry.semconv._incubating.attributes import messaging_attributes as names
from prometheus_client.parser import text_string_to_metric_families
from tests.support.order_mesh import CARRIER, DONE_S_MAX, WAREHOUSE, OrderMesh, noticed_at, traceparent, warehouse_data
from tests.support.plain import read_all
from tests.support.waiting import until

from factmesh_cli.mesh import SERVICES
from factmesh_sandbox.log import Call

pytestmark = pytest.mark.stack

Span = dict[str, Any]
#: Who opens the systems outside; what no line, span, figure or header may hold.
TOKENS = ("sandbox-orders-token", "sandbox-billing-token")
PRIVATE = ("ms.secret@buyer.example", "nobody@buyer.example", "later@buyer.example", "Frau Geheim", "PRIVATE-77")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


async def traced(mesh: OrderMesh, caller: str, complete: Callable[[list[Span]], bool]) -> list[Span]:
    """The spans of one trace, as soon as `complete` says that all are exported, and nobody's parent is under way."""
    _, trace_id, caller_span, _ = caller.split("-")
    spans: list[Span] = []

    async def look() -> bool:
        nonlocal spans
        spans = [s for s in mesh.spans() if s["trace_id"] == trace_id]
        known = {s["span_id"] for s in spans} | {caller_span}
        return complete(spans) and all(s["parent_id"] in known for s in spans)

    try:
        await until("the whole trace", look, timeout_s=DONE_S_MAX)
    except AssertionError:
        told = "\n".join(sorted(f"{s['parent_id']} <- {s['span_id']} {s['service']}: {s['name']}" for s in spans))
        raise AssertionError(f"the trace of {caller} is not one whole tree:\n{told}") from None
    return spans


def hops(mesh: OrderMesh, spans: Sequence[Span]) -> Counter[str]:
    return Counter(f"{s['service']}: {s['name'].replace(mesh.mesh.prefix, '')}" for s in spans)


def assert_one_tree(spans: Sequence[Span], caller: str) -> Span:
    """Exactly one span hangs on the caller's, every other on one of the trace. Returns that one."""
    _, trace_id, caller_span, _ = caller.split("-")
    assert {s["trace_id"] for s in spans} == {trace_id}
    known = {s["span_id"] for s in spans}
    assert len(known) == len(spans), "a span id is there twice"
    orphans = [s["name"] for s in spans if s["parent_id"] not in known | {caller_span}]
    assert orphans == []
    [root] = [s for s in spans if s["parent_id"] == caller_span]
    return root


def ancestors(spans: Sequence[Span], span: Span) -> list[Span]:
    """From a span up to the root."""
    by_id = {s["span_id"]: s for s in spans}
    line = [span]
    while line[-1]["parent_id"] in by_id:
        line.append(by_id[line[-1]["parent_id"]])
    return line


async def calls_of(mesh: OrderMesh, correlation_id: str) -> list[Call]:
    with mesh.log() as log:
        return [c for c in log.calls() if c.correlation_id == correlation_id]


async def test_one_instance_is_one_tree_over_every_process(order_mesh: OrderMesh) -> None:
    """F2, C7: from the caller's request to the mail every hop hangs in one tree, and the systems outside see the very
    span that called them.
    """
    caller, event_id = traceparent(), "fact-O-TRACE"
    await order_mesh.place("O-TRACE", tier="G", email="o-trace@buyer.example")
    answer = await order_mesh.post(event_id, warehouse_data("O-TRACE", 4), traceparent=caller)
    assert answer.status_code == 202, answer.text
    done = await order_mesh.until_status(event_id, "completed")
    expected = {
        "intake: POST /facts": 1,
        "intake: send facts.raw": 1,
        "intake: process facts.raw": 1,
        "orchestrator: process factmesh.fact.v1": 1,
        "connector: process factmesh.command.orders.v1": 1,
        "connector: orders.find": 1,
        "orchestrator: process factmesh.result.v1": 2,
        "connector: process factmesh.command.billing.v1": 1,
        "connector: billing.issue_credit_note": 1,
        "notifier: process factmesh.command.notifier.v1": 1,
        "notifier: notify email": 1,
    }

    def complete(spans: list[Span]) -> bool:
        found = hops(order_mesh, spans)
        return all(found[hop] >= n for hop, n in expected.items()) and _statuses(found) >= 2

    spans = await traced(order_mesh, caller, complete)
    found = hops(order_mesh, spans)
    assert {hop: n for hop, n in found.items() if "status" not in hop} == expected
    root = assert_one_tree(spans, caller)
    assert (root["service"], root["name"], root["kind"]) == ("intake", "POST /facts", "server")
    assert root["attributes"]["http.response.status_code"] == 202

    [mailed] = [s for s in spans if s["name"] == "notify email"]
    line = [f"{s['service']}: {s['name'].replace(order_mesh.mesh.prefix, '')}" for s in ancestors(spans, mailed)]
    assert line == [
        "notifier: notify email",
        "orchestrator: process factmesh.result.v1",
        "connector: billing.issue_credit_note",
        "orchestrator: process factmesh.result.v1",
        "connector: orders.find",
        "orchestrator: process factmesh.fact.v1",
        "intake: process facts.raw",
        "intake: send facts.raw",
        "intake: POST /facts",
    ]
    calls = await calls_of(order_mesh, done["correlation_id"])
    clients = {s["name"]: s for s in spans if s["kind"] == "client"}
    assert {(c.system, c.traceparent) for c in calls} == {
        ("orders", _of_span(clients["orders.find"])),
        ("billing", _of_span(clients["billing.issue_credit_note"])),
    }
    with order_mesh.log() as log:
        [mail] = log.mails("o-trace@buyer.example")
    assert mail.ids["x-factmesh-message-id"] == mailed["attributes"]["factmesh.command_id"]
    assert mail.ids["x-factmesh-correlation-id"] == done["correlation_id"]
    instance = done["instances"][0]["instance_id"]
    about = [s["attributes"].get("factmesh.instance_id") for s in spans if s["service"] in ("connector", "notifier")]
    assert set(about) == {instance}


def _statuses(found: Counter[str]) -> int:
    return sum(n for hop, n in found.items() if hop == "intake: process factmesh.status.v1")


def _of_span(span: Span) -> str:
    return f"00-{span['trace_id']}-{span['span_id']}-01"


async def test_spans_speak_the_messaging_conventions(order_mesh: OrderMesh) -> None:
    """F2: names and kinds of spans around Kafka are OpenTelemetry's own, so that any tracing tool understands them."""
    caller = traceparent()
    await order_mesh.place("O-NAMES", tier="S", email="o-names@buyer.example")
    assert (await order_mesh.post("fact-O-NAMES", warehouse_data("O-NAMES", 4), traceparent=caller)).status_code == 202
    spans = await traced(order_mesh, caller, lambda s: any(x["name"] == "notify email" for x in s))
    around_kafka = [s for s in spans if names.MESSAGING_SYSTEM in s["attributes"]]
    assert {s["kind"] for s in around_kafka} == {"producer", "consumer"}
    for span in around_kafka:
        said = span["attributes"]
        assert said[names.MESSAGING_SYSTEM] == "kafka"
        assert said[names.MESSAGING_OPERATION_TYPE] == ("send" if span["kind"] == "producer" else "process")
        assert said[names.MESSAGING_OPERATION_NAME] == said[names.MESSAGING_OPERATION_TYPE]
        assert span["name"] == f"{said[names.MESSAGING_OPERATION_NAME]} {said[names.MESSAGING_DESTINATION_NAME]}"
        if span["kind"] == "consumer":
            assert said[names.MESSAGING_DESTINATION_PARTITION_ID] in {"0", "1", "2", "3"}
            assert isinstance(said[names.MESSAGING_KAFKA_OFFSET], int)
            group = said[names.MESSAGING_CONSUMER_GROUP_NAME]
            assert group.startswith(f"{order_mesh.mesh.prefix}factmesh-{span['service']}")
            assert said["factmesh.disposition"] == "done"
    every = [k for s in spans for k in s["attributes"] if k.startswith("messaging.")]
    known = {v for k, v in vars(names).items() if k.startswith("MESSAGING_") and isinstance(v, str)}
    assert set(every) <= known


async def test_failures_and_retries_stay_in_the_tree(order_mesh: OrderMesh) -> None:
    """F2, H1: the quarantined command, the park of its instance, the operator's replay and a second attempt hang in
    the caller's tree too.
    """
    caller = traceparent()
    await order_mesh.place("O-REFUSED-2", tier="G", email="ms.secret@buyer.example")
    event_id = f"fact-{uuid.uuid4().hex[:8]}"
    answer = await order_mesh.post(event_id, warehouse_data("O-REFUSED-2", 5), traceparent=caller)
    assert answer.status_code == 202, answer.text
    await order_mesh.until_status(event_id, "parked")
    wanted = {
        "connector: billing.issue_credit_note",
        "orchestrator: process factmesh.signal.v1",
        "quarantine: process dlq.factmesh.command.billing.v1".replace("dlq.", f"dlq.{order_mesh.mesh.prefix}"),
    }
    wanted = {w.replace(order_mesh.mesh.prefix, "") for w in wanted}
    spans = await traced(order_mesh, caller, lambda s: wanted <= hops(order_mesh, s).keys())
    assert_one_tree(spans, caller)
    [refused] = [s for s in spans if s["name"] == "billing.issue_credit_note"]
    [park] = [s for s in spans if s["name"].endswith("factmesh.signal.v1")]
    assert refused in ancestors(spans, park)

    # An operator's act goes on in the same tree: a new run of the step, which is refused again.
    parked = await order_mesh.until_status(event_id, "parked")
    instance = parked["instances"][0]["instance_id"]
    replayed = await order_mesh.factmesh("dlq", "replay", "--instance", instance, "--yes")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    spans = await traced(
        order_mesh, caller, lambda s: hops(order_mesh, s)["connector: billing.issue_credit_note"] >= 2
    )
    assert_one_tree(spans, caller)
    again = [s for s in spans if s["name"] == "billing.issue_credit_note"]
    assert len({s["attributes"]["factmesh.command_id"] for s in again}) == 2

    later = traceparent()
    await order_mesh.place("O-THROTTLED-2", tier="S", email="later@buyer.example")
    answer = await order_mesh.post("fact-O-LATER", warehouse_data("O-THROTTLED-2", 2), traceparent=later)
    assert answer.status_code == 202, answer.text
    spans = await traced(
        order_mesh, later, lambda s: hops(order_mesh, s)["notifier: notify email"] >= 2
    )
    assert_one_tree(spans, later)
    tries = [s for s in spans if s["name"] == "notify email"]
    assert [t["attributes"]["factmesh.move"] for t in sorted(tries, key=lambda t: t["start_ns"])] == ["wait", "done"]


async def test_a_caller_that_does_not_sample_is_obeyed(order_mesh: OrderMesh) -> None:
    """F2: no span is recorded for a trace that its caller does not sample, and its context still goes on outside."""
    caller = traceparent()[:-2] + "00"
    await order_mesh.place("O-UNSAMPLED", tier="S", email="o-unsampled@buyer.example")
    answer = await order_mesh.post("fact-O-UNSAMPLED", warehouse_data("O-UNSAMPLED", 2), traceparent=caller)
    assert answer.status_code == 202
    done = await order_mesh.until_status("fact-O-UNSAMPLED", "completed")
    await order_mesh.until_mailed("o-unsampled@buyer.example")
    calls = await calls_of(order_mesh, done["correlation_id"])
    assert [c.traceparent for c in calls] == [caller]
    await asyncio.sleep(1.5)  # longer than spans wait for their export
    assert [s["name"] for s in order_mesh.spans() if s["trace_id"] == caller.split("-")[1]] == []


@pytest.fixture(scope="module")
async def bad_day(order_mesh: OrderMesh) -> OrderMesh:
    """Every kind of failure that might quote what it should not: at intake, in a system, on the way to a person."""
    await order_mesh.place("O-REFUSED-3", tier="G", email="ms.secret@buyer.example")
    await order_mesh.place("O-DOWN", tier="G", email="ms.secret@buyer.example")
    await order_mesh.place("O-NOBODY", tier="S", email="nobody@buyer.example")
    await order_mesh.place("O-LATER", tier="S", email="later@buyer.example")
    tag = uuid.uuid4().hex[:8]
    started = {number: f"{tag}-{number}" for number in ("O-REFUSED-3", "O-DOWN", "O-NOBODY", "O-LATER")}
    for number, event_id in started.items():
        assert (await order_mesh.post(event_id, warehouse_data(number, 6))).status_code == 202

    for data in (
        {**warehouse_data("O-1", 1), "reason": "PRIVATE-77"},
        {**warehouse_data("O-1", 1), "days_late": "ms.secret@buyer.example"},
        {"order_id": "Frau Geheim"},
    ):
        refused = await order_mesh.post(f"{tag}-refused", data)
        assert refused.status_code == 422, refused.text
        assert not [p for p in PRIVATE if p in refused.text], refused.text
    conflict = await order_mesh.post(started["O-NOBODY"], {**warehouse_data("Frau Geheim", 6)})
    assert conflict.status_code == 202

    carried = {"hub": "Frau Geheim", "scannedAt": "yesterday, ms.secret@buyer.example", "shipment": {}}
    of_carrier = {
        **carried,
        "scannedAt": noticed_at().strftime("%d.%m.%Y %H:%M:%S"),
        "shipment": {"reference": "O-1", "slip": {"days": 1, "code": "PRIVATE-77"}},
    }
    producer = AIOKafkaProducer(bootstrap_servers=order_mesh.stack.bootstrap)
    await producer.start()
    poison = {
        f"{tag}-carrier-1": (CARRIER, json.dumps(carried).encode()),
        f"{tag}-carrier-2": (CARRIER, json.dumps(of_carrier).encode()),
        f"{tag}-torn": (WAREHOUSE, b'{"order_id": "ms.secret@buyer.example", '),
        f"{tag}-avro": (WAREHOUSE, b"\x00\x00\x00\x27\x10Frau Geheim"),
    }
    for event_id, (source, value) in poison.items():
        attributes = {"specversion": "1.0", "id": event_id, "source": source, "type": "order.delayed"}
        headers = [(f"ce_{k}", v.encode()) for k, v in attributes.items()]
        await producer.send_and_wait(order_mesh.topic("facts.raw"), value, b"Frau Geheim", headers=headers)
    await producer.stop()

    for event_id, (source, _) in poison.items():
        check = partial(_quarantined, order_mesh, event_id, source)
        await until(f"{event_id} is quarantined", check, timeout_s=DONE_S_MAX)
    await order_mesh.until_status(started["O-REFUSED-3"], "parked")
    await order_mesh.until_status(started["O-DOWN"], "parked")
    # Nobody waits for a mail: its instance has ended, and the mail that cannot go out lies in its DLQ.
    await order_mesh.until_status(started["O-NOBODY"], "completed")
    await until("the refused mail is given up", partial(_given_up, order_mesh), timeout_s=DONE_S_MAX)
    await order_mesh.until_mailed("later@buyer.example")
    return order_mesh


async def _given_up(mesh: OrderMesh) -> bool:
    text = (await mesh.client.get(mesh.mesh.url("notifier") + "/metrics")).text
    return 'factmesh_settled_total{kind="send.email",state="failed"}' in text


async def _quarantined(mesh: OrderMesh, event_id: str, source: str) -> bool:
    return (await mesh.progress(event_id, source)).get("stage") == "quarantined"


async def test_logs_are_json_with_ids_and_hold_nothing_private(bad_day: OrderMesh) -> None:
    """F2, F5: every line of every service is one JSON object of that service; what tells of a message names its
    correlation, instance and message; no token, address or piece of a payload stands anywhere.
    """
    events: Counter[str] = Counter()
    for service in SERVICES:
        text = bad_day.mesh.members[service].log.read_text(encoding="utf-8")
        assert text
        leaked = [p for p in (*TOKENS, *PRIVATE) if p in text]
        assert leaked == [], f"{service}: {leaked}"
        for line in text.splitlines():
            entry = json.loads(line)
            assert entry.keys() >= {"event", "level", "timestamp", "service"}, line
            assert entry["service"] == service, line
            events[f"{service} {entry['event']}"] += 1
            if entry["event"] in ("connector.call", "notifier.attempt"):
                ids = [entry["correlation_id"], entry["instance_id"], entry["message_id"]]
                assert all(uuid.UUID(i) for i in ids), line
            if entry["event"] == "message.dead":
                assert {"correlation_id", "instance_id", "message_id", "reason", "where"} <= entry.keys(), line
    assert events["connector connector.call"] >= 8
    assert events["notifier notifier.attempt"] >= 3
    assert events["intake message.dead"] >= 4


async def test_spans_figures_and_diagnosis_hold_nothing_private(bad_day: OrderMesh) -> None:
    """F5: neither do spans, metrics, nor the texts that the quarantine shows of what died."""
    await asyncio.sleep(1.5)  # longer than spans wait for their export
    for service in SERVICES:
        text = bad_day.mesh.spans_file(service).read_text(encoding="utf-8")
        text += (await bad_day.client.get(bad_day.mesh.url(service) + "/metrics")).text
        leaked = [p for p in (*TOKENS, *PRIVATE) if p in text]
        assert leaked == [], f"{service}: {leaked}"
    listed = await bad_day.factmesh("dlq", "list")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("facts.raw") >= 4
    leaked = [p for p in (*TOKENS, *PRIVATE) if p in listed.stdout]
    assert leaked == [], listed.stdout
    dead = ("facts.raw", "factmesh.command.orders.v1", "factmesh.command.billing.v1", "factmesh.command.notifier.v1")
    for topic in dead:
        records = await read_all(bad_day.stack.bootstrap, [bad_day.mesh.dlq_name(topic)])
        assert records, f"nothing died on {topic}: this shows nothing"
        added = [h for r in records for h in r.headers if h[0].startswith(("factmesh-", "__dlq.", "kafka_dlt"))]
        leaked = [p for p in (*TOKENS, *PRIVATE) for _, value in added if p.encode() in value]
        assert leaked == [], topic


#: What each service counts of its own work.
COUNTED: Mapping[str, tuple[str, ...]] = {
    "intake": ("factmesh_facts_total", "factmesh_http_requests_total", "factmesh_dead_total"),
    "orchestrator": ("factmesh_attention", "factmesh_published_total"),
    "connector": ("factmesh_calls_total", "factmesh_call_seconds_count", "factmesh_settled_total"),
    "notifier": ("factmesh_notifications_total", "factmesh_settled_total"),
    "quarantine": ("factmesh_quarantine_records",),
}
COUNTED_BY_ALL = (
    "factmesh_messages_total", "factmesh_batch_seconds_count", "factmesh_batch_messages_count", "factmesh_up"
)  # fmt: skip


@pytest.mark.parametrize("service", SERVICES)
async def test_metrics_and_probes_answer(bad_day: OrderMesh, service: str) -> None:
    """F2, issue 6.11: `/metrics` is Prometheus text with the main counters and bounded labels; the probes answer."""
    url = bad_day.mesh.url(service)
    counted: dict[str, float] = {}

    async def all_counted() -> bool:
        counted.clear()
        answer = await bad_day.client.get(f"{url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        topics_with_lag = set()
        for sample in (s for family in text_string_to_metric_families(answer.text) for s in family.samples):
            counted[sample.name] = counted.get(sample.name, 0.0) + sample.value
            for label, value in sample.labels.items():
                assert not _UUID.search(value), f"{sample.name} has an id as a label: {label}={value}"
                assert len(value) <= 120, f"{sample.name} has a text as a label: {label}={value}"
            if sample.name == "factmesh_consumer_lag":
                topics_with_lag.add(sample.labels["topic"])
        return bool(topics_with_lag) and all(counted.get(n, 0.0) > 0 for n in (*COUNTED_BY_ALL, *COUNTED[service]))

    # Gauges look every few seconds.
    await until(f"all figures of {service}, of {counted}", all_counted, timeout_s=30.0)
    alive = await bad_day.client.get(f"{url}/healthz")
    assert (alive.status_code, alive.json()["status"], alive.json()["service"]) == (200, "alive", service)
    ready = await bad_day.client.get(f"{url}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "problems": []})
