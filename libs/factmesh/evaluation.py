"""What an expression is to pure code: protocols, and templates whose whole-scalar `${ … }` were compiled once.
No expression language lives here; `factmesh.expressions` implements the protocols. Text from data is never compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from factmesh.document import Json, Path, path_text
from factmesh.errors import ExpressionError

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


@dataclass(frozen=True, slots=True)
class Template:
    """JSON-plain data in which some scalars are programs. Constants pass as they are, evaluated values too."""

    node: Json

    def evaluate(self, values: Mapping[str, Json]) -> Json:
        """The data with every program replaced by its value."""
        return _evaluate(self.node, values)


class _Compiled:
    """A program as a leaf of a template; a class of its own, so that no datum can be taken for one."""

    __slots__ = ("path", "program")

    def __init__(self, program: Program, path: Path) -> None:
        self.program = program
        self.path = path


def compile_template(node: Json, expressions: Expressions, variables: frozenset[str]) -> Template:
    """Compile every `${ … }` scalar of `node` once. Raises ExpressionError with the path inside the template."""
    return Template(_compile(node, expressions, variables, ()))


def _compile(node: Json, expressions: Expressions, variables: frozenset[str], path: Path) -> Json:
    if isinstance(node, str):
        try:
            text = expression_in(node)
            return node if text is None else _Compiled(expressions.compile(text, variables), path)
        except ExpressionError as error:
            raise _at(error, path) from None
    if isinstance(node, Mapping):
        return {key: _compile(value, expressions, variables, (*path, key)) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_compile(value, expressions, variables, (*path, i)) for i, value in enumerate(node)]
    return node


def _evaluate(node: Json, values: Mapping[str, Json]) -> Json:
    if isinstance(node, _Compiled):
        try:
            return node.program.evaluate(values)
        except ExpressionError as error:
            raise _at(error, node.path) from None
    if isinstance(node, dict):
        return {key: _evaluate(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_evaluate(value, values) for value in node]
    return node


def _at(error: ExpressionError, path: Path) -> ExpressionError:
    where = ", ".join(part for part in (path_text(path), error.where) if part)
    return ExpressionError(error.message, where=where, hint=error.hint)
