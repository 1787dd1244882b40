"""Cases of a workflow: they hold where the decisions do as they say, and tell every difference where not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.orchestrator import FOUR_STEPS, PATIENT, deploy
from typer.testing import CliRunner

from factmesh import yaml
from factmesh.errors import DefinitionError
from factmesh_cli.workflow import app
from factmesh_orchestrator.cases import parse_cases, run_case

ROOT = Path(__file__).parents[2]
GIVEN = "given: {type: order.delayed, business_object_type: order, business_object_id: o-1, data: {note: n}}"


def run(body: str) -> tuple[str, ...]:
    """The problems of one case over FOUR_STEPS."""
    text = "cases:\n  - name: a case\n" + "".join(f"    {line}\n" for line in [GIVEN, *body.strip().splitlines()])
    (case,) = parse_cases(yaml.parse(text, file="v1.cases.yaml")).cases
    return run_case(deploy(FOUR_STEPS.replace(", outcome: null", ""), policies=PATIENT), case).problems


def test_a_case_that_holds_has_no_problems() -> None:
    """B1: unit-tested from YAML: path, commands, statuses and outcome are compared."""
    assert not run(
        """
answers: {shop.look_up: [{output: {amount: 50}}], bank.credit: [{output: {}}]}
expect:
  path: [look, choose, credit, tell]
  commands: [{shop.look_up: {id: o-1}}, {bank.credit: {amount: 50}}, {notifier.notify: }]
  statuses: [running, completed]
  outcome: completed
  step: tell
"""
    )


@pytest.mark.parametrize(
    ("expect", "problem"),
    [
        ("path: [look]", "path is [look, choose, credit], expected [look]"),
        ("status: completed", "status is running, expected completed"),
        ("statuses: [completed]", "statuses is [running], expected [completed]"),
        ("outcome: rejected", "outcome is None, expected rejected"),
        ("step: look", "step is credit, expected look"),
        ("reason: because", "reason is None, expected something with 'because'"),
        ("instances: 2", "1 instances were started, expected 2"),
        ("commands: [{shop.look_up: }]", "commands are [shop.look_up, bank.credit], expected [shop.look_up]"),
        (
            "commands: [{shop.look_up: {id: x}}, {bank.credit: }]",
            "the body of shop.look_up (step look) is {'id': 'o-1'}, expected {'id': 'x'}",
        ),
    ],
)
def test_a_case_that_does_not_hold_tells_the_difference(expect: str, problem: str) -> None:
    """B1: what is and what was expected, in one line each."""
    assert run(f"answers: {{shop.look_up: [{{output: {{amount: 50}}}}]}}\nexpect: {{{expect}}}") == (problem,)


def test_a_message_that_dies_in_a_case_is_a_problem_with_its_text() -> None:
    """B1: an expression that fails on the given answer is told, not raised."""
    (problem,) = run("answers: {shop.look_up: [{output: {wrong: 1}}]}\nexpect: {status: running}")
    assert problem.startswith("a message died: step choose, when.small")
    assert "amount" in problem


def test_time_and_people_have_their_turn_after_the_answers() -> None:
    """B1: clock advances, retries, resolutions and ends are part of a case."""
    assert not run(
        """
answers: {shop.look_up: [{failed: {error: permission}}, {unknown: true}]}
then:
  - advance: PT1H
  - retry: shop.look_up
  - resolve: {command: shop.look_up, not_happened: true}
  - end: {status: cancelled, reason: enough}
expect:
  statuses: [running, needs_resolution, parked, running, parked, needs_resolution, cancelled]
  reason: enough
"""
    )


def test_a_case_file_that_is_wrong_names_the_line() -> None:
    """B1: bad input gets a clear answer."""
    with pytest.raises(DefinitionError, match=r"v1.cases.yaml:4"):
        run("expect: {wrong: 1}")
    with pytest.raises(DefinitionError, match="is not one of output, failed"):
        run("answers: {shop.look_up: [{}]}\nexpect: {}")


def test_the_examples_cases_hold() -> None:
    """Issue 6: the example's cases run without any broker, by the public command."""
    done = CliRunner().invoke(app, ["test", str(ROOT / "examples" / "customer_onboarding")])
    assert done.exit_code == 0, done.output
    assert "0 do not" in done.output


def test_the_command_ends_with_one_where_a_case_does_not_hold(tmp_path: Path) -> None:
    """B1: a case that does not hold fails the build that runs it."""
    folder = tmp_path / "workflows" / "w"
    folder.mkdir(parents=True)
    (folder / "v1.yaml").write_text(
        "document: {dsl: '1.0.3', namespace: test, name: w, version: 1.0.0}\n"
        "schedule: {on: {one: {with: {type: order.delayed}}}}\ninput: {from: {}}\n"
        "do:\n  - a: {call: shop.get}\n"
    )
    (folder / "v1.cases.yaml").write_text(
        "cases:\n  - name: impatient\n    given: {type: order.delayed}\n    expect: {status: completed}\n"
    )
    done = CliRunner().invoke(app, ["test", str(folder / "v1.cases.yaml")])
    assert done.exit_code == 1
    assert "FAILED w v1: impatient" in done.output
    assert "status is running, expected completed" in done.output
    done = CliRunner().invoke(app, ["test", str(folder)])
    assert done.exit_code == 1


def test_the_readme_draws_the_transition_table() -> None:
    """HOUSE_STYLE 1: the diagram in the docs is generated, and drift is found."""
    readme = ROOT / "services" / "orchestrator" / "README.md"
    assert CliRunner().invoke(app, ["states", "--check", "--file", str(readme)]).exit_code == 0


def test_a_drifted_drawing_is_found(tmp_path: Path) -> None:
    """HOUSE_STYLE 10: `verify` fails when a generated thing drifts."""
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- states:begin -->\nold\n<!-- states:end -->\nafter\n")
    assert CliRunner().invoke(app, ["states", "--check", "--file", str(file)]).exit_code == 1
    assert CliRunner().invoke(app, ["states", "--file", str(file)]).exit_code == 0
    assert CliRunner().invoke(app, ["states", "--check", "--file", str(file)]).exit_code == 0
    assert file.read_text().startswith("before\n")
    assert file.read_text().endswith("\nafter\n")
