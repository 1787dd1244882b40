"""What only the registry over HTTP can meet: servers that are down, refuse, are none, or have no import mode."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import registry_server
from typer.testing import CliRunner

from factmesh import avro
from factmesh.errors import ErrorClass, SchemaError, SettingsError, TransientError
from factmesh.registry import HttpRegistry
from factmesh.schema_files import LockEntry, write_lock, write_schema
from factmesh_cli.schema import app

SOURCE: dict[str, Any] = {
    "type": "record",
    "name": "thing",
    "namespace": "t",
    "fields": [{"name": "a", "type": "string"}],
}


@contextmanager
def answering(status: int, body: Any) -> Iterator[tuple[str, list[str]]]:
    """A server that gives one answer to everything, and what it was asked: a broken proxy, a wrong address."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


async def test_a_registry_that_is_down_is_waited_for() -> None:
    """A registry that cannot be reached never poisons a message: transient, and the text says what is awaited."""
    async with HttpRegistry("http://127.0.0.1:9") as registry:
        with pytest.raises(TransientError, match=r"127\.0\.0\.1:9: the schema registry cannot be reached.*waiting"):
            await registry.by_id(1)


@pytest.mark.parametrize(
    ("status", "body"),
    [(503, {"error_code": 50003}), (404, b"<html>not found</html>"), (404, {"detail": "no"}), (401, {}), (200, b"hi")],
)
async def test_only_a_registrys_own_no_is_a_no(status: int, body: Any) -> None:
    """A wrong address, a proxy's error page or a refused password is no statement about a schema."""
    with answering(status, body) as (url, _):
        async with HttpRegistry(url) as registry:
            with pytest.raises(TransientError) as caught:
                await registry.by_id(7)
    assert caught.value.error_class is ErrorClass.TRANSIENT
    assert url in str(caught.value)


async def test_a_flood_of_unknown_ids_is_not_the_registrys_load() -> None:
    """An id that is unknown is asked for once in ten seconds (INV-P)."""
    with answering(404, {"error_code": 40403, "message": "Schema not found"}) as (url, asked):
        async with HttpRegistry(url) as registry:
            for _ in range(20):
                with pytest.raises(SchemaError, match="schema id 7 is not registered"):
                    await registry.by_id(7)
    assert asked == ["/schemas/ids/7"]


async def test_a_schema_that_is_not_avro_is_refused() -> None:
    """Protobuf and JSON Schema are told apart, and named."""
    with answering(200, {"schema": "syntax", "schemaType": "PROTOBUF"}) as (url, _):
        async with HttpRegistry(url) as registry:
            with pytest.raises(SchemaError, match="schema id 5 is PROTOBUF"):
                await registry.by_id(5)


async def test_several_registrars_at_once(registry_url: str) -> None:
    """Replicas that start together register the same schemas in one shared import mode: one wins, all go on."""
    subject = f"race.thing_{uuid.uuid4().hex[:8]}"
    schema = avro.parse(SOURCE, subject=subject, version=1, id=31_000 + uuid.uuid4().int % 10_000)
    registries = [HttpRegistry(registry_url) for _ in range(4)]
    try:
        found = await asyncio.gather(*(r.register(schema) for r in registries))
        assert {s.id for s in found} == {schema.id}
        # The subject is left as it was: a client's ordinary registration is judged by the server, not imported.
        more = {**SOURCE, "fields": [*SOURCE["fields"], {"name": "b", "type": "string", "default": ""}]}
        fresh = await registries[0].register(avro.parse(more, subject=subject))
        assert fresh.version == 2
    finally:
        for registry in registries:
            await registry.close()


async def test_a_registry_without_import_mode_gives_its_own_ids() -> None:
    """Where the lock's ids cannot be had, producers use the registry's, found by subject and schema."""
    taken: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, body: Any) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._send(422, {"error_code": 42205, "message": "mode changes are not permitted"})

        def do_DELETE(self) -> None:
            self._send(422, {"error_code": 42205, "message": "mode changes are not permitted"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/versions"):
                if "id" in body:
                    self._send(422, {"error_code": 42205, "message": "subject is not in import mode"})
                    return
                taken[body["schema"]] = 77
                self._send(200, {"id": 77})
            elif body["schema"] in taken:
                self._send(200, {"id": 77, "version": 1, "schema": body["schema"]})
            else:
                self._send(404, {"error_code": 40403, "message": "Schema not found"})

        def log_message(self, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        async with HttpRegistry(f"http://127.0.0.1:{server.server_port}") as registry:
            schema = avro.parse(SOURCE, subject="t.thing", version=1, id=10_000)
            assert (await registry.register(schema)).id == 77
            assert (await registry.find(schema)).id == 77
    finally:
        server.shutdown()
        server.server_close()


async def test_a_password_is_sent_and_never_shown() -> None:
    """Credentials in the address authenticate, and appear in no error text (F5)."""
    with registry_server.running(
        "security:\n  auth:\n    enabled: true\n    methods: [basic]\n"
        '    bootstrap:\n      enabled: true\n      username: "ops"\n      password: "s3cret-word"\n'
    ) as url:
        bare = url.removeprefix("http://")
        async with HttpRegistry(f"http://ops:s3cret-word@{bare}") as registry:
            assert await registry.subjects() == ()
        async with HttpRegistry(f"http://ops:wrong-word@{bare}") as registry:
            with pytest.raises(TransientError, match="credentials") as caught:
                await registry.subjects()
    assert "word" not in str(caught.value).replace("password", "")


def test_a_wrong_address_is_named_at_once() -> None:
    """A registry address that is none stops the start, with an example."""
    with pytest.raises(SettingsError, match="http://registry:8081"):
        HttpRegistry("registry:8081")


def test_the_command_registers_a_project(registry_url: str, tmp_path: Path) -> None:
    """`factmesh schema register` puts the platform's and a project's schemas there by the lock; twice is once."""
    name = f"moved_{uuid.uuid4().hex[:8]}"
    write_schema(tmp_path / "schemas", f"parcel.{name}", 1, {**SOURCE, "name": name})
    id = 42_000 + uuid.uuid4().int % 10_000
    write_lock(tmp_path / "schemas", {f"parcel.{name}/v1": LockEntry(id)})
    for _ in range(2):
        done = CliRunner().invoke(app, ["register", "--url", registry_url, "--project", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert f"parcel.{name}/v1: id {id}\n" in done.output
        assert "factmesh.fact/v1: id 1\n" in done.output
    down = CliRunner().invoke(app, ["register", "--url", "http://127.0.0.1:9"])
    assert down.exit_code == 2
    assert "cannot be reached" in down.output
