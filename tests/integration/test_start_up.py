"""A service that cannot start as configured, seen from outside: its exit code and what it says on standard error.
Real processes over the session's stack; servers that are down are waited for, which `tests/faults/test_down.py` shows.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from tests.support.order_mesh import TEMPLATES

from factmesh.errors import SettingsError
from factmesh.postgres import connect, drop_role_and_schema
from factmesh.settings import Settings, load
from factmesh.stack import Stack

pytestmark = pytest.mark.stack

REFUSED = 2
START_S_MAX = 60.0
"""Generous: the machine may be busy with other tests."""
SECRET = "hidden-7f3a"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder that a test may break."""
    return Path(shutil.copytree(TEMPLATES / "order_exception", tmp_path / "project"))


@pytest.fixture
async def given(stack: Stack, namespace: str, project: Path) -> dict[str, str]:
    """What an intake needs, complete and right."""
    return {
        "KAFKA_BOOTSTRAP": stack.bootstrap,
        "POSTGRES_DSN": await stack.provide_schema(f"{namespace}_intake"),
        "PROJECT": str(project),
        "NAMESPACE": namespace,
    }


def start(service: str, given: Mapping[str, str]) -> subprocess.Popen[str]:
    """The service as a process, with these settings and no others."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTMESH_")}
    environment |= {f"FACTMESH_{name}": value for name, value in given.items()}
    return subprocess.Popen(
        [sys.executable, "-m", f"factmesh_{service}"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def refusal(service: str, given: Mapping[str, str]) -> str:
    """The last words of a service that does not start, after its log; no stack trace, no secret."""
    process = start(service, given)
    try:
        _, said = await asyncio.to_thread(process.communicate, timeout=START_S_MAX)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == REFUSED, f"ended with {process.returncode}:\n{said}"
    assert "Traceback" not in said
    assert SECRET not in said
    words = said[said.rindex(f"factmesh-{service}: ") :].strip()
    assert words.endswith(")"), f"does not say what to do next: {words}"
    return words


def test_nothing_is_set() -> None:
    """Bad input: every missing setting is named at once, by the variable that a person has to set."""
    words = asyncio.run(refusal("intake", {}))
    assert "FACTMESH_KAFKA_BOOTSTRAP: Field required" in words
    assert "FACTMESH_POSTGRES_DSN: Field required" in words
    assert "set these environment variables and start again" in words


async def test_settings_that_cannot_work_are_all_named_at_once(given: dict[str, str]) -> None:
    """Bad input: each by its variable and with what it should be, before anything is opened or waited for."""
    wrong = {"PROJECT": "/no/such/folder", "NAMESPACE": "Bad-NS", "HTTP_PORT": "99999", "KAFKA_BOOTSTRAP": "localhost"}
    words = await refusal("intake", given | wrong)
    assert "FACTMESH_PROJECT: Value error, /no/such/folder is not a folder" in words
    assert "FACTMESH_NAMESPACE: Value error, must be empty or match" in words
    assert "FACTMESH_HTTP_PORT: Input should be less than or equal to 65535" in words
    assert "FACTMESH_KAFKA_BOOTSTRAP: Value error, write it as host:port" in words


@pytest.mark.parametrize(
    ("bootstrap", "right"),
    [
        ("kafka:9092", True),
        ("a:1,b.example:2 , [::1]:9092", True),
        ("SASL_SSL://kafka:9093", True),
        ("", False),
        ("kafka", False),
        ("kafka:9092,", False),
        ("kafka://kafka:9092", False),
        ("kafka:9092/topic", False),
    ],
)
def test_addresses_of_brokers_that_can_never_answer_are_refused(
    monkeypatch: pytest.MonkeyPatch, bootstrap: str, right: bool
) -> None:
    """Bad input: the client would wait for ever for what is no address."""
    monkeypatch.setenv("FACTMESH_KAFKA_BOOTSTRAP", bootstrap)
    monkeypatch.setenv("FACTMESH_POSTGRES_DSN", "postgresql://a@h/d")
    if right:
        assert load(Settings).kafka_bootstrap == bootstrap
        return
    with pytest.raises(SettingsError, match="FACTMESH_KAFKA_BOOTSTRAP: .*write it as host:port"):
        load(Settings)


async def test_a_registry_s_address_that_is_none(given: dict[str, str]) -> None:
    """Bad input: what no waiting cures is refused."""
    words = await refusal("intake", given | {"REGISTRY_URL": "registry"})
    assert "the registry's address is not an http(s) URL" in words


async def test_an_address_of_the_database_that_is_none(given: dict[str, str]) -> None:
    """Bad input: it ends the start with the form that it should have; a password in it is not repeated."""
    words = await refusal("intake", given | {"POSTGRES_DSN": f"mysql://a:{SECRET}@h/d"})
    assert "the address of PostgreSQL cannot be read" in words
    assert "write it as postgresql://role:password@host:port/database" in words
    for dsn in (SECRET, "", f"postgresql://a:{SECRET}@127.0.0.1:99999/d", f"postgresql://a:{SECRET}@h:x/d"):
        with pytest.raises(SettingsError, match="the address of PostgreSQL cannot be read") as caught:
            await asyncio.wait_for(connect(dsn), 20)
        assert SECRET not in str(caught.value)


async def test_a_port_in_use_is_named(given: dict[str, str]) -> None:
    """Bad input: the address that is taken, and the setting that changes it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = await refusal("intake", given | {"HTTP_PORT": str(port)})
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in words
    assert "set FACTMESH_HTTP_PORT to a free port, or 0" in words


async def test_a_project_without_what_the_service_needs(given: dict[str, str], project: Path) -> None:
    """Bad input: no project, and a project that holds nothing for this service."""
    without = {k: v for k, v in given.items() if k != "PROJECT"}
    assert "needs a project folder with adapters (set FACTMESH_PROJECT)" in await refusal("intake", without)
    shutil.rmtree(project / "adapters")
    assert "the project has no adapter, so no fact could be accepted" in await refusal("intake", given)


#: file, what stands there, what is written instead, what is said of it.
WRONG_FILES = [
    ("adapters/carrier.yaml", "shape: own", "shape: own\nshape: own", r"carrier\.yaml:6:1: key 'shape' is there twice"),
    ("adapters/carrier.yaml", "shape: own", "shape: &a own", r"carrier\.yaml:5:8: an anchor"),
    ("adapters/carrier.yaml", "fact.order_id", "fact..order_id", r"carrier\.yaml:16:3 .*does not compile"),
    ("adapters/warehouse.yaml", "shape: schema", "shape: odd", r"warehouse\.yaml:5:\d+ at shape"),
    ("adapters/warehouse.yaml", "accepts: [1]", "accepts: [7]", r"adapter warehouse: version 7 of order\.delayed"),
    ("schemas/order.delayed/v1.avsc", '"fields"', '"felds"', r"order\.delayed/v1 .*no list of fields"),
]


async def test_a_file_that_is_wrong_is_named_with_its_line(given: dict[str, str], project: Path) -> None:
    """Bad input: duplicate keys, anchors, expressions that do not compile, versions and words that do not exist."""
    for file, old, new, says in WRONG_FILES:
        text = (project / file).read_text(encoding="utf-8")
        assert old in text
        (project / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        words = await refusal("intake", given)
        assert re.search(says, words, re.DOTALL), words
        (project / file).write_text(text, encoding="utf-8")


async def test_a_connector_without_its_secret(
    given: dict[str, str], stack: Stack, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input: every connector that lacks something is named with file, line and variable; no value is repeated."""
    namespace = given["NAMESPACE"]
    changes = {"POSTGRES_DSN": await stack.provide_schema(f"{namespace}_connector")}
    for name in ("BILLING_URL", "BILLING_TOKEN", "ORDERS_URL", "ORDERS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    words = await refusal("connector", given | changes)
    for name in ("billing", "orders"):
        assert f"connector {name}: {project}/connectors/{name}.yaml:" in words
        assert f"the environment variable {name.upper()}_URL is not set" in words
    file = project / "connectors" / "orders.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("ref+env://ORDERS_TOKEN", SECRET), encoding="utf-8")
    monkeypatch.setenv("ORDERS_URL", "http://127.0.0.1:1")
    assert "is not a secret reference" in await refusal("connector", given | changes | {"CONNECTORS": "orders"})
    assert "there is no connector 'nix' (there are: billing, orders)" in await refusal(
        "connector", given | changes | {"CONNECTORS": "nix"}
    )


async def test_a_workflow_that_is_wrong_is_not_deployed_at_start(
    given: dict[str, str], stack: Stack, project: Path
) -> None:
    """Bad input: an unknown connector and a key that is there twice stop the orchestrator with file and line."""
    changes = {
        "POSTGRES_DSN": await stack.provide_schema(f"{given['NAMESPACE']}_orchestrator"),
        "DEPLOY_ON_START": "true",
    }
    file = project / "workflows" / "order_exception" / "v1.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("call: orders.find", "call: nobody.find"), encoding="utf-8")
    words = await refusal("orchestrator", given | changes)
    assert f"{file}:11:7 at do[0].find.call: error: there is no connector 'nobody'" in words
    file.write_text(text.replace("sla:", "sla: {}\nsla:"), encoding="utf-8")
    assert f"{file}:8:1: key 'sla' is there twice, first on line 7" in await refusal("orchestrator", given | changes)


@pytest.fixture
async def weak(stack: Stack, namespace: str) -> str:
    """A role that may log in and owns nothing."""
    admin = await connect(stack.postgres_dsn)
    await admin.execute(f"CREATE ROLE {namespace}_weak LOGIN PASSWORD 'factmesh'")
    await admin.close()
    return stack.service_dsn(f"{namespace}_weak")


async def test_a_role_without_its_schema(given: dict[str, str], weak: str, stack: Stack) -> None:
    """Bad input, G4: a schema that is not there, or another role's, is named with the command that makes it."""
    words = await refusal("intake", given | {"POSTGRES_DSN": weak})
    assert f"schema {given['NAMESPACE']}_intake is not there, or not this role's" in words
    assert "`factmesh stack roles` makes each service's role and schema" in words
    await drop_role_and_schema(stack.postgres_dsn, f"{given['NAMESPACE']}_intake", f"{given['NAMESPACE']}_intake")
    assert "is not there, or not this role's" in await refusal("intake", given | {"POSTGRES_DSN": weak})
    nobody = stack.service_dsn(f"{given['NAMESPACE']}_nobody").replace("factmesh", SECRET)
    words = await refusal("intake", given | {"POSTGRES_DSN": nobody})
    assert "refuses us" in words
    assert "create the role and database, or correct FACTMESH_POSTGRES_DSN" in words


async def test_a_compacted_topic_is_refused(given: dict[str, str], stack: Stack) -> None:
    """DESIGN 2: compaction would drop messages that were never handled, so nobody starts on such a topic."""
    topic = f"{given['NAMESPACE']}.factmesh.signal.v1"
    admin = AdminClient({"bootstrap.servers": stack.bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1, config={"cleanup.policy": "compact"})])[topic].result(20)
    words = await refusal("intake", given)
    assert f"topic {topic} is compacted (cleanup.policy=compact)" in words
    assert "set cleanup.policy=delete" in words


@pytest.fixture
def waiting(given: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """An intake over a database that is not there."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused, and nobody else gets it
        port = nobody.getsockname()[1]
        process = start("intake", given | {"POSTGRES_DSN": f"postgresql://role:{SECRET}@127.0.0.1:{port}/factmesh"})
        yield process
        process.kill()
        process.wait()


def test_who_waits_says_so_and_stops_when_told(waiting: subprocess.Popen[str]) -> None:
    """Bad input: the wait names the address without its password, and SIGTERM ends it within its ten seconds."""
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    assert "PostgreSQL at postgresql://role:***@127.0.0.1:" in line
    assert "does not answer; trying again every few seconds until it does" in line
    began = time.monotonic()
    waiting.terminate()
    _, rest = waiting.communicate(timeout=START_S_MAX)
    assert waiting.returncode == 0
    assert time.monotonic() - began < 15
    assert SECRET not in line + rest
