"""Golden bytes: what was once written is read by today's readers, for ever (DESIGN 11)."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import avro.io
import avro.schema
import pytest

from factmesh import avro as codec
from factmesh import avro_json
from factmesh.schema_files import SchemaFile

GOLDEN = Path(__file__).resolve().parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_generate", GOLDEN / "generate.py")
assert _spec is not None
assert _spec.loader is not None
_generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_generate)
FILES: tuple[SchemaFile, ...] = _generate.files()
NEWEST = {f.schema.subject: f.schema for f in FILES}
HELP = "a draft changed: delete its golden files and run `python tests/unit/golden/generate.py`; a release must not"


def _stem(file: SchemaFile) -> str:
    return f"{file.schema.subject}.v{file.schema.version}"


def test_every_version_has_golden_bytes_and_none_is_orphaned() -> None:
    """A new version comes with its bytes; a version that disappears leaves a file behind that tells."""
    assert {_stem(f) for f in FILES} == {p.stem for p in GOLDEN.glob("*.bin")}, "run tests/unit/golden/generate.py"


@pytest.mark.parametrize("file", FILES, ids=_stem)
def test_golden_bytes_read_as_they_were_written(file: SchemaFile) -> None:
    """Each version's bytes, read with its own schema, say what they said."""
    value = (GOLDEN / f"{_stem(file)}.bin").read_bytes()
    wanted = json.loads((GOLDEN / f"{_stem(file)}.json").read_text(encoding="utf-8"))
    assert codec.peek_schema_id(value) == file.lock.id
    record = codec.decode(value, file.schema)
    assert avro_json.to_json(file.schema, record) == wanted, HELP
    assert codec.encode(file.schema, record) == value


@pytest.mark.parametrize("file", FILES, ids=_stem)
def test_todays_reader_reads_every_version(file: SchemaFile) -> None:
    """The newest reader, and every older one after a rollback, reads every version's bytes (FULL_TRANSITIVE)."""
    value = (GOLDEN / f"{_stem(file)}.bin").read_bytes()
    written = codec.decode(value, file.schema)
    for reader in (f.schema for f in FILES if f.schema.subject == file.schema.subject):
        seen = codec.decode(value, file.schema, reader)
        shared = set(seen) & set(written)
        assert {k: seen[k] for k in shared} == {k: written[k] for k in shared}
        assert set(seen) == set(reader.field_names)


@pytest.mark.parametrize("file", FILES, ids=_stem)
def test_a_plain_avro_decoder_reads_golden_bytes(file: SchemaFile) -> None:
    """Apache's decoder, which knows nothing of us, reads our topics with the registered schema (issue 6)."""
    value = (GOLDEN / f"{_stem(file)}.bin").read_bytes()
    source = io.BytesIO(value[5:])
    seen = avro.io.DatumReader(avro.schema.parse(file.schema.text)).read(avro.io.BinaryDecoder(source))
    assert source.read() == b""
    assert set(seen) == set(file.schema.field_names)
