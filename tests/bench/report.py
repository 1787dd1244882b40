"""One run as a table for the terminal and as a picture: pure functions of the JSON that the run writes.
Nothing is measured or judged here; a figure that is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

SYSTEMS = ("ours", "ideal")
COLOURS = {"ours": "#1f6feb", "ideal": "#8b949e"}
PROCESSES = ("intake", "orchestrator", "connector", "kafka", "postgres")
SHADES = ("#1f6feb", "#2da44e", "#bf8700", "#8250df", "#57606a")


def at(tree: Any, *path: str) -> Any:
    """The value at a path, or None."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _rows(shares: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    knee = ("saturation", "knee")
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("workflows/s at the knee", (*knee, "per_s")),
        ("  workflows at once there", (*knee, "window")),
        ("workflows/s, backlog drained", ("drain", "per_s")),
        ("alone, ms p50", ("alone", "p50")),
        ("alone, ms p99", ("alone", "p99")),
    ]
    for share in shares:
        rows.append((f"at {float(share):.0%} of our knee: rate", ("rates", share, "rate")))
        rows += [(f"  ms {p}", ("rates", share, p)) for p in ("p50", "p95", "p99")]
    rows += [(f"CPU-ms a workflow: {p}", (*knee, "cost", "cpu_ms", p)) for p in PROCESSES]
    rows += [
        ("WAL bytes a workflow", (*knee, "cost", "postgres", "wal_bytes")),
        ("rows inserted a workflow", (*knee, "cost", "postgres", "tup_inserted")),
        ("rows updated a workflow", (*knee, "cost", "postgres", "tup_updated")),
        ("commits a workflow", (*knee, "cost", "postgres", "xact_commit")),
        ("messages a workflow", (*knee, "cost", "messages")),
        ("HTTP facts/s acknowledged", ("http", "full", "per_s")),
        ("  at half of that, ms p99", ("http", "half", "p99")),
    ]
    return rows


def _value(found: Any) -> float | None:
    if isinstance(found, Mapping):
        return sum(float(v) for v in found.values())
    return None if found is None else float(found)


def table(result: Mapping[str, Any]) -> str:
    """Each round as three columns: ours, the ideal loop, and ours divided by the ideal."""
    lines = []
    machine = result["machine"]
    lines.append(
        f"\nW3, {'full' if result['full'] else 'short'}, {result['data_bytes']} bytes of data, {machine['processors']} "
        f"processors, load {machine['load_before'][0]:.1f} before and {machine['load_after'][0]:.1f} after"
    )
    for n, pair in enumerate(result["rounds"], 1):
        shares = list(at(pair, "ours", "rates") or at(pair, "ideal", "rates") or {})
        lines.append(f"\nround {n:<30}{'ours':>12}{'ideal':>12}{'ratio':>9}")
        for name, path in _rows(shares):
            ours, ideal = (_value(at(pair, s, *path)) for s in SYSTEMS)
            if ours is None and ideal is None:
                continue
            cells = ["-" if v is None else f"{v:,.2f}" for v in (ours, ideal)]
            ratio = f"{ours / ideal:.2f}" if ours is not None and ideal else ""
            lines.append(f"{name:<36}{cells[0]:>12}{cells[1]:>12}{ratio:>9}")
        for system in SYSTEMS:
            series = at(pair, system, "memory_mb") or {}
            ends = [f"{p} {s[0]:.0f} → {s[-1]:.0f}" for p, s in series.items() if s]
            if ends:
                lines.append(f"memory of {system}, MB from start to end: {', '.join(ends)}")
            if at(pair, system, "strange_statuses"):
                lines.append(f"WORKFLOWS OF {system} THAT WERE NOT COMPLETED: {pair[system]['strange_statuses']}")
    return "\n".join(lines)


# --- the picture ------------------------------------------------------------------------------------------------------


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.0f}" width="{max(width, 1):.1f}" height="16" rx="2" fill="{colour}"/>'


def picture(result: Mapping[str, Any]) -> str:
    """Throughput, latency by rate and cost of the last round, as an SVG that needs nothing to be drawn."""
    pair = result["rounds"][-1]
    out: list[str] = []
    y = 58
    y = _bars(out, y, "workflows/s at the knee", pair, [("", ("saturation", "knee", "per_s"))])
    shares = list(at(pair, "ours", "rates") or at(pair, "ideal", "rates") or {})
    latencies: list[tuple[str, tuple[str, ...]]] = [("alone", ("alone", "p50"))]
    latencies += [(f"{float(s):.0%} of our knee", ("rates", s, "p50")) for s in shares]
    y = _bars(out, y, "ms from start to completion, p50", pair, latencies)
    tails = [(name, (*path[:-1], "p99")) for name, path in latencies]
    y = _bars(out, y, "ms from start to completion, p99", pair, tails)
    y = _costs(out, y, pair)
    note = "full run" if result["full"] else "short run"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{y}" viewBox="0 0 760 {y}" '
        'font-family="system-ui, sans-serif" fill="#24292f">',
        f'<rect width="760" height="{y}" fill="#ffffff"/>',
        _text(24, 30, f"W3 on {result['machine']['processors']} processors, {note}", size=17, bold=True),
    ]
    for n, system in enumerate(SYSTEMS):
        head += [_bar(520 + n * 110, 18, 14, COLOURS[system]), _text(540 + n * 110, 31, system)]
    return "\n".join([*head, *out, "</svg>", ""])


def _bars(
    out: list[str], y: int, title: str, pair: Mapping[str, Any], rows: Sequence[tuple[str, tuple[str, ...]]]
) -> int:
    """Bars on one scale; where the next chart begins."""
    out.append(_text(24, y, title, size=14, bold=True))
    values = {(n, s): _value(at(pair, s, *path)) for n, path in rows for s in SYSTEMS}
    top = max((v for v in values.values() if v), default=1.0)
    y += 10
    for name, _ in rows:
        out.append(_text(150, y + 20, name, anchor="end"))
        for system in SYSTEMS:
            value = values[name, system]
            if value is not None:
                width = 480 * value / top
                out += [_bar(160, y, width, COLOURS[system]), _text(166 + width, y + 13, f"{value:,.1f}")]
                y += 18
        y += 8
    return y + 26


def _costs(out: list[str], y: int, pair: Mapping[str, Any]) -> int:
    out.append(_text(24, y, "CPU-ms a workflow at the knee", size=14, bold=True))
    y += 10
    spent = {s: at(pair, s, "saturation", "knee", "cost", "cpu_ms") or {} for s in SYSTEMS}
    top = max((sum(c.get(p, 0.0) for p in PROCESSES) for c in spent.values()), default=1.0) or 1.0
    for system in SYSTEMS:
        if not spent[system]:
            continue
        x = 160.0
        out.append(_text(150, y + 13, system, anchor="end"))
        for process, shade in zip(PROCESSES, SHADES, strict=True):
            width = 480 * spent[system].get(process, 0.0) / top
            out.append(_bar(x, y, width, shade))
            x += width
        total = sum(spent[system].get(p, 0.0) for p in PROCESSES)
        out.append(_text(x + 6, y + 13, f"{total:.2f}"))
        y += 22
    for n, (process, shade) in enumerate(zip(PROCESSES, SHADES, strict=True)):
        out += [_bar(160 + n * 110, y + 6, 14, shade), _text(180 + n * 110, y + 19, process)]
    return y + 48
