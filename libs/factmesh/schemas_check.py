"""Whether schema files may be released: compatible both ways over all versions, and by our lint, which is a table.
The only importer of Apache's `avro` package, for its compatibility check; no bytes are read or written here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from factmesh import schema_files
from factmesh.avro import Schema
from factmesh.avro_strict import MisfitError, compile_check
from factmesh.errors import SchemaError
from factmesh.schema_files import PLATFORM_IDS_MAX, SchemaFile

PLATFORM_PREFIX: Final = "factmesh."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that forbids a release: the rule, the file, and what to do."""

    rule: str
    where: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} ({self.hint}) [{self.rule}]"


@dataclass(frozen=True, slots=True)
class Node:
    """One type inside a schema, with the path to it."""

    path: str
    type: Any
    field: Mapping[str, Any] | None = None


def walk(type_: Any, path: str = "", field: Mapping[str, Any] | None = None) -> Iterator[Node]:
    """Every type of a schema, outside first; `field` is set where the type is a field's own."""
    yield Node(path, type_, field)
    if isinstance(type_, list):
        for branch in type_:
            yield from walk(branch, path)
    elif isinstance(type_, Mapping):
        for f in type_.get("fields", ()):
            yield from walk(f["type"], f"{path}.{f['name']}" if path else str(f["name"]), f)
        for inner in ("items", "values"):
            if inner in type_:
                yield from walk(type_[inner], f"{path}[]")
        if isinstance(type_.get("type"), (Mapping, list)):
            yield from walk(type_["type"], path)


def _kind(type_: Any) -> str:
    if isinstance(type_, list):
        return "union"
    return _kind(type_["type"]) if isinstance(type_, Mapping) else str(type_)


# ── rules over one version ────────────────────────────────────────────────────────────────────────────────────────


def _enum_has_default(file: SchemaFile) -> Iterator[tuple[str, str]]:
    for node in walk(file.schema.source):
        if isinstance(node.type, Mapping) and node.type.get("type") == "enum" and "default" not in node.type:
            yield (
                f"field {node.path}: enum {node.type['name']} has no default symbol",
                "add one, e.g. unknown: without it no symbol can ever be added",
            )


def _no_union_of_records(file: SchemaFile) -> Iterator[tuple[str, str]]:
    for node in walk(file.schema.source):
        if isinstance(node.type, list) and sum(_kind(b) == "record" for b in node.type) > 1:
            yield (
                f"field {node.path}: a union of records",
                "readers tell the branches apart by guessing: use one optional field for each",
            )


#: What JSON and Python cannot tell apart inside a union.
_LOOKS: Final = {
    "int": "number", "long": "number", "float": "number", "double": "number", "string": "text", "enum": "text",
    "bytes": "text", "fixed": "text", "array": "array", "map": "object", "record": "object",
}  # fmt: skip


def _no_ambiguous_union(file: SchemaFile) -> Iterator[tuple[str, str]]:
    for node in walk(file.schema.source):
        if isinstance(node.type, list):
            kinds = {_kind(b) for b in node.type}  # a type that is there twice is Avro's own error, or a record
            looks = [_LOOKS[k] for k in kinds if k in _LOOKS]
            for look in sorted({x for x in looks if looks.count(x) > 1}):
                yield f"field {node.path}: two branches that are both {look} in JSON", "keep one of them"


def _no_default_on_logical_or_bytes(file: SchemaFile) -> Iterator[tuple[str, str]]:
    for node in walk(file.schema.source):
        if node.field is None or "default" not in node.field:
            continue
        first = node.type[0] if isinstance(node.type, list) and node.type else node.type
        logical = isinstance(first, Mapping) and "logicalType" in first
        if logical or _kind(first) in ("bytes", "fixed"):
            yield (
                f"field {node.path}: a default on {'a logical type' if logical else 'bytes'}",
                "libraries read such defaults differently: make it a union with null first, default null",
            )


def _default_fits(file: SchemaFile) -> Iterator[tuple[str, str]]:
    for node in walk(file.schema.source):
        if node.field is None or "default" not in node.field:
            continue
        first = node.type[0] if isinstance(node.type, list) and node.type else node.type
        if _kind(first) in ("bytes", "fixed"):
            continue
        try:
            compile_check(first, file.schema.named)(node.field["default"], node.path)
        except MisfitError as misfit:
            yield f"the default does not fit: {misfit}", "a union's default is of its first branch"


def _named_like_subject(file: SchemaFile) -> Iterator[tuple[str, str]]:
    last = file.schema.subject.rpartition(".")[2]
    if file.schema.name != last:
        yield f"the record is called {file.schema.name}", f"call it {last}: subject and record share their name"


def _ids_of_their_owner(file: SchemaFile) -> Iterator[tuple[str, str]]:
    platform = file.schema.subject.startswith(PLATFORM_PREFIX)
    if platform != (file.lock.id <= PLATFORM_IDS_MAX):
        yield (
            f"id {file.lock.id} for {file.schema.subject}",
            f"the platform's ids end at {PLATFORM_IDS_MAX}, a project's begin at {PLATFORM_IDS_MAX + 1}",
        )


RULES: Final[Mapping[str, Callable[[SchemaFile], Iterator[tuple[str, str]]]]] = {
    "enum-default": _enum_has_default,
    "no-record-union": _no_union_of_records,
    "no-ambiguous-union": _no_ambiguous_union,
    "no-logical-default": _no_default_on_logical_or_bytes,
    "default-fits": _default_fits,
    "record-name": _named_like_subject,
    "id-range": _ids_of_their_owner,
}
"""Rules over one version. That recursion and arrays of zero-byte items are refused stands in `avro_strict`: such a
schema cannot even be loaded, whoever registered it."""


# ── rules over two versions, both ways: what Apache's check lets pass ─────────────────────────────────────────────


def changes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """What must not change between two versions, wherever both have the same field."""
    if isinstance(old, list) and isinstance(new, list):
        for a in old:
            for b in new:
                if _kind(a) == _kind(b):
                    yield from changes(a, b, path)
        return
    if isinstance(old, list) or isinstance(new, list):
        return  # Apache's check judges a type that becomes optional
    a, b = _as_mapping(old), _as_mapping(new)
    for attribute in ("logicalType", "precision", "scale"):
        if a.get(attribute) != b.get(attribute):
            yield (
                f"field {path}: {attribute} {a.get(attribute)!r} became {b.get(attribute)!r}",
                "the bytes stay the same and mean something else: add a new field",
            )
    if {_kind(old), _kind(new)} == {"bytes", "string"}:
        yield f"field {path}: bytes and text exchanged", "not every byte sequence is text: add a new field"
    if a.get("namespace") != b.get("namespace") and ("namespace" in a or "namespace" in b):
        yield f"{path or 'record'}: namespace {a.get('namespace')!r} became {b.get('namespace')!r}", "keep it"
    fields = {f["name"]: f for f in b.get("fields", ())}
    for f in a.get("fields", ()):
        if f["name"] in fields:
            yield from changes(f["type"], fields[f["name"]]["type"], f"{path}.{f['name']}" if path else str(f["name"]))
    for inner in ("items", "values"):
        if inner in a and inner in b:
            yield from changes(a[inner], b[inner], f"{path}[]")


def _as_mapping(type_: Any) -> Mapping[str, Any]:
    return type_ if isinstance(type_, Mapping) else {"type": type_}


def incompatibility(reader: Schema, writer: Schema) -> str:
    """Why `reader` cannot read what `writer` wrote, by Apache's own check; "" when it can."""
    try:
        from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
        from avro.errors import AvroException
        from avro.schema import parse
    except ImportError as error:
        raise SchemaError(
            "the compatibility check needs the package avro", hint="pip install 'factmesh[cli]'"
        ) from error
    try:
        checker = ReaderWriterCompatibilityChecker()  # type: ignore[no-untyped-call]
        result = checker.get_compatibility(parse(reader.text), parse(writer.text))
    except AvroException as error:
        return f"Apache's avro refuses it: {error}"
    if result.compatibility is SchemaCompatibilityType.compatible:
        return ""
    return f"{'; '.join(sorted(result.messages))} at {', '.join(sorted(result.locations))}"


def judge(folders: Sequence[Path], *, compatibility: bool = True) -> tuple[Finding, ...]:
    """Everything that forbids releasing these directories; empty when they may go."""
    try:
        files = schema_files.read_dirs(folders)
    except SchemaError as error:
        return (Finding("files", error.where, error.message, error.hint),)
    findings = [
        Finding(rule, str(file.path), message, hint)
        for file in files
        for rule, check in RULES.items()
        for message, hint in check(file)
    ]
    for _, group in itertools.groupby(files, key=lambda f: f.schema.subject):
        findings.extend(_judge_subject(list(group), compatibility=compatibility))
    return tuple(findings)


def _judge_subject(versions: list[SchemaFile], *, compatibility: bool) -> Iterator[Finding]:
    numbers = [f.schema.version for f in versions]
    if numbers != list(range(1, len(numbers) + 1)):
        yield Finding("versions", str(versions[0].path.parent), f"versions are {numbers}", "number them 1, 2, 3, …")
    for old, new in itertools.combinations(versions, 2):
        for message, hint in changes(old.schema.source, new.schema.source):
            yield Finding("no-change", str(new.path), f"against {old.path.name}: {message}", hint)
        if not compatibility:
            continue
        for reader, writer in ((new, old), (old, new)):
            why = incompatibility(reader.schema, writer.schema)
            if why:
                yield Finding(
                    "full-transitive",
                    str(new.path),
                    f"{reader.path.name} cannot read what {writer.path.name} wrote: {why}",
                    "give added and removed fields a default, or start a new major",
                )
