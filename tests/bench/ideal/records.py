"""The records of the ideal loop: the platform's own schemas and ids of the same shape, so that the bytes are alike.
Only the generated Avro code is shared with the platform, for without it the ideal would be slower than need be.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from factmesh.avro_fast import compile_flat

SCHEMAS = Path(__file__).parents[3] / "schemas"

Emission = tuple[str, bytes, bytes]
"""Topic, key, value."""


def _plain(kind: Any) -> Any:
    """The type without its logical type: the bytes are the same."""
    if isinstance(kind, list):
        return [_plain(k) for k in kind]
    return kind["type"] if isinstance(kind, dict) else kind


class Codec:
    """Encoder and decoder of one of the platform's records, in the Confluent wire format."""

    def __init__(self, record: str) -> None:
        schema = json.loads((SCHEMAS / f"factmesh.{record}" / "v1.avsc").read_text(encoding="utf-8"))
        number = json.loads((SCHEMAS / "ids.lock").read_text(encoding="utf-8"))[f"factmesh.{record}/v1"]
        fields = [{**f, "type": _plain(f["type"])} for f in schema["fields"]]
        times = [f["name"] for f in schema["fields"] if "timestamp-millis" in json.dumps(f)]
        made = compile_flat(fields, b"\0" + int(number).to_bytes(4, "big"), times)
        assert made is not None
        self.encode: Callable[[Mapping[str, Any]], bytes] = made[0]
        self.decode: Callable[[bytes], dict[str, Any]] = made[1]


def derived(ms: int, cause: bytes, ordinal: int) -> UUID:
    """Same cause, same id; milliseconds first."""
    digest = blake2b(cause, digest_size=9).digest()
    return UUID(bytes=ms.to_bytes(6, "big") + bytes([0x80 | digest[0] & 15, digest[1], 0x80 | digest[2] & 63])
                + digest[3:8] + bytes([digest[8], ordinal]))  # fmt: skip


def ms_of(id_: UUID) -> int:
    return id_.int >> 80


def pack(emissions: list[Emission]) -> bytes:
    return marshal.dumps(emissions)


def unpack(raw: bytes) -> list[Emission]:
    return cast("list[Emission]", marshal.loads(raw))
