"""`factmesh workflow deploy` and `factmesh instance` as people run them, against the real service."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from tests.integration.test_orchestrator import STEPS, on, project, record_of, settings
from tests.support.orchestrator import workflow_text
from tests.support.waiting import until

from factmesh.message import Emission, Message
from factmesh.service import Running, open_service
from factmesh.stack import Stack
from factmesh_orchestrator.bench import Bench
from factmesh_orchestrator.definitions import definitions
from factmesh_orchestrator.service import SERVICE

pytestmark = pytest.mark.stack


async def factmesh(running: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with the addresses of this mesh in its environment."""
    given = running.context.settings
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")},
        "FACTMESH_KAFKA_BOOTSTRAP": given.kafka_bootstrap,
        "FACTMESH_POSTGRES_DSN": given.postgres_dsn.get_secret_value(),
        "FACTMESH_NAMESPACE": given.namespace,
        "COLUMNS": "250",
    }
    argv = [sys.executable, "-m", "factmesh_cli", *arguments]
    return await asyncio.to_thread(
        subprocess.run, argv, env=environment, capture_output=True, text=True, timeout=90, check=False
    )


async def test_a_person_deploys_looks_and_ends(stack: Stack, namespace: str, tmp_path: Path) -> None:
    """B1, B5: deploy refuses what lint refuses; list and show tell where an instance is; end settles it by hand."""
    folder = project(tmp_path / "p", workflow_text(STEPS))
    async with open_service(SERVICE, await settings(stack, namespace)) as running:
        done = await factmesh(running, "workflow", "deploy", str(folder), "--by", "person:ada", "--commit", "abc")
        assert done.returncode == 0, done.stderr
        assert "exception 1.0.0: deployed (person:ada, commit abc)" in done.stdout
        file = folder / "workflows" / "exception" / "v1.yaml"
        done = await factmesh(running, "workflow", "deploy", str(file))
        assert "exception 1.0.0: unchanged" in done.stdout
        file.write_text(workflow_text(STEPS.replace("shop.look_up", "shop.nothing")))
        done = await factmesh(running, "workflow", "deploy", str(file))
        assert done.returncode == 2
        assert "nothing was deployed" in done.stderr

        b = Bench(definitions(()), running.context.clock.now())

        async def commands() -> list[Message]:
            b.object_id = uuid.uuid4().hex
            await running.context.publisher.publish([record_of(running, b.fact("order.delayed", {"note": "n"}))])
            return await on(running, "command.shop")

        command = (await until("a command", commands, every_s=0.5))[0]
        id_ = command["instance_id"]
        torn = Emission(running.context.topic("result"), id_.encode(), b"\x00torn")
        done = await factmesh(running, "instance", "end", id_, "--status", "failed", "--reason", "by hand")
        assert done.returncode == 2
        assert "only what is parked or needs_resolution" in done.stderr
        await running.context.publisher.publish([torn])
        listing = ("instance", "list", "--attention", "--json")

        async def parked() -> list[dict[str, str]]:
            rows: list[dict[str, str]] = json.loads((await factmesh(running, *listing)).stdout)
            return rows

        (row,) = await until("the parked instance", parked)
        assert (row["id"], row["status"], row["step"]) == (id_, "parked", "look")
        shown = await factmesh(running, "instance", "show", id_)
        assert f"command {command.id}" in shown.stdout
        assert "quarantined records" in shown.stdout
        # Its command is outstanding and a record is open: ended by hand it would be ended over an unknown.
        done = await factmesh(running, "instance", "end", id_, "--status", "failed", "--reason", "by hand")
        assert done.returncode == 1
        assert "a command of it is outstanding" in done.stderr
        discards = await running.context.pool.fetchval("SELECT detail FROM ledger WHERE disposition = 'discarded'")
        assert "is outstanding; replay, resolve or discard" in discards
        (record,) = json.loads(await state_of(running, id_))["parks"]
        given_up = b.signal("message_discarded", {"record_id": record, "opening": 0, "reason": "x"}, uuid.UUID(id_))
        b.object_id = command["business_object_id"]
        about = {**given_up.record, "business_object_id": command["business_object_id"]}
        await running.context.publisher.publish([record_of(running, b._message("signal", "t", about))])

        async def needs_resolution() -> bool:
            (row,) = await parked()
            return row["status"] == "needs_resolution"

        await until("what was given up shows", needs_resolution)
        done = await factmesh(running, "instance", "end", id_[:30], "--status", "failed", "--reason", "by hand")
        assert done.returncode == 0, done.stderr
        assert f"instance {id_} ended as failed" in done.stdout
        counts = await factmesh(running, "instance", "list", "--counts", "--status", "failed")
        assert "failed" in counts.stdout


async def state_of(running: Running, id_: str) -> str:
    state: str = await running.context.pool.fetchval("SELECT state FROM instance_states_view WHERE id = $1", id_)
    return state
