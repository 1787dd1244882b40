"""The shape of the code: laws, sizes, SQL in its files, and no business process inside the platform."""

from __future__ import annotations

import ast
import re

import pytest

from .sources import ROOT, Module, modules, shipped_files

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
BUSINESS = re.compile(r"customer|\bcrm\b|crm_|_crm|help.?desk|onboarding|\brisk\b|risk_|_risk", re.IGNORECASE)
SQL = re.compile(
    r"\bSELECT\b[\s\S]*\bFROM\b|\bINSERT\s+INTO\b|\bUPDATE\s+\S+\s+SET\b|\bDELETE\s+FROM\b|\bCREATE\s+(TABLE|SCHEMA|ROLE)\b"
)
NAME_LINE = re.compile(r"^-- name: \S+$")


def here(module: Module, line: int) -> str:
    return f"{module.path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_a_file_begins_with_its_law(module: Module) -> None:
    """Habit 2: a module's docstring says what lives here and what must not, before the first line of code."""
    law = ast.get_docstring(module.tree) or ""
    sentences = [part for part in re.split(r"[.:;](?:\s|$)", law) if part.strip()]
    need = 1 if module.path.name == "__init__.py" else 2
    assert len(sentences) >= need, f"{here(module, 1)} has no law of {need} sentences"


def test_modules_and_functions_have_a_bound() -> None:
    """House sizes: a module past 500 lines or a function past 70 gives a reason, `# size: why`."""
    too_large = []
    for module in modules():
        lines = module.text.splitlines()
        if len(lines) > MODULE_LINES_MAX and not any(line.startswith("# size: ") for line in lines[:40]):
            too_large.append(f"{here(module, 1)}: {len(lines)} lines")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            body = lines[node.lineno - 1 : node.end_lineno]
            if length > FUNCTION_LINES_MAX and not any("# size: " in line for line in body):
                too_large.append(f"{here(module, node.lineno)}: {node.name} has {length} lines")
    assert too_large == []


def test_the_platform_names_no_business_process() -> None:
    """Issue 6, house rule 5: workflows, adapters and connectors live in project folders; nothing here knows one."""
    named = []
    for path in shipped_files():
        if path.suffix in {
            ".py",
            ".sql",
            ".md",
            ".avsc",
            ".json",
            ".yaml",
            ".yml",
            ".toml",
            ".html",
            ".j2",
            ".properties",
        }:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if BUSINESS.search(line) or BUSINESS.search(path.name):
                    named.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert named == []


def test_sql_lives_in_sql_files() -> None:
    """House rule 4: no statement hides in a string."""
    hidden = [
        here(module, node.lineno)
        for module in modules()
        for node in module.strings()
        if isinstance(node.value, str) and SQL.search(node.value)
    ]
    assert hidden == []


def test_every_query_is_named_with_its_guarantee() -> None:
    """House rule 4: every `.sql` file outside migrations is a list of named queries, each with a promise."""
    from factmesh.sql_files import parse_sql

    read = 0
    for path in shipped_files():
        if path.suffix == ".sql" and "migrations" not in path.parts:
            assert parse_sql(path, path.read_text(encoding="utf-8")).names(), path
            read += 1
    assert read > 0


def test_migrations_are_numbered_without_gaps() -> None:
    """House rule 4: the library's migrations own the ledger, each service's own its state; both start at 0001."""
    folders = {path.parent for path in shipped_files() if path.suffix == ".sql" and "migrations" in path.parts}
    assert folders
    for folder in folders:
        numbers = sorted(int(path.name[:4]) for path in folder.glob("*.sql"))
        assert numbers == list(range(1, len(numbers) + 1)), folder


def test_no_unfinished_work_is_left() -> None:
    """House habit: what is here works; there is no TODO, FIXME or NotImplementedError to find later."""
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    left = [
        f"{here(module, number)}: {line.strip()[:80]}"
        for module in modules()
        for number, line in enumerate(module.text.splitlines(), start=1)
        if any(re.search(rf"\b{mark}\b", line) for mark in marks)
    ]
    assert left == []
