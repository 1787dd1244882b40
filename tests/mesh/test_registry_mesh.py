"""The same mesh over a real Confluent-compatible schema registry: the ids are the server's own, the bytes as good."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiokafka import AIOKafkaProducer
from tests.contract import registry_server
from tests.support.order_mesh import WAREHOUSE, OrderMesh, TracedMesh, noticed_at, project_outside, warehouse_data
from tests.support.plain import FOLDERS, plain_encode, read_all

from factmesh.stack import Stack

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def registry_url() -> Iterator[str]:
    try:
        with registry_server.running() as url:
            yield url
    except registry_server.NoServerError as error:
        pytest.skip(f"SKIPPED MESH OVER A REGISTRY: {error}")


def locked() -> Mapping[str, int]:
    """Every schema version with the id that the locks beside the files give it."""
    found: dict[str, int] = {}
    for folder in FOLDERS:
        for name, entry in json.loads((folder / "ids.lock").read_text(encoding="utf-8")).items():
            found[name] = entry if isinstance(entry, int) else entry["id"]
    return found


async def registered(url: str, client: httpx2.AsyncClient) -> dict[str, int]:
    """Put every schema in by the registry's plain API, in an order that gives none the id of its lock."""
    ids: dict[str, int] = {}
    await _post(client, url, "another.team", {"type": "record", "name": "t", "fields": []})
    for name in sorted(locked(), reverse=True):
        subject, _, _ = name.rpartition("/v")
        [folder] = [f for f in FOLDERS if (f / f"{name}.avsc").exists()]
        source = json.loads((folder / f"{name}.avsc").read_text(encoding="utf-8"))
        ids[name] = await _post(client, url, subject, source)
    return ids


async def _post(client: httpx2.AsyncClient, url: str, subject: str, source: Any) -> int:
    answer = await client.post(f"{url}/subjects/{subject}/versions", json={"schema": json.dumps(source)})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["id"])


@pytest.fixture(scope="module")
async def over_registry(
    stack: Stack, registry_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[OrderMesh, dict[str, int]]]:
    folder: Path = tmp_path_factory.mktemp("registry_mesh")
    project = project_outside(folder)
    # Intake's adapters read `order.delayed` from the registry: no service needs the project's own `.avsc` any more.
    for file in sorted((project / "schemas").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (project / "schemas").rmdir()
    mesh = TracedMesh(
        folder / "run", replace(stack, registry_url=registry_url), project, namespace=f"g{uuid.uuid4().hex[:8]}"
    )
    async with httpx2.AsyncClient(timeout=30.0) as client:
        ids = await registered(registry_url, client)
        try:
            await mesh.start()
            yield OrderMesh(mesh, client, project), ids
        finally:
            await mesh.stop()


async def test_instances_complete_over_a_real_registry(over_registry: tuple[OrderMesh, dict[str, int]]) -> None:
    """Issue 6.3, A5: the same services complete instances with the registry's own ids, by HTTP and by Avro on Kafka,
    and every record that they write names its schema by the registry's id.
    """
    mesh, ids = over_registry
    assert not [name for name, id_ in locked().items() if ids[name] == id_], "the ids must differ, or this shows little"
    for number, tier in (("O-HTTP", "G"), ("O-AVRO", "S")):
        await mesh.place(number, tier=tier, email=f"{number.lower()}@buyer.example")
    answer = await mesh.post("fact-O-HTTP", warehouse_data("O-HTTP", 5))
    assert answer.status_code == 202, answer.text
    data = {"order_id": "O-AVRO", "days_late": 5, "reason": "strike", "noticed_at": noticed_at()}
    value = plain_encode("order.delayed", data, schema_id=ids["order.delayed/v1"])
    attributes = {"specversion": "1.0", "id": "fact-O-AVRO", "source": WAREHOUSE, "type": "order.delayed"}
    headers = [*((f"ce_{k}", v.encode()) for k, v in attributes.items()), ("content-type", b"application/avro")]
    producer = AIOKafkaProducer(bootstrap_servers=mesh.stack.bootstrap)
    await producer.start()
    try:
        await producer.send_and_wait(mesh.topic("facts.raw"), value, b"O-AVRO", headers=headers)
    finally:
        await producer.stop()
    for number in ("O-HTTP", "O-AVRO"):
        await mesh.until_status(f"fact-{number}", "completed")
        await mesh.until_mailed(f"{number.lower()}@buyer.example")
    carried = {
        "factmesh.fact.v1": "factmesh.fact/v1",
        "factmesh.command.orders.v1": "factmesh.command/v1",
        "factmesh.result.v1": "factmesh.result/v1",
        "factmesh.status.v1": "factmesh.status/v1",
    }
    for topic, name in carried.items():
        records = await read_all(mesh.stack.bootstrap, [mesh.topic(topic)])
        assert {int.from_bytes(r.value[1:5], "big") for r in records} == {ids[name]}, topic
    with mesh.log() as log:
        assert [e.subject for e in log.effects("billing", kind="credit_note")] == ["O-HTTP"]
