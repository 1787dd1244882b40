"""The connector service on a real broker and database against the sandbox: what it does is judged by the sandbox's own
log, what it says by its results and DLQ records.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest

from factmesh import dlq, ids, kafka, postgres, topics
from factmesh.effects import Publish
from factmesh.emitting import Cause
from factmesh.errors import SettingsError
from factmesh.message import Message, to_ms
from factmesh.service import Running, open_service
from factmesh.stack import Stack
from factmesh_connector.service import SERVICE, ConnectorSettings
from factmesh_sandbox.log import Log, open_log

pytestmark = pytest.mark.stack

SANDBOX = """
sandbox: 1
seed: 5
systems:
  - name: keyed
    auth: {bearer: token-for-the-sandbox-only}
    idempotency: honour
    operations:
      - name: do
        method: POST
        path: /do
        subject: body.id
        request: {required: {id: string}}
        rules:
          - when: {body.id: [refuse-me]}
            refuse: {status: 422, title: refused}
          - values: {}
        effect: deed
        effect_id: 'd-{effect.number}'
        response: {deed: '{effect.id}'}
  - name: asked
    idempotency: naive
    operations:
      - {name: do, method: POST, path: /do, subject: body.id, effect: deed, effect_id: 'd-{effect.number}',
         response: {deed: '{effect.id}'}}
      - {name: find, method: GET, path: /do, subject: query.ref, lookup: {effect: deed, by: ref, value: query.ref},
         response: {items: '{items}'}}
  - name: blind
    idempotency: naive
    operations:
      - {name: do, method: POST, path: /do, subject: body.id, effect: deed, effect_id: 'd-{effect.number}',
         response: {deed: '{effect.id}'}}
"""

OPERATION = """
connector: {name}
base_url: ref+env://{NAME}_URL
auth: {{bearer: ref+env://CONNECTOR_TEST_TOKEN}}
timeout_s: 0.8
operations:
  do:
    request: {{method: POST, path: /do, body: {{id: '${{ input.id }}', ref: '${{ input.id }}'}}}}
    response: {{output: {{deed: '${{ response.body.deed }}'}}}}
    idempotency: {idempotency}
    in_flight_max_s: 1.5
    retry: {{attempts_max: 4, base_s: 0.2, delay_max_s: 1, total_max_s: 30}}
"""
STRATEGIES = {
    "keyed": "{strategy: key, key_valid_s: 600}",
    "asked": "{strategy: lookup, request: {method: GET, path: /do, query: {ref: '${ input.id }'}},"
    " found: '${ size(response.body.items) > 0 }', output: {deed: '${ response.body.items[0].deed }'}}",
    "blind": "{strategy: none}",
}
TOKEN = "token-for-the-sandbox-only"


@dataclass
class Sandbox:
    said: dict[str, Any]
    path: Path

    def log(self) -> Log:
        return open_log(self.path)

    def effects(self, subject: str) -> int:
        with self.log() as log:
            return sum(1 for e in log.effects() if e.subject == subject)

    def calls(self, system: str, subject: str, operation: str = "do") -> list[Any]:
        with self.log() as log:
            return [c for c in log.calls(system) if c.subject == subject and c.operation == operation]

    def faults(self, system: str, *rules: Mapping[str, Any]) -> None:
        answer = httpx2.put(f"{self.said['http']}/_faults/{system}", json=list(rules), timeout=5)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    (folder / "sandbox.yaml").write_text(SANDBOX)
    announce = folder / "announce.json"
    command = [sys.executable, "-m", "factmesh_sandbox", "--config", str(folder / "sandbox.yaml")]
    command += ["--log", str(folder / "log.sqlite"), "--announce", str(announce)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not announce.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield Sandbox(json.loads(announce.read_text()), folder / "log.sqlite")
    process.terminate()
    process.wait(10)
    shutil.rmtree(folder)


@dataclass
class Mesh:
    """One connector service of a namespace, and what stands around it."""

    stack: Stack
    running: Running
    sent: int = 0
    roots: list[str] = field(default_factory=list)

    async def publish(self, connector: str, record: str, body: Mapping[str, Any]) -> UUID:
        """One record on a command topic, with the envelope that the orchestrator would give it."""
        context = self.running.context
        self.sent += 1
        now = context.clock.now()
        id_ = ids.message_id("test", f"{context.group}:{self.sent}", 0, 0, to_ms(now))
        about = {
            "correlation_id": str(ids.correlation_id("test", str(self.sent))), "actor": "service:test",
            "business_object_type": "thing", "business_object_id": "thing-1", "instance_seq": 1,
            "instance_id": body.get("instance_id") or str(ids.instance_id("flow", id_)),
        }  # fmt: skip
        cause = Cause(f"id:{id_}", 0, to_ms(now), str(id_), about, "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
        publish = Publish(f"command.{connector}", record, about["instance_id"], body, id=id_)
        await context.publisher.publish([context.emitter.emit(publish, cause, 0, now)])
        return id_

    async def command(self, connector: str, input: Mapping[str, Any] | bytes, **more: Any) -> UUID:
        body = {
            "workflow": "flow", "workflow_version": "1.0.0", "step": "doing", "iteration": 0, "run": 0,
            "connector": connector, "operation": "do", "deadline": None, "retry": None,
            "idempotency_key": str(ids.idempotency_key(ids.instance_id("flow", _seed(self.sent)), "doing", 0, 0)),
            "body": input if isinstance(input, bytes) else json.dumps(input).encode(),
        }  # fmt: skip
        return await self.publish(connector, "command", {**body, **more})

    async def resolve(self, connector: str, command_id: UUID, verdict: str, **more: Any) -> UUID:
        body = {
            "command_id": str(command_id), "verdict": verdict, "output": None, "reason": "looked", "opening": 0,
            "entered_at": to_ms(self.running.context.clock.now()),
        }  # fmt: skip
        return await self.publish(connector, "resolution", {**body, **more})

    async def messages(self, short: str) -> list[Message]:
        context = self.running.context
        found = await kafka.read_all(self.stack.bootstrap, [context.topic(short)])
        return [context.records.decode(d) for d in found]

    async def dead(self, connector: str) -> list[dlq.DeadRecord]:
        name = topics.dlq_of(self.running.context.topic(f"command.{connector}"))
        return [dlq.parse(d) for d in await kafka.read_all(self.stack.bootstrap, [name])]

    async def result(self, command_id: UUID, n: int = 1) -> Mapping[str, Any]:
        """The result of a command; exactly `n` of them are there."""

        async def there() -> list[Message]:
            return [m for m in await self.messages("result") if m["command_id"] == str(command_id)]

        found = await until(there, lambda found: len(found) >= n)
        assert len(found) == n
        return found[-1].record

    async def death(self, connector: str, n: int = 1) -> dlq.DeadRecord:
        """The newest of exactly `n` dead records."""
        found = await until(lambda: self.dead(connector), lambda found: len(found) >= n)
        assert len(found) == n
        newest: dlq.DeadRecord = max(found, key=lambda record: record.dead.failed_at)
        return newest

    async def row(self, command_id: UUID) -> Any:
        return await self.running.context.pool.fetchrow("SELECT * FROM claims WHERE id = $1", command_id)


def _seed(n: int) -> UUID:
    return ids.message_id("test", str(n), 0, 0, int(time.time() * 1000))


async def until(look: Callable[[], Any], holds: Callable[[Any], bool], timeout_s: float = 20) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        found = await look()
        if holds(found):
            return found
        assert time.monotonic() < deadline, f"not in time; last seen: {found}"
        await asyncio.sleep(0.1)


@pytest.fixture
def project() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    (folder / "connectors").mkdir()
    for name, idempotency in STRATEGIES.items():
        text = OPERATION.format(name=name, NAME=name.upper(), idempotency=idempotency)
        (folder / "connectors" / f"{name}.yaml").write_text(text)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def settings(
    stack: Stack, namespace: str, sandbox: Sandbox, project: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ConnectorSettings]:
    for name, url in sandbox.said["systems"].items():
        monkeypatch.setenv(f"{name.upper()}_URL", url)
        sandbox.faults(name)
    monkeypatch.setenv("CONNECTOR_TEST_TOKEN", TOKEN)
    schema = f"{namespace}_connector"
    dsn = await stack.provide_schema(schema)
    yield ConnectorSettings(
        kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, namespace=namespace, project=project  # type: ignore[arg-type]
    )
    await postgres.drop_role_and_schema(stack.postgres_dsn, schema, schema)


@pytest.fixture
async def mesh(stack: Stack, settings: ConnectorSettings) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as opened:
        yield Mesh(stack, await opened.enter_async_context(open_service(SERVICE, settings, http=False)))


@pytest.mark.parametrize("connector", list(STRATEGIES))
async def test_a_command_becomes_one_effect_and_one_result(mesh: Mesh, sandbox: Sandbox, connector: str) -> None:
    """C1, C7, INV-X: undisturbed, each strategy calls once, with key, correlation id and trace, and records it."""
    name = f"plain-{connector}-{mesh.running.context.schema}"
    command_id = await mesh.command(connector, {"id": name})
    result = await mesh.result(command_id)
    assert (result["outcome"], result["attempts"], result["verdict"]) == ("done", 1, None)
    assert json.loads(result["output"])["deed"].startswith("d-")
    assert sandbox.effects(name) == 1
    (call,) = sandbox.calls(connector, name)
    assert call.idempotency_key == result["idempotency_key"]
    assert call.correlation_id == result["correlation_id"]
    assert call.traceparent.split("-")[1] == "a" * 32
    recorded = await mesh.running.context.pool.fetch("SELECT what, ended FROM calls WHERE command_id = $1", command_id)
    assert [tuple(r) for r in recorded] == [("call", "done")]


@pytest.mark.parametrize("fault", ["throttled", "unavailable"])
@pytest.mark.parametrize("connector", list(STRATEGIES))
async def test_known_failures_are_retried(mesh: Mesh, sandbox: Sandbox, connector: str, fault: str) -> None:
    """C3, C4: a refusal that says "later" waits as a row, as long as it asks for, and then works; nothing is asked."""
    name = f"{fault}-{connector}-{mesh.running.context.schema}"
    sandbox.faults(connector, {"fault": fault, "subjects": [name], "attempts": 1, "retry_after_s": 1})
    result = await mesh.result(await mesh.command(connector, {"id": name}))
    assert (result["outcome"], result["attempts"]) == ("done", 2)
    first, second = sandbox.calls(connector, name)
    assert (second.at - first.at).total_seconds() >= 1.0
    assert sandbox.effects(name) == 1
    if connector == "asked":
        assert sandbox.calls(connector, name, "find") == []


@pytest.mark.parametrize("fault", ["reset_before", "reset_after", "no_answer", "malformed", "partial", "server_error"])
@pytest.mark.parametrize("connector", ["keyed", "asked"])
async def test_what_may_have_worked_is_made_safe(mesh: Mesh, sandbox: Sandbox, connector: str, fault: str) -> None:
    """⚑ C2, INV-X: with a key it is repeated under the key, with a look-up it is asked first; one effect either way."""
    name = f"{fault}-{connector}-{mesh.running.context.schema}"
    sandbox.faults(connector, {"fault": fault, "subjects": [name], "attempts": 1, "operations": ["do"]})
    result = await mesh.result(await mesh.command(connector, {"id": name}))
    assert result["outcome"] == "done"
    assert sandbox.effects(name) == 1
    assert len({c.idempotency_key for c in sandbox.calls(connector, name)}) == 1
    if connector == "asked":
        asked = sandbox.calls(connector, name, "find")
        calls = sandbox.calls(connector, name)
        assert asked, "it was not asked"
        worked = fault not in ("reset_before", "server_error")
        assert len(calls) == (1 if worked else 2)
        if not worked:
            # ⚑ Absent counted only after in_flight_max_s.
            assert (calls[1].at - calls[0].at).total_seconds() >= 1.5


@pytest.mark.parametrize(("fault", "effects"), [("no_answer", 1), ("reset_after", 1), ("hang", 0), ("server_error", 0)])
async def test_what_cannot_be_repeated_parks_as_unknown(
    mesh: Mesh, sandbox: Sandbox, fault: str, effects: int
) -> None:
    """⚑ C2: `none` is called once; no result, a DLQ record with the command byte for byte, and its instance parked."""
    name = f"{fault}-blind-{mesh.running.context.schema}"
    sandbox.faults("blind", {"fault": fault, "subjects": [name]})
    command_id = await mesh.command("blind", {"id": name})
    death = await mesh.death("blind")
    assert (str(death.dead.reason), death.dead.command_id, death.dead.step) == ("unknown", command_id, "doing")
    (command,) = await kafka.read_all(mesh.stack.bootstrap, [mesh.running.context.topic("command.blind")])
    assert (death.dead.original.value, death.dead.original.key) == (command.value, command.key)
    assert name not in death.dead.message
    assert TOKEN not in repr(death)
    (parked,) = await until(lambda: mesh.messages("signal"), bool)
    assert parked["signal"] == "message_parked"
    assert json.loads(parked["body"])["command_id"] == str(command_id)
    assert (await mesh.row(command_id))["state"] == "unknown"
    assert await mesh.messages("result") == []
    assert len(sandbox.calls("blind", name)) == 1
    assert sandbox.effects(name) == effects


async def test_an_unknown_is_resolved_as_happened_once(mesh: Mesh, sandbox: Sandbox) -> None:
    """E2, ⚑ DESIGN 9: `happened` with its output ends it `done` under a raised epoch; a second one is refused."""
    name = f"happened-{mesh.running.context.schema}"
    sandbox.faults("blind", {"fault": "no_answer", "subjects": [name]})
    command_id = await mesh.command("blind", {"id": name})
    await mesh.death("blind")
    await mesh.resolve("blind", command_id, "happened", output=b'{"wrong": 1}')
    refused = await mesh.death("blind", 2)
    assert "lacks deed" in refused.dead.message
    await mesh.resolve("blind", command_id, "happened", output=b'{"deed": "d-9"}')
    result = await mesh.result(command_id)
    assert (result["outcome"], result["verdict"], json.loads(result["output"])) == ("done", "happened", {"deed": "d-9"})
    await mesh.resolve("blind", command_id, "not_happened")
    refused = await mesh.death("blind", 3)
    assert "is done, not unknown" in refused.dead.message
    await mesh.result(command_id, 1)
    assert len(sandbox.calls("blind", name)) == 1


async def test_not_happened_counts_only_after_the_time_in_flight(mesh: Mesh, sandbox: Sandbox) -> None:
    """⚑ DESIGN 5, 9: said too early it is refused with the instant from which it counts; later it ends `failed`."""
    name = f"not-{mesh.running.context.schema}"
    sandbox.faults("blind", {"fault": "hang", "subjects": [name]})
    command_id = await mesh.command("blind", {"id": name})
    await mesh.death("blind")
    await mesh.resolve("blind", command_id, "not_happened")
    refused = await mesh.death("blind", 2)
    assert "may still be in flight" in refused.dead.message
    await asyncio.sleep(1.6)
    await mesh.resolve("blind", command_id, "not_happened")
    result = await mesh.result(command_id)
    assert (result["outcome"], result["verdict"], result["epoch"]) == ("failed", "not_happened", 2)


async def test_a_known_refusal_fails_and_lies_in_quarantine(mesh: Mesh, sandbox: Sandbox) -> None:
    """C3, E1: what is refused for certain ends `failed` after one call: a result, and a DLQ record to act upon."""
    command_id = await mesh.command("keyed", {"id": "refuse-me"})
    result = await mesh.result(command_id)
    assert (result["outcome"], result["error_class"], result["attempts"]) == ("failed", "validation", 1)
    assert "keyed.do answered 422" in result["error_message"]
    death = await mesh.death("keyed")
    assert (str(death.dead.reason), death.dead.command_id) == ("exhausted", command_id)


async def test_retries_end_with_the_policy(mesh: Mesh, sandbox: Sandbox) -> None:
    """C4, INV-B, ⚑: the step's own policy caps the calls; known failures end `failed`, a maybe ends unknown."""
    sure = f"sure-{mesh.running.context.schema}"
    maybe = f"maybe-{mesh.running.context.schema}"
    rules = [{"fault": "unavailable", "subjects": [sure]}, {"fault": "reset_after", "subjects": [maybe]}]
    sandbox.faults("keyed", *rules)
    policy = json.dumps({"attempts_max": 2, "base_s": 0.1}).encode()
    result = await mesh.result(await mesh.command("keyed", {"id": sure}, retry=policy))
    assert (result["outcome"], result["attempts"]) == ("failed", 2)
    assert "all 2 attempts are used up" in result["error_message"]
    other = await mesh.command("keyed", {"id": maybe}, retry=policy)
    await mesh.death("keyed", 2)
    assert (await mesh.row(other))["state"] == "unknown"
    assert len(sandbox.calls("keyed", maybe)) == 2
    assert sandbox.effects(maybe) == 1


async def test_no_attempt_begins_after_the_deadline(mesh: Mesh, sandbox: Sandbox) -> None:
    """B4, C4: a command that comes too late is not called, and is told as failed for certain."""
    name = f"late-{mesh.running.context.schema}"
    late = to_ms(mesh.running.context.clock.now()) - 1
    result = await mesh.result(await mesh.command("blind", {"id": name}, deadline=late))
    assert (result["outcome"], result["attempts"]) == ("failed", 0)
    assert "deadline" in result["error_message"]
    assert sandbox.calls("blind", name) == []


async def test_the_look_up_is_asked_once_more_after_the_deadline(mesh: Mesh, sandbox: Sandbox) -> None:
    """⚑ DESIGN 5: a deadline does not make a maybe a failure: it is asked, and found it is done."""
    name = f"once-more-{mesh.running.context.schema}"
    sandbox.faults("asked", {"fault": "no_answer", "subjects": [name], "operations": ["do"]})
    deadline = to_ms(mesh.running.context.clock.now()) + 3_000
    policy = json.dumps({"base_s": 4}).encode()
    result = await mesh.result(await mesh.command("asked", {"id": name}, deadline=deadline, retry=policy))
    assert (result["outcome"], result["attempts"]) == ("done", 1)
    assert len(sandbox.calls("asked", name)) == 1
    (asked,) = sandbox.calls("asked", name, "find")
    assert to_ms(asked.at) > deadline


async def test_one_key_carries_one_body(mesh: Mesh, sandbox: Sandbox) -> None:
    """INV-K: another body under a key dies as a conflict; only a known failure frees the key."""
    name = f"key-{mesh.running.context.schema}"
    key = str(ids.idempotency_key(ids.instance_id("flow", _seed(99)), "doing", 0, 0))
    await mesh.result(await mesh.command("keyed", {"id": name}, idempotency_key=key))
    await mesh.command("keyed", {"id": name + "-other"}, idempotency_key=key)
    death = await mesh.death("keyed")
    assert str(death.dead.reason) == "conflict"
    assert "another body" in death.dead.message
    await mesh.command("keyed", {"id": name}, idempotency_key=key)
    assert "belongs to command" in (await mesh.death("keyed", 2)).dead.message
    assert sandbox.calls("keyed", name + "-other") == []
    failed = str(ids.idempotency_key(ids.instance_id("flow", _seed(98)), "doing", 0, 0))
    await mesh.result(await mesh.command("keyed", {"id": "refuse-me"}, idempotency_key=failed))
    result = await mesh.result(await mesh.command("keyed", {"id": name + "-new"}, idempotency_key=failed))
    assert result["outcome"] == "done"


async def test_a_held_key_stops_nobody_else(mesh: Mesh, sandbox: Sandbox) -> None:
    """INV-K, INV-P: keys are inserted without being looked for; where one is held, the batch is judged again, that
    command alone dies, and every other of its batch has its one effect."""
    name = f"among-{mesh.running.context.schema}"
    keys = [str(ids.idempotency_key(ids.instance_id("flow", _seed(n)), "doing", 0, 0)) for n in range(200, 216)]
    await mesh.result(await mesh.command("keyed", {"id": name}, idempotency_key=keys[0]))
    await asyncio.gather(
        *(mesh.command("keyed", {"id": f"{name}-{n}"}, idempotency_key=key) for n, key in enumerate(keys))
    )
    found = await until(lambda: mesh.messages("result"), lambda found: len(found) >= len(keys))
    assert [m["outcome"] for m in found] == ["done"] * len(keys)
    assert "another body" in (await mesh.death("keyed")).dead.message
    assert [sandbox.effects(f"{name}-{n}") for n in range(len(keys))] == [0] + [1] * (len(keys) - 1)


async def test_a_command_that_never_became_a_row_is_discarded(mesh: Mesh) -> None:
    """⚑ DESIGN 9: discarding a command that died at once ends it with a result; a live one is refused."""
    command_id = await mesh.command("keyed", {"id": "x"}, operation="nowhere")
    death = await mesh.death("keyed")
    assert "no operation keyed.nowhere is declared" in death.dead.message
    await mesh.resolve("keyed", command_id, "discarded")
    result = await mesh.result(command_id)
    assert (result["outcome"], result["verdict"], result["epoch"]) == ("failed", "discarded", 0)
    done = await mesh.command("keyed", {"id": f"live-{mesh.running.context.schema}"})
    await mesh.result(done)
    await mesh.resolve("keyed", done, "discarded")
    assert "cannot be discarded" in (await mesh.death("keyed", 2)).dead.message


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"body": b"[1]"}, "body is not a JSON object"),
        ({"body": b"{"}, "body is not JSON"),
        ({"retry": b'{"attempts_max": 0}'}, "its retry policy is not one: attempts_max"),
    ],
)
async def test_a_bad_command_dies_with_its_reason(mesh: Mesh, more: dict[str, Any], text: str) -> None:
    """Issue 6, bad input: a command that cannot be understood lies on the DLQ, and nothing is called."""
    await mesh.command("keyed", **{"input": {"id": "x"}, **more} if "body" not in more else {"input": more["body"]})
    death = await mesh.death("keyed")
    assert text in death.dead.message
    assert str(death.dead.reason) == "validation"


async def cut_off(mesh: Mesh, system: str) -> None:
    """As a kill does in the middle of a call: no task gets to say anything more; the settlement never happens."""
    loop = mesh.running.context.claims.loops[f"attempt.{system}"]
    deadline = time.monotonic() + 30
    while not loop._working:
        assert time.monotonic() < deadline, f"nothing was attempted at {system}"
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)  # so that the call is on its way
    assert loop._working, "the call was over before it could be cut off"
    for task in list(loop._workers):
        task.cancel()


async def test_an_attempt_that_was_cut_off_is_judged_by_its_strategy(
    stack: Stack, settings: ConnectorSettings, sandbox: Sandbox
) -> None:
    """⚑ B2, C2, INV-F: a process that dies in a call leaves a lease that ends; then `none` is unknown, `lookup` asks,
    `key` repeats — one effect at most, and never a result from the dead attempt."""
    name = f"cut-{settings.namespace}"
    slow = {"fault": "slow", "subjects": [name], "attempts": 1, "delay_s": 0.7, "operations": ["do"]}
    for system in STRATEGIES:
        sandbox.faults(system, slow)
    async with AsyncExitStack() as first:
        mesh = Mesh(stack, await first.enter_async_context(open_service(SERVICE, settings, http=False)))
        commands = {}
        # One after another: on a slow machine the first call was over before the third had begun.
        for system in STRATEGIES:
            commands[system] = await mesh.command(system, {"id": name})
            await cut_off(mesh, system)
        await mesh.running.context.pool.execute("UPDATE claims SET due_at = now() + interval '1 second'")
        await asyncio.sleep(1.1)
        results = {system: await mesh.result(commands[system]) for system in ("keyed", "asked")}
        assert {r["outcome"] for r in results.values()} == {"done"}
        death = await mesh.death("blind")
        assert (str(death.dead.reason), death.dead.command_id) == ("unknown", commands["blind"])
        assert "cut off" in death.dead.message
        for system in STRATEGIES:
            with sandbox.log() as log:
                assert sum(1 for e in log.effects() if e.subject == name and e.system == system) <= 1
        assert len(sandbox.calls("blind", name)) <= 1


async def test_a_connector_without_its_secret_does_not_start(
    settings: ConnectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 6, bad input: a missing secret is named, with the file and line, before anything is consumed."""
    monkeypatch.delenv("CONNECTOR_TEST_TOKEN")
    with pytest.raises(SettingsError, match=r"ref\+env://CONNECTOR_TEST_TOKEN cannot be resolved") as caught:
        async with open_service(SERVICE, settings, http=False):
            pass
    assert "keyed.yaml:4" in str(caught.value)
