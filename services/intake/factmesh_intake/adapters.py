"""Adapters and upcasts as people write them, in YAML, and their compilation: CEL once, zones and tables checked.
A value spec says where one field comes from; nothing here knows Avro, Kafka or a vendor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic import ValidationError as PydanticError

from factmesh.document import Document, Json
from factmesh.errors import DefinitionError, ExpressionError, ValidationError
from factmesh.evaluation import Expressions, expression_in
from factmesh_intake.events import instant
from factmesh_intake.model import FieldError, NaiveTimeError, UnmappedError

ITEMS_MAX = 1_000
"""A list inside one fact; more is a file transfer, and belongs into a system of record."""
TABLE_ENTRIES_MAX = 10_000
_TIME_DIRECTIVES = frozenset("YmdHMSfyjpIb%")
_SPECS = ("of", "each", "fields")

Scalar = StrictStr | StrictBool | StrictInt | StrictFloat | None
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]{0,127}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Time(_Model):
    """How a text becomes an instant.

    Attributes:
        zone: IANA name of the zone that local times are meant in; without it a text needs an offset.
        format: strptime directives of a local time; RFC 3339 (ISO 8601 local, with a zone) without it.
        ambiguous: the hour that a clock shows twice in autumn: refuse it, or which of the two is meant.
        to: an `instant` as RFC 3339 text in UTC, or the local `date` alone.
    """

    zone: str | None = None
    format: str | None = None
    ambiguous: Literal["refuse", "earlier", "later"] = "refuse"
    to: Literal["instant", "date"] = "instant"


class Take(_Model):
    """One value: `of` it, with what the vendor writes for nothing (`nulls`), a translation table, or a time."""

    of: Scalar
    nulls: tuple[Scalar, ...] = ()
    table: Name | None = None
    time: Time | None = None


class Each(_Model):
    """A list: `item` for each element of the list `each`, under the name `item`. Null stays null.

    `flat` joins lists that the items make into one: how a vendor's lists of lists become a list.
    """

    each: str
    item: Spec
    flat: bool = False
    items_max: int = Field(default=ITEMS_MAX, ge=1, le=ITEMS_MAX)


class Fields(_Model):
    """A record of named values."""

    fields: dict[str, Spec]


Spec = Take | Each | Fields | Scalar
Each.model_rebuild()
Fields.model_rebuild()


class CanonicalSpec(_Model):
    """Where the canonical fields come from: expressions over `event`, `data` (as sent) and `fact` (newest version)."""

    business_object_type: Spec
    business_object_id: Spec
    actor: Spec
    occurred_at: Spec
    status: Spec = None
    due_by: Spec = None


class Adapter(_Model):
    """From one vendor's shape to the canonical model, for one type of fact (REQUIREMENTS A3).

    Attributes:
        source: the CloudEvents source, exact, or with a `*` at the end.
        shape: `schema`: data is written in the fact's own registered schemas; `own`: in the vendor's, mapped by `data`.
        accepts: versions taken from this source, with shape `schema`: how a version is rolled out, source by source.
        unnamed_version: which version JSON data is that names none; without it such data is refused.
        produces: the version of the fact's schema that `data` makes, with shape `own`.
    """

    adapter: Name
    type: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$")]
    source: Annotated[str, Field(min_length=1, max_length=512)]
    shape: Literal["schema", "own"]
    accepts: tuple[Annotated[int, Field(ge=1)], ...] = ()
    unnamed_version: int | None = Field(default=None, ge=1)
    produces: int | None = Field(default=None, ge=1)
    tables: dict[Name, dict[str, Scalar]] = Field(default_factory=dict)
    data: dict[str, Spec] = Field(default_factory=dict)
    canonical: CanonicalSpec


class Upcast(_Model):
    """One step between versions (A5): Avro resolution first, then `set` over `data` (old) and `resolved` (new)."""

    upcast: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$")]
    from_version: int = Field(alias="from", ge=1)
    to_version: int = Field(alias="to", ge=2)
    tables: dict[Name, dict[str, Scalar]] = Field(default_factory=dict)
    set: dict[str, Spec] = Field(default_factory=dict)


Compiled = Callable[[Mapping[str, Json]], Json]
"""From a scope to one value. Raises FieldError naming the field it was for."""


@dataclass(frozen=True, slots=True)
class CompiledAdapter:
    """An adapter that is ready to use."""

    model: Adapter
    data: Mapping[str, Compiled]
    canonical: Mapping[str, Compiled]

    def takes(self, source: str) -> bool:
        pattern = self.model.source
        return source.startswith(pattern[:-1]) if pattern.endswith("*") else source == pattern


@dataclass(frozen=True, slots=True)
class CompiledUpcast:
    """An upcast that is ready to use."""

    model: Upcast
    set: Mapping[str, Compiled]


def read(document: Document) -> Adapter | Upcast:
    """The model of a parsed file. Raises DefinitionError naming file, line and field."""
    data = document.data
    if not isinstance(data, dict) or ("adapter" in data) == ("upcast" in data):
        raise DefinitionError(
            "is neither an adapter nor an upcast", where=document.where(), hint="begin with one of them"
        )
    kind: type[Adapter] | type[Upcast] = Adapter if "adapter" in data else Upcast
    try:
        model = kind.model_validate(data)
    except PydanticError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Members of a union appear in pydantic's path under their class name, and are no part of the file.
        path = tuple(p for p in first["loc"] if not (isinstance(p, str) and p[:1].isupper()))
        raise DefinitionError(str(first["msg"]), where=document.where(_known(path, data)), hint="correct it") from None
    if isinstance(model, Adapter):
        _check_adapter(model, document)
    elif model.to_version != model.from_version + 1:
        raise DefinitionError(
            "an upcast leads to the next version", where=document.where(("to",)), hint="one file a step"
        )
    for name, table in model.tables.items():
        if len(table) > TABLE_ENTRIES_MAX:
            raise DefinitionError(
                f"{len(table)} entries, more than {TABLE_ENTRIES_MAX}", where=document.where(("tables", name))
            )
    return model


def _known(path: tuple[int | str, ...], data: Json) -> tuple[int | str, ...]:
    """The longest part of a path that leads through the file itself."""
    walked: list[int | str] = []
    for part in path:
        there = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if not there:
            if isinstance(data, dict) and isinstance(part, str) and part not in _SPECS:
                walked.append(part)
            break
        data = data[part]
        walked.append(part)
    return tuple(walked)


def _check_adapter(model: Adapter, document: Document) -> None:
    problems = {
        "accepts": (model.shape == "schema" and not model.accepts, "name the versions that are taken, as [1, 2]"),
        "unnamed_version": (
            model.unnamed_version is not None and model.unnamed_version not in model.accepts,
            "must be one of `accepts`",
        ),
        "data": ((model.shape == "own") != bool(model.data), "belongs to shape `own`, and is required there"),
        "produces": ((model.shape == "own") != (model.produces is not None), "belongs to shape `own`, required there"),
        "source": ("*" in model.source[:-1] or model.source == "*", "exact, or one `*` at the end after a prefix"),
    }
    for name, (wrong, message) in problems.items():
        if wrong:
            raise DefinitionError(
                f"{name}: {message}", where=document.where((name,)), hint="see services/intake/README.md"
            )


def compile_adapter(model: Adapter, document: Document, expressions: Expressions) -> CompiledAdapter:
    """Compile every expression, table and zone. Raises DefinitionError naming file, line and field."""
    over_data = _Compiler(model.tables, expressions, frozenset({"event", "data"}), document)
    over_fact = _Compiler(model.tables, expressions, frozenset({"event", "data", "fact"}), document)
    specs = {name: getattr(model.canonical, name) for name in CanonicalSpec.model_fields}
    return CompiledAdapter(
        model,
        {name: over_data.spec(spec, name, ("data", name)) for name, spec in model.data.items()},
        {name: over_fact.spec(spec, name, ("canonical", name)) for name, spec in specs.items()},
    )


def compile_upcast(model: Upcast, document: Document, expressions: Expressions) -> CompiledUpcast:
    """Compile every expression, table and zone. Raises DefinitionError naming file, line and field."""
    compiler = _Compiler(model.tables, expressions, frozenset({"data", "resolved"}), document)
    return CompiledUpcast(model, {name: compiler.spec(spec, name, ("set", name)) for name, spec in model.set.items()})


class _Compiler:
    def __init__(
        self,
        tables: Mapping[str, Mapping[str, Json]],
        expressions: Expressions,
        names: frozenset[str],
        document: Document,
    ) -> None:
        self.tables = tables
        self.expressions = expressions
        self.names = names
        self.document = document

    def spec(self, spec: Spec, field: str, path: tuple[str | int, ...]) -> Compiled:
        if isinstance(spec, Take):
            return self._take(spec, field, path)
        if isinstance(spec, Each):
            return self._each(spec, field, path)
        if isinstance(spec, Fields):
            parts = {k: self.spec(v, f"{field}.{k}", (*path, "fields", k)) for k, v in spec.fields.items()}
            return lambda values: {name: part(values) for name, part in parts.items()}
        return self._scalar(spec, field, path)

    def _scalar(self, value: Json, field: str, path: tuple[str | int, ...]) -> Compiled:
        try:
            text = expression_in(value) if isinstance(value, str) else None
            if text is None:
                return lambda _values: value
            program = self.expressions.compile(text, self.names)
        except ExpressionError as error:
            raise DefinitionError(
                f"{error.where}: {error.message}", where=self.document.where(path), hint=error.hint
            ) from None

        def evaluate(values: Mapping[str, Json]) -> Json:
            try:
                return program.evaluate(values)
            except ExpressionError as error:
                raise FieldError(field, f"{error.message}, in {error.where}", hint=error.hint) from None

        return evaluate

    def _take(self, spec: Take, field: str, path: tuple[str | int, ...]) -> Compiled:
        value = self._scalar(spec.of, field, (*path, "of"))
        steps: list[Callable[[Json], Json]] = []
        if spec.table is not None:
            if spec.table not in self.tables:
                raise DefinitionError(
                    f"no table is called {spec.table}", where=self.document.where((*path, "table")), hint="declare it"
                )
            steps.append(_translation(self.tables[spec.table], spec.table, field))
        if spec.time is not None:
            steps.append(_clock(spec.time, field, self.document.where((*path, "time"))))
        nulls = tuple(_tagged(n) for n in spec.nulls)

        def take(values: Mapping[str, Json]) -> Json:
            found = value(values)
            if found is None or (nulls and _tagged(found) in nulls):
                return None
            for step in steps:
                found = step(found)
            return found

        return take

    def _each(self, spec: Each, field: str, path: tuple[str | int, ...]) -> Compiled:
        source = self._scalar(spec.each, field, (*path, "each"))
        inner = _Compiler(self.tables, self.expressions, self.names | {"item"}, self.document)
        item = inner.spec(spec.item, f"{field}[]", (*path, "item"))

        def each(values: Mapping[str, Json]) -> Json:
            found = source(values)
            if found is None:
                return None
            if not isinstance(found, list):
                raise FieldError(field, f"a list is expected, found {type(found).__name__}", hint="send a JSON array")
            plain = dict(values)
            made: list[Json] = []
            for element in found[: spec.items_max + 1]:
                value = item(self.expressions.scope({**plain, "item": element}))
                made += value if spec.flat and isinstance(value, list) else [value]
                if len(made) > spec.items_max:
                    raise FieldError(field, f"more than {spec.items_max} items", hint="send fewer")
            return made

        return each


def _tagged(value: Json) -> tuple[str, Json]:
    """A scalar with its type, since `True == 1` in Python and not in JSON. Lists and maps never are a null marker."""
    return (type(value).__name__, value if not isinstance(value, list | dict) else None)


def _translation(table: Mapping[str, Json], name: str, field: str) -> Callable[[Json], Json]:
    def translate(found: Json) -> Json:
        if isinstance(found, bool):
            key = "true" if found else "false"
        elif isinstance(found, int | str):
            key = str(found)
        else:
            raise FieldError(field, f"a {type(found).__name__} cannot be translated by table {name}", hint="send text")
        if key not in table:
            # The value stays out of the text: it may be personal data, and texts go to logs and headers.
            raise UnmappedError(
                field,
                f"a value ({_kind(found)}) that table {name} does not translate",
                hint="add it to the adapter's table, or have the sender correct it; then replay",
            )
        return table[key]

    return translate


def _kind(value: Json) -> str:
    return f"text of {len(value)} characters" if isinstance(value, str) else type(value).__name__


def _clock(spec: Time, field: str, where: str) -> Callable[[Json], Json]:
    zone = _zone(spec.zone, where)
    if spec.format is not None:
        used = set(re.findall(r"%(.)", spec.format))
        if (zone is None and spec.to == "instant") or not used <= _TIME_DIRECTIVES:
            raise DefinitionError(
                "a format needs a zone, and directives for local times only",
                where=where,
                hint="no %z; declare the zone",
            )

    def clock(found: Json) -> Json:
        if isinstance(found, bool) or not isinstance(found, str):
            raise FieldError(field, f"a timestamp is text, found {type(found).__name__}", hint="send RFC 3339")
        if spec.to == "date":
            return _local(found, spec, field).date().isoformat()
        return _parse(found, spec, zone, field).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    return clock


def _zone(name: str | None, where: str) -> tzinfo | None:
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise DefinitionError(
            f"no time zone is called {name}", where=where, hint="use a name like Europe/Vienna"
        ) from None


def _parse(text: str, spec: Time, zone: tzinfo | None, field: str) -> datetime:
    if zone is None:
        try:
            return instant(text, field).astimezone(UTC)
        except (ValidationError, OverflowError) as error:
            if isinstance(error, FieldError):
                raise
            raise FieldError(field, "a time outside the calendar", hint="correct it") from None
    local = _local(text, spec, field)
    if local.tzinfo is not None:
        # A sender that does say the offset is believed: it is more exact than our declaration.
        return local.astimezone(UTC)
    return _localised(local, spec, zone, field)


def _local(text: str, spec: Time, field: str) -> datetime:
    try:
        if spec.format is not None:
            return datetime.strptime(text, spec.format)  # noqa: DTZ007  the declared zone is attached by the caller
        return datetime.fromisoformat(text)
    except ValueError:
        shown = spec.format or "ISO 8601"
        raise FieldError(field, f"not a time of the declared format {shown}", hint="correct it at the sender") from None


def _localised(local: datetime, spec: Time, zone: tzinfo, field: str) -> datetime:
    """The instant of a local time; the hour that a clock skips or shows twice is no silent choice (A3)."""
    first = local.replace(tzinfo=zone, fold=0)
    second = local.replace(tzinfo=zone, fold=1)
    if first.utcoffset() == second.utcoffset():
        return first.astimezone(UTC)
    exists = first.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == local
    if not exists:
        raise FieldError(field, "a local time that clocks skipped", hint="have the sender say the offset")
    if spec.ambiguous == "refuse":
        raise NaiveTimeError(
            field,
            "a local time that clocks showed twice",
            hint="send the offset, or declare `ambiguous` in the adapter",
        )
    return (first if spec.ambiguous == "earlier" else second).astimezone(UTC)
