"""A test's own workflows on the bench, and two step kinds that only tests register: `listen` and `wait`.
They prove the rules that speak of kinds which no release runs yet: early facts, horizons, timers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, cast

from pydantic import Field

from factmesh.expressions import default_expressions
from factmesh.retry import RetryPolicy
from factmesh.workflow import STEP_MODELS, CompiledStep, Step
from factmesh.workflow.duration import DurationS
from factmesh_orchestrator.bench import Bench
from factmesh_orchestrator.definitions import Deployed, definitions
from factmesh_orchestrator.steps import STEP_KINDS, WAITING, Arrived, Cause, Done, Fired, Move, StepKind
from factmesh_orchestrator.store import compile_definition
from factmesh_orchestrator.turn import Turn

NOW = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)


class ListenStep(Step):
    """Waits for a fact of a type; its output is the fact's data."""

    kind: ClassVar[str] = "listen"
    has_output: ClassVar[bool] = True

    listen: str
    within: DurationS | None = Field(None)


class WaitStep(Step):
    """Waits for a time."""

    kind: ClassVar[str] = "wait"

    wait: DurationS


def _enter_listen(turn: Turn, step: CompiledStep) -> Move:
    model = cast(ListenStep, step.step)
    early = turn.await_fact(model.name, model.listen)
    if early is not None:
        return Done(model.then, model.outcome, early.record["data"])
    if model.within is not None:
        turn.timer(model.name, "late", turn.now + timedelta(seconds=model.within))
    return WAITING


def _resume_listen(turn: Turn, step: CompiledStep, cause: Cause) -> Move:
    if isinstance(cause, Arrived):
        return Done(step.step.then, step.step.outcome, cause.fact["data"])
    return Done("end", "rejected")


def _enter_wait(turn: Turn, step: CompiledStep) -> Move:
    turn.timer(step.step.name, "over", turn.now + timedelta(seconds=cast(WaitStep, step.step).wait))
    return WAITING


def _resume_wait(turn: Turn, step: CompiledStep, cause: Cause) -> Move:
    assert isinstance(cause, Fired)
    return Done(step.step.then, step.step.outcome)


@contextlib.contextmanager
def more_kinds() -> Iterator[None]:
    """Within it, `listen` and `wait` are step kinds: two entries each, and no other change."""
    STEP_MODELS.update(listen=ListenStep, wait=WaitStep)
    STEP_KINDS.update(listen=StepKind(_enter_listen, _resume_listen), wait=StepKind(_enter_wait, _resume_wait))
    try:
        yield
    finally:
        for kinds in (STEP_MODELS, STEP_KINDS):
            del kinds["listen"], kinds["wait"]


def workflow_text(
    do: str, *, name: str = "exception", version: str = "1.0.0", fact: str = "order.delayed", extra: str = ""
) -> str:
    """A definition with these steps."""
    body = "\n".join("  " + line for line in do.strip("\n").splitlines())
    return f"""document: {{dsl: '1.0.3', namespace: test, name: {name}, version: {version}}}
schedule: {{on: {{one: {{with: {{type: {fact}}}}}}}}}
input: {{from: '${{ {{"id": fact.business_object_id, "note": fact.data.note}} }}'}}
{extra}
do:
{body}
"""


def deploy(do: str, *, policies: Mapping[str, Any] | None = None, **given: Any) -> Deployed:
    """A deployed version, as the store would hand it on."""
    plain = {name: RetryPolicy.model_validate(p).model_dump() for name, p in (policies or {}).items()}
    return compile_definition(workflow_text(do, **given), plain, "c0ffee", default_expressions())


def bench(*deployed: Deployed, **given: Any) -> Bench:
    """An object on which nothing has happened yet."""
    return Bench(definitions(deployed), NOW, **given)


#: One call, one choice, one more call, one message to a person.
FOUR_STEPS = """
- look: {call: shop.look_up, with: {id: '${ input.id }'}, timeout: {after: PT10M}}
- choose:
    switch:
      - small: {when: '${ steps.look.amount < 10 }', then: tell, outcome: null}
      - odd: {when: '${ steps.look.amount > 1000 }', then: refuse}
- credit: {call: bank.credit, with: {amount: '${ steps.look.amount }'}, retry: patient}
- tell: {notify: {template: told, to: '${ input.id }', with: {note: '${ input.note }'}}, then: end}
- refuse: {raise: {error: {type: 'about:too-much', status: 422, title: Too much, detail: '${ input.note }'}}}
"""
PATIENT = {"patient": {"attempts_max": 9}}


def four_steps(**given: Any) -> Bench:
    """A bench with FOUR_STEPS, not yet started."""
    return bench(deploy(FOUR_STEPS.replace(", outcome: null", ""), policies=PATIENT, **given))


def started(amount: int = 50, **given: Any) -> Bench:
    """Its first call is answered: the second is outstanding."""
    b = four_steps(**given)
    b.take(b.fact("order.delayed", {"note": "n"}))
    b.take(b.result(b.command("look"), output={"amount": amount}))
    return b
