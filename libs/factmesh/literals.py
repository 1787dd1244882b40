"""Expressions that only select fields and spell out maps, lists and constants of them, answered by plain Python.
Nothing is judged or worded here: what is not plainly the value that CEL would give is `NOT_PLAIN`, and CEL is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from factmesh.document import Json

__all__ = ["NOT_PLAIN", "Bounds", "Plain", "plain_of"]


class NotPlain:
    """Stands for `CEL has to say`; no datum can be taken for it."""


NOT_PLAIN: Final = NotPlain()

Plain = Callable[[Mapping[str, Json]], Json | NotPlain]
"""The value over some values; it may share parts of them, so nobody writes into it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a value may weigh: the same bounds that hold for CEL's answers."""

    nodes: int
    chars: int
    depth: int


_TOKEN = re.compile(
    r"""[ \t\r\n]*(?: (?P<name>[a-zA-Z_][a-zA-Z0-9_]*(?:\.[a-zA-Z_][a-zA-Z0-9_]*)*)
                    | (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?)
                    | (?P<text>"[^"\\\x00-\x1f]*"|'[^'\\\x00-\x1f]*')
                    | (?P<mark>[][{},:])
                    | (?P<end>\Z) )""",
    re.VERBOSE,
)
_WORDS: Final = {"true": True, "false": False, "null": None}
_INT_MAX: Final = 1 << 63


class _Elsewhere(Exception):
    """The text is more than a literal of selections: CEL's."""


def plain_of(text: str, bounds: Bounds) -> Plain | None:
    """The short way of an expression that CEL has compiled already; None for one that only CEL can evaluate."""
    try:
        tokens = _tokens(text)
        # Each selection gets an equal share, so that all together stay within the bounds without counting as they go.
        leaves = sum(kind == "name" for kind, _ in tokens) or 1
        share = Bounds((bounds.nodes - len(tokens)) // leaves, (bounds.chars - len(text)) // leaves, bounds.depth)
        reader = _Reader(tokens, share)
        made = reader.value(0)
        reader.take("end")
        return made
    except _Elsewhere:
        return None


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while not tokens or tokens[-1][0] != "end":
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise _Elsewhere
        tokens.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return tokens


class _Reader:
    """Reads tokens as one value."""

    def __init__(self, tokens: list[tuple[str, str]], share: Bounds) -> None:
        self._tokens = tokens
        self._share = share
        self._at = 0

    def take(self, *wanted: str) -> str:
        """The next token, of a wanted kind or, of a mark, as wanted."""
        kind, text = self._tokens[self._at]
        if kind not in wanted and not (kind == "mark" and text in wanted):
            raise _Elsewhere
        self._at += 1
        return text

    def value(self, depth: int) -> Plain:
        if depth >= self._share.depth:
            raise _Elsewhere
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == "name":
            return _constant(_WORDS[text]) if text in _WORDS else _selection(text, self._share, depth)
        if kind == "text":
            return _constant(text[1:-1])
        if kind == "number":
            return _constant(_number(text))
        if text == "{":
            return self._map(depth)
        if text == "[":
            return self._list(depth)
        raise _Elsewhere

    def _map(self, depth: int) -> Plain:
        items: dict[str, Plain] = {}
        if self._tokens[self._at] == ("mark", "}"):
            self._at += 1
            return _map(items)
        while True:
            key = self.take("text")[1:-1]
            if key in items:
                raise _Elsewhere  # an error, which CEL words
            self.take(":")
            items[key] = self.value(depth + 1)
            if self.take(",", "}") == "}":
                return _map(items)

    def _list(self, depth: int) -> Plain:
        items: list[Plain] = []
        if self._tokens[self._at] == ("mark", "]"):
            self._at += 1
            return _list(items)
        while True:
            items.append(self.value(depth + 1))
            if self.take(",", "]") == "]":
                return _list(items)


def _number(text: str) -> int | float:
    if "." in text:
        number = float(text)
        if not math.isfinite(number):
            raise _Elsewhere
        return number
    if not -_INT_MAX <= int(text) < _INT_MAX:
        raise _Elsewhere
    return int(text)


def _constant(value: Json) -> Plain:
    return lambda _values: value


def _map(items: Mapping[str, Plain]) -> Plain:
    pairs = tuple(items.items())

    def evaluate(values: Mapping[str, Json]) -> Json | NotPlain:
        made = {}
        for key, of in pairs:
            value = of(values)
            if value is NOT_PLAIN:
                return NOT_PLAIN
            made[key] = value
        return made

    return evaluate


def _list(items: list[Plain]) -> Plain:
    def evaluate(values: Mapping[str, Json]) -> Json | NotPlain:
        made = [of(values) for of in items]
        return NOT_PLAIN if NOT_PLAIN in made else made

    return evaluate


def _selection(text: str, share: Bounds, depth: int) -> Plain:
    first, *rest = text.split(".")
    path = tuple(rest)
    chars_max = share.chars

    def evaluate(values: Mapping[str, Json]) -> Json | NotPlain:
        here = values.get(first, NOT_PLAIN)
        for name in path:
            if type(here) is not dict:
                return NOT_PLAIN
            here = here.get(name, NOT_PLAIN)
        kind = type(here)
        if kind is str:
            plain = len(here) <= chars_max and _is_text(here)
        elif kind is int:
            plain = -_INT_MAX <= here < _INT_MAX
        elif kind is dict or kind is list:
            plain = _Weighed(share).holds(here, depth)
        else:
            plain = kind is bool or here is None or (kind is float and math.isfinite(here))
        return here if plain else NOT_PLAIN

    return evaluate


def _is_text(text: str) -> bool:
    """Whether CEL carries it whole: no NUL, at which its binding cuts, and no lone surrogate."""
    if "\x00" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Weighed:
    """Goes through a map or list once: JSON-plain, and within its share."""

    __slots__ = ("chars", "depth", "nodes")

    def __init__(self, share: Bounds) -> None:
        self.nodes, self.chars, self.depth = share.nodes, share.chars, share.depth

    def holds(self, value: Json, depth: int) -> bool:
        self.nodes -= 1
        if self.nodes < 0:
            return False
        kind = type(value)
        if kind is str:
            self.chars -= len(value)
            return self.chars >= 0 and _is_text(value)
        if kind is int:
            return bool(-_INT_MAX <= value < _INT_MAX)
        if kind is dict:
            return depth < self.depth and all(
                type(key) is str and self.holds(key, depth) and self.holds(inner, depth + 1)
                for key, inner in value.items()
            )
        if kind is list:
            return depth < self.depth and all(self.holds(inner, depth + 1) for inner in value)
        return kind is bool or value is None or (kind is float and math.isfinite(value))
