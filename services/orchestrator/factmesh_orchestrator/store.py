"""Set-based load and save of business objects and instances, and the table of deployed definitions.
Decides nothing; every read of state happens under the object's lock, every write moves on from what was read there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from factmesh.batch import Change
from factmesh.errors import ConflictError, IllegalTransitionError, TransientError
from factmesh.evaluation import Expressions
from factmesh.ids import canonical_json
from factmesh.message import Message, from_ms
from factmesh.postgres import Connection, Pool, Record, load_sql, notify
from factmesh.retry import RetryPolicy
from factmesh.workflow import CallStep, compile_workflow, parse_workflow
from factmesh.yaml import parse
from factmesh_orchestrator.decide import Address, State
from factmesh_orchestrator.definitions import Definitions, Deployed, definitions, deployed
from factmesh_orchestrator.model import ATTENTION, Instance, ObjectKey, ObjectState

SQL = load_sql(__file__, "store.sql")

_ADDRESS = "\x1einstance\x1f"
"""Begins the key of a signal that names no business object; no type of one begins with a control character."""


def channel(schema: str) -> str:
    """Where deployments are notified; channels are global in a database."""
    return f"{schema}.definitions"


def key(message: Message) -> str:
    """What a message is folded into: its business object, or, where it names none, the address of its instance."""
    type_, id_ = message.record["business_object_type"], message.record["business_object_id"]
    return f"{type_}\x1f{id_}" if type_ else _ADDRESS + str(message.record.get("instance_id"))


class Store:
    """The orchestrator's tables. Definitions are kept in memory after the first read: a deployed one never changes."""

    def __init__(self, expressions: Expressions) -> None:
        self._expressions = expressions
        self._known: dict[tuple[str, str], Deployed] = {}
        self._current: tuple[Deployed, ...] = ()
        self._index = Definitions()

    # --- batches -----------------------------------------------------------------------------------------------------

    async def load(self, conn: Connection, messages: Sequence[Message], now: datetime) -> Mapping[str, State]:
        """Lock the objects of these messages, creating those of facts; then read them and the instances they need."""
        objects: dict[str, tuple[ObjectKey, bool]] = {}
        wanted: set[str] = set()
        addresses: dict[str, str] = {}
        for m in messages:
            name = key(m)
            if name.startswith(_ADDRESS):
                addresses[name] = str(m.record.get("instance_id"))
                continue
            known = objects.get(name)
            whole = m.kind == "fact" or (known is not None and known[1])
            objects[name] = (ObjectKey(m.record["business_object_type"], m.record["business_object_id"]), whole)
            if m.record.get("instance_id"):
                wanted.add(m.record["instance_id"])
        found: dict[str, State] = dict(await self._find(conn, addresses)) if addresses else {}
        if objects:
            order = sorted(objects.values())
            rows = await conn.fetch(
                SQL.load, [k.type for k, _ in order], [k.id for k, _ in order], [w for _, w in order], list(wanted)
            )
            found.update(await self._states(conn, rows))
        return found

    async def _find(self, conn: Connection, addresses: Mapping[str, str]) -> dict[str, Address]:
        wanted: dict[UUID, str] = {}
        for name, text in addresses.items():
            try:
                wanted[UUID(text)] = name
            except ValueError:
                continue
        found = {name: Address() for name in addresses}
        for row in await conn.fetch(SQL.find_objects, list(wanted)):
            found[wanted[row["id"]]] = Address(row["object_type"], row["object_id"])
        return found

    async def _states(self, conn: Connection, rows: Iterable[Record]) -> dict[str, ObjectState]:
        objects: list[tuple[str, Record]] = []
        instances: dict[str, dict[str, Instance]] = {}
        unknown: set[tuple[str, str]] = set()
        for row in rows:
            name = f"{row['object_type']}\x1f{row['object_id']}"
            id_ = row["instance_id"]
            if id_ is None:
                objects.append((name, row))
                continue
            instance = Instance.from_json(orjson.loads(row["state"]), id_)
            instances.setdefault(name, {})[str(id_)] = instance
            if (instance.workflow, instance.version) not in self._known:
                unknown.add((instance.workflow, instance.version))
        if unknown:
            await self.know(conn, unknown)
        # An instance whose object is not locked here was named by a message of another object: it is not shown.
        states: dict[str, ObjectState] = {}
        for name, row in objects:
            waiting = orjson.loads(row["state"]) if row["state"] is not None else {}
            active = dict(zip(row["active"], row["active_workflows"], strict=True))
            key = ObjectKey(row["object_type"], row["object_id"])
            states[name] = ObjectState.from_row(key, waiting, active, instances.get(name, {}), self._index)
        return states

    def initial(self, message: Message) -> State:
        """The state of an object that `load` did not find: no fact of it ever came here."""
        if key(message).startswith(_ADDRESS):
            return Address()
        object_key = ObjectKey(message.record["business_object_type"], message.record["business_object_id"])
        return ObjectState(object_key, definitions=self._index)

    async def save(self, conn: Connection, changes: Sequence[Change[State]]) -> None:
        """Write what changed, in one statement, and what operators look for, where that changed, in another.

        Raises IllegalTransitionError where a row was not as loaded (INV-F).
        """
        objects: list[tuple[Any, ...]] = []
        created: list[tuple[Any, ...]] = []
        moved: list[tuple[Any, ...]] = []
        noticed: list[tuple[Any, ...]] = []
        settled: list[UUID] = []
        for change in changes:
            before, after = change.before, change.after
            if not isinstance(after, ObjectState) or after is before:
                continue
            before = before if isinstance(before, ObjectState) else None
            if before is None or not _same_row(before, after):
                objects.append(_row(after))
            for id_, instance in after.instances.items():
                was = before.instances.get(id_) if before is not None else None
                if instance is was:
                    continue
                if was is None:
                    created.append(_new_row(instance))
                else:
                    moved.append(_moved_row(was, instance))
                if instance.status in ATTENTION:
                    noticed.append(_attention_row(instance))
                elif was is not None and was.status in ATTENTION:
                    settled.append(instance.id)
        if objects or created:
            counts = await conn.fetchrow(SQL.save, *_columns(moved, 8), *_columns(objects, 5), *_columns(created, 14))
        elif moved:
            counts = await conn.fetchrow(SQL.save_moved, *_columns(moved, 8))
        else:
            return
        assert counts is not None
        if (counts["objects"], counts["moved"]) != (len(objects), len(moved)):
            raise IllegalTransitionError(
                f"{len(moved)} instances and {len(objects)} objects were to be moved on, {counts['moved']} and"
                f" {counts['objects']} were as they had been loaded",
                hint="nothing was kept; this is a bug in the orchestrator: state was written outside its lock",
            )
        if noticed or settled:
            await conn.execute(SQL.attend, *_columns(noticed, 5), settled)

    # --- definitions -------------------------------------------------------------------------------------------------

    @property
    def definitions(self) -> Definitions:
        return self._index

    async def read_current(self, conn: Connection | Pool) -> tuple[Deployed, ...]:
        """The current versions; what is known already is not compiled again. Takes no effect before `use`."""
        return tuple(
            [
                self._known.get((row["name"], row["version"])) or self._compile(row)
                for row in await conn.fetch(SQL.current_definitions)
            ]
        )

    def use(self, current: Iterable[Deployed]) -> None:
        """New instances start on these from now on."""
        self._current = tuple(current)
        self._reindex()

    async def know(self, conn: Connection, versions: Set[tuple[str, str]]) -> None:
        """Have these versions at hand; one that was never deployed stays unknown."""
        for workflow, version in versions - self._known.keys():
            row = await conn.fetchrow(SQL.definition, workflow, version)
            if row is not None:
                self._compile(row)
                self._reindex()

    def _compile(self, row: Record) -> Deployed:
        made = compile_definition(
            row["yaml"], orjson.loads(row["policies"]), row["commit_id"], self._expressions, row["content_hash"]
        )
        self._known[made.name, made.version] = made
        return made

    def _reindex(self) -> None:
        self._index = definitions(self._current, self._known.values())


def compile_definition(
    yaml: str, policies: Mapping[str, Any], commit: str, expressions: Expressions, content_hash: str = ""
) -> Deployed:
    """A stored definition, ready to decide with. Raises TransientError where its content is not what was deployed."""
    workflow = parse_workflow(parse(yaml, file="deployed definition"))
    if content_hash and workflow.content_hash != content_hash:
        raise TransientError(
            f"the stored text of workflow {workflow.name} {workflow.version} is not the one that was deployed",
            hint="the table definitions was altered by hand: restore it",
        )
    retries = {name: RetryPolicy.model_validate(policy) for name, policy in policies.items()}
    return deployed(compile_workflow(workflow, expressions), retries, commit)


async def deploy(
    conn: Connection,
    schema: str,
    yaml: str,
    policies: Mapping[str, RetryPolicy],
    *,
    by: str,
    commit: str,
    if_absent: bool = False,
) -> str:
    """Store a version and make it current, in one transaction, audited; `deployed`, `current` or `unchanged`.

    With `if_absent` a version that is there stays as it is, current or not.

    Raises ConflictError where that version was deployed with another content: a deployed version never changes.
    The caller has linted it. A running service hears of it by NOTIFY, and looks by itself within seconds.
    """
    workflow = parse_workflow(parse(yaml, file="definition"))
    used = {s.retry for s in workflow.steps if isinstance(s, CallStep)}
    kept = canonical_json({name: p.model_dump(mode="json") for name, p in policies.items() if name in used})
    name, version = workflow.name, workflow.version
    async with conn.transaction():
        await conn.execute(SQL.lock_definitions)
        there = await conn.fetchrow(SQL.definition, name, version)
        if there is not None and (there["content_hash"], bytes(there["policies"])) != (workflow.content_hash, kept):
            raise ConflictError(
                f"workflow {name} {version} is deployed with another content",
                hint="a deployed version never changes, nor do the policies that it names: raise document.version",
            )
        current = {row["name"]: row["version"] for row in await conn.fetch(SQL.current_definitions)}
        if there is not None and (if_absent or current.get(name) == version):
            return "unchanged"
        if there is None:
            await conn.execute(
                SQL.insert_definition, name, version, workflow.content_hash, yaml, kept, by, commit
            )
        await conn.execute(SQL.clear_current, name)
        await conn.execute(SQL.make_current, name, version)
        act = "deployed" if there is None else "current"
        await conn.execute(SQL.record_act, act, name, version, workflow.content_hash, by, commit)
        await notify(conn, channel(schema))
        return act


# --- rows ------------------------------------------------------------------------------------------------------------


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as the columns that `unnest` takes."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]


def _same_row(a: ObjectState, b: ObjectState) -> bool:
    return a.active == b.active and a.kept == b.kept and a.queue == b.queue


def _row(state: ObjectState) -> tuple[Any, ...]:
    waiting = state.row()
    return (
        state.key.type,
        state.key.id,
        "{" + ",".join(map(str, state.active)) + "}",
        # Names match [a-z_][a-z0-9_]*, so they need no quoting in an array's text.
        "{" + ",".join(state.active.values()) + "}",
        json.dumps(waiting, separators=(",", ":")).encode() if waiting else None,
    )


def _instant(ms: int | None) -> datetime | None:
    return None if ms is None else from_ms(ms)


def _new_row(i: Instance) -> tuple[Any, ...]:
    return (
        i.id,
        i.workflow,
        i.version,
        i.business_object_type,
        i.business_object_id,
        i.correlation_id,
        from_ms(i.started_at),
        _instant(i.due_by),
        i.seq,
        str(i.status),
        i.step,
        i.outcome,
        _instant(i.ended_at),
        orjson.dumps(i.to_json()),
    )


def _moved_row(was: Instance, i: Instance) -> tuple[Any, ...]:
    return (
        i.id,
        was.seq,
        i.seq,
        str(i.status),
        i.step,
        i.outcome,
        _instant(i.ended_at),
        orjson.dumps(i.to_json()),
    )


def _attention_row(i: Instance) -> tuple[Any, ...]:
    return (i.id, str(i.status), i.workflow, i.step, i.reason)
