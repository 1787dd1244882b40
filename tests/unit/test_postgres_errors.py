"""Which errors of the database are waited out: pure judgements over the vendor's exceptions.
What the server really does when it is stopped is in `tests/faults`.
"""

from __future__ import annotations

import asyncpg
import pytest

from factmesh.postgres import is_transient


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
        asyncpg.InternalClientError('cannot switch to state 11; protocol is in the "failed" state'),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.InterfaceError("cannot perform operation: connection is closed"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(),
    ],
)
def test_a_connection_that_broke_is_waited_out(error: Exception) -> None:
    """G7: a server that was stopped, however the client tells of it, is tried again and ends no service."""
    assert is_transient(error)


def test_misuse_of_the_client_is_a_bug() -> None:
    """DESIGN 6: what waiting cannot cure is raised."""
    assert not is_transient(asyncpg.InternalClientError("got result for unknown protocol state"))
    assert not is_transient(asyncpg.InterfaceError("cannot perform operation: another operation is in progress"))
