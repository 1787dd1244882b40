"""The kernel of every model: breadth first over all states, with the shortest way to a broken promise as sentences.
No model and no rule lives here, and nothing is drawn: the same model always gives the same answer.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import process_time
from typing import ClassVar, Generic, TypeVar

S = TypeVar("S", bound=Hashable)

STATES_MAX = 400_000
"""A model past this is too large for CI: make it smaller, it will still find what it is for."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the design as a switch.

    Attributes:
        flag: which ⚑ rule of the design it is part of (`flags.FLAGS`), or "" for a rule that has no ⚑.
        says: the rule, in one line.
        off: what is done instead when it is switched off.
        breaks: the promise that is broken then.
    """

    flag: str
    says: str
    off: str
    breaks: str


class Model(Generic[S]):
    """A model: where it starts, what may happen next, and what must hold. `off` are the rules that are not followed."""

    NAME: ClassVar[str]
    #: What the model is about, for the page.
    ABOUT: ClassVar[str]
    RULES: ClassVar[Mapping[str, Rule]]
    #: Every action by name; each must be seen at least once, or the model is emptier than it looks.
    ACTIONS: ClassVar[frozenset[str]]

    def __init__(self, off: Iterable[str] = ()) -> None:
        self.off = frozenset(off)
        unknown = self.off - self.RULES.keys()
        if unknown:
            raise KeyError(f"model {self.NAME} has no rule {sorted(unknown)}")

    def on(self, rule: str) -> bool:
        """Whether this rule is followed."""
        return rule not in self.off

    def initial(self) -> Iterable[tuple[str, S]]:
        """The worlds it begins in: a sentence and a state each."""
        raise AssertionError

    def moves(self, state: S) -> Iterable[tuple[str, str, S]]:
        """What may happen now: (action, sentence, state after it)."""
        raise AssertionError

    def broken(self, state: S) -> str | None:
        """Which promise this state breaks (`INV-X: why`), or None."""
        raise AssertionError

    def unrest(self, state: S) -> str | None:
        """Of a state after which nothing more happens: why it may not rest so, or None."""
        raise AssertionError


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise and the shortest way there."""

    world: str
    trace: tuple[str, ...]
    promise: str
    why: str

    def text(self) -> str:
        """As people read it."""
        lines = [f"{n:2}. {line}" for n, line in enumerate(self.trace, start=1)]
        return "\n".join([f"    {self.world}", *lines, f" ⇒  {self.promise}: {self.why}"])


@dataclass(frozen=True, slots=True)
class Report:
    """What an exploration saw; `seconds` are of CPU. `complete`: every reachable state was visited."""

    states: int
    moves: int
    rests: int
    seconds: float
    fired: frozenset[str]
    complete: bool
    violation: Violation | None


def explore(model: Model[S], states_max: int = STATES_MAX) -> Report:
    """Every state, nearest first, up to the first that breaks a promise.

    Three kinds of promise: what holds in every state, what holds where everything has come to rest, and that from
    every state everything can still come to rest (no endless loop without a way out).
    """
    began = process_time()
    search = _Search(model)
    collects = gc.isenabled()
    gc.disable()  # states are tuples without cycles: looking through hundreds of thousands of them costs a third
    try:
        complete = search.run(states_max)
    finally:
        if collects:
            gc.enable()
    return Report(
        len(search.states),
        len(search.arrows),
        len(search.rests),
        process_time() - began,
        frozenset(search.fired),
        complete,
        search.violation,
    )


class _Search(Generic[S]):
    def __init__(self, model: Model[S]) -> None:
        self.model = model
        self.known: dict[S, int] = {}
        self.states: list[S] = []
        self.came_by: list[tuple[int, str]] = []
        self.arrows: list[tuple[int, int]] = []
        self.rests: list[int] = []
        self.fired: set[str] = set()
        self.violation: Violation | None = None

    def run(self, states_max: int) -> bool:
        """Until everything is seen, a promise is broken, or the model is too large; whether everything was seen."""
        for world, state in self.model.initial():
            self.add(state, -1, world)
        index = 0
        while index < len(self.states) and self.violation is None and len(self.states) <= states_max:
            self.expand(index)
            index += 1
        complete = self.violation is None and index == len(self.states)
        if complete:
            self.look_for_a_trap()
        return complete

    def add(self, state: S, parent: int, sentence: str) -> int:
        index = self.known.get(state)
        if index is not None:
            return index
        index = self.known[state] = len(self.states)
        self.states.append(state)
        self.came_by.append((parent, sentence))
        if self.violation is None and (why := self.model.broken(state)) is not None:
            self.found(index, why)
        return index

    def expand(self, index: int) -> None:
        state, rests = self.states[index], True
        for action, sentence, after in self.model.moves(state):
            self.fired.add(action)
            if after == state:
                continue
            rests = False
            self.arrows.append((index, self.add(after, index, sentence)))
        if rests:
            self.rests.append(index)
            if self.violation is None and (why := self.model.unrest(state)) is not None:
                self.found(index, why)

    def look_for_a_trap(self) -> None:
        """Backwards from the states at rest: what is not reached so can never come to rest."""
        before: dict[int, list[int]] = {}
        for source, target in self.arrows:
            before.setdefault(target, []).append(source)
        reached, todo = set(self.rests), list(self.rests)
        while todo:
            for source in before.get(todo.pop(), ()):
                if source not in reached:
                    reached.add(source)
                    todo.append(source)
        trap = next((i for i in range(len(self.states)) if i not in reached), None)
        if trap is not None:
            self.found(trap, "INV-L: from here nothing ever comes to rest, whatever happens")

    def found(self, index: int, why: str) -> None:
        sentences: list[str] = []
        at = index
        while at >= 0:
            at, sentence = self.came_by[at]
            sentences.append(sentence)
        promise, _, text = why.partition(": ")
        self.violation = Violation(sentences[-1], tuple(reversed(sentences[:-1])), promise, text)


def replaced(items: Sequence[S], index: int, item: S) -> tuple[S, ...]:
    """The items with one of them exchanged."""
    return (*items[:index], item, *items[index + 1 :])
