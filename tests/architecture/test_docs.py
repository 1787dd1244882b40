"""The documentation says what the code does: links, commands, settings, metrics, alerts, topics, tests and runbooks."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from factmesh import topics, yaml
from factmesh.metrics import TABLE as METRICS
from factmesh.settings import Settings
from factmesh_cli import docs, docs_asyncapi, docs_tables
from factmesh_cli.__main__ import SUBCOMMANDS

from .sources import PACKAGES, ROOT, modules

PAGES = sorted({path for pattern in docs.PAGES for path in ROOT.glob(pattern)} | {ROOT / "CHANGELOG.md"})
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`", re.DOTALL)
TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")
PROMQL_METRIC = re.compile(r"\bfactmesh_\w+")
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")
SERVICES = docs_tables.SERVICES


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands_in(text: str) -> Iterator[str]:
    """Command lines that begin with `factmesh`, from fenced blocks (continued lines joined) and from inline code."""
    for language, block in FENCE.findall(text):
        if language in ("sh", "", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.strip().split(" && ")
                yield from (w for w in words if w.startswith("factmesh "))
    for span in INLINE.findall(FENCE.sub("", text)):
        if span.startswith("factmesh "):
            yield " ".join(span.split())


def problem_with(line: str) -> str | None:
    """Why a documented command line could not be typed, or None. Upper-case words and `…` stand for values."""
    try:
        words = [w.strip("[]") for w in shlex.split(line, comments=True)]
    except ValueError as error:
        return str(error)
    if "|" in words:
        # `factmesh dlq list | show`: the alternatives of one place.
        at = words.index("|")
        head, rest = words[: at - 1], [w for w in words[at - 1 :] if w not in ("|", "…")]
        return next((p for w in rest if (p := problem_with(" ".join([*head, w])))), None)
    name, *given = words[1:]
    if name.startswith("-"):
        return None if name in ("--help", "--version") else f"no option {name}"
    if name == "COMMAND":
        return None
    if name not in SUBCOMMANDS:
        return f"no command {name}"
    command: Any = get_command(importlib.import_module(SUBCOMMANDS[name].module).app)
    if getattr(command, "commands", None):
        if given and not given[0].startswith("-") and given[0] != "…":
            verb = given.pop(0)
            if verb not in command.commands:
                return f"no command {name} {verb}"
            command = command.commands[verb]
        elif not given or given == ["…"]:
            return None
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    return next((f"no option {w}" for w in given if re.match(r"--?[a-z]", w) and w.split("=")[0] not in known), None)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    """Issue 6.12: no page sends its reader to what is not there."""
    targets = [t for t in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))) if "://" not in t]
    missing = [t for t in targets if not t.startswith("#") and not (page.parent / t.partition("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_documented_commands_can_be_typed(page: Path) -> None:
    """G3: commands in runbooks are checked against the code: each exists, with each of its options."""
    text = page.read_text(encoding="utf-8")
    wrong = [f"{line}: {problem}" for line in commands_in(text) if (problem := problem_with(line))]
    assert wrong == []


def test_a_wrong_command_would_be_found() -> None:
    """The check above sees what it must: an unknown command, verb and option, alone and among alternatives."""
    assert problem_with("factmesh dlq replay ID --rate 5") is None
    assert problem_with("factmesh dlq list | groups | show") is None
    assert problem_with("factmesh fly") == "no command fly"
    assert problem_with("factmesh dlq fly ID") == "no command dlq fly"
    assert problem_with("factmesh dlq replay ID --faster") == "no option --faster"
    assert problem_with("factmesh dlq list | fly") == "no command dlq fly"
    assert list(commands_in("```sh\nfactmesh up --data x && factmesh fly\n```\nand `factmesh dlq\nlist`")) == [
        "factmesh up --data x",
        "factmesh fly",
        "factmesh dlq list",
    ]


def test_generated_facts_do_not_drift() -> None:
    """Habit 10: topic, metric, alert and setting tables, graphs and AsyncAPI are what the code says."""
    drifted = [name_of(path) for path, before, after in docs.pages(ROOT) if before != after]
    assert drifted == [], "run `factmesh docs`"


def test_drift_is_found_and_mended(tmp_path: Path) -> None:
    """Habit 10: a block that was edited by hand is seen, prose around it stays, and a wrong block name is an error."""
    page = "before\n<!-- generated: metrics -->\n| old |\n<!-- /generated -->\nafter\n"
    filled = docs.filled(ROOT, ROOT / "README.md", page)
    assert filled != page
    assert filled.startswith("before\n<!-- generated: metrics -->\n| metric |")
    assert filled.endswith("<!-- /generated -->\nafter\n")
    assert docs.filled(ROOT, ROOT / "README.md", filled) == filled
    with pytest.raises(Exception, match="no generator is called 'nothing'"):
        docs.filled(ROOT, ROOT / "README.md", page.replace("generated: metrics", "generated: nothing"))


def test_every_metric_is_counted_somewhere() -> None:
    """F3: a name in the table without code behind it would be an alert that never fires."""
    code = "\n".join(m.text for m in modules() if m.name != "factmesh.metrics")
    assert [m.name for m in METRICS if f'"{m.name}"' not in code] == []


def test_every_metric_that_is_counted_is_in_the_table() -> None:
    """House rule: every metric name with its meaning is in one table."""
    called = re.compile(r"""metrics\.(?:inc|set|observe)\(\s*"(\w+)\"""")
    used = {name for m in modules() for name in called.findall(m.text)}
    assert used
    assert used - {m.name for m in METRICS} == set()


def alerts() -> list[dict[str, Any]]:
    return docs_tables.alerts(ROOT)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_alerts_ask_for_what_is_measured_and_name_their_runbook(rule: dict[str, Any]) -> None:
    """F2: an alert asks for metrics and labels of the table, keeps its labels bounded, and says what to do."""
    table = {m.name: m for m in METRICS}
    expr = rule["expr"]
    named = {n if n in table else HISTOGRAM.sub("", n) for n in PROMQL_METRIC.findall(expr)}
    assert named
    assert named <= table.keys()
    labels = {label for n in named for label in table[n].labels} | {"job"}
    if any(n not in table for n in PROMQL_METRIC.findall(expr)):
        labels.add("le")
    asked = {x.strip() for group in re.findall(r"\bby \(([^)]*)\)", expr) for x in group.split(",")}
    asked |= {x for group in re.findall(r"\{([^}]*)\}", expr) for x in re.findall(r"(\w+)\s*[=!]", group)}
    asked |= set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert asked <= labels
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= {
        x.strip() for group in re.findall(r"\bby \(([^)]*)\)", expr) for x in group.split(",")
    }, "a summary may name only the labels that the expression keeps"
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert re.fullmatch(r"\d+[smhd]", rule["for"])
    assert (ROOT / rule["annotations"]["runbook"]).is_file()
    assert expr.count("(") == expr.count(")")


def test_every_runbook_is_reachable() -> None:
    """G3: each runbook is listed on their front page or belongs to a project's workflow; alerts have distinct names."""
    folder = ROOT / "docs" / "runbooks"
    front = (folder / "README.md").read_text(encoding="utf-8")
    workflows = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("examples/*/workflows/*/v*.yaml"))
    lost = [p.name for p in folder.glob("*.md") if p.name != "README.md" and f"({p.name})" not in front]
    assert [n for n in lost if f"docs/runbooks/{n}" not in workflows] == []
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))


def test_pages_that_code_names_are_there() -> None:
    """Errors speak: a runbook or page that a log line, problem or example names exists."""
    files = [m.path for m in modules()] + [p for p in (ROOT / "examples").rglob("*") if p.suffix in (".yaml", ".py")]
    named = re.compile(r"\b((?:docs|services|tools)/[\w./-]+\.(?:md|yaml))")
    missing = {
        f"{name_of(path)}: {page}"
        for path in files
        for page in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    }
    assert missing == set()


def test_every_problem_has_its_page_and_its_line() -> None:
    """A2: the `type` of each problem is the address of a page, and the README lists what to do about it."""
    problems = importlib.import_module("factmesh_intake.problems")
    readme = (ROOT / "services" / "intake" / "README.md").read_text(encoding="utf-8")
    for problem in problems.TABLE:
        page = problems.page(problem)
        assert problem.advice in page
        runbook = re.search(r"Runbook: (\S+)", page)
        assert runbook is not None
        assert (ROOT / runbook[1]).is_file()
        assert f"`{problem.slug}`" in readme, problem.slug


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_pages_name_exist(page: Path) -> None:
    """Issue 6.12: where a page says what shows a promise, that test is there."""
    for path, test in TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_and_targets_that_pages_name_exist(page: Path) -> None:
    """Issue 6.12: each `FACTMESH_…` is read by some code, each `make …` is a target."""
    text = page.read_text(encoding="utf-8")
    kinds = [Settings, *(importlib.import_module(f"factmesh_{s}.service").SERVICE.settings for s in SERVICES)]
    known = {f"FACTMESH_{field.upper()}" for kind in kinds for field in kind.model_fields}
    known |= {f"FACTMESH_{s.upper()}_{what}" for s in SERVICES for what in ("URL", "DSN")}
    known |= {name for m in modules() for name in re.findall(r"\bFACTMESH_[A-Z_]+[A-Z]\b", m.text)}
    assert set(re.findall(r"\bFACTMESH_[A-Z_]+[A-Z]\b", text)) - known == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    spans = [*INLINE.findall(FENCE.sub("", text)), *(line for _, b in FENCE.findall(text) for line in b.splitlines())]
    made = {m[1] for span in spans if (m := re.match(r"make ([a-z]+)\b", span.strip()))}
    assert made - targets == set()


@pytest.mark.parametrize("service", SERVICES)
def test_a_services_readme_is_whole(service: str) -> None:
    """Issue 6.12: topics in and out, tables, invariants and runbooks stand in each service's README."""
    folder = ROOT / "services" / service
    text = (folder / "README.md").read_text(encoding="utf-8")
    for topic in topics.TOPICS:
        if service in topic.consumers:
            assert topic.name in text or (service == "quarantine" and "dlq." in text), f"reads {topic.name}"
    made = re.compile(r"CREATE TABLE (\w+)")
    tables = {t for path in folder.glob("*/migrations/*.sql") for t in made.findall(path.read_text(encoding="utf-8"))}
    assert {t for t in tables if f"`{t}`" not in text} == set()
    assert re.search(r"^## (Invariants|What holds)", text, re.MULTILINE)
    assert "docs/runbooks/" in text
    assert f"factmesh-{service}" in text


def test_asyncapi_is_whole() -> None:
    """HOUSE_STYLE 10, AsyncAPI 3: every topic and DLQ with its messages; every reference leads somewhere."""
    document = docs_asyncapi.document(ROOT)
    written = yaml.load(ROOT / "docs" / "asyncapi.yaml").data
    assert written == document
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= document["info"].keys()
    addresses = {channel["address"] for channel in document["channels"].values()}
    names = {t.name.replace("<connector>", "{connector}") for t in topics.TOPICS}
    assert addresses == names | {topics.dlq_of(n) for n in names}
    for channel in document["channels"].values():
        assert set(channel.get("parameters", {})) == set(re.findall(r"\{(\w+)\}", channel["address"]))
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")
        channel = operation["channel"]["$ref"]
        assert all(message["$ref"].startswith(f"{channel}/messages/") for message in operation["messages"])
    for ref in _refs(document):
        if ref.startswith("#/"):
            node: Any = document
            for part in ref[2:].split("/"):
                node = node[part]
        else:
            assert (ROOT / "docs" / ref).is_file()


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


def test_the_house_of_packages_is_documented() -> None:
    """Issue 6.12: the README's tree names every folder that ships code."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {p.parent.name for p in PACKAGES if p.parent.parent.name == "services"} == set(SERVICES)
    folders = ("libs/factmesh/", "services/", "tools/", "schemas/", "examples/", "deploy/", "docs/", "tests/")
    for name in (*folders, *SERVICES):
        assert name in readme
