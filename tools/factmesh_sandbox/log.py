"""The sandbox's log, read-only: what was called, what was really done, which mails and webhooks arrived.
Judges (tests, the demo) read it here, while the sandbox runs or after it was killed; nothing is ever written here.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from factmesh.errors import SettingsError
from factmesh.sql_files import load_sql

T = TypeVar("T")


def load_queries() -> Mapping[str, str]:
    """The named statements of `log.sql`."""
    queries = load_sql(__file__, "log.sql")
    return {name: getattr(queries, name) for name in queries.names()}


@dataclass(frozen=True, slots=True)
class Call:
    """One request, answered or not. `fault` names what was done to it; `status` is None when no answer was meant."""

    seq: int
    at: datetime
    system: str
    operation: str | None
    method: str
    path: str
    idempotency_key: str | None
    correlation_id: str | None
    traceparent: str | None
    subject: str | None
    body_sha256: str
    fault: str | None
    retry_after_s: int | None
    status: int | None
    replayed: bool
    answered: bool


@dataclass(frozen=True, slots=True)
class Effect:
    """Work that was really done, by the call `call`."""

    seq: int
    at: datetime
    system: str
    kind: str
    number: int
    effect_id: str
    subject: str | None
    idempotency_key: str | None
    body: Any
    response: Any
    call: int


@dataclass(frozen=True, slots=True)
class Mail:
    """One accepted message; `answered` is False when its sender was never told. `ids`: its `X-Factmesh-…` headers."""

    seq: int
    at: datetime
    mail_from: str
    rcpt_to: list[str]
    message_id: str | None
    subject: str | None
    ids: dict[str, str]
    body: str
    fault: str | None
    answered: bool


@dataclass(frozen=True, slots=True)
class Webhook:
    """One delivery to a webhook receiver; `refusal` says why an unverified one was refused."""

    seq: int
    at: datetime
    receiver: str
    webhook_id: str | None
    verified: bool
    refusal: str | None
    body: str
    call: int


class Log:
    """Typed, read-only queries. Use as a context manager, or call `close`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._connection.row_factory = sqlite3.Row
        self._sql = load_queries()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def calls(
        self,
        system: str | None = None,
        *,
        subject: str | None = None,
        operation: str | None = None,
        idempotency_key: str | None = None,
    ) -> list[Call]:
        """Calls in the order of their log rows, filtered by what is given."""
        return self._read(
            Call, "read_calls", system=system, subject=subject, operation=operation, idempotency_key=idempotency_key
        )

    def effects(
        self, system: str | None = None, *, subject: str | None = None, kind: str | None = None
    ) -> list[Effect]:
        """Effects in the order in which they were done, filtered by what is given."""
        return self._read(Effect, "read_effects", system=system, subject=subject, kind=kind)

    def effects_per_subject(self, system: str, kind: str) -> dict[str | None, int]:
        """How many effects of a kind each subject has; more than one is a double effect."""
        rows = self._connection.execute(self._sql["effects_per_subject"], {"system": system, "kind": kind})
        return {row[0]: row[1] for row in rows}

    def mails(self, recipient: str | None = None) -> list[Mail]:
        """Accepted mails, all or those to one recipient."""
        return self._read(Mail, "read_mails", recipient=recipient)

    def webhooks(self, receiver: str | None = None, *, webhook_id: str | None = None) -> list[Webhook]:
        """Webhook deliveries, filtered by what is given."""
        return self._read(Webhook, "read_webhooks", receiver=receiver, webhook_id=webhook_id)

    def summary(self) -> dict[str, Any]:
        """Counts of everything, as `GET /_log/summary` shows them."""
        return summarize(self._connection, self._sql)

    def _read(self, shape: type[T], query: str, **parameters: str | None) -> list[T]:
        return [_typed(shape, row) for row in self._connection.execute(self._sql[query], parameters)]


def open_log(path: str | Path) -> Log:
    """Open a sandbox's log for reading, of a running sandbox too.

    Raises:
        SettingsError: there is no log at `path`.
    """
    file = Path(path)
    if not file.is_file():
        raise SettingsError("there is no sandbox log here", where=str(file), hint="start factmesh-sandbox with --log")
    return Log(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=10))


def summarize(connection: sqlite3.Connection, sql: Mapping[str, str]) -> dict[str, Any]:
    """Counts by system; shared by the reader and the running server."""
    calls = [
        dict(zip(("system", "operation", "fault", "status", "answered", "count"), tuple(row), strict=True))
        for row in connection.execute(sql["summary_calls"])
    ]
    effects = [
        dict(zip(("system", "kind", "count", "subjects", "subjects_with_more"), tuple(row), strict=True))
        for row in connection.execute(sql["summary_effects"])
    ]
    mails, webhooks, verified = connection.execute(sql["summary_rest"]).fetchone()
    return {"calls": calls, "effects": effects, "mails": mails, "webhooks": webhooks, "webhooks_verified": verified}


_JSON = {"rcpt_to", "ids"}
_JSON_OF_EFFECTS = {"body", "response"}
_FLAGS = {"replayed", "answered", "verified"}


def _typed(shape: type[T], row: sqlite3.Row) -> T:
    values: dict[str, Any] = {}
    for field in fields(shape):  # type: ignore[arg-type]  # every shape here is a dataclass
        value = row[field.name]
        if field.name == "at":
            value = datetime.fromisoformat(value)
        elif field.name in _FLAGS:
            value = bool(value)
        elif field.name in _JSON or (shape is Effect and field.name in _JSON_OF_EFFECTS):
            value = json.loads(value)
        values[field.name] = value
    return shape(**values)
