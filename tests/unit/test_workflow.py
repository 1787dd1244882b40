"""Promises of the workflow model: what is written is typed, what cannot run yet is refused, every error has a line."""

from __future__ import annotations

import copy
import json
import textwrap
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from factmesh import yaml
from factmesh.document import Document
from factmesh.errors import DefinitionError, ExpressionError
from factmesh.expressions import default_expressions
from factmesh.workflow import (
    STEP_MODELS,
    CallStep,
    NotifyStep,
    RaiseStep,
    Step,
    SwitchStep,
    WorkflowError,
    compile_workflow,
    graph,
    parse_workflow,
    register_step,
)
from factmesh.workflow.duration import PATTERN, duration_s

GOOD = """
document: {dsl: '1.0.3', namespace: ops, name: widget_repair, version: 1.2.0}
evaluate: {language: cel, mode: strict}
schedule: {on: {one: {with: {type: widget.broken}}}}
input: {from: {id: '${ fact.business_object_id }', part: '${ fact.data.part }'}}
sla: {target: PT24H, warnAt: 0.5}
owner: {team: repairs, contact: a@example.com, runbook: docs/repair.md}
maxAge: P30D
onRepeat: queue
do:
  - look:
      call: shop.look
      with: {id: '${ input.id }', fixed: 7}
      retry: patient
      timeout: {after: PT30S}
  - choose:
      switch:
        - cheap: {when: '${ steps.look.price < 10.0 }', then: order}
        - gone: {when: '${ steps.look.price == null }', then: give_up}
        - other: {then: end, outcome: rejected}
  - give_up:
      raise: {error: {type: 'https://example.com/gone', status: 410, title: Gone, detail: '${ "no " + input.part }'}}
  - order: {call: shop.order}
  - tell:
      notify: {template: ordered, to: '${ input.id }', channel: log, with: {n: '${ steps.order.number }'}}
"""


def parsed(text: str = GOOD) -> Any:
    return parse_workflow(yaml.parse(text, file="w.yaml"))


def changed(change: Any) -> Any:
    """The good definition's data with something else in it, parsed."""
    data = copy.deepcopy(yaml.parse(GOOD, file="w.yaml").data)
    change(data)
    return parse_workflow(Document("w.yaml", data))


def with_step(body: Any, name: str = "extra") -> Any:
    return changed(lambda data: data["do"].append({name: body}))


def test_everything_written_is_typed() -> None:
    """B1: the file becomes frozen models with the vocabulary of the DSL, durations in seconds."""
    workflow = parsed()
    assert (workflow.namespace, workflow.name, workflow.version) == ("ops", "widget_repair", "1.2.0")
    assert workflow.fact_type == "widget.broken"
    assert (workflow.sla_s, workflow.definition.sla.warn_at) == (86400, 0.5)
    assert (workflow.max_age_s, workflow.on_repeat, workflow.start) == (30 * 86400, "queue", "look")
    assert [type(step) for step in workflow.steps] == [CallStep, SwitchStep, RaiseStep, CallStep, NotifyStep]
    look, choose, give_up, order, tell = workflow.steps
    assert (look.connector, look.operation, look.retry, look.timeout_s) == ("shop", "look", "patient", 30)
    assert look.with_ == {"id": "${ input.id }", "fixed": 7}
    assert (order.retry, order.timeout_s, order.with_) == (None, None, {})
    assert [(c.name, c.then, c.outcome) for c in choose.cases] == [
        ("cheap", "order", None),
        ("gone", "give_up", None),
        ("other", "end", "rejected"),
    ]
    assert choose.has_default
    assert (give_up.error.status, give_up.error.title) == (410, "Gone")
    assert (tell.notify.template, tell.notify.channel) == ("ordered", "log")
    with pytest.raises(ValueError, match="frozen"):
        look.retry = "other"


def test_what_is_not_written_has_a_default() -> None:
    """B1: the defaults are the documented ones."""

    def change(data: Any) -> None:
        for name in ("evaluate", "sla", "owner", "maxAge", "onRepeat"):
            del data[name]

    workflow = changed(change)
    assert (workflow.sla_s, workflow.definition.owner) == (None, None)
    assert (workflow.max_age_s, workflow.on_repeat) == (90 * 86400, "ignore")


def test_flow_words() -> None:
    """B1: `continue` is the following step, `end` and `exit` end, a name is that step; behind the last is the end."""
    workflow = parsed()
    assert workflow.next_of("look") == "choose"
    assert workflow.next_of("look", "continue") == "choose"
    assert workflow.next_of("look", "end") is None
    assert workflow.next_of("look", "exit") is None
    assert workflow.next_of("look", "tell") == "tell"
    assert workflow.next_of("tell") is None
    with pytest.raises(DefinitionError, match=r"workflow widget_repair 1\.2\.0: has no step 'nope'"):
        workflow.next_of("look", "nope")
    with pytest.raises(DefinitionError, match="has no step 'nope'"):
        workflow.step("nope")


def test_content_hash_is_of_the_values() -> None:
    """B2: comments, order of keys and layout do not change the hash; every value does."""
    workflow = parsed()
    assert parsed("# a comment\n" + GOOD).content_hash == workflow.content_hash
    turned = dict(reversed(list(workflow.source.data.items())))
    assert parse_workflow(Document("other", turned)).content_hash == workflow.content_hash
    assert parsed(GOOD.replace("fixed: 7", "fixed: 8")).content_hash != workflow.content_hash
    assert parsed(GOOD.replace("fixed: 7", "fixed: 7.0")).content_hash != workflow.content_hash
    assert len(workflow.content_hash) == 64


def test_a_stored_definition_parses_to_the_same() -> None:
    """B2: what a database gives back as JSON is the workflow that was deployed."""
    workflow = parsed()
    again = parse_workflow(Document("deployed", json.loads(workflow.source.canonical())))
    assert again == workflow
    assert again.content_hash == workflow.content_hash


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("schedule:", "shedule:", "w.yaml:4:1 at shedule", "'shedule' is not a field here"),
        ("schedule:", "shedule:", "at schedule", "'schedule' is missing (add it)"),
        ("dsl: '1.0.3'", "dsl: '2.0.0'", "at document.dsl", "pattern"),
        ("version: 1.2.0", "version: 1.2", "at document.version", "valid string"),
        ("name: widget_repair", "name: Widget-Repair", "at document.name", "pattern"),
        ("language: cel", "language: jq", "at evaluate.language", "'cel'"),
        ("mode: strict", "mode: loose", "at evaluate.mode", "'strict'"),
        ("type: widget.broken", "type: WidgetBroken", "w.yaml:4:30 at schedule.on.one.with.type", "pattern"),
        ("maxAge: P30D", "maxAge: P1M", "w.yaml:8:1 at maxAge", "years or months, which have no fixed length"),
        ("target: PT24H", "target: 24", "at sla.target", "not an ISO 8601 duration"),
        ("warnAt: 0.5", "warnAt: 1.5", "at sla.warnAt", "less than 1"),
        ("onRepeat: queue", "onRepeat: maybe", "at onRepeat", "'ignore', 'reject', 'queue' or 'start'"),
        ("call: shop.look", "call: look", "w.yaml:12:7 at do[0].look.call", "pattern"),
        ("call: shop.look", "call: shop.look\n      compensate: {call: shop.undo}",
         "w.yaml:13:7 at do[0].look.compensate",
         "'compensate' is not supported yet by this version (remove it)"),
        ("call: shop.look", "call: shop.look\n      if: '${ true }'", "at do[0].look.if", "not supported yet"),
        ("call: shop.look", "call: shop.look\n      wiht: {}", "at do[0].look.wiht", "'wiht' is not a field here"),
        ("call: shop.look", "call: shop.look\n      name: x", "at do[0].look.name", "'name' is not a field here"),
        ("call: shop.look", "call: shop.look\n      switch: []", "at do[0].look", "is of several kinds: call, switch"),
        ("- order: {call: shop.order}", "- order: {wait: PT1H}", "at do[3].order",
         "a 'wait' step is not supported yet by this version (use exactly one of call, notify, raise, switch)"),
        ("- order: {call: shop.order}", "- order: {approve: {}}", "at do[3].order", "'approve' step is not"),
        ("- order: {call: shop.order}", "- order: {jump: x}", "at do[3].order", "is of no known kind"),
        ("- order: {call: shop.order}", "- order:", "at do[3].order", "has no body"),
        ("- order: {call: shop.order}", "- order", "w.yaml:23:5 at do[3]", "is not one step with one name"),
        ("- order: {call: shop.order}", "- {a: {call: s.o}, b: {call: s.o}}", "at do[3]", "is not one step"),
        ("- order: {call: shop.order}", "- Order: {call: s.o}", "at do[3].Order", "cannot name a step"),
        ("- order: {call: shop.order}", "- end: {call: s.o}", "at do[3].end", "cannot name a step"),
        ("- order: {call: shop.order}", "- look: {call: s.o}", "w.yaml:23:5 at do[3].look",
         "a second step 'look'; the first is w.yaml:11:5 at do[0].look (rename one)"),
        ("fixed: 7", "fixed: 'a ${ b }'", "at do[0].look.with", "${ } stands inside other text"),
        ("'${ fact.data.part }'", "'a ${ b }'", "at input.from", "${ } stands inside other text"),
        ("after: PT30S", "after: PT0S", "at do[0].look.timeout.after", "between a millisecond"),
        ("timeout: {after: PT30S}", "outcome: rejected", "at do[0].look.outcome", "where the instance does not end"),
        ("then: order}", "then: order, outcome: completed}", "at do[1].choose.switch[0].cheap.outcome", "does not end"),
        ("outcome: rejected}", "outcome: lost}", "at do[1].choose.switch", "'completed' or 'rejected'"),
        ("when: '${ steps.look.price < 10.0 }'", "when: steps.look", "at do[1].choose.switch", "is not an expression"),
        ("when: '${ steps.look.price < 10.0 }', ", "", "at do[1].choose.switch", "default case 'cheap' before others"),
        ("- gone:", "- cheap:", "at do[1].choose.switch", "holds the case 'cheap' twice"),
        ("status: 410", "status: 200", "at do[2].give_up.raise.error.status", "400"),
        ("- give_up:\n", "- give_up:\n      then: end\n", "at do[2].give_up", "always ends the instance as failed"),
        ("- choose:\n", "- choose:\n      then: end\n", "at do[1].choose", "would never count"),
        ("template: ordered, ", "", "at do[4].tell.notify.template", "'template' is missing"),
        ("do:\n", "do: []\nx:\n", "at do", "at least 1 item"),
        ("input: {from: {id: '${ fact.business_object_id }', part: '${ fact.data.part }'}}", "input: {from: 3}",
         "at input.from", "neither a map nor an expression"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(old: str, new: str, where: str, what: str) -> None:
    """Bad input: each mistake is refused with its place in the file and what to do, and nothing is ignored."""
    assert old in GOOD
    with pytest.raises(WorkflowError) as caught:
        parsed(GOOD.replace(old, new, 1))
    assert any(where in problem.where and what in str(problem) for problem in caught.value.problems), str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    """B1: the author sees everything that is wrong in one run."""
    text = GOOD.replace("dsl: '1.0.3'", "dsl: x").replace("call: shop.look", "call: look").replace("shop.order}", "x}")
    with pytest.raises(WorkflowError) as caught:
        parsed(text)
    assert len(caught.value.problems) == 3
    assert all(str(problem.where) in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize("data", [None, 3, "text", [], {}, {"do": 5}, {"do": [None]}, {"document": []}])
def test_what_is_no_workflow_at_all_is_refused(data: Any) -> None:
    """Bad input: any YAML that is not a workflow is an error about the file."""
    with pytest.raises(WorkflowError, match=r"w\.yaml"):
        parse_workflow(Document("w.yaml", data))


class WaitStep(Step):
    kind: ClassVar[str] = "wait"
    wait: str = Field(pattern="^PT")


def test_a_step_kind_is_added_by_a_local_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """B3: registering a model is all that parser, graph, compiler and schema need for a new kind of step."""
    from factmesh.workflow.schema import workflow_schema

    monkeypatch.setattr("factmesh.workflow.steps.STEP_MODELS", STEP_MODELS)
    monkeypatch.setitem(STEP_MODELS, "wait", WaitStep)
    workflow = with_step({"wait": "PT5M"}, "pause")
    assert workflow.step("pause") == WaitStep(name="pause", wait="PT5M")
    assert compile_workflow(workflow, default_expressions()).step("pause").step.kind == "wait"
    assert "pause<br/>wait" in graph.mermaid(workflow)
    assert "WaitStep" in workflow_schema()["$defs"]
    with pytest.raises(WorkflowError, match="pattern"):
        with_step({"wait": "soon"}, "pause")


def test_a_kind_is_registered_once() -> None:
    """B3: two models for one kind are a mistake that shows at import."""
    with pytest.raises(ValueError, match="'call' is registered already, by CallStep"):
        register_step("call", CallStep)
    assert STEP_MODELS["call"] is CallStep


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT1S", 1), ("PT0.5S", 0.5), ("PT30M", 1800), ("PT24H", 86400), ("P1D", 86400), ("P2W", 1209600),
     ("P1DT2H3M4.005S", 93784.005), ("PT90M", 5400)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    """B1: ISO 8601 durations of fixed length."""
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "P", "PT", "P1DT", "1H", "PT1", "P1M", "P1Y", "P1Y2D", "-PT1S", "PT-1S", "PT1.2345S", "PT1H ", "pt1h", "PT0S",
     "P99999W", "PT1S1M", "P٣D", "PT١S", 5, None, True],
)  # fmt: skip
def test_what_is_no_fixed_duration_is_refused(text: Any) -> None:
    """B1: months and years have no fixed length; anything else that is not a duration is an error too."""
    with pytest.raises(ValueError, match=r"PT30S|P30D|between"):
        duration_s(text)


@given(st.integers(0, 9), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_durations_add_up(weeks: int, days: int, hours: int, minutes: int, seconds: int) -> None:
    """B1: every written duration is the sum of its parts, and matches the pattern that editors are given."""
    import re

    text = f"P{weeks}W{days}DT{hours}H{minutes}M{seconds}S"
    assert duration_s(text) == weeks * 604800 + days * 86400 + hours * 3600 + minutes * 60 + seconds
    assert re.match(PATTERN, text)


def test_compiled_once_and_evaluated() -> None:
    """B3: a compiled workflow gives an instance its input, a call its data, a switch its case, a raise its detail."""
    compiled = compile_workflow(parsed(), default_expressions())
    input = compiled.input_of({"business_object_id": "w1", "data": {"part": "axle"}})
    assert input == {"id": "w1", "part": "axle"}
    scope = compiled.scope(input=input, steps={}, instance={"id": "i"})
    assert compiled.step("look").evaluate("with", scope) == {"id": "w1", "fixed": 7}
    choose = compiled.workflow.step("choose")
    for price, case in ((5.0, "cheap"), (None, None), (50, "other")):
        scope = compiled.scope(input=input, steps={"look": {"price": price}}, instance={})
        if price is None:
            with pytest.raises(
                ExpressionError, match=r"step choose, when\.cheap, `.*`: < does not take \(null, double\)"
            ):
                compiled.chosen(choose, scope)
        else:
            assert compiled.chosen(choose, scope) == case
    assert compiled.step("give_up").evaluate("detail", scope) == "no axle"
    assert compiled.step("order").evaluate("with", scope) == {}
    assert compiled.content_hash == compiled.workflow.content_hash


def test_a_switch_without_a_holding_case_goes_on() -> None:
    """B3: without a default, no case that holds means `then`."""
    text = GOOD.replace("        - other: {then: end, outcome: rejected}\n", "")
    compiled = compile_workflow(parsed(text), default_expressions())
    scope = compiled.scope(input={}, steps={"look": {"price": 50.0}}, instance={})
    assert compiled.chosen(compiled.workflow.step("choose"), scope) is None


def test_a_condition_is_a_bool() -> None:
    """B3: a condition that gives text or a number is an error, never taken for true."""
    compiled = compile_workflow(
        parsed(GOOD.replace("steps.look.price < 10.0", "steps.look.price")), default_expressions()
    )
    scope = compiled.scope(input={}, steps={"look": {"price": 1}}, instance={})
    with pytest.raises(ExpressionError, match=r"step choose, when\.cheap: the condition is neither true nor false"):
        compiled.chosen(compiled.workflow.step("choose"), scope)


def test_an_input_is_a_map() -> None:
    """B10: `input.from` gives a map of named fields, or the fact is refused with the reason."""
    text = """
document: {dsl: '1.0.3', namespace: ops, name: widget_repair, version: 1.2.0}
schedule: {on: {one: {with: {type: widget.broken}}}}
input: {from: '${ fact.data.part }'}
do: [{look: {call: shop.look}}]
"""
    compiled = compile_workflow(parsed(text), default_expressions())
    assert compiled.input_of({"data": {"part": {"id": 1}}}) == {"id": 1}
    with pytest.raises(ExpressionError, match=r"workflow widget_repair 1\.2\.0, input\.from: the input is not a map"):
        compiled.input_of({"data": {"part": "axle"}})
    with pytest.raises(ExpressionError, match=r"input\.from, `fact\.data\.part`: field 'part' is missing"):
        compiled.input_of({"data": {}})


def test_what_does_not_compile_does_not_load() -> None:
    """B1: a definition with expressions that do not compile is refused as a whole, each with its line."""
    text = GOOD.replace("input.id }', fixed", "inptu.id }', fixed").replace("price == null", "price ==")
    with pytest.raises(WorkflowError) as caught:
        compile_workflow(parsed(text), default_expressions())
    first, second = caught.value.problems
    assert first.where == "w.yaml:13:7 at do[0].look.with"
    assert "knows no inptu.id" in first.message
    assert second.where == "w.yaml:19:18 at do[1].choose.switch[1].gone.when"


def test_the_drawing() -> None:
    """B1: the graph is drawn with cases on its edges, one node an outcome, and live states as classes."""
    text = graph.mermaid(parsed(), {"look": "done", "gone_step": "x"})
    expected = """\
        %% widget_repair 1.2.0
        flowchart TD
          start(["widget.broken"])
          s_look["look<br/>shop.look"]
          s_choose{"choose"}
          s_give_up["give_up<br/>raise"]
          s_order["order<br/>shop.order"]
          s_tell["tell<br/>notify ordered"]
          end_completed(["completed"])
          end_failed(["failed"])
          end_rejected(["rejected"])
          start --> s_look
          s_look --> s_choose
          s_choose -->|cheap| s_order
          s_choose -->|gone| s_give_up
          s_choose -->|other| end_rejected
          s_order --> s_tell
          s_tell --> end_completed
          s_give_up --> end_failed
          class s_look done
        """
    assert text == textwrap.dedent(expected)
    drawn = graph.dot(parsed(), {"look": "done"})
    assert 's_look [label="look\\nshop.look", class=done];' in drawn
    assert 's_choose -> s_order [label="cheap"];' in drawn
    assert "s_give_up -> end_failed;" in drawn


def test_what_ran_before() -> None:
    """B1: a step may read only what ran on every path to it, through branches that join again too."""
    ran = graph.ran_before(parsed())
    assert ran["look"] == frozenset()
    assert ran["order"] == {"look", "choose"}
    assert ran["tell"] == {"look", "choose", "order"}
    joined = GOOD.replace("- order: {call: shop.order}", "- order: {call: shop.order, then: end}").replace(
        "then: end, outcome: rejected", "then: tell"
    )
    assert graph.ran_before(parsed(joined))["tell"] == {"look", "choose"}
