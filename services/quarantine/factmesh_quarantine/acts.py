"""What people do about records: replay, resolve, discard, correct; each one conditional update, then a publication.
The bytes are stored before they are published, so whoever is killed in between, somebody publishes the same ones.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh import dlq
from factmesh.errors import ErrorClass, Reason, ValidationError
from factmesh.ids import Root
from factmesh.message import H_TRACEPARENT, Emission, Headers, pack, unpack, unpack_delivery
from factmesh.postgres import Connection, Pool, Record, is_transient, load_sql
from factmesh.registry import Registry
from factmesh.topics import COMMAND_NOTIFIER, topic_of
from factmesh_quarantine import messages
from factmesh_quarantine.model import (
    OPEN_STATES,
    State,
    Verb,
    Way,
    discard_ends_command,
    may_discard,
    next_state,
    way_back,
)

SQL = load_sql(__file__, "acts.sql")
TRIES_MAX = 20
"""Losing a race for a number this often means something else is wrong."""
PUBLISH_BATCH_MAX = 200
TRIES_MAX = 5

PublishAll = Callable[[Sequence[Emission]], Awaitable[None]]


class RefusedError(ValidationError):
    """The act is not possible for this record as it is now; nothing was changed."""

    error_class = ErrorClass.CONFLICT


@dataclass(frozen=True, slots=True)
class Raised:
    """An act that is stored and due; `emissions` are what it publishes."""

    act: int
    record: UUID
    verb: Verb
    number: int
    emissions: tuple[Emission, ...]


def original_of(row: Record) -> dlq.DeadLetter:
    """The dead letter that `dlq.restore` needs: the first death's bytes. Raises RefusedError when they are gone."""
    if row["original"] is None:
        raise _refuse(row, "its bytes are past their retention", "nothing can be published for it any more")
    return dlq.DeadLetter(
        original=unpack_delivery(row["original"]),
        root=bytes(row["root"]).decode(),
        opening=row["dead"],
        group=row["grp"],
        reason=Reason(row["reason"]),
        error_class=ErrorClass(row["error_class"]),
        stage=row["stage"],
        exception_type=row["exception_type"],
        message=row["message"],
        first_failed_at=row["first_failed_at"],
        failed_at=row["failed_at"],
        service_version=row["service_version"],
        fingerprint=row["fingerprint"],
    )


def correction_of(row: Record) -> dlq.Correction | None:
    """What an operator replaced, if anything."""
    if row["correction"] is None:
        return None
    (e,) = unpack(row["correction"])
    return dlq.Correction(e.value, e.headers)


def _refuse(row: Record, what: str, hint: str) -> RefusedError:
    at = f"{row['topic']}[{row['partition']}]@{row['offset']}"
    return RefusedError(what, where=f"record {row['id']} ({at})", hint=hint)


def check_open(row: Record) -> None:
    """Raise RefusedError unless the record is open."""
    state = State(row["state"])
    if state not in OPEN_STATES:
        who = f" by {row['last_by']}" if row["last_by"] else ""
        raise _refuse(row, f"it is {state}{who}, not open", "only open records are replayed, resolved or discarded")


def about_of(row: Record) -> messages.About:
    """The record as its instance knows it. Raises RefusedError when no instance is known."""
    if row["instance_id"] is None:
        raise _refuse(row, "its instance is not known", "correct and replay it, or discard it")
    return messages.About(
        row["thread"],
        bytes(row["root"]).decode(),
        row["grp"],
        row["instance_id"],
        row["correlation_id"],
        row["business_object_type"],
        row["business_object_id"],
        unpack_delivery(row["original"]).header(H_TRACEPARENT) if row["original"] is not None else None,
    )


def command_of(row: Record) -> UUID:
    """The command that the record is about. Raises RefusedError when it is not about one."""
    command: UUID | None = row["command_id"] or Root(bytes(row["root"]).decode()).id
    if command is None:
        raise _refuse(row, "the id of its command is not known", "discard it")
    return command


class Acts:
    """The acts over one index. `publish` returns when the broker has acknowledged."""

    def __init__(self, pool: Pool, registry: Registry, namespace: str, publish: PublishAll) -> None:
        self.pool = pool
        self.registry = registry
        self.namespace = namespace
        self._publish = publish

    async def read(self, conn: Connection | Pool, record: UUID) -> Record:
        row = await conn.fetchrow(SQL.read, record)
        if row is None:
            raise ValidationError(f"no record {record}", hint="`factmesh dlq list` shows those that there are")
        return row

    def way(self, row: Record) -> Way:
        """How this record is brought back."""
        return way_back(row["topic"], row["reason"], self.namespace)

    # --- replay ------------------------------------------------------------------------------------------------------

    async def plan_replay(self, row: Record, number: int, person: messages.Person) -> tuple[Verb, tuple[Emission, ...]]:
        """What a replay under this number would publish. Raises RefusedError where it is not possible."""
        check_open(row)
        way = self.way(row)
        if way is Way.RESOLUTION:
            raise _refuse(
                row,
                "whether it happened is unknown, so it is never simply replayed",
                "find out, then `factmesh dlq resolve --happened OUTPUT` or `--not-happened`",
            )
        if way is Way.RETRY_STEP:
            about, command = about_of(row), command_of(row)
            e = await messages.retry_step(self.registry, self.namespace, about, command, number, person)
            return Verb.RETRY_STEP, (e,)
        return Verb.REPLAY, (dlq.restore(original_of(row), number, correction_of(row)),)

    async def replay(self, conn: Connection, record: UUID, person: messages.Person) -> Raised:
        """Raise the next opening in the caller's transaction. Raises RefusedError; then nothing was changed."""
        for _ in range(TRIES_MAX):
            row = await self.read(conn, record)
            number = row["counter"] + 1
            verb, emissions = await self.plan_replay(row, number, person)
            raised = await self._raise(conn, row, verb, number, emissions, person)
            if raised is not None:
                return raised
        raise self._lost(record)

    async def resolve(
        self,
        conn: Connection,
        record: UUID,
        person: messages.Person,
        *,
        verdict: str,
        output: bytes | None,
        retry: bool = False,
    ) -> Raised:
        """A person's word on an unknown outcome, in the caller's transaction; `retry` also asks for a new run."""
        for _ in range(TRIES_MAX):
            row = await self.read(conn, record)
            check_open(row)
            if self.way(row) is not Way.RESOLUTION:
                raise _refuse(row, f"its outcome is known ({row['reason']})", "replay or discard it")
            number, about, command = row["counter"] + 1, about_of(row), command_of(row)
            what = messages.Verdict(verdict, output)
            emissions = [await messages.resolution(self.registry, row["topic"], about, command, number, what, person)]
            if retry:
                self._check_retry(row, verdict)
                emissions.append(
                    await messages.retry_step(self.registry, self.namespace, about, command, number, person)
                )
            raised = await self._raise(conn, row, Verb.RESOLVE, number, tuple(emissions), person)
            if raised is not None:
                return raised
        raise self._lost(record)

    def _check_retry(self, row: Record, verdict: str) -> None:
        if verdict != "not_happened":
            raise _refuse(row, "what happened is not retried", "leave --retry out")
        if topic_of(row["topic"], self.namespace) is COMMAND_NOTIFIER:
            raise _refuse(row, "a notification that did not happen is sent again by itself", "leave --retry out")

    async def _raise(
        self,
        conn: Connection,
        row: Record,
        verb: Verb,
        number: int,
        emissions: tuple[Emission, ...],
        person: messages.Person,
    ) -> Raised | None:
        state = State(row["state"])
        act = await conn.fetchval(
            SQL.raise_opening, row["id"], row["thread"], number, state, next_state(state, verb), verb,
            pack(emissions), person.by, person.at, person.reason, person.operation, row["dead"],
        )  # fmt: skip
        return None if act is None else Raised(act, row["id"], verb, number, emissions)

    def _lost(self, record: UUID) -> RefusedError:
        return RefusedError(
            f"others acted on the same message {TRIES_MAX} times in a row", where=f"record {record}", hint="try again"
        )

    # --- discard -----------------------------------------------------------------------------------------------------

    async def plan_discard(self, row: Record, person: messages.Person) -> tuple[Verb, int, tuple[Emission, ...]]:
        """What a discard would publish: who waits for the message is told. Raises RefusedError."""
        check_open(row)
        if not may_discard(row["topic"], row["reason"], State(row["state"]), self.namespace):
            raise _refuse(row, "whether it happened is unknown", "it can only be resolved: `factmesh dlq resolve`")
        if row["instance_id"] is None:
            return Verb.DISCARD, row["dead"], ()
        about = about_of(row)
        ended = discard_ends_command(row["topic"], row["reason"], about.root, self.namespace)
        if ended is not None:
            number, given_up = row["counter"] + 1, messages.Verdict("discarded", None)
            e = await messages.resolution(self.registry, row["topic"], about, ended, number, given_up, person)
            return Verb.GIVE_UP, number, (e,)
        e = await messages.message_discarded(self.registry, self.namespace, about, row["dead"], person)
        return Verb.DISCARD, row["dead"], (e,)

    async def discard(self, conn: Connection, record: UUID, person: messages.Person) -> Raised:
        """Give the message up, in the caller's transaction. Raises RefusedError; then nothing was changed."""
        for _ in range(TRIES_MAX):
            row = await self.read(conn, record)
            verb, number, emissions = await self.plan_discard(row, person)
            if verb is Verb.GIVE_UP:
                raised = await self._raise(conn, row, verb, number, emissions, person)
                if raised is not None:
                    return raised
                continue
            state = State(row["state"])
            act = await conn.fetchval(
                SQL.discard, row["id"], row["thread"], state, next_state(state, verb), number, pack(emissions),
                person.by, person.at, person.reason, person.operation,
            )  # fmt: skip
            if act is not None:
                return Raised(act, row["id"], verb, number, emissions)
        raise self._lost(record)

    # --- correct, assign ---------------------------------------------------------------------------------------------

    def check_correctable(self, row: Record) -> None:
        """Raise RefusedError unless a replay would send the record's bytes."""
        check_open(row)
        hints = {
            Way.RETRY_STEP: "correct its workflow, connector or system; then `factmesh dlq replay` runs the step again",
            Way.RESOLUTION: "find out whether it happened, then `factmesh dlq resolve`",
        }
        hint = hints.get(self.way(row))
        if hint is not None:
            raise _refuse(row, f"a command that ended {row['reason']} is not sent again as it was", hint)

    async def correct(self, row: Record, value: bytes | None, headers: Headers, person: messages.Person) -> None:
        """Keep corrected bytes beside the original; the next replay sends them. Raises RefusedError."""
        self.check_correctable(row)
        packed = pack([Emission(row["topic"], None, value, headers)])
        done = await self.pool.fetchval(
            SQL.correct, row["id"], packed, person.by, person.at, row["corrected_at"], person.reason
        )
        if done is None:
            raise _refuse(row, "somebody corrected or closed it meanwhile", "look at it again")

    async def assign(self, record: UUID, owner: str, person: messages.Person) -> None:
        """Give the record an owner."""
        row = await self.read(self.pool, record)
        await self.pool.fetchval(SQL.assign, row["id"], owner, person.by, person.at)

    # --- publish -----------------------------------------------------------------------------------------------------

    async def publish_act(self, act: int, now: Callable[[], datetime]) -> bool:
        """Publish one act that is due; False when another does so at this moment, or did."""

        async def once() -> int:
            async with self.pool.acquire() as conn, conn.transaction():
                row = await conn.fetchrow(SQL.take, act)
                return await self._publish_rows(conn, [row] if row is not None else [], now)

        return await self._again(once) == 1

    async def publish_due(self, before: datetime, now: Callable[[], datetime]) -> int:
        """Publish what was raised before that instant and is not published: under the same numbers, the same bytes."""
        total = 0

        async def once() -> int:
            async with self.pool.acquire() as conn, conn.transaction():
                return await self._publish_rows(conn, await conn.fetch(SQL.due, before, PUBLISH_BATCH_MAX), now)

        while True:
            n = await self._again(once)
            total += n
            if n < PUBLISH_BATCH_MAX:
                return total

    async def _again(self, once: Callable[[], Awaitable[int]]) -> int:
        """Over a deadlock with the filing of a record at this moment: the same bytes under the same number go out."""
        for tries_left in range(TRIES_MAX - 1, -1, -1):
            try:
                return await once()
            except Exception as error:
                if not tries_left or not is_transient(error):
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    async def _publish_rows(self, conn: Connection, rows: Sequence[Any], now: Callable[[], datetime]) -> int:
        if not rows:
            return 0
        await self._publish([e for r in rows for e in unpack(r["bytes"])])
        await conn.execute(SQL.published, [r["id"] for r in rows], now())
        return len(rows)
