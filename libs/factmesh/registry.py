"""The registry: writers' schemas by id behind one interface, from directories or a Confluent-compatible server.
No bytes are decoded here. "There is none" is an answer (SchemaError); "cannot ask" is not (TransientError): waiting.

Subjects are record names (`factmesh.fact`, `order.delayed`), never topic names: a topic carries several records.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from factmesh import schema_files
from factmesh.avro import SCHEMA_BYTES_MAX, Schema, parse
from factmesh.clock import Clock, SystemClock
from factmesh.errors import FactmeshError, SchemaError, SettingsError, TransientError

TIMEOUT_S: Final = 5.0
ANSWER_BYTES_MAX: Final = 2 * SCHEMA_BYTES_MAX
CONNECTIONS_MAX: Final = 4
TRIES_MAX: Final = 4
BACKOFF_S: Final = 0.1
REGISTER_TRIES_MAX: Final = 6
UNKNOWN_S: Final = 10.0
"""How long an id that the server did not know is not asked for again: a flood of poison must not become its load."""
UNKNOWN_MAX: Final = 1_000
_NONE_SUCH: Final = frozenset({40401, 40402, 40403})


class Registry(Protocol):
    """Where schemas are found. `cached` never waits; everything else may, and raises TransientError when it cannot."""

    def cached(self, id: int) -> Schema | None:
        """The schema if it is at hand."""
        ...

    async def by_id(self, id: int) -> Schema:
        """The schema. Raises SchemaError when the registry says that there is none."""
        ...

    async def subjects(self) -> tuple[str, ...]:
        """Every subject, sorted."""
        ...

    async def versions(self, subject: str) -> tuple[int, ...]:
        """The versions of a subject, rising; empty for an unknown one."""
        ...

    async def by_version(self, subject: str, version: int) -> Schema:
        """One version. Raises SchemaError when there is none."""
        ...

    async def id_of(self, subject: str, version: int) -> int:
        """The id of one version. Raises SchemaError when there is none."""
        ...

    async def latest(self, subject: str) -> Schema:
        """The newest version. Raises SchemaError when there is none."""
        ...

    async def find(self, schema: Schema) -> Schema:
        """The same schema under the id that this registry gave it. Raises SchemaError when it is not registered."""
        ...

    async def register(self, schema: Schema) -> Schema:
        """Make `schema` a version of its subject, with its id where that is possible; idempotent."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def _no_version(subject: str, version: int | str, where: str) -> SchemaError:
    return SchemaError(
        f"no version {version} of {subject or '(no subject)'}", where=where, hint="run `factmesh schema register`"
    )


def _unknown_id(id: int, where: str) -> SchemaError:
    return SchemaError(
        f"schema id {id} is not registered", where=where, hint="register the writer's schema, then replay the message"
    )


class DirectoryRegistry:
    """Schemas from directories with committed id locks: the platform's first, then a project's. Read once, at start."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self._by_id: dict[int, Schema] = {}
        self._by_version: dict[tuple[str, int], Schema] = {}
        for file in schema_files.read_dirs(self._folders):
            self._add(file.schema)

    def _add(self, schema: Schema) -> None:
        self._by_id[schema.id] = schema
        self._by_version[schema.subject, schema.version] = schema

    @property
    def _where(self) -> str:
        return ", ".join(str(f) for f in self._folders)

    def cached(self, id: int) -> Schema | None:
        return self._by_id.get(id)

    async def by_id(self, id: int) -> Schema:
        found = self._by_id.get(id)
        if found is None:
            raise _unknown_id(id, self._where)
        return found

    async def subjects(self) -> tuple[str, ...]:
        return tuple(sorted({subject for subject, _ in self._by_version}))

    async def versions(self, subject: str) -> tuple[int, ...]:
        return tuple(sorted(version for name, version in self._by_version if name == subject))

    async def by_version(self, subject: str, version: int) -> Schema:
        found = self._by_version.get((subject, version))
        if found is None:
            raise _no_version(subject, version, self._where)
        return found

    async def id_of(self, subject: str, version: int) -> int:
        return (await self.by_version(subject, version)).id

    async def latest(self, subject: str) -> Schema:
        versions = await self.versions(subject)
        if not versions:
            raise _no_version(subject, "latest", self._where)
        return self._by_version[subject, versions[-1]]

    async def find(self, schema: Schema) -> Schema:
        for (subject, _), known in self._by_version.items():
            if subject == schema.subject and known.source == schema.source:
                return known
        raise _no_version(schema.subject, schema.version or "with this text", self._where)

    async def register(self, schema: Schema) -> Schema:
        """As a draft in the last directory: the file and its line of the lock."""
        try:
            return await self.find(schema)
        except SchemaError:
            pass
        folder = self._folders[-1]
        versions = await self.versions(schema.subject)
        version = schema.version or (versions[-1] + 1 if versions else 1)
        if version in versions:
            raise SchemaError(
                f"{schema.subject}/v{version} is another schema already", where=str(folder), hint="add the next version"
            )
        entries = schema_files.read_lock(folder) if (folder / schema_files.LOCK_NAME).exists() else {}
        platform = schema.subject.startswith("factmesh.")
        id = schema.id or schema_files.next_id(entries, platform=platform)
        if id in self._by_id:
            raise SchemaError(f"id {id} is that of {self._by_id[id].label}", where=str(folder), hint="leave the id out")
        named = schema.registered(subject=schema.subject, version=version, id=id)
        schema_files.write_schema(folder, schema.subject, version, schema.source)
        schema_files.write_lock(folder, {**entries, f"{schema.subject}/v{version}": schema_files.LockEntry(id)})
        self._add(named)
        return named

    async def close(self) -> None:
        return None


class HttpRegistry:
    """A Confluent-compatible registry over HTTP, with a cache that never expires: an id means one schema for ever.

    `register` asks for the ids of the lock through the registry's import mode, so that the same bytes can be read by
    the directory registry. A server without that mode gives its own ids, and `find` tells them.
    """

    def __init__(
        self, url: str, *, auth: tuple[str, str] | None = None, timeout_s: float = TIMEOUT_S, clock: Clock | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError("the registry's address is not an http(s) URL", hint="e.g. http://registry:8081")
        if auth is None and parts.username:
            auth = (unquote(parts.username), unquote(parts.password or ""))
        netloc = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
        self._url = urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))
        self._headers: dict[str, str] = {}
        if auth is not None:
            pair = base64.b64encode(f"{auth[0]}:{auth[1]}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
        self._timeout_s = timeout_s
        self._clock: Clock = clock or SystemClock()
        self._client: Any = None
        self._by_id: dict[int, Schema] = {}
        self._by_version: dict[tuple[str, int], Schema] = {}
        self._unknown: dict[int, float] = {}

    def cached(self, id: int) -> Schema | None:
        return self._by_id.get(id)

    async def by_id(self, id: int) -> Schema:
        found = self._by_id.get(id)
        if found is not None:
            return found
        if self._unknown.get(id, float("-inf")) > self._clock.monotonic():
            raise _unknown_id(id, self._url)
        answer = await self._ask("GET", f"/schemas/ids/{id}")
        if answer is None:
            self._forget_old_unknowns()
            self._unknown[id] = self._clock.monotonic() + UNKNOWN_S
            raise _unknown_id(id, self._url)
        text = self._text_of(answer, f"schema id {id}")
        subject, version = self._home(await self._ask("GET", f"/schemas/ids/{id}/versions"), text)
        return self._keep(parse(text, subject=subject, version=version, id=id))

    async def subjects(self) -> tuple[str, ...]:
        return tuple(sorted(await self._ask("GET", "/subjects") or ()))

    async def versions(self, subject: str) -> tuple[int, ...]:
        return tuple(sorted(await self._ask("GET", f"/subjects/{quote(subject, safe='')}/versions") or ()))

    async def by_version(self, subject: str, version: int) -> Schema:
        found = self._by_version.get((subject, version))
        return found if found is not None else await self._version(subject, str(version))

    async def id_of(self, subject: str, version: int) -> int:
        return (await self.by_version(subject, version)).id

    async def latest(self, subject: str) -> Schema:
        return await self._version(subject, "latest")

    async def find(self, schema: Schema) -> Schema:
        body = {"schema": schema.text}
        answer = await self._ask("POST", f"/subjects/{quote(schema.subject, safe='')}", body)
        if answer is None:
            raise _no_version(schema.subject, schema.version or "with this text", self._url)
        return self._keep(
            schema.registered(subject=schema.subject, version=int(answer["version"]), id=int(answer["id"]))
        )

    async def register(self, schema: Schema) -> Schema:
        """Idempotent, and safe against another that does the same at the same time in the one import mode."""
        refusal: SchemaError | None = None
        for attempt in range(REGISTER_TRIES_MAX):
            if attempt:
                await self._clock.sleep(BACKOFF_S * attempt)
            try:
                return await self.find(schema)
            except SchemaError:
                pass
            try:
                await self._post(schema)
                refusal = None
            except SchemaError as error:
                # Refused for good, or because another registrar just ended the import mode that we share: the next
                # round finds what that one registered, or tries again.
                refusal = error
        if refusal is None:
            return await self.find(schema)
        raise SchemaError(
            f"{schema.label} was refused: {refusal.message}",
            where=self._url,
            hint="run `factmesh schema check`, and compare the ids",
        )

    async def _post(self, schema: Schema) -> None:
        """One registration, with our id where the server lets us into its import mode, else with the server's."""
        versions = f"/subjects/{quote(schema.subject, safe='')}/versions"
        mode = f"/mode/{quote(schema.subject, safe='')}"
        if not schema.id or not await self._begin_import(mode):
            await self._ask("POST", versions, {"schema": schema.text})
            return
        try:
            await self._ask(
                "POST", versions, {"schema": schema.text, "id": schema.id, "version": max(schema.version, 1)}
            )
        finally:
            # Back to the mode of the whole registry: a client's ordinary registrations are judged again.
            await self._ask("DELETE", mode)

    async def _begin_import(self, mode: str) -> bool:
        try:
            await self._ask("PUT", f"{mode}?force=true", {"mode": "IMPORT"})
        except (SchemaError, TransientError):
            return False  # no modes here, or none for us; if the server is down, the next question says so
        return True

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ── asking ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _version(self, subject: str, version: str) -> Schema:
        answer = await self._ask("GET", f"/subjects/{quote(subject, safe='')}/versions/{version}")
        if answer is None:
            raise _no_version(subject, version, self._url)
        number, id = int(answer["version"]), int(answer["id"])
        known = self._by_version.get((subject, number))
        if known is not None and known.id == id:
            return known
        text = self._text_of(answer, f"{subject}/v{version}")
        return self._keep(parse(text, subject=subject, version=number, id=id))

    def _keep(self, schema: Schema) -> Schema:
        """The first object of an id stays the one: codecs compare schemas by identity."""
        kept = self._by_id.setdefault(schema.id, schema)
        if (kept.subject, kept.version) != (schema.subject, schema.version):
            # One id under several subjects: each name gets its own object, the id keeps its first.
            kept = schema
        return self._by_version.setdefault((schema.subject, schema.version), kept)

    def _text_of(self, answer: Mapping[str, Any], what: str) -> str:
        kind = answer.get("schemaType", "AVRO")
        if kind != "AVRO" or answer.get("references"):
            raise SchemaError(
                f"{what} is {kind}{' with references' if answer.get('references') else ''}",
                where=self._url,
                hint="send Avro with one self-contained schema",
            )
        return str(answer["schema"])

    def _home(self, homes: Any, text: str) -> tuple[str, int]:
        """Which subject and version an id belongs to; where several share it, the one named like the record."""
        pairs = sorted((str(h["subject"]), int(h["version"])) for h in homes or ())
        name = parse(text).name
        for subject, version in pairs:
            if subject.rpartition(".")[2] == name:
                return subject, version
        return pairs[0] if pairs else ("", 0)

    def _forget_old_unknowns(self) -> None:
        if len(self._unknown) >= UNKNOWN_MAX:
            now = self._clock.monotonic()
            self._unknown = {k: until for k, until in self._unknown.items() if until > now}
            if len(self._unknown) >= UNKNOWN_MAX:
                self._unknown.clear()

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer, or None where the server says that there is no such thing. Raises SchemaError for a
        refusal (409, 422) and TransientError for everything that waiting or an operator can heal.
        """
        client, request_of, failures = self._open()
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json", **self._headers}
        raw = None if body is None else json.dumps(body).encode()
        if raw is not None:
            headers["Content-Type"] = "application/vnd.schemaregistry.v1+json"
        request = request_of(method, self._url + path, headers, (), raw)
        trouble = ""
        for attempt in range(TRIES_MAX):
            if attempt:
                await self._clock.sleep(BACKOFF_S * 2.0 ** (attempt - 1))
            try:
                response = await client.send(request, timeout_s=self._timeout_s, response_bytes_max=ANSWER_BYTES_MAX)
            except failures as error:
                trouble = error.message
                continue
            if response.status == 429 or response.status >= 500:
                trouble = f"it answered {response.status}"
                continue
            return self._judge(response.status, response.body, method, path)
        raise TransientError(
            f"the schema registry cannot be reached: {trouble}",
            where=self._url,
            hint="waiting; check that it runs and that the address is right",
        )

    def _judge(self, status: int, body: bytes, method: str, path: str) -> Any:
        try:
            answer, is_json = json.loads(body), True
        except ValueError:
            answer, is_json = None, False
        code = answer.get("error_code") if isinstance(answer, dict) else None
        if status == 404 and code in _NONE_SUCH:
            return None
        if 200 <= status < 300 and is_json:
            return answer
        if status in (409, 422):
            said = answer.get("message") if isinstance(answer, dict) else ""
            raise SchemaError(f"{method} {path} answered {status}: {said}", where=self._url, hint="see its message")
        # A bare 404 is a wrong address and 401 a wrong password: neither is an answer about a schema, so no message
        # may die of it.
        raise TransientError(
            f"{method} {path} answered {status}, which is not a schema registry's answer",
            where=self._url,
            hint="check the address and the credentials",
        )

    def _open(self) -> tuple[Any, Any, tuple[type[FactmeshError], ...]]:
        """The client, made at the first question: it belongs to the running event loop."""
        try:
            from factmesh import http_client
        except ImportError as error:
            raise SettingsError("a registry over HTTP needs the package httpx2", hint="pip install httpx2") from error
        if self._client is None:
            self._client = http_client.HttpClient(connections_max=CONNECTIONS_MAX)
        # Every question may be repeated: registering is idempotent, and a lost answer is asked for again.
        return self._client, http_client.Request, (http_client.NotSentError, http_client.AmbiguousError)


def open_registry(
    *, url: str | None = None, schemas_dir: Path | None = None, project: Path | None = None, clock: Clock | None = None
) -> Registry:
    """The registry that the settings ask for: the server where one is named, else the directories."""
    if url:
        return HttpRegistry(url, clock=clock)
    folders = [schemas_dir or schema_files.platform_dir()]
    if project is not None and (project / "schemas").is_dir():
        folders.append(project / "schemas")
    return DirectoryRegistry(folders)
