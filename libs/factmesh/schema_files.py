"""Schemas as files: `<dir>/<subject>/v<N>.avsc` and the committed `ids.lock` that gives each its id and, once
released, its hash. Reading and writing these files lives here; no network, and no judgement on compatibility.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from factmesh.avro import Schema, load_json, parse
from factmesh.errors import SchemaError
from factmesh.ids import canonical_json

LOCK_NAME: Final = "ids.lock"
PLATFORM_IDS_MAX: Final = 9_999
"""Ids up to here are the platform's own; a project's begin at 10000, so that the two never meet."""
ID_MAX: Final = (1 << 31) - 1
_SUBJECT = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_FILE = re.compile(r"v([1-9][0-9]{0,3})\.avsc")
_KEY = re.compile(r"(?P<subject>[^/]+)/v(?P<version>[1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class LockEntry:
    """One line of `ids.lock`: a bare id while a version is a draft, id and `sha256` once it is released."""

    id: int
    sha256: str | None = None

    @property
    def released(self) -> bool:
        return self.sha256 is not None


@dataclass(frozen=True, slots=True)
class SchemaFile:
    """A version as it lies in a directory, with its line of the lock."""

    path: Path
    schema: Schema
    lock: LockEntry

    @property
    def key(self) -> str:
        return f"{self.schema.subject}/v{self.schema.version}"


def platform_dir() -> Path:
    """The platform's own schemas: inside the installed package, or the repository's when the install is editable."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "schemas", package.parent.parent / "schemas"):
        if (candidate / LOCK_NAME).is_file():
            return candidate
    raise SchemaError(
        "the platform's schemas are not installed", where=str(package), hint="reinstall the package, or set schemas_dir"
    )


def digest_of(source: Mapping[str, Any]) -> str:
    """The hash of a released schema: over its content, so that reformatting the file changes nothing."""
    return hashlib.sha256(canonical_json(source)).hexdigest()


def read_lock(folder: Path) -> dict[str, LockEntry]:
    """The lock of a schema directory. Raises SchemaError for a malformed line or an id given twice."""
    path = folder / LOCK_NAME
    if not path.is_file():
        raise SchemaError("there is no id lock", where=str(path), hint=f"run `factmesh schema lock {folder}`")
    raw = load_json(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise SchemaError('expected an object like {"subject/v1": 10000}', where=str(path), hint="correct the lock")
    entries: dict[str, LockEntry] = {}
    taken: dict[int, str] = {}
    for key, value in raw.items():
        entry = _entry(key, value, str(path))
        if entry.id in taken:
            raise SchemaError(
                f"id {entry.id} is given to {taken[entry.id]} and to {key}",
                where=str(path),
                hint="give the newer one the next free id: bytes name their schema by it",
            )
        taken[entry.id] = key
        entries[key] = entry
    return entries


def _entry(key: str, value: Any, where: str) -> LockEntry:
    if not _KEY.fullmatch(key):
        raise SchemaError(f"{key!r} is not <subject>/v<version>", where=where, hint="correct the lock")
    id_, sha256 = (value.get("id"), value.get("sha256")) if isinstance(value, dict) else (value, None)
    if type(id_) is not int or not 1 <= id_ <= ID_MAX:
        raise SchemaError(f"{key} has no id from 1 to {ID_MAX}", where=where, hint="correct the lock")
    if sha256 is not None and (not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise SchemaError(f"{key} has a sha256 that is none", where=where, hint="correct the lock")
    return LockEntry(id_, sha256)


def write_lock(folder: Path, entries: Mapping[str, LockEntry]) -> None:
    """Replace the lock as a whole, in the order of ids."""
    lines: dict[str, Any] = {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1].id):
        lines[key] = {"id": entry.id, "sha256": entry.sha256} if entry.released else entry.id
    _replace(folder / LOCK_NAME, json.dumps(lines, indent=2) + "\n")


def write_schema(folder: Path, subject: str, version: int, source: Mapping[str, Any]) -> Path:
    """A new version's file. Raises SchemaError when there is one already: released files are immutable."""
    if not _SUBJECT.fullmatch(subject):
        raise SchemaError(f"subject {subject!r} is not like noun.verb_past", where=str(folder), hint="rename it")
    path = folder / subject / f"v{version}.avsc"
    if path.exists():
        raise SchemaError("there is a file already", where=str(path), hint="add the next version instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(source, indent=2, ensure_ascii=False) + "\n")
    return path


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def sources(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every `.avsc` of a directory by `<subject>/v<version>`, unparsed. Raises SchemaError for files out of place."""
    if not folder.is_dir():
        raise SchemaError("there is no such schema directory", where=str(folder), hint="create it, or correct the path")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.avsc")):
        match = _FILE.fullmatch(path.name)
        subject = path.parent.name
        if match is None or path.parent.parent != folder or not _SUBJECT.fullmatch(subject):
            raise SchemaError(
                "a schema file out of place", where=str(path), hint="it belongs at <noun.verb_past>/v<number>.avsc"
            )
        source = load_json(path.read_bytes(), str(path))
        if not isinstance(source, dict):
            raise SchemaError("the top level must be a record", where=str(path), hint="correct the file")
        found[f"{subject}/v{match[1]}"] = (path, source)
    return found


def read_dir(folder: Path) -> tuple[SchemaFile, ...]:
    """A directory's schemas with their ids. Raises SchemaError for a file without an id, or changed since release."""
    lock = read_lock(folder)
    found = sources(folder)
    for key in sorted(lock.keys() - found.keys()):
        raise SchemaError(
            f"{key} has id {lock[key].id} and no file",
            where=str(folder),
            hint="restore the file: bytes written with it may come back for as long as the dedup horizon",
        )
    files = []
    for key, (path, source) in found.items():
        entry = lock.get(key)
        if entry is None:
            raise SchemaError(
                f"no id for {key} in {LOCK_NAME}", where=str(path), hint=f"run `factmesh schema lock {folder}`"
            )
        if entry.sha256 is not None and entry.sha256 != digest_of(source):
            raise SchemaError(
                f"{key} was changed after its release", where=str(path), hint="restore it and add the next version"
            )
        subject, _, version = key.rpartition("/v")
        files.append(SchemaFile(path, parse(source, subject=subject, version=int(version), id=entry.id), entry))
    return tuple(sorted(files, key=lambda f: (f.schema.subject, f.schema.version)))


def read_dirs(folders: Sequence[Path]) -> tuple[SchemaFile, ...]:
    """Several directories as one. Raises SchemaError when a subject or an id appears in two of them."""
    files: list[SchemaFile] = []
    subjects: dict[str, Path] = {}
    ids: dict[int, SchemaFile] = {}
    for folder in folders:
        for file in read_dir(folder):
            other = subjects.setdefault(file.schema.subject, folder)
            if other != folder:
                raise SchemaError(
                    f"subject {file.schema.subject} is also in {other}", where=str(folder), hint="one home a subject"
                )
            twin = ids.setdefault(file.lock.id, file)
            if twin is not file:
                raise SchemaError(
                    f"id {file.lock.id} is also that of {twin.key} in {twin.path.parent.parent}",
                    where=str(file.path),
                    hint="a project's ids begin at 10000",
                )
            files.append(file)
    return tuple(files)


def next_id(entries: Mapping[str, LockEntry], *, platform: bool) -> int:
    """The next free id of a directory."""
    floor = 0 if platform else PLATFORM_IDS_MAX
    return max((e.id for e in entries.values()), default=floor) + 1
