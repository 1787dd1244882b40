"""Promises of the expression gateway: bounded, compiled once, every error raised, and no datum ever evaluated."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh import expressions as gateway
from factmesh.errors import ErrorClass, ExpressionError, FactmeshError
from factmesh.evaluation import compile_template, expression_in, expressions_of
from factmesh.expressions import CelExpressions, evaluate_template

VARIABLES = frozenset({"input", "steps.verify"})
VALUES: dict[str, Any] = {
    "input": {"n": 1, "x": 2.5, "s": "text", "l": [1, 2, {"k": 3}], "t": True, "none": None, "m": {"Jo Doe": 1}},
    "steps": {"verify": {"verdict": "ok"}},
}


@pytest.fixture(scope="module")
def cel() -> CelExpressions:
    return CelExpressions()


def failing(cel: CelExpressions, text: str, values: dict[str, Any] = VALUES) -> str:
    """The text of the error; compiling must work."""
    program = cel.compile(text, VARIABLES)
    with pytest.raises(ExpressionError) as caught:
        program.evaluate(values)
    assert caught.value.error_class is ErrorClass.VALIDATION
    return str(caught.value)


def not_compiling(cel: CelExpressions, text: str) -> str:
    with pytest.raises(ExpressionError) as caught:
        cel.compile(text, VARIABLES)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("input.n + 1", 2),
        ("input.x", 2.5),
        ("2.0 * 1.0", 2.0),
        ("input.n == 1.0", True),
        ("input.x > 2", True),
        ("input.n / 2", 0),
        ("double(input.n) * 1.5", 1.5),
        ("7u", 7),
        ("[7u]", [7]),
        ("input.none", None),
        ("input.l.filter(i, i == 1)", [1]),
        ('{"a": input.n, "b": [input.none]}', {"a": 1, "b": [None]}),
        ("has(input.gone) ? 1 : 2", 2),
        ("has(steps.verify.verdict)", True),
        ('steps.verify.verdict == "ok"', True),
        ('"Dear " + input.s', "Dear text"),
        ("input.gone || true", True),
    ],
)
def test_values_and_kinds_of_numbers(cel: CelExpressions, text: str, value: object) -> None:
    """B3: int and double keep the kind that they have in the data; comparison crosses it, the result is plain JSON."""
    result = cel.compile(text, VARIABLES).evaluate(VALUES)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("input.gone", "`input.gone`: field 'gone' is missing (test it with has(…)"),
        ("steps.verify.gone.deeper", "field 'gone' is missing"),
        ("[input.gone]", "field 'gone' is missing"),
        ('{"a": input.gone}', "field 'gone' is missing"),
        ("input.l.map(i, i.gone)", "is not a map"),
        ("input.none.x", "is not a map"),
        ("input.l[9]", "a list index is out of range"),
        ("1 / 0", "divides by zero"),
        ("input.n % 0", "divides by zero"),
        ("9223372036854775807 + input.n", "overflows 64 bits"),
        ("input.n * 1.5", "* does not take (int, double) (convert one side: double(…)"),
        ("input.n ? 1 : 2", "a condition is not a bool"),
        ("0.0 / 0.0", "not a finite number"),
        ("[1.0 / 0.0]", "not a finite number"),
        ('timestamp("2026-01-01T00:00:00Z")', "timestamp, which JSON has not (wrap it: string(…)"),
        ('[duration("1h")]', "duration, which JSON has not"),
        ('b"x"', "bytes, which JSON has not"),
        ("type(1)", "which JSON has not"),
        ("{1: 2}", "a key that is not text"),
        ('int("x")', "cannot be evaluated (INVALID_ARGUMENT)"),
    ],
)
def test_errors_that_cel_returns_as_values_are_raised(cel: CelExpressions, text: str, what: str) -> None:
    """B3: an error value is never taken for a result; the text names the expression and what to do."""
    message = failing(cel, text)
    assert what in message
    assert message.startswith("`")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the expression is empty"),
        ("input.n +", "does not compile at 1:"),
        ("foo.bar", "knows no foo.bar (names that may be used here: input, steps.verify)"),
        ("steps.other.x", "knows no steps.other.x"),
        ("steps", "knows no steps"),
        ('steps["verify"]', "knows no steps"),
        ("env()", "knows no env"),
        ("1 + 'a'", "does not compile"),
        ("has(steps.verify)", "always true here (test a field: has(steps.verify.field))"),
        ("a }-${ b", "one ${ } holds one expression"),
    ],
)
def test_what_does_not_compile_is_refused_before_it_runs(cel: CelExpressions, text: str, what: str) -> None:
    """B1: syntax and names are checked when the definition is loaded, not when an instance reaches the step."""
    assert what in not_compiling(cel, text)


def test_length_and_depth_are_bounded(cel: CelExpressions) -> None:
    """B3: an expression past its bounds is refused, and one at the bound is not."""
    at_bound = '"' + "x" * (gateway.expression_chars_max - 2) + '"'
    assert cel.compile(at_bound, VARIABLES).evaluate(VALUES) == at_bound[1:-1]
    assert f"longer than {gateway.expression_chars_max}" in not_compiling(cel, at_bound + " ")
    assert "nested deeper than" in not_compiling(cel, "(" * 60 + "1" + ")" * 60)
    assert "nested deeper than" in not_compiling(cel, "+".join(["1"] * 200))
    assert "nested deeper than" in not_compiling(cel, "input" + ".a" * 200)


def test_iterations_are_bounded(cel: CelExpressions) -> None:
    """B3: nested macros over large data stop at the budget, soon, whatever the data."""
    values = {**VALUES, "input": {"l": list(range(1000))}}
    began = time.perf_counter()
    message = failing(cel, "input.l.map(a, input.l.map(b, input.l.map(c, 1))).size()", values)
    assert f"more than {gateway.iterations_max} iterations" in message
    assert time.perf_counter() - began < 10
    inside = {**VALUES, "input": {"l": list(range(90))}}
    assert cel.compile("input.l.map(a, input.l.map(b, 1)).size()", VARIABLES).evaluate(inside) == 90


def test_results_are_bounded(cel: CelExpressions) -> None:
    """B10: what an expression gives back has a size; an amplifying one fails before the memory is used."""
    values = {**VALUES, "input": {"l": list(range(5000)), "s": "x" * 10_000, "big": "x" * gateway.result_chars_max}}
    assert "its value is larger than" in failing(cel, "input.l.map(i, input.s)", values)
    assert "its value is longer than" in failing(cel, 'input.big + "x"', values)
    nested: Any = 1
    for _ in range(gateway.result_depth_max + 1):
        nested = [nested]
    assert "nested deeper than" in failing(cel, "input.deep", {**VALUES, "input": {"deep": nested}})


@pytest.mark.parametrize(
    ("datum", "what"),
    [
        (2**70, "an integer beyond 64 bits"),
        ("\ud800", "not valid Unicode"),
        (object(), "JSON-plain"),
        ({1, 2}, "JSON-"),
    ],
)
def test_data_that_is_not_plain_is_an_error(cel: CelExpressions, datum: object, what: str) -> None:
    """B3: data that JSON or CEL cannot carry is an error about the value, not a crash and not a wrong number."""
    assert what in failing(cel, "input.v", {"input": {"v": datum}, "steps": {}})


@pytest.mark.parametrize("datum", ["refused\x00x", ["\x00"], {"a\x00b": 1}, {"k": [{"k": "\x00"}]}])
def test_a_nul_never_cuts_a_text(cel: CelExpressions, datum: Any) -> None:
    """B3: the vendor cuts texts from Python at U+0000, so that `refused\\0x` equalled `refused`: an error now."""
    message = failing(cel, "input.v", {"input": {"v": datum}, "steps": {}})
    assert "a value holds the character U+0000 (remove it where the data comes from)" in message
    assert cel.compile('"a\\u0000b"', VARIABLES).evaluate(VALUES) == "a\x00b"


@pytest.mark.parametrize("datum", [2**70, "\ud800", {1, 2}, "secret-value"])
def test_errors_do_not_repeat_data(cel: CelExpressions, datum: object) -> None:
    """F5: what came from data (a value, a computed key) is not in the error, which ends up in logs and DLQ headers."""
    values = {"input": {"v": datum, "m": {}}, "steps": {}}
    for text in ("input.v + 1.5", "input.m[input.v]", "input.v.x"):
        message = failing(cel, text, values)
        assert str(datum) not in message.encode("utf-8", "replace").decode()
        assert "secret" not in message


def test_a_step_that_has_no_output_is_named(cel: CelExpressions) -> None:
    """B3: an output that is not there is an error that names the step."""
    assert "steps.verify has no value" in failing(cel, "steps.verify.verdict", {"input": {}, "steps": {}})


def test_compiled_once(cel: CelExpressions) -> None:
    """B3: the same text over the same names is compiled once; other names compile again, and may fail."""
    assert cel.compile("input.n", VARIABLES) is cel.compile("input.n", VARIABLES)
    with pytest.raises(ExpressionError, match="knows no input"):
        cel.compile("input.n", frozenset({"fact.data"}))


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """B3: the caches forget the oldest at their bounds and go on working."""
    monkeypatch.setattr(gateway, "programs_max", 3)
    monkeypatch.setattr(gateway, "environments_max", 2)
    engine = CelExpressions()
    for i in range(8):
        assert engine.compile(f"v{i} + {i}", frozenset({f"v{i}"})).evaluate({f"v{i}": 1}) == i + 1
    assert (len(engine._programs), len(engine._environments)) == (3, 2)


def test_a_scope_is_converted_once(cel: CelExpressions) -> None:
    """DESIGN 13: one activation serves all expressions of a step, of whatever declared names."""
    scope = cel.scope(VALUES)
    first = cel.compile("input.n", VARIABLES)
    second = cel.compile("steps.verify.verdict", VARIABLES)
    assert (first.evaluate(scope), second.evaluate(scope)) == (1, "ok")
    assert scope.activation(frozenset({"steps"})) is scope.activation(frozenset({"steps"}))
    assert cel.scope(scope) is scope
    assert dict(scope) == VALUES


def test_an_evaluation_is_cheap(cel: CelExpressions) -> None:
    """DESIGN 13: with the activation shared, an evaluation costs microseconds (6.5 measured), so never a round trip."""
    scope = cel.scope(VALUES)
    program = cel.compile('steps.verify.verdict == "refused"', VARIABLES)
    program.evaluate(scope)
    rounds = []
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(200):
            program.evaluate(scope)
        rounds.append(time.perf_counter() - began)
    assert min(rounds) / 200 < 200e-6


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("${ input.n }", "input.n"),
        ("  ${input.n}\n", "input.n"),
        ('${ {"a": 1} }', '{"a": 1}'),
        ("plain", None),
        ("a $ and { }", None),
        ("", None),
    ],
)
def test_an_expression_is_the_whole_scalar(text: str, inner: str | None) -> None:
    """B3: `${ … }` counts over a whole scalar; other text is text."""
    assert expression_in(text) == inner


@pytest.mark.parametrize("text", ["Dear ${ input.name }", "${ a } and more", "$${ a", "x${"])
def test_interpolation_is_refused(text: str) -> None:
    """B3: `${` inside other text is an error, not silently text."""
    with pytest.raises(ExpressionError, match="stands inside other text"):
        expression_in(text)


def test_templates_keep_constants_and_paths(cel: CelExpressions) -> None:
    """B3: a template is data with programs in it; an error names the place inside the template."""
    node = {"a": "${ input.n }", "b": ["c", {"d": "${ 1 + 1 }"}], "e": None, "f": 1.5}
    assert list(expressions_of(node)) == [(("a",), "input.n"), (("b", 1, "d"), "1 + 1")]
    template = compile_template(node, cel, VARIABLES)
    assert template.evaluate(VALUES) == {"a": 1, "b": ["c", {"d": 2}], "e": None, "f": 1.5}
    with pytest.raises(ExpressionError, match=r"^b\[1\]\.d, `nope`: knows no nope"):
        compile_template({"b": [0, {"d": "${ nope }"}]}, cel, VARIABLES)
    with pytest.raises(ExpressionError, match=r"^b\[0\], `input\.gone`: field 'gone' is missing"):
        compile_template({"b": ["${ input.gone }"]}, cel, VARIABLES).evaluate(VALUES)


@pytest.mark.parametrize("attack", ["${ 1 / 0 }", '${ "a" + "b" }', "${ input }", "${"])
def test_text_from_data_is_never_evaluated(attack: str) -> None:
    """B3: data that looks like an expression passes as the text that it is, through every kind of template."""
    values = {"input": {"x": attack, "l": [attack], "m": {attack: attack}}}
    node = {"x": "${ input.x }", "all": "${ input }", "l": "${ input.l.map(i, i) }"}
    assert evaluate_template(node, values) == {"x": attack, "all": values["input"], "l": [attack]}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8), inner, max_size=4
        )
    ),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_data_passes_through_unchanged(value: object) -> None:
    """B3: any JSON-plain datum comes through an expression equal and of the same kind."""
    result = evaluate_template("${ input }", {"input": value})
    assert result == value
    assert repr(result) == repr(value) or isinstance(value, dict | list)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60), json_values)
def test_any_text_compiles_or_says_why(text: str, value: object) -> None:
    """Bad input: whatever is written as an expression, the answer is a JSON value or one of our errors."""
    with contextlib.suppress(FactmeshError):
        evaluate_template("${" + text + "}", {"input": value})


@pytest.mark.parametrize("value", ["R-1", "", "Ö", 7, -(1 << 63), True, None, 1.5, {"a": 1}, ["x"]])
def test_a_selected_value_is_the_one_that_cel_gives(value: object) -> None:
    """B3: a plain selection is answered without CEL; the same value in brackets, which CEL judges, is equal to it."""
    engine = CelExpressions()
    names = frozenset({"input", "steps.first"})
    for text in ("input.field", "steps.first.field"):
        values = {"input": {"field": value}, "steps": {"first": {"field": value}}}
        short, long = (engine.compile(t, names).evaluate(values) for t in (text, f"({text})"))
        assert short == long == value
        assert type(short) is type(long)


@pytest.mark.parametrize("value", ["a\0b", "\ud800", 1 << 64, float("inf")])
def test_what_cel_refuses_is_refused_where_it_is_only_selected(value: object) -> None:
    """B3: the short way takes nothing that CEL would not, and words no error of its own."""
    program = CelExpressions().compile("input.field", frozenset({"input"}))
    with pytest.raises(ExpressionError, match="input.field"):
        program.evaluate({"input": {"field": value}})
    with pytest.raises(ExpressionError, match="field 'field' is missing"):
        program.evaluate({"input": {"other": 1}})
