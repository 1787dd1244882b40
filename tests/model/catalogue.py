"""All models, each explored at most once a process, and the generated part of `docs/reliability-model.md`.
No model lives here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.model.batch_lock import BatchLock
from tests.model.batch_publish import BatchPublish
from tests.model.claim import Claim
from tests.model.commands import Commands
from tests.model.early import Early
from tests.model.endings import Endings
from tests.model.explore import Model, Report, explore
from tests.model.flags import BESIDES, FLAGS
from tests.model.identity import Identity
from tests.model.openings import Openings
from tests.model.order import Clocks, Order
from tests.model.parks import Parks

MODELS: dict[str, type[Model[Any]]] = {
    model.NAME: model
    for model in (
        BatchLock, BatchPublish, Claim, Openings, Parks, Commands, Early, Endings, Identity, Order, Clocks,
    )
}  # fmt: skip
RULES = [(name, rule) for name, model in MODELS.items() for rule in model.RULES]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability-model.md"
BEGIN, END = "<!-- model: begin -->\n", "<!-- model: end -->"


@cache
def report(name: str, rule: str | None = None) -> Report:
    """What exploring this model finds, with every rule followed or with one switched off."""
    return explore(MODELS[name](() if rule is None else (rule,)))


def filled(page: str) -> str:
    """The page with its generated part written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(line + "\n" for line in _generated()) + END + after


def _generated() -> Iterator[str]:
    yield "## The rules, and where they are modelled"
    yield ""
    yield "| ⚑ | DESIGN | rule | switches (model: rule) | tests of the product |"
    yield "|---|---|---|---|---|"
    for short, flag in FLAGS.items():
        switches = [f"[{m}: {r}](#{r})" for m, r in RULES if MODELS[m].RULES[r].flag == short]
        guards = "<br>".join(f"`{g}`" for g in flag.guards)
        yield f"| {short} | {flag.section} | {flag.says} | {'<br>'.join(switches)} | {guards} |"
    yield ""
    yield "Parts of ⚑ rules that no switch stands for:"
    yield ""
    yield "| ⚑ | part | why it is no switch | test of the product |"
    yield "|---|---|---|---|"
    for part in BESIDES:
        yield f"| {part.flag} | {part.what} | {part.why} | `{part.guard}` |"
    yield ""
    yield "## The models"
    yield ""
    yield "| model | states | rules | explored completely, all rules followed |"
    yield "|---|---|---|---|"
    for name, model in MODELS.items():
        seen = report(name)
        verdict = "no promise is broken" if seen.complete and seen.violation is None else "**BROKEN**"
        yield f"| [{name}](#model-{name}) | {seen.states:,} | {len(model.RULES)} | {verdict} |"
    for name, model in MODELS.items():
        yield ""
        yield f"## Model {name}"
        yield ""
        yield model.ABOUT
        for rule, about in model.RULES.items():
            violation = report(name, rule).violation
            yield ""
            yield f"### {rule}"
            yield ""
            mark = f" (⚑ {about.flag})" if about.flag else ""
            yield f"The rule{mark}: {about.says}. Switched off: {about.off}."
            yield ""
            yield "```text"
            yield violation.text() if violation is not None else "nothing was found"
            yield "```"
    yield ""
