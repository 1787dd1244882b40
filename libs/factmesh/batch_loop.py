"""Kafka -> decide -> ledger -> Kafka: polls, hands batches to their transaction, publishes, then commits offsets.
What a message means is the handler's, what the ledger says is `batch`'s; offsets never pass what is not published.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from factmesh import dlq, ledger
from factmesh.batch import Disturbed, Runner, SplitBatch, is_conflict
from factmesh.claim_loop import ClaimRuntime
from factmesh.clock import Clock
from factmesh.errors import ErrorClass, FactmeshError, class_of
from factmesh.handling import Item, Outcome
from factmesh.held import Held
from factmesh.kafka import Coordinates, Publisher, Subscription
from factmesh.message import H_GROUP, Delivery
from factmesh.metrics import Metrics
from factmesh.postgres import Pool, is_timeout, is_transient, is_unique_violation
from factmesh.registry import Registry
from factmesh.verdict import Verdict

IN_FLIGHT_MAX = 4
"""Batches that are committed in PostgreSQL and not yet acknowledged by Kafka; more would only hold memory."""
COMMIT_EVERY_S = 0.2
ALONE_ATTEMPTS_MAX = 3
"""How often a message that fails alone in its batch, for no class of error we know, is tried before it is dead."""
KILLED_ATTEMPTS_MAX = 4
"""How often a process may die with one message in hand before that message is dead."""
TIMEOUTS_MAX = 2
"""How often a batch may run out of its transaction's time before it is tried in halves: it may never fit whole."""
RETRY_S_MAX = 5.0
PROJECTION_PAUSE_S = 0.2
"""Between two small batches of a projection: nobody sees it, and a message among twenty costs a tenth of one alone."""
HALT_WINDOW = 200
HALT_DEAD_MIN = 100
HALT_SHARE = 0.5
"""Of the last 200 messages of a partition, when at least 100 and half of them died, it halts: a bad deploy."""

_REPEATS = frozenset({Verdict.REPEAT, Verdict.REPUBLISH})

log = structlog.get_logger("factmesh.batch_loop")


class PoisonFlood(Exception):
    """Too much of a partition would die."""

    def __init__(self, where: Coordinates) -> None:
        super().__init__(f"{where[0]}[{where[1]}]")
        self.where = where


@dataclass(slots=True)
class _InFlight:
    """A committed batch whose bytes are on their way: its offsets wait for the acknowledgements."""

    offsets: dict[Coordinates, int]
    published: asyncio.Task[None]


@dataclass(slots=True)
class _Health:
    """What the last messages of a partition came to."""

    last: deque[bool] = field(default_factory=lambda: deque(maxlen=HALT_WINDOW))

    def would_halt(self, dead: int, alive: int) -> bool:
        recent = list(self.last)[-(HALT_WINDOW - dead - alive) :] if dead + alive < HALT_WINDOW else []
        total, died = len(recent) + dead + alive, sum(recent) + dead
        return died >= HALT_DEAD_MIN and died >= HALT_SHARE * total


class BatchLoop:
    """One handler's loop. `careful` begins one by one with a durable mark, after an unclean stop."""

    def __init__(
        self,
        runner: Runner[Any],
        *,
        pool: Pool,
        publisher: Publisher,
        registry: Registry,
        claims: ClaimRuntime,
        clock: Clock,
        metrics: Metrics,
        batch_max: int,
        subscribe: Callable[[str, Sequence[str], Callable[[], Awaitable[None]]], Subscription],
        careful: bool = False,
        halt_on_flood: bool = True,
    ) -> None:
        self._runner, self._pool, self._publisher, self._registry = runner, pool, publisher, registry
        self._held = Held(pool)
        self._claims, self._clock, self._metrics = claims, clock, metrics
        self._batch_max = batch_max
        self._halt_on_flood = halt_on_flood
        self._lagging: set[Coordinates] = set()
        self._careful_n = batch_max if careful else 0
        self._careful: dict[Coordinates, int] = {}
        self._subscription = subscribe(runner.group, runner.handler.topics(), self._drain)
        self._in_flight: deque[_InFlight] = deque()
        self._days = ledger.Days()
        self._health: dict[Coordinates, _Health] = {}
        self._committed: dict[Coordinates, int] = {}
        self._busy = asyncio.Lock()
        self._stopping = False
        self._commit_lock = asyncio.Lock()
        self._last_commit = 0.0
        self._beside: dict[str, asyncio.Task[None]] = {}
        self.halted: set[Coordinates] = set()
        self.label = runner.handler.name or "main"

    @property
    def group(self) -> str:
        return self._runner.group

    async def run(self) -> None:
        """Until stopped: poll, handle, publish, commit.

        No poll runs ahead of the batch in hand: it would come back with the few messages that are there at once, and
        what arrives meanwhile would wait behind that second, small batch. The client fetches ahead anyway.
        """
        await self._subscription.start()
        beats = 0.0
        try:
            while not self._stopping:
                deliveries = await self._subscription.poll(self._batch_max)
                deliveries = [d for d in deliveries if (d.topic, d.partition) not in self.halted]
                if deliveries:
                    async with self._busy:
                        if not self._stopping:
                            await self._take(deliveries)
                else:
                    await self._held.give_back()
                self._commit_beside()
                if deliveries and self._runner.handler.projection and len(deliveries) < self._batch_max:
                    await self._clock.sleep(PROJECTION_PAUSE_S)
                if self._clock.monotonic() - beats > 1.0:
                    beats = self._clock.monotonic()
                    self._do_beside("beat", self._beat)
        finally:
            for waiting in self._beside.values():
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await waiting
            await self._held.give_back()

    def _do_beside(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What asks the broker while batches go on: one of a kind at a time, and its trouble is the loop's."""
        before = self._beside.get(what)
        if before is not None:
            if not before.done():
                return
            before.result()
        self._beside[what] = asyncio.create_task(work())

    async def _beat(self) -> None:
        lags = await self._subscription.lag()
        for (topic, partition), lag in lags.items():
            self._metrics.set("factmesh_consumer_lag", lag, topic, str(partition))
        for topic, partition in self._lagging - lags.keys():
            # Its new owner tells it now; two values of one partition would raise a false alert.
            self._metrics.forget("factmesh_consumer_lag", topic, str(partition))
        self._lagging = set(lags)
        self._metrics.set("factmesh_partitions_halted", len(self.halted), self.label)
        wanted = self._runner.handler.topics()
        if tuple(wanted) != self._subscription.topics:
            log.info("batch.topics", group=self.group, topics=len(wanted))
            await self._subscription.resubscribe(wanted)

    async def _take(self, deliveries: list[Delivery]) -> None:
        """One polled batch; after an unclean stop the first ones go one by one, each marked before it is touched.

        Each partition has its own count of these: the one message that kills may wait behind another's long backlog.
        """
        mine: list[Delivery] = []
        passed_over: list[Delivery] = []
        for delivery in deliveries:
            if delivery.opening > 0 and delivery.header(H_GROUP) not in (None, self.group):
                passed_over.append(delivery)
            elif self._careful_n and self._careful.get((delivery.topic, delivery.partition), 0) < self._careful_n:
                where = (delivery.topic, delivery.partition)
                self._careful[where] = self._careful.get(where, 0) + 1
                await self._carefully(delivery)
            else:
                mine.append(delivery)
        if mine:
            await self._handle(mine)
        # Last, for their offsets would pass messages of the same partition that are still in hand.
        passed_over = [d for d in passed_over if (d.topic, d.partition) not in self.halted]
        if passed_over:
            await self._hand_on([], passed_over)

    async def _carefully(self, delivery: Delivery) -> None:
        attempts = await self._patiently(lambda: self._mark(delivery))
        error = None
        if attempts > KILLED_ATTEMPTS_MAX:
            error = FactmeshError(
                f"{attempts - 1} processes died with this message in hand",
                where=delivery.where,
                hint="look at the bytes; correct and replay, or discard",
            )
        await self._handle([delivery], error, attempts - 1 if error is not None else 1)
        await self._patiently(lambda: self._unmark(delivery))

    async def _mark(self, delivery: Delivery) -> int:
        async with self._pool.acquire() as conn:
            return await ledger.mark_attempt(conn, delivery)

    async def _unmark(self, delivery: Delivery) -> None:
        async with self._pool.acquire() as conn:
            await ledger.clear_attempt(conn, delivery)

    async def _patiently(self, work: Callable[[], Awaitable[Any]]) -> Any:
        wait_s = 0.05
        while True:
            try:
                return await work()
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning("batch.database", group=self.group, error=f"{type(error).__name__}: {error}")
                await self._clock.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_S_MAX)

    # --- one batch ---------------------------------------------------------------------------------------------------

    async def _handle(
        self, deliveries: Sequence[Delivery], error: BaseException | None = None, attempts: int = 1
    ) -> None:
        """Until every message has its durable disposition. Transient trouble waits; other trouble is halved."""
        timeouts, wait_s = 0, 0.05
        while True:
            # A partition that halted while its batch was handled in parts: what follows in it must not be handled
            # either, or its offset would pass those that wait.
            deliveries = [d for d in deliveries if (d.topic, d.partition) not in self.halted]
            if not deliveries:
                return
            try:
                await self._once(deliveries, error, attempts)
                return
            except PoisonFlood as flood:
                await self._halt(flood.where, deliveries)
            except SplitBatch:
                await self._halve(deliveries, error)
                return
            except Exception as failure:
                if is_transient(failure) or class_of(failure) is ErrorClass.TRANSIENT:
                    self._metrics.inc("factmesh_batch_retries_total", self.label, "transient")
                    log.warning(
                        "batch.retry",
                        group=self.group,
                        messages=len(deliveries),
                        error=f"{type(failure).__name__}: {failure}",
                        message="rolled back and tried again; nothing is lost",
                    )
                    timeouts += is_timeout(failure)
                    if timeouts >= TIMEOUTS_MAX and len(deliveries) > 1:
                        await self._halve(deliveries, error)
                        return
                elif len(deliveries) > 1:
                    self._metrics.inc("factmesh_batch_retries_total", self.label, "halved")
                    await self._halve(deliveries, error)
                    return
                elif attempts >= ALONE_ATTEMPTS_MAX:
                    _, text, frames = dlq.describe(failure)
                    log.error("batch.culprit", group=self.group, where=deliveries[0].where, error=text, stack=frames)
                    error = failure
                else:
                    attempts += 1
                await self._clock.sleep(wait_s)
                wait_s = min(wait_s * 2, RETRY_S_MAX)

    async def _halve(self, deliveries: Sequence[Delivery], error: BaseException | None) -> None:
        middle = len(deliveries) // 2
        for part in (deliveries[:middle], deliveries[middle:]):
            await self._handle(part, error)

    async def _once(self, deliveries: Sequence[Delivery], error: BaseException | None, attempts: int) -> None:
        began = self._clock.monotonic()
        now = self._clock.now()
        failures = await self._fetch_schemas(deliveries)
        items = self._runner.items(deliveries, now, failures, error)
        if attempts > 1:
            for item in items:
                item.attempts = attempts
        missing = self._days.missing(self._runner.days(items, now))
        if missing:
            async with self._pool.acquire() as conn:
                await self._days.ensure(conn, missing)
        outcome = await self._transact(items, deliveries, error)
        self._metrics.observe("factmesh_batch_seconds", self._clock.monotonic() - began, self.label)
        self._metrics.observe("factmesh_batch_messages", len(deliveries), self.label)
        for kind, due_at in outcome.scheduled.items():
            self._claims.wake(kind, (due_at - now).total_seconds())
        self._count(outcome.items)
        await self._hand_on(outcome.emissions, deliveries)

    async def _fetch_schemas(self, deliveries: Sequence[Delivery]) -> dict[str, FactmeshError]:
        """Writers' schemas not cached yet. One that the registry does not know is poison; silence is waited out."""
        failures: dict[str, FactmeshError] = {}
        for delivery in deliveries:
            schema_id = self._runner.handler.schema_id(delivery)
            if schema_id is None or self._registry.cached(schema_id) is not None:
                continue
            try:
                await self._registry.by_id(schema_id)
            except FactmeshError as error:
                if error.error_class is ErrorClass.TRANSIENT:
                    raise
                failures[delivery.where] = error.about(delivery.where)
        return failures

    async def _transact(
        self, items: list[Item], deliveries: Sequence[Delivery], error: BaseException | None
    ) -> Outcome:
        """Fast path first where it may hold; a repeat reruns the batch, uncounted, on the slow path."""
        if self._runner.may_be_fast(items):
            try:
                return await self._commit_batch(items, fast=True)
            except Disturbed:
                self._metrics.inc("factmesh_batch_retries_total", self.label, "disturbed")
            except Exception as failure:
                if not is_unique_violation(failure):
                    raise
                self._metrics.inc("factmesh_batch_retries_total", self.label, "repeat")
            now = self._clock.now()
            items = self._runner.items(deliveries, now, error=error)
        return await self._commit_batch(items, fast=False)

    async def _commit_batch(self, items: list[Item], *, fast: bool) -> Outcome:
        now = self._clock.now()
        reserved: dict[str, int] = {}

        def reserve(kind: str, wanted: int) -> int:
            n = self._claims.reserve(kind, wanted)
            reserved[kind] = reserved.get(kind, 0) + n
            return n

        handle = self._runner.fast if fast else self._runner.slow
        began = self._clock.monotonic()
        try:
            conn = await self._held.get()
            async with conn.transaction():
                outcome = await handle(conn, items, now, reserve)
                counts = self._check_flood(outcome.items)
        except BaseException:
            self._claims.unreserve(reserved)
            await self._held.give_back()
            raise
        for where, (dead_n, alive_n) in counts.items():
            self._health[where].last.extend([True] * dead_n + [False] * alive_n)
        for row in outcome.started:
            reserved[row.kind] -= 1
        self._claims.unreserve({kind: n for kind, n in reserved.items() if n > 0})
        self._claims.begin(outcome.started, began)
        return outcome

    def _check_flood(self, items: Sequence[Item]) -> Mapping[Coordinates, list[int]]:
        """Before the commit: would this much death halt a partition? Conflicts and replays are not a bad deploy."""
        counts: dict[Coordinates, list[int]] = {}
        for item in items:
            if item.verdict in _REPEATS or item.opening > 0 or is_conflict(item):
                continue
            where = (item.delivery.topic, item.delivery.partition)
            count = counts.get(where)
            if count is None:
                count = counts[where] = [0, 0]
            count[0 if item.disposition == "dead" else 1] += 1
        for where, (dead_n, alive_n) in counts.items():
            health = self._health.setdefault(where, _Health())
            if dead_n and self._halt_on_flood and health.would_halt(dead_n, alive_n):
                raise PoisonFlood(where)
        return counts

    async def _halt(self, where: Coordinates, deliveries: Sequence[Delivery]) -> None:
        """Stop this partition; its messages stay in Kafka until somebody restarts the service."""
        first = min(d.offset for d in deliveries if (d.topic, d.partition) == where)
        self.halted.add(where)
        await self._subscription.pause([where])
        await self._subscription.rewind({where: first})
        log.error(
            "batch.halted",
            topic=where[0],
            partition=where[1],
            offset=first,
            message=f"at least half of the last {HALT_WINDOW} messages would go to the DLQ: the partition stops here. "
            "Look at the newest DLQ records, mend the cause (a deploy, a schema), restart the service",
            runbook="docs/runbooks/partition-halted.md",
        )

    def _count(self, items: Sequence[Item]) -> None:
        became: Counter[tuple[str, str, str]] = Counter()
        for item in items:
            topic = item.delivery.topic
            if item.verdict in _REPEATS:
                became["factmesh_repeats_total", topic, str(item.verdict)] += 1
                continue
            became["factmesh_messages_total", topic, item.disposition] += 1
            if item.error is not None:
                reason = str(getattr(item.error, "reason", "bug"))
                became["factmesh_dead_total", topic, reason] += 1
                log.warning(
                    "message.dead",
                    where=item.delivery.where,
                    reason=reason,
                    message_id=str(item.message.id) if item.message and item.message.id else item.root.text,
                    correlation_id=item.message.record.get("correlation_id") if item.message else None,
                    instance_id=str(item.message.instance_id) if item.message and item.message.instance_id else None,
                    error=item.detail,
                )
        for (name, topic, what), n in became.items():
            self._metrics.inc(name, topic, what, by=n)

    # --- publishing and offsets --------------------------------------------------------------------------------------

    async def _hand_on(self, emissions: Sequence[Any], deliveries: Sequence[Delivery]) -> None:
        """Publish in the background; offsets follow in order when everything before them is acknowledged."""
        offsets: dict[Coordinates, int] = {}
        for d in deliveries:
            where = (d.topic, d.partition)
            offsets[where] = max(offsets.get(where, 0), d.offset + 1)
        while len(self._in_flight) >= IN_FLIGHT_MAX:
            await asyncio.shield(self._in_flight[0].published)
            self._commit_beside()
        self._in_flight.append(_InFlight(offsets, asyncio.create_task(self._publish(emissions))))

    async def _publish(self, emissions: Sequence[Any]) -> None:
        began = self._clock.monotonic()
        await self._publisher.publish(emissions)
        for topic, n in Counter([e.topic for e in emissions]).items():
            self._metrics.inc("factmesh_published_total", topic, by=n)
        self._metrics.observe("factmesh_publish_seconds", self._clock.monotonic() - began, self.label)

    def _gather(self) -> None:
        """Offsets of what is published, from the front only: one never passes a batch that is not published."""
        while self._in_flight and self._in_flight[0].published.done():
            batch = self._in_flight.popleft()
            batch.published.result()
            self._raise_offsets(batch.offsets)

    def _raise_offsets(self, offsets: Mapping[Coordinates, int]) -> None:
        for where, offset in offsets.items():
            self._committed[where] = max(self._committed.get(where, 0), offset)

    def _commit_beside(self) -> None:
        """Commit what is published, now and then, while the next batch is handled."""
        self._gather()
        if self._committed and self._clock.monotonic() - self._last_commit >= COMMIT_EVERY_S:
            self._do_beside("commit", self._commit)

    async def _commit(self) -> None:
        async with self._commit_lock:
            # What left with a rebalance is the new owner's to commit: ours may be lower than where he is.
            offsets = {w: o for w, o in self._committed.items() if w in self._subscription.assigned}
            self._committed = {}
            self._last_commit = self._clock.monotonic()
            if not await self._subscription.commit(offsets):
                self._raise_offsets(offsets)

    async def _drain(self) -> None:
        """Before partitions go: finish the batch in hand, wait for its acknowledgements, commit."""
        async with self._busy:
            for batch in list(self._in_flight):
                await asyncio.shield(batch.published)
            self._gather()
            await self._commit()

    async def stop(self) -> None:
        """Finish the batch, publish, commit, leave the group."""
        self._stopping = True
        await self._drain()

    async def close(self) -> None:
        """Leave the group; after `run` has returned."""
        await self._subscription.close()

    @property
    def idle(self) -> bool:
        """Nothing in hand, everything published."""
        return not self._in_flight and not self._busy.locked()
