"""What each service of the ideal loop does with a batch: W3 written out by hand, in set-based statements.
A repeat raises a unique violation; then what is known publishes its recorded bytes again, and the rest is handled.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import fastavro
import orjson
from tests.bench.ideal import queries
from tests.bench.ideal.records import Codec, Emission, derived, ms_of, pack, unpack

if TYPE_CHECKING:
    from tests.bench.ideal.loop import Loop

STEPS = ("first", "second", "third")
EVERY_STEP_TOLD = os.environ.get("IDEAL_STATUSES", "2") == "4"
FACT_SCHEMA = Path(__file__).parents[1] / "project/schemas/bench.asked/v1.avsc"


def _plain_fact() -> Any:
    raw = json.loads(FACT_SCHEMA.read_text(encoding="utf-8"))
    for field in raw["fields"]:
        if isinstance(field["type"], dict):
            field["type"] = field["type"]["type"]
    return fastavro.parse_schema(raw)


def _where(batch: Sequence[Any]) -> tuple[list[str], list[int], list[int]]:
    return [m.topic() for m in batch], [m.partition() for m in batch], [m.offset() for m in batch]


class Intake:
    """facts.raw -> fact: dedup by (source, id), the vendor's Avro to the canonical record."""

    loop: Loop

    def __init__(self, pool: asyncpg.Pool, prefix: str) -> None:
        self.pool = pool
        self.topics = (f"{prefix}facts.raw",)
        self.out = f"{prefix}factmesh.fact.v1"
        self.schema = _plain_fact()
        self.fact = Codec("fact")

    async def handle(self, batch: Sequence[Any]) -> list[Emission]:
        hashes, ids, emissions = [], [], []
        now_ms = int(time.time() * 1000)
        for message in batch:
            header = dict(message.headers())
            cause = header["ce_source"] + b"\0" + header["ce_id"]
            hashes.append(UUID(bytes=blake2b(cause, digest_size=16).digest()))
            ids.append(derived(now_ms, cause, 0))
            emissions.append(self._fact(message, header, ids[-1], now_ms))
        try:
            emitted = [pack([e]) for e in emissions]
            await self.pool.execute(queries.FRESH_FACTS, hashes, ids, *_where(batch), emitted)
        except asyncpg.UniqueViolationError:
            known = {r["hash"]: r["emitted"] for r in await self.pool.fetch(queries.KNOWN_FACTS, hashes)}
            rest = {h: m for h, m in zip(hashes, batch, strict=True) if h not in known}
            again = [e for raw in known.values() for e in unpack(raw)]
            return again + (await self.handle(list(rest.values())) if rest else [])
        return emissions

    def _fact(self, message: Any, header: dict[str, bytes], id_: UUID, now_ms: int) -> Emission:
        data: Any = fastavro.schemaless_reader(io.BytesIO(message.value()[5:]), self.schema, None)
        record = {
            "ce_id": str(derived(now_ms, id_.bytes, 1)),
            "ce_source": "/ideal/intake",
            "ce_type": header["ce_type"].decode(),
            "ce_time": now_ms,
            "traceparent": None,
            "cause_id": str(id_),
            "correlation_id": str(id_),
            "actor": "service:generator",
            "business_object_type": "request",
            "business_object_id": data["reference"],
            "status": "asked",
            "due_by": None,
            "occurred_at": data["asked_at"],
            "received_at": now_ms,
            "schema_version": 1,
            "source": header["ce_source"].decode(),
            "source_id": header["ce_id"].decode(),
            "data": orjson.dumps(data),
        }
        return self.out, data["reference"].encode(), self.fact.encode(record)


class Orchestrator:
    """fact, result -> command, status: the state of an instance is written from a load inside its lock."""

    loop: Loop

    def __init__(self, pool: asyncpg.Pool, prefix: str) -> None:
        self.pool = pool
        self.topics = (f"{prefix}factmesh.fact.v1", f"{prefix}factmesh.result.v1")
        self.fact_topic = self.topics[0]
        self.command_topic = f"{prefix}factmesh.command.noop.v1"
        self.status_topic = f"{prefix}factmesh.status.v1"
        self.fact, self.result, self.command, self.status = (Codec(n) for n in ("fact", "result", "command", "status"))

    async def handle(self, batch: Sequence[Any]) -> list[Emission]:
        facts = [m.topic() == self.fact_topic for m in batch]
        records = [(self.fact if f else self.result).decode(m.value()) for f, m in zip(facts, batch, strict=True)]
        ids = [UUID(r["ce_id"]) for r in records]
        try:
            return await self._handle(batch, facts, records, ids)
        except asyncpg.UniqueViolationError:
            known = {r["id"]: r["emitted"] for r in await self.pool.fetch(queries.KNOWN, ids)}
            rest = {i: m for i, m in zip(ids, batch, strict=True) if i not in known}
            again = [e for raw in known.values() for e in unpack(raw)]
            return again + (await self.handle(list(rest.values())) if rest else [])

    async def _handle(
        self, batch: Sequence[Any], facts: list[bool], records: list[dict[str, Any]], ids: list[UUID]
    ) -> list[Emission]:
        now_ms = int(time.time() * 1000)
        async with self.pool.acquire() as conn, conn.transaction():
            wanted = [UUID(r["instance_id"]) for f, r in zip(facts, records, strict=True) if not f]
            states: dict[UUID, dict[str, Any]] = {}
            if wanted:
                for row in await conn.fetch(queries.LOCK, wanted):
                    states[row["id"]] = orjson.loads(row["state"])
            created: dict[UUID, dict[str, Any]] = {}
            moved: dict[UUID, dict[str, Any]] = {}
            emitted: list[list[Emission]] = []
            for is_fact, record, id_ in zip(facts, records, ids, strict=True):
                if is_fact:
                    instance = derived(ms_of(id_), b"i" + id_.bytes, 0)
                    state = created[instance] = self._begin(record)
                else:
                    instance = UUID(record["instance_id"])
                    state = moved[instance] = states[instance]
                    if state["command"] != record["command_id"]:
                        emitted.append([])
                        moved.pop(instance)
                        continue
                    state["step"] += 1
                    state["seq"] += 1
                    state["output"] = orjson.loads(record["output"])
                emitted.append(self._next(state, instance, id_, now_ms))
            await conn.execute(
                queries.STEPS,
                ids,
                *_where(batch),
                [pack(e) for e in emitted],
                list(created),
                [s["seq"] for s in created.values()],
                [orjson.dumps(s) for s in created.values()],
                list(moved),
                [s["seq"] for s in moved.values()],
                [orjson.dumps(s) for s in moved.values()],
            )
        return [e for es in emitted for e in es]

    @staticmethod
    def _begin(fact: dict[str, Any]) -> dict[str, Any]:
        amount = orjson.loads(fact["data"])["amount"]
        return {
            "seq": 1,
            "step": 0,
            "correlation": fact["correlation_id"],
            "reference": fact["business_object_id"],
            "occurred_at": fact["occurred_at"],
            "output": {"amount": amount},
        }

    @staticmethod
    def _envelope(state: dict[str, Any], instance: UUID, cause: UUID, ordinal: int, now_ms: int) -> dict[str, Any]:
        return {
            "ce_id": str(derived(ms_of(cause), cause.bytes, ordinal)),
            "ce_source": "/ideal/orchestrator",
            "ce_time": now_ms,
            "traceparent": None,
            "cause_id": str(cause),
            "correlation_id": state["correlation"],
            "actor": "service:orchestrator",
            "business_object_type": "request",
            "business_object_id": state["reference"],
            "instance_id": str(instance),
            "instance_seq": state["seq"],
            "workflow": "w3",
            "workflow_version": "1.0.0",
        }

    def _next(self, state: dict[str, Any], instance: UUID, cause: UUID, now_ms: int) -> list[Emission]:
        """The next command, and a status at the beginning and at the end, or at every step."""
        key = str(instance).encode()
        out: list[Emission] = []
        step = state["step"]
        if step < len(STEPS):
            record = self._envelope(state, instance, cause, 1, now_ms)
            record |= {
                "ce_type": "noop.act",
                "step": STEPS[step],
                "iteration": 0,
                "run": 0,
                "connector": "noop",
                "operation": "act",
                "idempotency_key": str(derived(ms_of(instance), instance.bytes, step)),
                "deadline": None,
                "retry": None,
                "body": orjson.dumps({"reference": state["reference"], "amount": state["output"]["amount"]}),
            }
            state["command"] = record["ce_id"]
            out.append((self.command_topic, key, self.command.encode(record)))
        if EVERY_STEP_TOLD or step in (0, len(STEPS)):
            record = self._envelope(state, instance, cause, 2, now_ms)
            record |= {
                "ce_type": "status",
                "status": "running" if step < len(STEPS) else "completed",
                "previous_status": "running" if step else None,
                "step": STEPS[step] if step < len(STEPS) else None,
                "next_step": None,
                "outcome": None if step < len(STEPS) else "completed",
                "reason": None,
                "due_by": None,
                "occurred_at": state["occurred_at"],
                "owner": "bench",
            }
            out.append((self.status_topic, key, self.status.encode(record)))
        return out


class Connector:
    """command -> result: a row claimed as it is inserted, the call, a settlement; `published` rides with the next."""

    loop: Loop

    def __init__(self, pool: asyncpg.Pool, prefix: str) -> None:
        self.pool = pool
        self.topics = (f"{prefix}factmesh.command.noop.v1",)
        self.result_topic = f"{prefix}factmesh.result.v1"
        self.command, self.result = Codec("command"), Codec("result")
        self.published: list[UUID] = []
        self.settling: set[asyncio.Task[None]] = set()

    async def handle(self, batch: Sequence[Any]) -> list[Emission]:
        records = [self.command.decode(m.value()) for m in batch]
        ids = [UUID(r["ce_id"]) for r in records]
        marks, self.published = self.published, []
        try:
            payloads = [m.value() for m in batch]
            await self.pool.execute(queries.CLAIMED, ids, *_where(batch), [None] * len(ids), payloads, marks)
        except asyncpg.UniqueViolationError:
            self.published += marks
            known = {r["id"] for r in await self.pool.fetch(queries.KNOWN, ids)}
            outcomes = await self.pool.fetch(queries.KNOWN_OUTCOMES, list(known))
            rest = {i: m for i, m in zip(ids, batch, strict=True) if i not in known}
            again = [e for r in outcomes for e in unpack(r["outcome"])]
            return again + (await self.handle(list(rest.values())) if rest else [])
        # As in ours: a command is a row now, so its offset may go on while it is worked on.
        while len(self.settling) >= 2:
            await asyncio.wait(self.settling, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(self._work(records, ids))
        self.settling.add(task)
        task.add_done_callback(self.settling.discard)
        return []

    async def _work(self, records: list[dict[str, Any]], ids: list[UUID]) -> None:
        now_ms = int(time.time() * 1000)
        outcomes = {i: self._call(r, i, now_ms) for r, i in zip(records, ids, strict=True)}
        rows = await self.pool.fetch(queries.SETTLE, ids, [pack([outcomes[i]]) for i in ids])
        settled = [r["id"] for r in rows]
        await self.loop.publish([outcomes[i] for i in settled]).ready
        self.published += settled

    def _call(self, command: dict[str, Any], id_: UUID, now_ms: int) -> Emission:
        """The no-op, and its result."""
        output = {"amount": orjson.loads(command["body"])["amount"]}
        record = {
            "ce_id": str(derived(ms_of(id_), id_.bytes, 1)),
            "ce_source": "/ideal/connector",
            "ce_type": "noop.act.result",
            "ce_time": now_ms,
            "traceparent": None,
            "cause_id": command["ce_id"],
            "correlation_id": command["correlation_id"],
            "actor": command["actor"],
            "business_object_type": command["business_object_type"],
            "business_object_id": command["business_object_id"],
            "instance_id": command["instance_id"],
            "instance_seq": command["instance_seq"],
            "command_id": command["ce_id"],
            "step": command["step"],
            "idempotency_key": command["idempotency_key"],
            "outcome": "done",
            "output": orjson.dumps(output),
            "error_class": None,
            "error_message": None,
            "attempts": 1,
            "duration_ms": 0,
            "verdict": None,
            "epoch": 1,
        }
        return self.result_topic, command["instance_id"].encode(), self.result.encode(record)


ROLES: dict[str, Any] = {"intake": Intake, "orchestrator": Orchestrator, "connector": Connector}
