"""Due rows -> work -> settle, with lease epochs: timers, attempts, sends and unpublished outcomes are one loop.
What the work is belongs to the services; a settlement from an epoch that is not the current one changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from factmesh import claims, dlq, ledger
from factmesh.claims import Along, Claimed, Settled
from factmesh.clock import Clock
from factmesh.emitting import Emitter
from factmesh.errors import FactmeshError
from factmesh.kafka import Publisher
from factmesh.message import Emission, pack, unpack
from factmesh.metrics import Metrics
from factmesh.postgres import Pool, is_transient
from factmesh.settlement import Death, Settlement, Teller

__all__ = ["ClaimKind", "ClaimLoop", "ClaimRuntime", "Death", "Settlement"]

log = structlog.get_logger("factmesh.claims")

IDLE_S_MAX = 5.0
"""Never sleep longer: another replica's rows come due without a hint."""
SETTLE_BATCH_MAX = 500
RETRY_S = 0.2
MARK_WITHIN_S = 2.0
"""How long the mark `published` may wait for a settlement to ride with; well below `claims.PUBLISH_GRACE_S`."""
AHEAD_S = 0.5
"""How far ahead rows are taken that wait for their turn: what a stop by force interrupts counts as maybe called."""
PACE_WEIGHT = 0.05
PACE_S_MIN = 0.0005
PACE_S_FIRST = 1.0
"""Before anything is known of how long the work takes."""


@dataclass(frozen=True)
class ClaimKind:
    """One kind of row. `work` never raises to decide: an exception is a bug, the row is tried again with backoff."""

    name: str
    work: Callable[[Claimed], Awaitable[Settlement]]
    lease_s: float
    concurrency: int = 32
    """Works at once."""
    handler: str = ""
    """The handler whose messages became these rows: its consumer group is the one that a death belongs to."""
    save: Callable[[Sequence[tuple[Claimed, Any]]], Along] | None = None
    """What the settling statement writes of attempts that gave something to save."""
    held_max: int = 0
    """Rows held at once, those that wait for their turn too; 0: no more than are worked on."""
    wait_s: float = 0.0
    """How much of `lease_s` may pass before the work begins: the rest covers it. A row that waited longer goes back."""

    def __post_init__(self) -> None:
        if self.held_max > self.concurrency and not 0.0 < self.wait_s < self.lease_s:
            raise ValueError(f"kind {self.name} holds rows that wait, so a part of its lease must be there to wait in")


@dataclass(slots=True)
class _Finished:
    claimed: Claimed
    settlement: Settlement
    emissions: list[Emission] = field(default_factory=list)


class ClaimLoop:
    """Runs one kind: claims due rows as far as it has room, works on them side by side, settles them together."""

    def __init__(
        self,
        kind: ClaimKind,
        *,
        service: str,
        group: str,
        version: str,
        pool: Pool,
        publisher: Publisher,
        emitter: Emitter,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.kind = kind
        self._teller = Teller(emitter, f"{service}/{kind.name}", group, version)
        self._pool, self._publisher = pool, publisher
        self._clock, self._metrics = clock, metrics
        self._held = 0
        self._waiting: deque[Claimed] = deque()
        self._late: list[Claimed] = []
        self._finished: list[_Finished] = []
        self._workers: set[asyncio.Task[None]] = set()
        self._working = 0
        self._pace_s = PACE_S_FIRST
        self._publishing: set[asyncio.Task[None]] = set()
        self._ours: set[int] = set()
        self._published: list[int] = []
        self._mark_at: asyncio.TimerHandle | None = None
        self._mark_due = False
        self._unsettled = 0
        self._wake = asyncio.Event()
        self._to_settle = asyncio.Event()
        self._stopping = False
        self._drained = asyncio.Event()
        self._next_wake: float | None = None
        self._starved = False

    # --- given by the batch loop -------------------------------------------------------------------------------------

    @property
    def _free(self) -> int:
        """Rows that may be held besides those that are: what runs at once, and what may soon begin after it."""
        n = self.kind.concurrency
        if self.kind.held_max > n:
            n = min(self.kind.held_max, int(n * (1.0 + AHEAD_S / self._pace_s)))
        return n - self._held

    def reserve(self, wanted: int) -> int:
        """How many rows may be inserted already claimed; their slots are taken until `begin` or `unreserve`."""
        n = 0 if self._stopping else max(0, min(wanted, self._free))
        self._held += n
        return n

    def unreserve(self, n: int) -> None:
        """The batch did not commit, or returned fewer rows than were reserved."""
        self._give_back(n)

    def _give_back(self, n: int) -> None:
        """Slots are free again. Only a row that was left due for want of one is asked for now.

        A look at every settlement took all the slots for as long as it asked: the next batch found none, and its rows
        were written twice, waiting and then claimed, instead of once.
        """
        self._held -= n
        if self._starved:
            self._wake.set()

    def begin(self, rows: Sequence[Claimed]) -> None:
        """Work on rows whose slots are reserved, as many at once as the kind allows."""
        self._waiting.extend(rows)
        for _ in range(min(len(rows), self.kind.concurrency - self._working)):
            self._working += 1
            task = asyncio.create_task(self._work_off(), name=f"work:{self.kind.name}")
            self._workers.add(task)
            task.add_done_callback(self._workers.discard)

    def wake(self, in_s: float = 0.0) -> None:
        """A row comes due in `in_s` seconds."""
        if in_s <= 0:
            self._wake.set()
            return
        at = self._clock.monotonic() + in_s
        if self._next_wake is None or at < self._next_wake:
            self._next_wake = at
            asyncio.get_running_loop().call_later(in_s, self._wake.set)

    # --- claiming ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled or stopped."""
        settler = asyncio.create_task(self._settle_all(), name=f"settle:{self.kind.name}")
        try:
            while not self._stopping:
                self._wake.clear()
                self._next_wake = None
                idle_s = IDLE_S_MAX
                try:
                    idle_s = await self._claim()
                except Exception as error:
                    if not is_transient(error):
                        raise
                    log.warning("claims.waiting", kind=self.kind.name, error=f"{type(error).__name__}: {error}")
                    idle_s = RETRY_S
                if idle_s > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(idle_s):
                            await self._wake.wait()
            # What still runs is settled while `stop` waits for it: an outcome that is known must not end `interrupted`.
            await self._drained.wait()
        finally:
            settler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await settler

    async def _claim(self) -> float:
        """Claim what is due and fits; seconds to idle."""
        limit = self._free
        self._starved = limit <= 0
        if self._starved:
            return IDLE_S_MAX
        self._held += limit
        rows: list[Claimed] = []
        taken = 0
        try:
            began = self._clock.monotonic()
            async with self._pool.acquire() as conn:
                rows = await claims.claim_due(
                    conn, self.kind.name, limit, self.kind.lease_s, began + self.kind.lease_s
                )
                if self._stopping:
                    # The stop came while these were claimed: nothing of them has begun.
                    await claims.release(conn, rows)
                    return IDLE_S_MAX
                taken = len(rows)
                full = taken == limit
                again = await claims.claim_unpublished(conn, self.kind.name, self._ours)
                due_s = None if full else await claims.next_due_s(conn, self.kind.name, self._ours)
        finally:
            self._held -= limit - taken
            # Also where what came after has failed: they are ours, and somebody must work on them.
            self.begin(rows[:taken])
        for one in again:
            self._publish_later(one.batch, [e for packed in one.outcomes for e in unpack(packed)])
        if full:
            self._starved = self._free <= 0
            return IDLE_S_MAX if self._starved else 0.0
        if due_s is not None and due_s <= 0:
            # Due and locked by somebody's transaction: asking again at once would go on for as long as that lasts.
            return RETRY_S
        return IDLE_S_MAX if due_s is None else min(IDLE_S_MAX, due_s + 0.001)

    # --- working -----------------------------------------------------------------------------------------------------

    async def _work_off(self) -> None:
        """One of the kind's workers: a row after the other, until none waits. A task a row cost more than a row."""
        try:
            while self._waiting:
                await self._work(self._waiting.popleft())
        finally:
            self._working -= 1

    async def _work(self, row: Claimed) -> None:
        began = self._clock.monotonic()
        if self.kind.wait_s and row.lease_ends - began < self.kind.lease_s - self.kind.wait_s:
            # ⚑ It waited too long for its turn: what is left of its lease might not cover the work.
            self._late.append(row)
            self._to_settle.set()
            return
        try:
            settlement = await self.kind.work(row)
        except Exception as bug:
            # The row stays leased, comes due again as interrupted, and nothing is claimed of it. Frames only: the text
            # and the locals of a bug may quote the payload (F5).
            _, text, frames = dlq.describe(bug)
            log.error("claims.bug", kind=self.kind.name, row_id=str(row.id), error=text, stack=frames)
            self._give_back(1)
            return
        seconds = self._clock.monotonic() - began
        self._pace_s += PACE_WEIGHT * (max(seconds, PACE_S_MIN) - self._pace_s)
        self._metrics.observe("factmesh_work_seconds", seconds, self.kind.name)
        self._finished.append(_Finished(row, settlement))
        self._to_settle.set()

    # --- settling ----------------------------------------------------------------------------------------------------

    async def _settle_all(self) -> None:
        while True:
            await self._to_settle.wait()
            self._to_settle.clear()
            while self._finished or self._late or (self._mark_due and self._published):
                batch, self._finished = self._finished[:SETTLE_BATCH_MAX], self._finished[SETTLE_BATCH_MAX:]
                late, self._late = self._late, []
                self._unsettled = len(batch) + len(late)
                self._mark_due = False
                if late and await self._written(partial(self._release, late), len(late)):
                    self._starved = True
                if batch or not late:
                    await self._settle_or_part(batch)
                self._give_back(self._unsettled)
                self._unsettled = 0
            self._mark_due = False

    async def _written(self, write: Callable[[], Awaitable[None]], rows: int) -> bool:
        """Whether the database took it: what waiting cures is waited out, the rest is a bug, and told."""
        while True:
            try:
                await write()
                return True
            except Exception as error:
                if not is_transient(error):
                    _, text, frames = dlq.describe(error)
                    log.error("claims.settle_bug", kind=self.kind.name, rows=rows, error=text, stack=frames)
                    return False
                log.warning("claims.settle_waiting", kind=self.kind.name, error=f"{type(error).__name__}: {error}")
                await self._clock.sleep(RETRY_S)

    async def _settle_or_part(self, batch: Sequence[_Finished]) -> None:
        """Together; one by one where that meets a bug: its row alone is left leased, and comes due as interrupted."""
        if not await self._written(partial(self._settle, batch), len(batch)) and len(batch) > 1:
            for one in batch:
                await self._settle_or_part([one])

    async def _release(self, rows: Sequence[Claimed]) -> None:
        """Nothing of these has begun: they are due at once, for whoever has room."""
        async with self._pool.acquire() as conn:
            await claims.release(conn, rows)

    async def _settle(self, batch: Sequence[_Finished]) -> None:
        """⚑ One statement decides what counts; only that is saved, marked and published, in its transaction."""
        now = self._clock.now()
        for f in batch:
            f.emissions = self._teller.emissions(f.claimed, f.settlement, now)
        rows = [self._settled(f) for f in batch]
        saves = [(f.claimed, f.settlement.save) for f in batch if f.settlement.save is not None]
        along = self.kind.save(saves) if self.kind.save is not None and saves else None
        marked = self._published[:]
        async with self._pool.acquire() as conn:
            if not any(f.settlement.marks() for f in batch):
                # A statement is a transaction: one round trip instead of three.
                written = await claims.settle(conn, self.kind.name, rows, marked, along)
                counted = self._counted(batch, written)
            else:
                async with conn.transaction():
                    written = await claims.settle(conn, self.kind.name, rows, marked, along)
                    counted = self._counted(batch, written)
                    for mark in [mark for f in counted for mark in f.settlement.marks()]:
                        await ledger.mark(conn, mark.root, mark.disposition, mark.reason, mark.detail)
        self._marked(marked)
        for state, n in Counter(f.settlement.state for f in counted).items():
            self._metrics.inc("factmesh_settled_total", self.kind.name, state, by=n)
        if len(counted) < len(batch):
            self._tell_refused(batch, counted)
        if written.batch is not None:
            self._publish_later(written.batch, [e for f in counted for e in f.emissions])
        for f in counted:
            if f.settlement.state == "pending" and f.settlement.due_at:
                self.wake(max(0.0, (f.settlement.due_at - now).total_seconds()))

    @staticmethod
    def _counted(batch: Sequence[_Finished], written: claims.Written) -> Sequence[_Finished]:
        if written.counted is None:
            return batch
        return [f for f in batch if (f.claimed.id, f.claimed.epoch) in written.counted]

    def _tell_refused(self, batch: Sequence[_Finished], counted: Sequence[_Finished]) -> None:
        kept = {id(f) for f in counted}
        for f in batch:
            if id(f) not in kept:
                self._metrics.inc("factmesh_settle_refused_total", self.kind.name)
                log.warning("claims.lease_lost", kind=self.kind.name, row_id=str(f.claimed.id), epoch=f.claimed.epoch)

    @staticmethod
    def _settled(f: _Finished) -> Settled:
        s = f.settlement
        return Settled(f.claimed.id, f.claimed.epoch, s.state, s.due_at, s.progress, pack(f.emissions))

    # --- publishing --------------------------------------------------------------------------------------------------

    def _publish_later(self, batch: int, emissions: Sequence[Emission]) -> None:
        # An outage of the broker outlasts the grace: what this process has in hand it does not take over again.
        self._ours.add(batch)
        task = asyncio.create_task(self._publish(batch, emissions), name=f"publish:{self.kind.name}")
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish(self, batch: int, emissions: Sequence[Emission]) -> None:
        try:
            await self._publisher.publish(emissions)
        except BaseException:
            self._ours.discard(batch)
            raise
        for topic, n in Counter(e.topic for e in emissions).items():
            self._metrics.inc("factmesh_published_total", topic, by=n)
        self._published.append(batch)
        self._mark_soon()

    def _mark_soon(self) -> None:
        """The mark rides with the next settlement. Where none comes, it is a commit of its own, but not at once.

        A crash before it only means that a replica publishes once more, and receivers can tell.
        """
        if self._stopping:
            self._mark_now()
        elif self._mark_at is None and self._published:
            self._mark_at = asyncio.get_running_loop().call_later(MARK_WITHIN_S, self._mark_now)

    def _mark_now(self) -> None:
        self._mark_due = True
        self._to_settle.set()

    def _marked(self, batches: Sequence[int]) -> None:
        del self._published[: len(batches)]
        self._ours.difference_update(batches)
        if self._mark_at is not None:
            self._mark_at.cancel()
            self._mark_at = None
        self._mark_soon()

    async def stop(self, grace_s: float) -> None:
        """Claim nothing more, let running work finish for `grace_s`, settle it; the rest keeps its lease until it ends.

        What was claimed and still runs is not given back: its call may be out there. What did not begin is.
        """
        self._stopping = True
        self._wake.set()
        self._late += self._waiting
        self._waiting.clear()
        self._mark_now()
        try:
            async with asyncio.timeout(grace_s):
                while self._busy():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("claims.stop_late", kind=self.kind.name, running=self._working, unsettled=self._unsettled)
        finally:
            for task in list(self._workers):
                task.cancel()
            self._drained.set()

    def _busy(self) -> bool:
        """Something would be settled, published or marked yet."""
        settling = self._unsettled or self._finished or self._late
        return bool(self._working or settling or self._publishing or self._published)


class ClaimRuntime:
    """The claim loops of one service, as its batch loops and wiring see them."""

    def __init__(self) -> None:
        self.loops: dict[str, ClaimLoop] = {}

    def lease_s(self, kind: str) -> float:
        return self._of(kind).kind.lease_s

    def reserve(self, kind: str, wanted: int) -> int:
        return self._of(kind).reserve(wanted)

    def unreserve(self, reserved: Mapping[str, int]) -> None:
        for kind, n in reserved.items():
            self._of(kind).unreserve(n)

    def begin(self, rows: Sequence[Claimed], began: float) -> None:
        """`began`: before their transaction did, in this process's monotonic seconds; their leases count from there."""
        for kind in {r.kind for r in rows}:
            loop = self._of(kind)
            mine = [r for r in rows if r.kind == kind]
            for row in mine:
                row.lease_ends = began + loop.kind.lease_s
            loop.begin(mine)

    def wake(self, kind: str, in_s: float) -> None:
        if kind in self.loops:
            self.loops[kind].wake(in_s)

    def _of(self, kind: str) -> ClaimLoop:
        try:
            return self.loops[kind]
        except KeyError:
            known = ", ".join(self.loops) or "none"
            raise FactmeshError(f"no claim loop works on rows of kind {kind!r}; this service has: {known}") from None
