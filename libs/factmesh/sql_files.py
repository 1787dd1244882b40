"""Named SQL files: `-- name: x`, a line on what the query guarantees, the SQL. Read here, executed elsewhere.
No connection and no SQL lives here; import `load_sql` from `factmesh.postgres`, beside what executes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from factmesh.errors import FactmeshError

_NAME_LINE = re.compile(r"^--\s*name:\s*([a-z][a-z0-9_]*)\s*$")


class SqlFileError(FactmeshError):
    """A `.sql` file is not what `load_sql` reads."""


class Queries:
    """The named queries of one file: `queries.insert_ids` is its text."""

    def __init__(self, path: Path, texts: Mapping[str, str], guarantees: Mapping[str, str]) -> None:
        self._path = path
        self._texts = dict(texts)
        self._guarantees = dict(guarantees)

    def __getattr__(self, name: str) -> str:
        try:
            return self.__dict__["_texts"][name]  # type: ignore[no-any-return]
        except KeyError:
            known = ", ".join(sorted(self.__dict__.get("_texts", {})))
            raise AttributeError(f"{self.__dict__.get('_path')} has no query {name!r}; it has: {known}") from None

    def names(self) -> list[str]:
        return list(self._texts)

    def guarantee(self, name: str) -> str:
        """What the query promises, as its file says."""
        return self._guarantees[name]


def load_sql(beside: str, filename: str) -> Queries:
    """Read `filename` beside the module `beside` (its `__file__`): blocks of `-- name: x`, a promise, and the SQL."""
    path = Path(beside).with_name(filename)
    return parse_sql(path, path.read_text(encoding="utf-8"))


def parse_sql(path: Path, text: str) -> Queries:
    """The named queries in `text`. A query without a line on what it guarantees is refused, as is a repeated name."""
    texts: dict[str, str] = {}
    guarantees: dict[str, str] = {}
    name, promise, body = "", [], []  # type: str, list[str], list[str]

    def finish(line_number: int) -> None:
        if not name:
            return
        sql = "\n".join(body).strip().rstrip(";").strip()
        if not promise or not sql:
            missing = "SQL" if promise else "comment line that says what it guarantees"
            raise SqlFileError(f"the query {name!r} has no {missing}", where=f"{path}:{line_number}")
        # The name travels with the statement: pg_stat_activity and the server's log then say which query it was.
        texts[name] = f"/* {path.stem}.{name} */ {sql}"
        guarantees[name] = " ".join(promise)

    for line_number, line in enumerate(text.splitlines(), start=1):
        header = _NAME_LINE.match(line)
        if header:
            finish(line_number)
            name, promise, body = header.group(1), [], []
            if name in texts:
                raise SqlFileError(f"the query name {name!r} is there twice", where=f"{path}:{line_number}")
        elif name and not body and line.startswith("--"):
            promise.append(line.lstrip("- ").strip())
        elif name:
            if body or line.strip():
                body.append(line)
        elif line.strip() and not line.startswith("--"):
            raise SqlFileError("SQL before the first `-- name:` line", where=f"{path}:{line_number}")
    finish(len(text.splitlines()))
    return Queries(path, texts, guarantees)
