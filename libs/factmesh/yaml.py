"""The gateway to ruamel.yaml: strict YAML 1.2 of the JSON kind in, plain data with line numbers out.
Aliases, anchors, merge keys, tags, duplicate keys and oversize or deep documents are refused; nothing else parses YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from factmesh.document import Document, Json, Path
from factmesh.errors import DefinitionError

__all__ = ["document_bytes_max", "document_depth_max", "document_values_max", "load", "parse"]

#: People write these files by hand; the largest sensible one is a few dozen kilobytes.
document_bytes_max = 256 * 1024
#: Deeper than any definition that a reviewer can read, and far below the interpreter's recursion limit.
document_depth_max = 32
#: Parsing costs some 50 µs a value; this many take a second, and no reviewer reads them.
document_values_max = 20_000

# The core schema of YAML 1.2: `on`, `yes`, `1_000`, `12:30` and dates are text.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_JSON = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def load(path: FilePath) -> Document:
    """Read and parse one file. Raises DefinitionError naming file, line and column."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(document_bytes_max + 1)
    except OSError as error:
        raise DefinitionError(
            f"cannot be read: {error.strerror}", where=str(path), hint="check the path and its permissions"
        ) from None
    return parse(raw, file=str(path))


def parse(text: str | bytes, *, file: str) -> Document:
    """Parse one document. Raises DefinitionError naming file, line and column."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > document_bytes_max:
        raise DefinitionError(
            f"is larger than {document_bytes_max} bytes", where=file, hint="split it; definitions hold no data"
        )
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DefinitionError(f"is not UTF-8 (byte {error.start})", where=file, hint="save the file as UTF-8") from None
    return _Builder(decoded, file).document()


class _Builder:
    """Builds data straight from parser events, so that an alias or a tag is seen and never followed."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.marks: dict[Path, tuple[int, int]] = {}
        self.events: Iterator[Any] = iter(YAML(typ="safe", pure=True).parse(text))

    def document(self) -> Document:
        data: Json = None
        seen = False
        try:
            for event in self.events:
                if isinstance(event, DocumentStartEvent):
                    if seen:
                        raise self._error(event, "a second document begins", "one file holds one definition")
                    if getattr(event, "version", None) or getattr(event, "tags", None):
                        raise self._error(event, "a %YAML or %TAG directive", "remove it; files are YAML 1.2")
                    seen = True
                elif seen and isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent | AliasEvent):
                    data = self._value(event, ())
        except MarkedYAMLError as error:
            raise self._syntax(error) from None
        except YAMLError as error:
            first = str(error).strip().splitlines()[0]
            raise DefinitionError(f"is not YAML: {first}", where=self.file, hint="remove that character") from None
        if not seen:
            raise DefinitionError("is empty", where=self.file, hint="write the definition, or remove the file")
        return Document(self.file, data, self.marks)

    def _value(self, event: Any, path: Path) -> Json:
        self._plain(event)
        self.marks[path] = (event.start_mark.line + 1, event.start_mark.column + 1)
        if len(self.marks) > document_values_max:
            raise self._error(event, f"holds more than {document_values_max} values", "split it")
        if isinstance(event, ScalarEvent):
            return self._scalar(event)
        if len(path) >= document_depth_max:
            raise self._error(event, f"is nested deeper than {document_depth_max} levels", "flatten it")
        if isinstance(event, SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _sequence(self, path: Path) -> list[Json]:
        items: list[Json] = []
        for event in self.events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Path) -> dict[str, Json]:
        entries: dict[str, Json] = {}
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            key = self._key(event)
            if key in entries:
                line = self.marks[(*path, key)][0]
                raise self._error(event, f"key {key!r} is there twice, first on line {line}", "keep one of them")
            entries[key] = self._value(next(self.events), (*path, key))
            # An error about an entry points at its key, which also tells where an absent value would stand.
            self.marks[(*path, key)] = (event.start_mark.line + 1, event.start_mark.column + 1)
        return entries

    def _key(self, event: Any) -> str:
        self._plain(event)
        if not isinstance(event, ScalarEvent):
            raise self._error(event, "a key that is not text", "write a plain word as the key")
        key = self._scalar(event)
        if key == "<<" and event.style is None:
            raise self._error(event, "a merge key (<<)", "write the entries out; definitions are read as they stand")
        if isinstance(key, int) and not isinstance(key, bool) and _INT.fullmatch(event.value):
            # A table of HTTP statuses reads better unquoted, and JSON has text keys only: the digits as written.
            return str(event.value)
        if not isinstance(key, str):
            raise self._error(event, f"the key {event.value!r} is not text", f"quote it: '{event.value}'")
        return key

    def _plain(self, event: Any) -> None:
        """Refuse what makes a document mean more than it shows."""
        if isinstance(event, AliasEvent):
            raise self._error(event, f"an alias (*{event.anchor})", "write the value out where it is meant")
        if event.anchor is not None:
            raise self._error(event, f"an anchor (&{event.anchor})", "remove it; aliases are not followed")
        if event.tag is not None:
            raise self._error(event, f"a tag ({event.tag})", "remove it; values are plain JSON data")

    def _scalar(self, event: Any) -> Json:
        text: str = event.value
        if event.style is not None:
            return text
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _INT.fullmatch(text):
            return self._integer(event, text)
        if _BASED.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                raise self._error(event, f"the number {text} is too large", "quote it if it is text")
            return number
        if _NOT_JSON.fullmatch(text):
            raise self._error(event, f"{text} is not a JSON number", "quote it if it is text")
        return text

    def _integer(self, event: Any, text: str) -> int:
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits.startswith("0"):
            raise self._error(event, f"{text} begins with a zero", f"quote it if it is text: '{text}'")
        if len(digits) > 19 or not -(2**63) <= int(text) < 2**63:
            raise self._error(event, f"{text} does not fit 64 bits", f"quote it if it is text: '{text}'")
        return int(text)

    def _error(self, event: Any, message: str, hint: str) -> DefinitionError:
        mark = event.start_mark
        return DefinitionError(message, where=f"{self.file}:{mark.line + 1}:{mark.column + 1}", hint=hint)

    def _syntax(self, error: MarkedYAMLError) -> DefinitionError:
        mark = error.problem_mark or error.context_mark
        where = f"{self.file}:{mark.line + 1}:{mark.column + 1}" if mark is not None else self.file
        problem = str(error.problem or error.context or "cannot be parsed").strip()
        return DefinitionError(f"is not YAML: {problem}", where=where, hint="mind indentation, quotes and brackets")
