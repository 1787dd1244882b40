"""A workflow as its YAML says it, typed and frozen: what the linter checks and the orchestrator's decisions read.
No I/O, no expression language, no running instance: one definition, the same for everyone who has its content hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema

from factmesh.document import Document, Json, Path
from factmesh.errors import DefinitionError, ExpressionError
from factmesh.evaluation import expressions_of
from factmesh.workflow.duration import DurationS
from factmesh.workflow.steps import (
    CONTINUE,
    END,
    EXIT,
    FIELDS_LATER,
    FLOW_WORDS,
    ID_PATTERN,
    KINDS_LATER,
    STEP_MODELS,
    CallStep,
    Case,
    ErrorBody,
    Id,
    Model,
    Notification,
    NotifyStep,
    Outcome,
    RaiseStep,
    Step,
    SwitchStep,
    Target,
    kinds_of,
    register_step,
)

__all__ = [
    "CONTINUE",
    "END",
    "EXIT",
    "STEP_MODELS",
    "CallStep",
    "Case",
    "Definition",
    "ErrorBody",
    "Notification",
    "NotifyStep",
    "OnRepeat",
    "Outcome",
    "Problem",
    "RaiseStep",
    "Step",
    "SwitchStep",
    "Target",
    "Workflow",
    "WorkflowError",
    "parse_workflow",
    "register_step",
]

#: A larger process is several workflows.
steps_max = 200
#: Below the audit period of 400 days, for which ledger rows live (DESIGN section 8).
max_age_default_s = 90 * 86400.0

M = TypeVar("M", bound=Model)

OnRepeat = Literal["ignore", "reject", "queue", "start"]


class Header(Model):
    dsl: str = Field(pattern=r"^1\.0\.\d+$", description="Version of the Serverless Workflow DSL.")
    namespace: Id
    name: Id
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$", description="Semantic version; a deployed one never changes.")


class Evaluate(Model):
    language: Literal["cel"] = "cel"
    mode: Literal["strict"] = "strict"


class FactFilter(Model):
    type: str = Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$", description="The fact's type: noun.verb_past")


class One(Model):
    with_: FactFilter = Field(alias="with")


class On(Model):
    one: One


class Schedule(Model):
    on: On


def _map_or_expression(value: object) -> object:
    if not isinstance(value, str | dict):
        raise ValueError("is neither a map nor an expression; write {name: '${ fact.data.name }'}")
    return value


class Input(Model):
    from_: Annotated[
        Any,
        BeforeValidator(_map_or_expression),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": True}]}),
    ] = Field(alias="from", description="What the instance keeps of the fact that starts it: named fields.")


class Sla(Model):
    target: DurationS = Field(description="From the business start (occurred_at) to the end.")
    warn_at: float = Field(0.8, alias="warnAt", gt=0, lt=1, strict=False, description="Share of the target.")


class Owner(Model):
    team: str = Field(min_length=1, max_length=200)
    contact: str | None = Field(None, min_length=1, max_length=300, description="An address, or a ref+… to one.")
    runbook: str | None = Field(None, min_length=1, max_length=500)


class Definition(Model):
    """The file, but for its steps, whose kinds are open: `parse_workflow` takes those through the registry."""

    document: Header
    evaluate: Evaluate = Evaluate()
    schedule: Schedule
    input: Input
    sla: Sla | None = None
    owner: Owner | None = None
    max_age: DurationS = Field(
        max_age_default_s, alias="maxAge", validate_default=False, description="Then it needs a person. P90D if absent."
    )
    on_repeat: OnRepeat = Field(
        "ignore", alias="onRepeat", description="What a second starting fact of the same business object means."
    )
    do: list[Any] = Field(min_length=1, max_length=steps_max, description="The steps in order, one key each.")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a definition."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class WorkflowError(DefinitionError):
    """Everything that is wrong in one definition, not the first thing only."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        rest = "".join(f"\n{problem}" for problem in self.problems[1:])
        super().__init__(first.message + (f" ({first.hint})" if first.hint else "") + rest, where=first.where)


@dataclass(frozen=True)
class Workflow:
    """A parsed definition. `source` is the document it came from, for errors, storage and the hash."""

    definition: Definition
    steps: tuple[Step, ...]
    source: Document = field(repr=False, compare=False)

    @property
    def namespace(self) -> str:
        return self.definition.document.namespace

    @property
    def name(self) -> str:
        return self.definition.document.name

    @property
    def version(self) -> str:
        return self.definition.document.version

    @property
    def fact_type(self) -> str:
        """The type of the fact that starts an instance."""
        return self.definition.schedule.on.one.with_.type

    @property
    def input_from(self) -> Json:
        return self.definition.input.from_

    @property
    def max_age_s(self) -> float:
        return self.definition.max_age

    @property
    def on_repeat(self) -> OnRepeat:
        return self.definition.on_repeat

    @property
    def sla_s(self) -> float | None:
        return self.definition.sla.target if self.definition.sla else None

    @property
    def start(self) -> str:
        """The name of the first step."""
        return self.steps[0].name

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the canonical JSON of the file: comments and layout do not count, every value does."""
        return hashlib.sha256(self.source.canonical()).hexdigest()

    @cached_property
    def _index(self) -> dict[str, int]:
        return {step.name: index for index, step in enumerate(self.steps)}

    def has(self, name: str) -> bool:
        return name in self._index

    def step(self, name: str) -> Step:
        """The step of that name. Raises DefinitionError: an instance that names another is on another version."""
        try:
            return self.steps[self._index[name]]
        except KeyError:
            raise DefinitionError(
                f"has no step {name!r}", where=f"workflow {self.name} {self.version}", hint="see the steps under do"
            ) from None

    def index(self, name: str) -> int:
        return self._index[name] if name in self._index else self._index[self.step(name).name]

    def next_of(self, name: str, then: str = CONTINUE) -> str | None:
        """Where `then` leads from step `name`: a step's name, or None where the instance ends."""
        if then in (END, EXIT):
            return None
        if then == CONTINUE:
            following = self.index(name) + 1
            return self.steps[following].name if following < len(self.steps) else None
        return self.step(then).name

    def path(self, step: Step, inner: Path = ()) -> Path:
        """The path of something in a step's body, from the document's root."""
        return ("do", self._index[step.name], step.name, *inner)

    def where(self, step: Step, inner: Path = ()) -> str:
        """`file:line:column at path` of something in a step's body."""
        return self.source.where(self.path(step, inner))


def parse_workflow(document: Document) -> Workflow:
    """The typed workflow of a document. Raises WorkflowError with everything that is wrong, each with its line."""
    problems: list[Problem] = []
    definition = _parsed(Definition, document, document.data, (), problems)
    data = document.data if isinstance(document.data, dict) else {}
    do = data.get("do")
    steps = _steps(document, do if isinstance(do, list) else [], problems)
    if definition is not None:
        _templates_stand_alone(document, definition.input.from_, ("input", "from"), problems)
    if definition is None or problems:
        raise WorkflowError(problems)
    workflow = Workflow(definition, tuple(steps), document)
    problems = list(_misplaced_outcomes(workflow))
    if problems:
        raise WorkflowError(problems)
    return workflow


def _parsed(model: type[M], document: Document, data: Json, path: Path, problems: list[Problem]) -> M | None:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            at = (*path, *(part for part in detail["loc"] if part not in ("str", "dict[str,any]", "list[str]")))
            problems.append(_problem(document, at, detail))
        return None


def _problem(document: Document, at: Path, detail: Any) -> Problem:
    field_name = at[-1] if at else ""
    where = document.where(at)
    if detail["type"] == "extra_forbidden":
        if field_name in FIELDS_LATER or field_name in KINDS_LATER:
            return Problem(where, f"{field_name!r} is not supported yet by this version", "remove it")
        return Problem(where, f"{field_name!r} is not a field here", "see schemas/workflow.schema.json for the fields")
    if detail["type"] == "missing":
        return Problem(where, f"{field_name!r} is missing", "add it")
    message = detail["msg"].removeprefix("Value error, ")
    return Problem(where, message[0].lower() + message[1:])


def _steps(document: Document, do: list[Json], problems: list[Problem]) -> list[Step]:
    steps: list[Step] = []
    seen: dict[str, int] = {}
    for index, item in enumerate(do[:steps_max]):
        at: Path = ("do", index)
        if not isinstance(item, dict) or len(item) != 1:
            problems.append(Problem(document.where(at), "is not one step with one name", "write - name: {call: …}"))
            continue
        ((name, body),) = item.items()
        at = (*at, name)
        if name in seen:
            first = document.where(("do", seen[name], name))
            problems.append(Problem(document.where(at), f"a second step {name!r}; the first is {first}", "rename one"))
            continue
        seen[name] = index
        if not isinstance(name, str) or not ID_PATTERN.match(name) or name in FLOW_WORDS:
            hint = "use [a-z_][a-z0-9_]*, at most 63 characters, and not continue, end or exit"
            problems.append(Problem(document.where(at), f"{name!r} cannot name a step", hint))
            continue
        step = _step(document, name, body, at, problems)
        if step is not None:
            steps.append(step)
    return steps


def _step(document: Document, name: str, body: Json, at: Path, problems: list[Problem]) -> Step | None:
    if not isinstance(body, dict):
        problems.append(Problem(document.where(at), f"step {name!r} has no body", "write {call: connector.operation}"))
        return None
    kinds = kinds_of(body, STEP_MODELS)
    if len(kinds) != 1:
        known = ", ".join(sorted(STEP_MODELS))
        later = [] if kinds else sorted(kinds_of(body, KINDS_LATER))
        if later:
            message = f"a {later[0]!r} step is not supported yet by this version"
        elif kinds:
            message = f"step {name!r} is of several kinds: {', '.join(kinds)}"
        else:
            message = f"step {name!r} is of no known kind"
        problems.append(Problem(document.where(at), message, f"use exactly one of {known}"))
        return None
    if "name" in body:
        problems.append(Problem(document.where((*at, "name")), "'name' is not a field here", "the key is the name"))
        return None
    step = _parsed(STEP_MODELS[kinds[0]], document, {**body, "name": name}, at, problems)
    if step is not None:
        before = len(problems)
        for inner, node in step.templates().values():
            _templates_stand_alone(document, node, (*at, *inner), problems)
        if len(problems) > before:
            return None
    return step


def _templates_stand_alone(document: Document, node: Json, at: Path, problems: list[Problem]) -> None:
    try:
        list(expressions_of(node))
    except ExpressionError as error:
        problems.append(Problem(document.where(at), error.message, error.hint))


def _misplaced_outcomes(workflow: Workflow) -> list[Problem]:
    """An outcome says how an instance ends, so it stands only where one ends."""
    problems = []
    for step in workflow.steps:
        for target in step.targets():
            ends = target.then in (END, EXIT) or (target.then == CONTINUE and workflow.next_of(step.name) is None)
            if target.outcome is not None and not ends:
                where = workflow.where(step, (*target.path[:-1], "outcome"))
                problems.append(Problem(where, "an outcome where the instance does not end", "add then: end"))
    return problems
