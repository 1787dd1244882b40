"""The gateway to Jinja: templates of a project compiled once, in a sandbox, and rendered over plain data.
Text that came from data is only ever a value: it is never compiled, and in HTML it is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pydantic
from jinja2.sandbox import ImmutableSandboxedEnvironment

from factmesh import yaml
from factmesh.document import Document
from factmesh.errors import DefinitionError, ValidationError

RENDERED_BYTES_MAX = 262_144
"""A message to people, not a document: it is kept in a row until it is delivered."""
SUBJECT_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class Rendered:
    """A message as it is sent. `repr` shows nothing of it: it may hold personal data."""

    subject: str = field(repr=False)
    text: str = field(repr=False)
    html: str | None = field(default=None, repr=False)


class TemplateFile(pydantic.BaseModel):
    """`templates/NAME.yaml`."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    subject: str = pydantic.Field(min_length=1, description="One line.")
    text: str = pydantic.Field(min_length=1, description="For everybody: not everyone can read HTML.")
    html: str | None = pydantic.Field(default=None, min_length=1, description="Beside the text, where a channel can.")


@dataclass(frozen=True, slots=True)
class _Compiled:
    subject: jinja2.Template
    text: jinja2.Template
    html: jinja2.Template | None


def _environment(*, html: bool) -> ImmutableSandboxedEnvironment:
    # No loader: a template includes nothing. An undefined name is an error, never an empty place in a letter.
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=html, trim_blocks=True, lstrip_blocks=True
    )


class Templates:
    """The templates of one project, `NAME.yaml` each: `subject`, `text`, and perhaps `html`."""

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
        """Compile all. Raises DefinitionError naming file and line."""
        self._plain, self._html = _environment(html=False), _environment(html=True)
        self._compiled = {name: self._compile(paths) for name, paths in files.items()}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._compiled)

    def render(self, name: str, data: Mapping[str, Any]) -> Rendered:
        """The message over this data. Raises ValidationError where data lacks what the template names."""
        compiled = self._compiled.get(name)
        if compiled is None:
            there = ", ".join(sorted(self._compiled)) or "none"
            raise ValidationError(f"there is no template {name!r}", hint=f"there are: {there}; correct and replay")
        try:
            # One line whatever the data holds: a subject with a line break would be a second header.
            subject = " ".join(compiled.subject.render(data).split())[:SUBJECT_CHARS_MAX]
            text = compiled.text.render(data)
            html = compiled.html.render(data) if compiled.html is not None else None
        except jinja2.UndefinedError as error:
            raise ValidationError(
                f"template {name!r} lacks a value: {error.message}",
                hint="give it in the step's `with`, or correct the template; then replay",
            ) from None
        except Exception as error:
            # A template is a program that a team wrote; its errors may quote the data, so only the type is told.
            raise ValidationError(
                f"template {name!r} cannot be rendered over this data ({type(error).__name__})",
                hint="correct the template or the step's `with`; then replay",
            ) from None
        size = len(text.encode()) + len((html or "").encode())
        if size > RENDERED_BYTES_MAX:
            raise ValidationError(
                f"template {name!r} gives {size} bytes", hint=f"at most {RENDERED_BYTES_MAX}: send a link instead"
            )
        return Rendered(subject, text, html)

    def _compile(self, paths: Sequence[Path]) -> _Compiled:
        path = paths[0]
        if len(paths) > 1 or path.suffix != ".yaml":
            raise DefinitionError("is no template", where=str(paths[-1]), hint="one file each, templates/NAME.yaml")
        document = yaml.load(path)
        try:
            file = TemplateFile.model_validate(document.data)
        except pydantic.ValidationError as error:
            items = error.errors(include_url=False, include_input=False, include_context=False)
            problems = "; ".join(f"{document.where(tuple(item['loc']))}: {item['msg']}" for item in items)
            raise DefinitionError(problems, hint="a template has subject, text, and perhaps html") from None
        return _Compiled(
            self._from(self._plain, file.subject, document, "subject"),
            self._from(self._plain, file.text, document, "text"),
            self._from(self._html, file.html, document, "html") if file.html is not None else None,
        )

    @staticmethod
    def _from(environment: jinja2.Environment, source: str, document: Document, part: str) -> jinja2.Template:
        try:
            return environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DefinitionError(
                f"line {error.lineno} of {part} is not a template: {error.message}",
                where=document.where((part,)),
                hint="correct it",
            ) from None
