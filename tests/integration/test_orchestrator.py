"""The orchestrator on the real broker and database: its state under the lock, its definitions, its timers."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.orchestrator import NOW, workflow_text
from tests.support.waiting import until

from factmesh import ids, kafka
from factmesh.batch import Change
from factmesh.clock import ManualClock
from factmesh.errors import ConflictError, IllegalTransitionError
from factmesh.expressions import default_expressions
from factmesh.ids import Root
from factmesh.message import Delivery, Emission, Message
from factmesh.postgres import Migrations, connect, migrate
from factmesh.retry import RetryPolicy
from factmesh.service import Running, open_service
from factmesh.stack import Stack
from factmesh_orchestrator import store as tables
from factmesh_orchestrator.bench import Bench
from factmesh_orchestrator.decide import decide
from factmesh_orchestrator.model import ObjectState, Status
from factmesh_orchestrator.service import MIGRATIONS, SERVICE, OrchestratorSettings
from factmesh_orchestrator.store import Store, deploy
from factmesh_orchestrator.timers import Ageing

pytestmark = pytest.mark.stack
LIBRARY = Path(tables.__file__).parents[3] / "libs" / "factmesh" / "migrations"
STEPS = """
- look: {call: shop.look_up, with: {id: '${ input.id }'}, retry: patient}
- tell: {notify: {template: told, to: '${ input.id }', with: {note: '${ input.note }'}}, then: end}
"""
PATIENT = {"patient": RetryPolicy(attempts_max=9)}


async def settings(stack: Stack, namespace: str, **given: Any) -> OrchestratorSettings:
    dsn = await stack.provide_schema(f"{namespace}_orchestrator")
    return OrchestratorSettings(namespace=namespace, kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, **given)


class Tables:
    """The orchestrator's schema of one test, migrated, with connections to it."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.dsn, self.schema = dsn, schema

    async def connect(self) -> Any:
        return await connect(self.dsn, schema=self.schema)

    async def deploy(self, text: str, **given: Any) -> str:
        conn = await self.connect()
        try:
            return await deploy(conn, self.schema, text, PATIENT, by="person:t", commit="c0ffee", **given)
        finally:
            await conn.close()

    async def store(self, conn: Any) -> Store:
        store = Store(default_expressions())
        store.use(await store.read_current(conn))
        return store


@pytest.fixture
async def schema(stack: Stack, namespace: str) -> Tables:
    name = f"{namespace}_orchestrator"
    dsn = await stack.provide_schema(name)
    await migrate(dsn, name, [Migrations("factmesh", LIBRARY), Migrations("orchestrator", MIGRATIONS)])
    return Tables(dsn, name)


async def fold(store: Store, conn: Any, messages: Sequence[Message]) -> Mapping[str, Any]:
    """What the batch loop does with fresh messages, in one transaction."""
    async with conn.transaction():
        loaded = await store.load(conn, messages, NOW)
        states: dict[str, Any] = {}
        steps: dict[str, list[Any]] = {}
        for m in messages:
            key = tables.key(m)
            state = states.get(key, loaded.get(key)) or store.initial(m)
            states[key], effects = decide(state, m, NOW)
            steps.setdefault(key, []).append((m, effects))
        await store.save(conn, [Change(k, loaded.get(k), s, steps[k]) for k, s in states.items()])
        return states


def about(bench: Bench, message: Message, object_id: str) -> Message:
    """The message, of another object."""
    own = ids.entrance_id("test", uuid.uuid4().hex, message.instant_ms)
    record = {**message.record, "business_object_id": object_id, "ce_id": str(own)}
    return Message(message.delivery, message.kind, Root.own(own), own, 0, record, b"", message.instant_ms)


# --- the store -------------------------------------------------------------------------------------------------------


async def test_what_is_saved_is_what_is_loaded(schema: Tables) -> None:
    """B2: nothing that matters lives only in memory: state goes through the tables and comes back the same."""
    assert await schema.deploy(workflow_text(STEPS)) == "deployed"
    conn = await schema.connect()
    store = await schema.store(conn)
    b = Bench(store.definitions, NOW)
    facts = [about(b, b.fact("order.delayed", {"note": "n"}), f"o-{n % 3}") for n in range(3)]
    facts += [about(b, b.fact("order.paid", {"sum": 1}), "o-1")]
    states = await fold(store, conn, facts)
    # A replica that knows nothing yet loads the same, and the definition that the instances are pinned to.
    other = await schema.store(conn)
    async with conn.transaction():
        again = await other.load(conn, facts, NOW)
    assert set(again) == set(states) == {f"order\x1fo-{n}" for n in range(3)}
    for key, state in again.items():
        assert isinstance(state, ObjectState)
        assert (state.kept, state.queue, state.active, state.instances) == (
            states[key].kept, states[key].queue, states[key].active, states[key].instances,
        )  # fmt: skip
    kept = again["order\x1fo-1"]
    assert isinstance(kept, ObjectState)
    assert [f.type for f in kept.kept] == ["order.paid"]
    await conn.close()


async def test_an_instance_moves_on_only_from_the_seq_that_was_loaded(schema: Tables) -> None:
    """INV-F: no write from state that was loaded outside its lock: it raises, and nothing is kept."""
    await schema.deploy(workflow_text(STEPS))
    conn = await schema.connect()
    store = await schema.store(conn)
    b = Bench(store.definitions, NOW)
    fact = b.fact("order.delayed", {"note": "n"})
    (state,) = (await fold(store, conn, [fact])).values()
    b.take(fact)
    result = b.result(b.command("look"), output={})
    async with conn.transaction():
        stale = (await store.load(conn, [result], NOW))[tables.key(result)]
    await fold(store, conn, [result])
    after, effects = decide(stale, b.again(result), NOW)
    with pytest.raises(IllegalTransitionError, match="outside its lock"):
        async with conn.transaction():
            await store.save(conn, [Change(tables.key(result), stale, after, [(result, effects)])])
    row = await conn.fetchrow("SELECT seq, status FROM instances")
    assert (row["seq"], row["status"]) == (2, "completed")
    assert state.instances[str(b.instance.id)].seq == 1
    await conn.close()


async def test_two_replicas_fold_one_object_one_after_the_other(schema: Tables) -> None:
    """DESIGN 3: the row lock carries safety; who waits for it reads what the other wrote, in a younger snapshot."""
    await schema.deploy(workflow_text(STEPS, extra="onRepeat: start"))
    first, second = await schema.connect(), await schema.connect()
    stores = [await schema.store(first), await schema.store(second)]
    b = Bench(stores[0].definitions, NOW)
    facts = [b.fact("order.delayed", {"note": str(n)}) for n in range(20)]
    await asyncio.gather(*(_each(stores[n], conn, facts[n::2]) for n, conn in enumerate((first, second))))
    row = await first.fetchrow("SELECT cardinality(active) AS n FROM business_objects")
    assert row["n"] == 20
    assert await first.fetchval("SELECT count(*) FROM instances") == 20
    await first.close()
    await second.close()


async def _each(store: Store, conn: Any, messages: Sequence[Message]) -> None:
    for message in messages:
        await fold(store, conn, [message])


async def test_what_needs_a_person_stands_in_its_own_table(schema: Tables) -> None:
    """H1: parked and needs_resolution are found without looking at every instance, and leave when they are over."""
    await schema.deploy(workflow_text(STEPS))
    conn = await schema.connect()
    store = await schema.store(conn)
    b = Bench(store.definitions, NOW)
    fact = b.fact("order.delayed", {"note": "n"})
    b.take(fact)
    c = b.command("look")
    seen = []
    for message in (fact, b.parked(c, "unknown"), b.result(c, failed=("ambiguous", "no"), verdict="not_happened")):
        await fold(store, conn, [message])
        seen.append(await conn.fetchval("SELECT max(status) FROM attention"))
    await fold(store, conn, [b.signal("end_instance", {"status": "failed", "reason": "x"})])
    seen.append(await conn.fetchval("SELECT max(status) FROM attention"))
    assert seen == [None, "parked", "needs_resolution", None]
    view = await conn.fetchrow("SELECT status, outcome, step FROM instances_view")
    assert tuple(view.values()) == ("failed", "failed", "look")
    await conn.close()


# --- deployments -----------------------------------------------------------------------------------------------------


async def test_a_deployed_version_never_changes(schema: Tables) -> None:
    """B1: the same version with another content is refused; each deployment is audited."""
    assert await schema.deploy(workflow_text(STEPS)) == "deployed"
    assert await schema.deploy(workflow_text(STEPS)) == "unchanged"
    with pytest.raises(ConflictError, match="raise document.version"):
        await schema.deploy(workflow_text(STEPS.replace("told", "other")))
    assert await schema.deploy(workflow_text(STEPS, version="1.1.0")) == "deployed"
    assert await schema.deploy(workflow_text(STEPS), if_absent=True) == "unchanged"
    assert await schema.deploy(workflow_text(STEPS)) == "current"
    conn = await schema.connect()
    acts = await conn.fetch("SELECT act, version, by, commit_id FROM definition_acts ORDER BY id")
    assert [tuple(a.values()) for a in acts] == [
        ("deployed", "1.0.0", "person:t", "c0ffee"),
        ("deployed", "1.1.0", "person:t", "c0ffee"),
        ("current", "1.0.0", "person:t", "c0ffee"),
    ]
    assert await conn.fetch("SELECT version FROM definitions WHERE is_current") == [("1.0.0",)]
    await conn.close()


async def test_a_running_instance_stays_on_its_version(schema: Tables) -> None:
    """B2: new instances start on the new version, running ones finish on theirs, on a replica that never saw it."""
    await schema.deploy(workflow_text(STEPS))
    conn = await schema.connect()
    old = await schema.store(conn)
    b = Bench(old.definitions, NOW)
    fact = b.fact("order.delayed", {"note": "n"})
    b.take(fact)
    await fold(old, conn, [fact])
    await schema.deploy(workflow_text(STEPS.replace("told", "other"), version="2.0.0"))
    new = await schema.store(conn)
    assert [d.version for d in new.definitions.by_fact["order.delayed"]] == ["2.0.0"]
    (state,) = (await fold(new, conn, [b.result(b.command("look"), output={})])).values()
    (instance,) = state.instances.values()
    assert (instance.version, instance.status) == ("1.0.0", Status.COMPLETED)
    await conn.close()


# --- the service -----------------------------------------------------------------------------------------------------


def record_of(running: Running, message: Message) -> Emission:
    """A bench message as bytes on its topic."""
    context = running.context
    record = {**message.record, "traceparent": None}
    record = {k: v for k, v in record.items() if k in context.records.schema(message.kind).field_names}
    key = record.get("instance_id") or record["business_object_id"]
    return Emission(context.topic(message.kind), key.encode(), context.records.encode(message.kind, record))


async def on(running: Running, topic: str) -> list[Message]:
    read = await kafka.read_all(running.context.settings.kafka_bootstrap, [running.context.topic(topic)])
    return [running.context.records.decode(d) for d in read]


async def dead_on(running: Running, topic: str) -> list[Delivery]:
    return await kafka.read_all(running.context.settings.kafka_bootstrap, ["dlq." + running.context.topic(topic)])


def project(folder: Path, text: str) -> Path:
    """A project folder of another team, with one workflow."""
    (folder / "workflows" / "exception").mkdir(parents=True)
    (folder / "workflows" / "exception" / "v1.yaml").write_text(text)
    (folder / "policies").mkdir()
    (folder / "policies" / "patient.yaml").write_text("retry: {attempts_max: 9}\n")
    (folder / "connectors").mkdir()
    (folder / "connectors" / "shop.yaml").write_text(
        "connector: shop\nbase_url: http://127.0.0.1:9\noperations:\n  look_up:\n    request: {method: GET, path: /x}\n"
        "    response: {output: {amount: '${ response.body.amount }'}}\n    idempotency: {strategy: none}\n"
        "    in_flight_max_s: 5\n"
    )
    (folder / "templates").mkdir()
    (folder / "templates" / "told.yaml").write_text("subject: x\ntext: x\n")
    return folder


async def test_a_fact_runs_through_and_a_deployment_is_picked_up_without_a_restart(
    stack: Stack, namespace: str, tmp_path: Path
) -> None:
    """B1, B2: fact in, command out, result in, status out; a version deployed meanwhile takes effect at once."""
    folder = project(tmp_path / "p", workflow_text(STEPS))
    given = await settings(stack, namespace, project=folder, deploy_on_start=True)
    async with open_service(SERVICE, given) as running:
        b = Bench(tables.definitions(()), running.context.clock.now())
        await running.context.publisher.publish([record_of(running, b.fact("order.delayed", {"note": "n"}))])

        async def first_command() -> list[Message]:
            return await on(running, "command.shop")

        (command,) = await until("the command", first_command)
        assert json.loads(command["body"]) == {"id": "o-1"}
        assert json.loads(command["retry"])["attempts_max"] == 9
        schema_name = running.context.schema
        conn = await connect(running.context.dsn, schema=schema_name)
        newer = workflow_text(STEPS.replace("shop.look_up", "depot.look_up"), version="1.1.0")
        await deploy(conn, schema_name, newer, PATIENT, by="person:t", commit="new")
        await conn.close()

        async def second_command() -> list[Message]:
            b.object_id = uuid.uuid4().hex  # one that started on the old version ignores further facts
            await running.context.publisher.publish([record_of(running, b.fact("order.delayed", {"note": "m"}))])
            return await on(running, "command.depot")

        await until("a command of the new version", second_command, every_s=0.5)
        result = {
            **{n: command[n] for n in ("correlation_id", "actor", "business_object_type", "business_object_id")},
            **{n: command[n] for n in ("instance_id", "instance_seq", "step", "idempotency_key")},
            "ce_type": "shop.looked_up", "command_id": str(command.id), "outcome": "done", "output": b'{"amount":1}',
            "attempts": 1, "duration_ms": 5, "epoch": 1,
        }  # fmt: skip
        b.object_id = command["business_object_id"]
        await running.context.publisher.publish([record_of(running, b._message("result", "t", result))])

        async def completed() -> list[Message]:
            told = await on(running, "status")
            return [m for m in told if m["status"] == "completed" and m["instance_id"] == command["instance_id"]]

        (status,) = await until("the status", completed)
        assert (status["workflow_version"], status["instance_seq"], status["step"]) == ("1.0.0", 2, "tell")
        note = await running.context.pool.fetchval("SELECT note FROM ledger WHERE kind = 'result'")
        assert json.loads(note)["seq"] == 2
        assert json.loads(note)["commit"] == "development"


async def test_a_kept_fact_goes_to_the_dlq_at_its_horizon(stack: Stack, namespace: str) -> None:
    """DESIGN 4: at the horizon a fact that nobody asked for is on the DLQ, stale, and its ledger row is dead."""
    given = await settings(stack, namespace, kept_horizon_s=0.5)
    async with open_service(SERVICE, given) as running:
        b = Bench(tables.definitions(()), running.context.clock.now())
        sent = record_of(running, b.fact("order.paid", {"sum": 1}))
        await running.context.publisher.publish([sent])

        async def dead() -> list[Delivery]:
            return await dead_on(running, "fact")

        (record,) = await until("the DLQ record", dead)
        assert (record.key, record.value) == (sent.key, sent.value)
        assert record.header("factmesh-dlq-reason") == "stale"
        pool = running.context.pool
        assert await pool.fetchval("SELECT disposition FROM ledger WHERE kind = 'fact'") == "dead"
        assert await pool.fetchval("SELECT waiting FROM business_objects") is None


async def test_a_park_that_knows_only_the_instance_finds_it(stack: Stack, namespace: str, tmp_path: Path) -> None:
    """H1: bytes that nobody can decode, on a topic keyed by the instance, park that instance."""
    folder = project(tmp_path / "p", workflow_text(STEPS))
    given = await settings(stack, namespace, project=folder, deploy_on_start=True)
    async with open_service(SERVICE, given) as running:
        b = Bench(tables.definitions(()), running.context.clock.now())
        await running.context.publisher.publish([record_of(running, b.fact("order.delayed", {"note": "n"}))])

        async def commands() -> list[Message]:
            return await on(running, "command.shop")

        (command,) = await until("the command", commands)
        torn = Emission(running.context.topic("result"), command["instance_id"].encode(), b"\x00torn")
        unknown = Emission(running.context.topic("result"), str(uuid.uuid4()).encode(), b"torn")
        await running.context.publisher.publish([torn, unknown])

        async def parked() -> list[Message]:
            return [m for m in await on(running, "status") if m["status"] == "parked"]

        (status,) = await until("the parked status", parked)
        assert status["instance_id"] == command["instance_id"]
        assert await running.context.pool.fetchval("SELECT count(*) FROM attention") == 1


async def test_an_instance_past_its_maximum_age_is_signalled_once(stack: Stack, namespace: str, tmp_path: Path) -> None:
    """DESIGN 8: past the declared maximum age an instance needs a person, whichever replica finds it."""
    folder = project(tmp_path / "p", workflow_text(STEPS, extra="maxAge: PT1H"))
    given = await settings(stack, namespace, project=folder, deploy_on_start=True)
    async with open_service(SERVICE, given) as running:
        b = Bench(tables.definitions(()), running.context.clock.now())
        await running.context.publisher.publish([record_of(running, b.fact("order.delayed", {"note": "n"}))])

        async def commands() -> list[Message]:
            return await on(running, "command.shop")

        (command,) = await until("the command", commands)
        store = Store(default_expressions())
        store.use(await store.read_current(running.context.pool))
        assert await Ageing(running.context, store).sweep(running.context.clock.now()) == 0
        clock = ManualClock(running.context.clock.now())
        clock.advance(3601)
        for _ in range(2):
            assert await Ageing(running.context, store).sweep(clock.now()) == 1
        signals = await on(running, "signal")
        assert len(signals) == 2
        assert len({m.id for m in signals}) == 1
        assert {m["instance_id"] for m in signals} == {command["instance_id"]}
