"""The gateway to CEL (cel-expr-python): compiles expressions once, evaluates them over JSON-plain data, bounds both.
Every error that CEL hands back as a value is raised here, and no message repeats data; nobody else imports the vendor.

Numbers keep the kind that they have in the data: an integer is a CEL int (64 bits), a number with a point or exponent
a CEL double. Comparison works across the two (`input.a == 1.0`), arithmetic does not (`input.a * 1.5` is an error):
write `double(input.a) * 1.5`. `/` between ints is integer division. A double stays one in the result (`2.0`), a uint
becomes an int; timestamps, durations, bytes, NaN and infinities are not JSON: turn them into text or a number first.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from cel_expr_python import cel

from factmesh.document import Json
from factmesh.errors import ExpressionError
from factmesh.evaluation import Expressions, Program, compile_template, expression_in
from factmesh.literals import NOT_PLAIN, Bounds, plain_of

__all__ = [
    "CelExpressions",
    "CelProgram",
    "Scope",
    "default_expressions",
    "evaluate_template",
    "expression_chars_max",
    "expression_in",
]

#: A longer one is a program, and belongs into a connector.
expression_chars_max = 2_000
#: Set inside cel-expr-python, found by trying; the tests hold them, so that an upgrade that lifts them is seen.
expression_depth_max = 32
iterations_max = 10_000
#: What an evaluation may give back: far above a declared input or output, far below what hurts.
result_nodes_max = 20_000
result_chars_max = 1_000_000
result_depth_max = 32
#: Bounds of the caches; definitions are few, and a full cache only compiles again.
programs_max = 4_096
environments_max = 256

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*(\.[a-zA-Z_][a-zA-Z0-9_]*)?")
_LITERAL = re.compile(r"\"(\\.|[^\"\\])*\"|'(\\.|[^'\\])*'", re.DOTALL)
_UNDECLARED = re.compile(r"undeclared reference to '([^']+)'")
_MISSING_KEY = re.compile(r'Key not found in map : "(.*)"', re.DOTALL)
_NO_VALUE = re.compile(r'No value with name "([\w.]+)" found')
_OVERLOAD = re.compile(r"No matching overloads found : ([^\s(]+)(\([\w, ]*\))?")
_PLAIN_TYPES = frozenset({"BOOL", "INT", "DOUBLE", "STRING", "NULL", "UINT"})
_KINDS = {"int64": "int", "uint64": "uint", "null_type": "null"}


class Scope(dict[str, Json]):
    """Values for the expressions of one step; CEL's own form of them is made at most once a set of declared members."""

    __slots__ = ("_activate", "_activations")

    def __init__(self, values: Mapping[str, Json], activate: Callable[[dict[str, Json]], Any]) -> None:
        super().__init__(values)
        self._activate = activate
        self._activations: dict[frozenset[str], Any] = {}

    def activation(self, owners: frozenset[str]) -> Any:
        """CEL's form of the values, in which each member of an owner (`steps`) is a variable (`steps.verify`)."""
        found = self._activations.get(owners)
        if found is None:
            flat: dict[str, Json] = {}
            for name, value in self.items():
                if name not in owners:
                    flat[name] = value
                elif isinstance(value, Mapping):
                    flat.update({f"{name}.{member}": inner for member, inner in value.items()})
            _refuse_nul(flat)
            found = self._activations[owners] = self._activate(flat)
        return found


class CelProgram:
    """A compiled expression; made by `CelExpressions.compile`.

    Most expressions only select fields, or spell out a map of such (`factmesh.literals`): where every value is there
    and plain, CEL's own form of the whole scope is not made; everything else is CEL's to judge and word.
    """

    __slots__ = ("_expression", "_owners", "_plain", "_scope", "text")

    def __init__(
        self, text: str, expression: Any, owners: frozenset[str], scope: Callable[[Mapping[str, Json]], Scope]
    ) -> None:
        self.text = text
        self._expression = expression
        self._owners = owners
        self._scope = scope
        self._plain = plain_of(text, Bounds(result_nodes_max, result_chars_max, result_depth_max))

    def evaluate(self, values: Mapping[str, Json]) -> Json:
        """The value over `values` (a Scope to share their conversion). Raises ExpressionError."""
        if self._plain is not None:
            plain = self._plain(values)
            if plain is not NOT_PLAIN:
                return plain
        scope = values if isinstance(values, Scope) else self._scope(values)
        try:
            value = self._expression.eval(scope.activation(self._owners))
            kind = value.type()
            if kind == cel.Type.ERROR:
                raise _failed(self.text, str(value.plain_value()))
            if kind.name() in _PLAIN_TYPES:
                return _finite(self.text, value.plain_value())
            return _Reader(self.text).read(value, 0)
        except (RuntimeError, TypeError, ValueError, OverflowError, UnicodeError) as error:
            raise _failed(self.text, str(error)) from None

    def __repr__(self) -> str:
        return f"CelProgram({self.text!r})"


class CelExpressions:
    """Implements `factmesh.evaluation.Expressions`. One per process is enough; threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._base = cel.NewEnv(variables={})
        self._environments: OrderedDict[frozenset[str], Any] = OrderedDict()
        self._programs: OrderedDict[tuple[str, frozenset[str]], CelProgram] = OrderedDict()

    def compile(self, text: str, variables: frozenset[str]) -> Program:
        """Compile `text`, which may use `variables` only. Raises ExpressionError saying where it is wrong."""
        key = (text, variables)
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
                return program
            program = self._compile(text, variables)
            self._programs[key] = program
            while len(self._programs) > programs_max:
                self._programs.popitem(last=False)
            return program

    def scope(self, values: Mapping[str, Json]) -> Scope:
        """The same values, converted at most once for all the programs that share the result."""
        return values if isinstance(values, Scope) else Scope(values, self._base.Activation)

    def _compile(self, text: str, variables: frozenset[str]) -> CelProgram:
        if not text:
            raise ExpressionError("the expression is empty", where="`${ }`", hint="write one, or remove it")
        if len(text) > expression_chars_max:
            raise ExpressionError(
                f"is longer than {expression_chars_max} characters",
                where=_named(text),
                hint="split it over steps, or do the work in a connector",
            )
        _refuse_has(text, variables)
        try:
            expression = self._environment(variables).compile(text)
        except (RuntimeError, ValueError, TypeError, UnicodeError) as error:
            raise _not_compiled(text, str(error), variables) from None
        owners = frozenset(name.split(".")[0] for name in variables if "." in name)
        return CelProgram(text, expression, owners, self.scope)

    def _environment(self, variables: frozenset[str]) -> Any:
        found = self._environments.get(variables)
        if found is None:
            for name in variables:
                if not _NAME.fullmatch(name):
                    raise ExpressionError(f"{name!r} cannot be a variable", hint="use letters, digits and _")
            found = self._environments[variables] = cel.NewEnv(variables=dict.fromkeys(variables, cel.Type.DYN))
            while len(self._environments) > environments_max:
                self._environments.popitem(last=False)
        return found


_default: CelExpressions | None = None


def default_expressions() -> CelExpressions:
    """The process's compiler, made at the first use."""
    global _default
    if _default is None:
        _default = CelExpressions()
    return _default


def evaluate_template(node: Json, values: Mapping[str, Json], expressions: Expressions | None = None) -> Json:
    """Evaluate every whole-scalar `${ … }` of a template that people wrote; never call it with data as `node`."""
    engine = expressions or default_expressions()
    return compile_template(node, engine, frozenset(values)).evaluate(engine.scope(values))


class _Reader:
    """Turns CEL lists and maps into JSON-plain data, piece by piece, and stops at the bounds before memory does."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.nodes = 0
        self.chars = 0

    def read(self, value: Any, depth: int) -> Json:
        kind = value.type().name()
        self._count(1, 0)
        if kind in _PLAIN_TYPES:
            plain = _finite(self.text, value.plain_value())
            if isinstance(plain, str):
                self._count(0, len(plain))
            return plain
        if depth >= result_depth_max:
            raise self._error(f"its value is nested deeper than {result_depth_max} levels", "flatten the result")
        if kind.startswith("LIST"):
            return [self.read(item, depth + 1) for item in value.value()]
        if kind.startswith("MAP"):
            return {self._key(key): self.read(item, depth + 1) for key, item in value.value().items()}
        if kind == "ERROR":
            raise _failed(self.text, str(value.plain_value()))
        raise self._error(f"its value holds a {kind.lower()}, which JSON has not", "wrap it: string(…) or int(…)")

    def _key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise self._error("its value has a key that is not text", "write the keys as strings")
        self._count(0, len(key))
        return key

    def _count(self, nodes: int, chars: int) -> None:
        self.nodes += nodes
        self.chars += chars
        if self.nodes > result_nodes_max or self.chars > result_chars_max:
            raise self._error(
                f"its value is larger than {result_nodes_max} values or {result_chars_max} characters",
                "keep only the fields that later steps need",
            )

    def _error(self, message: str, hint: str) -> ExpressionError:
        return ExpressionError(message, where=_named(self.text), hint=hint)


def _refuse_nul(values: Json) -> None:
    """The vendor cuts a text from Python at U+0000 without a word: `"refused\\0x"` would equal `"refused"`."""
    rest: list[Json] = [values]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            if "\x00" in value:
                raise ValueError("NUL in a text")
        elif isinstance(value, Mapping):
            rest.extend(value)
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)


def _finite(text: str, plain: Json) -> Json:
    if isinstance(plain, float) and not math.isfinite(plain):
        raise ExpressionError("its value is not a finite number", where=_named(text), hint="guard the division")
    if isinstance(plain, str) and len(plain) > result_chars_max:
        raise ExpressionError(f"its value is longer than {result_chars_max} characters", where=_named(text))
    return plain


def _named(text: str) -> str:
    """The expression as errors name it."""
    shown = " ".join(text.split())
    return f"`{shown if len(shown) <= 160 else shown[:157] + '…'}`"


def _refuse_has(text: str, variables: frozenset[str]) -> None:
    """CEL takes `has(steps.verify)` for the variable itself where `steps.verify` is declared, and gives no bool."""
    bare = _LITERAL.sub('""', text)
    for name in variables:
        if "." in name and re.search(rf"\bhas\s*\(\s*{re.escape(name)}\s*\)", bare):
            raise ExpressionError(
                f"has({name}) is always true here", where=_named(text), hint=f"test a field: has({name}.field)"
            )


def _not_compiled(text: str, problem: str, variables: frozenset[str]) -> ExpressionError:
    names = list(dict.fromkeys(_UNDECLARED.findall(problem)))
    if names:
        known = ", ".join(sorted(variables)) or "none"
        return ExpressionError(
            f"knows no {' and no '.join(names)}", where=_named(text), hint=f"names that may be used here: {known}"
        )
    if "recursion" in problem:
        return ExpressionError(
            f"is nested deeper than {expression_depth_max} levels", where=_named(text), hint="split it over steps"
        )
    found = re.search(r"<input>:(\d+):(\d+): (.*)", problem)
    if found is None:
        return ExpressionError("does not compile", where=_named(text), hint="see the CEL language definition")
    line, column, what = found.groups()
    what = re.sub(r" expecting \{.*", "", what)
    hint = "one ${ } holds one expression" if "${" in text else "see the CEL language definition"
    return ExpressionError(f"does not compile at {line}:{column}: {what}", where=_named(text), hint=hint)


def _failed(text: str, problem: str) -> ExpressionError:
    """A message for people from CEL's own, without anything that came from data."""
    where = _named(text)
    if found := _MISSING_KEY.search(problem):
        key = found.group(1)
        # A computed key is data; only one that the expression itself spells out may be repeated.
        shown = f"field {key!r}" if re.search(rf"\b{re.escape(key)}\b", text) else "a computed key"
        return ExpressionError(f"{shown} is missing", where=where, hint="test it with has(…) where it may be absent")
    if found := _NO_VALUE.search(problem):
        return ExpressionError(f"{found.group(1)} has no value", where=where, hint="it was not set before this step")
    if found := _OVERLOAD.search(problem):
        operator, operands = found.group(1).strip("_"), found.group(2) or ""
        if operator == "<jump_condition>":
            return ExpressionError("a condition is not a bool", where=where, hint="compare: x == true, x != null")
        for cel_name, name in _KINDS.items():
            operands = operands.replace(cel_name, name)
        hint = "convert one side: double(…), int(…), string(…)"
        return ExpressionError(f"{operator} does not take {operands or 'these values'}", where=where, hint=hint)
    known = (
        ("Iteration budget", f"needs more than {iterations_max} iterations", "filter earlier, or nest fewer macros"),
        ("Index error", "a list index is out of range", "test size(…) first"),
        ("divide by zero", "divides by zero", "guard the division"),
        ("modulus by zero", "divides by zero", "guard the division"),
        ("overflow", "a number overflows 64 bits", "use double(…)"),
        ("Integer value", "a value is an integer beyond 64 bits", "send it as text"),
        ("non-message type", "a field is asked of something that is not a map", "test with has(…) or != null"),
        ("Non-CEL value", "a value is not JSON-plain", "pass null, bool, number, text, lists and maps only"),
        ("NUL in a text", "a value holds the character U+0000", "remove it where the data comes from"),
        ("construction from null", "a text is not valid Unicode", "send text without lone surrogates"),
    )
    for sign, message, hint in known:
        if sign in problem:
            return ExpressionError(message, where=where, hint=hint)
    code = re.match(r"[A-Z_]+(?=:)", problem)
    return ExpressionError(f"cannot be evaluated{f' ({code.group()})' if code else ''}", where=where)
