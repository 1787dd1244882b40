"""A workflow with its expressions compiled once, through whatever compiler is handed in.
The vendor of the expression language is not named here, and nothing is compiled a second time while instances run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from factmesh.document import Json
from factmesh.errors import DefinitionError, ExpressionError
from factmesh.evaluation import Expressions, Template, compile_template, expressions_of
from factmesh.workflow.graph import ran_before
from factmesh.workflow.model import Problem, Step, SwitchStep, Workflow, WorkflowError

#: What `input.from` may read: the canonical fact. Instants are RFC 3339 text in UTC; an absent value is null.
FACT_FIELDS = (
    "actor",
    "business_object_id",
    "business_object_type",
    "correlation_id",
    "data",
    "due_by",
    "id",
    "occurred_at",
    "received_at",
    "source",
    "status",
    "type",
)
#: What every step may read of its instance. Instants are RFC 3339 text in UTC; an absent value is null.
INSTANCE_FIELDS = (
    "actor",
    "business_object_id",
    "business_object_type",
    "correlation_id",
    "due_by",
    "id",
    "occurred_at",
    "started_at",
)
INPUT_VARIABLES = frozenset(f"fact.{name}" for name in FACT_FIELDS)
STEP_VARIABLES = frozenset({"input", *(f"instance.{name}" for name in INSTANCE_FIELDS)})


def variables_of(workflow: Workflow) -> Mapping[str, frozenset[str]]:
    """The names that each reachable step's expressions may use: outputs of steps that ran on every path to it."""
    return {
        name: STEP_VARIABLES | {f"steps.{other}" for other in ran if workflow.step(other).has_output}
        for name, ran in ran_before(workflow).items()
    }


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """A step and its templates by slot: `with` of a call, `when.<case>` of a switch, `to` and `with` of a notify…"""

    step: Step
    slots: Mapping[str, Template]
    where: str

    def evaluate(self, slot: str, scope: Mapping[str, Json]) -> Json:
        """A slot's data with its expressions evaluated. Raises ExpressionError naming the step and the slot."""
        try:
            return self.slots[slot].evaluate(scope)
        except ExpressionError as error:
            where = f"step {self.step.name}, {slot}" + (f", {error.where}" if error.where else "")
            raise ExpressionError(error.message, where=where, hint=error.hint) from None

    def holds(self, slot: str, scope: Mapping[str, Json]) -> bool:
        """A condition's value. Raises ExpressionError where it is anything but true or false."""
        value = self.evaluate(slot, scope)
        if not isinstance(value, bool):
            raise ExpressionError(
                "the condition is neither true nor false",
                where=f"step {self.step.name}, {slot}",
                hint="compare: x == true, x != null",
            )
        return value


@dataclass(frozen=True)
class CompiledWorkflow:
    """What the decision core works with. `workflow` answers questions of flow, the rest evaluates."""

    workflow: Workflow
    input: Template
    steps: Mapping[str, CompiledStep]
    expressions: Expressions

    @property
    def content_hash(self) -> str:
        return self.workflow.content_hash

    def step(self, name: str) -> CompiledStep:
        """The compiled step of that name. Raises DefinitionError where the definition has none."""
        found = self.steps.get(name)
        if found is None:
            self.workflow.step(name)
            raise DefinitionError(f"step {name!r} is unreachable", where=f"workflow {self.workflow.name}")
        return found

    def input_of(self, fact: Mapping[str, Json]) -> dict[str, Json]:
        """What an instance keeps of the fact that starts it. `fact` has the FACT_FIELDS. Raises ExpressionError."""
        where = f"workflow {self.workflow.name} {self.workflow.version}, input.from"
        try:
            value = self.input.evaluate(self.expressions.scope({"fact": fact}))
        except ExpressionError as error:
            raise ExpressionError(
                error.message, where=f"{where}, {error.where}" if error.where else where, hint=error.hint
            ) from None
        if not isinstance(value, dict):
            raise ExpressionError("the input is not a map", where=where, hint='write {"name": value, …}')
        return value

    def scope(
        self, *, input: Mapping[str, Json], steps: Mapping[str, Json], instance: Mapping[str, Json]
    ) -> Mapping[str, Json]:
        """The values for all expressions of one step, converted once. `instance` has the INSTANCE_FIELDS."""
        return self.expressions.scope({"input": input, "steps": steps, "instance": instance})

    def chosen(self, step: SwitchStep, scope: Mapping[str, Json]) -> str | None:
        """The name of the first case that holds (the default's where none does), or None. Raises ExpressionError."""
        compiled = self.step(step.name)
        for case in step.cases:
            if case.when is None or compiled.holds(f"when.{case.name}", scope):
                return case.name
        return None


def compile_workflow(workflow: Workflow, expressions: Expressions) -> CompiledWorkflow:
    """Compile every expression of every reachable step. Raises WorkflowError with all that do not compile."""
    problems: list[Problem] = []
    input_template = compile_template(None, expressions, frozenset())
    try:
        input_template = compile_template(workflow.input_from, expressions, INPUT_VARIABLES)
    except ExpressionError as error:
        problems.append(_problem(workflow.source.where(("input", "from")), error))
    steps: dict[str, CompiledStep] = {}
    for name, variables in variables_of(workflow).items():
        step = workflow.step(name)
        slots: dict[str, Template] = {}
        for slot, (inner, node) in step.templates().items():
            try:
                slots[slot] = compile_template(node, expressions, variables)
            except ExpressionError as error:
                problems.append(_problem(workflow.where(step, inner), error))
        steps[name] = CompiledStep(step, slots, workflow.where(step))
    if problems:
        raise WorkflowError(problems)
    return CompiledWorkflow(workflow, input_template, steps, expressions)


def _problem(where: str, error: ExpressionError) -> Problem:
    return Problem(where, f"{error.where}: {error.message}" if error.where else error.message, error.hint)


def expression_problems(workflow: Workflow, expressions: Expressions) -> Iterator[Problem]:
    """Every expression that does not compile or reads what is not there; a step that may not have run is named."""
    available = variables_of(workflow)
    outputs = {f"steps.{step.name}" for step in workflow.steps if step.has_output}
    for path, text in expressions_of(workflow.input_from):
        yield from _check(workflow, ("input", "from", *path), text, INPUT_VARIABLES, frozenset(), expressions)
    for step in workflow.steps:
        variables = available.get(step.name)
        if variables is None:
            continue
        for inner, node in step.templates().values():
            for path, text in expressions_of(node):
                at = workflow.path(step, (*inner, *path))
                yield from _check(workflow, at, text, variables, frozenset(outputs) - variables, expressions)


def _check(
    workflow: Workflow,
    at: Sequence[str | int],
    text: str,
    variables: frozenset[str],
    elsewhere: frozenset[str],
    expressions: Expressions,
) -> Iterator[Problem]:
    where = workflow.source.where(tuple(at))
    try:
        expressions.compile(text, variables)
        return
    except ExpressionError as error:
        failure = error
    if elsewhere:
        try:
            expressions.compile(text, variables | elsewhere)
        except ExpressionError:
            pass
        else:
            # It compiles once outputs of other steps are known, so those are what is wrong with it: name them.
            for name in sorted(elsewhere):
                if _needs(text, variables | elsewhere, name, expressions):
                    yield Problem(
                        where,
                        f"reads {name}, but step {name.removeprefix('steps.')!r} has not run on every path to it",
                        "move that step before, or read it only behind the case that runs it",
                    )
            return
    yield _problem(where, failure)


def _needs(text: str, variables: frozenset[str], name: str, expressions: Expressions) -> bool:
    try:
        expressions.compile(text, variables - {name})
    except ExpressionError:
        return True
    return False


__all__ = [
    "FACT_FIELDS",
    "INPUT_VARIABLES",
    "INSTANCE_FIELDS",
    "STEP_VARIABLES",
    "CompiledStep",
    "CompiledWorkflow",
    "compile_workflow",
    "expression_problems",
    "variables_of",
]
