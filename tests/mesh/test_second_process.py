"""A process of another team: a folder outside of this repository, by YAML and `.avsc` alone, on the real services."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from aiokafka import AIOKafkaProducer
from tests.architecture.sources import ROOT, modules
from tests.support.order_mesh import CARRIER, WAREHOUSE, OrderMesh, noticed_at, settled_for, warehouse_data
from tests.support.plain import plain_encode

pytestmark = pytest.mark.stack

#: What its files may be: nothing that our code would have to know.
KINDS = {".yaml", ".avsc", ".lock"}
#: Fixed: the fact of a repeat must be the very same.
_SCANNED = noticed_at()


async def factmesh(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, run from the team's own folder with nothing of ours in its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")}
    argv = [sys.executable, "-m", "factmesh_cli", *arguments]
    return await asyncio.to_thread(
        subprocess.run, argv, cwd=project, env=environment, capture_output=True, text=True, timeout=90, check=False
    )


def test_the_process_lives_outside_and_nothing_here_knows_it(order_mesh: OrderMesh) -> None:
    """G8, issue 6: the second process is YAML and `.avsc` outside of this repository; no code of ours names it."""
    files = [f for f in order_mesh.project.rglob("*") if f.is_file()]
    assert ROOT not in order_mesh.project.resolve().parents
    assert {f.suffix for f in files} == KINDS
    words = ("order_exception", "issue_credit_note", "credit_note", "warehouse")
    known = [(m.name, w) for m in modules() for w in words if w in m.text.lower()]
    assert known == []


async def test_the_command_line_works_on_its_folder(order_mesh: OrderMesh) -> None:
    """B1, G8: another team's folder is linted, tested, drawn and its schemas are judged by the public commands."""
    project = order_mesh.project
    lint = await factmesh(project, "workflow", "lint", "--strict", "--project", ".")
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert "1 workflow version(s) checked: 0 error(s), 0 warning(s)" in lint.stdout
    tested = await factmesh(project, "workflow", "test", ".")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "2 case(s): 2 hold, 0 do not" in tested.stdout
    drawn = await factmesh(project, "workflow", "draw", "--project", ".", "order_exception")
    assert drawn.returncode == 0, drawn.stderr
    assert "s_find --> s_weigh" in drawn.stdout
    assert "s_weigh -->|owed| s_credit" in drawn.stdout
    schemas = await factmesh(project, "schema", "check", "--project", ".")
    assert schemas.returncode == 0, schemas.stdout + schemas.stderr
    # A mistake in it is named with its file, so "0 errors" above says something.
    broken = project.parent / "broken"
    await asyncio.to_thread(_copy_with_a_mistake, project, broken)
    refused = await factmesh(broken, "workflow", "lint", "--project", ".")
    assert refused.returncode == 1
    assert "unknown-operation" in refused.stdout
    assert "workflows/order_exception/v1.yaml" in refused.stdout


def _copy_with_a_mistake(project: Path, to: Path) -> None:
    for file in project.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(project)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    workflow = to / "workflows" / "order_exception" / "v1.yaml"
    workflow.write_text(workflow.read_text().replace("call: orders.find", "call: orders.seek"))


async def test_delayed_orders_go_from_fact_to_mail_with_each_effect_once(order_mesh: OrderMesh) -> None:
    """G8, A1, A3, INV-X: look-up, choice, credit note, mail; by HTTP and Kafka, two vendors, each fact three times."""
    orders = {
        # number: tier, days late, what must come of it
        "O-GOLD": ("G", 4, "CN"),
        "O-PLAIN": ("S", 9, None),
        "O-SOON": ("G", 1, None),
        "O-CARRIER": ("G", 3, "CN"),
        "O-AVRO": ("G", 5, "CN"),
        # Does the work and never answers, on a system that looks at no key: only asking finds it.
        "O-SILENT": ("G", 6, "CN"),
        "O-THROTTLED": ("S", 2, None),
    }
    for number, (tier, _, _) in orders.items():
        await order_mesh.place(number, tier=tier, email=f"{number.lower()}@buyer.example")
    bodies = {number: warehouse_data(number, days) for number, (_, days, _) in orders.items()}
    by_http = ("O-GOLD", "O-PLAIN", "O-SOON", "O-SILENT", "O-THROTTLED")
    producer = AIOKafkaProducer(bootstrap_servers=order_mesh.stack.bootstrap)
    await producer.start()
    try:
        for _ in range(3):
            for number in by_http:
                answer = await order_mesh.post(f"fact-{number}", bodies[number])
                assert answer.status_code == 202, answer.text
            for record in (_avro("O-AVRO", 5), _of_carrier("O-CARRIER", 3)):
                await producer.send_and_wait(order_mesh.topic("facts.raw"), **record)
    finally:
        await producer.stop()

    for number in orders:
        source = CARRIER if number == "O-CARRIER" else WAREHOUSE
        done = await order_mesh.until_status(f"fact-{number}", "completed", source)
        assert len(done["instances"]) == 1
        await order_mesh.until_mailed(f"{number.lower()}@buyer.example")

    async def effects() -> tuple[Counter[str], Counter[str]]:
        with order_mesh.log() as log:
            notes = Counter(e.subject or "" for e in log.effects("billing", kind="credit_note"))
            mails = Counter(m.rcpt_to[0] for m in log.mails())
        return (
            Counter({k: n for k, n in notes.items() if k in orders}),
            Counter({k: n for k, n in mails.items() if k.partition("@")[0].upper() in orders}),
        )

    notes, mails = await settled_for(effects)
    assert notes == Counter({number: 1 for number, (_, _, note) in orders.items() if note})
    assert mails == Counter({f"{number.lower()}@buyer.example": 1 for number in orders})
    with order_mesh.log() as log:
        [silent] = log.effects("billing", subject="O-SILENT", kind="credit_note")
        assert [c.fault for c in log.calls("billing", subject="O-SILENT", operation="issue")] == ["no_answer"]
        [mail] = log.mails("o-silent@buyer.example")
        assert silent.effect_id in mail.body
        [apology] = log.mails("o-plain@buyer.example")
        assert "9 day(s) later" in apology.body
        throttled = log.calls("orders", subject="O-THROTTLED", operation="find")
        assert [c.status for c in throttled] == [429, 200]
        gap_s = (throttled[1].at - throttled[0].at).total_seconds()
        assert gap_s >= (throttled[0].retry_after_s or 0) > 0


def _avro(number: str, days: int) -> dict[str, Any]:
    value = {
        "order_id": number,
        "days_late": days,
        "reason": "stock",
        "noticed_at": _SCANNED,
    }
    headers = {"id": f"fact-{number}", "source": WAREHOUSE, "type": "order.delayed", "specversion": "1.0"}
    return {
        "value": plain_encode("order.delayed", value),
        "key": number.encode(),
        "headers": [*((f"ce_{k}", v.encode()) for k, v in headers.items()), ("content-type", b"application/avro")],
    }


def _of_carrier(number: str, days: int) -> dict[str, Any]:
    data = {
        "hub": "VIE",
        "scannedAt": _SCANNED.astimezone(ZoneInfo("Europe/Vienna")).strftime("%d.%m.%Y %H:%M:%S"),
        "shipment": {"reference": number, "slip": {"days": days, "code": "ST"}},
    }
    headers = {"id": f"fact-{number}", "source": CARRIER, "type": "order.delayed", "specversion": "1.0"}
    return {
        "value": json.dumps(data).encode(),
        "key": b"any key of its own",
        "headers": [*((f"ce_{k}", v.encode()) for k, v in headers.items()), ("content-type", b"application/json")],
    }
