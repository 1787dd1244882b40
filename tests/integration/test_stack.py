"""The stacks: embedded Kafka and PostgreSQL start without anything installed, last, and end with their owner.
These tests start servers of their own; everything else shares the session's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from factmesh import postgres
from factmesh.embedded import EmbeddedError, EmbeddedKafka, EmbeddedPostgres
from factmesh.embedded.jars import read_lock
from factmesh.errors import SettingsError
from factmesh.stack import EmbeddedStack, Stack, external_stack, kind_of_stack


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp" if os.path.isdir("/tmp") else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def produce(bootstrap: str, topic: str, value: bytes) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    if topic not in admin.list_topics(timeout=10).topics:
        admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "acks": "all"})
    producer.produce(topic, value)
    assert producer.flush(20) == 0


def consume_all(bootstrap: str, topic: str, count: int, protocol: str = "consumer") -> list[bytes]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"g-{time.monotonic_ns()}",
            "group.protocol": protocol,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    values: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(values) < count and time.monotonic() < deadline:
        values += [message.value() for message in consumer.consume(100, 0.5) if message.error() is None]
    consumer.close()
    return values


async def test_the_session_stack_answers(stack: Stack, namespace: str) -> None:
    """G1: whichever kind the switch names, Kafka takes and gives a message by KIP-848 and PostgreSQL is 17 or later."""
    produce(stack.bootstrap, f"{namespace}.hello", b"fact")
    assert consume_all(stack.bootstrap, f"{namespace}.hello", 1) == [b"fact"]
    admin = await postgres.connect(stack.postgres_dsn)
    assert int(await admin.fetchval("SHOW server_version_num")) >= 170000
    assert await admin.fetchval("SHOW fsync") == "on"
    await admin.close()


async def test_what_was_acknowledged_survives_a_kill_of_both_servers(folder: Path) -> None:
    """G1, INV-L: a message and a row that were acknowledged are there after SIGKILL of broker and database, at the same
    addresses; the second start needs no help."""
    embedded = EmbeddedStack(folder)
    stack = embedded.start()
    try:
        produce(stack.bootstrap, "durable", b"kept")
        connection = await postgres.connect(stack.postgres_dsn)
        await connection.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (42)")
        await connection.close()
        embedded.kafka.kill()
        embedded.postgres.kill()
        assert embedded.start() == stack
        assert consume_all(stack.bootstrap, "durable", 1) == [b"kept"]
        connection = await postgres.connect(stack.postgres_dsn)
        assert await connection.fetchval("SELECT n FROM kept") == 42
        await connection.close()
    finally:
        embedded.stop()


_OWNER = """
import sys, time
from pathlib import Path
from factmesh.stack import EmbeddedStack
embedded = EmbeddedStack(Path(sys.argv[1]))
embedded.start()
print(embedded.kafka.pid, embedded.postgres.pid, embedded.kafka.bootstrap, flush=True)
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a Unix signal")
def test_servers_end_with_an_owner_that_was_killed_and_the_next_start_goes_on(folder: Path) -> None:
    """G1: SIGKILL of the process that started the stack leaves no server behind, and the folder starts again. It works
    with neither java nor mvn on the machine: the path is empty and JAVA_HOME unset."""
    environment = {**os.environ, "PATH": "/nonexistent"}
    environment.pop("JAVA_HOME", None)
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert owner.stdout is not None
    kafka_pid, postgres_pid, bootstrap = owner.stdout.readline().decode().split()
    produce(bootstrap, "before", b"1")
    with pytest.raises(EmbeddedError, match=rf"pid {owner.pid}.*give another data directory"):
        EmbeddedKafka(folder / "kafka").start()  # a living owner is not robbed
    servers = [psutil.Process(int(kafka_pid)), psutil.Process(int(postgres_pid))]
    owner.kill()
    owner.wait()
    _, alive = psutil.wait_procs(servers, timeout=20)
    assert alive == []
    with EmbeddedStack(folder) as stack:
        assert stack.bootstrap == bootstrap
        assert consume_all(stack.bootstrap, "before", 1) == [b"1"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="the orphan is made by stopping the guard, which needs Linux signals"
)
def test_a_server_that_outlived_its_owner_is_stopped_by_the_next_start(folder: Path) -> None:
    """G1: even a server whose guard was frozen when its owner was killed does not hold the folder for ever."""
    owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(folder)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    _, postgres_pid, _ = owner.stdout.readline().decode().split()
    stale = psutil.Process(int(postgres_pid))
    guard = stale.parent()
    assert guard is not None
    guard.send_signal(signal.SIGSTOP)
    owner.kill()
    owner.wait()
    try:
        time.sleep(0.5)
        assert stale.is_running()
        with EmbeddedPostgres(folder / "postgres") as fresh:
            assert fresh.pid != stale.pid
            assert not stale.is_running() or stale.status() == psutil.STATUS_ZOMBIE
    finally:
        guard.send_signal(signal.SIGCONT)


def test_a_dlq_topic_may_allow_more_than_its_origin(stack: Stack, namespace: str) -> None:
    """E1: the broker takes a record above the default of one MiB on a topic that allows it."""
    admin = AdminClient({"bootstrap.servers": stack.bootstrap})
    topic = f"dlq.{namespace}.large"
    admin.create_topics([NewTopic(topic, 1, 1, config={"max.message.bytes": "3000000"})])[topic].result(10)
    producer = Producer({"bootstrap.servers": stack.bootstrap, "message.max.bytes": 3_000_000})
    failures: list[object] = []
    producer.produce(topic, os.urandom(2_000_000), on_delivery=lambda error, _: failures.append(error))
    producer.flush(20)
    assert failures == [None]


def test_the_switch_names_its_two_values_and_what_is_missing() -> None:
    """Issue 6.2: one switch; a wrong value or a missing address is said before anything starts."""
    assert kind_of_stack({}) == "embedded"
    with pytest.raises(SettingsError, match=r"FACTMESH_STACK is 'docker' .set it to embedded or external"):
        kind_of_stack({"FACTMESH_STACK": "docker"})
    with pytest.raises(SettingsError, match="needs FACTMESH_KAFKA_BOOTSTRAP and FACTMESH_POSTGRES_DSN"):
        external_stack({"FACTMESH_STACK": "external"})
    given = {"FACTMESH_KAFKA_BOOTSTRAP": "k:9092", "FACTMESH_POSTGRES_DSN": "postgresql://a@h/d"}
    assert external_stack(given) == Stack("k:9092", "postgresql://a@h/d", None)


def test_a_jar_with_another_hash_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1: what was served is hashed by us; a jar that is not the locked one is named, refused and not kept."""
    from factmesh.embedded import jars

    small = min(read_lock(), key=lambda jar: jar.size_bytes)
    monkeypatch.setenv("FACTMESH_CACHE_DIR", str(folder))
    served = folder / "served.jar"
    served.write_bytes(b"not that jar")
    monkeypatch.setattr(jars, "_resolve", lambda *_: served)
    monkeypatch.setattr(jars, "read_lock", lambda: [small])
    with pytest.raises(EmbeddedError, match=f"{small.coordinate} was served with sha256"):
        jars.ensure_jars()
    assert list((folder / "kafka-jars").glob("*.jar")) == []
