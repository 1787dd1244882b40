"""Bad input, seen from outside of a running mesh: every entrance says what is wrong, nothing is lost, the next passes.
What is sent and what has to be said of it stands in `tests/support/bad_input`; what a start refuses, in test_start_up.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from tests.support import bad_input
from tests.support.bad_input.http import attributes
from tests.support.bad_input.kafka import Headers, binary, data
from tests.support.order_mesh import DONE_S_MAX, OrderMesh, warehouse_data
from tests.support.waiting import until

from factmesh.message import OPENING_HEADERS

pytestmark = pytest.mark.stack

OURS = ("fact", "command.orders", "command.notifier", "result", "signal", "status")
ADDED = ("__dlq.errors.", "factmesh-dlq-", "kafka_dlt-original-topic")
PARTITIONS = 4
DRAWING = frozenset(map(chr, range(32))) - {"\n", "\t"} | {"\x7f", "\x9b"}
Where = tuple[str, int, int]


@pytest.fixture
def tag() -> str:
    return f"bad-{uuid.uuid4().hex[:6]}"


# --- how things are sent and found ------------------------------------------------------------------------------------


async def publish(
    mesh: OrderMesh, records: Sequence[tuple[str, bytes | None, bytes | None, Headers, int | None]]
) -> list[Where]:
    """(topic, key, value, headers, partition) by a plain client; where each came to lie."""
    producer = AIOKafkaProducer(bootstrap_servers=mesh.stack.bootstrap, max_request_size=3_000_000)
    await producer.start()
    try:
        sent = [
            await producer.send_and_wait(topic, value, key, partition=partition, headers=headers)
            for topic, key, value, headers, partition in records
        ]
    finally:
        await producer.stop()
    return [(s.topic, s.partition, s.offset) for s in sent]


async def dead(mesh: OrderMesh, origins: Sequence[Where]) -> dict[Where, Any]:
    """The DLQ records of these coordinates, once all of them are there."""
    consumer = AIOKafkaConsumer(
        *{f"dlq.{topic}" for topic, _, _ in origins},
        bootstrap_servers=mesh.stack.bootstrap,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        max_partition_fetch_bytes=8_000_000,
    )
    found: dict[Where, Any] = {}
    await consumer.start()

    async def all_there() -> bool:
        for records in (await consumer.getmany(timeout_ms=200)).values():
            for record in records:
                named = texts(record.headers)
                if named.get("__dlq.errors.partition", "").isdigit():  # others lie there too: see the junk below
                    at = (named["__dlq.errors.topic"], int(named["__dlq.errors.partition"]))
                    found[*at, int(named["__dlq.errors.offset"])] = record
        return set(origins) <= found.keys()

    try:
        await until("all are on their DLQs", all_there, timeout_s=DONE_S_MAX)
    except AssertionError as error:
        raise AssertionError(f"{error}; missing: {sorted(set(origins) - found.keys())}\n{mesh.complaints()}") from None
    finally:
        await consumer.stop()
    return {at: found[at] for at in origins}


def texts(headers: Sequence[tuple[str, bytes | None]]) -> dict[str, str]:
    return {name: raw.decode(errors="replace") for name, raw in headers if raw is not None}


def original(headers: Sequence[tuple[str, bytes | None]]) -> list[tuple[str, bytes | None]]:
    """Without the names that are reserved for the DLQ and for replays."""
    return [(n, raw) for n, raw in headers if not n.startswith(ADDED) and n not in OPENING_HEADERS]


async def ends(mesh: OrderMesh, topic: str) -> int:
    """How many records ever lay on a topic."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=mesh.stack.bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        return sum((await consumer.end_offsets(consumer.assignment())).values())
    finally:
        await consumer.stop()


async def accepted(mesh: OrderMesh, fact_id: str) -> None:
    async def seen() -> bool:
        return bool((await mesh.progress(fact_id)).get("business_object_id"))

    await until(f"{fact_id} is accepted", seen, timeout_s=DONE_S_MAX)


async def passes(mesh: OrderMesh, tag: str) -> None:
    """The next good ones, one on each partition of `facts.raw` and one by HTTP."""
    topic = mesh.topic("facts.raw")
    good = [(topic, b"k", data(order_id=f"O-{tag}"), binary(f"{tag}-good-{p}"), p) for p in range(PARTITIONS)]
    await publish(mesh, good)
    assert (await mesh.post(f"{tag}-good-http", warehouse_data(f"O-{tag}", 1))).status_code == 202
    for name in (*range(PARTITIONS), "http"):
        await accepted(mesh, f"{tag}-good-{name}")


def factmesh(mesh: OrderMesh, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")} | {"COLUMNS": "250"}
    argv = [sys.executable, "-m", "factmesh_cli", *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)


def run_dir(mesh: OrderMesh) -> tuple[str, str]:
    return "--run-dir", str(mesh.mesh.run_dir)


async def open_records(mesh: OrderMesh) -> list[dict[str, Any]]:
    """What `factmesh dlq list` knows, which reads the DLQs to their ends before it says anything."""
    words = ("dlq", "list", "--json", "--limit", "10000", *run_dir(mesh))
    done = await asyncio.to_thread(factmesh, mesh, *words)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


# --- Kafka ------------------------------------------------------------------------------------------------------------


async def test_bad_records_are_quarantined_byte_for_byte(junk_mesh: OrderMesh, tag: str) -> None:
    """E1, INV-L, issue "Bad input": each on the DLQ with its bytes, its reason and a text; the tool shows each; the
    next good one of every partition passes.
    """
    cases = bad_input.kafka_cases(tag)
    topic = junk_mesh.topic("facts.raw")
    # Spread by hand: a partition of which most die would halt, which is another promise.
    records = [(topic, c.key, c.value, c.headers, n % PARTITIONS) for n, c in enumerate(cases)]
    origins = await publish(junk_mesh, records)
    found = await dead(junk_mesh, origins)
    messages: dict[str, str] = {}
    unclear: list[tuple[str, str, str]] = []
    for case, at in zip(cases, origins, strict=True):
        record = found[at]
        named = texts(record.headers)
        message = named["__dlq.errors.message"]
        names_it = f"{at[0]}[{at[1]}]@{at[2]}" in message or f"{tag}-" in message
        tells_what_next = message.endswith(")")
        reason = named["factmesh-dlq-reason"]
        if not (reason == case.reason and case.says in message and names_it and tells_what_next):
            unclear.append((case.name, reason, message))
        assert (record.key, record.value) == (case.key, case.value), case.name
        assert original(record.headers) == original(case.headers), case.name
        messages[named["factmesh-dlq-id"]] = message
    assert unclear == []
    await passes(junk_mesh, tag)

    shown = {row["id"]: row["message"] for row in await open_records(junk_mesh)}
    assert {id_: shown.get(id_) for id_ in messages} == messages
    by_name = dict(zip((c.name for c in cases), messages, strict=True))
    for name in ("binary key", "header not UTF-8", "id with NUL", "tombstone"):
        one = await asyncio.to_thread(factmesh, junk_mesh, "dlq", "show", by_name[name], *run_dir(junk_mesh))
        assert one.returncode == 0, (name, one.stderr)
        assert not set(one.stdout) & DRAWING, f"{name}: its bytes reach the terminal as they are"


async def test_junk_on_our_own_topics_stops_nobody(junk_mesh: OrderMesh, tag: str) -> None:
    """E1, INV-L: what nobody of ours wrote lies on that topic's DLQ as it was; an order goes through every step."""
    junk = bad_input.junk_for_our_topics()
    names = [junk_mesh.topic(f"factmesh.{short}.v1") for short in OURS]
    records = [(name, *j, n % PARTITIONS) for name in names for n, j in enumerate(junk)]
    origins = await publish(junk_mesh, records)
    found = await dead(junk_mesh, origins)
    for (_, key, value, headers, _), at in zip(records, origins, strict=True):
        record = found[at]
        assert (record.key, record.value, original(record.headers)) == (key, value, original(headers)), at
        assert texts(record.headers)["factmesh-dlq-reason"] in ("decode", "schema"), at
        assert f"{at[0]}[{at[1]}]@{at[2]}" in texts(record.headers)["__dlq.errors.message"]
    number = f"O-{tag}"
    await junk_mesh.place(number, tier="G", email=f"{tag}@buyer.example")
    assert (await junk_mesh.post(tag, warehouse_data(number, 7))).status_code == 202
    await junk_mesh.until_status(tag, "completed")


async def test_junk_on_a_dlq_is_quarantined_itself(junk_mesh: OrderMesh, tag: str) -> None:
    """INV-D: the index takes what lies on a DLQ and is no record of ours for what it is, and goes on."""
    topic = junk_mesh.mesh.dlq_name("facts.raw")
    id_ = str(uuid.uuid4()).encode()
    diagnosis: Headers = [("factmesh-dlq-id", id_), ("factmesh-dlq-attempts", b"many"), ("__dlq.errors.offset", b"-7")]
    forged: Headers = [*diagnosis, ("__dlq.errors.topic", b"t\0"), ("__dlq.errors.partition", b"x")]
    rows: list[tuple[str, bytes | None, bytes | None, Headers, int | None]] = [
        (topic, b"k", b"junk", [], 0),
        (topic, b"k", None, [], 1),
        (topic, b"k", b"x", [("factmesh-dlq-id", b"a\0b")], 2),
        (topic, b"k", b"x", forged, 3),
    ]
    origins = await publish(junk_mesh, rows)
    listed = {(r["topic"], r["partition"], r["offset"]): r for r in await open_records(junk_mesh)}
    for (_, _, value, _, _), at in zip(rows, origins, strict=True):
        assert at in listed, f"{at} is not in the index"
        assert listed[at]["reason"] == "decode"
        assert f"{at[0]}[{at[1]}]@{at[2]}" in listed[at]["message"]
        assert listed[at]["original_bytes"] >= len(value or b"")
    await junk_mesh.mesh.until_ready(["quarantine"])


# --- HTTP -------------------------------------------------------------------------------------------------------------


async def test_bad_requests_are_refused_before_anything_is_acknowledged(junk_mesh: OrderMesh, tag: str) -> None:
    """A2, INV-L: every refusal is a problem document that says what is wrong and what to do; no byte reaches Kafka."""
    raw = junk_mesh.topic("facts.raw")
    before = await ends(junk_mesh, raw)
    url = junk_mesh.mesh.url("intake")
    for case in bad_input.http_cases():
        answer = await junk_mesh.client.post(f"{url}/facts", headers=case.headers, content=case.body)
        assert answer.status_code == case.status, (case.name, answer.text)
        assert answer.headers["content-type"] == "application/problem+json", case.name
        problem = answer.json()
        assert problem["type"].endswith(f"/problems/{case.slug}"), (case.name, problem)
        assert case.says in problem["detail"], (case.name, problem)
        assert problem["detail"].endswith(")"), f"{case.name}: does not say what to do next"
        assert str(junk_mesh.project) not in answer.text, f"{case.name}: tells a stranger our folders"
    assert await ends(junk_mesh, raw) == before
    await passes(junk_mesh, tag)


async def test_an_unknown_schema_tells_no_folder(junk_mesh: OrderMesh) -> None:
    """F5: where our schemas lie is for the log; the caller learns the id and the event."""
    headers = attributes(content_type="application/avro", id="unknown-schema")
    answer = await junk_mesh.client.post(
        f"{junk_mesh.mesh.url('intake')}/facts", headers=headers, content=b"\0\x00\x0f\xff\xffx"
    )
    assert answer.status_code == 422
    assert "schema id 1048575 is not registered" in answer.json()["detail"]
    assert answer.json()["where"].startswith("event unknown-schema of //warehouse.example")
    assert "/schemas" not in answer.text


async def test_of_a_batch_each_bad_one_is_told_by_its_index(junk_mesh: OrderMesh, tag: str) -> None:
    """A2: good ones of a batch are durable; each refused one has its index, its problem and, where it has one, id."""
    good = json.loads(bad_input.kafka.structured(f"{tag}-a", data=warehouse_data(f"O-{tag}", 1)))
    wrong = {**good, "id": f"{tag}-b", "data": {**good["data"], "days_late": "two"}}
    answer = await junk_mesh.client.post(
        f"{junk_mesh.mesh.url('intake')}/facts",
        headers={"content-type": "application/cloudevents-batch+json"},
        content=json.dumps([None, wrong, good, [], {**good, "id": ""}]).encode(),
    )
    assert answer.status_code == 207, answer.text
    results = answer.json()["results"]
    assert [(r["index"], r["status"]) for r in results] == [(0, 400), (1, 422), (2, 202), (3, 400), (4, 422)]
    assert results[1]["id"] == f"{tag}-b"
    assert "field days_late" in results[1]["problem"]["detail"]
    await accepted(junk_mesh, f"{tag}-a")
    assert await junk_mesh.progress(f"{tag}-b") == {}


#: What no client library sends, byte for byte; how the answer begins, b"" where the caller does not wait for one.
RAW: Mapping[str, tuple[bytes, bytes]] = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00", b"HTTP/1.1 400"),
    "NUL in a header": (b"POST /facts HTTP/1.1\r\nHost: x\r\nce-id: a\0b\r\n\r\n", b"HTTP/1.1 400"),
    "negative length": (b"POST /facts HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 400"),
    "no UTF-8": (
        b"POST /facts HTTP/1.1\r\nHost: x\r\nce-id: \xff\xfe\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 400",
    ),
    "twice": (
        b"POST /facts HTTP/1.1\r\nHost: x\r\nce-id: a\r\nce-id: b\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 422",
    ),
    "another path": (b"GET /facts/%00/../etc HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"HTTP/1.1 404"),
    "hangs up": (b"POST /facts HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{", b""),
}


@pytest.mark.parametrize("name", RAW)
async def test_requests_that_no_library_sends(junk_mesh: OrderMesh, tag: str, name: str) -> None:
    """Bad input: an answer or none, never a bug of ours in the log; the next caller is served."""
    sent, begins = RAW[name]
    log = junk_mesh.mesh.members["intake"].log
    before = log.read_text(encoding="utf-8", errors="replace").count("intake.http_bug")
    reader, writer = await asyncio.open_connection("127.0.0.1", junk_mesh.mesh.members["intake"].port)
    writer.write(sent)
    await writer.drain()
    if begins:
        assert (await asyncio.wait_for(reader.readline(), 20)).startswith(begins)
    writer.close()
    assert (await junk_mesh.post(f"{tag}-next", warehouse_data(f"O-{tag}", 1))).status_code == 202
    assert log.read_text(encoding="utf-8", errors="replace").count("intake.http_bug") == before


async def test_another_body_under_the_same_id_by_another_entrance(junk_mesh: OrderMesh, tag: str) -> None:
    """A4: accepted by HTTP, then another body by Kafka and by HTTP: both are quarantined as conflicts, whole; the first
    stays in force, and a repeat of it is none."""
    first = warehouse_data(f"O-{tag}", 1)
    assert (await junk_mesh.post(tag, first)).status_code == 202
    await accepted(junk_mesh, tag)
    raw = junk_mesh.topic("facts.raw")
    other = data(order_id=f"O-{tag}-other")
    [by_kafka] = await publish(junk_mesh, [(raw, b"k", other, binary(tag), None)])
    assert (await junk_mesh.post(tag, first)).status_code == 202
    record = (await dead(junk_mesh, [by_kafka]))[by_kafka]
    named = texts(record.headers)
    assert (record.value, named["factmesh-dlq-reason"]) == (other, "conflict")
    assert "correct and replay it, or discard it; the first body stays in force" in named["__dlq.errors.message"]
    assert (await junk_mesh.progress(tag))["business_object_id"] == f"O-{tag}"


@pytest.mark.parametrize("id_", ["a/b c/../d", "😀 ü", "100%25", "'; DROP TABLE ledger; --", "i" * 255])
async def test_unusual_ids_are_ids(junk_mesh: OrderMesh, tag: str, id_: str) -> None:
    """A1: slashes, spaces, emoji, quotes and the longest id: accepted, and found again under the same text."""
    id_ = (tag + id_)[:255]
    await publish(junk_mesh, [(junk_mesh.topic("facts.raw"), None, data(order_id=f"O-{tag}"), binary(id_), None)])
    await accepted(junk_mesh, id_)
    assert (await junk_mesh.progress(id_))["id"] == id_


# --- files and commands -----------------------------------------------------------------------------------------------

#: What stands in the workflow, what is written instead, the code of lint, where and what lint and deploy say.
WRONG_WORKFLOWS = [
    ("sla:", "sla: {}\nsla:", 2, "v1.yaml:8:1: key 'sla' is there twice, first on line 7"),
    ("owner: {", "owner: &owner {", 2, "v1.yaml:8:8: an anchor"),
    ("call: orders.find", "call: nobody.find", 1, "do[0].find.call: error: there is no connector 'nobody'"),
    ("call: orders.find", "call: orders.fnd", 1, "connector 'orders' has no operation 'fnd'"),
    ("then: credit}", "then: apologise}", 1, "no path from the start reaches step 'credit'"),
    ("input.days >= 3", "input.days >=", 1, "do[1].weigh.switch[0].owed.when"),
    ("retry: brisk", "retry: brsk", 1, "no retry policy 'brsk'"),
    ("template: credited", "template: credit", 1, "no template 'credit'"),
]


@pytest.mark.parametrize(("old", "new", "code", "says"), WRONG_WORKFLOWS)
async def test_a_wrong_workflow_is_neither_linted_nor_deployed(
    junk_mesh: OrderMesh, tmp_path: Path, old: str, new: str, code: int, says: str
) -> None:
    """B1, issue "Bad input": lint and deploy name file and line, with their codes; the running version stays."""
    project = Path(shutil.copytree(junk_mesh.project, tmp_path / "project"))
    file = project / "workflows" / "order_exception" / "v1.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    lint = await asyncio.to_thread(factmesh, junk_mesh, "workflow", "lint", "--project", str(project))
    assert lint.returncode == code, lint.stdout + lint.stderr
    assert says in lint.stdout + lint.stderr
    assert str(file) in lint.stdout + lint.stderr
    words = ("workflow", "deploy", str(project), *run_dir(junk_mesh))
    deploy = await asyncio.to_thread(factmesh, junk_mesh, *words)
    assert deploy.returncode == 2
    assert says in deploy.stderr
    assert "deployed" not in deploy.stdout
    assert "Traceback" not in lint.stderr + deploy.stderr


COMMANDS: Sequence[tuple[tuple[str, ...], int, str]] = [
    (("nothing",), 1, "there is no command 'nothing'"),
    (("dlq", "list", "--run-dir", "/no/such"), 2, "is `factmesh up` running with this folder?"),
    (("dlq", "list"), 2, "FACTMESH_KAFKA_BOOTSTRAP: Field required"),
    (("dlq", "show", "nonsense", "--run-dir", "RUN"), 2, "`factmesh dlq list` shows the ids"),
    (("dlq", "replay", "nonsense", "--yes", "--reason", "x", "--run-dir", "RUN"), 2, "no record has an id that begins"),
    (("instance", "show", "nonsense", "--run-dir", "RUN"), 2, "no instance begins with 'nonsense'"),
    (("up", "--project", "/no/such"), 1, "/no/such is not a folder (give the project with --project)"),
    (("demo", "--project", "PROJECT"), 1, "this project has no demo.py"),
    (
        ("workflow", "deploy", "PROJECT"),
        2,
        "no database is named (give --dsn",
    ),
    (("workflow", "deploy", "PROJECT", "--dsn", "hello"), 2, "the address of PostgreSQL cannot be read"),
    (("workflow", "lint", "--project", "/no/such"), 2, "/no/such: is not a folder"),
    (("workflow", "test", "PROJECT/channels.yaml"), 2, "is neither a project folder nor a file in its workflows/"),
    (("schema", "check", "/no/such"), 1, "there is no id lock"),
]


async def test_commands_say_what_is_missing(junk_mesh: OrderMesh) -> None:
    """Bad input: a wrong folder, id, project or address ends each command with its code and one clear text."""
    for given, code, says in COMMANDS:
        words = [
            w.replace("RUN", str(junk_mesh.mesh.run_dir)).replace("PROJECT", str(junk_mesh.project)) for w in given
        ]
        done = await asyncio.to_thread(factmesh, junk_mesh, *words)
        said = done.stdout + done.stderr
        assert done.returncode == code, (given, said)
        assert says in said, (given, said)
        assert "Traceback" not in said, given
