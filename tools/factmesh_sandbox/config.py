"""Reads a sandbox file into its model, or says what is wrong with it and on which line.
No defaults are invented here and nothing is served: the model decides what is allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from factmesh import yaml
from factmesh.document import Document
from factmesh.errors import DefinitionError
from factmesh_sandbox.model import FaultRule, SandboxFile

HINT = "see the README of factmesh_sandbox, or `factmesh-sandbox --schema`"


def load_config(path: str | Path) -> SandboxFile:
    """The sandbox file at `path`.

    Raises:
        DefinitionError: it cannot be read, is no YAML, or says something that the model does not know.
    """
    return parse_config(yaml.load(Path(path)))


def parse_config(document: Document) -> SandboxFile:
    """A model from a parsed document; the error names file, line and place of the first problem, and all others."""
    if not isinstance(document.data, dict):
        raise DefinitionError("a sandbox file is a mapping", where=document.where(), hint="begin it with `sandbox: 1`")
    try:
        return SandboxFile.model_validate(document.data)
    except ValidationError as error:
        first, *others = [(tuple(item["loc"]), item["msg"]) for item in error.errors(include_url=False)]
        also = "".join(f"; {document.where(place)}: {message}" for place, message in others)
        raise DefinitionError(f"{first[1]}{also}", where=document.where(first[0]), hint=HINT) from error


def parse_rules(data: Any) -> tuple[FaultRule, ...]:
    """Fault rules from JSON: a list, or an object with `rules`. Raises ValueError with every problem named."""
    if isinstance(data, dict) and set(data) == {"rules"}:
        data = data["rules"]
    if not isinstance(data, list):
        raise ValueError("give a list of fault rules, or an object with `rules`")
    rules = []
    for index, item in enumerate(data):
        try:
            rules.append(FaultRule.model_validate(item))
        except ValidationError as error:
            problems = ((".".join(map(str, p["loc"])), p["msg"]) for p in error.errors(include_url=False))
            text = "; ".join(f"{place}: {message}" if place else message for place, message in problems)
            raise ValueError(f"rule {index}: {text}") from error
    return tuple(rules)
