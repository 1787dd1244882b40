"""Cases of a workflow: given a fact, connector answers and what happens meanwhile, expect path, commands and outcome.
Decisions run on the bench, without a broker; nothing here reads a file or prints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from factmesh.document import Document
from factmesh.errors import DefinitionError, ErrorClass, FactmeshError
from factmesh.message import Message, to_ms
from factmesh.workflow.duration import DurationS
from factmesh_orchestrator.bench import Bench, Command
from factmesh_orchestrator.definitions import Deployed, definitions
from factmesh_orchestrator.model import Instance, Status

START = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
"""When every case begins, unless its fact says when it occurred."""
ANSWERS_MAX = 1_000
"""Answers that one case may give: more means that it goes in circles."""

ASIS = ConfigDict(frozen=True, extra="forbid")
OperationName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]*\.[a-z_][a-z0-9_]*$")]


class Fact(BaseModel):
    """The fact that begins a case, or comes later. What is left out is made up."""

    model_config = ASIS

    type: str
    business_object_type: str = "object"
    business_object_id: str = "id-1"
    data: dict[str, Any] = Field(default_factory=dict)
    actor: str = "person:tester"
    status: str | None = None
    occurred_at: datetime | None = None
    due_by: datetime | None = None

    def message(self, bench: Bench) -> Message:
        occurred_at = self.occurred_at or bench.now
        fields: dict[str, Any] = {"actor": self.actor, "status": self.status, "occurred_at": to_ms(occurred_at)}
        if self.due_by is not None:
            fields["due_by"] = to_ms(self.due_by)
        return bench.fact(self.type, self.data, **fields)


class Failure(BaseModel):
    model_config = ASIS

    error: ErrorClass
    message: str = "refused"


class Answer(BaseModel):
    """What a connector answers: an output, a known failure (exhausted, and so parked), an unknown outcome, nothing."""

    model_config = ASIS

    output: dict[str, Any] | None = None
    failed: Failure | None = None
    unknown: bool = False
    silent: bool = False

    @model_validator(mode="after")
    def _one(self) -> Answer:
        if sum((self.output is not None, self.failed is not None, self.unknown, self.silent)) != 1:
            raise ValueError("is not one of output, failed, unknown: true, silent: true")
        return self


class Resolve(BaseModel):
    """A person's word on an unknown outcome."""

    model_config = ASIS

    command: OperationName
    happened: dict[str, Any] | None = None
    not_happened: bool = False

    @model_validator(mode="after")
    def _one(self) -> Resolve:
        if (self.happened is not None) == self.not_happened:
            raise ValueError("is not one of happened: OUTPUT, not_happened: true")
        return self


class End(BaseModel):
    model_config = ASIS

    status: Literal["failed", "cancelled", "completed", "rejected"]
    reason: str = "ended by hand"


class Happening(BaseModel):
    """One thing that happens once the answers have been given; answers to what follows from it come after it."""

    model_config = ASIS

    fact: Fact | None = None
    advance: DurationS | None = None
    repeat: OperationName | None = Field(None, description="The latest result of this operation comes once more.")
    answer: dict[OperationName, Answer] | None = Field(None, description="The answer to one that was silent.")
    retry: OperationName | None = Field(None, description="A person replays the failed command.")
    resolve: Resolve | None = None
    end: End | None = None

    @model_validator(mode="after")
    def _one(self) -> Happening:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"is not one of {', '.join(type(self).model_fields)}")
        return self


class Expected(BaseModel):
    """What is left out is not looked at."""

    model_config = ASIS

    path: list[str] | None = Field(None, description="Steps in the order in which they were entered first.")
    commands: list[dict[OperationName, Any]] | None = Field(
        None, description="Every command in order; null for the body leaves it open."
    )
    status: Status | None = None
    statuses: list[Status] | None = Field(None, description="What the status topic told, repeats left out.")
    outcome: str | None = None
    step: str | None = None
    reason: str | None = Field(None, description="Part of the text that people are told.")
    instances: int | None = Field(None, description="How many were started.")


class Case(BaseModel):
    model_config = ASIS

    name: str = Field(min_length=1)
    given: Fact
    answers: dict[OperationName, list[Answer]] = Field(default_factory=dict)
    then: list[Happening] = Field(default_factory=list)
    expect: Expected


class CaseFile(BaseModel):
    """`vN.cases.yaml`, beside the version that it tests."""

    model_config = ASIS

    cases: list[Case] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a case went; `problems` is empty when it holds."""

    name: str
    problems: tuple[str, ...]


def parse_cases(document: Document) -> CaseFile:
    """The typed cases of a document. Raises DefinitionError naming the line of the first thing that is wrong."""
    try:
        return CaseFile.model_validate(document.data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DefinitionError(
            first["msg"].removeprefix("Value error, "),
            where=document.where(tuple(first["loc"])),
            hint="see the orchestrator's README, `Cases`",
        ) from None


def run_case(deployed: Deployed, case: Case) -> Verdict:
    """Play a case through the decisions of the real service and compare."""
    run = _Run(deployed, case)
    try:
        run.play()
    except FactmeshError as error:
        return Verdict(case.name, (f"a message died: {error}",))
    return Verdict(case.name, tuple(run.compare()))


class _Run:
    """One case under way: answers are given in the order of the commands, then the next thing happens."""

    def __init__(self, deployed: Deployed, case: Case) -> None:
        self.case = case
        given = case.given
        self.bench = Bench(definitions([deployed]), START, given.business_object_type, given.business_object_id)
        self.answers = {name: deque(answers) for name, answers in case.answers.items()}
        self.answered = 0
        self.results: dict[str, Message] = {}

    def play(self) -> None:
        self.bench.take(self.case.given.message(self.bench))
        self._answer_all()
        for happening in self.case.then:
            self._happen(happening)
            self._answer_all()

    def _answer_all(self) -> None:
        while self.answered < min(len(self.bench.commands), ANSWERS_MAX):
            command = self.bench.commands[self.answered]
            self.answered += 1
            waiting = self.answers.get(command.name)
            if waiting:
                self._answer(command, waiting.popleft())

    def _answer(self, command: Command, answer: Answer) -> None:
        bench = self.bench
        if answer.output is not None:
            self._result(command, bench.result(command, output=answer.output))
        elif answer.failed is not None:
            self._result(command, bench.result(command, failed=(answer.failed.error, answer.failed.message)))
            bench.take(bench.parked(command, "exhausted"))
        elif answer.unknown:
            bench.take(bench.parked(command, "unknown"))

    def _result(self, command: Command, result: Message) -> None:
        self.results[command.name] = result
        self.bench.take(result)

    def _latest(self, name: str) -> Command:
        for command in reversed(self.bench.commands):
            if command.name == name:
                return command
        raise DefinitionError(f"no command {name} was sent before this", where=f"case {self.case.name!r}")

    def _happen(self, h: Happening) -> None:
        bench = self.bench
        if h.fact is not None:
            bench.take(h.fact.message(bench))
        elif h.advance is not None:
            bench.advance(h.advance)
        elif h.repeat is not None:
            self._latest(h.repeat)
            bench.take(bench.again(self.results[h.repeat]))
        elif h.answer is not None:
            for name, answer in h.answer.items():
                self._answer(self._latest(name), answer)
        elif h.retry is not None:
            bench.take(bench.retry(self._latest(h.retry)))
        elif h.resolve is not None:
            command = self._latest(h.resolve.command)
            if h.resolve.happened is not None:
                result = bench.result(command, output=h.resolve.happened, verdict="happened")
            else:
                failed = (ErrorClass.AMBIGUOUS, "it did not happen")
                result = bench.result(command, failed=failed, verdict="not_happened")
            self._result(command, result)
        elif h.end is not None:
            bench.take(bench.signal("end_instance", h.end.model_dump()))

    def compare(self) -> Sequence[str]:
        """Every difference between what was expected and what is."""
        expect, bench = self.case.expect, self.bench
        problems: list[str] = []
        if expect.instances is not None and expect.instances != len(bench.instances):
            problems.append(f"{len(bench.instances)} instances were started, expected {expect.instances}")
        if not bench.instances:
            return problems if expect.instances == 0 else [*problems, "no instance was started"]
        for name, is_ in _told(bench, bench.instance).items():
            wanted = getattr(expect, name)
            if wanted is not None and wanted != is_:
                problems.append(f"{name} is {_shown(is_)}, expected {_shown(wanted)}")
        if expect.reason is not None and expect.reason not in (bench.instance.reason or ""):
            problems.append(f"reason is {bench.instance.reason!r}, expected something with {expect.reason!r}")
        if expect.commands is not None:
            problems += _compare_commands(expect.commands, bench.commands)
        return problems


def _told(bench: Bench, instance: Instance) -> Mapping[str, Any]:
    statuses: list[Status] = []
    for status in (Status(s["status"]) for s in bench.statuses if s["instance_id"] == str(instance.id)):
        if not statuses or statuses[-1] is not status:
            statuses.append(status)
    return {
        "path": list(instance.steps),
        "status": instance.status,
        "statuses": statuses,
        "outcome": instance.outcome,
        "step": instance.step,
    }


def _compare_commands(wanted: Sequence[Mapping[str, Any]], sent: Sequence[Command]) -> list[str]:
    names, expected = [c.name for c in sent], [name for one in wanted for name in one]
    if names != expected:
        return [f"commands are {_shown(names)}, expected {_shown(expected)}"]
    bodies = [body for one in wanted for body in one.values()]
    return [
        f"the body of {command.name} (step {command.step}) is {command.body}, expected {body}"
        for command, body in zip(sent, bodies, strict=True)
        if body is not None and body != command.body
    ]


def _shown(value: Any) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
