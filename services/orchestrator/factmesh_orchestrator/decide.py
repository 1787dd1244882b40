"""Pure: (business object under its lock, message, now) -> (object, effects); one function a kind of message.
No I/O, no clock, no randomness; what a decision needs to know, the definitions too, is part of the state.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from factmesh.document import read_json
from factmesh.effects import Discard, Effect, MarkLedger, Publish
from factmesh.errors import BusinessError, OnBehalf, Reason, ValidationError
from factmesh.message import Message
from factmesh.values import frozen_value
from factmesh_orchestrator import flow
from factmesh_orchestrator.definitions import Deployed
from factmesh_orchestrator.model import (
    ATTENTION,
    NO_PARK,
    Instance,
    KeptFact,
    KeptRetry,
    ObjectState,
    Park,
    Status,
)
from factmesh_orchestrator.steps import Arrived, Fired, Result
from factmesh_orchestrator.turn import OUTPUT_BYTES_MAX, PARKS_MAX, QUEUE_MAX, ObjectTurn, Turn, packed

KEPT_HORIZON_S = 14 * 86400
"""How long a fact that nobody awaits is kept, unless configured: the dedup horizon."""
MAX_AGE = "max_age"
"""The timer, and the name under which an instance records that it grew too old."""
REASON_CHARS_MAX = 500


@frozen_value
class Address:
    """The state of a signal that names an instance but not its business object: where that object is, if anywhere.

    A service that quarantines undecodable bytes knows the key of the message only, the instance. Such a signal cannot
    be folded without the object's lock, so it is sent on with its address.
    """

    type: str | None = None
    id: str | None = None


State = ObjectState | Address


def decide(state: State, message: Message, now: datetime) -> tuple[State, Sequence[Effect]]:
    """What a message changes and asks for. Raises FactmeshError where the message cannot be applied: it is dead."""
    return decide_with(state, message, now, KEPT_HORIZON_S)


def decide_with(
    state: State, message: Message, now: datetime, kept_horizon_s: float
) -> tuple[State, Sequence[Effect]]:
    """`decide` with the configured horizon of kept facts."""
    if isinstance(state, Address):
        return state, _address(state, message)
    obj = ObjectTurn(state, message, now)
    if message.kind == "fact":
        _fact(obj, kept_horizon_s)
    elif message.kind == "result":
        _result(obj)
    elif message.kind == "signal":
        _signal(obj)
    else:
        raise ValidationError(f"the orchestrator takes facts, results and signals, not a {message.kind}")
    if obj.queue:
        _start_queued(obj)
    effects = obj.out.all()
    if effects and isinstance(effects[0], Discard):
        return state, effects
    return obj.frozen(), effects


def _address(state: Address, message: Message) -> Sequence[Effect]:
    if state.type is None or state.id is None:
        return [Discard(f"no instance {message.record['instance_id']} is known here")]
    r = message.record
    same = ("ce_type", "correlation_id", "actor", "instance_id", "instance_seq", "signal", "body")
    body = {name: r[name] for name in same}
    body |= {"business_object_type": state.type, "business_object_id": state.id}
    return [Publish("signal", "signal", r["instance_id"], body)]


# --- facts -----------------------------------------------------------------------------------------------------------


def _fact(obj: ObjectTurn, kept_horizon_s: float) -> None:
    """Wake who awaits it, start what it starts, else keep it (DESIGN section 4)."""
    fact = _fact_of(obj.message)
    woken = _wake(obj, fact)
    starts = obj.definitions.by_fact.get(fact.type, ())
    accepted = [_second(obj, deployed, fact) for deployed in starts]
    if not woken and not starts:
        obj.keep(fact, obj.now + timedelta(seconds=kept_horizon_s))
    elif not woken and not any(accepted):
        names = ", ".join(d.name for d in starts)
        obj.out.effects.insert(
            0, Discard(f"{obj.state.key.type} {obj.state.key.id} has an active instance of {names}, which ignores more")
        )


def _fact_of(message: Message) -> KeptFact:
    r = message.record
    if message.id is None:
        raise ValidationError("a fact without an id of ours", where=message.where, hint="facts come through intake")
    record = {
        name: r[name]
        for name in (
            "actor", "business_object_id", "business_object_type", "correlation_id", "due_by", "occurred_at",
            "received_at", "source", "status",
        )
    }  # fmt: skip
    record["data"] = _json(r["data"], "the fact's data")
    return KeptFact(str(message.id), r["ce_type"], message.root.text, message.instant_ms, record)


def _wake(obj: ObjectTurn, fact: KeptFact) -> bool:
    woken = False
    for id_ in list(obj.active):
        instance = obj.instances.get(str(id_))
        awaiting = next((a for a in instance.awaits if a.type == fact.type), None) if instance is not None else None
        if instance is None or awaiting is None:
            continue
        turn = obj.turn(instance)
        turn.awaits.remove(awaiting)
        flow.resume(turn, awaiting.step, Arrived(fact.type, flow.fact_values(fact.type, fact.id, fact.record)))
        obj.settle(turn)
        woken = True
    return woken


def _second(obj: ObjectTurn, deployed: Deployed, fact: KeptFact) -> bool:
    """Start the workflow, or do what it declares for a second starting fact. Whether the fact was accepted."""
    busy = any(workflow == deployed.name for workflow in obj.active.values())
    if not busy or deployed.on_repeat == "start":
        flow.start(obj, deployed, fact)
        return True
    if deployed.on_repeat == "queue":
        if len(obj.queue) >= QUEUE_MAX:
            raise BusinessError(
                f"{QUEUE_MAX} facts wait already to start {deployed.name} for {obj.state.key.type} {obj.state.key.id}",
                hint="replay it when the instance that runs has ended",
            )
        obj.queue.append(fact._replace(workflow=deployed.name))
        return True
    if deployed.on_repeat == "reject":
        raise BusinessError(
            f"an instance of {deployed.name} is active on {obj.state.key.type} {obj.state.key.id}, and a second is"
            " rejected",
            hint="replay it when that instance has ended, or discard it",
        )
    return False


def _start_queued(obj: ObjectTurn) -> None:
    """Starting facts whose turn has come: nothing of their workflow is active on the object any more."""
    index = 0
    while index < len(obj.queue):
        fact = obj.queue[index]
        if any(workflow == fact.workflow for workflow in obj.active.values()):
            index += 1
            continue
        deployed = obj.definitions.current(fact.workflow)
        if deployed is None:
            index += 1
            continue
        del obj.queue[index]
        flow.start(obj, deployed, fact)


# --- results ---------------------------------------------------------------------------------------------------------


def _result(obj: ObjectTurn) -> None:
    """A result counts only if the instance lists its command as outstanding; a person's word also ends its parks."""
    r = obj.message.record
    instance = _instance(obj)
    command_id: str = r["command_id"]
    outstanding = instance.commands.get(command_id)
    settled_by_person = r["verdict"] is not None and command_id not in instance.resolved
    if outstanding is None and not settled_by_person:
        state = "has ended" if instance.ended else "does not list it as outstanding"
        obj.out.effects.append(Discard(f"result of command {command_id}: instance {instance.id} {state}"))
        return
    turn = obj.turn(instance)
    if settled_by_person:
        turn.resolve(command_id)
    if outstanding is not None:
        _apply_result(turn, outstanding.step, _result_of(r, command_id))
    obj.settle(turn)


def _result_of(r: Mapping[str, Any], command_id: str) -> Result:
    if r["outcome"] not in ("done", "failed"):
        raise ValidationError(f"a result's outcome is done or failed, not {str(r['outcome'])[:40]!r}")
    if r["output"] is not None and len(r["output"]) > OUTPUT_BYTES_MAX:
        raise ValidationError(
            f"the output of step {r['step']} weighs {len(r['output'])} bytes, at most {OUTPUT_BYTES_MAX} are kept",
            hint="keep only the fields that later steps need, in the connector's response mapping",
        )
    return Result(
        command_id=command_id,
        done=r["outcome"] == "done",
        output=None if r["output"] is None else _json(r["output"], "the result's output"),
        error_class=r["error_class"],
        error_message=r["error_message"],
    )


def _apply_result(turn: Turn, step: str, result: Result) -> None:
    del turn.commands[result.command_id]
    kept = turn.retries.get(result.command_id)
    flow.resume(turn, step, result)
    if kept is None or result.command_id not in turn.retries:
        return
    if not result.done and _may_retry(turn, result.command_id) == step:
        del turn.retries[result.command_id]
        turn.merge_park(kept.record_id, Park(released=kept.opening))
        flow.retry(turn, step)
    else:
        turn.drop_retry(result.command_id, "the command succeeded" if result.done else "its step has gone on")


# --- signals ---------------------------------------------------------------------------------------------------------


def _signal(obj: ObjectTurn) -> None:
    r = obj.message.record
    apply = SIGNALS.get(r["signal"])
    if apply is None:
        raise ValidationError(f"no signal is called {str(r['signal'])[:80]!r}", hint=f"one of {', '.join(SIGNALS)}")
    body = _json(r["body"], "the signal's body")
    if not isinstance(body, dict):
        raise ValidationError(f"the body of signal {r['signal']} is not a JSON object")
    apply(obj, body)


def _fact_stale(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    """The horizon of a kept fact, under the same lock as its taking: one that is still kept is dead, `stale`."""
    fact_id = _text(body, "fact_id")
    for index, fact in enumerate(obj.kept):
        if fact.id == fact_id:
            del obj.kept[index]
            obj.out.effects.append(_stale(fact))
            return
    obj.out.effects.append(Discard(f"fact {fact_id} is not kept any more: a step took it"))


def _stale(fact: KeptFact) -> MarkLedger:
    return MarkLedger(
        root=fact.root,
        disposition="dead",
        reason=Reason.STALE,
        detail=f"fact {fact.type} {fact.id} was kept up to its horizon, and no step asked for it",
        original=b64decode(fact.original),
    )


def _timer_fired(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    """A timer counts only if the instance lists it as outstanding."""
    instance = _instance(obj)
    if body.get("name") == MAX_AGE and not body.get("step"):
        _too_old(obj, instance)
        return
    timer_id = _text(body, "timer_id")
    timer = instance.timers.get(timer_id)
    if timer is None:
        obj.out.effects.append(Discard(f"timer {timer_id} is not outstanding in instance {instance.id}"))
        return
    turn = obj.turn(instance)
    del turn.timers[timer_id]
    flow.resume(turn, timer.step, Fired(timer.name))
    obj.settle(turn)


def _too_old(obj: ObjectTurn, instance: Instance) -> None:
    """Past its declared maximum age it needs a person; what is outstanding may still come and count."""
    deployed = obj.definitions.of(instance.workflow, instance.version)
    age_ms = obj.now_ms - instance.started_at
    if instance.ended or MAX_AGE in instance.parks or age_ms < deployed.max_age_ms:
        obj.out.effects.append(Discard(f"instance {instance.id} is not newly past its maximum age"))
        return
    turn = obj.turn(instance)
    turn.merge_park(MAX_AGE, Park(discarded=0))
    turn.reason = f"older than its maximum age of {deployed.max_age_ms // 1000} s"
    obj.settle(turn)


def _park(obj: ObjectTurn, record_id: str, park: Park, reason: str | None) -> None:
    """Park signals only raise numbers; an instance that nobody knows gets no park, so that nothing loops."""
    instance = _known(obj)
    if instance is None:
        obj.out.effects.append(Discard(f"no instance {obj.message.record['instance_id']} is known here"))
        return
    if instance.parks.get(record_id, NO_PARK).merge(park) == instance.parks.get(record_id):
        obj.out.effects.append(Discard(f"record {record_id} is known to be that far"))
        return
    if record_id not in instance.parks and len(instance.parks) >= PARKS_MAX:
        # Never an error: a park that died would be parked in its turn.
        obj.out.effects.append(Discard(f"instance {instance.id} has {PARKS_MAX} quarantined records already"))
        return
    turn = obj.turn(instance)
    turn.merge_park(record_id, park)
    _void_retries(turn, record_id, park.parked)
    if reason and turn.reason is None and not instance.ended:
        turn.reason = reason[:REASON_CHARS_MAX]
    obj.settle(turn)


def _void_retries(turn: Turn, record_id: str, dead: int) -> None:
    """A retry goes with the word that it was said with: refused, that died under its number, and so does the retry."""
    for command_id, kept in list(turn.retries.items()):
        if kept.record_id == record_id and kept.opening <= dead:
            del turn.retries[command_id]


def _message_parked(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    command_id = body.get("command_id")
    park = Park(parked=_number(body, "opening"), command_id=str(command_id) if command_id else None)
    reason = f"a message is quarantined: {body.get('reason')}" + (f" at {body['step']}" if body.get("step") else "")
    _park(obj, _text(body, "record_id"), park, reason)


def _message_released(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    _park(obj, _text(body, "record_id"), Park(released=_number(body, "opening")), None)


def _message_discarded(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    reason = f"a quarantined message was given up: {body.get('reason')}"
    _park(obj, _text(body, "record_id"), Park(discarded=_number(body, "opening")), reason)


def _may_retry(turn: Turn, command_id: str) -> str | None:
    """The step whose latest command this is, where it ended `failed` and the instance rests there."""
    if turn.base is not Status.NEEDS_RESOLUTION or turn.step is None:
        return None
    state = turn.steps.get(turn.step)
    known = state is not None and state.command_id == command_id and state.status == "failed"
    return turn.step if known else None


def _retry_step(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    """Accepted only for the latest command of its step after a known failure, kept while it is outstanding.

    Any other is refused: it dies on behalf of its quarantine record, which is open again then.
    """
    record_id, opening = _text(body, "record_id"), _number(body, "opening")
    record_root, record_group = str(body.get("root_id") or ""), str(body.get("group") or "")
    command_id = _text(body, "command_id")
    instance = _known(obj)
    turn = obj.turn(instance) if instance is not None else None
    if turn is not None and turn.parks.get(record_id, NO_PARK).parked >= opening:
        obj.out.effects.append(Discard(f"opening {opening} of record {record_id} is known to be dead, so is its retry"))
        return
    step = _may_retry(turn, command_id) if turn is not None else None
    kept = turn.retries.get(command_id) if turn is not None else None
    if turn is not None and step is not None:
        turn.merge_park(record_id, Park(released=opening))
        flow.retry(turn, step)
    elif kept is not None and kept.record_id == record_id and kept.opening >= opening:
        obj.out.effects.append(Discard(f"a later retry of command {command_id} is kept: opening {kept.opening}"))
        return
    elif turn is not None and command_id in turn.commands and (kept is None or kept.record_id == record_id):
        turn.retries[command_id] = KeptRetry(
            record_id, opening, obj.message.root.text, packed(obj.message), record_root, record_group
        )
    else:
        raise BusinessError(
            f"command {command_id} cannot be retried: {_why_not(instance, command_id)}",
            where=f"record {record_id}, opening {opening}",
            hint="look at `factmesh instance show`; then discard the record",
            on_behalf=OnBehalf(record_root, opening, record_group) if record_root and record_group else None,
        )
    obj.settle(turn)


def _why_not(instance: Instance | None, command_id: str) -> str:
    if instance is None:
        return "its instance is not known here"
    if instance.ended:
        return f"its instance is {instance.status}"
    if command_id in instance.retries:
        return "a retry of it is kept already, until its result is in"
    return "it is not its step's latest command, or that did not end failed"


def _end_instance(obj: ObjectTurn, body: Mapping[str, Any]) -> None:
    """A person ends what needs a person. A refusal is recorded as discarded: there is nothing to replay in it."""
    instance = _instance(obj)
    status = _text(body, "status")
    if status not in ("failed", "cancelled", "completed", "rejected"):
        raise ValidationError(f"an instance is ended as failed, cancelled, completed or rejected, not {status[:40]!r}")
    refused = None
    if instance.status not in ATTENTION:
        refused = f"it is {instance.status}; only what is parked or needs_resolution can be ended"
    elif (command_id := _awaited(instance)) is not None:
        refused = (
            f"command {command_id} is outstanding; replay, resolve or discard its record first, or wait for its result"
        )
    if refused is not None:
        obj.out.effects.append(Discard(f"end of instance {instance.id}: {refused}"))
        return
    turn = obj.turn(instance)
    turn.end(Status(status), status, f"{obj.message.record['actor']}: {_text(body, 'reason')}"[:REASON_CHARS_MAX])
    obj.settle(turn)


def _awaited(instance: Instance) -> str | None:
    """⚑ A command whose result must be in before a person may end the instance: its effect may stand, or come yet.

    Only what was given up for good needs no result: the command's own record, or a message that nobody could read.
    """
    given_up = {park.command_id for name, park in instance.parks.items() if park.is_discarded and name != MAX_AGE}
    for command_id in instance.commands:
        if instance.has_park or not given_up & {command_id, None}:
            return command_id
    return None


#: What the orchestrator understands, by the signal's name.
SIGNALS: Mapping[str, Callable[[ObjectTurn, Mapping[str, Any]], None]] = {
    "timer_fired": _timer_fired,
    "fact_stale": _fact_stale,
    "message_parked": _message_parked,
    "message_released": _message_released,
    "message_discarded": _message_discarded,
    "retry_step": _retry_step,
    "end_instance": _end_instance,
}


# --- reading messages ------------------------------------------------------------------------------------------------


def _known(obj: ObjectTurn) -> Instance | None:
    # The text of an id of ours is its only form; any other is no instance, or no id.
    return obj.instances.get(obj.message.record["instance_id"]) or obj.instances.get(str(_uuid(obj.message)))


def _uuid(message: Message) -> UUID:
    try:
        id_ = message.instance_id
    except ValueError:
        id_ = None
    if id_ is None:
        raise ValidationError(
            f"{message.kind} without the id of an instance", where=message.where, hint="correct instance_id and replay"
        )
    return id_


def _instance(obj: ObjectTurn) -> Instance:
    instance = _known(obj)
    if instance is None:
        raise ValidationError(
            f"no instance {obj.message.record['instance_id']} of {obj.state.key.type} {obj.state.key.id} is known",
            where=obj.message.where,
            hint="correct instance_id and business_object_id, or discard the message",
        )
    return instance


def _json(raw: bytes, what: str) -> Any:
    try:
        return read_json(raw)
    except (ValueError, RecursionError):
        raise ValidationError(f"{what} is not JSON", hint="correct it and replay") from None


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ValidationError(f"the signal's body has no text {name!r}", hint="correct it and replay")
    return value


def _number(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValidationError(f"the signal's body has no count {name!r}", hint="correct it and replay")
    return value

