"""A parsed definition file: plain JSON data and the line of every value, so that an error can say where.
No parser and no file access lives here; `factmesh.yaml` makes these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: JSON-plain data: None, bool, int, float, str, list, dict with text keys.
Json = Any

#: Where a value stands inside a document: keys and list indexes from the root.
Path = tuple[str | int, ...]


def path_text(path: Path) -> str:
    """A path as people write it: `do[0].verify.call`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


@dataclass(frozen=True, slots=True)
class Document:
    """One definition. `marks` holds line and column (both from 1) of values by their path, where they are known."""

    file: str
    data: Json
    marks: Mapping[Path, tuple[int, int]] = field(default_factory=dict)

    def where(self, path: Path = ()) -> str:
        """`file:line:column at path`, by the nearest enclosing value whose line is known."""
        text = self.file
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                line, column = self.marks[path[:end]]
                text += f":{line}:{column}"
                break
        return f"{text} at {path_text(path)}" if path else text

    def canonical(self) -> bytes:
        """The data as canonical JSON: sorted keys, no spaces, UTF-8. Equal data give equal bytes."""
        return canonical_json(self.data)


def canonical_json(data: Json) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal data give equal bytes. Raises ValueError on NaN and infinities."""
    return "".join(_canonical(data, 0)).encode()


def compact_json(data: Json) -> bytes:
    """No spaces, UTF-8, keys in their order. Raises ValueError on NaN and infinities."""
    return "".join(_compact(data, 0)).encode()


def _encoder(*, sort_keys: bool) -> Callable[[Json, int], Iterable[str]]:
    """What `json.dumps` makes anew for each call, which takes it longer than to write a small object.

    It looks for no circles: what comes here was read from JSON, or was put together from such.
    """
    slow = json.JSONEncoder(sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda data, _level: (slow.encode(data),)
    made: Callable[[Json, int], Iterable[str]] = make(
        None, slow.default, json.encoder.encode_basestring, None, ":", ",", sort_keys, False, False
    )
    return made


_canonical = _encoder(sort_keys=True)
_compact = _encoder(sort_keys=False)


_decode = json.JSONDecoder().raw_decode


def read_json(raw: bytes) -> Json:
    """What `json.loads` gives, errors too; bytes that begin and end plainly, without its search for their encoding."""
    try:
        text = raw.decode()
        value, end = _decode(text)
        if end == len(text):
            return value
    except ValueError:
        pass
    return json.loads(raw)
