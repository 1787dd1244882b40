"""What the tests of the kernel share: the toy, run and redelivered to, and a proxy that the database dies in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from tests.support import toy
from tests.support.waiting import until

from factmesh import dlq, kafka
from factmesh.message import H_GROUP, H_OPENING, H_ROOT_ID, Delivery, Emission
from factmesh.service import Running, open_service
from factmesh.stack import Stack


async def backlog(running: Running) -> int:
    context = running.context
    names = [context.topic("result"), context.topic("fact")]
    return await kafka.backlog(context.settings.kafka_bootstrap, context.group, names)


async def idle(running: Running, timeout_s: float = 60.0) -> None:
    async def check() -> bool:
        return await backlog(running) == 0

    await until("everything is handled and committed", check, timeout_s=timeout_s)


async def on_topic(running: Running, short: str) -> list[Delivery]:
    return await kafka.read_all(running.context.settings.kafka_bootstrap, [running.context.topic(short)])


async def dead_of(running: Running, topic: str = "result") -> list[dlq.DeadRecord]:
    name = "dlq." + running.context.topic(topic)
    return [dlq.parse(d) for d in await kafka.read_all(running.context.settings.kafka_bootstrap, [name])]


async def ledger_rows(running: Running) -> list[dict[str, Any]]:
    async with running.context.pool.acquire() as conn:
        return [dict(r.items()) for r in await conn.fetch("SELECT * FROM ledger ORDER BY handled_at")]


async def claims_rows(running: Running) -> list[dict[str, Any]]:
    async with running.context.pool.acquire() as conn:
        found = await conn.fetch(
            "SELECT *, EXISTS (SELECT 1 FROM unpublished u WHERE c.id = ANY (u.ids)) AS unpublished"
            " FROM claims c ORDER BY id"
        )
        return [dict(r.items()) for r in found]


def opening(original: Emission, root: str, number: int, group: str, value: bytes | None = None) -> Emission:
    headers = ((H_ROOT_ID, root.encode()), (H_OPENING, str(number).encode()), (H_GROUP, group.encode()))
    return Emission(original.topic, original.key, value if value is not None else original.value, headers)


async def make_topics(stack: Stack, namespace: str, make: Any) -> list[Emission]:
    """What `make(running)` says to send, of a service that ran once and has stopped: its topics are there, empty."""
    async with open_service(toy.service(), await toy.settings(stack, namespace), http=False) as running:
        emissions: list[Emission] = make(running)
        return emissions


async def send(stack: Stack, emissions: Sequence[Emission]) -> None:
    publisher = kafka.Publisher(stack.bootstrap, client_id="test")
    await publisher.publish(emissions)
    await publisher.close()


async def redeliver(stack: Stack, group: str, topic: str) -> None:
    """As after a crash between commit and acknowledgement: the group's offsets were never committed."""
    rewind = kafka.Subscription(stack.bootstrap, group=group, topics=[topic], client_id="test")
    await rewind.start()

    async def assigned() -> bool:
        await rewind.poll(1)
        return len(rewind.assigned) == 4

    await until("all partitions are assigned", assigned)
    assert await rewind.commit({(topic, p): 0 for p in range(4)})
    await rewind.close()


class PublishGate:
    """Holds back emissions with one of these keys (any, where none are given) until it opens."""

    def __init__(self, patch: pytest.MonkeyPatch, *keys: bytes) -> None:
        self.open = asyncio.Event()
        self.held = 0
        real = kafka.Publisher.publish

        async def publish(publisher: kafka.Publisher, emissions: Sequence[Emission], *, patient: bool = True) -> None:
            if emissions and (not keys or any(e.key in keys for e in emissions)):
                self.held += 1
                await self.open.wait()
            await real(publisher, emissions, patient=patient)

        patch.setattr(kafka.Publisher, "publish", publish)


class Proxy:
    """Stands between a service and PostgreSQL: cuts a connection after its COMMIT went through, or all of them."""

    def __init__(self, dsn: str) -> None:
        self._parts = urlsplit(dsn)
        self._open: set[asyncio.StreamWriter] = set()
        self.cut_after_commits = 0
        self.cuts = 0
        self.down = False
        self.dsn = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        address = f"{self._parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"
        self.dsn = urlunsplit(self._parts._replace(netloc=address))
        try:
            yield self
        finally:
            server.close()
            self.cut_all()

    def cut_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        there, to_server = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        self._open |= {writer, to_server}
        armed = asyncio.Event()
        tasks = [
            asyncio.create_task(self._forward(reader, to_server, armed)),
            asyncio.create_task(self._back(there, writer, armed)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for one in (writer, to_server):
            one.transport.abort()
            self._open.discard(one)

    async def _forward(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter, armed: asyncio.Event) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if b"COMMIT;" in data and self.cut_after_commits > 0:
                    self.cut_after_commits -= 1
                    armed.set()
                to.write(data)

    async def _back(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter, armed: asyncio.Event) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if armed.is_set():
                    self.cuts += 1  # PostgreSQL has answered: it is committed, and nobody will hear of it
                    return
                to.write(data)
