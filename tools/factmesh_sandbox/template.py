"""The small template language of sandbox files: `{body.id}` inside JSON values, and dotted paths.
Pure: it reads the values it is given and nothing else, and text that came in with a request is never a template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: What a path may begin with: the request's parts, the chosen values, the effect being made, an earlier effect.
ROOTS = frozenset({"body", "path", "query", "headers", "values", "effect", "parent", "items"})
DOTTED = r"^[A-Za-z_][A-Za-z0-9_\-]*(\.[A-Za-z0-9_\-]+)*$"

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.\-]*)\}")


def check_path(path: str) -> str:
    """The path itself, or ValueError when it does not begin with one of ROOTS."""
    if not re.match(DOTTED, path) or path.split(".", 1)[0] not in ROOTS:
        raise ValueError(f"{path!r} is no path; it begins with one of {', '.join(sorted(ROOTS))}")
    return path


def check_template(template: Any) -> Any:
    """The template itself, or ValueError when a placeholder in it is no path."""
    if isinstance(template, str):
        for match in _PLACE.finditer(template):
            check_path(match.group(1))
    elif isinstance(template, Mapping):
        for value in template.values():
            check_template(value)
    elif isinstance(template, (list, tuple)):
        for value in template:
            check_template(value)
    return template


def resolve(path: str, scope: Mapping[str, Any]) -> Any:
    """The value at a dotted path, or None when something on the way is missing."""
    value: Any = scope
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def render(template: Any, scope: Mapping[str, Any]) -> Any:
    """The template with its placeholders filled; one that is the whole scalar keeps its value's type."""
    if isinstance(template, str):
        whole = _PLACE.fullmatch(template)
        if whole:
            return resolve(whole.group(1), scope)
        return _PLACE.sub(lambda match: _text(resolve(match.group(1), scope)), template)
    if isinstance(template, Mapping):
        return {key: render(value, scope) for key, value in template.items()}
    if isinstance(template, (list, tuple)):
        return [render(value, scope) for value in template]
    return template


def _text(value: Any) -> str:
    return "" if value is None else str(value)
