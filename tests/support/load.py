"""Sends a generator's facts to a mesh as upstream systems do: over HTTP and Kafka, again until they are acknowledged.
What was acknowledged is its log, all that a judge is told of the sending; it knows nothing of the outcome.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2
from tests.support.judge import Sent

from factmesh import kafka
from factmesh.message import Emission
from factmesh.topics import FACTS_RAW
from factmesh_cli.demo_plan import Fate, Sending
from factmesh_cli.mesh import Mesh

AT_ONCE_MAX = 24
RETRY_S = 0.3
REQUEST_S_MAX = 15.0


def parts(sendings: Sequence[Sending], count: int) -> list[Sequence[Sending]]:
    """In as many parts, in order: one for each time that something is done to the mesh, however slow the machine."""
    size = -(-len(sendings) // count)
    return [sendings[n : n + size] for n in range(0, len(sendings), size)]


@dataclass
class Load:
    """One run of sendings over one mesh. `rate` is sendings a second; `entrances` are replicas of intake by name."""

    mesh: Mesh
    rate: float
    give_up_s: float = 120.0
    entrances: Sequence[str] = ("intake",)
    acknowledged: list[Sent] = field(default_factory=list)
    refused: list[Sending] = field(default_factory=list)
    attempts: int = 0
    answers: dict[str, int] = field(default_factory=dict)

    async def send(self, sendings: Sequence[Sending]) -> None:
        """Until each is acknowledged or refused. Raises AssertionError for one that nobody takes."""
        publisher = kafka.Publisher(self.mesh.stack.bootstrap, client_id="load")
        slots = asyncio.Semaphore(AT_ONCE_MAX)
        before: dict[tuple[str, str], asyncio.Task[None]] = {}
        began = time.monotonic()
        try:
            async with httpx2.AsyncClient(timeout=REQUEST_S_MAX) as http, asyncio.TaskGroup() as tasks:
                for n, sending in enumerate(sendings):
                    await asyncio.sleep(max(0.0, began + n / self.rate - time.monotonic()))
                    # A second one of the same id never overtakes the first: which body came first must be known.
                    name = (sending.source, sending.id)
                    one = self._one(n, sending, http, publisher, slots, before.get(name))
                    before[name] = tasks.create_task(one)
        finally:
            await publisher.close()

    async def _one(
        self,
        n: int,
        sending: Sending,
        http: httpx2.AsyncClient,
        publisher: kafka.Publisher,
        slots: asyncio.Semaphore,
        former: asyncio.Task[None] | None,
    ) -> None:
        if former is not None:
            await asyncio.wait({former})
        async with slots:
            if sending.entrance == "http":
                await self._post(n, sending, http)
            else:
                headers = tuple((name, value.encode()) for name, value in sending.headers.items())
                key = f"{sending.source} {sending.id}".encode()
                await publisher.publish([Emission(FACTS_RAW.of(self.mesh.prefix), key, sending.body, headers)])
                self._took(sending)

    async def _post(self, n: int, sending: Sending, http: httpx2.AsyncClient) -> None:
        deadline = time.monotonic() + self.give_up_s
        last = "no attempt was made"
        while time.monotonic() < deadline:
            self.attempts += 1
            entrance = self.entrances[(n + self.attempts) % len(self.entrances)]
            try:
                url = f"{self.mesh.url(entrance)}/facts"
                answer = await http.post(url, headers=dict(sending.headers), content=sending.body)
            except httpx2.HTTPError as error:
                last = f"{type(error).__name__}: {error}"
            else:
                self.answers[str(answer.status_code)] = self.answers.get(str(answer.status_code), 0) + 1
                if answer.status_code == 202:
                    self._took(sending)
                    return
                if 400 <= answer.status_code < 500 and answer.status_code != 429:
                    assert sending.fate is Fate.REFUSED, f"{sending.id} was refused: {answer.status_code} {answer.text}"
                    self.refused.append(sending)
                    return
                last = f"{answer.status_code} {answer.text[:300]}"
            await asyncio.sleep(RETRY_S)
        raise AssertionError(f"nobody took {sending.id} of {sending.source} within {self.give_up_s:g} s; last: {last}")

    def _took(self, sending: Sending) -> None:
        assert sending.fate is not Fate.REFUSED, f"{sending.id} should have been refused"
        self.acknowledged.append(Sent(sending.source, sending.id, sending.body))
