"""Deployed workflows as decisions use them: the compiled definition, its policies, and which one a fact starts.
Nothing here reads a file or a table; `store` makes these values once a version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from factmesh.errors import DefinitionError
from factmesh.evaluation import expressions_of
from factmesh.ids import canonical_json
from factmesh.retry import RetryPolicy
from factmesh.workflow import CallStep, CompiledWorkflow, SwitchStep

INSTANTS = ("due_by", "occurred_at", "received_at")
"""What an expression reads of a fact as RFC 3339 text."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """One version of a workflow, ready to decide with. Durations in milliseconds, as the records' instants.

    `reads_instance`: whether any step's expression names `instance`; where none does, its values are not made.
    `reads_instants`: which of the fact's instants its input names; the others are not written as text.
    """

    compiled: CompiledWorkflow
    commit: str
    name: str
    version: str
    content_hash: str
    fact_type: str
    owner: str | None
    sla_ms: int | None
    max_age_ms: int
    next_steps: Mapping[str, str | None]
    retries: Mapping[str, bytes]
    reads_instance: bool
    reads_instants: frozenset[str]

    @property
    def on_repeat(self) -> str:
        return self.compiled.workflow.on_repeat


def deployed(compiled: CompiledWorkflow, policies: Mapping[str, RetryPolicy], commit: str) -> Deployed:
    """A compiled workflow with its retry policies as commands carry them. Raises DefinitionError for a missing one."""
    workflow = compiled.workflow
    retries: dict[str, bytes] = {}
    for step in workflow.steps:
        if isinstance(step, CallStep) and step.retry is not None:
            if step.retry not in policies:
                raise DefinitionError(
                    f"step {step.name!r} names the retry policy {step.retry!r}, which is not deployed with it",
                    where=f"workflow {workflow.name} {workflow.version}",
                    hint=f"known: {', '.join(sorted(policies)) or 'none'}",
                )
            retries[step.name] = canonical_json(policies[step.retry].model_dump(mode="json"))
    owner = workflow.definition.owner
    return Deployed(
        compiled=compiled,
        commit=commit,
        name=workflow.name,
        version=workflow.version,
        content_hash=workflow.content_hash,
        fact_type=workflow.fact_type,
        owner=owner.team if owner else None,
        sla_ms=int(workflow.sla_s * 1000) if workflow.sla_s is not None else None,
        max_age_ms=int(workflow.max_age_s * 1000),
        # Which way a switch goes is not known before.
        next_steps={
            s.name: None if isinstance(s, SwitchStep) or not s.goes_on else workflow.next_of(s.name, s.then)
            for s in workflow.steps
        },
        retries=retries,
        reads_instance=any(
            "instance" in text
            for s in workflow.steps
            for _, node in s.templates().values()
            for _, text in expressions_of(node)
        ),
        reads_instants=frozenset(
            name for name in INSTANTS for _, text in expressions_of(workflow.input_from) if name in text
        ),
    )


@dataclass(frozen=True, slots=True)
class Definitions:
    """What is deployed: the current version by the fact that starts it, and every version that an instance needs."""

    by_fact: Mapping[str, tuple[Deployed, ...]] = field(default_factory=dict)
    by_version: Mapping[tuple[str, str], Deployed] = field(default_factory=dict)

    def of(self, workflow: str, version: str) -> Deployed:
        """The version that an instance is pinned to. Raises DefinitionError where it was never deployed here."""
        found = self.by_version.get((workflow, version))
        if found is None:
            raise DefinitionError(
                f"workflow {workflow} {version} is not deployed",
                hint="an instance runs on it: deploy that version again with `factmesh workflow deploy`",
            )
        return found

    def current(self, workflow: str) -> Deployed | None:
        """The version on which new instances of a workflow start."""
        return next((d for ds in self.by_fact.values() for d in ds if d.name == workflow), None)


def definitions(current: Iterable[Deployed], others: Iterable[Deployed] = ()) -> Definitions:
    """The index over deployed versions; workflows that one fact starts, start in the order of their names."""
    by_fact: dict[str, tuple[Deployed, ...]] = {}
    by_version = {(d.name, d.version): d for d in others}
    for d in sorted(current, key=lambda d: d.name):
        by_fact[d.fact_type] = (*by_fact.get(d.fact_type, ()), d)
        by_version[(d.name, d.version)] = d
    return Definitions(by_fact, by_version)
