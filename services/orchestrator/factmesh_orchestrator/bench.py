"""One business object on a bench: decisions without a broker, a database or a clock, for cases and for tests.
Messages are made here as the other services would make them; what they change is decided by `decide` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from factmesh import ids
from factmesh.effects import Discard, Effect, MarkLedger, Note, Publish, Schedule, Unschedule
from factmesh.errors import FactmeshError
from factmesh.ids import Root
from factmesh.message import Delivery, Message, to_ms
from factmesh_orchestrator.decide import KEPT_HORIZON_S, decide_with
from factmesh_orchestrator.definitions import Definitions
from factmesh_orchestrator.model import Instance, ObjectKey, ObjectState

GROUP = "factmesh-connector"


@dataclass(frozen=True, slots=True)
class Command:
    """A command as the connector gets it."""

    id: UUID
    connector: str
    operation: str
    step: str
    run: int
    key: str
    body: Any
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.connector}.{self.operation}"


@dataclass(slots=True)
class Bench:
    """The object's state, the time, and everything that was published, in order."""

    definitions: Definitions
    now: datetime
    object_type: str = "order"
    object_id: str = "o-1"
    kept_horizon_s: float = KEPT_HORIZON_S
    state: ObjectState = field(init=False)
    commands: list[Command] = field(default_factory=list)
    statuses: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[Mapping[str, Any]] = field(default_factory=list)
    marks: list[MarkLedger] = field(default_factory=list)
    discards: list[str] = field(default_factory=list)
    timers: dict[UUID, Schedule] = field(default_factory=dict)
    _sent: int = 0

    def __post_init__(self) -> None:
        self.state = ObjectState(ObjectKey(self.object_type, self.object_id), definitions=self.definitions)

    # --- what happens ---

    def take(self, message: Message) -> Sequence[Effect]:
        """Fold one message. A FactmeshError of the decision leaves everything as it was: the message is dead."""
        after, effects = decide_with(self.state, message, self.now, self.kept_horizon_s)
        assert isinstance(after, ObjectState)
        self.state = after
        for effect in effects:
            self._carry_out(effect)
        return effects

    def dies(self, message: Message) -> FactmeshError | None:
        """Fold one message; the error that it died of, or None."""
        try:
            self.take(message)
        except FactmeshError as error:
            return error
        return None

    def advance(self, seconds: float) -> None:
        """Let time pass; timers fire in the order of their due times."""
        until = self.now + timedelta(seconds=seconds)
        while due := sorted((s.due_at, id_) for id_, s in self.timers.items() if s.due_at and s.due_at <= until):
            at, id_ = due[0]
            assert at is not None
            self.now = at
            self.take(self.fired(id_))
            self.timers.pop(id_, None)
        self.now = until

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Publish):
            self._published(effect)
        elif isinstance(effect, Schedule):
            self.timers[effect.id] = effect
        elif isinstance(effect, Unschedule):
            self.timers.pop(effect.id, None)
        elif isinstance(effect, MarkLedger):
            self.marks.append(effect)
        elif isinstance(effect, Discard):
            self.discards.append(effect.reason)
        elif isinstance(effect, Note):
            self.notes.append(effect.fields)

    def _published(self, effect: Publish) -> None:
        body = effect.body
        if effect.record == "status":
            self.statuses.append(body)
        elif effect.record == "command":
            assert effect.id is not None
            self.commands.append(
                Command(
                    effect.id,
                    body["connector"],
                    body["operation"],
                    body["step"],
                    body["run"],
                    body["idempotency_key"],
                    json.loads(body["body"]),
                    body,
                )
            )

    # --- what is there ---

    @property
    def instances(self) -> list[Instance]:
        """In the order in which they started."""
        return list(self.state.instances.values())

    @property
    def instance(self) -> Instance:
        """The first one."""
        return self.instances[0]

    def command(self, step: str) -> Command:
        """The latest command of a step."""
        return next(c for c in reversed(self.commands) if c.step == step)

    # --- messages, as the other services make them ---

    def _message(self, kind: str, topic: str, record: Mapping[str, Any], id_: UUID | None = None) -> Message:
        self._sent += 1
        own = id_ or ids.entrance_id("bench", str(self._sent), to_ms(self.now))
        envelope = {
            "ce_id": str(own),
            "ce_source": "/bench",
            "ce_time": to_ms(self.now),
            "cause_id": str(own),
            "correlation_id": "c-1",
            "actor": "person:tester",
            "business_object_type": self.object_type,
            "business_object_id": self.object_id,
        }
        delivery = Delivery(topic, 0, self._sent, b"k", b"v", (), to_ms(self.now))
        return Message(delivery, kind, Root.own(own), own, 0, {**envelope, **record}, b"", ids.instant_ms_of(own))

    def again(self, message: Message) -> Message:
        """The same content under another id: what no ledger can tell from the first."""
        own = ids.entrance_id("bench", f"again {self._sent} {message.id}", message.instant_ms)
        self._sent += 1
        return replace(message, root=Root.own(own), id=own)

    def fact(self, type_: str, data: Any, **fields: Any) -> Message:
        """A canonical fact, as intake publishes it."""
        now_ms = to_ms(self.now)
        record = {
            "ce_type": type_,
            "status": None,
            "due_by": None,
            "occurred_at": now_ms,
            "received_at": now_ms,
            "schema_version": 1,
            "source": "//bench",
            "source_id": str(self._sent),
            "data": json.dumps(data).encode(),
        }
        return self._message("fact", "factmesh.fact.v1", {**record, **fields})

    def result(
        self, command: Command, *, output: Any = None, failed: tuple[str, str] | None = None, verdict: str | None = None
    ) -> Message:
        """The outcome of a command, as the connector publishes it."""
        record = {
            "ce_type": f"{command.name}.result",
            "instance_id": command.record["instance_id"],
            "instance_seq": command.record["instance_seq"],
            "command_id": str(command.id),
            "step": command.step,
            "idempotency_key": command.key,
            "outcome": "failed" if failed else "done",
            "output": None if failed else json.dumps(output).encode(),
            "error_class": failed[0] if failed else None,
            "error_message": failed[1] if failed else None,
            "attempts": 1,
            "duration_ms": 1,
            "verdict": verdict,
            "epoch": 1,
        }
        return self._message("result", "factmesh.result.v1", record)

    def signal(self, name: str, body: Mapping[str, Any], instance: UUID | None = None) -> Message:
        """A signal to an instance; to the first, unless another is named."""
        about = str(instance or self.instance.id)
        return self._message("signal", "factmesh.signal.v1", self._signal(name, body, about))

    @staticmethod
    def _signal(name: str, body: Mapping[str, Any], instance: str) -> dict[str, Any]:
        encoded = json.dumps(body).encode()
        return {"ce_type": name, "instance_id": instance, "instance_seq": 0, "signal": name, "body": encoded}

    def fired(self, timer: UUID) -> Message:
        """A due timer, as the timer loop publishes it."""
        record = json.loads(self.timers[timer].payload)
        return self._message("signal", "factmesh.signal.v1", {**record, "body": json.dumps(record["body"]).encode()})

    def parked(self, command: Command, reason: str, opening: int = 0) -> Message:
        """A quarantined command, as the service that gave it up tells the instance."""
        body = {
            "record_id": self.record_of(command),
            "opening": opening,
            "reason": reason,
            "step": command.step,
            "command_id": str(command.id),
            "fingerprint": "0" * 16,
        }
        return self.signal("message_parked", body, UUID(command.record["instance_id"]))

    def retry(self, command: Command, opening: int = 1) -> Message:
        """A person's replay of an exhausted command."""
        body = {
            "command_id": str(command.id),
            "record_id": self.record_of(command),
            "root_id": f"id:{command.id}",
            "group": GROUP,
            "opening": opening,
            "reason": "mended",
        }
        return self.signal("retry_step", body, UUID(command.record["instance_id"]))

    @staticmethod
    def record_of(command: Command) -> str:
        """The quarantine record of a command."""
        return str(ids.record_id(f"id:{command.id}", GROUP))


