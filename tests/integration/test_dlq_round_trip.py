"""A message dies in a service's loop, is corrected and replayed by the tool's code, and is handled: the whole circle.
A small service of the test's own stands for any; what the loops and the index do alone is tested beside them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import factmesh
from factmesh import ids, kafka
from factmesh.batch import Change, Handler
from factmesh.clock import SystemClock
from factmesh.effects import Effect
from factmesh.errors import ValidationError
from factmesh.message import Delivery, Emission, Message, to_ms
from factmesh.postgres import Connection, Migrations, migrate
from factmesh.service import Context, Parts, Service, open_service
from factmesh.settings import Settings
from factmesh.stack import Stack
from factmesh.topics import SIGNAL, dlq_of
from factmesh_cli import dlq_edit
from factmesh_cli.dlq_index import Index, catch_up, open_index
from factmesh_quarantine import queries, service
from factmesh_quarantine.acts import original_of
from factmesh_quarantine.messages import Person
from factmesh_quarantine.model import State

pytestmark = pytest.mark.stack

INSTANCE = UUID("018f0000-0000-8000-8000-0000000000aa")


def service_of(handled: list[Message], empty: Path) -> Service:
    """It refuses signals whose body does not say ok; parks and releases, which come back to it, it lets pass."""

    async def load(_conn: Connection, _messages: Sequence[Message], _now: datetime) -> Mapping[str, None]:
        return {}

    async def save(_conn: Connection, _changes: Sequence[Change[None]]) -> None:
        return None

    def decide(_state: None, message: Message, _now: datetime) -> tuple[None, Sequence[Effect]]:
        if message["signal"] == "poke":
            if not json.loads(message["body"])["ok"]:
                raise ValidationError("the body does not say ok", where=message.where, hint="correct it")
            handled.append(message)
        return None, ()

    async def build(context: Context) -> Parts:
        handler: Handler[None] = Handler(
            topics=lambda: (SIGNAL.of(context.settings.topic_prefix),),
            decode=context.records.expect({"signal"}),
            load=load,
            key=lambda m: str(m.id),
            decide=decide,
            save=save,
            initial=lambda _m: None,
        )
        return Parts(handlers=(handler,))

    return Service(name="poked", build=build, migrations=empty)


@dataclass
class Circle:
    index: Index
    context: Context
    handled: list[Message]

    @property
    def topic(self) -> str:
        return SIGNAL.of(self.index.namespace)

    async def poke(self, n: int, ok: bool) -> UUID:
        id_ = ids.entrance_id("poke", str(n), to_ms(datetime.now(UTC)) // 3_600_000 * 3_600_000)
        body = {
            "ce_id": str(id_), "ce_source": "/test", "ce_type": "factmesh.signal", "ce_time": 1, "cause_id": "x",
            "correlation_id": "c", "actor": "t", "business_object_type": "o", "business_object_id": "1",
            "instance_id": str(INSTANCE), "instance_seq": 0, "signal": "poke", "body": ids.canonical_json({"ok": ok}),
        }  # fmt: skip
        value = self.context.records.encode("signal", body)
        await self.context.publisher.publish([Emission(self.topic, str(INSTANCE).encode(), value)])
        return id_

    async def records(self, n: int, *states: State) -> Sequence[Any]:
        async def enough() -> Sequence[Any]:
            await catch_up(self.index)
            found = await queries.list_records(self.index.pool, queries.Filter(states=states or None))
            return found if len(found) >= n else ()

        return await _until(enough)

    async def signals(self, name: str) -> list[dict[str, Any]]:
        records = (self.context.records.decode(d).record for d in await self.everything())
        return [json.loads(r["body"]) for r in records if r["signal"] == name]

    async def everything(self) -> list[Delivery]:
        return await kafka.read_all(self.context.settings.kafka_bootstrap, [self.topic])

    async def replay(self, record: UUID) -> int:
        async with self.index.pool.acquire() as conn, conn.transaction():
            raised = await self.index.acts.replay(conn, record, Person("ann", "r", datetime.now(UTC)))
        await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised.number


async def _until(look: Callable[[], Awaitable[Any]], timeout_s: float = 30.0) -> Any:
    deadline = SystemClock().monotonic() + timeout_s
    while not (found := await look()):
        assert SystemClock().monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.1)
    return found


@pytest.fixture
async def circle(stack: Stack, namespace: str, tmp_path: Path) -> AsyncIterator[Circle]:
    schema = f"{namespace}_quarantine"
    dsn = await stack.provide_schema(schema)
    library = Migrations("factmesh", Path(factmesh.__file__).with_name("migrations"))
    await migrate(dsn, schema, [library, Migrations("quarantine", service.SERVICE.migrations)])
    index_settings = Settings(kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, namespace=namespace)
    own_dsn = await stack.provide_schema(f"{namespace}_poked")
    settings = Settings(kafka_bootstrap=stack.bootstrap, postgres_dsn=own_dsn, namespace=namespace)
    handled: list[Message] = []
    async with (
        open_service(service_of(handled, tmp_path), settings, http=False) as running,
        open_index(index_settings) as index,
    ):
        yield Circle(index, running.context, handled)


async def test_dies_is_corrected_and_comes_back(circle: Circle) -> None:
    """E1, E2, H1: dead with its bytes, parked; corrected and replayed it is handled once, and released."""
    id_ = await circle.poke(1, ok=False)
    (row,) = await circle.records(1)
    record_id = str(ids.record_id(f"id:{id_}", circle.context.group))
    assert (row["reason"], row["instance_id"], row["kind"], str(row["thread"])) == (
        "validation", INSTANCE, "signal", record_id,
    )  # fmt: skip
    parks = await _until(lambda: circle.signals("message_parked"))
    assert [(p["record_id"], p["opening"]) for p in parks] == [(record_id, 0)]
    original = original_of(row).original
    assert original.value == (await circle.everything())[0].value

    # Replayed as it is, it dies again under its number, and is open again.
    assert await circle.replay(row["id"]) == 1
    (again,) = await circle.records(1, State.FAILED_AGAIN)
    assert (again["id"], again["dead"]) == (row["id"], 1)

    seen = await dlq_edit.view(circle.index.registry, original.value)
    better = dlq_edit.encode(seen, dlq_edit.set_path(seen.data, "body.ok=true"))
    fresh = await circle.index.acts.read(circle.index.pool, row["id"])
    await circle.index.acts.correct(fresh, better, original.headers, Person("ann", "r", datetime.now(UTC)))
    assert await circle.replay(row["id"]) == 2
    released = await _until(lambda: circle.signals("message_released"))
    assert [(r["record_id"], r["opening"]) for r in released] == [(record_id, 2)]
    assert [(m.id, m.opening) for m in circle.handled] == [(id_, 2)]

    # Published once more under the same number (a tool that was killed before it wrote that down): handled once.
    replayed = next(d for d in await circle.everything() if d.opening == 2)
    await circle.context.publisher.publish([Emission(replayed.topic, replayed.key, replayed.value, replayed.headers)])
    await circle.poke(2, ok=True)
    await _until(lambda: _done(len(circle.handled) == 2))
    assert [m.opening for m in circle.handled] == [2, 0]
    assert len(await circle.signals("message_released")) == 1


async def test_a_conflicts_opening_is_shown_when_the_id_is_done(circle: Circle) -> None:
    """DESIGN 9: a conflict counts under its id; replayed over a done row it dies again under its number."""
    id_ = await circle.poke(1, ok=True)
    await circle.poke(1, ok=False)
    (row,) = await circle.records(1)
    assert row["reason"] == "conflict"
    assert str(row["thread"]) == str(ids.record_id(f"id:{id_}", circle.context.group))
    assert await circle.replay(row["id"]) == 1
    (again,) = await circle.records(1, State.FAILED_AGAIN)
    assert (again["id"], again["raised"], again["dead"]) == (row["id"], 1, 1)
    assert [m.opening for m in circle.handled] == [0]
    assert len(await kafka.read_all(circle.context.settings.kafka_bootstrap, [dlq_of(circle.topic)])) == 2


async def _done(value: bool) -> bool:
    return value
