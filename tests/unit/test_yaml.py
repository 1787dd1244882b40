"""Promises of the YAML gateway: what is written is what is read, and nothing in a file can mean more than it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import yaml
from factmesh.document import Document, canonical_json, path_text
from factmesh.errors import DefinitionError


def read(text: str | bytes) -> object:
    return yaml.parse(text, file="x.yaml").data


def refused(text: str | bytes) -> str:
    with pytest.raises(DefinitionError) as caught:
        yaml.parse(text, file="x.yaml")
    assert caught.value.hint, "an error says what to do next"
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("1", 1),
        ("-7", -7),
        ("0o17", 15),
        ("0xff", 255),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("1.0.0", "1.0.0"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2026-11-23", "2026-11-23"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("''", ""),
        ("PT24H", "PT24H"),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_scalars_are_yaml_1_2_and_json(text: str, value: object) -> None:
    """B1: a word of YAML 1.1 (`on`, `yes`, a date, a clock time) stays the text that was written."""
    data = read(f"key: {text}")
    assert data == {"key": value}
    assert type(data["key"]) is type(value)  # type: ignore[index]


def test_the_key_on_stays_text() -> None:
    """B1: `schedule.on` is the key "on", which PyYAML reads as true."""
    assert read("schedule:\n  on: {one: 1}\n") == {"schedule": {"on": {"one": 1}}}


def test_a_number_as_a_key_is_its_digits() -> None:
    """C1: a table of statuses may be written unquoted; its keys are text, as in JSON."""
    assert read("500: transient\n-1: a\n") == {"500": "transient", "-1": "a"}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: &x 1", "x.yaml:1:4", "an anchor (&x)"),
        ("a: 1\nb: *x", "x.yaml:2:4", "an alias (*x)"),
        ("b:\n  <<: {c: 1}", "x.yaml:2:3", "a merge key"),
        ("a: !!str 1", "x.yaml:1:4", "a tag"),
        ("a: !!python/object/apply:os.system ['true']", "x.yaml:1:4", "a tag"),
        ("!x {a: 1}", "x.yaml:1:1", "a tag"),
        ("a: 1\nb: 2\na: 3", "x.yaml:3:1", "key 'a' is there twice, first on line 1"),
        ("a: {b: 1, 'b': 2}", "x.yaml:1:11", "key 'b' is there twice"),
        ("1.5: a", "x.yaml:1:1", "the key '1.5' is not text"),
        ("0x1f: a", "x.yaml:1:1", "the key '0x1f' is not text"),
        ("null: a", "x.yaml:1:1", "the key 'null' is not text"),
        ("007: a", "x.yaml:1:1", "begins with a zero"),
        ("500: a\n'500': b", "x.yaml:2:1", "key '500' is there twice"),
        ("true: a", "x.yaml:1:1", "the key 'true' is not text"),
        ("? [a]\n: b", "x.yaml:1:3", "a key that is not text"),
        ("a: 1\n---\nb: 2", "x.yaml:2:1", "a second document begins"),
        ("%YAML 1.1\n---\na: yes", "x.yaml:2:1", "a %YAML or %TAG directive"),
        ("a: .nan", "x.yaml:1:4", "is not a JSON number"),
        ("a: -.inf", "x.yaml:1:4", "is not a JSON number"),
        ("a: 1e999", "x.yaml:1:4", "is too large"),
        ("a: 0123", "x.yaml:1:4", "begins with a zero"),
        (f"a: {2**63}", "x.yaml:1:4", "does not fit 64 bits"),
        ("a: " + "9" * 5000, "x.yaml:1:4", "does not fit 64 bits"),
        ("a: [1", "x.yaml:1:6", "is not YAML"),
        ("a: 1\n b: 2", "x.yaml:2:3", "is not YAML"),
        ("a: @x", "x.yaml:1:4", "is not YAML"),
        ("\ta: 1", "x.yaml:1:1", "is not YAML"),
        ("", "x.yaml", "is empty"),
        ("# only a comment", "x.yaml", "is empty"),
        (b"a: \xff", "x.yaml", "is not UTF-8 (byte 3)"),
        ("a: \x00", "x.yaml", "is not YAML"),
    ],
)
def test_what_is_refused_says_where(text: str | bytes, where: str, what: str) -> None:
    """Bad input gets a clear answer: file, line, column, what is wrong, what to do."""
    message = refused(text)
    assert message.startswith(where + ":")
    assert what in message


def test_a_billion_laughs_are_refused_at_the_first() -> None:
    """Bad input: an alias bomb is refused where its first anchor stands, before anything is expanded."""
    lines = ["a: &a [lol, lol, lol]"] + [
        f"{c}: &{c} [*{p}, *{p}, *{p}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    assert refused("\n".join(lines)).startswith("x.yaml:1:4: an anchor (&a)")


@pytest.mark.parametrize("shape", ["[" * 2000, "{a: " * 2000, "- " * 2000 + "1"])
def test_depth_is_bounded(shape: str) -> None:
    """Bad input: a deep document is refused by its depth, not by the interpreter's recursion limit."""
    assert f"deeper than {yaml.document_depth_max} levels" in refused(shape)


def test_depth_at_the_bound_is_read() -> None:
    """The bound lies where it says: that many levels are read, one more is not."""
    depth = yaml.document_depth_max
    assert read("[" * depth + "]" * depth) is not None
    refused("[" * (depth + 1) + "]" * (depth + 1))


def test_size_is_bounded(tmp_path: Path) -> None:
    """Bad input: a file that is too large is refused without being parsed, and never read whole."""
    text = "a: '" + "x" * yaml.document_bytes_max + "'"
    assert f"larger than {yaml.document_bytes_max} bytes" in refused(text)
    big = tmp_path / "big.yaml"
    big.write_text(text)
    with pytest.raises(DefinitionError, match=r"big\.yaml: is larger than"):
        yaml.load(big)


def test_the_number_of_values_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input: a small file of very many values is refused at the bound, counting lists and maps too."""
    monkeypatch.setattr(yaml, "document_values_max", 10)
    assert read("[1, 2, 3, 4, {a: 6, b: 7}, [], 10]") is not None
    assert refused("[1, 2, 3, 4, {a: 6, b: 7}, [], 10, 11]").startswith("x.yaml:1:36: holds more than 10 values")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Bad input: a file that is not there is an error about that file."""
    with pytest.raises(DefinitionError, match=r"gone\.yaml: cannot be read: No such file"):
        yaml.load(tmp_path / "gone.yaml")


def test_values_know_their_lines() -> None:
    """B1: an error about any value can name its line, and about an absent one the line of what should hold it."""
    document = yaml.parse("a:\n  - b: 1\n    c: {d: 2}\n", file="x.yaml")
    assert document.where(("a", 0, "c", "d")) == "x.yaml:3:9 at a[0].c.d"
    assert document.where(("a", 0, "missing")) == "x.yaml:2:5 at a[0].missing"
    assert document.where() == "x.yaml:1:1"
    assert path_text(("do", 0, "verify", "with")) == "do[0].verify.with"
    assert Document("no lines", {}).where(("a",)) == "no lines at a"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values)
def test_json_is_read_as_json(value: object) -> None:
    """B1: a definition written as JSON (a subset of YAML 1.2) comes back equal, and its canonical form is stable."""
    data = read(json.dumps({"v": value}, ensure_ascii=False))
    assert data == {"v": value}
    assert canonical_json(data) == canonical_json(json.loads(canonical_json(data)))
