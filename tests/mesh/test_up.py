"""`factmesh up` as people run it: killed with everything it started, and started again on the same folder."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import psutil
import pytest
from tests.support.waiting import until
from tests.support.ways_back import PROJECT, Depot, number

from factmesh import kafka
from factmesh.records import Records
from factmesh.stack import Stack
from factmesh_cli import instance
from factmesh_cli.dlq_index import catch_up, load_settings, open_index, read_addresses
from factmesh_cli.mesh import PORTS_FILE, SANDBOX_FILE, Member, Mesh
from factmesh_quarantine import queries

pytestmark = [pytest.mark.stack, pytest.mark.slow]

FACTS = 60
#: Fixed: what is sent again is the very same.
SEEN_AT = (datetime.now(UTC) - timedelta(minutes=5)).isoformat(timespec="seconds").replace("+00:00", "Z")
UP_S_MAX = 120.0
DONE_S_MAX = 90.0


class Up:
    """The command over one folder."""

    def __init__(self, folder: Path) -> None:
        self.project, self.data = folder / "project", folder / "data"
        self.log = folder / "up.log"
        self.process: subprocess.Popen[bytes] | None = None
        shutil.copytree(PROJECT, self.project)

    @property
    def run_dir(self) -> Path:
        return self.data / "run"

    async def start(self) -> None:
        """Returns when it says that it is up."""
        said_before = self.said()
        self._spawn()

        async def up() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"it ended: {self.log.read_text()[-3000:]}"
            return self.said() > said_before

        await until("factmesh is up", up, timeout_s=UP_S_MAX, every_s=0.3)

    def _spawn(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")}
        argv = (sys.executable, "-m", "factmesh_cli", "up", "--project", str(self.project), "--data", str(self.data))
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                argv,
                env=environment | {"FACTMESH_STACK": "embedded", "COLUMNS": "160"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def said(self) -> int:
        """How often it said that it is up."""
        return self.log.read_text(errors="replace").count("factmesh is up") if self.log.exists() else 0

    def kill_everything(self) -> int:
        """SIGKILL for the command and all that descends from it at once: services, servers, their guards."""
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        everyone = [root, *root.children(recursive=True)]
        for member in everyone:
            member.suspend()  # nobody sees another one die and acts upon it: as a power cut would
        for member in everyone:
            member.kill()
        self.process.wait(10)
        _, left = psutil.wait_procs(everyone, timeout=10)
        assert left == []
        return len(everyone)

    async def stop(self) -> int:
        """As Ctrl-C does; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return await asyncio.to_thread(self.process.wait, 60)

    @asynccontextmanager
    async def operated(self) -> AsyncIterator[Depot]:
        """An operator who found it by its folder."""
        found = read_addresses(self.run_dir)
        mesh = Mesh(self.run_dir, Stack(found["FACTMESH_KAFKA_BOOTSTRAP"], ""), self.project)
        mesh.sandbox = json.loads((self.run_dir / SANDBOX_FILE).read_text())
        for name, port in json.loads((self.run_dir / PORTS_FILE).read_text()).items():
            mesh.members[name] = Member(name, (), {}, self.run_dir / f"{name}.log", port)
        publisher = kafka.Publisher(mesh.stack.bootstrap, client_id="test")
        try:
            async with (
                httpx2.AsyncClient(timeout=30.0) as http,
                open_index(load_settings(found)) as index,
                instance.opened(self.run_dir) as instances,
            ):
                records = await Records.open(index.registry)
                yield Depot(mesh, http, index, records, publisher, instances)
        finally:
            await publisher.close()


@pytest.fixture
def up() -> Iterator[Up]:
    # Not below pytest's own folder, whose mode each session on this machine sets back: PostgreSQL may run as nobody.
    with tempfile.TemporaryDirectory(prefix="fm-up-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = Up(Path(folder))
        yield command
        if command.process is not None and command.process.poll() is None:
            command.kill_everything()


async def publish(depot: Depot, parcels: dict[str, str], acknowledged: set[str], gone: asyncio.Event) -> None:
    """All facts, each until it is acknowledged, or until the mesh is gone; what was acknowledged is noted."""
    for parcel, route in parcels.items():
        while parcel not in acknowledged:
            try:
                await depot.post(parcel, route, seen_at=SEEN_AT)
                acknowledged.add(parcel)
            except (httpx2.TransportError, AssertionError):
                if gone.is_set():
                    return
                await asyncio.sleep(0.2)


async def resolve_all(depot: Depot) -> int:
    """What nobody knows, a person looks up in the systems' own log; returns how many."""
    await catch_up(depot.index)
    rows = await queries.list_records(depot.index.pool, queries.Filter())
    for row in rows:
        assert row["reason"] == "unknown", f"{row['topic']} {row['reason']}: {row['message']}"
        parcel, done = row["business_object_id"], depot.effects(row["business_object_id"])
        if "notifier" in row["topic"]:
            happened = "mail" in done
        else:
            happened = "entry" in done
        if happened:
            await depot.resolve(row["id"], "happened", {"page": f"of {parcel}"})
        else:
            await depot.not_in_flight(row["id"])
            await depot.resolve(row["id"], "not_happened", retry="notifier" not in row["topic"])
    return len(rows)


async def counts(depot: Depot) -> Counter[str]:
    rows = await depot.instances.pool.fetch(instance.SQL.counts)
    return Counter({r["status"]: r["n"] for r in rows})


async def test_killed_and_started_again_it_goes_on(up: Up) -> None:
    """G1, B2, INV-L, INV-X: SIGKILL to all of it in the middle: every acknowledged fact completes, effects once."""
    await up.start()
    parcels = {number(f"U{n}"): "enter" if n % 3 == 0 else "weigh" for n in range(FACTS)}
    acknowledged: set[str] = set()
    gone = asyncio.Event()
    async with up.operated() as depot:
        for system in ("scales", "books"):
            await depot.http.put(
                f"{depot.mesh.sandbox['http']}/_faults/{system}", json=[{"fault": "slow", "delay_s": 0.4, "share": 0.5}]
            )
        publishing = asyncio.create_task(publish(depot, parcels, acknowledged, gone))
        await until("the middle", lambda: _some_completed(depot, acknowledged), timeout_s=DONE_S_MAX, every_s=0.02)
        killed = up.kill_everything()
        gone.set()
        await publishing
    assert killed >= 9, "five services, the sandbox, two servers and the command"
    assert len(acknowledged) > 0

    await up.start()
    async with up.operated() as depot:
        await depot.http.put(f"{depot.mesh.sandbox['http']}/_faults/scales", json=[])
        await depot.http.put(f"{depot.mesh.sandbox['http']}/_faults/books", json=[])
        # Whoever was not acknowledged sends again, as clients do; the same ids, so nobody is counted twice.
        again: set[str] = set()
        await publish(depot, parcels, again, asyncio.Event())
        assert len(again) == FACTS

        async def at_rest() -> bool:
            await resolve_all(depot)
            found = await counts(depot)
            return found == {"completed": FACTS} and await all_told()

        async def all_told() -> bool:
            return all(depot.effects(p)["mail"] for p in parcels)

        try:
            await until("all are completed", at_rest, timeout_s=DONE_S_MAX, every_s=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}: {await counts(depot)}\n{depot.complaints()}") from None
        await asyncio.sleep(1.0)
        for parcel, route in parcels.items():
            assert depot.effects(parcel) == {"entry" if route == "enter" else "weighing": 1, "mail": 1}, parcel
        assert await resolve_all(depot) == 0
        ran = await depot.run("instance", "list", "--counts")
        assert (ran.code, "completed" in ran.out) == (0, True), ran.err
    assert up.process is not None
    members = psutil.Process(up.process.pid).children(recursive=True)
    assert await up.stop() == 0
    assert psutil.wait_procs(members, timeout=5)[1] == [], "nothing is left behind"


async def _some_completed(depot: Depot, acknowledged: set[str]) -> bool:
    """Some have ended, and more are on their way, in whatever place."""
    found = await counts(depot)
    return found["completed"] >= FACTS // 6 and len(acknowledged) > found["completed"]
