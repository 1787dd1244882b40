"""What may be released: the lint, the compatibility both ways, ids and hashes (DESIGN 11, A5)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from factmesh import schema_files, schemas_check
from factmesh.errors import SchemaError
from factmesh.registry import DirectoryRegistry, open_registry
from factmesh.schema_files import LockEntry, digest_of, platform_dir, read_dir, read_lock, write_lock
from factmesh_cli.schema import app

ROOT = Path(__file__).resolve().parents[2]


def schema(*fields: Any, name: str = "moved", **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": name, "namespace": "parcel", "fields": list(fields), **more}


def field(name: str, type: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": type, **more}


ID = field("id", "string")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "schemas"


def put(folder: Path, *versions: dict[str, Any], subject: str = "parcel.moved", first_id: int = 10_000) -> None:
    entries = read_lock(folder) if (folder / "ids.lock").exists() else {}
    for n, source in enumerate(versions, 1):
        schema_files.write_schema(folder, subject, n, source)
        entries[f"{subject}/v{n}"] = LockEntry(first_id + n - 1)
    write_lock(folder, entries)


def rules_of(folder: Path) -> set[str]:
    return {f.rule for f in schemas_check.judge([folder])}


def test_the_platforms_and_the_examples_schemas_may_go() -> None:
    """What we ship passes our own check, together: no id and no subject twice (`make verify`)."""
    folders = [platform_dir(), *sorted((ROOT / "examples").glob("*/schemas"))]
    assert [str(f) for f in schemas_check.judge(folders)] == []


LOGICAL = {"type": "long", "logicalType": "timestamp-millis"}
MICROS = {"type": "long", "logicalType": "timestamp-micros"}
DECIMAL = {"type": "bytes", "logicalType": "decimal", "precision": 8, "scale": 2}
ENUM = {"type": "enum", "name": "size", "symbols": ["s", "l"], "default": "s"}
REC_A = {"type": "record", "name": "a", "fields": [ID]}
REC_B = {"type": "record", "name": "b", "fields": [ID]}


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        (schema(field("e", {"type": "enum", "name": "size", "symbols": ["s"]})), "enum-default"),
        (schema(field("u", [REC_A, REC_B])), "no-record-union"),
        (schema(field("u", {"type": "array", "items": ["null", REC_A, REC_B]})), "no-record-union"),
        (schema(field("u", ["int", "long"])), "no-ambiguous-union"),
        (schema(field("u", ["null", "string", ENUM])), "no-ambiguous-union"),
        (schema(field("t", LOGICAL, default=0)), "no-logical-default"),
        (schema(field("t", [LOGICAL, "null"], default=0)), "no-logical-default"),
        (schema(field("t", "bytes", default="")), "no-logical-default"),
        (schema(field("t", "int", default="x")), "files"),
        (schema(field("t", ["null", "string"], default="x")), "default-fits"),
        (schema(field("e", ENUM, default="xl")), "default-fits"),
        (schema(ID, name="other"), "record-name"),
        (schema(field("a", {"type": "array", "items": "null"})), "files"),
        (schema(field("a", ["null", "moved"])), "files"),
    ],
)
def test_each_rule_refuses(folder: Path, source: dict[str, Any], rule: str) -> None:
    """Every rule of the lint has a schema that it refuses, alone (DESIGN 11)."""
    put(folder, source)
    assert rules_of(folder) == {rule}


@pytest.mark.parametrize(
    "source",
    [
        schema(field("e", ENUM, default="s"), field("t", ["null", LOGICAL], default=None)),
        schema(field("o", ["null", REC_A], default=None), field("a", {"type": "array", "items": "string"}, default=[])),
        schema(field("u", ["null", "string", "long"], default=None), field("m", {"type": "map", "values": "int"})),
    ],
)
def test_and_lets_pass_what_is_well(folder: Path, source: dict[str, Any]) -> None:
    """A rule that refuses everything would be no rule."""
    put(folder, source)
    assert rules_of(folder) == set()


@pytest.mark.parametrize(
    ("old", "new", "rules"),
    [
        (schema(ID), schema(ID, field("n", "string")), {"full-transitive"}),
        (schema(ID, field("n", "string")), schema(ID), {"full-transitive"}),
        (schema(ID, field("n", "int")), schema(ID, field("n", "long")), {"full-transitive"}),
        (schema(ID, field("n", "string")), schema(ID, field("n", ["null", "string"])), {"full-transitive"}),
        (schema(field("t", LOGICAL)), schema(field("t", "long")), {"no-change"}),
        (schema(field("t", LOGICAL)), schema(field("t", MICROS)), {"no-change"}),
        (schema(field("t", DECIMAL)), schema(field("t", {**DECIMAL, "scale": 3})), {"no-change"}),
        (schema(field("t", DECIMAL)), schema(field("t", {**DECIMAL, "precision": 9})), {"no-change"}),
        (schema(field("t", ["null", DECIMAL])), schema(field("t", ["null", {**DECIMAL, "scale": 1}])), {"no-change"}),
        (schema(field("t", "bytes")), schema(field("t", "string")), {"no-change"}),
        (schema(ID), schema(ID) | {"namespace": "parcels"}, {"no-change"}),
        (schema(ID), schema(ID, field("n", "string", default="")), set()),
        (schema(field("e", ENUM)), schema(field("e", {**ENUM, "symbols": ["s", "m", "l"]})), set()),
    ],
)  # fmt: skip
def test_versions_are_compared_both_ways(
    folder: Path, old: dict[str, Any], new: dict[str, Any], rules: set[str]
) -> None:
    """Replays need an old writer with a new reader, rollbacks the reverse; a change of meaning is caught too."""
    put(folder, old, new)
    assert rules_of(folder) & {"full-transitive", "no-change"} == rules


def test_compatibility_is_transitive(folder: Path) -> None:
    """v3 is held against v1 too, not only against its neighbour."""
    put(
        folder,
        schema(ID, field("n", "string", default="")),
        schema(ID),
        schema(ID, field("n", "long", default=0)),
    )
    findings = schemas_check.judge([folder])
    assert {f.rule for f in findings} == {"full-transitive"}
    assert all("v3" in str(f) and "v1.avsc" in str(f) for f in findings)


def test_versions_have_no_holes(folder: Path) -> None:
    """A missing version is a file that somebody forgot."""
    put(folder, schema(ID), schema(ID, doc="b"), schema(ID, doc="c"))
    (folder / "parcel.moved" / "v2.avsc").unlink()
    entries = read_lock(folder)
    del entries["parcel.moved/v2"]
    write_lock(folder, entries)
    assert rules_of(folder) == {"versions"}


def test_a_projects_ids_begin_at_10000(folder: Path) -> None:
    """So that the platform's and a project's never meet, in any mesh."""
    put(folder, schema(ID), first_id=50)
    assert rules_of(folder) == {"id-range"}


# ── files and locks ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_without_an_id_is_named(folder: Path) -> None:
    """A schema that nobody gave an id cannot be written with: the text says what to run."""
    put(folder, schema(ID))
    schema_files.write_schema(folder, "parcel.moved", 2, schema(ID, doc="new"))
    with pytest.raises(
        SchemaError, match=r"v2\.avsc: no id for parcel\.moved/v2 in ids\.lock \(run `factmesh schema lock"
    ):
        DirectoryRegistry([folder])


def test_an_id_without_a_file_is_named(folder: Path) -> None:
    """Deleting a version would make bytes undecodable that may still come back."""
    put(folder, schema(ID))
    (folder / "parcel.moved" / "v1.avsc").unlink()
    with pytest.raises(SchemaError, match=r"parcel\.moved/v1 has id 10000 and no file"):
        read_dir(folder)


def test_a_released_file_is_immutable(folder: Path) -> None:
    """A change after the release is caught by its hash, without git; a draft may change; layout is no change."""
    put(folder, schema(ID))
    path = folder / "parcel.moved" / "v1.avsc"
    path.write_text(json.dumps(schema(ID, field("n", "int", default=0))))
    read_dir(folder)
    write_lock(folder, {"parcel.moved/v1": LockEntry(10_000, digest_of(json.loads(path.read_text())))})
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    read_dir(folder)
    path.write_text(json.dumps(schema(ID, field("n", "int", default=1))))
    with pytest.raises(
        SchemaError, match=r"parcel\.moved/v1 was changed after its release \(restore it and add the next"
    ):
        read_dir(folder)


@pytest.mark.parametrize(
    ("lock", "text"),
    [
        ('{"parcel.moved/v1": 10000, "parcel.moved/v1": 10001}', "duplicate key parcel.moved/v1"),
        ('{"parcel.moved/v1": 10000, "parcel.moved/v2": 10000}', "id 10000 is given to parcel.moved/v1 and to"),
        ('{"parcel.moved/v1": "10000"}', "has no id from 1 to"),
        ('{"parcel.moved/v1": 0}', "has no id from 1 to"),
        ('{"parcel.moved/v1": true}', "has no id from 1 to"),
        ('{"parcel.moved/v1": {"id": 1, "sha256": "x"}}', "has a sha256 that is none"),
        ('{"parcel.moved": 1}', "is not <subject>/v<version>"),
        ("[]", "expected an object like"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_lock_is_named(folder: Path, lock: str, text: str) -> None:
    """The lock is written by people and merges: what is wrong in it is said with its path."""
    put(folder, schema(ID))
    (folder / "ids.lock").write_text(lock)
    with pytest.raises(SchemaError) as caught:
        read_dir(folder)
    assert text in str(caught.value)
    assert "ids.lock" in str(caught.value)


def test_no_lock_and_no_folder(folder: Path) -> None:
    """Both are said with what to do."""
    with pytest.raises(SchemaError, match="there is no id lock"):
        read_dir(folder)
    put(folder, schema(ID))
    shutil.rmtree(folder)
    with pytest.raises(SchemaError, match="there is no id lock"):
        read_dir(folder)


@pytest.mark.parametrize("place", ["v1.avsc", "parcel.moved/1.avsc", "parcel.moved/deep/v1.avsc", "Moved/v1.avsc"])
def test_files_out_of_place(folder: Path, place: str) -> None:
    """A schema that would be overlooked is an error instead."""
    put(folder, schema(ID))
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(schema(ID)))
    with pytest.raises(SchemaError, match="a schema file out of place"):
        read_dir(folder)


def test_two_directories_may_not_meet(tmp_path: Path) -> None:
    """The platform's and a project's directory are one registry: a subject has one home, an id one schema."""
    put(tmp_path / "a", schema(ID))
    put(tmp_path / "b", schema(ID))
    with pytest.raises(SchemaError, match=r"subject parcel\.moved is also in .*one home"):
        DirectoryRegistry([tmp_path / "a", tmp_path / "b"])
    put(tmp_path / "c", schema(ID, name="lost"), subject="parcel.lost")
    with pytest.raises(SchemaError, match=r"id 10000 is also that of parcel\.moved/v1"):
        DirectoryRegistry([tmp_path / "a", tmp_path / "c"])


async def test_a_project_is_opened_with_the_platform(tmp_path: Path) -> None:
    """A project folder outside the repository adds its schemas by its place alone (G8)."""
    put(tmp_path / "schemas", schema(ID))
    registry = open_registry(project=tmp_path)
    assert (await registry.by_id(10_000)).subject == "parcel.moved"
    assert (await registry.latest("factmesh.fact")).name == "fact"


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────

run = CliRunner()


def test_lock_release_check(folder: Path) -> None:
    """A new version is locked, checked and released by commands; what is released cannot be changed (A5)."""
    schema_files.write_schema(folder, "parcel.moved", 1, schema(ID))
    assert run.invoke(app, ["lock", str(folder)]).output == "parcel.moved/v1: id 10000\n"
    schema_files.write_schema(folder, "parcel.moved", 2, schema(ID, field("n", "string")))
    assert run.invoke(app, ["lock", str(folder)]).output == "parcel.moved/v2: id 10001\n"
    refused = run.invoke(app, ["release", str(folder)])
    assert refused.exit_code == 1
    assert "v1.avsc cannot read" not in refused.output
    assert "v2.avsc cannot read what v1.avsc wrote" in refused.output
    assert not any(e.released for e in read_lock(folder).values())
    (folder / "parcel.moved" / "v2.avsc").write_text(json.dumps(schema(ID, field("n", "string", default=""))))
    released = run.invoke(app, ["release", str(folder)])
    assert released.exit_code == 0, released.output
    assert all(e.released for e in read_lock(folder).values())
    (folder / "parcel.moved" / "v2.avsc").write_text(json.dumps(schema(ID, field("n", "string", default="x"))))
    changed = run.invoke(app, ["check", str(folder)])
    assert changed.exit_code == 1
    assert "was changed after its release" in changed.output


def test_show_and_errors(folder: Path) -> None:
    """The list, one schema, and an error that people can act on."""
    put(folder, schema(ID))
    shown = run.invoke(app, ["show", "parcel.moved", str(folder)])
    assert json.loads(shown.output) == schema(ID)
    missing = run.invoke(app, ["show", "parcel.lost", str(folder)])
    assert missing.exit_code == 2
    assert "no schema parcel.lost" in missing.output
