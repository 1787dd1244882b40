"""What an expression is to pure code: protocols, and templates whose whole-scalar `${ … }` were compiled once.
No expression language lives here; `factmesh.expressions` implements the protocols. Text from data is never compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from factmesh.document import Json, Path, path_text
from factmesh.errors import ExpressionError

Evaluate = Callable[[Mapping[str, Json]], Json]

_WHOLE = re.compile(r"\s*\$\{(.*)\}\s*", re.DOTALL)


class Program(Protocol):
    """A compiled expression."""

    @property
    def text(self) -> str: ...

    def evaluate(self, values: Mapping[str, Json]) -> Json:
        """The value over `values`. Raises ExpressionError, naming the expression and the field that is missing."""
        ...


class Expressions(Protocol):
    """A compiler of expressions, and a way to share the converted values among the expressions of one step."""

    def compile(self, text: str, variables: frozenset[str]) -> Program:
        """`variables` are the only names that `text` may use; `a.b` declares the member b of a, and no other."""
        ...

    def scope(self, values: Mapping[str, Json]) -> Mapping[str, Json]:
        """The same values, converted at most once for all the programs that are evaluated with the result."""
        ...


def expression_in(text: str) -> str | None:
    """The expression if the whole scalar is `${ … }`, else None. Raises ExpressionError where `${` stands inside text.

    There is no interpolation on purpose: `'${ "Dear " + input.name }'` says what it does, and is checked as a whole.
    """
    match = _WHOLE.fullmatch(text)
    if match is not None:
        return match.group(1).strip()
    if "${" in text:
        raise ExpressionError(
            f"${{ }} stands inside other text: {text[:120]!r}",
            hint="an expression is the whole value; join text inside it with +",
        )
    return None


def expressions_of(node: Json, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every expression in a template with its path, in the template's order."""
    if isinstance(node, str):
        found = expression_in(node)
        if found is not None:
            yield path, found
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from expressions_of(value, (*path, key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from expressions_of(value, (*path, index))


class Template:
    """JSON-plain data in which some scalars are programs. Constants pass as they are, evaluated values too."""

    __slots__ = ("evaluate",)

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        """The data with every program replaced by its value, over the values given. Raises ExpressionError."""


def compile_template(node: Json, expressions: Expressions, variables: frozenset[str]) -> Template:
    """Compile every `${ … }` scalar of `node` once. Raises ExpressionError with the path inside the template."""
    return Template(_compile(node, expressions, variables, ()))


def _compile(node: Json, expressions: Expressions, variables: frozenset[str], path: Path) -> Evaluate:
    if isinstance(node, str):
        try:
            text = expression_in(node)
            return _constant(node) if text is None else _program(expressions.compile(text, variables), path)
        except ExpressionError as error:
            raise _at(error, path) from None
    if isinstance(node, Mapping):
        return _map({key: _compile(value, expressions, variables, (*path, key)) for key, value in node.items()})
    if isinstance(node, list | tuple):
        return _list([_compile(value, expressions, variables, (*path, i)) for i, value in enumerate(node)])
    return _constant(node)


def _constant(value: Json) -> Evaluate:
    return lambda _values: value


def _program(program: Program, path: Path) -> Evaluate:
    def evaluate(values: Mapping[str, Json]) -> Json:
        try:
            return program.evaluate(values)
        except ExpressionError as error:
            raise _at(error, path) from None

    return evaluate


def _map(items: Mapping[str, Evaluate]) -> Evaluate:
    pairs = tuple(items.items())
    return lambda values: {key: of(values) for key, of in pairs}


def _list(items: Sequence[Evaluate]) -> Evaluate:
    return lambda values: [of(values) for of in items]


def _at(error: ExpressionError, path: Path) -> ExpressionError:
    where = ", ".join(part for part in (path_text(path), error.where) if part)
    return ExpressionError(error.message, where=where, hint=error.hint)
