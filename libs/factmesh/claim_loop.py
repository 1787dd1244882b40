"""Due rows -> work -> settle, with lease epochs: timers, attempts, sends and unpublished outcomes are one loop.
What the work is belongs to the services; a settlement from an epoch that is not the current one changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog

from factmesh import claims, dlq, ids, ledger
from factmesh.claims import Claimed, Settled, Unpublished
from factmesh.clock import Clock
from factmesh.effects import MarkLedger, Publish
from factmesh.emitting import Cause, Emitter, parked
from factmesh.errors import FactmeshError
from factmesh.kafka import Publisher
from factmesh.message import Delivery, Emission, pack, unpack
from factmesh.metrics import Metrics
from factmesh.postgres import Connection, Pool, is_transient

log = structlog.get_logger("factmesh.claims")

IDLE_S_MAX = 5.0
"""Never sleep longer: another replica's rows come due without a hint."""
SETTLE_BATCH_MAX = 500
RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Death:
    """The message behind a row goes to its DLQ with this settlement; the loop adds the park of its instance.

    Attributes:
        original: the delivery, byte for byte, with its coordinates.
        error: class, reason and text of why.
        record: the decoded message, for the diagnosis headers (`command_id`, `step`, `instance_id`, …).
        replayable: also mark its ledger row `dead`, so that an opening is handled as a message (the notifier's way);
            otherwise the record is answered by a signal or a resolution (the connector's way).
        opening: the number that it died under, where a person's word has opened it again since; else the delivery's.
        group: the consumer group that handles an opening, where it is not the service's main one.
    """

    original: Delivery
    root: str
    error: FactmeshError
    attempts: int
    first_failed_at: datetime
    record: Mapping[str, Any]
    replayable: bool = False
    opening: int | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of an attempt: `pending` (again at `due_at`), `done`, `failed` or `unknown`.

    `publish` derives its ids from (row id, epoch, ordinal) unless they are given; `cause` is the record they inherit.
    `save` is written in the settlement's transaction, together for the whole batch, by the kind's `save`.
    """

    state: str
    due_at: datetime | None = None
    progress: bytes | None = None
    publish: tuple[Publish, ...] = ()
    cause: Mapping[str, Any] = field(default_factory=dict)
    traceparent: str | None = None
    death: Death | None = None
    ledger: tuple[MarkLedger, ...] = ()
    save: Any = None


@dataclass(frozen=True)
class ClaimKind:
    """One kind of row. `work` never raises to decide: an exception is a bug, the row is tried again with backoff."""

    name: str
    work: Callable[[Claimed], Awaitable[Settlement]]
    lease_s: float
    concurrency: int = 32
    handler: str = ""
    """The handler whose messages became these rows: its consumer group is the one that a death belongs to."""
    save: Callable[[Connection, Sequence[tuple[Claimed, Any]]], Awaitable[None]] | None = None


@dataclass(slots=True)
class _Finished:
    claimed: Claimed
    settlement: Settlement


class ClaimLoop:
    """Runs one kind: claims due rows up to its concurrency, works on them side by side, settles them together."""

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
        self._service, self._group, self._version = service, group, version
        self._pool, self._publisher, self._emitter = pool, publisher, emitter
        self._clock, self._metrics = clock, metrics
        self._free = kind.concurrency
        self._wake = asyncio.Event()
        self._finished: asyncio.Queue[_Finished] = asyncio.Queue()
        self._published: list[tuple[UUID, int]] = []
        self._working: set[asyncio.Task[None]] = set()
        self._publishing: set[asyncio.Task[None]] = set()
        self._in_publish: set[tuple[UUID, int]] = set()
        self._unsettled = 0
        self._stopping = False
        self._drained = asyncio.Event()
        self._next_wake: float | None = None
        self._starved = False

    # --- given by the batch loop -------------------------------------------------------------------------------------

    def reserve(self, wanted: int) -> int:
        """How many rows may be inserted already claimed; their slots are taken until `begin` or `unreserve`."""
        n = 0 if self._stopping else max(0, min(wanted, self._free))
        self._free -= n
        return n

    def unreserve(self, n: int) -> None:
        """The batch did not commit, or returned fewer rows than were reserved."""
        self._give_back(n)

    def _give_back(self, n: int) -> None:
        """Slots are free again. Only a row that was left due for want of one is asked for now.

        A look at every settlement took all the slots for as long as it asked: the next batch found none, and its rows
        were written twice, waiting and then claimed, instead of once.
        """
        self._free += n
        if self._starved:
            self._wake.set()

    def begin(self, rows: Sequence[Claimed]) -> None:
        """Work on rows whose slots are reserved."""
        for row in rows:
            self._spawn(row)

    def wake(self, in_s: float = 0.0) -> None:
        """A row comes due in `in_s` seconds."""
        if in_s <= 0:
            self._wake.set()
            return
        at = self._clock.monotonic() + in_s
        if self._next_wake is None or at < self._next_wake:
            self._next_wake = at
            asyncio.get_running_loop().call_later(in_s, self._wake.set)

    # --- the loop ----------------------------------------------------------------------------------------------------

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
        self._free -= limit
        taken = 0
        try:
            began = self._clock.monotonic()
            async with self._pool.acquire() as conn:
                rows, outcomes = await claims.claim_due(
                    conn, self.kind.name, limit, self.kind.lease_s, began + self.kind.lease_s
                )
                if self._stopping:
                    # The stop came while these were claimed: nothing of them has begun.
                    await claims.release(conn, rows)
                    return IDLE_S_MAX
                taken = len(rows)
                full = len(rows) + len(outcomes) == limit
                due_s = None if full else await claims.next_due_s(conn, self.kind.name)
        finally:
            self._free += limit - taken
        for row in rows:
            self._spawn(row)
        # An outage of the broker outlasts the grace: what this process is publishing already it does not queue again.
        outcomes = [o for o in outcomes if (o.id, o.epoch) not in self._in_publish]
        if outcomes:
            self._publish_later(outcomes)
        if full:
            self._starved = self._free <= 0
            return IDLE_S_MAX if self._starved else 0.0
        if due_s is not None and due_s <= 0:
            # Due and locked by somebody's transaction: asking again at once would go on for as long as that lasts.
            return RETRY_S
        return IDLE_S_MAX if due_s is None else min(IDLE_S_MAX, due_s + 0.001)

    def _spawn(self, row: Claimed) -> None:
        task = asyncio.create_task(self._work(row), name=f"{self.kind.name}:{row.id}")
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _work(self, row: Claimed) -> None:
        began = self._clock.monotonic()
        try:
            settlement = await self.kind.work(row)
        except asyncio.CancelledError:
            raise
        except Exception as bug:
            # The row stays leased, comes due again as interrupted, and nothing is claimed of it. Frames only: the text
            # and the locals of a bug may quote the payload (F5).
            _, text, frames = dlq.describe(bug)
            log.error("claims.bug", kind=self.kind.name, row_id=str(row.id), error=text, stack=frames)
            self._give_back(1)
            return
        self._metrics.observe("factmesh_work_seconds", self._clock.monotonic() - began, self.kind.name)
        self._unsettled += 1
        await self._finished.put(_Finished(row, settlement))

    async def _settle_all(self) -> None:
        while True:
            batch = [await self._finished.get()]
            while len(batch) < SETTLE_BATCH_MAX and not self._finished.empty():
                batch.append(self._finished.get_nowait())
            while True:
                try:
                    await self._settle(batch)
                    break
                except Exception as error:
                    if not is_transient(error):
                        _, text, frames = dlq.describe(error)
                        log.error("claims.settle_bug", kind=self.kind.name, rows=len(batch), error=text, stack=frames)
                        if len(batch) == 1:
                            # Left leased: it comes due again as interrupted, and nothing is claimed of it.
                            break
                        for one in batch[1:]:
                            self._finished.put_nowait(one)
                        batch = batch[:1]
                        continue
                    log.warning("claims.settle_waiting", kind=self.kind.name, error=f"{type(error).__name__}: {error}")
                    await self._clock.sleep(RETRY_S)
            self._unsettled -= len(batch)
            self._give_back(len(batch))

    async def _settle(self, batch: Sequence[_Finished]) -> None:
        now = self._clock.now()
        published, self._published = self._published, []
        try:
            async with self._pool.acquire() as conn, conn.transaction():
                await claims.mark_published(conn, published)
                held = await claims.lock_leased(conn, [f.claimed for f in batch])
                counted = [f for f in batch if f.claimed.id in held]
                emissions = {f.claimed.id: self._emissions(f, now) for f in counted}
                for f in counted:
                    for mark in self._marks(f):
                        await ledger.mark(conn, mark.root, mark.disposition, mark.reason, mark.detail)
                if self.kind.save is not None and counted:
                    await self.kind.save(conn, [(f.claimed, f.settlement.save) for f in counted])
                await claims.settle(conn, [self._settled(f, emissions[f.claimed.id]) for f in counted])
        except BaseException:
            self._published = published + self._published
            raise
        for f in batch:
            if f.claimed.id in held:
                self._metrics.inc("factmesh_settled_total", self.kind.name, f.settlement.state)
            else:
                self._metrics.inc("factmesh_settle_refused_total", self.kind.name)
                log.warning("claims.lease_lost", kind=self.kind.name, row_id=str(f.claimed.id), epoch=f.claimed.epoch)
        outcomes = [
            Unpublished(f.claimed.id, f.claimed.epoch, pack(emissions[f.claimed.id]))
            for f in counted
            if f.settlement.state != "pending" and emissions[f.claimed.id]
        ]
        if outcomes:
            self._publish_later(outcomes)
        dues = [f.settlement.due_at for f in counted if f.settlement.state == "pending" and f.settlement.due_at]
        for due_at in dues:
            self.wake(max(0.0, (due_at - now).total_seconds()))

    def _settled(self, f: _Finished, emissions: Sequence[Emission]) -> Settled:
        s = f.settlement
        outcome = pack(emissions) if s.state != "pending" else None
        return Settled(f.claimed.id, f.claimed.epoch, s.state, s.due_at, s.progress, outcome)

    def _emissions(self, f: _Finished, now: datetime) -> list[Emission]:
        s, row = f.settlement, f.claimed
        if s.state == "pending":
            return []
        # Not the root of the message that made the row: epoch n of it is not opening n of that.
        cause = Cause(
            f"claim:{row.id}", row.epoch, ids.instant_ms_of(row.id), f"id:{row.id}", s.cause, s.traceparent
        )
        out = [self._emitter.emit(p, cause, n, now) for n, p in enumerate(s.publish)]
        if s.death is not None:
            letter = self._letter(s.death, now)
            out.append(self._emitter.dead(letter))
            if letter.instance_id is not None:
                signal = parked(letter, ids.record_id(letter.root, letter.group), letter.instance_id)
                out.append(self._emitter.emit(signal, cause, len(out), now))
        return out

    def _letter(self, death: Death, now: datetime) -> dlq.DeadLetter:
        return dlq.dead_letter(
            death.original,
            death.error,
            root=death.root,
            opening=death.original.opening if death.opening is None else death.opening,
            group=death.group or self._group,
            stage=f"{self._service}/{self.kind.name}",
            first_failed_at=death.first_failed_at,
            failed_at=now,
            service_version=self._version,
            attempts=death.attempts,
            record=death.record,
        )

    @staticmethod
    def _marks(f: _Finished) -> Sequence[MarkLedger]:
        death = f.settlement.death
        if death is None or not death.replayable:
            return f.settlement.ledger
        mark = MarkLedger(death.root, "dead", death.error.reason, str(death.error))
        return (*f.settlement.ledger, mark)

    def _publish_later(self, outcomes: Sequence[Unpublished]) -> None:
        self._in_publish |= {(o.id, o.epoch) for o in outcomes}
        task = asyncio.create_task(self._publish(outcomes), name=f"publish:{self.kind.name}")
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish(self, outcomes: Sequence[Unpublished]) -> None:
        emissions = [e for o in outcomes for e in unpack(o.outcome)]
        try:
            await self._publisher.publish(emissions)
        finally:
            self._in_publish -= {(o.id, o.epoch) for o in outcomes}
        for emission in emissions:
            self._metrics.inc("factmesh_published_total", emission.topic)
        self._published += [(o.id, o.epoch) for o in outcomes]
        if self._finished.empty():
            # Nothing is about to be settled that the mark could ride with.
            published, self._published = self._published, []
            try:
                async with self._pool.acquire() as conn:
                    await claims.mark_published(conn, published)
            except Exception as error:
                # Published all the same: at the grace's end a replica publishes it once more, and receivers can tell.
                if not is_transient(error):
                    raise
                self._published += published

    async def stop(self, grace_s: float) -> None:
        """Claim nothing more, let running work finish for `grace_s`, settle it; the rest keeps its lease until it ends.

        What was claimed and still runs is not given back: its call may be out there.
        """
        self._stopping = True
        self._wake.set()
        try:
            async with asyncio.timeout(grace_s):
                while self._working or self._unsettled or self._publishing:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("claims.stop_late", kind=self.kind.name, running=len(self._working), unsettled=self._unsettled)
        finally:
            for task in list(self._working):
                task.cancel()
            self._drained.set()


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

    def begin(self, rows: Sequence[Claimed]) -> None:
        for kind in {r.kind for r in rows}:
            self._of(kind).begin([r for r in rows if r.kind == kind])

    def wake(self, kind: str, in_s: float) -> None:
        if kind in self.loops:
            self.loops[kind].wake(in_s)

    def _of(self, kind: str) -> ClaimLoop:
        try:
            return self.loops[kind]
        except KeyError:
            known = ", ".join(self.loops) or "none"
            raise FactmeshError(f"no claim loop works on rows of kind {kind!r}; this service has: {known}") from None
