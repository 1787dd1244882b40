"""Loading a project folder (FACTMESH_PROJECT): one process's workflows, adapters, connectors, policies and templates.
Adapters and connectors stay parsed documents: their models belong to the services; nothing is executed or deployed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from factmesh import yaml
from factmesh.document import Document
from factmesh.errors import DefinitionError
from factmesh.evaluation import Expressions
from factmesh.retry import RetryPolicy
from factmesh.workflow.linter import Finding, Severity, Surroundings, audit_default_s, lint_document, operations_in
from factmesh.workflow.model import Workflow, parse_workflow

#: More files than a process has; a folder with more is probably not a project.
files_max = 2_000

#: There without being declared: a project needs no server to tell something.
LOG_CHANNEL = "log"

_ID = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_VERSION_FILE = re.compile(r"v([1-9][0-9]{0,5})\.yaml")


class _PolicyFile(BaseModel):
    """`policies/<name>.yaml`. Other kinds of policy will be other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    retry: RetryPolicy


@dataclass(frozen=True)
class Project:
    """A loaded project folder. Raw documents of workflows are kept, so that a broken one can still be linted."""

    root: Path
    workflow_documents: Mapping[tuple[str, int], Document] = field(default_factory=dict)
    case_files: Mapping[tuple[str, int], Path] = field(default_factory=dict)
    adapters: Mapping[str, Document] = field(default_factory=dict)
    connectors: Mapping[str, Document] = field(default_factory=dict)
    policies: Mapping[str, RetryPolicy] = field(default_factory=dict)
    template_files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    schemas_dir: Path | None = None
    sandbox: Document | None = None
    channels: Document | None = None

    @classmethod
    def load(cls, path: Path | str) -> Project:
        """Read the folder. Raises DefinitionError for the first file that is wrong, naming file and line."""
        root = Path(path)
        if not root.is_dir():
            raise DefinitionError("is not a folder", where=str(root), hint="set FACTMESH_PROJECT to the project folder")
        workflows = dict(_workflow_files(root / "workflows"))
        return cls(
            root=root,
            workflow_documents={key: yaml.load(file) for key, file in workflows.items()},
            case_files={
                key: cases for key, file in workflows.items() if (cases := file.with_suffix(".cases.yaml")).is_file()
            },
            adapters=_documents(root / "adapters"),
            connectors=_documents(root / "connectors"),
            policies={name: _policy(document) for name, document in _documents(root / "policies").items()},
            template_files=_templates(root / "templates"),
            schemas_dir=schemas if (schemas := root / "schemas").is_dir() else None,
            sandbox=_document(root / "sandbox.yaml"),
            channels=_document(root / "channels.yaml"),
        )

    def workflows(self) -> tuple[Workflow, ...]:
        """Every workflow, typed. Raises DefinitionError with everything that is wrong in the first broken one."""
        return tuple(self.workflow(name, major) for name, major in sorted(self.workflow_documents))

    def workflow(self, name: str, major: int | None = None) -> Workflow:
        """One workflow; its highest version where none is named. Raises DefinitionError."""
        versions = sorted(version for known, version in self.workflow_documents if known == name)
        if not versions or (major is not None and major not in versions):
            there = ", ".join(f"{n} v{v}" for n, v in sorted(self.workflow_documents)) or "none"
            version = f" v{major}" if major is not None else ""
            raise DefinitionError(
                f"has no workflow {name!r}{version}", where=str(self.root / "workflows"), hint=f"there are: {there}"
            )
        chosen = versions[-1] if major is None else major
        document = self.workflow_documents[name, chosen]
        workflow = parse_workflow(document)
        _agrees(document, name, chosen, workflow)
        return workflow

    def surroundings(
        self,
        expressions: Expressions | None = None,
        *,
        plugins: Iterable[str] = (),
        audit_s: float = audit_default_s,
    ) -> Surroundings:
        """What the linter must know of this project. `plugins` are connectors without YAML: written in Python, or
        another team's; what operations they have is not judged."""
        return Surroundings(
            expressions=expressions,
            connectors={
                **dict.fromkeys(plugins),
                **{name: operations_in(document.data) for name, document in self.connectors.items()},
            },
            templates=frozenset(self.template_files),
            channels=_channels(self.channels),
            policies=frozenset(self.policies),
            audit_s=audit_s,
        )

    def lint(
        self, expressions: Expressions | None = None, *, only: str | None = None, plugins: Iterable[str] = ()
    ) -> tuple[Finding, ...]:
        """Lint every workflow of the project, or every version of the one that `only` names."""
        around = self.surroundings(expressions, plugins=plugins)
        findings: list[Finding] = []
        for (name, major), document in sorted(self.workflow_documents.items()):
            if only not in (None, name):
                continue
            workflow, found = lint_document(document, around)
            findings += found
            if workflow is not None:
                findings += _name_findings(document, name, major, workflow)
        return tuple(findings)


def _name_findings(document: Document, name: str, major: int, workflow: Workflow) -> Iterator[Finding]:
    try:
        _agrees(document, name, major, workflow)
    except DefinitionError as error:
        yield Finding("file-name", Severity.ERROR, error.where, error.message, error.hint)


def _agrees(document: Document, name: str, major: int, workflow: Workflow) -> None:
    """The folder and the file say the same name and major version as the document inside."""
    if workflow.name != name:
        raise DefinitionError(
            f"the workflow is called {workflow.name!r} and lies in the folder {name!r}",
            where=document.where(("document", "name")),
            hint="name the folder as the workflow",
        )
    if workflow.version.split(".")[0] != str(major):
        raise DefinitionError(
            f"version {workflow.version} lies in the file v{major}.yaml",
            where=document.where(("document", "version")),
            hint="a new major version is a new file; a deployed version never changes",
        )


def _workflow_files(folder: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    if not folder.is_dir():
        return
    for sub in sorted(folder.iterdir()):
        if not sub.is_dir():
            continue
        for file in _files(sub, ".yaml"):
            if file.name.endswith(".cases.yaml"):
                continue
            found = _VERSION_FILE.fullmatch(file.name)
            if found is None:
                raise DefinitionError(
                    "is not a version of a workflow", where=str(file), hint="name it v1.yaml, v2.yaml, …"
                )
            yield (_named(sub.name, sub), int(found.group(1))), file


def _document(file: Path) -> Document | None:
    return yaml.load(file) if file.is_file() else None


def _channels(document: Document | None) -> frozenset[str] | None:
    """The channels that a notify may use. A project without the file leaves them to its notifier's own: unknown."""
    if document is None:
        return None
    declared = document.data.get("channels") if isinstance(document.data, dict) else None
    return frozenset({LOG_CHANNEL, *(declared if isinstance(declared, dict) else ())})


def _documents(folder: Path) -> dict[str, Document]:
    """The YAML files of a folder by their names."""
    return {_named(file.stem, file): yaml.load(file) for file in _files(folder, ".yaml")}


def _templates(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Templates by name, each with all files of that name; what a template's file holds is the notifier's to say."""
    found: dict[str, tuple[Path, ...]] = {}
    for file in _files(folder, ""):
        name = _named(file.name.split(".")[0], file)
        found[name] = (*found.get(name, ()), file)
    return found


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(
        file for file in folder.iterdir() if file.is_file() and file.name.endswith(suffix) and file.name[0] not in ".#"
    )
    if len(files) > files_max:
        raise DefinitionError(f"holds more than {files_max} files", where=str(folder), hint="is this the project?")
    wrong = next((file for file in folder.iterdir() if suffix and file.name.endswith(".yml")), None)
    if wrong is not None:
        raise DefinitionError("would be passed over", where=str(wrong), hint="rename it to end in .yaml")
    return files


def _named(name: str, file: Path) -> str:
    if not _ID.fullmatch(name):
        raise DefinitionError(f"{name!r} cannot be a name", where=str(file), hint="use [a-z_][a-z0-9_]*")
    return name


def _policy(document: Document) -> RetryPolicy:
    try:
        return _PolicyFile.model_validate(document.data).retry
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        raise DefinitionError(
            detail["msg"][0].lower() + detail["msg"][1:],
            where=document.where(detail["loc"]),
            hint=f"a retry policy has: {', '.join(RetryPolicy.model_fields)}",
        ) from None
