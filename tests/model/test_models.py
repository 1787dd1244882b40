"""The models say what the design promises: every rule followed, none is broken; one rule left out, its promise is.
The page that shows the counterexamples is held against them here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import pytest
from tests.model.catalogue import BEGIN, END, MODELS, PAGE, RULES, filled, report
from tests.model.explore import STATES_MAX, Model, explore
from tests.model.flags import BESIDES, FLAGS

SECONDS_MAX = 60
"""Of CPU, for everything here together; it takes a third of it."""
ROOT = PAGE.parents[1]


@pytest.mark.parametrize("name", MODELS)
def test_with_every_rule_no_promise_is_broken(name: str) -> None:
    """Issue 8.7, DESIGN 12: every state that the model can reach was visited, and each holds every promise."""
    seen = report(name)
    assert seen.violation is None, seen.violation.text()
    assert seen.complete
    assert 0 < seen.states < STATES_MAX
    assert seen.rests > 0


@pytest.mark.parametrize("name", MODELS)
def test_no_model_is_empty(name: str) -> None:
    """Issue 8.5: each action that a model knows happened at least once, and none happened that it does not list."""
    assert report(name).fired == MODELS[name].ACTIONS


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_without_the_rule_its_promise_is_broken(name: str, rule: str) -> None:
    """Issue 8.7: with this rule switched off, and no other, the model finds the violation that the rule prevents."""
    about, found = MODELS[name].RULES[rule], report(name, rule).violation
    assert found is not None, f"{about.says}: nothing breaks without it"
    assert found.promise == about.breaks, found.text()


def test_every_flagged_rule_is_a_switch() -> None:
    """Issue 8.7: each ⚑ of the design is at least one switch; a switch names a ⚑ of the list, or none."""
    named = {MODELS[name].RULES[rule].flag for name, rule in RULES}
    assert named - {""} == set(FLAGS)
    assert {part.flag for part in BESIDES} <= set(FLAGS)
    assert len({rule for _, rule in RULES}) == len(RULES), "a rule's name is its anchor on the page"


def test_every_rule_is_guarded_by_a_test_of_the_product() -> None:
    """Issue 8.7: beside its model each ⚑ has tests of the product itself, and what is no switch has one too."""
    for guard in [*(g for flag in FLAGS.values() for g in flag.guards), *(part.guard for part in BESIDES)]:
        path, _, test = guard.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), guard


def test_the_page_shows_what_the_models_find() -> None:
    """Issue 8.7, habit 10: the counterexamples on the page are those that are found today."""
    page = PAGE.read_text(encoding="utf-8")
    assert BEGIN in page
    assert END in page
    assert filled(page) == page, "run `python -m tests.model`"


def test_the_models_are_cheap() -> None:
    """Issue 8.7: all of it in under a minute on CI's machine."""
    reports = [*(report(name) for name in MODELS), *(report(name, rule) for name, rule in RULES)]
    assert sum(r.seconds for r in reports) < SECONDS_MAX


# --- the kernel itself -----------------------------------------------------------------------------------------------


class Counter(Model[int]):
    """Counts up to four by ones and twos; what it may not reach, and where it may not rest, is given."""

    NAME = "counter"
    ABOUT = "counts"
    ACTIONS: ClassVar[frozenset[str]] = frozenset({"one", "two", "back"})
    RULES: ClassVar = {}
    forbidden = -1
    restless = -1
    trapped = False

    def initial(self) -> Iterable[tuple[str, int]]:
        yield "at nothing", 0

    def moves(self, state: int) -> Iterable[tuple[str, str, int]]:
        if self.trapped and state >= 3:
            yield "back", "3 and 4 change places", 7 - state
            return
        if state < 4:
            yield "one", f"{state} and one", state + 1
        if state < 3:
            yield "two", f"{state} and two", state + 2

    def broken(self, state: int) -> str | None:
        return "INV-T: there" if state == self.forbidden else None

    def unrest(self, state: int) -> str | None:
        return "INV-R: restless" if state == self.restless else None


def test_the_kernel_finds_the_shortest_way() -> None:
    """Issue 8.5, distrust the checker: a planted violation is found, by the fewest steps, as readable sentences."""
    model = Counter()
    model.forbidden = 4
    found = explore(model).violation
    assert found is not None
    assert found.trace == ("0 and two", "2 and two")
    assert found.text() == "    at nothing\n 1. 0 and two\n 2. 2 and two\n ⇒  INV-T: there"


def test_the_kernel_looks_at_where_things_rest() -> None:
    """Issue 8.5: what may not be the end is told from what may be passed through."""
    model = Counter()
    model.restless = 2
    assert explore(model).violation is None
    model.restless = 4
    found = explore(model).violation
    assert found is not None
    assert found.promise == "INV-R"


def test_the_kernel_finds_a_loop_without_a_way_out() -> None:
    """Issue 8.5: a state from which nothing can come to rest any more is a violation, though each step looks right."""
    model = Counter()
    model.trapped = True
    found = explore(model).violation
    assert found is not None
    assert found.promise == "INV-L"


def test_the_kernel_never_passes_off_a_part_for_the_whole() -> None:
    """Issue 8.5: an exploration that was cut off says so."""
    assert explore(Counter()).complete
    assert not explore(Counter(), states_max=2).complete


def test_a_rule_that_is_not_there_cannot_be_switched_off() -> None:
    """Issue 8.5: a misspelt switch would be a test that cannot fail."""
    with pytest.raises(KeyError, match="has no rule"):
        Counter(("no-such-rule",))
