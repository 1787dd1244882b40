"""The short way of an expression gives what CEL gives, value and kind, or leaves it to CEL, error and all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh import expressions as gateway
from factmesh.errors import ExpressionError
from factmesh.expressions import CelExpressions
from factmesh.literals import NOT_PLAIN, Bounds, plain_of

ENGINE = CelExpressions()
NAMES = frozenset({"input", "steps.first", "steps.second"})
FIELDS = ("a", "b", "c")
BOUNDS = Bounds(gateway.result_nodes_max, gateway.result_chars_max, gateway.result_depth_max)

leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**63 - 1, -(2**63), 2**63, 10**30])
    | st.floats()
    | st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=6)
    | st.sampled_from(["a\x00b", "\ud800", "Ö"])
)
data = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "x y", "Ö"]), inner, max_size=3)
    ),
    max_leaves=8,
)
scopes = st.fixed_dictionaries(
    {
        "input": st.dictionaries(st.sampled_from(FIELDS), leaves | data, min_size=1) | data,
        "steps": st.dictionaries(
            st.sampled_from(["first", "second"]), st.dictionaries(st.sampled_from(FIELDS), leaves) | data
        ),
    }
)
names = st.sampled_from([*NAMES, *(f"{n}.{f}" for n in NAMES for f in FIELDS), "input.a.b", "steps.first.a.b.c"])
quoted = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters='"\\'), max_size=5
).map(lambda s: f'"{s}"')
numbers = st.integers(-(2**63), 2**63 - 1).map(str) | st.floats(0, 1e6, allow_nan=False).map(lambda f: f"{f:.3f}")
atoms = names | quoted | numbers | st.sampled_from(["true", "false", "null", "'it'", "{}", "[ ]"])
texts = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda of: f"[{', '.join(of)}]")
        | st.lists(st.tuples(quoted, inner), max_size=3).map(
            lambda of: "{" + ",\n".join(f"{key}: {value}" for key, value in of) + "}"
        )
    ),
    max_leaves=6,
)


def outcome(text: str, values: dict[str, Any]) -> tuple[str, str]:
    """The value with its kinds, or the error without the expression's own text."""
    try:
        return ("value", shown(ENGINE.compile(text, NAMES).evaluate(values)))
    except ExpressionError as error:
        return ("error", f"{error.message} {error.hint}")


def shown(value: Any) -> str:
    """CEL gives the members of a map in an order of its own; kinds and signs count."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{shown(inner)}" for key, inner in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(shown, value)) + "]"
    return repr(value)


@settings(max_examples=1500, deadline=None)
@given(texts, scopes)
def test_the_short_way_gives_what_cel_gives(text: str, values: dict[str, Any]) -> None:
    """B3: for literals of selections and constants the value, its kinds, and every error are CEL's. Values that CEL's
    binding cannot carry at all are an error only where the expression reads them."""
    short, whole = outcome(text, values), outcome(f"({text})", values)
    if short != whole:
        plain = plain_of(text, BOUNDS)
        assert plain is not None
        assert plain(values) is not NOT_PLAIN
        assert whole[0] == "error"
        # It was CEL that could not carry something else in the scope: without that, it says the same.
        assert outcome(f"({text})", only_read(text, values)) == short


def only_read(text: str, values: dict[str, Any]) -> dict[str, Any]:
    """The scope with what the expression does not name left out, member by member."""

    def cut(value: Any, path: str) -> Any:
        if path in read or not isinstance(value, dict):
            return value
        return {k: cut(v, f"{path}.{k}") for k, v in value.items() if any(under(f"{path}.{k}", r) for r in read)}

    def under(path: str, name: str) -> bool:
        return path == name or name.startswith(path + ".") or path.startswith(name + ".")

    read = {token for token in candidates() if token in words(text)}
    kept = {name: cut(value, name) for name, value in values.items() if any(under(name, r) for r in read)}
    return {"input": {}, "steps": {}, **kept}


def candidates() -> list[str]:
    return [*NAMES, *(f"{n}.{f}" for n in NAMES for f in FIELDS), "input.a.b", "steps.first.a.b.c"]


def words(text: str) -> set[str]:
    """Dotted names outside of quotes."""
    bare, inside = [], ""
    for char in text:
        if inside:
            inside = "" if char == inside else inside
        elif char in "\"'":
            inside = char
        else:
            bare.append(char if char.isalnum() or char in "_." else " ")
    return set("".join(bare).split())


@pytest.mark.parametrize(
    "text",
    [
        "input.a + 1", "(input.a)", "input.a.size()", 'input["a"]', "has(input.a)", "[1, 2][0]", "{1: 2}", "7u", "1e3",
        "0x1F", "1.", "--1", "- 1", 'r"a"', 'b"a"', '"""a"""', '"a\\n"', '"a" + "b"', "input.a // tail", "[1,]",
        '{"a": 1, "a": 2}', "input.a ? 1 : 2", "!true", "input .a", "9223372036854775808",
    ],
)  # fmt: skip
def test_more_than_a_literal_is_cels(text: str) -> None:
    """B3: whatever is not plainly a literal of selections and constants goes through CEL."""
    assert plain_of(text, BOUNDS) is None


@pytest.mark.parametrize("text", ['{"id": input.a, "of": [steps.first.b, -1, 1.5, true, null, "x"]}', "input", " [ ] "])
def test_a_literal_of_selections_is_plain(text: str) -> None:
    """DESIGN 13: what nearly every step asks for costs no conversion of the scope."""
    assert plain_of(text, BOUNDS) is not None


def test_the_bounds_of_a_result_hold_on_the_short_way() -> None:
    """B10: size and depth of what an expression gives back are bounded, whoever evaluates it."""
    nested: Any = 1
    for _ in range(gateway.result_depth_max - 1):
        nested = [nested]
    for value in (
        "x" * gateway.result_chars_max,
        ["x" * (gateway.result_chars_max // 4)] * 4,
        list(range(gateway.result_nodes_max - 1)),
        nested,
    ):
        values = {"input": {"a": value, "b": [value]}, "steps": {}}
        for text in ("input.a", "[input.a]", "[input.a, input.a]", '{"k": input.b}', "[[input.a]]"):
            assert outcome(text, values) == outcome(f"({text})", values)
