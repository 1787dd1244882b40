"""Promises of the project folder and of `factmesh workflow`: a folder anywhere is a process, a wrong file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from factmesh.errors import DefinitionError
from factmesh.expressions import (
    default_expressions,
    expression_chars_max,
    iterations_max,
    result_chars_max,
    result_nodes_max,
)
from factmesh.project import Project
from factmesh.workflow import STEP_MODELS
from factmesh.workflow.compile import FACT_FIELDS, INSTANCE_FIELDS
from factmesh.workflow.linter import RULES, errors_of
from factmesh.workflow.schema import schema_text, workflow_schema
from factmesh_cli.workflow import app

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "customer_onboarding"

WORKFLOW = """\
document: {dsl: '1.0.3', namespace: ops, name: repair, version: 1.0.0}
schedule: {on: {one: {with: {type: widget.broken}}}}
input: {from: {id: '${ fact.business_object_id }'}}
sla: {target: PT24H}
owner: {team: repairs, contact: a@example.com, runbook: docs/repair.md}
do:
  - look: {call: shop.look, with: {id: '${ input.id }'}, retry: patient}
  - tell: {notify: {template: ordered, to: '${ input.id }'}}
"""
CONNECTOR = """\
connector: shop
base_url: 'ref+env://SHOP_URL'
auth: {bearer: 'ref+env://SHOP_TOKEN'}
operations:
  look:
    request: {method: GET, path: /look}
    response: {output: {price: '${ response.body.price }'}}
    idempotency: {strategy: none}
"""
ADAPTER = """\
adapter: shop
type: widget.broken
source: //shop.example
shape: schema
accepts: [1]
canonical:
  business_object_type: widget
  business_object_id: '${ fact.id }'
  actor: '${ fact.by }'
  status: broken
  occurred_at: '${ fact.at }'
"""
FILES = {
    "workflows/repair/v1.yaml": WORKFLOW,
    "workflows/repair/v2.yaml": WORKFLOW.replace("version: 1.0.0", "version: 2.1.0"),
    "workflows/repair/v1.cases.yaml": "cases: []\n",
    "adapters/shop.yaml": ADAPTER,
    "connectors/shop.yaml": CONNECTOR,
    "policies/patient.yaml": "retry: {attempts_max: 3}\n",
    "channels.yaml": "channels: {email: {kind: smtp, host: localhost, from: a@example.com}}\n",
    "templates/ordered.yaml": "subject: Hello\ntext: Hello {{ data.name }}\n",
    "schemas/widget.broken/v1.avsc": "{}",
    "sandbox.yaml": "systems: {}\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_folder_is_loaded(folder: Path) -> None:
    """G8: a project folder anywhere gives its workflows typed, the rest parsed, each by its name."""
    project = Project.load(folder)
    assert [(w.name, w.version) for w in project.workflows()] == [("repair", "1.0.0"), ("repair", "2.1.0")]
    assert project.workflow("repair").version == "2.1.0"
    assert project.workflow("repair", 1).version == "1.0.0"
    assert project.case_files == {("repair", 1): folder / "workflows/repair/v1.cases.yaml"}
    assert project.adapters["shop"].data["source"] == "//shop.example"
    assert list(project.connectors["shop"].data["operations"]) == ["look"]
    assert project.policies["patient"].attempts_max == 3
    assert [file.name for file in project.template_files["ordered"]] == ["ordered.yaml"]
    assert project.schemas_dir == folder / "schemas"
    assert project.sandbox is not None
    assert project.surroundings().channels == {"log", "email"}
    assert project.lint(default_expressions()) == ()


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    """G8: every part of a project is optional; a folder that is not there is not."""
    project = Project.load(tmp_path)
    assert project.workflows() == ()
    assert (project.schemas_dir, project.sandbox, project.policies) == (None, None, {})
    assert project.surroundings().channels is None
    with pytest.raises(DefinitionError, match=r"nowhere: is not a folder \(set FACTMESH_PROJECT"):
        Project.load(tmp_path / "nowhere")


def put(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (put("workflows/repair/final.yaml", "a: 1"), r"final\.yaml: is not a version .*v1\.yaml"),
        (put("workflows/repair/v0.yaml", "a: 1"), r"v0\.yaml: is not a version"),
        (put("workflows/Repair-2/v1.yaml", "a: 1"), "'Repair-2' cannot be a name"),
        (put("connectors/a-b.yaml", "a: 1"), r"a-b\.yaml: 'a-b' cannot be a name"),
        (put("connectors/late.yml", "a: 1"), r"late\.yml: would be passed over \(rename it to end in \.yaml\)"),
        (put("adapters/x.yaml", "a: 1\na: 2"), r"x\.yaml:2:1: key 'a' is there twice"),
        (put("policies/x.yaml", "retry:\n  attempts: 3"), r"x\.yaml:2:3 at retry\.attempts: extra .*attempts_max"),
        (put("policies/x.yaml", "retry: {attempts_max: 0}"), r"x\.yaml:1:9 at retry\.attempts_max: .*greater than"),
        (put("policies/x.yaml", "a: &x 1"), r"x\.yaml:1:4: an anchor"),
    ],
)
def test_a_wrong_file_is_named(folder: Path, change: Callable[[Path], None], what: str) -> None:
    """Bad input: the file that is wrong is named, with its line; nothing is passed over in silence."""
    change(folder)
    with pytest.raises(DefinitionError, match=what):
        Project.load(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        ("workflows/repair/v1.yaml", "name: repair", "name: other", "called 'other' and lies in the folder 'repair'"),
        ("workflows/repair/v1.yaml", "version: 1.0.0", "version: 3.0.0", r"version 3.0.0 lies in the file v1.yaml"),
    ],
)
def test_files_are_called_what_they_hold(folder: Path, name: str, old: str, new: str, what: str) -> None:
    """B2: a version is found by its file, so the file must not lie about it; the linter says so too."""
    (folder / name).write_text((folder / name).read_text().replace(old, new))
    project = Project.load(folder)
    with pytest.raises(DefinitionError, match=what):
        project.workflow("repair", 1)
    assert [finding.rule for finding in errors_of(project.lint())] == ["file-name"]
    assert project.workflow("repair", 2).version == "2.1.0"


def test_the_example_lints_as_far_as_it_is_alone() -> None:
    """B1: the example's workflow keeps every rule, warnings included, that needs no other file."""
    project = Project.load(EXAMPLE)
    others = {"unknown-operation", "template"}
    assert [f for f in project.lint(default_expressions()) if f.rule not in others] == []


def test_lint_command(folder: Path) -> None:
    """B1: `factmesh workflow lint` ends with 0, 1 for what forbids a deployment, 2 for what cannot be loaded."""
    result = run("lint", "-p", folder)
    assert (result.exit_code, result.output) == (0, "2 workflow version(s) checked: 0 error(s), 0 warning(s)\n")
    file = folder / "workflows/repair/v1.yaml"
    file.write_text(WORKFLOW.replace("shop.look", "shop.peek"))
    result = run("lint", "-p", folder)
    assert result.exit_code == 1
    assert "v1.yaml:7:12 at do[0].look.call: error: connector 'shop' has no operation 'peek'" in result.output
    rows = json.loads(run("lint", "-p", folder, "--format", "json").stdout)
    assert [(row["rule"], row["severity"]) for row in rows] == [("unknown-operation", "error")]
    file.write_text(WORKFLOW.replace("sla: {target: PT24H}\n", ""))
    assert run("lint", "-p", folder).exit_code == 0
    assert run("lint", "-p", folder, "--strict").exit_code == 1
    assert run("lint", "-p", folder, "repair").exit_code == 0
    result = run("lint", "-p", folder, "nope")
    assert result.exit_code == 2
    assert "has no workflow 'nope' (there are: repair v1, repair v2)" in result.stderr
    file.write_text("a: &x 1")
    result = run("lint", "-p", folder)
    assert result.exit_code == 2
    assert "v1.yaml:1:4: an anchor (&x)" in result.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        ("connectors/shop.yaml", "method: GET", "method: PULL", "shop.yaml:6:15 at operations.look.request.method"),
        ("connectors/shop.yaml", "connector: shop", "connector: store", "[connector]"),
        ("connectors/shop.yaml", "'ref+env://SHOP_TOKEN'", "hunter2", "auth.bearer is not a secret reference"),
        ("adapters/shop.yaml", "fact.id", "fact.", "[adapter]"),
        ("channels.yaml", "kind: smtp", "kind: pigeon", "[channels]"),
        ("channels.yaml", "email:", "mail:", "there is no channel 'email' [channel]"),
        ("templates/ordered.yaml", "subject", "title", "[template-text]"),
        ("templates/ordered.yaml", "{{ data.name }}", "'{% if %}'", "ordered.yaml:2:1 at text: error"),
        ("adapters/shop.yaml", "shape: schema", "shape: odd", "[adapter]"),
    ],
)
def test_lint_asks_the_neighbours(folder: Path, name: str, old: str, new: str, what: str) -> None:
    """Bad input: a connector or adapter that its service would refuse is told by the linter, with its line."""
    file = folder / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    result = run("lint", "-p", folder)
    assert result.exit_code == 1
    assert what in result.output
    assert "hunter2" not in result.output


def test_lint_knows_connectors_that_are_declared_elsewhere(folder: Path) -> None:
    """C1: a team's workflow may call a plug-in, or another team's connector, that has no YAML in this project."""
    (folder / "connectors/shop.yaml").unlink()
    assert "there is no connector 'shop'" in run("lint", "-p", folder).output
    assert run("lint", "-p", folder, "--connector", "shop").exit_code == 0


def test_draw_and_export_commands(folder: Path) -> None:
    """B1: a workflow is drawn and exported; the export carries the hash by which environments are compared."""
    assert "s_look --> s_tell" in run("draw", "-p", folder, "repair").stdout
    assert "s_look -> s_tell" in run("draw", "-p", folder, "repair", "--format", "dot").stdout
    out = folder / "out.json"
    assert run("export", "-p", folder, "repair", "-v", "1", "-o", out).exit_code == 0
    bundle = json.loads(out.read_text())
    assert bundle["content_hash"] == Project.load(folder).workflow("repair", 1).content_hash
    assert bundle["definition"]["document"]["version"] == "1.0.0"
    result = run("draw", "-p", folder, "repair", "-o", folder / "no" / "such")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_the_published_schema_is_what_the_models_say(tmp_path: Path) -> None:
    """B1: editors get the schema that the models generate; `--check` fails when the file drifts or is gone."""
    file = tmp_path / "s.json"
    assert run("schema", "--check", "--file", file).exit_code == 1
    assert run("schema", "--file", file).exit_code == 0
    assert run("schema", "--check", "--file", file).exit_code == 0
    file.write_text(file.read_text().replace("Factmesh workflow", "Other"))
    result = run("schema", "--check", "--file", file)
    assert result.exit_code == 1
    assert "run: factmesh workflow schema" in result.stderr
    assert (ROOT / "schemas" / "workflow.schema.json").read_text() == schema_text()


def test_the_schema_accepts_what_the_parser_accepts(folder: Path) -> None:
    """B1: the example and the test's workflow are valid by the schema; a misspelt field and two kinds are not."""
    validator = jsonschema.Draft202012Validator(workflow_schema())
    for project in (Project.load(folder), Project.load(EXAMPLE)):
        for document in project.workflow_documents.values():
            validator.validate(document.data)
    data = json.loads(json.dumps(Project.load(folder).workflow_documents["repair", 1].data))
    data["do"][0]["look"]["wiht"] = {}
    assert not validator.is_valid(data)
    data = json.loads(json.dumps(Project.load(folder).workflow_documents["repair", 1].data))
    data["do"][0]["look"]["notify"] = {"template": "x", "to": "y"}
    assert not validator.is_valid(data)


def test_the_first_line_of_the_example_names_the_schema() -> None:
    """B1: an editor that opens the example finds the schema by the path in its first line."""
    file = EXAMPLE / "workflows" / "customer_onboarding" / "v1.yaml"
    first = file.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (file.parent / first.split("=", 1)[1]).resolve() == ROOT / "schemas" / "workflow.schema.json"


def test_a_project_may_lie_anywhere(tmp_path: Path) -> None:
    """G8: a copy of the example outside the repository gives the same definitions, by content hash."""
    copy = shutil.copytree(EXAMPLE, tmp_path / "elsewhere")
    here, there = Project.load(EXAMPLE), Project.load(copy)
    assert [w.content_hash for w in there.workflows()] == [w.content_hash for w in here.workflows()]


def test_the_language_page_tells_every_rule_and_name() -> None:
    """G3: the page on the language lists each rule with its text and each name that expressions may read."""
    page = (ROOT / "docs" / "workflow-language.md").read_text()
    for rule in RULES:
        assert f"| `{rule.id}` | {rule.severity} | {rule.text} |" in page
    for name in (*(f"fact.{field}" for field in FACT_FIELDS), *(f"instance.{field}" for field in INSTANCE_FIELDS)):
        assert f"`{name}`" in page
    for kind in STEP_MODELS:
        assert f"`{kind}" in page
    for bound in (expression_chars_max, iterations_max, result_nodes_max, result_chars_max):
        assert f"{bound:,}" in page
