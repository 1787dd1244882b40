"""The picture of the flow as SVG: services at fixed places, an arrow for each pair that a topic joins, by the table.
Only the places are chosen here; who stands at which end of a topic, and its name, is `factmesh.topics`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from factmesh import topics

WIDTH, HEIGHT, BOX_W, BOX_H = 1260, 440, 136, 44
#: Centre of each box. Those in round corners are people and systems outside.
PLACES: dict[str, tuple[int, int]] = {
    "upstream": (90, 160), "intake": (330, 160), "orchestrator": (640, 160), "connector": (950, 50),
    "notifier": (950, 270), "quarantine": (640, 390), "systems of record": (1170, 50), "people": (1170, 270),
    "operators": (330, 390),
}  # fmt: skip
OUTSIDE = frozenset({"upstream", "systems of record", "people", "operators"})
#: What no topic carries.
OTHER: tuple[tuple[str, str, str], ...] = (
    ("connector", "systems of record", "calls"),
    ("notifier", "people", "sends"),
    ("operators", "quarantine", "factmesh dlq"),
)
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2933;text-anchor:middle}.n{font-weight:600}"
    ".l{font-size:11px;paint-order:stroke;stroke:#fff;stroke-width:5px}"
    ".b{fill:#e8f1fb;stroke:#2b6cb0}.o{fill:#f7f7f5;stroke:#8a8f98}.e{stroke:#4a5568;fill:none}"
    ".d{stroke:#b7791f;stroke-dasharray:5 4;fill:none}rect.w{fill:#fff}"
)


def text(_root: Path) -> str:
    """The picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Factmesh: who'
        ' writes and reads which topic">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="a" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z" fill="#4a5568"/></marker></defs>',
        f'<rect class="w" width="{WIDTH}" height="{HEIGHT}"/>',
    ]
    edges = _edges()
    for (source, target), labels in sorted(edges.items(), key=_dlqs_first):
        parts.append(_arrow(source, target, labels, both=(target, source) in edges))
    parts += [_box(name) for name in PLACES]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _edges() -> dict[tuple[str, str], list[str]]:
    """Pairs of places, and what goes from one to the other. DLQs are drawn once a service, signals from quarantine."""
    edges: dict[tuple[str, str], list[str]] = {("upstream", "intake"): ["HTTP"]}
    for topic in topics.TOPICS:
        for producer in topic.producers:
            for consumer in topic.consumers:
                drawn = producer in PLACES and consumer in PLACES and producer != consumer
                signal = topic is topics.SIGNAL and producer != "quarantine"
                resolution = producer == "quarantine" and topic is not topics.SIGNAL
                if drawn and not signal and not resolution:
                    name = topic.name.replace("<connector>", "*")
                    edges.setdefault((producer, consumer), []).append(name)
    for topic in topics.TOPICS:
        for consumer in topic.consumers:
            edges[(consumer, "quarantine")] = [f"{topics.DLQ_PREFIX}*"]
    for source, target, label in OTHER:
        edges[(source, target)] = [label]
    return edges


def _dlqs_first(edge: tuple[tuple[str, str], list[str]]) -> bool:
    """What is drawn later lies above."""
    return edge[0][1] != "quarantine"


def _arrow(source: str, target: str, labels: list[str], *, both: bool) -> str:
    (x1, y1), (x2, y2) = PLACES[source], PLACES[target]
    length = max(1.0, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    # Two that go both ways lie side by side, each a little to its own right, with its words nearer to where it begins.
    shift, at = (13.0, 0.4) if both else (0.0, 0.5)
    kind = "d" if labels[0].startswith(topics.DLQ_PREFIX) else "e"
    at = 0.65 if kind == "d" and not both else at
    x1, y1, x2, y2 = (round(v) for v in (x1 - uy * shift, y1 + ux * shift, x2 - uy * shift, y2 + ux * shift))
    cut = min(BOX_W / 2 / abs(ux) if ux else 1e9, BOX_H / 2 / abs(uy) if uy else 1e9)
    ax, ay, bx, by = x1 + ux * cut, y1 + uy * cut, x2 - ux * (cut + 2), y2 - uy * (cut + 2)
    lx, ly = ax + (bx - ax) * at, ay + (by - ay) * at + 4 - 7 * (len(labels) - 1)
    line = f'<line class="{kind}" x1="{ax:.0f}" y1="{ay:.0f}" x2="{bx:.0f}" y2="{by:.0f}" marker-end="url(#a)"/>'
    words = "".join(
        f'<text class="l" x="{lx:.0f}" y="{ly + 14 * n:.0f}">{escape(label)}</text>' for n, label in enumerate(labels)
    )
    return line + words


def _box(name: str) -> str:
    x, y = PLACES[name]
    kind, radius = ("o", 20) if name in OUTSIDE else ("b", 4)
    left, top = x - BOX_W // 2, y - BOX_H // 2
    return (
        f'<rect class="{kind}" x="{left}" y="{top}" width="{BOX_W}" height="{BOX_H}" rx="{radius}"/>'
        f'<text class="n" x="{x}" y="{y + 5}">{escape(name)}</text>'
    )
