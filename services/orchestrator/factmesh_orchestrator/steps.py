"""What each kind of step does when it is entered and when something that it waits for arrives: one entry a kind.
A kind is added here and in `factmesh.workflow.steps`, nowhere else. It works on a `Turn` and returns a move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from factmesh.errors import BusinessError
from factmesh.values import frozen_value
from factmesh.workflow import CallStep, CompiledStep, NotifyStep, RaiseStep, SwitchStep
from factmesh_orchestrator.model import Status
from factmesh_orchestrator.turn import Turn

REASON_CHARS_MAX = 500
"""What a status says of why; it is for people and never payload."""
STEPS_PER_MESSAGE_MAX = 100
"""Steps that one message may run through without waiting for anything: more is a loop in the definition."""


# --- what arrives for a step -----------------------------------------------------------------------------------------


@frozen_value
class Result:
    """The outcome of a command of this step. Failed means known not to have worked."""

    command_id: str
    done: bool
    output: Any = None
    error_class: str | None = None
    error_message: str | None = None


@frozen_value
class Fired:
    """A timer of this step."""

    name: str


@frozen_value
class Arrived:
    """A fact that this step awaited; `fact` is what expressions read of it."""

    type: str
    fact: Mapping[str, Any]


Cause = Result | Fired | Arrived


# --- what a step answers ---------------------------------------------------------------------------------------------


@frozen_value
class Rest:
    """Nothing more now: something is outstanding. `waiting`: for a fact, a timer or a person, not for a system."""

    waiting: bool = False


@frozen_value
class Done:
    """The step is through; the flow goes on by `then`."""

    then: str
    outcome: str | None = None
    output: Any = None


@frozen_value
class Failed:
    """The step is known not to have worked."""

    error_class: str
    message: str


@frozen_value
class Ended:
    """The step ends the instance."""

    status: Status
    reason: str


Move = Rest | Done | Failed | Ended
REST = Rest()
WAITING = Rest(waiting=True)


@frozen_value
class StepKind:
    """One kind of step."""

    enter: Callable[[Turn, CompiledStep], Move]
    resume: Callable[[Turn, CompiledStep, Cause], Move]


def _nothing_to_resume(turn: Turn, step: CompiledStep, cause: Cause) -> Move:
    raise BusinessError(
        f"step {step.step.name!r} waits for nothing, and {type(cause).__name__} came for it",
        where=f"instance {turn.instance.id}",
        hint="this is a bug in the orchestrator: report it with the message's id",
    )


# --- call ------------------------------------------------------------------------------------------------------------


def _enter_call(turn: Turn, step: CompiledStep) -> Move:
    model = cast(CallStep, step.step)
    deadline_ms = None if model.timeout_s is None else turn.now_ms + int(model.timeout_s * 1000)
    turn.command(
        step,
        model.connector,
        model.operation,
        step.evaluate("with", turn.scope()),
        awaited=True,
        deadline_ms=deadline_ms,
        retry=turn.deployed.retries.get(model.name),
    )
    return REST


def _resume_call(turn: Turn, step: CompiledStep, cause: Cause) -> Move:
    if not isinstance(cause, Result):
        return _nothing_to_resume(turn, step, cause)
    if cause.done:
        return Done(step.step.then, step.step.outcome, cause.output)
    return Failed(cause.error_class or "bug", cause.error_message or "the connector gave no reason")


# --- switch, notify, raise -------------------------------------------------------------------------------------------


def _enter_switch(turn: Turn, step: CompiledStep) -> Move:
    model = cast(SwitchStep, step.step)
    chosen = turn.deployed.compiled.chosen(model, turn.scope())
    for case in model.cases:
        if case.name == chosen:
            return Done(case.then, case.outcome)
    return Done(model.then, model.outcome)


def _enter_notify(turn: Turn, step: CompiledStep) -> Move:
    model = cast(NotifyStep, step.step)
    scope = turn.scope()
    body = {
        "template": model.notify.template,
        "channel": model.notify.channel,
        "to": step.evaluate("to", scope),
        "data": step.evaluate("with", scope),
    }
    turn.command(step, "notifier", "notify", body, awaited=False)
    return Done(model.then, model.outcome)


def _enter_raise(turn: Turn, step: CompiledStep) -> Move:
    error = cast(RaiseStep, step.step).error
    detail = step.evaluate("detail", turn.scope())
    text = f"{error.title} ({error.type}, {error.status})" + (f": {detail}" if detail else "")
    return Ended(Status.FAILED, text[:REASON_CHARS_MAX])


#: Every kind that this service runs. Tests add their own.
STEP_KINDS: dict[str, StepKind] = {
    "call": StepKind(_enter_call, _resume_call),
    "switch": StepKind(_enter_switch, _nothing_to_resume),
    "notify": StepKind(_enter_notify, _nothing_to_resume),
    "raise": StepKind(_enter_raise, _nothing_to_resume),
}


def kind_of(step: CompiledStep) -> StepKind:
    """The kind of a step. Raises BusinessError for one that this release does not run."""
    kind = STEP_KINDS.get(step.step.kind)
    if kind is None:
        raise BusinessError(
            f"step {step.step.name!r} is of kind {step.step.kind!r}, which this release does not run",
            where=step.where,
            hint="roll the orchestrator forward to the release that the definition was linted with",
        )
    return kind
