"""The step kinds as typed models, and the registry through which a kind is added by a local change.
No decision about a running instance lives here: what a step does is the orchestrator's, what it says is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from factmesh.document import Json, Path
from factmesh.evaluation import expression_in
from factmesh.workflow.duration import DurationS

ID = r"^[a-z_][a-z0-9_]{0,62}$"
ID_PATTERN = re.compile(ID)
#: Words of `then` that are not step names.
CONTINUE, END, EXIT = "continue", "end", "exit"
FLOW_WORDS = frozenset({CONTINUE, END, EXIT})

Id = Annotated[str, StringConstraints(pattern=ID)]
Outcome = Literal["completed", "rejected"]
Data = Annotated[dict[str, Json], Field(description="Data for the receiver; a value may be one whole ${ … }.")]


def _condition(value: object) -> object:
    if not isinstance(value, str) or expression_in(value) is None:
        raise ValueError("is not an expression; write it as '${ … }'")
    return value


Condition = Annotated[str, BeforeValidator(_condition)]


class Model(BaseModel):
    """Frozen, and nothing that it does not know is let pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Target(Model):
    """One way on from a step: the flow word or step name, the outcome if it ends, and where the file says so."""

    then: str
    outcome: Outcome | None = None
    path: Path = ()
    label: str = ""


class Step(Model):
    """What every kind of step has. `name` is the key in `do`, not a field of the body."""

    kind: ClassVar[str]
    #: Whether later expressions may read `steps.<name>`.
    has_output: ClassVar[bool] = False
    #: Whether the flow goes on behind it.
    goes_on: ClassVar[bool] = True

    name: SkipJsonSchema[str]
    then: str = Field(CONTINUE, description="The next step's name, or continue (the following one), end, exit.")
    outcome: Outcome | None = Field(None, description="How the instance ends where this step ends it.")

    def templates(self) -> Mapping[str, tuple[Path, Json]]:
        """The data in which expressions may stand, by slot: its path inside the step's body, and the data."""
        return {}

    def targets(self) -> tuple[Target, ...]:
        """Every way on, in the order in which they are tried."""
        return (Target(then=self.then, outcome=self.outcome, path=("then",)),)


class Timeout(Model):
    after: DurationS = Field(description="No attempt begins after this.")


class CallStep(Step):
    """Ask a connector for one operation; the step's output is what the operation's response mapping keeps."""

    kind: ClassVar[str] = "call"
    has_output: ClassVar[bool] = True

    call: str = Field(pattern=r"^[a-z_][a-z0-9_]{0,62}\.[a-z_][a-z0-9_]{0,62}$", description="connector.operation")
    with_: Data = Field(default_factory=dict, alias="with")
    retry: Id | None = Field(None, description="Name of a retry policy; absent leaves the operation's own.")
    timeout: Timeout | None = None

    @property
    def connector(self) -> str:
        return self.call.split(".")[0]

    @property
    def operation(self) -> str:
        return self.call.split(".")[1]

    @property
    def timeout_s(self) -> float | None:
        return self.timeout.after if self.timeout else None

    def templates(self) -> Mapping[str, tuple[Path, Json]]:
        return {"with": (("with",), self.with_)}


def _cases(value: object) -> object:
    """`- name: {when, then}` as in the DSL, into the named cases of the model."""
    if not isinstance(value, list) or not value:
        raise ValueError("is not a list of cases; write - name: {when: '${ … }', then: step}")
    cases = []
    for item in value:
        if not isinstance(item, dict) or len(item) != 1:
            raise ValueError("holds a case that is not one name with its body; write - name: {when: …, then: …}")
        ((name, body),) = item.items()
        if not isinstance(body, dict):
            raise ValueError(f"holds the case {name!r} without a body; write {{when: '${{ … }}', then: step}}")
        cases.append({**body, "name": name})
    names = [case["name"] for case in cases]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"holds the case {twice!r} twice; rename one")
    for index, case in enumerate(cases[:-1]):
        if case.get("when") is None:
            raise ValueError(f"holds the default case {names[index]!r} before others; move it to the end")
    return cases


class Case(Model):
    name: SkipJsonSchema[Id]
    when: Condition | None = Field(None, description="A condition; the case without one is the default, and last.")
    then: str = Field(description="The next step's name, or continue, end, exit.")
    outcome: Outcome | None = None


class SwitchStep(Step):
    """Go on by the first case whose condition holds; by `then` where none does."""

    kind: ClassVar[str] = "switch"

    switch: Annotated[
        list[Case],
        BeforeValidator(_cases),
        WithJsonSchema(
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 1,
                    "propertyNames": {"pattern": ID},
                },
            }
        ),
    ]

    @model_validator(mode="after")
    def _one_default(self) -> SwitchStep:
        if self.has_default and (self.then != CONTINUE or self.outcome is not None):
            raise ValueError("has a default case and a then or an outcome of its own, which would never count")
        return self

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(self.switch)

    @property
    def has_default(self) -> bool:
        return self.switch[-1].when is None

    def templates(self) -> Mapping[str, tuple[Path, Json]]:
        """One slot a condition: `when.<case>`."""
        return {
            f"when.{case.name}": (("switch", index, case.name, "when"), case.when)
            for index, case in enumerate(self.switch)
            if case.when is not None
        }

    def targets(self) -> tuple[Target, ...]:
        ways = tuple(
            Target(
                then=case.then,
                outcome=case.outcome,
                path=("switch", index, case.name, "then"),
                label=case.name,
            )
            for index, case in enumerate(self.switch)
        )
        return ways if self.has_default else (*ways, *super().targets())


class Notification(Model):
    template: Id = Field(description="Name of a template in the project's templates/.")
    to: str | list[str] = Field(description="Whom to tell: an address, a list, or an expression that gives one.")
    channel: Id = Field("email", description="Which channel of the notifier.")
    with_: Data = Field(default_factory=dict, alias="with")


class NotifyStep(Step):
    """Tell a person or a system; the workflow does not wait for the delivery."""

    kind: ClassVar[str] = "notify"

    notify: Notification

    def templates(self) -> Mapping[str, tuple[Path, Json]]:
        return {
            "to": (("notify", "to"), self.notify.to),
            "with": (("notify", "with"), self.notify.with_),
        }


class ErrorBody(Model):
    """An RFC 9457 problem."""

    type: str = Field(min_length=1, max_length=300, description="A URI reference that names the kind of problem.")
    status: int = Field(ge=400, le=599)
    title: str = Field(min_length=1, max_length=300)
    detail: str | None = Field(None, max_length=2000, description="May be one whole ${ … }.")


class Raised(Model):
    error: ErrorBody


class RaiseStep(Step):
    """End the instance as failed, with a problem that people can read."""

    kind: ClassVar[str] = "raise"
    goes_on: ClassVar[bool] = False

    raise_: Raised = Field(alias="raise")

    @model_validator(mode="after")
    def _ends(self) -> RaiseStep:
        if self.then != CONTINUE or self.outcome is not None:
            raise ValueError("has a then or an outcome behind raise; it always ends the instance as failed")
        return self

    @property
    def error(self) -> ErrorBody:
        return self.raise_.error

    def templates(self) -> Mapping[str, tuple[Path, Json]]:
        return {"detail": (("raise", "error", "detail"), self.error.detail)}

    def targets(self) -> tuple[Target, ...]:
        return ()


#: The kinds that this version runs, by the key that names them in a step's body.
STEP_MODELS: dict[str, type[Step]] = {}

#: Words of the language that a later version runs. Refused by name, never ignored.
KINDS_LATER = frozenset({"approve", "do", "emit", "for", "fork", "listen", "run", "set", "try", "wait"})
FIELDS_LATER = frozenset({"catch", "compensate", "export", "if", "input", "metadata", "optional", "output", "sla"})


def register_step(kind: str, model: type[Step]) -> None:
    """Add a kind. A kind has one model; taking one that is there is a mistake of the caller."""
    if kind in STEP_MODELS:
        raise ValueError(f"step kind {kind!r} is registered already, by {STEP_MODELS[kind].__name__}")
    STEP_MODELS[kind] = model


def kinds_of(body: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """The keys of a step's body that name a kind."""
    return [kind for kind in known if kind in body]


for _model in (CallStep, SwitchStep, NotifyStep, RaiseStep):
    register_step(_model.kind, _model)
