"""The rules that a workflow must keep before it may be deployed: one table, each rule with its check.
Nothing is read here: what the project has (connectors, templates, policies) is handed in as a `Surroundings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from factmesh.document import Document, Json
from factmesh.evaluation import Expressions, expressions_of
from factmesh.workflow.compile import expression_problems
from factmesh.workflow.graph import is_backward, reachable
from factmesh.workflow.model import CallStep, NotifyStep, Problem, Workflow, WorkflowError, parse_workflow
from factmesh.workflow.steps import FLOW_WORDS

#: For how long ledger rows live unless configured (DESIGN section 8).
audit_default_s = 400 * 86400.0


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class OperationFacts:
    """What the linter must know of an operation."""

    sensitive: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a project has beside the workflow. None means unknown, and its rules do not judge.

    `connectors` gives each connector its operations; None there stands for one that does not declare them in YAML.
    """

    expressions: Expressions | None = None
    connectors: Mapping[str, Mapping[str, OperationFacts] | None] | None = None
    templates: frozenset[str] | None = None
    channels: frozenset[str] | None = None
    policies: frozenset[str] | None = None
    audit_s: float = audit_default_s


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule: where, what, and how to fix it."""

    rule: str
    severity: Severity
    where: str
    message: str
    hint: str

    def __str__(self) -> str:
        text = f"{self.where}: {self.severity}: {self.message} [{self.rule}]"
        return f"{text}\n    fix: {self.hint}" if self.hint else text


Check = Callable[[Workflow, Surroundings], Iterable[Problem]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table. `text` says what the rule wants and why."""

    id: str
    severity: Severity
    text: str
    check: Check


def _calls(workflow: Workflow) -> Iterator[CallStep]:
    return (step for step in workflow.steps if isinstance(step, CallStep))


def _among(names: Iterable[str]) -> str:
    listed = ", ".join(sorted(names))
    return f"there are: {listed}" if listed else "there are none yet"


def _unknown_connector(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    if around.connectors is None:
        return
    for step in _calls(workflow):
        where = workflow.where(step, ("call",))
        if step.connector not in around.connectors:
            yield Problem(where, f"there is no connector {step.connector!r}", _among(around.connectors))
            continue
        operations = around.connectors[step.connector]
        if operations is not None and step.operation not in operations:
            message = f"connector {step.connector!r} has no operation {step.operation!r}"
            yield Problem(where, message, _among(operations))


def _sensitive(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for step in _calls(workflow):
        operations = (around.connectors or {}).get(step.connector) or {}
        facts = operations.get(step.operation)
        if facts is not None and facts.sensitive:
            yield Problem(
                workflow.where(step, ("call",)),
                f"{step.call} is sensitive and needs an approval upstream, which this version cannot run yet",
                "use an operation that is not sensitive, or wait for the approve step",
            )


def _unknown_target(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for step in workflow.steps:
        for target in step.targets():
            if target.then not in FLOW_WORDS and not workflow.has(target.then):
                yield Problem(
                    workflow.where(step, target.path),
                    f"then: {target.then} names no step",
                    _among(s.name for s in workflow.steps) + "; or continue, end, exit",
                )


def _unreachable(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    seen = reachable(workflow)
    for step in workflow.steps:
        if step.name not in seen:
            yield Problem(
                workflow.where(step),
                f"no path from the start reaches step {step.name!r}",
                "let a then lead to it, or remove it",
            )


def _loop(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for step in workflow.steps:
        for target in step.targets():
            if is_backward(workflow, step, target):
                yield Problem(
                    workflow.where(step, target.path),
                    f"then: {target.then} leads back, a loop without a bound",
                    "lead forward only; repeating a call is its retry policy's work",
                )


def _expressions(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    if around.expressions is not None:
        yield from expression_problems(workflow, around.expressions)


_LITERAL = re.compile(r"\"(\\.|[^\"\\])*\"|'(\\.|[^'\\])*'", re.DOTALL)
_WHOLE_FACT = re.compile(r"(?<![\w.])fact\s*(?:$|[^\s.\w])")
_WHOLE_DATA = re.compile(r"(?<![\w.])fact\s*\.\s*data\s*(?:$|[^\s.\w\[])")
_WHOLE_BY_MACRO = re.compile(r"(?<![\w.])fact\s*\.\s*data\s*\.\s*(map|filter|exists|all|exists_one)\s*\(")


def keeps_whole_payload(expression: str) -> bool:
    """Whether an expression over the fact takes all of it, or all of its data, rather than named fields."""
    bare = _LITERAL.sub('""', expression)
    return any(pattern.search(bare) for pattern in (_WHOLE_FACT, _WHOLE_DATA, _WHOLE_BY_MACRO))


def _whole_payload(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for path, text in expressions_of(workflow.input_from):
        if keeps_whole_payload(text):
            yield Problem(
                workflow.source.where(("input", "from", *path)),
                f"keeps a whole payload: ${{ {text} }}",
                "name the fields that later steps need: business records stay in their systems",
            )


def _input_is_a_map(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    node: Json = workflow.input_from
    if isinstance(node, str) and not any(True for _ in expressions_of(node)):
        yield Problem(
            workflow.source.where(("input", "from")),
            "is text without an expression, and an instance's input is a map",
            "write {name: '${ fact.data.name }'}",
        )


def _template(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for step in workflow.steps:
        if (
            isinstance(step, NotifyStep)
            and around.templates is not None
            and step.notify.template not in around.templates
        ):
            where = workflow.where(step, ("notify", "template"))
            yield Problem(where, f"there is no template {step.notify.template!r}", _among(around.templates))


def _channel(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for step in workflow.steps:
        if isinstance(step, NotifyStep) and around.channels is not None and step.notify.channel not in around.channels:
            where = workflow.where(step, ("notify", "channel"))
            yield Problem(where, f"there is no channel {step.notify.channel!r}", _among(around.channels))


def _policy(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    for step in _calls(workflow):
        if step.retry is not None and around.policies is not None and step.retry not in around.policies:
            where = workflow.where(step, ("retry",))
            yield Problem(where, f"there is no retry policy {step.retry!r}", _among(around.policies))


def _max_age(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    if workflow.max_age_s >= around.audit_s:
        yield Problem(
            workflow.source.where(("maxAge",)),
            f"maxAge is {workflow.max_age_s / 86400:g} days, and ledger rows live {around.audit_s / 86400:g}",
            "make it shorter than the audit period, or the ledger forgets what still runs",
        )


def _sla_fits(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    if workflow.sla_s is not None and workflow.sla_s > workflow.max_age_s:
        yield Problem(
            workflow.source.where(("sla", "target")),
            "the SLA's target is longer than maxAge, so it can never be missed",
            "raise maxAge or lower the target",
        )


def _owner(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    if workflow.definition.owner is None:
        where = workflow.source.where(("owner",))
        yield Problem(where, "no owner", "add owner: {team, contact, runbook}: somebody must hear of trouble")


def _contact(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    owner = workflow.definition.owner
    if owner is not None and owner.contact is None:
        yield Problem(workflow.source.where(("owner",)), "the owner has no contact", "add owner.contact")


def _runbook(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    owner = workflow.definition.owner
    if owner is not None and owner.runbook is None:
        yield Problem(workflow.source.where(("owner",)), "no runbook", "add owner.runbook: what to do when it fails")


def _sla(workflow: Workflow, around: Surroundings) -> Iterator[Problem]:
    if workflow.definition.sla is None:
        where = workflow.source.where(("sla",))
        yield Problem(where, "no SLA", "add sla: {target: PT24H}: a breach that nobody defined is never seen")


E, W = Severity.ERROR, Severity.WARNING

RULES: tuple[Rule, ...] = (
    Rule("unknown-operation", E, "Every call names a connector and an operation of the project.", _unknown_connector),
    Rule("sensitive", E, "A sensitive operation needs an approval upstream (B8); none can be given yet.", _sensitive),
    Rule("unknown-target", E, "Every then names a step, or continue, end, exit.", _unknown_target),
    Rule("unreachable", E, "Every step is on some path from the start.", _unreachable),
    Rule("loop", E, "Ways lead forward only: no step kind of this version bounds a loop.", _loop),
    Rule("expression", E, "Every expression compiles and reads what is there on every path to it.", _expressions),
    Rule("whole-payload", E, "An instance keeps declared fields, never a whole payload (B10).", _whole_payload),
    Rule("input-map", E, "An instance's input is a map of named fields.", _input_is_a_map),
    Rule("template", E, "Every notify names a template of the project.", _template),
    Rule("channel", E, "Every notify uses a channel that the project declares, where it declares any.", _channel),
    Rule("retry-policy", E, "Every retry names a policy of the project.", _policy),
    Rule("max-age", E, "An instance ends before the ledger forgets it (DESIGN 8).", _max_age),
    Rule("sla-fits", E, "The SLA's target lies within the maximum age.", _sla_fits),
    Rule("owner", W, "Somebody owns the workflow.", _owner),
    Rule("contact", W, "The owner can be reached.", _contact),
    Rule("runbook", W, "There is a runbook.", _runbook),
    Rule("sla", W, "There is an SLA.", _sla),
)


def lint(workflow: Workflow, around: Surroundings, rules: Iterable[Rule] = RULES) -> tuple[Finding, ...]:
    """Every finding, errors first, each in the order of the rules and of the file."""
    findings = [
        Finding(rule.id, rule.severity, problem.where, problem.message, problem.hint)
        for rule in rules
        for problem in rule.check(workflow, around)
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity is not E))


def lint_document(document: Document, around: Surroundings) -> tuple[Workflow | None, tuple[Finding, ...]]:
    """Parse and lint. What does not parse is reported as findings of the rule `shape`."""
    try:
        workflow = parse_workflow(document)
    except WorkflowError as error:
        return None, tuple(Finding("shape", E, p.where, p.message, p.hint) for p in error.problems)
    return workflow, lint(workflow, around)


def errors_of(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings that forbid a deployment."""
    return tuple(finding for finding in findings if finding.severity is E)


def operations_in(connector: Any) -> Mapping[str, OperationFacts] | None:
    """The operations that a connector's raw YAML document declares, or None where it declares none in YAML."""
    operations = connector.get("operations") if isinstance(connector, dict) else None
    if not isinstance(operations, dict):
        return None
    return {
        str(name): OperationFacts(sensitive=isinstance(body, dict) and body.get("sensitive") is True)
        for name, body in operations.items()
    }


__all__ = [
    "RULES",
    "Finding",
    "OperationFacts",
    "Rule",
    "Severity",
    "Surroundings",
    "errors_of",
    "keeps_whole_payload",
    "lint",
    "lint_document",
    "operations_in",
]
