"""Decides over a command (it becomes a row, claimed at once) and a resolution (a person's word on an unknown row).
Pure: what it needs of the world is in the state that `store.load` locked, and in the catalogue of operations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import orjson
import pydantic

from factmesh import ids
from factmesh.effects import Amend, Effect, MarkLedger, Note, Publish, Schedule
from factmesh.errors import ConflictError, ErrorClass, Reason, ValidationError
from factmesh.message import Message, from_ms, pack_delivery
from factmesh.retry import RetryPolicy
from factmesh_connector.follow import counts_from
from factmesh_connector.model import (
    KIND_PREFIX,
    OUTPUT_BYTES_MAX,
    Catalogue,
    Hand,
    Key,
    Operation,
    Row,
    State,
    Task,
    operation_of,
    pack_task,
    result_body,
)

SERVICE = "connector"
VERDICTS = ("happened", "not_happened", "discarded")
_CANONICAL = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}").fullmatch
#: What may be a number with a fraction or an exponent. A text may look like one: that costs time only.
_FLOAT = re.compile(rb"[:,\[]-?[0-9]+[.eE]").search


def result_id(command_id: UUID, epoch: int) -> UUID:
    """A result's id derives from (command id, settlement epoch): the same outcome told twice has one id.

    Its root is a name of its own: under the command's, epoch 1 would be the id of what opening 1 of the command emits.
    """
    return ids.message_id(SERVICE, f"result:{command_id}", epoch, 0, ids.instant_ms_of(command_id))


def object_key(message: Message) -> str:
    """A command is decided under its idempotency key's lock, a resolution under its command's row's."""
    if message.kind == "command":
        return f"key:{message['idempotency_key']}"
    if message.kind == "resolution":
        return f"row:{message['command_id']}"
    raise ValidationError(
        f"a {message.kind} on a command topic", where=message.where, hint="send commands and resolutions only"
    )


def decide(catalogue: Catalogue, state: State, message: Message, now: datetime) -> tuple[State, Sequence[Effect]]:
    """The connector's decision over one message."""
    if message.kind == "command":
        return _command(catalogue, state, message)
    if message.kind == "resolution":
        return _resolution(catalogue, state, message, now)
    raise ValidationError(
        f"a {message.kind} on a command topic", where=message.where, hint="send commands and resolutions only"
    )


# --- commands --------------------------------------------------------------------------------------------------------


def _command(catalogue: Catalogue, state: State, message: Message) -> tuple[State, Sequence[Effect]]:
    record = message.record
    connector, name = record["connector"], record["operation"]
    operation = operation_of(catalogue, connector, name)
    if operation is None:
        raise ValidationError(
            f"no operation {connector}.{name} is declared here",
            where=message.where,
            hint="declare it in connectors/, or correct the workflow; then replay",
        )
    command_id = message.id or _uuid(message, "ce_id")
    input_, compact, canonical = _body(message)
    retry = record["retry"]
    task = Task(
        command_id=str(command_id),
        connector=connector,
        operation=name,
        input=compact,
        idempotency_key=_id(message, "idempotency_key"),
        correlation_id=record["correlation_id"],
        actor=record["actor"],
        business_object_type=record["business_object_type"],
        business_object_id=record["business_object_id"],
        instance_id=_id(message, "instance_id"),
        instance_seq=record["instance_seq"],
        step=record["step"],
        workflow=record["workflow"],
        in_flight_max_s=operation.in_flight_max_s,
        root=message.root.text,
        opening=message.opening,
        deadline=_instant(record["deadline"]),
        retry=None if retry is None else _policy(retry, message),
        traceparent=message.traceparent,
    )
    body_hash = ids.body_hash(connector, name, canonical)
    key = _take_key(state.key, task, command_id, body_hash, message)
    schedule = Schedule(
        kind=KIND_PREFIX + connector,
        id=command_id,
        payload=pack_task(task, pack_delivery(message.delivery)),
        start_now=True,
        tag=message.instance_id,
        hand=Hand(task, input_),
    )
    note = Note({"step": task.step, "operation": f"{connector}.{name}", "touches": sorted(input_)})
    return State(key, state.row, state.disposition), (schedule, note)


def _take_key(held: Key | None, task: Task, command_id: UUID, body_hash: bytes, message: Message) -> Key:
    """INV-K: calls under one key carry one body, and are one command's, until a known failure frees the key."""
    if held is not None and not held.known_failed:
        if held.body_hash != body_hash:
            raise ConflictError(
                f"idempotency key {task.idempotency_key} was used with another body by command {held.command_id}",
                where=message.where,
                hint="a new intent needs a new key: discard this command, or retry the step",
            )
        if held.command_id != command_id:
            raise ConflictError(
                f"idempotency key {task.idempotency_key} belongs to command {held.command_id}",
                where=message.where,
                hint="the same intent is under way already: discard this command",
            )
    return Key(command_id, body_hash, known_failed=False)


def _policy(raw: bytes, message: Message) -> RetryPolicy:
    try:
        return _parsed_policy(raw)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ValidationError(
            f"its retry policy is not one: {place or 'it'}: {problem['msg']}",
            where=message.where,
            hint="correct the workflow's retry policy",
        ) from None


@lru_cache(maxsize=256)
def _parsed_policy(raw: bytes) -> RetryPolicy:
    return RetryPolicy.model_validate_json(raw)


# --- resolutions -----------------------------------------------------------------------------------------------------


def _resolution(
    catalogue: Catalogue, state: State, message: Message, now: datetime
) -> tuple[State, Sequence[Effect]]:
    verdict = message["verdict"]
    if verdict not in VERDICTS:
        raise ValidationError(
            f"verdict {verdict!r} is not known", where=message.where, hint=f"one of {', '.join(VERDICTS)}"
        )
    row = state.row
    if verdict == "discarded":
        return _discarded(state, message, now)
    if row is None:
        raise ValidationError(
            f"command {message['command_id']} has no row here, so there is nothing to resolve",
            where=message.where,
            hint="a command that died before its first attempt is replayed or discarded",
        )
    if row.state != "unknown":
        raise ValidationError(
            f"command {message['command_id']} is {row.state}, not unknown: the resolution is refused",
            where=message.where,
            hint="look at the instance again, its state has moved on",
        )
    if verdict == "happened":
        operation = operation_of(catalogue, row.task.connector, row.task.operation)
        output = _output(message, operation)
        body = result_body(row.task, "done", row.epoch + 1, row.history, at=now, output=output, verdict=verdict)
        return _settled(state, row, message, "done", body)
    entered_at = from_ms(message["entered_at"])
    counts = counts_from(row.task.in_flight_max_s, row.history.ended_at or row.ended_at, now)
    if entered_at < counts:
        raise ValidationError(
            f"`not happened` was said at {entered_at.isoformat()}, and until {counts.isoformat()} a call of"
            f" command {message['command_id']} may still be in flight",
            where=message.where,
            hint="look again after that instant, then resolve again",
        )
    history = row.history._replace(
        error_class=row.history.error_class or ErrorClass.AMBIGUOUS,
        error_message="a person found that it did not happen",
    )
    body = result_body(row.task, "failed", row.epoch + 1, history, at=now, verdict=verdict)
    return _settled(state, row, message, "failed", body)


def _settled(
    state: State, row: Row, message: Message, new: str, body: Mapping[str, Any]
) -> tuple[State, Sequence[Effect]]:
    """The row's amendment and its result, told in the name of the person who said so."""
    task, command_id = row.task, UUID(row.task.command_id)
    body = {**body, "actor": message["actor"]}
    effects: tuple[Effect, ...] = (
        Amend(KIND_PREFIX + task.connector, command_id, expected="unknown", state=new),
        Publish("result", "result", task.instance_id, body, id=result_id(command_id, row.epoch + 1)),
        Note({"step": task.step, "operation": f"{task.connector}.{task.operation}", "verdict": message["verdict"]}),
    )
    return state._replace(row=replace(row, state=new, epoch=row.epoch + 1)), effects


def _discarded(state: State, message: Message, now: datetime) -> tuple[State, Sequence[Effect]]:
    """Ends a command that died before it became a row; every other is ended by what is known of its calls."""
    command_id = _uuid(message, "command_id")
    if state.row is not None:
        hint = "resolve it as happened or not happened" if state.row.state == "unknown" else "look at the instance"
        raise ValidationError(
            f"command {command_id} has a row and is {state.row.state}: it cannot be discarded",
            where=message.where,
            hint=hint,
        )
    if state.disposition != "dead":
        raise ValidationError(
            f"command {command_id} is {state.disposition or 'not known here'}: only a dead one is discarded",
            where=message.where,
            hint="look at the quarantine record again",
        )
    body = {
        "ce_type": "factmesh.command.failed",
        "command_id": str(command_id),
        "step": "",
        # The resolution does not name the key, and nothing was called under it: the nil UUID.
        "idempotency_key": str(UUID(int=0)),
        "outcome": "failed",
        "output": None,
        "error_class": str(ErrorClass.VALIDATION),
        "error_message": "a person discarded it before its first attempt",
        "attempts": 0,
        "duration_ms": 0,
        "verdict": "discarded",
        "epoch": 0,
    }
    mark = MarkLedger(f"id:{command_id}", "discarded", Reason.BUSINESS, f"discarded by {message['actor']}")
    publish = Publish("result", "result", message["instance_id"], body, id=result_id(command_id, 0))
    return state._replace(disposition="discarded"), (mark, publish)


# --- fields ----------------------------------------------------------------------------------------------------------


def _uuid(message: Message, field: str) -> UUID:
    try:
        return UUID(message[field])
    except ValueError:
        raise ValidationError(
            f"{field} is not a UUID", where=message.where, hint="the sender must be corrected"
        ) from None


def _id(message: Message, field: str) -> str:
    """An id in its canonical spelling, which is the one that our services write."""
    text: str = message[field]
    return text if _CANONICAL(text) else str(_uuid(message, field))


def _instant(ms: int | datetime | None) -> datetime | None:
    if ms is None:
        return None
    return ms.astimezone(UTC) if isinstance(ms, datetime) else from_ms(ms)


def _body(message: Message) -> tuple[dict[str, Any], str, bytes]:
    """The body as a value, as compact text, and as the canonical bytes that its hash is made of (INV-K).

    Our services send it canonical: then it is read once and passed on as it is. Whatever is not plainly so, and all
    that the two JSON libraries spell in two ways (floats), is spelt anew.
    """
    raw: bytes = message["body"]
    if not _FLOAT(raw):
        try:
            value = orjson.loads(raw)
            if type(value) is dict and orjson.dumps(value, option=orjson.OPT_SORT_KEYS) == raw:
                return value, raw.decode(), raw
        except (orjson.JSONDecodeError, orjson.JSONEncodeError):
            pass  # told below, in the message's own terms
    value = _json_object(raw, message, "body")
    compact = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return value, compact, ids.canonical_json(value)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _json_object(raw: bytes, message: Message, field: str) -> dict[str, Any]:
    try:
        value = json.loads(raw, parse_constant=_no_constant)
        ids.canonical_json(value)  # a lone surrogate parses, and can never be written again
    except (ValueError, RecursionError):
        raise ValidationError(
            f"{field} is not JSON", where=message.where, hint="correct it, then replay"
        ) from None
    if not isinstance(value, dict):
        raise ValidationError(f"{field} is not a JSON object", where=message.where, hint="correct it, then replay")
    return value


def _output(message: Message, operation: Operation | None) -> bytes:
    """What a person says the operation would have answered: an object with the declared fields, and capped."""
    raw = message["output"]
    if raw is None:
        raise ValidationError(
            "`happened` comes without the operation's output", where=message.where, hint="resolve again with it"
        )
    value = _json_object(raw, message, "output")
    missing = sorted(set(operation.output_fields) - set(value)) if operation else []
    if missing:
        raise ValidationError(
            f"the output lacks {', '.join(missing)}", where=message.where, hint="resolve again with every field"
        )
    bytes_max = operation.output_bytes_max if operation else OUTPUT_BYTES_MAX
    output = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    if len(output) > bytes_max:
        raise ValidationError(
            f"the output has {len(output)} bytes, at most {bytes_max} are kept",
            where=message.where,
            hint="give the declared fields only",
        )
    return output


__all__ = ["SERVICE", "decide", "object_key", "result_id"]
