"""The PostgreSQL gateway's pure parts: named SQL files, what an error means, addresses. No database is touched."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from factmesh import postgres
from factmesh.postgres import SqlFileError, parse_sql

GOOD = """-- a file's law
-- name: first
-- Guarantees one thing.
-- And goes on.
SELECT 1
  -- a comment inside stays
  FROM t;

-- name: second
-- Guarantees another.
SELECT 2
"""


def test_queries_are_attributes_with_their_guarantee() -> None:
    """House rule 4: each query is named, and its file says what it guarantees."""
    queries = parse_sql(Path("store.sql"), GOOD)
    assert queries.names() == ["first", "second"]
    assert queries.first == "/* store.first */ SELECT 1\n  -- a comment inside stays\n  FROM t"
    assert queries.guarantee("first") == "Guarantees one thing. And goes on."
    with pytest.raises(AttributeError, match=r"store\.sql has no query 'third'; it has: first, second"):
        _ = queries.third


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-- name: a\nSELECT 1", "store.sql:2: the query 'a' has no comment line that says what it guarantees"),
        ("-- name: a\n-- Says.\n", "store.sql:2: the query 'a' has no SQL"),
        ("-- name: a\n-- Says.\nSELECT 1;\n-- name: a\n-- Says.\nSELECT 2;", "the query name 'a' is there twice"),
        ("SELECT 1;", "store.sql:1: SQL before the first `-- name:` line"),
    ],
)
def test_a_wrong_sql_file_says_where(text: str, message: str) -> None:
    """House rule 4: a query without a name or a promise is refused when the file is read."""
    with pytest.raises(SqlFileError) as caught:
        parse_sql(Path("store.sql"), text)
    assert message in str(caught.value)


def of_state(state: str) -> asyncpg.PostgresError:
    error: asyncpg.PostgresError = asyncpg.PostgresError.new({"C": state, "M": "said the server"})
    return error


@pytest.mark.parametrize(
    "state",
    [
        "40P01",
        "40001",
        "40003",
        "57014",
        "25P03",
        "25P04",
        "08006",
        "08007",
        "57P01",
        "57P02",
        "57P03",
        "53300",
        "25006",
    ],
)
def test_what_a_retry_may_cure_is_transient(state: str) -> None:
    """DESIGN 3: deadlock, timeout, lost connection and unknown commit outcome are transient: retry the batch."""
    assert postgres.is_transient(of_state(state))
    assert not postgres.is_data_error(of_state(state))


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), OSError("no route"), EOFError()])
def test_a_broken_network_is_transient(error: Exception) -> None:
    """DESIGN 3: a lost connection is transient however the client names it."""
    assert postgres.is_transient(error)


@pytest.mark.parametrize("state", ["42P01", "42601", "23505", "22021", "23514", "42501"])
def test_what_no_retry_cures_is_not_transient(state: str) -> None:
    """DESIGN 3: a wrong statement, a refused value and a missing right do not spin."""
    assert not postgres.is_transient(of_state(state))


def test_misuse_of_a_connection_is_not_transient() -> None:
    """DESIGN 6: our own mistake is a bug, not a reason to wait."""
    assert not postgres.is_transient(asyncpg.InterfaceError("another operation is in progress"))
    assert postgres.is_transient(asyncpg.InterfaceError("connection is closed"))


@pytest.mark.parametrize("state", ["22021", "22003", "23502", "23514"])
def test_refused_values_are_data_errors(state: str) -> None:
    """DESIGN 6: the values' fault, not the network's: they dead-letter their message."""
    assert postgres.is_data_error(of_state(state))


def test_a_repeated_id_is_told_by_its_constraint() -> None:
    """DESIGN 3: only a unique violation on ids sends the batch down the slow path."""
    error = asyncpg.PostgresError.new({"C": "23505", "M": "duplicate", "n": "ids_pkey"})
    assert postgres.is_unique_violation(error)
    assert postgres.is_unique_violation(error, "ids_pkey")
    assert not postgres.is_unique_violation(error, "other_pkey")
    assert not postgres.is_unique_violation(of_state("23514"))


def test_addresses_change_their_role_and_hide_their_password() -> None:
    """F5: a password never reaches a log; a role's address keeps the host, port and database."""
    dsn = "postgresql://admin:s%2Fcret@db:5432/mesh?sslmode=require"
    assert postgres.redacted(dsn) == "postgresql://admin:***@db:5432/mesh?sslmode=require"
    assert postgres.redacted("postgresql://admin@db/mesh") == "postgresql://admin@db/mesh"
    assert postgres.dsn_for_role(dsn, "t1_intake", "a/b") == (
        "postgresql://t1_intake:a%2Fb@db:5432/mesh?sslmode=require"
    )
