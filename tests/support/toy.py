"""The smallest service on the loops: counts signals per business object and says so on the status topic.
What a signal asks for stands in its body: `count`, `refuse`, `bug`, `big`, `work`; `raw` is stored as it is.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from factmesh import claims, ids, telemetry
from factmesh.batch import Change, Handler
from factmesh.claim_loop import ClaimKind, Settlement
from factmesh.claims import Claimed
from factmesh.effects import Effect, Publish, Schedule
from factmesh.errors import ValidationError
from factmesh.message import Delivery, Emission, Message
from factmesh.postgres import Connection, load_sql
from factmesh.service import Context, Parts, Running, Service
from factmesh.settings import Settings
from factmesh.stack import Stack

SQL = load_sql(__file__, "toy.sql")


async def load(conn: Connection, messages: Sequence[Message], _now: datetime) -> Mapping[str, int]:
    keys = sorted({key(m) for m in messages})
    await conn.execute(SQL.lock, keys)
    return {r["key"]: r["n"] for r in await conn.fetch(SQL.load, keys)}


def key(message: Message) -> str:
    return str(message["business_object_id"])


def decide(state: int, message: Message, _now: datetime) -> tuple[int, Sequence[Effect]]:
    body = json.loads(message["body"])
    match body["do"]:
        case "refuse":
            raise ValidationError("refused as asked", where=message.where)
        case "bug":
            raise RuntimeError("a bug, as asked")
        case "work":
            id_ = ids.entrance_id("toy", str(message.id), message.instant_ms)
            return state + 1, [Schedule("toil", id_, message["body"], start_now=body.get("now", True))]
    text = "x" * 1_100_000 if body["do"] == "big" else str(body.get("text", ""))
    status = {
        "workflow": "toy",
        "workflow_version": "1",
        "status": "running",
        "occurred_at": 0,
        "reason": text,
        "instance_seq": state + 1,
    }
    return state + 1, [Publish("status", "status", key(message), status)]


async def save(conn: Connection, changes: Sequence[Change[int]]) -> None:
    texts = ["".join(json.loads(m["body"]).get("raw", "") for m, _ in c.steps) for c in changes]
    await conn.execute(SQL.save, [c.key for c in changes], [c.after for c in changes], texts)


def projection(decide: Callable[..., tuple[None, Sequence[Effect]]] | None = None) -> dict[str, Any]:
    """The toy as a projection: `service(**projection())`. A message's number is its body's `seq`."""

    async def load_nothing(_conn: Connection, _messages: Sequence[Message], _now: datetime) -> Mapping[str, None]:
        return {}

    async def see(conn: Connection, changes: Sequence[Change[None]]) -> None:
        highest: dict[str, tuple[int, str]] = {}
        for message in (m for c in changes for m, _ in c.steps):
            body = json.loads(message["body"])
            seen = (body.get("seq", 0), body.get("text", ""))
            highest[key(message)] = max(seen, highest.get(key(message), seen))
        await conn.execute(SQL.see, list(highest), [n for n, _ in highest.values()], [t for _, t in highest.values()])

    return {"projection": True, "load": load_nothing, "key": lambda _m: "", "save": see, "initial": lambda _m: None,
            "decide": decide or decide_projection}  # fmt: skip


def decide_projection(state: None, message: Message, now: datetime) -> tuple[None, Sequence[Effect]]:
    if json.loads(message["body"])["do"] == "see":
        return None, ()
    return None, decide(0, message, now)[1]


@dataclass
class Toil:
    """The claim kind's work, as a test wants it."""

    work: Callable[[Claimed], Awaitable[Settlement]] | None = None
    seen: list[Claimed] = field(default_factory=list)
    lease_s: float = 30.0
    save: Callable[[Sequence[tuple[Claimed, Any]]], claims.Along] | None = None
    held_max: int = 0
    wait_s: float = 0.0

    async def __call__(self, row: Claimed) -> Settlement:
        self.seen.append(row)
        if self.work is not None:
            return await self.work(row)
        return done()


def done() -> Settlement:
    body = {"signal": "toiled", "body": b"{}", "instance_id": ""}
    return Settlement("done", publish=(Publish("signal", "signal", "toil", body),))


def service(toil: Toil | None = None, **changes: Any) -> Service:
    toil = toil or Toil()

    async def build(context: Context) -> Parts:
        fields: dict[str, Any] = {
            "topics": lambda: (context.topic("result"), context.topic("fact")),
            "decode": context.records.decode,
            "schema_id": context.records.needs_schema,
            "load": load,
            "key": key,
            "decide": decide,
            "save": save,
            "initial": lambda _m: 0,
        }
        handler = Handler(**{**fields, **changes})
        kind = ClaimKind(
            "toil", toil, toil.lease_s, concurrency=8, save=toil.save, held_max=toil.held_max, wait_s=toil.wait_s
        )
        return Parts((handler,), (kind,))

    return Service("toy", build, Path(__file__).with_name("toy_migrations"))


async def settings(stack: Stack, namespace: str, **given: Any) -> Settings:
    dsn = await stack.provide_schema(f"{namespace}_toy")
    return Settings(namespace=namespace, kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, service="toy", **given)


def asking(running: Running, topic: str, object_id: str, *, id: UUID | None = None, **body: Any) -> Emission:
    """A signal record for the toy, as bytes; `result` and `fact` are two topics with unlike partitions."""
    context = running.context
    instant = int(context.clock.now().timestamp() * 1000)
    id = id or ids.entrance_id("test", str(uuid4()), instant)
    record = {
        "ce_id": str(id),
        "ce_source": "/test",
        "ce_type": "factmesh.signal",
        "ce_time": instant,
        "traceparent": telemetry.new_traceparent(),
        "cause_id": "test",
        "correlation_id": "c-1",
        "actor": "test",
        "business_object_type": "thing",
        "business_object_id": object_id,
        "instance_id": body.pop("instance_id", ""),
        "instance_seq": 0,
        "signal": "ask",
        "body": json.dumps(body).encode(),
    }
    return Emission(context.topic(topic), object_id.encode(), context.records.encode("signal", record))


def decoded(running: Running, deliveries: Sequence[Delivery]) -> list[Message]:
    return [running.context.records.decode(d) for d in deliveries]


async def counts(running: Running) -> dict[str, int]:
    async with running.context.pool.acquire() as conn:
        return {r["key"]: r["n"] for r in await conn.fetch(SQL.rows)}


__all__ = ["Toil", "asking", "claims", "counts", "decoded", "done", "service", "settings"]
