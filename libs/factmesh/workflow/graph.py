"""The graph of a workflow: its edges, what is reachable, what has run on every path, and its drawing.
Drawings are text (Mermaid, Graphviz dot); nothing here evaluates a condition or knows a running instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from factmesh.workflow.model import CallStep, NotifyStep, Step, SwitchStep, Workflow
from factmesh.workflow.steps import CONTINUE, FLOW_WORDS, Target


@dataclass(frozen=True, slots=True)
class Edge:
    """One way from a step: to another step, or to an end (`to` is None) with its outcome."""

    source: str
    to: str | None
    target: Target

    @property
    def status(self) -> str:
        """The instance's status where this edge ends it."""
        return self.target.outcome or "completed"


def edges(workflow: Workflow) -> tuple[Edge, ...]:
    """Every way in the order of the file. Ways to steps that do not exist are left out; the linter names them."""
    found = []
    for step in workflow.steps:
        for target in step.targets():
            if target.then in FLOW_WORDS or workflow.has(target.then):
                found.append(Edge(step.name, workflow.next_of(step.name, target.then), target))
    return tuple(found)


def reachable(workflow: Workflow) -> frozenset[str]:
    """The steps that some path from the start visits."""
    ways: dict[str, list[str]] = {}
    for edge in edges(workflow):
        if edge.to is not None:
            ways.setdefault(edge.source, []).append(edge.to)
    seen, rest = {workflow.start}, [workflow.start]
    while rest:
        for name in ways.get(rest.pop(), ()):
            if name not in seen:
                seen.add(name)
                rest.append(name)
    return frozenset(seen)


def ran_before(workflow: Workflow) -> Mapping[str, frozenset[str]]:
    """For every reachable step, the steps that have run on every path to it (its strict dominators)."""
    inside = reachable(workflow)
    before: dict[str, set[str]] = {name: set() for name in inside}
    for edge in edges(workflow):
        if edge.to is not None and edge.source in inside:
            before[edge.to].add(edge.source)
    # In the order of the file: what is built from this (problems, compiled steps) must not depend on hashing.
    ran = {step.name: inside for step in workflow.steps if step.name in inside}
    ran[workflow.start] = frozenset()
    changed = True
    while changed:
        changed = False
        for step in workflow.steps:
            if step.name not in inside or step.name == workflow.start:
                continue
            common = frozenset.intersection(*(ran[p] | {p} for p in before[step.name])) - {step.name}
            if common != ran[step.name]:
                ran[step.name] = common
                changed = True
    return ran


def _label(step: Step) -> str:
    if isinstance(step, CallStep):
        return f"{step.name}<br/>{step.call}"
    if isinstance(step, NotifyStep):
        return f"{step.name}<br/>notify {step.notify.template}"
    return step.name if isinstance(step, SwitchStep) else f"{step.name}<br/>{step.kind}"


def _ends(workflow: Workflow) -> dict[str, str]:
    """Status of an end to its node: one node a status, however many edges lead there."""
    statuses = {edge.status: f"end_{edge.status}" for edge in edges(workflow) if edge.to is None}
    if any(not step.goes_on for step in workflow.steps):
        statuses["failed"] = "end_failed"
    return dict(sorted(statuses.items()))


def mermaid(workflow: Workflow, classes: Mapping[str, str] | None = None) -> str:
    """A Mermaid flowchart. `classes` gives steps a CSS class by name, for live states: `{"verify": "done"}`."""
    # Node ids carry a prefix: a step may be called `end` or `graph` in Mermaid's own language.
    lines = [f"%% {workflow.name} {workflow.version}", "flowchart TD", f'  start(["{workflow.fact_type}"])']
    for step in workflow.steps:
        opening, closing = ('{"', '"}') if isinstance(step, SwitchStep) else ('["', '"]')
        lines.append(f"  s_{step.name}{opening}{_label(step)}{closing}")
    ends = _ends(workflow)
    lines += [f'  {node}(["{status}"])' for status, node in ends.items()]
    lines.append(f"  start --> s_{workflow.start}")
    for edge in edges(workflow):
        to = ends[edge.status] if edge.to is None else f"s_{edge.to}"
        arrow = f"-->|{_way(workflow, edge)}|" if _way(workflow, edge) else "-->"
        lines.append(f"  s_{edge.source} {arrow} {to}")
    lines += [f"  s_{step.name} --> end_failed" for step in workflow.steps if not step.goes_on]
    for name, css in sorted((classes or {}).items()):
        if workflow.has(name):
            lines.append(f"  class s_{name} {css}")
    return "\n".join(lines) + "\n"


def dot(workflow: Workflow, classes: Mapping[str, str] | None = None) -> str:
    """The same for Graphviz; `classes` becomes each node's `class` attribute, which its SVG keeps."""
    lines = [f'digraph "{workflow.name}" {{', "  rankdir=TB;", "  node [shape=box, style=rounded];"]
    lines.append(f'  start [label="{workflow.fact_type}", shape=oval];')
    for step in workflow.steps:
        label = _label(step).replace("<br/>", "\\n")
        extra = ", shape=diamond, style=solid" if isinstance(step, SwitchStep) else ""
        css = (classes or {}).get(step.name)
        lines.append(f'  s_{step.name} [label="{label}"{extra}{f", class={css}" if css else ""}];')
    ends = _ends(workflow)
    lines += [f'  {node} [label="{status}", shape=oval];' for status, node in ends.items()]
    lines.append(f"  start -> s_{workflow.start};")
    for edge in edges(workflow):
        to = ends[edge.status] if edge.to is None else f"s_{edge.to}"
        label = f' [label="{_way(workflow, edge)}"]' if _way(workflow, edge) else ""
        lines.append(f"  s_{edge.source} -> {to}{label};")
    lines += [f"  s_{step.name} -> end_failed;" for step in workflow.steps if not step.goes_on]
    return "\n".join([*lines, "}"]) + "\n"


def _way(workflow: Workflow, edge: Edge) -> str:
    """What an edge is called: the case's name, and `else` for the way of a switch where no case holds."""
    if edge.target.label:
        return edge.target.label
    return "else" if isinstance(workflow.step(edge.source), SwitchStep) else ""


def is_backward(workflow: Workflow, step: Step, target: Target) -> bool:
    """Whether a way leads to the step itself or to one before it in the file."""
    if target.then == CONTINUE or target.then in FLOW_WORDS or not workflow.has(target.then):
        return False
    return workflow.index(target.then) <= workflow.index(step.name)
