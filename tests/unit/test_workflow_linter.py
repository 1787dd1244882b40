"""Promises of the linter: each rule of the table refuses what it says, lets the rest pass, and says how to fix it."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh import yaml
from factmesh.document import Document
from factmesh.expressions import default_expressions
from factmesh.workflow import WorkflowError, compile_workflow, graph
from factmesh.workflow.linter import (
    RULES,
    Finding,
    OperationFacts,
    Severity,
    Surroundings,
    errors_of,
    keeps_whole_payload,
    lint_document,
    operations_in,
)

HEAD = """
document: {dsl: '1.0.3', namespace: ops, name: widget_repair, version: 1.0.0}
schedule: {on: {one: {with: {type: widget.broken}}}}
"""
INPUT = "input: {from: {id: '${ fact.business_object_id }'}}\n"
PEOPLE = """\
sla: {target: PT24H}
owner: {team: repairs, contact: a@example.com, runbook: docs/repair.md}
"""
STEPS = """\
do:
  - look: {call: shop.look, with: {id: '${ input.id }'}, retry: patient}
  - choose:
      switch:
        - cheap: {when: '${ steps.look.price < 10 }', then: order}
        - dear: {then: refuse}
  - order: {call: shop.order, with: {price: '${ steps.look.price }'}, then: tell}
  - refuse: {raise: {error: {type: /dear, status: 422, title: Too dear}}}
  - tell: {notify: {template: ordered, to: '${ input.id }', with: {n: '${ steps.order.number }'}}}
"""
GOOD = HEAD + INPUT + PEOPLE + STEPS
AROUND = Surroundings(
    expressions=default_expressions(),
    connectors={"shop": {"look": OperationFacts(), "order": OperationFacts(), "scrap": OperationFacts(sensitive=True)}},
    templates=frozenset({"ordered"}),
    channels=frozenset({"log", "email"}),
    policies=frozenset({"patient"}),
)


def findings(text: str, around: Surroundings = AROUND) -> tuple[Finding, ...]:
    return lint_document(yaml.parse(text, file="w.yaml"), around)[1]


def test_a_good_workflow_has_no_findings() -> None:
    """B1: the passing example of every rule."""
    assert findings(GOOD) == ()


#: rule, what stands in the good workflow, what is written instead, where it is found, what is said of it.
BAD = [
    ("unknown-operation", "call: shop.look", "call: store.look", "w.yaml:8:12 at do[0].look.call",
     "there is no connector 'store'"),
    ("unknown-operation", "call: shop.look", "call: shop.peek", "do[0].look.call", "'shop' has no operation 'peek'"),
    ("sensitive", "call: shop.order", "call: shop.scrap", "do[2].order.call", "shop.scrap is sensitive"),
    ("unknown-target", "then: refuse", "then: gone", "do[1].choose.switch[1].dear.then", "then: gone names no step"),
    ("unknown-target", "then: tell}", "then: gone}", "do[2].order.then", "then: gone names no step"),
    ("unreachable", "then: refuse", "then: end", "do[3].refuse", "no path from the start reaches step 'refuse'"),
    ("loop", "then: tell}", "then: look}", "w.yaml:13:71 at do[2].order.then", "then: look leads back"),
    ("loop", "then: tell}", "then: order}", "do[2].order.then", "then: order leads back"),
    ("loop", "then: refuse", "then: choose", "do[1].choose.switch[1].dear.then", "then: choose leads back"),
    ("expression", "${ input.id }'}, retry", "${ input. }'}, retry", "do[0].look.with.id", "does not compile"),
    ("expression", "${ input.id }'}, retry", "${ inptu.id }'}, retry", "do[0].look.with.id", "knows no inptu.id"),
    ("expression", "${ input.id }'}, retry", "${ steps.look.x }'}, retry", "do[0].look.with.id",
     "step 'look' has not run on every path to it"),
    ("expression", "then: order}", "then: tell}", "do[4].tell.notify.with.n",
     "reads steps.order, but step 'order' has not run on every path to it"),
    ("expression", "steps.order.number", "steps.choose.number", "do[4].tell.notify.with.n", "knows no steps.choose"),
    ("expression", "fact.business_object_id", "fact.object_id", "input.from.id", "knows no fact.object_id"),
    ("expression", "fact.business_object_id", "input.id", "input.from.id", "knows no input.id"),
    ("expression", "${ steps.look.price < 10 }", "${ fact.data.price < 10 }", "do[1].choose.switch[0].cheap.when",
     "knows no fact.data.price"),
    ("whole-payload", "{id: '${ fact.business_object_id }'}", "'${ fact.data }'", "w.yaml:4:9 at input.from",
     "keeps a whole payload: ${ fact.data }"),
    ("whole-payload", "{id: '${ fact.business_object_id }'}", "'${ fact }'", "input.from", "whole payload"),
    ("whole-payload", "${ fact.business_object_id }", "${ fact.data }", "input.from.id", "whole payload"),
    ("input-map", "{id: '${ fact.business_object_id }'}", "hello", "input.from", "is text without an expression"),
    ("template", "template: ordered", "template: orderd", "do[4].tell.notify.template", "no template 'orderd'"),
    ("channel", "template: ordered", "channel: fax, template: ordered", "do[4].tell.notify.channel",
     "no channel 'fax'"),
    ("retry-policy", "retry: patient", "retry: patent", "do[0].look.retry", "no retry policy 'patent'"),
    ("max-age", "sla:", "maxAge: P400D\nsla:", "w.yaml:5:1 at maxAge", "400 days, and ledger rows live 400"),
    ("sla-fits", "target: PT24H", "target: P91D", "w.yaml:5:7 at sla.target", "longer than maxAge"),
    ("owner", "owner: {team: repairs, contact: a@example.com, runbook: docs/repair.md}\n", "", "at owner", "no owner"),
    ("contact", ", contact: a@example.com", "", "w.yaml:6:1 at owner", "no contact"),
    ("runbook", ", runbook: docs/repair.md", "", "w.yaml:6:1 at owner", "no runbook"),
    ("sla", "sla: {target: PT24H}\n", "", "at sla", "no SLA"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "old", "new", "where", "what"), BAD)
def test_each_rule_refuses_what_it_says(rule: str, old: str, new: str, where: str, what: str) -> None:
    """B1: one change to the good workflow breaks the rule; the finding has its place, its text and its fix."""
    assert old in GOOD
    found = [finding for finding in findings(GOOD.replace(old, new, 1)) if finding.rule == rule]
    assert found, findings(GOOD.replace(old, new, 1))
    assert where in found[0].where
    assert found[0].where.startswith("w.yaml:")
    assert what in found[0].message
    assert found[0].hint
    assert f"[{rule}]\n    fix: " in str(found[0])


def test_every_rule_has_an_example_that_it_refuses() -> None:
    """B1: a rule without a failing example is not known to work; the ids are unique and the texts are there."""
    ids = [rule.id for rule in RULES]
    assert set(ids) == {row[0] for row in BAD}
    assert len(set(ids)) == len(ids)
    assert all(rule.text.endswith(".") for rule in RULES)


def test_warnings_do_not_forbid() -> None:
    """B1: a missing owner, contact, runbook or SLA is told after the errors, and does not forbid a deployment."""
    found = findings(HEAD + INPUT + STEPS)
    assert [finding.rule for finding in found] == ["owner", "sla"]
    assert errors_of(found) == ()
    found = findings(HEAD + INPUT + STEPS.replace("patient", "patent"))
    assert [finding.severity for finding in found] == [Severity.ERROR, Severity.WARNING, Severity.WARNING]
    assert [finding.rule for finding in errors_of(found)] == ["retry-policy"]


def test_what_is_not_known_is_not_judged() -> None:
    """B1: without a project, the rules about its connectors, templates and policies say nothing."""
    text = GOOD.replace("shop.", "any.").replace("ordered", "any").replace("patient", "any")
    assert findings(text, Surroundings()) == ()
    assert {finding.rule for finding in findings(text)} == {"unknown-operation", "template", "retry-policy"}
    plugin = Surroundings(connectors={"shop": None})
    assert findings(GOOD.replace("shop.look", "shop.anything"), plugin) == ()


def test_several_steps_that_have_not_run_are_each_named() -> None:
    """B1: an expression over two steps of another branch names both, and not those that did run."""
    text = GOOD.replace(
        "- refuse: {raise: {error: {type: /dear, status: 422, title: Too dear}}}", "- more: {call: shop.order}"
    )
    text = text.replace("then: refuse", "then: more")
    text = text.replace("steps.order.number", "steps.order.n + steps.more.n + steps.look.n")
    messages = [finding.message for finding in findings(text) if finding.rule == "expression"]
    assert [message.split(",")[0] for message in messages] == ["reads steps.more", "reads steps.order"]


def test_a_shape_that_does_not_parse_is_a_finding() -> None:
    """B1: a file that is no workflow is reported like any broken rule, everything at once."""
    workflow, found = lint_document(yaml.parse("do: [{x: {wait: 1}}]\nfoo: 1\n", file="w.yaml"), AROUND)
    assert workflow is None
    assert {finding.rule for finding in found} == {"shape"}
    assert len(found) == 5
    assert errors_of(found) == found


@pytest.mark.parametrize(
    "expression",
    ["fact", " fact ", "fact.data", "fact . data", '{"x": fact.data}', '{"x": fact}', "[fact.data, 1]",
     "fact.data.map(k, k)", "has(fact.data.x) ? fact.data : null", "dyn(fact.data)", 'fact["data"]'],
)  # fmt: skip
def test_whole_payloads(expression: str) -> None:
    """B10: whichever way an expression takes the whole fact or all of its data, it is seen."""
    assert keeps_whole_payload(expression)


@pytest.mark.parametrize(
    "expression",
    ["fact.data.email", 'fact.data["email"]', "fact.business_object_id", '{"a": fact.data.a, "b": fact.data.b}',
     "has(fact.data.x)", '"fact"', "'all of fact.data'", "fact.data.map", "input.fact", "fact.data.items.map(i, i.id)",
     "artifact", "fact.database"],
)  # fmt: skip
def test_named_fields_are_no_whole_payload(expression: str) -> None:
    """B10: taking named fields, and text that merely speaks of facts, is let pass."""
    assert not keeps_whole_payload(expression)


def test_operations_of_a_raw_connector() -> None:
    """B8: what the linter needs of a connector's YAML, whatever else is in it, and nothing of one that is no map."""
    raw = {"operations": {"look": {"path": "/"}, "scrap": {"sensitive": True}, "odd": None}}
    assert operations_in(raw) == {
        "look": OperationFacts(),
        "scrap": OperationFacts(sensitive=True),
        "odd": OperationFacts(),
    }
    assert operations_in({"plugin": "x"}) is None
    assert operations_in(None) is None


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


_DATA = yaml.parse(GOOD, file="w.yaml").data
_WORDS = st.sampled_from(
    [
        "",
        "end",
        "look",
        "tell",
        "choose",
        "shop.look",
        "${ input.id }",
        "${ steps.order.x }",
        "${ 1 + }",
        "${",
        "PT1H",
        "x y",
    ]
)
_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_places(_DATA)[1:]), _JUNK), min_size=1, max_size=3))
def test_whatever_is_written_is_answered(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Bad input: junk anywhere in a definition ends in findings; what has no error compiles, draws and has a hash."""
    data = copy.deepcopy(_DATA)
    for path, junk in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            node = data
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = junk
    workflow, found = lint_document(Document("w.yaml", data), AROUND)
    assert all(finding.where.startswith("w.yaml") and finding.message for finding in found)
    if workflow is None:
        assert errors_of(found)
        return
    if not errors_of(found):
        compiled = compile_workflow(workflow, default_expressions())
        assert set(compiled.steps) == {step.name for step in workflow.steps}
        assert len(compiled.content_hash) == 64
        assert "start --> s_" in graph.mermaid(workflow)
    else:
        with contextlib.suppress(WorkflowError):
            compile_workflow(workflow, default_expressions())
