"""One message's turn: mutable drafts of the object and its instances, and the effects that it gathers, in order.
A draft is thrown away when the decision raises; what is frozen at its end is the only thing that anyone keeps.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh import ids
from factmesh.document import canonical_json, compact_json
from factmesh.effects import Effect, MarkLedger, Note, Publish, Schedule, Unschedule
from factmesh.errors import BusinessError, OnBehalf, Reason, ValidationError
from factmesh.message import Message, pack_delivery, rfc3339, to_ms
from factmesh.workflow import CompiledStep
from factmesh_orchestrator.definitions import Definitions, Deployed
from factmesh_orchestrator.model import (
    ATTENTION,
    END_EVENTS,
    NO_PARK,
    Await,
    Event,
    Instance,
    KeptFact,
    KeptRetry,
    ObjectState,
    Outstanding,
    Park,
    Status,
    StepState,
    Timer,
    advance,
)

SERVICE = "orchestrator"
TIMER_KIND = "timer"

INPUT_BYTES_MAX = 65_536
"""What an instance keeps of its fact: declared fields, not the payload (REQUIREMENTS B10)."""
OUTPUT_BYTES_MAX = 65_536
"""What one step's output may weigh: the response mapping keeps what later steps need."""
INSTANCE_BYTES_MAX = 1_048_576
"""All outputs of an instance together: it is read and written with every message about it."""
COMMAND_BODY_BYTES_MAX = 262_144
"""Far below what a topic takes, so that envelope and headers always fit beside it."""
KEPT_MAX = 32
"""Early facts under one object; more mean that nobody will ever ask for them."""
QUEUE_MAX = 100
"""Starting facts that wait for their turn under one object."""
ACTIVE_MAX = 100
"""Instances active on one object at a time: all of them are loaded when a fact of it comes."""
PARKS_MAX = 1_000
"""Quarantined records that one instance can tell apart."""


def json_bytes(value: Any, bytes_max: int, what: str, where: str) -> bytes:
    """Compact JSON within its bound. Raises ValidationError for more, or for what is not JSON."""
    try:
        raw = compact_json(value)
    except (TypeError, ValueError) as error:
        raise ValidationError(f"{what} is not JSON: {error}", where=where) from None
    if len(raw) > bytes_max:
        raise ValidationError(
            f"{what} weighs {len(raw)} bytes, at most {bytes_max} are kept",
            where=where,
            hint="keep only the fields that later steps need, in input.from or in the connector's response mapping",
        )
    return raw


def instant_text(ms: int | None) -> str | None:
    """RFC 3339 in UTC, as expressions read instants."""
    return None if ms is None else rfc3339(ms)


def packed(message: Message) -> str:
    """The delivery byte for byte, as JSON can hold it."""
    return b64encode(pack_delivery(message.delivery)).decode()


class Out:
    """The effects of one message, in order, with the ids that the loop will give them."""

    __slots__ = ("_notes", "_published", "effects", "message")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.effects: list[Effect] = []
        self._published = 0
        self._notes: list[Mapping[str, Any]] = []

    def publish(
        self, topic: str, record: str, key: str, body: Mapping[str, Any], *, named: bool = False
    ) -> UUID | None:
        """Publish one record. With `named` its id is derived here, as the loop would, because the state keeps it."""
        m = self.message
        id_ = ids.message_id(SERVICE, m.root.text, m.opening, self._published, m.instant_ms) if named else None
        self._published += 1
        self.effects.append(Publish(topic, record, key, body, id_))
        return id_

    def timer_id(self, name: str) -> UUID:
        """One id for a timer that this message sets; set again by another message, it is another timer."""
        m = self.message
        return ids.message_id(f"{SERVICE}/timer/{name}", m.root.text, m.opening, len(self.effects), m.instant_ms)

    def note(self, fields: Mapping[str, Any]) -> None:
        self._notes.append(fields)

    def all(self) -> list[Effect]:
        """Everything, the ledger's note last: flat for one instance, the further ones beside it."""
        if self._notes:
            first, *rest = self._notes
            self.effects.append(Note({**first, "also": rest} if rest else first))
            self._notes = []
        return self.effects


def _instance_values(i: Instance) -> dict[str, Any]:
    return {
        "id": str(i.id),
        "actor": i.actor,
        "business_object_id": i.business_object_id,
        "business_object_type": i.business_object_type,
        "correlation_id": i.correlation_id,
        "due_by": instant_text(i.due_by),
        "occurred_at": instant_text(i.occurred_at),
        "started_at": instant_text(i.started_at),
    }


class Turn:
    """The draft of one instance. Step kinds work on this, and on nothing else."""

    __slots__ = (
        "awaits", "base", "before", "commands", "deployed", "ended_at", "envelope", "id_text", "instance", "kept_bytes",
        "now", "now_ms", "object", "out", "outcome", "parks", "reason", "resolved", "retries", "scope_", "seq", "step",
        "steps", "timers",
    )  # fmt: skip

    def __init__(self, obj: ObjectTurn, deployed: Deployed, instance: Instance, before: Instance | None) -> None:
        self.object = obj
        self.out = obj.out
        self.now = obj.now
        self.now_ms = obj.now_ms
        self.deployed = deployed
        self.instance = instance
        self.id_text = str(instance.id)
        self.before = before
        self.base: Status = instance.base
        self.seq = instance.seq + 1
        self.step = instance.step
        self.kept_bytes = instance.kept_bytes
        self.steps: dict[str, StepState] = dict(instance.steps)
        self.commands: dict[str, Outstanding] = dict(instance.commands)
        self.timers: dict[str, Timer] = dict(instance.timers)
        self.awaits: list[Await] = list(instance.awaits)
        self.retries: dict[str, KeptRetry] = dict(instance.retries)
        self.parks: dict[str, Park] = dict(instance.parks)
        self.resolved: list[str] = list(instance.resolved)
        self.outcome = instance.outcome
        self.reason = instance.reason
        self.ended_at = instance.ended_at
        self.scope_: Mapping[str, Any] | None = None
        self.envelope: Mapping[str, Any] = {
            "correlation_id": instance.correlation_id,
            "actor": instance.actor,
            "business_object_type": instance.business_object_type,
            "business_object_id": instance.business_object_id,
            "instance_id": self.id_text,
            "instance_seq": self.seq,
        }
        """The fields that every record about this instance carries."""

    # --- what a step kind may do ---

    def scope(self) -> Mapping[str, Any]:
        """What this step's expressions may read, converted once."""
        if self.scope_ is None:
            i = self.instance
            self.scope_ = self.deployed.compiled.scope(
                input=i.input,
                steps={name: s.output for name, s in self.steps.items() if s.status == "done"},
                instance=_instance_values(i) if self.deployed.reads_instance else {},
            )
        return self.scope_

    def command(
        self,
        step: CompiledStep,
        connector: str,
        operation: str,
        body: Any,
        *,
        awaited: bool,
        deadline_ms: int | None = None,
        retry: bytes | None = None,
    ) -> None:
        """Ask a connector for something. Where it is awaited, its result comes back to this step."""
        name = step.step.name
        state = self.steps[name]
        i = self.instance
        body_bytes = canonical_json(body)
        if len(body_bytes) > COMMAND_BODY_BYTES_MAX:
            raise ValidationError(
                f"the input of {connector}.{operation} weighs {len(body_bytes)} bytes, at most"
                f" {COMMAND_BODY_BYTES_MAX} are sent",
                where=step.where,
                hint="send a reference to the data instead of the data",
            )
        id_ = self.out.publish(
            f"command.{connector}",
            "command",
            self.id_text,
            {
                "ce_type": f"{connector}.{operation}",
                **self.envelope,
                "workflow": i.workflow,
                "workflow_version": i.version,
                "step": name,
                "iteration": 0,
                "run": state.runs,
                "connector": connector,
                "operation": operation,
                "idempotency_key": str(ids.idempotency_key(i.id, name, 0, state.runs)),
                "deadline": deadline_ms,
                "retry": retry,
                "body": body_bytes,
            },
            named=True,
        )
        command_id = str(id_)
        self.steps[name] = StepState(state.status, state.runs, state.output, command_id)
        if awaited:
            self.commands[command_id] = Outstanding(name, state.runs)

    def timer(self, step: str, name: str, due_at: datetime) -> UUID:
        """Fire `name` for this step at `due_at`."""
        id_ = self.out.timer_id(f"{step}/{name}")
        self.timers[str(id_)] = Timer(step, name)
        signal = self.object.signal("timer_fired", {"timer_id": str(id_), "name": name, "step": step}, self.instance)
        self.out.effects.append(Schedule(TIMER_KIND, id_, signal, due_at=due_at, tag=self.instance.id))
        return id_

    def await_fact(self, step: str, type_: str) -> KeptFact | None:
        """An early fact of that type which waits under the object; else the step waits for the next one."""
        early = self.object.take_kept(type_)
        if early is None:
            self.awaits.append(Await(step, type_))
        return early

    def forget(self, step: str) -> None:
        """The step waits for nothing any more: its timers, facts and commands do not count."""
        if self.timers:
            for id_ in [t for t, timer in self.timers.items() if timer.step == step]:
                del self.timers[id_]
                self.out.effects.append(Unschedule(TIMER_KIND, UUID(id_)))
        if self.awaits:
            self.awaits = [a for a in self.awaits if a.step != step]
        if self.commands:
            for command_id in [c for c, o in self.commands.items() if o.step == step]:
                del self.commands[command_id]

    # --- moves, used by flow and decide ---

    def weigh(self, value: Any, bytes_max: int, what: str, where: str) -> None:
        """Count what the instance keeps. Raises ValidationError beyond the bound of one value, or of all together."""
        self.kept_bytes += len(json_bytes(value, bytes_max, what, where))
        if self.kept_bytes > INSTANCE_BYTES_MAX:
            raise ValidationError(
                f"{what} makes the instance keep {self.kept_bytes} bytes, at most {INSTANCE_BYTES_MAX}",
                where=where,
                hint="keep only the fields that later steps need",
            )

    def advance(self, event: Event) -> None:
        self.base = advance(self.base, event, self.instance.id)

    def end(self, status: Status, outcome: str | None, reason: str | None = None) -> None:
        """The instance ends; nothing that is still out for it counts any more."""
        self.advance(END_EVENTS[status])
        self.outcome, self.reason, self.ended_at = outcome, reason, self.now_ms
        for id_ in self.timers:
            self.out.effects.append(Unschedule(TIMER_KIND, UUID(id_)))
        self.timers, self.commands, self.awaits = {}, {}, []
        for command_id in list(self.retries):
            self.drop_retry(command_id, "its instance has ended")

    def drop_retry(self, command_id: str, why: str) -> None:
        """A kept retry turned out moot: its record is dead-lettered again under its opening, never dropped."""
        kept = self.retries.pop(command_id)
        self.merge_park(kept.record_id, Park(parked=kept.opening))
        self.out.effects.append(
            MarkLedger(
                root=kept.root,
                disposition="dead",
                reason=Reason.BUSINESS,
                detail=f"the retry of command {command_id} is moot: {why}",
                original=b64decode(kept.original),
                on_behalf=OnBehalf(kept.record_root, kept.opening, kept.record_group) if kept.record_root else None,
            )
        )

    def merge_park(self, record_id: str, park: Park) -> None:
        self.parks[record_id] = self.parks.get(record_id, NO_PARK).merge(park)

    def resolve(self, command_id: str) -> None:
        """A person settled this command: every park of it is cancelled, whichever arrives first."""
        if command_id not in self.resolved:
            self.resolved.append(command_id)

    def frozen(self) -> Instance:
        """The instance after this turn, within its bound; tells the status topic and the ledger what changed."""
        i = self.instance
        # By position: keyword arguments are a third of what making one costs.
        after = Instance(
            i.id,
            i.workflow,
            i.version,
            i.definition_hash,
            self.base,
            self.seq,
            i.business_object_type,
            i.business_object_id,
            i.correlation_id,
            i.actor,
            i.fact_id,
            i.input,
            self.step,
            i.started_at,
            i.occurred_at,
            i.due_by,
            self.kept_bytes,
            self.steps,
            self.commands,
            self.timers,
            tuple(self.awaits),
            self.retries,
            self.parks,
            tuple(self.resolved),
            self.outcome,
            self.reason,
            self.ended_at,
        )
        if after.reason is not None and not after.ended and after.status not in ATTENTION:
            after = replace(after, reason=None)  # what it was is over
        self._tell(after)
        return after

    def _tell(self, after: Instance) -> None:
        """A status where readers see a change, and the ledger's note."""
        before, status, d = self.before, after.status, self.deployed
        previous = before.status if before is not None else None
        shown = status.value
        if previous is not status or (before is not None and before.step != after.step):
            self.out.publish(
                "status",
                "status",
                self.id_text,
                {
                    "ce_type": "workflow.started" if previous is None else f"workflow.{shown}",
                    **self.envelope,
                    "workflow": after.workflow,
                    "workflow_version": after.version,
                    "status": shown,
                    "previous_status": previous.value if previous is not None else None,
                    "step": after.step,
                    "next_step": None if after.ended or after.step is None else d.next_steps.get(after.step),
                    "outcome": after.outcome,
                    "reason": after.reason,
                    "due_by": after.due_by,
                    "occurred_at": after.occurred_at,
                    "owner": d.owner,
                },
            )
        self.out.note(
            {
                "instance_id": self.id_text,
                "seq": after.seq,
                "workflow": after.workflow,
                "version": after.version,
                "definition": after.definition_hash[:16],
                "commit": d.commit,
                "step": after.step,
                "status": shown,
            }
        )


class ObjectTurn:
    """The draft of the business object under its lock, while one message is folded into it."""

    __slots__ = ("active", "definitions", "instances", "kept", "message", "now", "now_ms", "out", "queue", "state")

    def __init__(self, state: ObjectState, message: Message, now: datetime) -> None:
        self.state = state
        self.message = message
        self.now = now
        self.now_ms = to_ms(now)
        self.out = Out(message)
        self.definitions: Definitions = state.definitions
        self.kept = list(state.kept)
        self.queue = list(state.queue)
        self.active = dict(state.active)
        self.instances = dict(state.instances)

    def turn(self, instance: Instance) -> Turn:
        """A draft of one of its instances."""
        return Turn(self, self.definitions.of(instance.workflow, instance.version), instance, instance)

    def settle(self, turn: Turn) -> None:
        """Take the draft's result; the next queued fact of its workflow has its turn when it ended."""
        after = turn.frozen()
        self.instances[str(after.id)] = after
        if after.ended:
            self.active.pop(after.id, None)
        else:
            self.active[after.id] = after.workflow

    def take_kept(self, type_: str) -> KeptFact | None:
        """The oldest early fact of that type, taken away with its horizon."""
        for index, fact in enumerate(self.kept):
            if fact.type == type_:
                del self.kept[index]
                self.out.effects.append(Unschedule(TIMER_KIND, UUID(fact.timer)))
                return fact
        return None

    def keep(self, fact: KeptFact, horizon: datetime) -> None:
        """Keep an early fact under its object until a step asks for it, or its horizon comes (DESIGN section 4)."""
        if len(self.kept) >= KEPT_MAX:
            raise BusinessError(
                f"{KEPT_MAX} facts that nobody awaits are kept for {self.state.key.type} {self.state.key.id} already",
                hint="deploy a workflow that takes them, or stop sending them",
            )
        id_ = self.out.timer_id("horizon")
        self.kept.append(fact._replace(original=packed(self.message), timer=str(id_)))
        self.out.effects.append(
            Schedule(TIMER_KIND, id_, self.signal("fact_stale", {"fact_id": fact.id}, None), due_at=horizon)
        )

    def signal(self, name: str, body: Mapping[str, Any], instance: Instance | None) -> bytes:
        """A due signal as the timer loop publishes it: its topic, key and record, JSON-plain."""
        m, key = self.message, self.state.key
        record = {
            "ce_type": f"signal.{name}",
            "correlation_id": instance.correlation_id if instance else m.record["correlation_id"],
            "actor": f"service:{SERVICE}",
            "business_object_type": key.type,
            "business_object_id": key.id,
            "instance_id": str(instance.id) if instance else "",
            "instance_seq": instance.seq if instance else 0,
            "signal": name,
            "body": dict(body),
        }
        return canonical_json(record)

    def frozen(self) -> ObjectState:
        return ObjectState(
            key=self.state.key,
            kept=tuple(self.kept),
            queue=tuple(self.queue),
            active=self.active,
            instances=self.instances,
            definitions=self.definitions,
        )

