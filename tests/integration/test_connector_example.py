"""The example's connectors against the example's own sandbox file: what they send is what these systems take."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from factmesh import yaml
from factmesh.clock import SystemClock
from factmesh.expressions import default_expressions
from factmesh.http_client import HttpClient
from factmesh_connector import catalogue
from factmesh_connector.model import Strategy
from factmesh_connector.protocol import CallContext, Connector

EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_onboarding"


@pytest.fixture(scope="module")
def systems() -> Iterator[dict[str, str]]:
    """The environment that the connectors refer to: addresses of a sandbox without faults, and its tokens."""
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    declared: dict[str, Any] = yaml.load(EXAMPLE / "sandbox.yaml").data
    for system in declared["systems"]:
        system["faults"] = []
    (folder / "sandbox.yaml").write_text(json.dumps(declared))
    announce = folder / "announce.json"
    command = [sys.executable, "-m", "factmesh_sandbox", "--config", str(folder / "sandbox.yaml")]
    command += ["--log", str(folder / "log.sqlite"), "--announce", str(announce)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not announce.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    environ = {f"{name.upper()}_URL": url for name, url in json.loads(announce.read_text())["systems"].items()}
    environ |= {f"{s['name'].upper()}_TOKEN": s["auth"]["bearer"] for s in declared["systems"]}
    yield environ
    process.terminate()
    process.wait(10)
    shutil.rmtree(folder)


@pytest.fixture
async def connectors(systems: dict[str, str]) -> AsyncIterator[dict[str, Connector]]:
    http = HttpClient()
    yield catalogue.load(
        EXAMPLE / "connectors", (), http=http, clock=SystemClock(), expressions=default_expressions(), environ=systems
    )
    await http.close()


def nothing() -> None:
    """No lease to check."""


CTX = CallContext("key-1", "corr-1", None, {}, nothing)


async def test_each_system_takes_what_its_connector_sends(connectors: dict[str, Connector]) -> None:
    """Issue 6: eligible and refused, an account that is found again, a ticket whose status is in our words."""
    risk, crm, helpdesk = connectors["risk"], connectors["crm"], connectors["helpdesk"]
    for country, verdict in (("DE", "eligible"), ("KP", "refused")):
        ctx = CallContext(f"key-{country}", "corr-1", None, {}, nothing)
        assert (await risk.call("check", {"id": f"c-{country}", "country": country}, ctx))["verdict"] == verdict
    customer = {"id": "c-1", "email": "c1@example.org", "name": "C One"}
    assert await crm.look_up("create_account", customer, CTX) is None
    made = await crm.call("create_account", customer, CTX)
    assert await crm.look_up("create_account", customer, CTX) == made
    assert await crm.call("find_account", {"id": "c-1"}, CTX) == {"accounts": [made["account"]]}
    ticket = await helpdesk.call("open_ticket", {"reference": "c-1", "account": made["account"]}, CTX)
    assert ticket["status"] == "open"
    strategies = {
        "risk": risk.operations["check"].strategy,
        "crm": crm.operations["create_account"].strategy,
        "helpdesk": helpdesk.operations["open_ticket"].strategy,
    }
    assert strategies == {"risk": Strategy.KEY, "crm": Strategy.LOOKUP, "helpdesk": Strategy.NONE}
