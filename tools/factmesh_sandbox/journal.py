"""The writing side of the log: everything that arrives in one turn of the event loop is one commit.
No answer leaves the sandbox before its rows are committed; what an answer says is not decided here.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factmesh.errors import SettingsError
from factmesh_sandbox.log import load_queries, summarize
from factmesh_sandbox.model import SandboxFile

#: A row to write: the statement's name in `log.sql`, and its parameters.
Row = tuple[str, Mapping[str, Any]]

#: Attempt counters kept in memory; older ones are counted again from the log.
COUNTERS_MAX = 200_000
#: We are the only writer; somebody else's lock on the file is an error soon, while callers still wait for an answer.
BUSY_S = 1
#: A look-up that matches more is answered with the first ones.
FOUND_MAX = 100


@dataclass(frozen=True, slots=True)
class Found:
    """An earlier effect, as look-ups and templates see it."""

    effect_id: str
    number: int
    subject: str | None
    body: Any
    response: Any

    def scope(self) -> dict[str, Any]:
        """The effect for templates."""
        return {"id": self.effect_id, "number": self.number, "subject": self.subject, "body": self.body}


@dataclass(frozen=True, slots=True)
class Remembered:
    """What was answered under an idempotency key."""

    at_epoch_s: float
    request_sha256: str
    status: int
    response: Any


class Journal:
    """Owns the connection and the numbering. One process writes a log at a time; used from the event loop's thread."""

    def __init__(self, path: Path, file: SandboxFile) -> None:
        self._sql = load_queries()
        self._pending: list[tuple[tuple[Row, ...], asyncio.Future[None]]] = []
        self._attempts: OrderedDict[tuple[str, str, str, int], int] = OrderedDict()
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)
            self._connection.executescript(self._sql["pragmas"])
            self._connection.executescript(self._sql["schema"])
            self._index(file)
        except sqlite3.Error as error:
            raise SettingsError(f"the sandbox log cannot be opened: {error}", where=str(path)) from error
        self._calls, self._effects, self._mails, self._webhooks = self._connection.execute(
            self._sql["counters"]
        ).fetchone()
        self._numbers = {(row[0], row[1]): row[2] for row in self._connection.execute(self._sql["effect_numbers"])}

    def _index(self, file: SandboxFile) -> None:
        for system in file.systems:
            for kind, field in lookup_fields(system.name, file):
                name = "backfill_effect_id" if field == "id" else "backfill_effect_field"
                parameters = {"system": system.name, "kind": kind, "field": field}
                if field == "id":
                    del parameters["field"]
                self._connection.execute(self._sql[name], parameters)

    def call_seq(self) -> int:
        """The next call's number."""
        self._calls += 1
        return int(self._calls)

    def last_call_seq(self) -> int:
        """The last call number that was given away."""
        return int(self._calls)

    def effect_seq(self) -> int:
        """The next effect's number over all systems."""
        self._effects += 1
        return int(self._effects)

    def mail_seq(self) -> int:
        """The next mail's number."""
        self._mails += 1
        return int(self._mails)

    def webhook_seq(self) -> int:
        """The next webhook delivery's number."""
        self._webhooks += 1
        return int(self._webhooks)

    def effect_number(self, system: str, kind: str) -> int:
        """The next number of a kind of effect in its system: what effect ids are made of."""
        number = int(self._numbers.get((system, kind), 0)) + 1
        self._numbers[system, kind] = number
        return number

    def attempt(self, system: str, operation: str, subject: str, since_seq: int) -> int:
        """Which attempt of this subject this is, from 1, counted since its system's fault rules were set."""
        key = (system, operation, subject, since_seq)
        before = self._attempts.pop(key, None)
        if before is None:
            (before,) = self._connection.execute(
                self._sql["count_attempts"],
                {"system": system, "operation": operation, "subject": subject or None, "since_seq": since_seq},
            ).fetchone()
        self._attempts[key] = before + 1
        if len(self._attempts) > COUNTERS_MAX:
            self._attempts.popitem(last=False)
        return int(before) + 1

    def find(self, system: str, kind: str, field: str, value: str) -> list[Found]:
        """Earlier effects with this value in a field that some look-up asks for."""
        rows = self._connection.execute(
            self._sql["find_effects"],
            {"system": system, "kind": kind, "field": field, "value": value, "count_max": FOUND_MAX},
        )
        return [Found(row[0], row[1], row[2], json.loads(row[3]), json.loads(row[4])) for row in rows]

    def remembered(self, system: str, key: str) -> Remembered | None:
        """What was answered under an idempotency key, or None."""
        row = self._connection.execute(self._sql["find_key"], {"system": system, "key": key}).fetchone()
        return None if row is None else Remembered(row[0], row[1], row[2], json.loads(row[3]))

    def fault_overrides(self) -> dict[str, tuple[int, str | None]]:
        """The rules that were given at run time, by system: since which call, and their JSON or None."""
        return {row[0]: (row[1], row[2]) for row in self._connection.execute(self._sql["all_faults"])}

    def summary(self) -> dict[str, Any]:
        """Counts of everything."""
        return summarize(self._connection, self._sql)

    async def commit(self, *rows: Row) -> None:
        """Write the rows in one transaction with all others of this turn; returns when they are committed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if not self._pending:
            loop.call_soon(self._flush)
        self._pending.append((rows, done))
        await done

    def close(self) -> None:
        """Write what is pending and let go of the file."""
        self._flush()
        self._connection.close()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for rows, _ in pending:
                for name, parameters in rows:
                    self._connection.execute(self._sql[name], parameters)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            for _, done in pending:
                if not done.done():
                    done.set_exception(JournalError(f"the sandbox log cannot be written: {error}"))
            return
        for _, done in pending:
            if not done.done():
                done.set_result(None)


class JournalError(Exception):
    """Nothing of this commit was written: the work that it stands for was not done."""


def lookup_fields(system: str, file: SandboxFile) -> set[tuple[str, str]]:
    """(kind, field) of the system's effects that something looks up."""
    wanted: set[tuple[str, str]] = set()
    for part in file.systems:
        if part.name == system:
            for operation in part.operations:
                if operation.lookup:
                    wanted.add((operation.lookup.effect, operation.lookup.by))
                if operation.requires:
                    wanted.add((operation.requires.effect, "id"))
    return wanted
