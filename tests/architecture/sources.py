"""The product's source files as the architecture tests see them: parsed once, nothing imported."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *sorted((ROOT / "services").glob("*/factmesh_*")),
    ROOT / "libs" / "factmesh",
    ROOT / "tools" / "factmesh_cli",
    ROOT / "tools" / "factmesh_sandbox",
)


@dataclass(frozen=True)
class Module:
    """One module: its dotted name, path, text and tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def __hash__(self) -> int:
        return hash(self.name)

    def roots(self) -> set[str]:
        """The top packages of everything that it imports, inside functions too."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found.add(node.module.partition(".")[0])
        return found

    def code_without_strings(self) -> str:
        """The code, without comments and string literals."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        skipped = {tokenize.STRING, tokenize.COMMENT}
        return "".join(token.string for token in tokens if token.type not in skipped)

    def strings(self) -> list[ast.Constant]:
        """String literals that are not docstrings."""
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        return [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        ]


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every module of libs, services and tools."""
    found = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            found.append(Module(name, path, text, ast.parse(text)))
    return tuple(found)


def shipped_files() -> list[Path]:
    """Every file of the packages and schemas that is not Python's own leftovers."""
    roots = (*PACKAGES, ROOT / "schemas")
    return [
        path for root in roots for path in sorted(root.rglob("*")) if path.is_file() and "__pycache__" not in path.parts
    ]
