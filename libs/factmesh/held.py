"""A connection that a loop keeps while it is busy, and gives back to the pool as soon as it is not.
No transaction begins here, and nothing is known of what the loop does with it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from factmesh.postgres import Connection, Pool, is_given_back, is_transient


class Held:
    """A connection that is kept from batch to batch: fetching and giving back were a tenth of a batch of one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._context: AbstractAsyncContextManager[Connection] | None = None
        self._conn: Connection | None = None

    async def get(self) -> Connection:
        """The one that is held, another where that was lost. What the database says meanwhile is raised."""
        if self._conn is None or self._lost(self._conn):
            await self.give_back()
            context = self._pool.acquire()
            self._conn = await context.__aenter__()
            self._context = context
        return self._conn

    @staticmethod
    def _lost(conn: Connection) -> bool:
        try:
            return conn.is_closed()
        except Exception as error:
            if not is_given_back(error):
                raise
            return True

    async def give_back(self) -> None:
        """After any trouble, and as soon as there is nothing to do: an idle loop holds none."""
        context, self._context, self._conn = self._context, None, None
        if context is None:
            return
        try:
            await context.__aexit__(None, None, None)
        except Exception as error:
            # One that the server ended went back by itself, and the pool refuses it a second time: a stopped database
            # ended the service by this.
            if not (is_given_back(error) or is_transient(error)):
                raise
