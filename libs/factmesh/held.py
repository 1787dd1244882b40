"""A connection that a loop keeps while it is busy, and gives back to the pool as soon as it is not.
No transaction begins here, and nothing is known of what the loop does with it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from factmesh.postgres import Connection, Pool


class Held:
    """A connection that is kept from batch to batch: fetching and giving back were a tenth of a batch of one."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._context: AbstractAsyncContextManager[Connection] | None = None
        self._conn: Connection | None = None

    async def get(self) -> Connection:
        if self._conn is None or self._conn.is_closed():
            await self.give_back()
            context = self._pool.acquire()
            self._conn = await context.__aenter__()
            self._context = context
        return self._conn

    async def give_back(self) -> None:
        """After any trouble, and as soon as there is nothing to do: an idle loop holds none."""
        context, self._context, self._conn = self._context, None, None
        if context is not None:
            await context.__aexit__(None, None, None)
