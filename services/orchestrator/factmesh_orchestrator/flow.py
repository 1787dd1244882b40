"""How an instance moves from step to step: enter, resume, end. The step kinds say what to do, this says what follows.
No message is read here: `decide` turns messages into calls of these functions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any
from uuid import UUID

from factmesh import ids
from factmesh.errors import BusinessError
from factmesh_orchestrator.definitions import INSTANTS, Deployed
from factmesh_orchestrator.model import Event, Instance, KeptFact, Status, StepState
from factmesh_orchestrator.steps import (
    REASON_CHARS_MAX,
    STEPS_PER_MESSAGE_MAX,
    Cause,
    Done,
    Ended,
    Failed,
    Move,
    Rest,
    kind_of,
)
from factmesh_orchestrator.turn import (
    ACTIVE_MAX,
    INPUT_BYTES_MAX,
    OUTPUT_BYTES_MAX,
    ObjectTurn,
    Turn,
    instant_text,
)


def fact_values(
    type_: str, fact_id: str, record: Mapping[str, Any], instants: Collection[str] = INSTANTS
) -> dict[str, Any]:
    """The canonical fact as expressions read it. `record["data"]` is decoded already.

    Of the instants, which take some time to write, only those asked for have their value.
    """
    return {
        "id": fact_id,
        "type": type_,
        "actor": record["actor"],
        "business_object_id": record["business_object_id"],
        "business_object_type": record["business_object_type"],
        "correlation_id": record["correlation_id"],
        "data": record["data"],
        "source": record["source"],
        "status": record["status"],
        **{name: instant_text(record[name]) if name in instants else None for name in INSTANTS},
    }


def start(obj: ObjectTurn, deployed: Deployed, fact: KeptFact) -> None:
    """Start an instance of this version for a fact; it stays on the version whatever is deployed later."""
    if len(obj.active) >= ACTIVE_MAX:
        raise BusinessError(
            f"{ACTIVE_MAX} instances are active on {obj.state.key.type} {obj.state.key.id} already",
            hint="declare what a second fact means: onRepeat: ignore, reject or queue",
        )
    record = fact.record
    values = deployed.compiled.input_of(fact_values(fact.type, fact.id, record, deployed.reads_instants))
    occurred_at: int = record["occurred_at"]
    due_by = record["due_by"]
    if due_by is None and deployed.sla_ms is not None:
        due_by = occurred_at + deployed.sla_ms
    turn = Turn(
        obj,
        deployed,
        Instance(
            id=ids.instance_id(deployed.name, UUID(fact.id)),
            workflow=deployed.name,
            version=deployed.version,
            definition_hash=deployed.content_hash,
            base=Status.RUNNING,
            seq=0,
            business_object_type=obj.state.key.type,
            business_object_id=obj.state.key.id,
            correlation_id=record["correlation_id"],
            actor=record["actor"],
            fact_id=fact.id,
            input=values,
            step=None,
            started_at=obj.now_ms,
            occurred_at=occurred_at,
            due_by=due_by,
        ),
        None,
    )
    turn.weigh(values, INPUT_BYTES_MAX, "the input that it keeps", f"workflow {deployed.name} {deployed.version}")
    run(turn, enter(turn, deployed.compiled.workflow.start))
    obj.settle(turn)


def enter(turn: Turn, name: str) -> tuple[str, Move]:
    """Enter a step: its first run, or a new one after a known failure."""
    step = turn.deployed.compiled.step(name)
    known = turn.steps.get(name)
    turn.step = name
    turn.steps[name] = StepState("active", known.runs + 1 if known is not None else 1)
    return name, kind_of(step).enter(turn, step)


def resume(turn: Turn, name: str, cause: Cause) -> None:
    """Something that a step waits for has arrived."""
    step = turn.deployed.compiled.step(name)
    if turn.base is Status.WAITING:
        turn.advance(Event.WAKE)
    run(turn, (name, kind_of(step).resume(turn, step, cause)))


def run(turn: Turn, at: tuple[str, Move]) -> None:
    """Go on until something is outstanding or the instance ends; a chain of steps that waits for nothing is bounded."""
    for _ in range(STEPS_PER_MESSAGE_MAX):
        name, move = at
        if isinstance(move, Rest):
            if move.waiting:
                turn.advance(Event.AWAIT)
            return
        if isinstance(move, Failed):
            step_failed(turn, name, move)
            return
        if isinstance(move, Ended):
            turn.forget(name)
            turn.steps[name] = turn.steps[name]._replace(status="done")
            turn.end(move.status, None, move.reason)
            return
        following = _through(turn, name, move)
        if following is None:
            turn.end(Status.REJECTED if move.outcome == "rejected" else Status.COMPLETED, move.outcome or "completed")
            return
        at = enter(turn, following)
    raise BusinessError(
        f"more than {STEPS_PER_MESSAGE_MAX} steps of workflow {turn.instance.workflow} {turn.instance.version} follow"
        " one another without waiting for anything",
        where=f"instance {turn.instance.id}, step {turn.step}",
        hint="the definition loops: correct it and deploy a new version",
    )


def _through(turn: Turn, name: str, move: Done) -> str | None:
    """The step is done: keep its declared output, within its bound. Where the flow goes on, or None."""
    if move.output is not None:
        turn.weigh(move.output, OUTPUT_BYTES_MAX, "its output", f"step {name} of instance {turn.id_text}")
    turn.forget(name)
    was = turn.steps[name]
    turn.steps[name] = StepState("done", was.runs, move.output, was.command_id, was.error_class, was.error_message)
    compiled = turn.deployed.compiled
    if compiled.step(name).step.has_output:
        turn.scope_ = None  # what later expressions read has changed
    return compiled.workflow.next_of(name, move.then)


def step_failed(turn: Turn, name: str, failed: Failed) -> None:
    """The step is known not to have worked: the instance rests until a person retries it or ends it."""
    turn.forget(name)
    message = failed.message[:REASON_CHARS_MAX]
    turn.steps[name] = turn.steps[name]._replace(
        status="failed", error_class=failed.error_class, error_message=message
    )
    turn.reason = f"step {name} failed ({failed.error_class}): {message}"[:REASON_CHARS_MAX]
    turn.advance(Event.STEP_FAILED)


def retry(turn: Turn, name: str) -> None:
    """A new run of a failed step, under a new idempotency key."""
    turn.advance(Event.RETRY)
    turn.reason = None
    run(turn, enter(turn, name))
