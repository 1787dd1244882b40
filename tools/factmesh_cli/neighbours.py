"""What `factmesh workflow lint` says of a workflow's neighbours, by the models of the services that run them.
No rule is written here: a service that is not installed is not asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from factmesh import secrets
from factmesh.document import Document
from factmesh.errors import FactmeshError
from factmesh.expressions import default_expressions
from factmesh.project import Project
from factmesh.workflow.linter import Finding, Severity

Check = Callable[[ModuleType, str, Document], None]


def _connector(declared: ModuleType, name: str, document: Document) -> None:
    declared.parse(document, stem=name)


def _adapter(adapters: ModuleType, name: str, document: Document) -> None:
    model = adapters.read(document)
    upcast = isinstance(model, adapters.Upcast)
    compile_it = adapters.compile_upcast if upcast else adapters.compile_adapter
    compile_it(model, document, default_expressions())


def _channels(channels: ModuleType, name: str, document: Document) -> None:
    channels.parse(document)


def _templates(module: ModuleType, files: Mapping[str, tuple[Path, ...]]) -> Iterator[Finding]:
    for name, forms in files.items():
        try:
            module.Templates({name: forms})
        except FactmeshError as error:
            yield Finding("template-text", Severity.ERROR, error.where or str(forms[0]), error.message, error.hint)


def neighbour_findings(project: Project) -> tuple[Finding, ...]:
    """Everything that is wrong in the project's connectors, adapters, channels and templates."""
    channels = {"channels": project.channels} if project.channels is not None else {}
    templates = _installed("factmesh.templates")
    return (
        *_checked("channels", "factmesh_notifier.channels", channels, _channels),
        *(_templates(templates, project.template_files) if templates is not None else ()),
        *_checked("connector", "factmesh_connector.declared", project.connectors, _connector),
        *_plain_secrets(project.connectors),
        *_checked("adapter", "factmesh_intake.adapters", project.adapters, _adapter),
    )


def _installed(module_name: str) -> ModuleType | None:
    """The module, or None where its extra is not installed."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None


def _checked(rule: str, module_name: str, documents: Mapping[str, Document], check: Check) -> Iterator[Finding]:
    module = _installed(module_name)
    if module is None:
        return
    for name, document in documents.items():
        try:
            check(module, name, document)
        except FactmeshError as error:
            yield Finding(rule, Severity.ERROR, error.where or document.file, error.message, error.hint)


def _plain_secrets(connectors: Mapping[str, Document]) -> Iterator[Finding]:
    """A connector that declares auth names a secret by reference; a value in the file is a leak (F5, G4)."""
    for document in connectors.values():
        auth: Any = document.data.get("auth") if isinstance(document.data, dict) else None
        for key in ("bearer", "secret"):
            value = auth.get(key) if isinstance(auth, dict) else None
            if value is not None and not (isinstance(value, str) and secrets.is_reference(value)):
                yield Finding(
                    "secret-reference",
                    Severity.ERROR,
                    document.where(("auth", key)),
                    f"auth.{key} is not a secret reference",
                    "write ref+env://NAME or ref+file:///path, and change the secret that stood here",
                )
