"""Decides over a command (a notification, rendered and claimed at once), a resolution, and a status (owners are told).
Pure: channels, rules and templates are given, and what it needs of the world is in the state that `store` locked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pydantic

from factmesh import emitting, ids
from factmesh.effects import Amend, Discard, Effect, MarkLedger, Note, Publish, Schedule
from factmesh.errors import Reason, ValidationError
from factmesh.message import Message, from_ms, pack_delivery
from factmesh.retry import RetryPolicy
from factmesh_notifier.follow import counts_from
from factmesh_notifier.model import (
    RECIPIENTS_MAX,
    Catalogue,
    Channel,
    ChannelKind,
    History,
    Row,
    Rule,
    State,
    Task,
    Text,
    Watched,
    pack_task,
)

SERVICE = "notifier"
STATUS = "status"
DEFAULT_CHANNEL = "email"
VERDICTS = ("happened", "not_happened", "discarded")
FRESH_S_MAX = 86_400.0
"""An owner is not told of what was so a day ago: a rule that is new to an old topic would send a flood."""
ADDRESS_CHARS_MAX = 254
#: Plausible, not proved: only the mail server knows. ASCII alone, because SMTPUTF8 is not asked of every server.
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REPLAY = "correct it, then replay"


# --- the command topic -----------------------------------------------------------------------------------------------


def object_key(message: Message) -> str:
    """A command is decided over nothing, a resolution under its command's row."""
    return f"row:{message['command_id']}" if message.kind == "resolution" else f"command:{message.root.text}"


def decide(catalogue: Catalogue, state: State, message: Message, now: datetime) -> tuple[State, Sequence[Effect]]:
    """The decision over one message of the command topic."""
    if message.kind == "resolution":
        return _resolution(state, message, now)
    return state, _command(catalogue, message)


def _command(catalogue: Catalogue, message: Message) -> tuple[Effect, ...]:
    if message["operation"] != "notify":
        raise ValidationError(
            f"operation {message['operation']!r} is not one of the notifier's", where=message.where, hint="notify"
        )
    body = _json_object(message["body"], message, "body")
    channel = _channel(catalogue, body.get("channel") or DEFAULT_CHANNEL, message)
    template, data = body.get("template"), body.get("data") or {}
    if not isinstance(template, str) or not isinstance(data, dict):
        raise ValidationError("template is a name, data an object", where=message.where, hint=_REPLAY)
    to = _recipients(body.get("to"), channel, message)
    text = _rendered(catalogue, template, {"data": data, "mesh": _mesh(message)}, message)
    if message.id is None:
        raise ValidationError("a command has no id", where=message.where, hint="the sender must be corrected")
    task = _task(message, message.id, channel, template, to, text, data)
    deadline = message["deadline"]
    task = task.model_copy(
        update={
            "deadline": None if deadline is None else from_ms(deadline),
            "retry": _policy(message),
            "step": message["step"],
        }
    )
    note = Note({"step": task.step, "operation": f"notify.{channel.name}", "template": template, "recipients": len(to)})
    return (_schedule(channel, task, message), note)


def _schedule(channel: Channel, task: Task, message: Message) -> Schedule:
    payload = pack_task(task, pack_delivery(message.delivery))
    return Schedule(channel.claim_kind, task.id, payload, start_now=True, tag=task.instance_id)


def _task(
    message: Message,
    id_: UUID,
    channel: Channel,
    template: str,
    to: tuple[str, ...],
    text: Text,
    data: Mapping[str, Any],
) -> Task:
    instance = message.instance_id
    if instance is None:
        raise ValidationError("names no instance", where=message.where, hint="the sender must be corrected")
    return Task(
        id=id_,
        channel=channel.name,
        template=template,
        to=to,
        subject=text.subject,
        text=text.text,
        html=text.html,
        data=ids.canonical_json(dict(data)).decode(),
        at=from_ms(message["ce_time"]),
        correlation_id=message["correlation_id"],
        actor=message["actor"],
        business_object_type=message["business_object_type"],
        business_object_id=message["business_object_id"],
        instance_id=instance,
        instance_seq=message["instance_seq"],
        workflow=message["workflow"],
        step=message["step"] or "",
        in_flight_max_s=channel.in_flight_max_s,
        traceparent=message.traceparent,
        root=message.root.text,
    )


def _channel(catalogue: Catalogue, name: Any, message: Message) -> Channel:
    channel = catalogue.channels.get(name) if isinstance(name, str) else None
    if channel is None:
        raise ValidationError(
            f"no channel is called {name!r}",
            where=message.where,
            hint=f"declare it in channels.yaml ({', '.join(sorted(catalogue.channels))} are there); then replay",
        )
    return channel


def _recipients(raw: Any, channel: Channel, message: Message) -> tuple[str, ...]:
    """Whom to tell, each once. Error texts count them and never quote them."""
    to = [raw] if isinstance(raw, str) else raw
    if not isinstance(to, list) or not 1 <= len(to) <= RECIPIENTS_MAX:
        raise ValidationError(
            f"`to` is an address or a list of 1 to {RECIPIENTS_MAX}", where=message.where, hint=_REPLAY
        )
    for n, address in enumerate(to, start=1):
        if not plausible(address, channel.kind):
            raise ValidationError(
                f"recipient {n} of {len(to)} is no address for channel {channel.name}",
                where=message.where,
                hint=_REPLAY,
            )
    return tuple(dict.fromkeys(to))


def plausible(address: object, kind: ChannelKind) -> bool:
    """Whether something can be tried as a recipient on a channel of this kind."""
    if not isinstance(address, str) or not 0 < len(address) <= ADDRESS_CHARS_MAX or _CONTROL.search(address):
        return False
    return kind is not ChannelKind.SMTP or (_ADDRESS.fullmatch(address) is not None and ".." not in address)


def _mesh(message: Message) -> dict[str, Any]:
    """What every template may name besides what its step passes."""
    names = ("correlation_id", "business_object_type", "business_object_id", "instance_id", "workflow")
    return {name: message[name] for name in names}


def _rendered(catalogue: Catalogue, template: str, data: Mapping[str, Any], message: Message) -> Text:
    try:
        return catalogue.render(template, data)
    except ValidationError as error:
        raise ValidationError(error.message, where=message.where, hint=error.hint) from None


def _policy(message: Message) -> RetryPolicy | None:
    raw = message["retry"]
    if raw is None:
        return None
    try:
        return RetryPolicy.model_validate_json(raw)
    except pydantic.ValidationError:
        raise ValidationError(
            "its retry policy is not one", where=message.where, hint="correct the workflow's retry policy"
        ) from None


def _json_object(raw: bytes, message: Message, field: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValidationError(f"{field} is not JSON", where=message.where, hint=_REPLAY) from None
    if not isinstance(value, dict):
        raise ValidationError(f"{field} is not a JSON object", where=message.where, hint=_REPLAY)
    return value


# --- resolutions -----------------------------------------------------------------------------------------------------


def _resolution(state: State, message: Message, now: datetime) -> tuple[State, Sequence[Effect]]:
    verdict, command = message["verdict"], message["command_id"]
    if verdict not in VERDICTS:
        raise ValidationError(
            f"verdict {verdict!r} is not known", where=message.where, hint=f"one of {', '.join(VERDICTS)}"
        )
    row = state.row
    if row is None and verdict == "discarded" and state.disposition == "dead":
        mark = MarkLedger(f"id:{command}", "discarded", Reason.BUSINESS, f"discarded by {message['actor']}")
        return replace(state, disposition="discarded"), (mark, *_told(message))
    if row is None:
        raise ValidationError(
            f"notification {command} has no row here, so there is nothing to resolve",
            where=message.where,
            hint="one that died before its first attempt is replayed or discarded",
        )
    if row.state != "unknown":
        raise ValidationError(
            f"notification {command} is {row.state}, not unknown: the resolution is refused",
            where=message.where,
            hint="look at the quarantine record again, its state has moved on",
        )
    new, progress = {"happened": "done", "not_happened": "pending", "discarded": "failed"}[verdict], None
    if verdict == "not_happened":
        _late_enough(row, message, now)
        # Known now: nothing was sent. It starts over, and dies, if it does, under the number of this word.
        progress = History(opening=message["opening"]).to_bytes()
    amend = Amend(row.kind, row.task.id, expected="unknown", state=new, progress=progress)
    note = Note({"step": row.task.step, "operation": f"notify.{row.task.channel}", "verdict": verdict})
    return replace(state, row=replace(row, state=new)), (amend, note, *_told(message))


def _late_enough(row: Row, message: Message, now: datetime) -> None:
    entered_at = from_ms(message["entered_at"])
    counts = counts_from(row.task.in_flight_max_s, row.history.ended_at or row.ended_at, now)
    if entered_at < counts:
        raise ValidationError(
            f"`not happened` was said at {entered_at.isoformat()}, and until {counts.isoformat()} an attempt of"
            f" notification {message['command_id']} may still be in flight",
            where=message.where,
            hint="look again after that instant, then resolve again",
        )


def _told(message: Message) -> tuple[Publish, ...]:
    """A notification has no result that could end its instance's park, so the word itself does (DESIGN section 9)."""
    record, instance, opening = message["record_id"], message.instance_id, message["opening"]
    if record is None or instance is None:
        return ()
    if message["verdict"] == "discarded":
        fields = {"record_id": record, "opening": opening, "reason": message["reason"]}
        return (emitting.signal("message_discarded", instance, fields),)
    return (emitting.released(UUID(record), opening, instance),)


# --- the status topic ------------------------------------------------------------------------------------------------


def watched_key(catalogue: Catalogue, message: Message) -> str:
    """Statuses of workflows that have a rule are decided under their instance's lock, others over nothing."""
    return str(message["instance_id"]) if catalogue.rules_for(message["workflow"]) else ""


def decide_status(
    catalogue: Catalogue, group: str, state: Watched, message: Message, now: datetime
) -> tuple[Watched, Sequence[Effect]]:
    """Tell the owners that the rules name. The row's id derives from (message, rule): no replay tells them twice."""
    rules = catalogue.rules_for(message["workflow"])
    if not rules:
        return state, ()
    seq = message["instance_seq"]
    if seq < state.seq:
        return state, (Discard(f"the instance has been seen at {state.seq}; {seq} is older"),)
    after = Watched(seq)
    wanted = [r for r in rules if message["status"] in r.statuses]
    if not wanted or message["previous_status"] == message["status"]:
        return after, ()
    if from_ms(message["ce_time"]) < now - timedelta(seconds=FRESH_S_MAX):
        return after, (Discard(f"it was so more than {FRESH_S_MAX:g} s ago; owners are told of what is new"),)
    effects: list[Effect] = []
    for rule in wanted:
        effects.append(_notice(catalogue, group, rule, message))
    effects.append(Note({"told": [rule.name for rule in wanted]}))
    return after, effects


def _notice(catalogue: Catalogue, group: str, rule: Rule, message: Message) -> Schedule:
    channel = catalogue.channels[rule.channel]
    names = ("workflow", "workflow_version", "status", "previous_status", "step", "outcome", "reason", "owner")
    data = {name: message[name] for name in names}
    text: Text
    if rule.template is not None:
        text = _rendered(catalogue, rule.template, {"data": data, "mesh": _mesh(message)}, message)
    else:
        text = _Plain(message)
    id_ = ids.message_id(SERVICE, f"{message.root.text} for {rule.name}", 0, 0, message.instant_ms)
    task = _task(message, id_, channel, rule.template or STATUS, rule.to, text, data)
    return _schedule(channel, task.model_copy(update={"status": message["status"], "group": group}), message)


class _Plain:
    """What an owner reads where the rule names no template. Statuses hold no payload."""

    def __init__(self, message: Message) -> None:
        at = f" at step {message['step']}" if message["step"] else ""
        why = f"\n{message['reason']}" if message["reason"] else ""
        self.subject = f"{message['workflow']}: {message['status']}"
        self.text = (
            f"Instance {message['instance_id']} of {message['workflow']} {message['workflow_version']}"
            f" is {message['status']}{at}.{why}\n"
        )
        self.html: str | None = None
