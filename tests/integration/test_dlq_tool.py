"""`factmesh dlq` as people run it, in processes of its own, beside a running or a stopped quarantine service.
What the index guarantees is tested beside it; here the commands, their output and exit codes, and being killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

import factmesh
from factmesh import dlq, ids, kafka
from factmesh.clock import SystemClock
from factmesh.errors import ErrorClass, Reason
from factmesh.message import H_ROOT_ID, Delivery, Emission, pack
from factmesh.postgres import Migrations, create_pool, migrate
from factmesh.service import open_service
from factmesh.settings import Settings
from factmesh.stack import Stack
from factmesh.topics import COMMAND, FACTS_RAW, SIGNAL
from factmesh_quarantine import service as quarantine

pytestmark = pytest.mark.stack

T0 = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
INSTANCE = UUID("018f0000-0000-8000-8000-0000000000aa")


def letter(
    topic: str, n: int, value: bytes, reason: Reason = Reason.VALIDATION, text: str = "no country"
) -> dlq.DeadLetter:
    root = ids.entrance_id("test", str(n), 1_780_000_000_000)
    return dlq.DeadLetter(
        original=Delivery(
            topic, 0, n, f"key-{n}".encode(), value, (("content-type", b"application/json"),), 1_780_000_000_000
        ),
        root=f"id:{root}",
        opening=0,
        group="g",
        reason=reason,
        error_class=ErrorClass.AMBIGUOUS if reason is Reason.UNKNOWN else ErrorClass.VALIDATION,
        stage="svc/main",
        exception_type="ValidationError",
        message=f"{text} in message {n}",
        first_failed_at=T0,
        failed_at=T0,
        service_version="1",
        fingerprint=dlq.fingerprint_of("ValidationError", f"{text} in message {n}", reason, "svc/main", None),
        instance_id=INSTANCE if reason is Reason.UNKNOWN else None,
        command_id=root if reason is Reason.UNKNOWN else None,
    )


class Tool:
    """The command in a process of its own."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.raw = FACTS_RAW.of(settings.topic_prefix)
        self.command = COMMAND.of(settings.topic_prefix, "billing")
        self.signal = SIGNAL.of(settings.topic_prefix)
        # As `factmesh up` writes it: the tool finds everything by --run-dir.
        (folder / "addresses.env").write_text(
            f"FACTMESH_KAFKA_BOOTSTRAP={settings.kafka_bootstrap}\nFACTMESH_NAMESPACE={settings.namespace}\n"
            f"FACTMESH_QUARANTINE_DSN={settings.postgres_dsn.get_secret_value()}\n"
        )

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "factmesh_cli", "dlq", *arguments, "--run-dir", str(self.folder),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "COLUMNS": "240"},
        )  # fmt: skip

    async def __call__(self, *arguments: str, code: int = 0) -> str:
        process = await self.start(*arguments)
        out, err = await process.communicate()
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{out.decode()}\n{err.decode()}"
        return out.decode() + ("" if code == 0 else err.decode())

    async def json(self, *arguments: str, code: int = 0) -> object:
        return json.loads(await self(*arguments, "--json", code=code))

    async def die(self, *letters: dlq.DeadLetter) -> None:
        publisher = kafka.Publisher(self.settings.kafka_bootstrap, client_id="bench")
        await publisher.publish([dlq.record(dead, "svc") for dead in letters])
        await publisher.close()

    async def on(self, topic: str) -> list[Delivery]:
        return await kafka.read_all(self.settings.kafka_bootstrap, [topic])


@pytest.fixture
async def tool(stack: Stack, namespace: str) -> AsyncIterator[Tool]:
    schema = f"{namespace}_quarantine"
    dsn = await stack.provide_schema(schema)
    library = Migrations("factmesh", Path(factmesh.__file__).with_name("migrations"))
    await migrate(dsn, schema, [library, Migrations("quarantine", quarantine.SERVICE.migrations)])
    settings = Settings(kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, namespace=namespace)
    prefix = settings.topic_prefix
    specs = [kafka.TopicSpec(n, 2) for n in (FACTS_RAW.of(prefix), COMMAND.of(prefix, "billing"), SIGNAL.of(prefix))]
    await kafka.ensure_topics(stack.bootstrap, [*specs, *map(kafka.dlq_spec, specs)])
    with tempfile.TemporaryDirectory(prefix="fm-") as folder:
        yield Tool(settings, Path(folder))


async def test_triage(tool: Tool) -> None:
    """E2: list, group, show, correct with a diff, dry run, replay a group, discard, figures: a whole triage."""
    await tool.die(*(letter(tool.raw, n, b'{"country":"XX","n":%d}' % n) for n in range(3)))
    await tool.die(letter(tool.raw, 3, b"\xff\xfe", Reason.DECODE, "not Avro"))
    listed = await tool.json("list")
    assert isinstance(listed, list)
    assert len(listed) == 4
    assert "no country" in await tool("list", "--topic", "facts", "--dead-of", "validation")
    groups = await tool.json("groups")
    assert isinstance(groups, list)
    assert [g["records"] for g in groups] == [3, 1]
    cause, poison = groups[0]["fingerprint"], groups[1]["fingerprint"]
    first = next(r["id"] for r in listed if r["fingerprint"] == cause)
    shown = await tool("show", first[:13])
    assert '"country": "XX"' in shown
    assert "quarantined" in shown

    corrected = await tool("correct", first[:13], "--set", "country=DE", "--header", "x=1", "--by", "ann", "--yes")
    assert '-  "country": "XX"' in corrected
    assert '+  "country": "DE"' in corrected
    dry = await tool.json("replay", "--cause", cause, "--dry-run")
    assert isinstance(dry, list)
    assert [(d["would"], d["refused"]) for d in dry] == [("replay", None)] * 3
    assert await tool.on(tool.raw) == []

    await tool("replay", code=2)
    await tool("replay", "--cause", cause, "--yes", "--by", "ann")
    got = {d.key: d for d in await tool.on(tool.raw)}
    assert len(got) == 3
    values = sorted(str(d.value) for d in got.values())
    assert sum('"DE"' in v for v in values) == 1
    assert "replayed by ann, not open" in await tool("replay", first, "--yes", "--by", "bob", code=1)
    await tool("discard", "--cause", poison, "--reason", "a test of a vendor", "--yes")
    figures = await tool.json("stats")
    assert isinstance(figures, dict)
    assert figures["owners"] == {"service:svc": {"discarded": 1, "replayed": 3}}
    assert figures["replays"]["published"] == 3
    assert await tool.json("list") == []
    assert len(str(await tool.json("list", "--state", "all"))) > 100
    told = await tool.json("show", first)
    assert isinstance(told, dict)
    assert [h["event"] for h in told["history"]] == ["quarantined", "correct", "replay"]


async def test_resolving_by_command(tool: Tool) -> None:
    """E2: an unknown outcome is resolved with its output; replaying it is refused, and the text says what to do."""
    await tool.die(
        letter(tool.command, 1, b"x", Reason.UNKNOWN, "no answer"), letter(tool.command, 2, b"x", Reason.UNKNOWN)
    )
    listed = await tool.json("list", "--dead-of", "unknown")
    assert isinstance(listed, list)
    one, two = (r["id"] for r in listed)
    assert "factmesh dlq resolve" in await tool("replay", one, "--yes", code=1)
    await tool("resolve", one, "--happened", "{", "--reason", "asked them", "--yes", code=2)
    await tool("resolve", one, "--reason", "asked them", "--yes", code=2)
    await tool("resolve", one, "--happened", '{"id": 7}', "--reason", "asked them", "--yes")
    await tool("resolve", two, "--not-happened", "--retry", "--reason", "not in their list", "--yes")
    assert "it is resolved" in await tool("resolve", one, "--not-happened", "--reason", "no", "--yes", code=1)
    assert len(await tool.on(tool.command)) == 2
    assert len(await tool.on(tool.signal)) == 1


async def test_killed_replay_goes_on(tool: Tool) -> None:
    """E2: a replay killed half-way, taken up by two others at once, sends every member under one number."""
    await tool.die(*(letter(tool.raw, n, b"{}") for n in range(40)))
    process = await tool.start("replay", "--all", "--yes", "--rate", "10")
    assert process.stderr is not None
    operation = ""
    while not operation:
        line = (await process.stderr.readline()).decode()
        assert line, "ended before it named its operation"
        found = re.search(r"--resume ([0-9a-f-]{36})", line)
        operation = found[1] if found else ""
    await asyncio.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    sent = len(await tool.on(tool.raw))
    assert 0 < sent < 40
    await asyncio.gather(*(tool("replay", "--resume", operation, "--rate", "200", "--by", by) for by in ("ann", "bob")))
    got = await tool.on(tool.raw)
    roots = [d.header(H_ROOT_ID) for d in got]
    # A raise whose publication was not written down before the kill is published again: same number, same bytes.
    assert len(set(roots)) == 40
    assert len(roots) <= 41
    assert {d.opening for d in got} == {1}


async def test_service_files_and_publishes_what_was_left(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 9: the service files what dies while it runs, and publishes what a killed tool had raised."""
    monkeypatch.setattr(quarantine, "PUBLISH_AFTER_S", 0.0)
    monkeypatch.setattr(quarantine, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(quarantine, "MEASURE_EVERY_S", 0.2)
    await tool.die(letter(tool.raw, 1, b"{}"))
    pool = await create_pool(
        tool.settings.postgres_dsn.get_secret_value(), schema=tool.settings.schema_name("quarantine")
    )
    async with open_service(quarantine.SERVICE, tool.settings, http=False) as running:
        await _until(pool, "SELECT count(*) = 1 FROM record")
        await tool.die(letter(tool.raw, 2, b"{}"))
        await _until(pool, "SELECT count(*) = 2 FROM record")
        # The tool beside it files nothing twice, and needs no place in its group.
        assert len(await tool.json("list")) == 2  # type: ignore[arg-type]
        raise_only = (
            "WITH r AS (UPDATE record SET raised = 1, state = 'replayed' RETURNING id, thread) INSERT INTO act"
            " (record, thread, verb, number, bytes, by, reason, raised_at)"
            " SELECT id, thread, 'replay', 1, $1, 'ann', 'x', now() FROM r"
        )
        await pool.execute(raise_only, pack([Emission(tool.raw, b"k", b"v")]))
        await _until(pool, "SELECT bool_and(published = 1) FROM record")
        await asyncio.sleep(0.5)
        shown = running.context.metrics.render().decode()
        assert 'factmesh_quarantine_records{state="replayed"} 2.0' in shown
        assert "factmesh_replay_success_ratio 1.0" in shown
        assert running.problems() == []
    assert [d.value for d in await tool.on(tool.raw)] == [b"v", b"v"]
    await pool.close()


async def _until(pool: object, question: str, timeout_s: float = 30.0) -> None:
    clock = SystemClock()
    deadline = clock.monotonic() + timeout_s
    while not await pool.fetchval(question):  # type: ignore[attr-defined]
        assert clock.monotonic() < deadline, question
        await asyncio.sleep(0.1)


async def test_a_mesh_without_an_index(stack: Stack, namespace: str, tmp_path: Path) -> None:
    """HOUSE_STYLE 5: without a quarantine service the tool says what to start, and with no addresses which to set."""
    dsn = await stack.provide_schema(f"{namespace}_quarantine")
    tool = Tool(Settings(kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, namespace=namespace), tmp_path)
    assert "start factmesh-quarantine once" in await tool("list", code=2)
    (tmp_path / "addresses.env").unlink()
    assert "is `factmesh up` running with this folder?" in await tool("list", code=2)
