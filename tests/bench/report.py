"""One run as tables for the terminal and, as Markdown, for the docs: pure functions of the JSON that the run writes.
Nothing is measured here; goals are judged in `verdicts`, pictures drawn in `charts`; what is not there is left out.

    python -m tests.bench.report build/bench/w3.json        draws and prints a run again
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import charts
from tests.bench.verdicts import KNEE, at, cpu_ms, verdicts

SYSTEMS = ("ours", "ideal")
_NUMBER = re.compile(r"[\d.,]*|-|[\d.,]+ → [\d.,]+")
PROCESSES = ("intake", "orchestrator", "connector", "kafka", "postgres")


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column is the name of a row."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def right(self) -> Sequence[bool]:
        """Which columns hold numbers."""
        return [n > 0 and all(_NUMBER.fullmatch(r[n]) for r in self.rows) for n in range(len(self.heads))]

    def text(self) -> str:
        whole = (self.heads, *self.rows)
        widths = [max(len(r[i]) for r in whole) for i in range(len(self.heads))]
        lines = [
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, self.right, strict=True))
            for row in whole
        ]
        return "\n".join([f"\n{self.title}", *(line.rstrip() for line in lines)])

    def markdown(self) -> str:
        lines = [
            "| " + " | ".join(c.replace("  ", "… ").replace("|", "\\|") for c in r) + " |"
            for r in (self.heads, *self.rows)
        ]
        rule = "|" + "|".join(" ---: " if right else " --- " for right in self.right) + "|"
        return "\n".join([f"**{self.title}**", "", lines[0], rule, *lines[1:], ""])


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _value(found: Any) -> float | None:
    if isinstance(found, Mapping):
        return sum(float(v) for v in found.values())
    return None if found is None else float(found)


def _rows(shares: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("workflows/s at the knee", (*KNEE, "per_s")),
        ("  workflows at once there", (*KNEE, "window")),
        ("workflows/s, backlog drained", ("drain", "per_s")),
        ("alone, ms p50", ("alone", "p50")),
        ("alone, ms p95", ("alone", "p95")),
        ("alone, ms p99", ("alone", "p99")),
    ]
    for share in shares:
        rows.append((f"at {float(share):.0%} of our knee: rate", ("rates", share, "rate")))
        rows += [(f"  ms {p}", ("rates", share, p)) for p in ("p50", "p95", "p99")]
    rows += [(f"CPU-ms a workflow: {p}", (*KNEE, "cost", "cpu_ms", p)) for p in PROCESSES]
    rows += [
        ("WAL bytes a workflow", (*KNEE, "cost", "postgres", "wal_bytes")),
        ("rows inserted a workflow", (*KNEE, "cost", "postgres", "tup_inserted")),
        ("rows updated a workflow", (*KNEE, "cost", "postgres", "tup_updated")),
        ("commits a workflow", (*KNEE, "cost", "postgres", "xact_commit")),
        ("messages a workflow", (*KNEE, "cost", "messages")),
        ("HTTP facts/s acknowledged, all working", ("http", "full", "per_s")),
        ("  at half of the goal or of that, ms p99", ("http", "half", "p99")),
        ("HTTP facts/s acknowledged, intake alone", ("http_alone", "full", "per_s")),
        ("  at half of the goal or of that, ms p50", ("http_alone", "half", "p50")),
        ("  at half of the goal or of that, ms p99", ("http_alone", "half", "p99")),
        ("  client's CPU a fact, ms", ("http_alone", "full", "client_cpu_ms")),
    ]
    return rows


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Everything that the run has: goals, rounds, settings of the ideal, peers, curves, plans."""
    out = [_goals(result)] if verdicts(result) else []
    for n, pair in enumerate(result.get("rounds") or [], 1):
        out.append(_round(pair, n))
        if pair.get("ideal_variants"):
            out.append(_variants(pair))
    if result.get("peers"):
        out.append(_peers(result["peers"]))
    out += [_curve(name, points) for name, points in (at(result, "growth", "axes") or {}).items()]
    out += [_plans(name, pair) for name, pair in (result.get("plans") or {}).items()]
    return out


def _goals(result: Mapping[str, Any]) -> Table:
    rows = [(v.goal, v.word, v.found) for v in verdicts(result)]
    return Table("goals", ("goal", "verdict", "found"), rows)


def _round(pair: Mapping[str, Any], n: int) -> Table:
    shares = list(at(pair, "ours", "rates") or at(pair, "ideal", "rates") or {})
    rows: list[Sequence[str]] = []
    for name, path in _rows(shares):
        ours, ideal = (_value(at(pair, s, *path)) for s in SYSTEMS)
        if ours is None and ideal is None:
            continue
        ratio = f"{ours / ideal:.2f}" if ours is not None and ideal else ""
        rows.append((name, _number(ours), _number(ideal), ratio))
    for name in PROCESSES:
        ends = [at(pair, s, "memory_mb", name) or [] for s in SYSTEMS]
        texts = [f"{e[0]:.0f} → {e[-1]:.0f}" if e else "-" for e in ends]
        if any(ends):
            rows.append((f"memory of {name}, MB from start to end", texts[0], texts[1], ""))
    for system in SYSTEMS:
        if at(pair, system, "strange_statuses"):
            rows.append((f"WORKFLOWS OF {system} NOT COMPLETED", str(pair[system]["strange_statuses"]), "", ""))
    return Table(f"round {n}", ("", "ours", "ideal", "ratio"), rows)


def _cost_cells(point: Mapping[str, Any]) -> list[str]:
    postgres = at(point, "cost", "postgres") or {}
    rows = float(postgres.get("tup_inserted", 0)) + float(postgres.get("tup_updated", 0))
    messages = _value(at(point, "cost", "messages")) or 0.0
    return [_number(cpu_ms(point)), f"{postgres.get('wal_bytes', 0):,.0f}", f"{rows:.1f}", f"{messages:.1f}"]


def _variants(pair: Mapping[str, Any]) -> Table:
    rows = []
    plain = {"as in the round": pair["ideal"]} if "ideal" in pair else {}
    for name, found in {**plain, **pair["ideal_variants"]}.items():
        knee = found["saturation"]["knee"]
        rows.append((name, _number(knee["per_s"], 0), *_cost_cells(knee)))
    heads = ("", "workflows/s", "CPU-ms", "WAL bytes", "rows", "messages")
    return Table("the ideal loop at other settings, a workflow", heads, rows)


def _peers(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, peer in found.items():
        for one in peer["settings"] if isinstance(peer, Mapping) else ():
            knee = one["saturation"]["knee"]
            alone = one["alone"]
            cpu = ", ".join(f"{n} {v:.2f}" for n, v in knee["cost"]["cpu_ms"].items())
            best = " (best)" if one["setting"] == peer["setting"] else ""
            cells = (_number(knee["per_s"], 0), str(knee["window"]), _number(alone["p50"], 1), _number(alone["p99"], 1))
            rows.append((f"{name}: {one['setting']}{best}", *cells, cpu))
    heads = ("", "workflows/s", "at once", "alone, ms p50", "p99", "CPU-ms a workflow at the knee")
    return Table(f"other engines on W3 ({', '.join(found.get('versions') or [])})", heads, rows)


def _curve(name: str, points: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for p in points:
        cpu = p["cost"]["cpu_ms"]
        each = [_number(cpu.get(n, 0.0)) for n in PROCESSES]
        memory = " / ".join(f"{p['memory_mb'].get(n, 0):.0f}" for n in PROCESSES)
        rows.append((f"{p['x']:,}", _number(p["per_s"], 0), *_cost_cells(p), *each, memory))
    heads = ("", "workflows/s", "CPU-ms", "WAL bytes", "rows", "messages", *PROCESSES, "MB of each")
    return Table(f"as it grows: {name} (a workflow's cost)", heads, rows)


def _plans(name: str, pair: Mapping[str, Any]) -> Table:
    """The dearest statements on the grown tables, and all that went bad."""
    bad = {b["what"] for b in pair["gone_bad"]}
    young, grown = pair["young"], pair["grown"]
    rows = []
    for kind, unit, top in (("statements", "ms", 8), ("tables", "blocks", 4)):
        dearest = sorted(grown[kind], key=lambda w, k=kind, u=unit: -float(grown[k][w][u]))  # type: ignore[misc]
        for what in [w for n, w in enumerate(dearest) if n < top or w in bad]:
            was = float(at(young, kind, what, unit) or 0.0)
            now = float(grown[kind][what][unit])
            mark = "GONE BAD" if what in bad else ""
            rows.append((what[:90], f"{was:.3f}", f"{now:.3f}", f"{now / was:.1f}" if was else "", unit, mark))
    return Table(f"plans {name}: a workflow's cost young and grown", ("", "young", "grown", "ratio", "unit", ""), rows)


def head(result: Mapping[str, Any]) -> str:
    """What kind of run it was, and on what."""
    machine = result["machine"]
    kind = "a trial of the benchmark, no figures" if result.get("tiny") else "full" if result["full"] else "short"
    return (
        f"W3, {kind}, {machine['at']}, {result['data_bytes']} bytes of data, {machine['processors']} processors, "
        f"Python {machine['python']}, {machine['system']}; load {machine['load_before'][0]:.1f} before"
    )


def failures(result: Mapping[str, Any]) -> dict[str, str]:
    """What failed, a part or a point of a curve, and how."""
    return {**(result.get("failed") or {}), **(at(result, "growth", "failed") or {})}


def _notes(result: Mapping[str, Any]) -> list[str]:
    skipped = at(result, "growth", "skipped")
    failed = [f"FAILED: {what}: {text}" for what, text in failures(result).items()]
    return failed + ([f"no time was left for: {', '.join(skipped)}"] if skipped else [])


def table(result: Mapping[str, Any]) -> str:
    """For the terminal; the goals last, where the eye is."""
    found = tables(result)
    ordered = [t for t in found if t.title != "goals"] + [t for t in found if t.title == "goals"]
    return "\n".join([f"\n{head(result)}", *(t.text() for t in ordered), *_notes(result)])


def markdown(result: Mapping[str, Any]) -> str:
    """For docs/performance.md: pasted, not typed."""
    return "\n".join([head(result) + ".", "", *(t.markdown() for t in tables(result)), *_notes(result)])


def write(result: Mapping[str, Any], out: Path) -> None:
    """The picture and the Markdown beside the JSON."""
    out.with_suffix(".svg").write_text(charts.picture(result), encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    run = json.loads(path.read_text(encoding="utf-8"))
    write(run, path)
    print(table(run))
