"""The generated blocks of the documentation as Markdown: tables of topics, metrics, alerts and settings, and graphs.
Each is made from the value that the code itself runs on; nothing is written to a file here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from factmesh import topics, yaml
from factmesh.errors import DefinitionError
from factmesh.metrics import TABLE as METRICS
from factmesh.project import Project
from factmesh.settings import Settings
from factmesh.workflow import graph

SERVICES = ("intake", "orchestrator", "connector", "notifier", "quarantine")
ALERTS = "deploy/alerts/factmesh.rules.yaml"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def topic_table(_root: Path, _here: Path, _arguments: Sequence[str]) -> str:
    """The topic table of `factmesh.topics`."""
    rows = [
        (
            f"`{t.name}`",
            t.key,
            ", ".join(t.carries),
            ", ".join(t.producers),
            ", ".join(t.consumers),
            str(t.partitions),
            f"{t.retention_days} days",
            f"`{topics.dlq_of(t.name)}`",
        )
        for t in topics.TOPICS
    ]
    head = ("topic", "key", "carries", "written by", "read by", "partitions", "kept", "its DLQ")
    return table(head, rows)


def flow(_root: Path, _here: Path, _arguments: Sequence[str]) -> str:
    """The services and topics as a graph: an arrow for each producer and consumer, signals and DLQs gathered."""
    lines = ["```mermaid", "flowchart LR", "  upstream([upstream systems])", "  people([people and systems])"]
    lines += ["  records([systems of record])", "  operator([operators: factmesh dlq, instance])"]
    lines += [f"  {service}[{service}]" for service in SERVICES]
    lines += ["  upstream -- HTTP --> intake"]
    for t in topics.TOPICS:
        if t is topics.SIGNAL:
            continue
        for producer in t.producers:
            for consumer in t.consumers:
                if producer in ("console", "tool", "quarantine"):
                    continue
                name = t.name.replace("<connector>", "*")
                lines.append(f'  {producer} -- "{name}" --> {consumer}')
    lines += ["  connector --> records", "  notifier --> people"]
    lines += [f'  {s} -. "{topics.DLQ_PREFIX}*" .-> quarantine' for s in SERVICES if s != "quarantine"]
    lines += ['  operator --> quarantine', '  quarantine -. "openings, resolutions" .-> intake & connector & notifier']
    lines += [f'  quarantine -. "{topics.SIGNAL.name}" .-> orchestrator', "```"]
    return "\n".join(lines) + "\n"


def metric_table(_root: Path, _here: Path, _arguments: Sequence[str]) -> str:
    """The metric table of `factmesh.metrics`; sizes and durations are histograms."""
    kinds = {"sizes": "histogram of sizes", "durations": "histogram of seconds"}
    rows = [(f"`{m.name}`", kinds.get(m.kind, m.kind), code(m.labels), m.meaning) for m in METRICS]
    return table(("metric", "kind", "labels", "meaning"), rows)


def alerts(root: Path) -> list[dict[str, Any]]:
    """The alert rules of the repository. Raises DefinitionError where the file is not readable."""
    tree = yaml.load(root / ALERTS).data
    if not isinstance(tree, dict):
        raise DefinitionError("holds no groups", where=ALERTS, hint="see the Prometheus format of rule files")
    return [rule for group in tree["groups"] for rule in group["rules"] if "alert" in rule]


def alert_table(root: Path, here: Path, _arguments: Sequence[str]) -> str:
    """The alerts, each with what it says and its runbook, linked from the page."""
    rows = []
    for rule in alerts(root):
        runbook = rule["annotations"]["runbook"]
        link = os.path.relpath(root / runbook, here)
        rows.append(
            (
                f"`{rule['alert']}`",
                rule["labels"]["severity"],
                rule["annotations"]["summary"],
                f"`{rule['expr']}` for {rule['for']}",
                f"[{Path(runbook).stem}]({link})",
            )
        )
    return table(("alert", "severity", "it says", "when", "runbook"), rows)


def setting_table(_root: Path, _here: Path, arguments: Sequence[str]) -> str:
    """The environment variables: `common`, or those that one service adds."""
    name = arguments[0]
    kind: type[Settings] = Settings
    if name != "common":
        kind = importlib.import_module(f"factmesh_{name}.service").SERVICE.settings
    prefix = str(kind.model_config.get("env_prefix", ""))
    rows = []
    for field, info in kind.model_fields.items():
        if name != "common" and field in Settings.model_fields:
            continue
        required = info.default is PydanticUndefined
        default = "required" if required else f"`{info.default}`" if info.default not in (None, "") else ""
        rows.append((f"`{prefix}{field.upper()}`", default, info.description or ""))
    if not rows:
        return "None besides the common ones.\n"
    return table(("variable", "default", "meaning"), rows)


def record_states(_root: Path, _here: Path, _arguments: Sequence[str]) -> str:
    """The states of a quarantined message, from the quarantine's transition table."""
    model = importlib.import_module("factmesh_quarantine.model")
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, verb), after in model.TRANSITIONS.items():
        arrows.setdefault((str(state), str(after)), []).append(str(verb))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {model.State.OPEN}: die"]
    lines += [f"    {a} --> {b}: {', '.join(verbs)}" for (a, b), verbs in arrows.items()]
    return "\n".join([*lines, "```"]) + "\n"


def workflow_graph(root: Path, _here: Path, arguments: Sequence[str]) -> str:
    """A project's workflow, drawn: `workflow PROJECT NAME`."""
    project, name = arguments
    return "```mermaid\n" + graph.mermaid(Project.load(root / project).workflow(name)).rstrip("\n") + "\n```\n"
