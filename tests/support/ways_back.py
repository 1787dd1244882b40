"""The depot: a running mesh of real processes whose systems fail as a test says, and the operator who triages it.
How tests make messages die, act with the real tool, and read what came of it; no assertion on outcomes lives here.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
from tests.support.waiting import until

from factmesh import ids, kafka, yaml
from factmesh.message import Delivery, Emission, Headers, Message, to_ms, unpack_delivery
from factmesh.postgres import Record
from factmesh.records import Records
from factmesh.stack import Stack
from factmesh.topics import DLQ_PREFIX
from factmesh_cli import dlq_edit, instance
from factmesh_cli.dlq_index import Index, catch_up, load_settings, open_index, read_addresses
from factmesh_cli.mesh import Mesh
from factmesh_quarantine import queries
from factmesh_quarantine.acts import Raised, correction_of
from factmesh_quarantine.messages import Person
from factmesh_quarantine.model import OPEN_STATES, State
from factmesh_sandbox.log import Log, open_log

PROJECT = Path(__file__).resolve().parents[1] / "mesh" / "ways_back" / "project"
GATE = "//gate.example/north"
#: Generous: the machine may be busy with other tests.
DONE_S_MAX = 60.0
OPEN = tuple(sorted(OPEN_STATES))
MISSING = "stamp"
"""An operation that the workflow calls and the connector's own folder does not declare."""


class DepotMesh(Mesh):
    """The connector runs over a project folder of its own, which lags behind that of the others."""

    def environment(self, service: str = "quarantine") -> dict[str, str]:
        found = super().environment(service)
        if service == "connector":
            found["FACTMESH_PROJECT"] = str(self.project.with_name("lagging"))
        return found


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of the command line."""

    code: int
    out: str
    err: str


def person(why: str = "a test") -> Person:
    """The operator, now."""
    return Person("ann", why, datetime.now(UTC))


def number(prefix: str = "P") -> str:
    """A parcel that no other test has."""
    return f"{prefix}-{uuid.uuid4().hex[:10]}"


@dataclass
class Depot:
    """The mesh, an operator's index, and clients of the systems outside."""

    mesh: Mesh
    http: httpx2.AsyncClient
    index: Index
    records: Records
    publisher: kafka.Publisher
    instances: instance.Opened
    faults: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)

    def topic(self, name: str) -> str:
        return self.mesh.prefix + name

    # --- facts in, faults outside -------------------------------------------------------------------------------------

    def data(self, parcel: str, route: str) -> dict[str, Any]:
        seen_at = (datetime.now(UTC) - timedelta(minutes=5)).replace(microsecond=0).isoformat().replace("+00:00", "Z")
        return {"parcel_id": parcel, "route": route, "email": self.address(parcel), "seen_at": seen_at}

    @staticmethod
    def address(parcel: str) -> str:
        return f"{parcel.lower()}@home.example"

    async def post(self, parcel: str, route: str, **more: Any) -> None:
        """A fact over HTTP, acknowledged."""
        answer = await self.http.post(
            self.mesh.url("intake") + "/facts",
            headers={
                "ce-specversion": "1.0", "ce-id": f"fact-{parcel}", "ce-source": GATE, "ce-type": "parcel.arrived",
                "ce-dataschema": "https://depot.example/schemas/parcel.arrived/v1", "content-type": "application/json",
            },
            content=json.dumps(self.data(parcel, route) | more),
        )  # fmt: skip
        assert answer.status_code == 202, answer.text

    async def arrive(self, parcel: str, route: str, **more: Any) -> UUID:
        """A fact over HTTP; the id of the instance that it starts."""
        await self.post(parcel, route, **more)
        try:
            row = await until(f"an instance of {parcel}", lambda: self.row(parcel), timeout_s=DONE_S_MAX)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await self.told(parcel)}\n{self.complaints()}") from None
        found: UUID = row["id"]
        return found

    async def publish_fact(self, parcel: str, data: Mapping[str, Any], id_: str | None = None) -> None:
        """A fact over Kafka, as a stranger's client sends it."""
        headers = {
            "ce_specversion": "1.0", "ce_id": id_ or f"fact-{parcel}", "ce_source": GATE, "ce_type": "parcel.arrived",
            "ce_dataschema": "https://depot.example/schemas/parcel.arrived/v1", "content-type": "application/json",
        }  # fmt: skip
        raw = tuple((k, v.encode()) for k, v in headers.items())
        await self.publish("facts.raw", parcel.encode(), json.dumps(dict(data)).encode(), raw)

    async def publish(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> None:
        await self.publisher.publish([Emission(self.topic(topic), key, value, headers)])

    async def ill(self, system: str, subject: str, **rule: Any) -> None:
        """From now on this fault strikes this subject; the counts of the system's rules begin again."""
        self.faults.setdefault(system, {})[subject] = {**rule, "subjects": [subject]}
        await self._switch(system)

    async def well(self, system: str, subject: str) -> None:
        self.faults[system].pop(subject)
        await self._switch(system)

    async def _switch(self, system: str) -> None:
        rules = list(self.faults[system].values())
        answer = await self.http.put(f"{self.mesh.sandbox['http']}/_faults/{system}", json=rules)
        assert answer.status_code == 200, answer.text

    # --- what came of it ----------------------------------------------------------------------------------------------

    async def row(self, parcel: str) -> Record | None:
        rows = await self.instances.pool.fetch(instance.SQL.list, None, None, parcel, None, False, 2)
        assert len(rows) <= 1, f"{parcel} has {len(rows)} instances"
        return rows[0] if rows else None

    async def state(self, id_: UUID) -> dict[str, Any]:
        """The instance as decisions see it."""
        found: dict[str, Any] = json.loads(await self.instances.pool.fetchval(instance.SQL.state, id_))
        return found

    async def until_status(self, parcel: str, status: str, step: str | None = None) -> Record:
        """Wait until the parcel's instance shows this."""
        last: Record | None = None

        async def reached() -> Record | None:
            nonlocal last
            last = await self.row(parcel)
            there = last is not None and last["status"] == status and (step is None or last["step"] == step)
            return last if there else None

        try:
            found: Record = await until(f"{parcel} is {status}", reached, timeout_s=DONE_S_MAX)
        except AssertionError as error:
            shown = dict(last.items()) if last is not None else None
            raise AssertionError(f"{error}; it is {shown}\n{await self.told(parcel)}\n{self.complaints()}") from None
        return found

    async def told(self, parcel: str) -> str:
        rows = await queries.list_records(self.index.pool, queries.Filter(states=None))
        mine = [r for r in rows if r["business_object_id"] == parcel]
        return "\n".join(f"{r['id']} {r['topic']} {r['state']} {r['reason']}: {r['message']}" for r in mine)

    def complaints(self) -> str:
        """Warnings and errors of all services, for the text of a failed wait."""
        lines = []
        for name, member in self.mesh.members.items():
            text = member.log.read_text(encoding="utf-8", errors="replace")
            lines += [f"{name}: {t}" for t in text.splitlines() if '"info"' not in t][-3:]
        return "\n".join(lines)

    def log(self) -> Log:
        return open_log(self.mesh.sandbox_log)

    def effects(self, parcel: str) -> Counter[str]:
        """What the systems themselves say they did for this parcel, mails too."""
        with self.log() as log:
            done = Counter(e.kind for e in log.effects(subject=parcel))
            mails = len(log.mails(self.address(parcel)))
        return done + Counter({"mail": mails} if mails else {})

    async def until_effects(self, parcel: str, **wanted: int) -> None:
        """Wait until these, and a moment longer: then exactly these."""

        async def reached() -> bool:
            return self.effects(parcel) >= Counter(wanted)

        await until(f"{wanted} for {parcel}", reached, timeout_s=DONE_S_MAX)
        await asyncio.sleep(0.5)
        assert self.effects(parcel) == Counter(wanted)

    async def messages(self, topic: str, key: UUID | None = None) -> list[Message]:
        """Everything on one of our topics, decoded, of one key."""
        wanted = None if key is None else str(key).encode()
        found = await self.raw(topic)
        return [self.records.decode(d) for d in found if wanted is None or d.key == wanted]

    async def raw(self, topic: str) -> list[Delivery]:
        """Everything on a topic, as it lies there."""
        name = self.topic(topic) if not topic.startswith(DLQ_PREFIX) else topic
        found = await kafka.read_all(self.mesh.stack.bootstrap, [name])
        return sorted(found, key=lambda d: (d.partition, d.offset))

    async def signals(self, id_: UUID, name: str) -> list[dict[str, Any]]:
        """The bodies of an instance's signals of one name."""
        found = await self.messages("factmesh.signal.v1", id_)
        return [json.loads(m["body"]) for m in found if m["signal"] == name]

    async def commands(self, connector: str, id_: UUID) -> list[Message]:
        """The distinct commands of an instance to a connector, in order."""
        found = await self.messages(f"factmesh.command.{connector}.v1", id_)
        return list({m.id: m for m in found if m.kind == "command" and m.opening == 0}.values())

    def signal(self, id_: UUID, parcel: str, name: str, body: Mapping[str, Any], n: int = 0) -> bytes:
        """A signal's bytes, as the tool makes them."""
        now_ms = to_ms(datetime.now(UTC))
        record = {
            "ce_id": str(ids.entrance_id("test.signal", f"{id_}:{name}:{n}:{json.dumps(dict(body))}", now_ms)),
            "ce_source": "/test", "ce_type": f"factmesh.signal.{name}", "ce_time": now_ms, "cause_id": "test",
            "correlation_id": "", "actor": "person:ann", "business_object_type": "parcel", "business_object_id": parcel,
            "instance_id": str(id_), "instance_seq": 0, "signal": name, "body": ids.canonical_json(dict(body)),
        }  # fmt: skip
        return self.records.encode("signal", record)

    # --- the operator -------------------------------------------------------------------------------------------------

    async def read(self, record: UUID) -> Record:
        await catch_up(self.index)
        return await self.index.acts.read(self.index.pool, record)

    async def find(self, what: str, n: int = 1, states: Sequence[State] | None = OPEN, **by: Any) -> list[Record]:
        """Wait for exactly `n` records of an instance, a topic or a business object, oldest first."""

        async def found() -> list[Record] | None:
            await catch_up(self.index)
            rows = await queries.list_records(self.index.pool, queries.Filter(states=tuple(states) if states else None))
            mine = [r for r in rows if all(r[k] == v for k, v in by.items())]
            return mine if len(mine) >= n else None

        rows: list[Record] = await until(f"{n} record(s): {what}", found, timeout_s=DONE_S_MAX)
        assert len(rows) == n, [(r["topic"], r["reason"], r["message"]) for r in rows]
        return rows

    async def nothing_open(self, id_: UUID) -> bool:
        """Whether every record of an instance is closed, up to the end of every DLQ."""
        await catch_up(self.index)
        return await queries.list_records(self.index.pool, queries.Filter(instance=id_)) == []

    async def of(self, id_: UUID, reason: str, n: int = 1) -> Record:
        """The newest of exactly `n` open records of an instance that died of this."""
        return (await self.find(f"{reason} of {id_}", n, instance_id=id_, reason=reason))[-1]

    async def until_state(self, record: UUID, state: State, dead: int | None = None) -> Record:
        """Wait until the record is in that state, under that number."""

        async def reached() -> Record | None:
            row = await self.read(record)
            return row if row["state"] == state and (dead is None or row["dead"] == dead) else None

        try:
            found: Record = await until(f"record {record} is {state}", reached, timeout_s=DONE_S_MAX)
        except AssertionError as error:
            row = await self.read(record)
            raise AssertionError(f"{error}; it is {row['state']} at {row['dead']}\n{self.complaints()}") from None
        return found

    async def replay(self, record: UUID) -> Raised:
        async with self.index.pool.acquire() as conn, conn.transaction():
            raised = await self.index.acts.replay(conn, record, person())
        await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised

    async def resolve(
        self, record: UUID, verdict: str, output: Mapping[str, Any] | None = None, *, retry: bool = False
    ) -> Raised:
        raw = None if output is None else dlq_edit.compact(dict(output))
        async with self.index.pool.acquire() as conn, conn.transaction():
            raised = await self.index.acts.resolve(conn, record, person(), verdict=verdict, output=raw, retry=retry)
        await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised

    async def discard(self, record: UUID) -> Raised:
        async with self.index.pool.acquire() as conn, conn.transaction():
            raised = await self.index.acts.discard(conn, record, person())
        await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised

    async def correct(self, record: UUID, *sets: str, value: bytes | None = None) -> None:
        """Correct fields of the decoded original, or give the bytes."""
        row = await self.read(record)
        original = unpack_delivery(row["original"])
        if value is None:
            seen = await dlq_edit.view(self.index.registry, original.value)
            data = seen.data
            for one in sets:
                data = dlq_edit.set_path(data, one)
            value = dlq_edit.encode(seen, data)
        await self.index.acts.correct(row, value, original.headers, person("corrected"))

    async def correct_headers(self, record: UUID, *pairs: tuple[str, str]) -> None:
        """Replace headers of the correction, or of the original where there is none."""
        row = await self.read(record)
        before = correction_of(row) or unpack_delivery(row["original"])
        headers = dlq_edit.set_headers(before.headers, [f"{n}={v}" for n, v in pairs])
        await self.index.acts.correct(row, before.value, headers, person("corrected"))

    async def not_in_flight(self, record: UUID) -> None:
        """Wait until "not happened" counts: longer than any operation's in_flight_max_s after the death."""
        row = await self.read(record)
        left = row["first_failed_at"] + timedelta(seconds=4.0) - datetime.now(UTC)
        await asyncio.sleep(max(0.0, left.total_seconds()))

    async def run(self, *arguments: str) -> Ran:
        """The command `factmesh`, in a process of its own; it finds everything by the run folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")} | {"COLUMNS": "200"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "factmesh_cli", *arguments, "--run-dir", str(self.mesh.run_dir),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode is not None
        return Ran(process.returncode, out.decode(), err.decode())


def _lagging(project: Path) -> None:
    """A copy of the project in which one operation is not declared."""
    to = project.with_name("lagging")
    shutil.copytree(project, to)
    file = to / "connectors" / "scales.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text[: text.index(f"  {MISSING}:\n")], encoding="utf-8")
    yaml.load(file)


@asynccontextmanager
async def open_depot(stack: Stack, folder: Path) -> AsyncIterator[Depot]:
    """A mesh of its own over the shared stack, until the end of the block."""
    project = folder / "project"
    shutil.copytree(PROJECT, project)
    _lagging(project)
    mesh = DepotMesh(folder / "run", stack, project, namespace=f"w{uuid.uuid4().hex[:8]}")
    try:
        await mesh.start()
        settings = load_settings(read_addresses(mesh.run_dir))
        publisher = kafka.Publisher(stack.bootstrap, client_id="test")
        async with (
            httpx2.AsyncClient(timeout=30.0) as http,
            open_index(settings) as index,
            instance.opened(mesh.run_dir) as instances,
        ):
            records = await Records.open(index.registry)
            yield Depot(mesh, http, index, records, publisher, instances)
        await publisher.close()
    finally:
        await mesh.stop()
