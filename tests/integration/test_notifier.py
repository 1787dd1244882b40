"""The notifier on a real broker, a real database and the sandbox's mail server and webhook receiver.
What was sent is judged by the sandbox's own log, never by what the notifier says of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from aiokafka import AIOKafkaConsumer
from pydantic import SecretStr
from tests.support.waiting import until

from factmesh import claims, dlq, ids
from factmesh.effects import Schedule
from factmesh.http_client import HttpClient
from factmesh.message import Delivery, Emission, Message
from factmesh.project import Project
from factmesh.service import Running, open_service
from factmesh.stack import Stack
from factmesh.templates import Templates
from factmesh_notifier import channels
from factmesh_notifier.decide import decide
from factmesh_notifier.model import Catalogue, State
from factmesh_notifier.service import SERVICE, NotifierSettings
from factmesh_sandbox.log import open_log

pytestmark = pytest.mark.stack

SECRET = "whsec_dGVzdC1zZWNyZXQtdGVzdC1zZWNyZXQ="
SANDBOX = f"""
sandbox: 1
seed: 3
webhooks:
  - {{name: hooks, secret: {SECRET}}}
"""
CHANNELS = """
channels:
  email:
    kind: smtp
    host: 127.0.0.1
    port: 'ref+env://SMTP_PORT'
    security: none
    from: 'Team <team@mesh.example>'
    timeout_s: 2
    in_flight_max_s: 0
    retry: {attempts_max: 3, base_s: 0.05, delay_max_s: 0.1, total_max_s: 20}
  hooks:
    kind: webhook
    url: 'ref+env://HOOKS_URL'
    secret: 'ref+env://HOOKS_SECRET'
    timeout_s: 2
    retry: {attempts_max: 3, base_s: 0.05, delay_max_s: 0.1, total_max_s: 20}
owners:
  - {name: attention, workflow: shipping, statuses: [parked], channel: hooks, to: shipping-team}
"""
WELCOME = """
subject: 'Hello {{ data.name }}'
text: |
  Dear {{ data.name }}, this is about {{ mesh.business_object_id }}.
"""


@dataclass
class Sandbox:
    """The systems outside, and the file that says what was really done."""

    process: subprocess.Popen[bytes]
    said: Mapping[str, Any]
    log_path: Path

    async def faults(self, system: str, *rules: Mapping[str, Any]) -> None:
        async with httpx2.AsyncClient(base_url=self.said["http"]) as client:
            answer = await client.put(f"/_faults/{system}", json=list(rules))
            assert answer.status_code == 200, answer.text

    def mails(self, to: str) -> list[Any]:
        with open_log(self.log_path) as log:
            return log.mails(to)

    def mail_attempts(self, to: str) -> int:
        with open_log(self.log_path) as log:
            return len(log.calls("mail", subject=to))

    def hooks(self, id_: UUID | None = None) -> list[Any]:
        with open_log(self.log_path) as log:
            return log.webhooks("hooks", webhook_id=str(id_) if id_ is not None else None)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    (folder / "sandbox.yaml").write_text(SANDBOX, encoding="utf-8")
    announce = folder / "announce.json"
    command = [sys.executable, "-m", "factmesh_sandbox", "--config", str(folder / "sandbox.yaml")]
    command += ["--log", str(folder / "log.sqlite"), "--announce", str(announce)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not announce.exists():
            assert process.poll() is None, "the sandbox ended at start"
            assert time.monotonic() < deadline, "the sandbox announced nothing"
            time.sleep(0.02)
        yield Sandbox(process, json.loads(announce.read_text()), folder / "log.sqlite")
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


@dataclass
class Mesh:
    """One running notifier, and clients beside it."""

    running: Running
    stack: Stack
    prefix: str
    sent: dict[UUID, Emission] = field(default_factory=dict)

    def command(self, *, id_: UUID | None = None, instance: UUID | None = None, **body: Any) -> UUID:
        """A command as the orchestrator emits it, to be published; its id."""
        now = self.now_ms()
        id_ = id_ or ids.entrance_id("test", str(uuid4()), now)
        instance = instance or ids.entrance_id("test.instance", str(id_), now)
        record = {
            **self.envelope(id_, instance, "notifier.notify"),
            "workflow_version": "1.0.0",
            "step": "welcome",
            "iteration": 0,
            "run": 1,
            "connector": "notifier",
            "operation": "notify",
            "idempotency_key": str(ids.entrance_id("key", str(id_), now)),
            "body": json.dumps({"template": "welcome", "channel": "email", "data": {"name": "Ada"}, **body}).encode(),
        }
        self.sent[id_] = self.emission("command.notifier", "command", instance, record)
        return id_

    def envelope(self, id_: UUID, instance: UUID, type_: str) -> dict[str, Any]:
        return {
            "ce_id": str(id_),
            "ce_source": "/test",
            "ce_type": type_,
            "ce_time": self.now_ms(),
            "cause_id": "test",
            "correlation_id": f"corr-{id_}",
            "actor": "test",
            "business_object_type": "parcel",
            "business_object_id": "P-1",
            "instance_id": str(instance),
            "instance_seq": 3,
            "workflow": "shipping",
        }

    def now_ms(self) -> int:
        return int(self.running.context.clock.now().timestamp() * 1000)

    def emission(self, topic: str, kind: str, instance: UUID, record: Mapping[str, Any]) -> Emission:
        context = self.running.context
        return Emission(context.topic(topic), str(instance).encode(), context.records.encode(kind, record))

    def row(self, id_: UUID) -> Schedule:
        """The row that a command becomes, by the service's own decision."""
        context, e = self.running.context, self.sent[id_]
        message = context.records.decode(Delivery(e.topic, 0, 0, e.key, e.value))
        project = context.settings.project
        assert project is not None
        wired = channels.load(project, http=HttpClient(), clock=context.clock)
        render = Templates(Project.load(project).template_files).render
        catalogue = Catalogue(wired.channels, render)
        _, effects = decide(catalogue, State(), message, context.clock.now())
        (row,) = (e for e in effects if isinstance(e, Schedule))
        return row

    async def publish(self, *emissions: Emission) -> None:
        await self.running.context.publisher.publish(list(emissions))

    async def ask(self, **body: Any) -> UUID:
        id_ = self.command(**body)
        await self.publish(self.sent[id_])
        return id_

    async def resolve(self, letter: dlq.DeadLetter, verdict: str, opening: int) -> None:
        """A person's word, as the tool publishes it."""
        now = self.now_ms()
        assert letter.instance_id is not None
        record = {
            **self.envelope(ids.entrance_id("word", str(uuid4()), now), letter.instance_id, "factmesh.resolution"),
            "command_id": str(letter.command_id),
            "verdict": verdict,
            "reason": "looked",
            "entered_at": now,
            "record_id": str(ids.record_id(letter.root, letter.group)),
            "opening": opening,
        }
        record.pop("workflow")
        await self.publish(self.emission("command.notifier", "resolution", letter.instance_id, record))

    async def state(self, id_: UUID) -> str | None:
        async with self.running.context.pool.acquire() as conn, conn.transaction():
            row = (await claims.lock(conn, [id_])).get(id_)
        return row.state if row is not None else None

    async def until_state(self, id_: UUID, *states: str) -> str:
        async def reached() -> str | None:
            state = await self.state(id_)
            return state if state in states else None

        return str(await until(f"{id_} is one of {states}", reached))

    async def read(self, topic: str, count: int) -> list[Delivery]:
        """The first `count` records of a topic by another client, and that there are no more."""
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=self.stack.bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        found: list[Delivery] = []
        deadline = time.monotonic() + 20
        try:
            while len(found) < count and time.monotonic() < deadline:
                found += _deliveries(await consumer.getmany(timeout_ms=200))
            found += _deliveries(await consumer.getmany(timeout_ms=400))
        finally:
            await consumer.stop()
        assert len(found) == count, f"{topic}: {len(found)} records, {count} expected"
        return found

    async def letters(self, count: int, topic: str = "command.notifier") -> list[dlq.DeadLetter]:
        found = await self.read(f"dlq.{self.running.context.topic(topic)}", count)
        return [dlq.parse(d).dead for d in found]

    async def signals(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        found = await self.read(self.running.context.topic("signal"), count)
        messages: list[Message] = [self.running.context.records.decode(d) for d in found]
        return [(m["signal"], json.loads(m["body"])) for m in messages]


def _deliveries(batch: Mapping[Any, Any]) -> list[Delivery]:
    return [
        Delivery(r.topic, r.partition, r.offset, r.key, r.value, tuple(r.headers), r.timestamp)
        for records in batch.values()
        for r in records
    ]


@contextlib.asynccontextmanager
async def notifier(
    stack: Stack, namespace: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Mesh]:
    monkeypatch.setenv("SMTP_PORT", str(sandbox.said["smtp_port"]))
    monkeypatch.setenv("HOOKS_URL", sandbox.said["http"] + "/hooks")
    monkeypatch.setenv("HOOKS_SECRET", SECRET)
    project = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    try:
        (project / "templates").mkdir()
        (project / "templates" / "welcome.yaml").write_text(WELCOME, encoding="utf-8")
        (project / "channels.yaml").write_text(CHANNELS, encoding="utf-8")
        dsn = await stack.provide_schema(f"{namespace}_notifier")
        settings = NotifierSettings(
            namespace=namespace, project=project, kafka_bootstrap=stack.bootstrap, postgres_dsn=SecretStr(dsn)
        )
        async with open_service(SERVICE, settings) as running:
            yield Mesh(running, stack, settings.topic_prefix)
    finally:
        shutil.rmtree(project)


@pytest.fixture
async def mesh(stack: Stack, namespace: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    async with notifier(stack, namespace, sandbox, monkeypatch) as opened:
        yield opened


def someone() -> str:
    return f"{uuid4().hex[:12]}@example.org"


# --- mail ------------------------------------------------------------------------------------------------------------


async def test_a_notification_is_mailed_once_however_often_it_comes(mesh: Mesh, sandbox: Sandbox) -> None:
    """D1, D2: rendered, with the ids that find it again; redelivery and repeats never send a second one."""
    to = someone()
    id_ = await mesh.ask(to=to)
    assert await mesh.until_state(id_, "done", "failed", "unknown") == "done"
    for _ in range(3):
        await mesh.publish(mesh.sent[id_])
    last = await mesh.ask(to=someone())
    await mesh.until_state(last, "done")
    (mail,) = sandbox.mails(to)
    assert mail.subject == "Hello Ada"
    assert mail.body.strip() == "Dear Ada, this is about P-1."
    assert mail.message_id == f"<{id_}@mesh.example>"
    assert mail.ids["x-factmesh-correlation-id"] == f"corr-{id_}"
    assert mail.rcpt_to == [to]


async def test_a_refusal_for_now_is_tried_again(mesh: Mesh, sandbox: Sandbox) -> None:
    """C4, D2: 451 to a recipient is known not to have been sent; the retry sends it once."""
    to = someone()
    await sandbox.faults("mail", {"fault": "reject_temporary", "subjects": [to], "attempts": 1})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "done")
    assert len(sandbox.mails(to)) == 1
    assert sandbox.mail_attempts(to) == 2


async def test_a_refusal_for_good_is_replayed_as_an_opening(mesh: Mesh, sandbox: Sandbox) -> None:
    """DESIGN 9: exhausted marks the ledger's row, so that an opening is handled, sends, and releases the park."""
    to = someone()
    await sandbox.faults("mail", {"fault": "reject_permanent", "subjects": [to]})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "failed")
    (letter,) = await mesh.letters(1)
    assert (letter.reason, letter.command_id, letter.step, letter.attempts) == ("exhausted", id_, "welcome", 1)
    assert letter.original.value == mesh.sent[id_].value
    assert to not in letter.message
    assert sandbox.mails(to) == []

    await sandbox.faults("mail")
    replay = dlq.restore(letter, 1, None)
    await mesh.publish(replay, replay)
    await mesh.until_state(id_, "done")
    parked, released = await mesh.signals(2)
    record = str(ids.record_id(letter.root, letter.group))
    assert (parked[0], parked[1]["record_id"], parked[1]["opening"]) == ("message_parked", record, 0)
    assert released == ("message_released", {"record_id": record, "opening": 1})
    assert len(sandbox.mails(to)) == 1


async def test_temporary_refusals_end_failed_when_the_policy_ends(mesh: Mesh, sandbox: Sandbox) -> None:
    """INV-B: attempts stay within the policy; all of them are known not to have worked."""
    to = someone()
    await sandbox.faults("mail", {"fault": "reject_temporary", "subjects": [to]})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "failed")
    (letter,) = await mesh.letters(1)
    assert (letter.reason, letter.attempts, sandbox.mail_attempts(to)) == ("exhausted", 3, 3)


@pytest.mark.parametrize(("fault", "mails"), [("drop_after", 1), ("drop_before", 0)])
async def test_a_content_without_an_answer_is_unknown_and_never_repeated(
    mesh: Mesh, sandbox: Sandbox, fault: str, mails: int
) -> None:
    """⚑ C2, INV-X: whether the server took it or not, the line looked the same: one attempt, then a person."""
    to = someone()
    await sandbox.faults("mail", {"fault": fault, "subjects": [to]})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "unknown")
    (letter,) = await mesh.letters(1)
    assert (letter.reason, letter.error_class, letter.attempts) == ("unknown", "ambiguous", 1)
    (parked,) = await mesh.signals(1)
    assert parked[1]["command_id"] == str(id_)
    assert (len(sandbox.mails(to)), sandbox.mail_attempts(to)) == (mails, 1)


async def test_a_person_says_that_it_happened(mesh: Mesh, sandbox: Sandbox) -> None:
    """DESIGN 9: `happened` ends it as done, without a second mail, and the instance's park with it."""
    to = someone()
    await sandbox.faults("mail", {"fault": "drop_after", "subjects": [to]})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "unknown")
    (letter,) = await mesh.letters(1)
    await mesh.resolve(letter, "happened", 1)
    await mesh.until_state(id_, "done")
    _, released = await mesh.signals(2)
    record = str(ids.record_id(letter.root, letter.group))
    assert released == ("message_released", {"record_id": record, "opening": 1})
    # A second word comes too late, is refused, and shown.
    await mesh.resolve(letter, "not_happened", 2)
    late = (await mesh.letters(2))[-1]
    assert "is done, not unknown: the resolution is refused" in late.message
    assert len(sandbox.mails(to)) == 1


async def test_a_person_says_that_it_did_not_happen_and_it_is_sent_again(mesh: Mesh, sandbox: Sandbox) -> None:
    """DESIGN 9: `not happened` sends again; unknown again, it dies under that word's number."""
    to = someone()
    await sandbox.faults("mail", {"fault": "drop_before", "subjects": [to], "attempts": 2})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "unknown")
    (letter,) = await mesh.letters(1)
    await mesh.resolve(letter, "not_happened", 1)
    second = (await mesh.letters(2))[-1]
    assert (second.reason, second.opening, second.root) == ("unknown", 1, letter.root)
    assert sandbox.mails(to) == []
    await mesh.until_state(id_, "unknown")
    await mesh.resolve(second, "not_happened", 2)
    await mesh.until_state(id_, "done")
    assert len(sandbox.mails(to)) == 1


async def test_an_unknown_one_may_be_given_up(mesh: Mesh, sandbox: Sandbox) -> None:
    """DESIGN 9: nobody waits for a notification: `discarded` ends it, and its instance is told."""
    to = someone()
    await sandbox.faults("mail", {"fault": "drop_after", "subjects": [to]})
    id_ = await mesh.ask(to=to)
    await mesh.until_state(id_, "unknown")
    (letter,) = await mesh.letters(1)
    await mesh.resolve(letter, "discarded", 1)
    await mesh.until_state(id_, "failed")
    _, discarded = await mesh.signals(2)
    assert discarded[0] == "message_discarded"
    assert (discarded[1]["opening"], discarded[1]["reason"]) == (1, "looked")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"to": "nobody"}, "recipient 1 of 1 is no address for channel email"),
        ({"to": "a@example.org\r\nBcc: b@example.org"}, "recipient 1 of 1 is no address"),
        ({"to": []}, "`to` is an address or a list of 1 to 50"),
        ({"to": "a@example.org", "template": "missing"}, "there is no template 'missing'"),
        ({"to": "a@example.org", "data": {}}, "template 'welcome' lacks a value"),
        ({"to": "a@example.org", "channel": "pigeon"}, "no channel is called 'pigeon'"),
    ],
)
async def test_what_cannot_be_sent_dies_with_a_clear_answer(mesh: Mesh, body: dict[str, Any], says: str) -> None:
    """Bad input gets a clear answer and loses nothing: dead before any attempt, correctable and replayable."""
    id_ = await mesh.ask(**body)
    (letter,) = await mesh.letters(1)
    assert letter.reason == "validation"
    assert says in letter.message
    assert await mesh.state(id_) is None


async def test_an_attempt_that_was_cut_off_is_unknown_for_mail_and_repeated_for_webhooks(
    mesh: Mesh, sandbox: Sandbox
) -> None:
    """⚑ A lease that ended without a settlement may have sent: mail waits for a person, a webhook keeps its id."""
    to = someone()
    mail, hook = mesh.command(to=to), mesh.command(to="team", channel="hooks")
    rows = [mesh.row(mail), mesh.row(hook)]
    async with mesh.running.context.pool.acquire() as conn, conn.transaction():
        # As a replica leaves them that was killed in its attempt; the loops see nothing before the commit.
        await claims.schedule(conn, rows)
        for row in rows:
            held = await claims.claim_due(conn, row.kind, 1, 0.05, 0.0)
            assert [h.id for h in held] == [row.id]
    for row in rows:
        mesh.running.context.claims.wake(row.kind, 0.1)
    await mesh.until_state(mail, "unknown")
    await mesh.until_state(hook, "done")
    assert sandbox.mails(to) == []
    assert [h.verified for h in sandbox.hooks(hook)] == [True]


# --- webhook and log -------------------------------------------------------------------------------------------------


async def test_a_webhook_is_signed_and_a_repeat_keeps_its_id(mesh: Mesh, sandbox: Sandbox) -> None:
    """D1, D2: the receiver verifies it; after an answer that never came the same id comes again, the same bytes too."""
    await sandbox.faults("hooks", {"fault": "reset_after", "attempts": 1})
    id_ = await mesh.ask(to="team", channel="hooks")
    await mesh.until_state(id_, "done")
    got = sandbox.hooks(id_)
    await sandbox.faults("hooks")
    assert [h.verified for h in got] == [True, True]
    assert got[0].body == got[1].body
    body = json.loads(got[0].body)
    assert (body["type"], body["data"]["subject"]) == ("factmesh.notification", "Hello Ada")
    assert body["data"]["correlation_id"] == f"corr-{id_}"


async def test_a_log_line_names_no_one(mesh: Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    """D1, F5: the channel `log` is there undeclared, and writes ids, never text or addresses."""
    id_ = await mesh.ask(to="secret.person@example.org", channel="log", data={"name": "Topsecretname"})
    await mesh.until_state(id_, "done")
    captured = capfd.readouterr()
    written = captured.err + captured.out
    assert str(id_) in written
    assert "secret.person" not in written
    assert "Topsecretname" not in written


# --- owners ----------------------------------------------------------------------------------------------------------


async def test_an_owner_is_told_once_of_what_was_declared(mesh: Mesh, sandbox: Sandbox) -> None:
    """D2, D3: only declared states, once for a status however often it comes, and nothing that is older than seen."""
    instance = ids.entrance_id("test.instance", str(uuid4()), mesh.now_ms())

    def status(seq: int, status: str, previous: str, workflow: str = "shipping") -> Emission:
        now = mesh.now_ms()
        record = {
            **mesh.envelope(ids.entrance_id("status", str(uuid4()), now), instance, f"workflow.{status}"),
            "instance_seq": seq,
            "workflow": workflow,
            "workflow_version": "1.0.0",
            "status": status,
            "previous_status": previous,
            "step": "pack",
            "reason": "a message is quarantined",
            "occurred_at": now,
        }
        return mesh.emission("status", "status", instance, record)

    def told() -> list[dict[str, Any]]:
        bodies = [json.loads(h.body) for h in sandbox.hooks()]
        return [b["data"] for b in bodies if b["data"]["instance_id"] == str(instance)]

    parked = status(5, "parked", "running")
    await mesh.publish(status(4, "running", "running"), parked, parked, status(3, "parked", "running"))
    await mesh.publish(status(6, "running", "parked"), status(7, "parked", "running", "billing"))
    await mesh.publish(status(8, "parked", "running"))

    async def both() -> bool:
        return len(told()) >= 2

    await until("two notices", both)
    await asyncio.sleep(0.5)
    # Two sends of one batch are side by side: receivers go by `instance_seq` (DESIGN 7).
    assert sorted((t["instance_seq"], t["status"], t["to"]) for t in told()) == [
        (5, "parked", ["shipping-team"]),
        (8, "parked", ["shipping-team"]),
    ]
