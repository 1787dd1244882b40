"""One run as a picture: an SVG that needs nothing to be drawn. Pure functions of the JSON that the run writes.
Bars only, each with its number, for a length is read faster than a slope; nothing is measured or judged here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tests.bench.verdicts import KNEE, at, cpu_ms

WIDTH = 860
LEFT, BAR_MAX = 170, 520
COLOURS = {"ours": "#1f6feb", "ideal": "#8b949e", "restate": "#bf8700", "dbos": "#8250df"}
SHADES = {
    "intake": "#1f6feb",
    "orchestrator": "#2da44e",
    "connector": "#bf8700",
    "kafka": "#8250df",
    "postgres": "#57606a",
    "restate": "#cf222e",
    "service": "#d4a72c",
    "dbos": "#0a7a83",
}
"""Of each process; an engine's own are named as it is."""


class Canvas:
    """Shapes one below the other; `y` is where the next begins."""

    def __init__(self) -> None:
        self.out: list[str] = []
        self.y = 64

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        anchor: str = "start",
        bold: bool = False,
        grey: bool = False,
    ) -> None:
        style = ' font-weight="600"' if bold else ""
        style += ' fill="#57606a"' if grey else ""
        self.out.append(
            f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
        )

    def bar(self, x: float, y: float, width: float, colour: str, height: int = 15) -> None:
        self.out.append(
            f'<rect x="{x:.1f}" y="{y:.0f}" width="{max(width, 1):.1f}" height="{height}" fill="{colour}"/>'
        )

    def title(self, text: str, note: str = "") -> None:
        self.y += 16
        self.text(24, self.y, text, size=14, bold=True)
        if note:
            self.text(24, self.y + 17, note, size=11, grey=True)
            self.y += 17
        self.y += 10

    def bars(self, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], digits: int = 0) -> None:
        """Groups of bars on one scale: (name, ((system, value), …)); a colour is a system."""
        top = max((v for _, values in rows for _, v in values), default=1.0) or 1.0
        for name, values in rows:
            for n, (system, value) in enumerate(values):
                if n == 0:
                    self.text(LEFT - 10, self.y + 12, name, anchor="end")
                width = BAR_MAX * value / top
                self.bar(LEFT, self.y, width, COLOURS[system])
                self.text(LEFT + 6 + width, self.y + 12, f"{value:,.{digits}f}")
                self.y += 17
            self.y += 7

    def stack(self, name: str, parts: Mapping[str, float], top: float, width_max: float, note: str = "") -> None:
        """One bar made of what each process took."""
        x = float(LEFT)
        self.text(LEFT - 10, self.y + 12, name, anchor="end")
        for process, colour in SHADES.items():
            if parts.get(process):
                width = width_max * parts[process] / top
                self.bar(x, self.y, width, colour)
                x += width
        total = sum(v for p, v in parts.items() if p in SHADES)
        self.text(x + 6, self.y + 12, f"{total:,.2f}{note}")
        self.y += 20

    def legend(self, colours: Mapping[str, str], names: Sequence[str]) -> None:
        x = float(LEFT)
        for name in names:
            self.bar(x, self.y, 12, colours[name], 12)
            self.text(x + 17, self.y + 11, name, size=11)
            x += 31 + 7 * len(name)
        self.y += 22


def picture(result: Mapping[str, Any]) -> str:
    """Throughput, latency by load, cost by process, and the curves."""
    canvas = Canvas()
    rounds = result.get("rounds") or []
    if rounds:
        _round(canvas, result, rounds[-1])
    _growth(canvas, at(result, "growth", "axes") or {})
    kind = "a trial, no figures" if result.get("tiny") else "full run" if result["full"] else "short run"
    height = canvas.y + 24
    head = Canvas()
    head.text(24, 32, f"W3 on {result['machine']['processors']} processors, {kind}", size=18, bold=True)
    head.text(24, 52, f"{result['machine']['at']}, one machine for everything; read the ratios", size=11, grey=True)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" fill="#24292f">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *head.out,
            *canvas.out,
            "</svg>",
            "",
        ]
    )


def _round(canvas: Canvas, result: Mapping[str, Any], pair: Mapping[str, Any]) -> None:
    engines: dict[str, Any] = {s: pair[s] for s in ("ours", "ideal") if s in pair}
    engines |= {s: result["peers"][s] for s in ("restate", "dbos") if at(result, "peers", s)}
    canvas.legend(COLOURS, list(engines))

    canvas.title("workflows/s at the knee", "each at the best of the settings that were tried")
    canvas.bars([(name, [(name, float(at(e, *KNEE, "per_s")))]) for name, e in engines.items() if at(e, *KNEE)])

    shares = list(at(pair, "ours", "rates") or at(pair, "ideal", "rates") or {})
    loads = [("alone", ("alone",)), *((f"{float(s):.0%} of our knee", ("rates", s)) for s in shares)]
    for percentile in ("p50", "p99"):
        rows = []
        for name, path in loads:
            values = [(s, at(e, *path, percentile)) for s, e in engines.items()]
            rows.append((name, [(s, float(v)) for s, v in values if v is not None]))
        if any(values for _, values in rows):
            canvas.title(f"ms from start to completion, {percentile}")
            canvas.bars(rows, 1)

    canvas.title("CPU-ms a workflow at the knee, by process")
    spent = {s: at(e, *KNEE, "cost", "cpu_ms") or {} for s, e in engines.items()}
    spent = {s: {p: float(v) for p, v in c.items() if p in SHADES} for s, c in spent.items()}
    top = max((sum(c.values()) for c in spent.values()), default=1.0) or 1.0
    for system, parts in spent.items():
        canvas.stack(system, parts, top, BAR_MAX)
    canvas.legend(SHADES, [p for p in SHADES if any(p in c for c in spent.values())])


def _growth(canvas: Canvas, axes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Each axis: CPU by process on one scale of its own, and beside it the rate."""
    names = {
        "payload": "bytes of data in a fact",
        "steps": "steps of the workflow",
        "ledger": "workflows in the ledger",
    }
    for axis, points in axes.items():
        canvas.title(f"as it grows: {names.get(axis, axis)}", "CPU-ms a workflow by process, then workflows/s")
        top = max((cpu_ms(p) for p in points), default=1.0) or 1.0
        for p in points:
            parts = {n: float(v) for n, v in p["cost"]["cpu_ms"].items() if n in SHADES}
            canvas.stack(f"{p['x']:,}", parts, top, BAR_MAX, f" ms, {p['per_s']:,.0f}/s")
