"""A running mesh of real processes over the process `order_exception`, which lives outside of this repository.
How tests seed its systems, publish facts as strangers do, and read what came of them; no assertion lives here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
from tests.support.waiting import until

from factmesh import ids
from factmesh.stack import Stack
from factmesh_cli.mesh import Mesh
from factmesh_sandbox.log import Log, open_log

TEMPLATES = Path(__file__).resolve().parents[1] / "mesh" / "projects"
WAREHOUSE = "//warehouse.example/dispatch"
CARRIER = "//carrier.example/tracking"
#: Generous: the machine may be busy with other tests.
DONE_S_MAX = 60.0


def project_outside(folder: Path) -> Path:
    """The project folder as another team has it: a copy outside of this repository."""
    project = folder / "order_exception"
    shutil.copytree(TEMPLATES / "order_exception", project)
    return project


def traceparent() -> str:
    """A caller's own trace context, sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def noticed_at() -> datetime:
    """When a delay was noticed: a little ago, to the second."""
    return (datetime.now(UTC) - timedelta(minutes=5)).replace(microsecond=0)


def warehouse_data(order: str, days: int) -> dict[str, Any]:
    """A fact in its registered schema, as JSON carries it."""
    at = noticed_at().isoformat().replace("+00:00", "Z")
    return {"order_id": order, "days_late": days, "reason": "weather", "noticed_at": at}


class TracedMesh(Mesh):
    """A mesh whose services each write their spans into a file of their own."""

    def environment(self, service: str = "quarantine") -> dict[str, str]:
        return {**super().environment(service), "FACTMESH_TRACE_FILE": str(self.spans_file(service))}

    def spans_file(self, service: str) -> Path:
        return self.run_dir / f"{service}.spans"


@dataclass
class OrderMesh:
    """One running mesh, the client that strangers use, and the folder of the process."""

    mesh: TracedMesh
    client: httpx2.AsyncClient
    project: Path

    @property
    def stack(self) -> Stack:
        return self.mesh.stack

    def topic(self, name: str) -> str:
        return self.mesh.prefix + name

    # --- the systems outside ------------------------------------------------------------------------------------------

    async def place(self, number: str, *, tier: str, email: str, amount: int = 250) -> None:
        """An order that the order system knows."""
        answer = await self.client.post(
            self.mesh.sandbox["systems"]["orders"] + "/orders",
            headers={"Authorization": "Bearer sandbox-orders-token"},
            json={"number": number, "tier": tier, "amount": amount, "email": email},
        )
        assert answer.status_code == 201, answer.text

    def log(self) -> Log:
        """What really happened outside: the sandbox's own log."""
        return open_log(self.mesh.sandbox_log)

    # --- facts in -----------------------------------------------------------------------------------------------------

    async def post(self, fact_id: str, data: Mapping[str, Any], **headers: str) -> httpx2.Response:
        """A fact of the warehouse over HTTP, binary mode, JSON."""
        return await self.client.post(
            self.mesh.url("intake") + "/facts",
            headers={
                "ce-specversion": "1.0",
                "ce-id": fact_id,
                "ce-source": WAREHOUSE,
                "ce-type": "order.delayed",
                "ce-dataschema": "https://retail.example/schemas/order.delayed/v1",
                "content-type": "application/json",
                **headers,
            },
            content=json.dumps(dict(data)),
        )

    # --- what came of it ----------------------------------------------------------------------------------------------

    async def progress(self, fact_id: str, source: str = WAREHOUSE) -> dict[str, Any]:
        """What the status URL says; {} while it knows nothing."""
        correlation_id = ids.correlation_id(source, fact_id)
        answer = await self.client.get(f"{self.mesh.url('intake')}/facts/{correlation_id}")
        found: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
        return found

    async def until_status(
        self, fact_id: str, status: str, source: str = WAREHOUSE, timeout_s: float = DONE_S_MAX
    ) -> dict[str, Any]:
        """Wait until the fact's instance has this status."""
        last: dict[str, Any] = {}

        async def reached() -> dict[str, Any] | None:
            nonlocal last
            last = await self.progress(fact_id, source)
            return last if last.get("status") == status else None

        try:
            found: dict[str, Any] = await until(f"{fact_id} is {status}", reached, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; its status URL says {last}\n{self.complaints()}") from None
        return found

    async def until_mailed(self, address: str, timeout_s: float = DONE_S_MAX) -> None:
        """Wait until a mail to this address is in the sandbox's log."""

        async def there() -> bool:
            with self.log() as log:
                return bool(log.mails(address))

        await until(f"a mail to {address}", there, timeout_s=timeout_s)

    async def factmesh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line, as an operator of this mesh runs it."""
        argv = [sys.executable, "-m", "factmesh_cli", *arguments]
        environment = {**self.mesh.environment("quarantine"), "COLUMNS": "250"}
        return await asyncio.to_thread(
            subprocess.run, argv, env=environment, capture_output=True, text=True, timeout=90, check=False
        )

    def complaints(self) -> str:
        """Warnings and errors of all services, for the text of a failed wait."""
        lines = []
        for name, member in self.mesh.members.items():
            text = member.log.read_text(encoding="utf-8", errors="replace")
            lines += [f"{name}: {t}" for t in text.splitlines() if '"info"' not in t][-5:]
        return "\n".join(lines)

    # --- spans --------------------------------------------------------------------------------------------------------

    def spans(self, services: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Every span that has been exported so far, whole lines only."""
        found = []
        for service in services or [n for n in self.mesh.members if n != "sandbox"]:
            path = self.mesh.spans_file(service)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return found


async def settled_for(check: Any, quiet_s: float = 1.5, timeout_s: float = 30.0) -> Any:
    """The value of `check` once it has not changed for `quiet_s`: for what must not happen a second time."""
    value, since, deadline = await check(), time.monotonic(), time.monotonic() + timeout_s
    while time.monotonic() - since < quiet_s and time.monotonic() < deadline:
        now = await until("a look", lambda: _boxed(check), every_s=0.2)
        if now[0] != value:
            value, since = now[0], time.monotonic()
    return value


async def _boxed(check: Any) -> list[Any]:
    return [await check()]
