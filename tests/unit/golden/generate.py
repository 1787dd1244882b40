"""Writes the golden bytes of every schema version that has none yet: `python tests/unit/golden/generate.py`.
Never overwrites: bytes that were once on a topic stay readable, that is the point. A draft's may be deleted by hand.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from factmesh import avro, avro_json
from factmesh.schema_files import SchemaFile, platform_dir, read_dirs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ID = "018bcfe5-6800-8ff6-92cc-e1d1f8770000"


def files() -> tuple[SchemaFile, ...]:
    """Every version that the repository carries."""
    return read_dirs([platform_dir(), *sorted((ROOT / "examples").glob("*/schemas"))])


def sample(node: Any, name: str, named: dict[str, Any]) -> Any:
    """A value that is no default, so that every field is in the bytes."""
    if isinstance(node, list):
        return sample(node[-1], name, named)
    if isinstance(node, str) and node in named:
        return sample(named[node], name, named)
    kind = node["type"] if isinstance(node, dict) else node
    if kind == "record":
        return {f["name"]: sample(f["type"], f["name"], named) for f in node["fields"]}
    if kind == "enum":
        return node["symbols"][-1]
    if kind == "array":
        return [sample(node["items"], name, named)] * 2
    if kind == "map":
        return {"k": sample(node["values"], name, named)}
    if kind == "long":
        return 1_700_000_000_000 if isinstance(node, dict) else 7
    if kind == "string":
        return ID if name.endswith("_id") or name == "idempotency_key" else f"{name} Ä"
    plain = {"int": 3, "boolean": True, "bytes": b'{"a":1}', "float": 0.5, "double": 0.5}
    return b"\1" * node["size"] if kind == "fixed" else plain[kind]


def main() -> None:
    for file in files():
        stem = f"{file.schema.subject}.v{file.schema.version}"
        if (HERE / f"{stem}.bin").exists():
            continue
        record = sample(file.schema.source, "", file.schema.named)
        value = avro.encode(file.schema, record)
        assert value[:5] == b"\0" + struct.pack(">I", file.lock.id)
        (HERE / f"{stem}.bin").write_bytes(value)
        shown = json.dumps(avro_json.to_json(file.schema, record), indent=2, ensure_ascii=False)
        (HERE / f"{stem}.json").write_text(shown + "\n", encoding="utf-8")
        print(f"wrote {stem}")


if __name__ == "__main__":
    main()
