"""The goals of issue 7 held against one run: whether each holds, and by what ratio. Pure functions of the JSON.
A goal whose figures are not in the run is left out; nothing is rounded in favour of anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

KNEE = ("saturation", "knee")
SERVICES = ("intake", "orchestrator", "connector")
HTTP_PER_S = 3_000.0


@dataclass(frozen=True)
class Verdict:
    """One goal. `holds` is None where there is only something to know."""

    goal: str
    holds: bool | None
    found: str

    @property
    def word(self) -> str:
        return {True: "holds", False: "does NOT hold", None: "to know"}[self.holds]


def at(tree: Any, *path: str) -> Any:
    """The value at a path, or None."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def cpu_ms(point: Any) -> float:
    """CPU-ms a workflow of everything but the generator."""
    return float(sum(v for n, v in (at(point, "cost", "cpu_ms") or {}).items() if n != "generator"))


def _mean(rounds: Sequence[Any], *path: str) -> float | None:
    """Over the rounds that have it."""
    found = [float(v) for v in (at(pair, *path) for pair in rounds) if v is not None]
    return fmean(found) if found else None


def best_ideal(rounds: Sequence[Any]) -> float | None:
    """The ideal loop's throughput at its best setting: as it comes, or a variant that tells as few statuses."""
    plain = _mean(rounds, "ideal", *KNEE, "per_s")
    variants = at(rounds[0], "ideal_variants") if rounds else None
    others = [float(v["saturation"]["knee"]["per_s"]) for n, v in (variants or {}).items() if n != "four statuses"]
    return max([plain, *others]) if plain is not None else None


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Every goal that this run can speak of."""
    rounds = result.get("rounds") or []
    out = [*_throughput(result, rounds), *_latency(rounds), *_growth(result), *_memory(rounds), *_http(rounds)]
    return [*out, *_plans(result)]


def _throughput(result: Mapping[str, Any], rounds: Sequence[Any]) -> list[Verdict]:
    out: list[Verdict] = []
    ours, ideal = _mean(rounds, "ours", *KNEE, "per_s"), best_ideal(rounds)
    if ours is None:
        return out
    if ideal:
        ratio = ours / ideal
        text = f"{ratio:.2f} ({ours:,.0f} to {ideal:,.0f} workflows/s)"
        out.append(Verdict("throughput at least 0.60 of the ideal loop's best", ratio >= 0.6, text))
    four = _mean(rounds[:1], "ideal_variants", "four statuses", *KNEE, "per_s")
    if four:
        text = f"{ours / four:.2f} ({ours:,.0f} to {four:,.0f} workflows/s)"
        out.append(Verdict("the same, to an ideal loop that tells as many statuses as ours", None, text))
    for name, times in (("restate", 2.0), ("dbos", 20.0)):
        peer = at(result, "peers", name, *KNEE, "per_s")
        if peer:
            text = f"{ours / peer:.1f} times ({ours:,.0f} to {peer:,.0f} workflows/s)"
            out.append(Verdict(f"throughput at least {times:g} times the best of {name}", ours >= times * peer, text))
    return out


def _latency(rounds: Sequence[Any]) -> list[Verdict]:
    out: list[Verdict] = []
    for share, bound in (("p50", 20.0), ("p99", 40.0)):
        found = _mean(rounds, "ours", "alone", share)
        if found is not None:
            out.append(
                Verdict(f"one workflow at a time: {share} at most {bound:g} ms", found <= bound, f"{found:.1f} ms")
            )
    for rate in ("0.1", "0.5"):
        ours, ideal = (_mean(rounds, s, "rates", rate, "p50") for s in ("ours", "ideal"))
        if ours is not None and ideal:
            goal = f"at {float(rate):.0%} of the knee: p50 at most 1.3 times the ideal's at the same rate"
            out.append(Verdict(goal, ours <= 1.3 * ideal, f"{ours / ideal:.2f} ({ours:.1f} to {ideal:.1f} ms)"))
    return out


def _growth(result: Mapping[str, Any]) -> list[Verdict]:
    out: list[Verdict] = []
    axes = at(result, "growth", "axes") or {}
    points = axes.get("ledger") or []
    if len(points) > 1:
        spent = [cpu_ms(p) for p in points]
        ratios = ", ".join(f"{s / spent[0]:.2f} at {p['x']:,}" for s, p in zip(spent, points, strict=True))
        flat = all(0.9 <= s / spent[0] <= 1.1 for s in spent)
        whole = points[0]["x"] <= 10_000 and points[-1]["x"] >= 1_000_000
        goal = "CPU a workflow flat within 10 % from 10⁴ to 10⁶ workflows in the ledger"
        out.append(Verdict(goal, flat if whole or not flat else None, ratios))
        wal = [p["cost"]["postgres"]["wal_bytes"] for p in points]
        ratios = ", ".join(f"{w / wal[0]:.2f} at {p['x']:,}" for w, p in zip(wal, points, strict=True))
        out.append(Verdict("WAL a workflow over the same (full pages after a checkpoint are in it)", None, ratios))
    busiest = at(result, "growth", "busiest")
    for name, points in axes.items():
        rates = {p["x"]: p["per_s"] for p in points}
        if name == f"replicas of {busiest}" and {1, 2} <= set(rates):
            text = f"{rates[2] / rates[1]:.2f} ({rates[2]:,.0f} to {rates[1]:,.0f} workflows/s)"
            goal = f"two replicas of the busiest service ({busiest}) beat one"
            out.append(Verdict(goal, rates[2] > rates[1], text))
    return out


def _memory(rounds: Sequence[Any]) -> list[Verdict]:
    """The last fifth of each series to the fifth in its middle: past the warm-up and the largest window."""
    worst: tuple[float, str] | None = None
    for pair in rounds:
        for service in SERVICES:
            series = at(pair, "ours", "memory_mb", service) or []
            fifth = len(series) // 5
            if fifth >= 5:
                ratio = median(series[-fifth:]) / median(series[2 * fifth : 3 * fifth])
                text = f"{ratio:.2f} ({service}: {series[2 * fifth]:.0f} → {series[-1]:.0f} MB)"
                worst = max(worst, (ratio, text)) if worst else (ratio, text)
    if worst is None:
        return []
    return [Verdict("memory of our services flat (10 %) over the run; the worst", worst[0] <= 1.1, worst[1])]


def _http(rounds: Sequence[Any]) -> list[Verdict]:
    out: list[Verdict] = []
    for key, what in (("http_alone", "intake alone"), ("http", "the whole mesh working them off meanwhile")):
        full, tail = _mean(rounds, "ours", key, "full", "per_s"), _mean(rounds, "ours", key, "half", "p99")
        rate = _mean(rounds, "ours", key, "half", "asked_per_s")
        if full is None or tail is None:
            continue
        goal = f"HTTP, {what}: at least {HTTP_PER_S:,.0f} facts/s acknowledged, p99 at most 50 ms at half of that"
        holds = full >= HTTP_PER_S and tail <= 50.0
        text = f"{full:,.0f}/s ({full / HTTP_PER_S:.2f}); p99 {tail:.0f} ms at {rate or full / 2:,.0f}/s"
        out.append(Verdict(goal, holds if key == "http_alone" else None, text))
    return out


def _plans(result: Mapping[str, Any]) -> list[Verdict]:
    out: list[Verdict] = []
    pinned, free = at(result, "plans", "pinned"), at(result, "plans", "free")
    if pinned is not None:
        bad = pinned["gone_bad"]
        worst = "none" if not bad else f"{len(bad)}, the worst {_bad(bad[0])}"
        out.append(
            Verdict("no statement planned on young tables costs three times as much on grown ones", not bad, worst)
        )
    if free is not None:
        bad = free["gone_bad"]
        worst = "it noticed nothing" if not bad else f"it named {len(bad)}, the worst {_bad(bad[0])}"
        out.append(Verdict("the check of plans notices it, were the plans not pinned", bool(bad), worst))
    return out


def _bad(one: Mapping[str, Any]) -> str:
    return f"{one['what'][:60]} … {one['young']:.3g} → {one['grown']:.3g} {one['unit']} a workflow"
