"""The quarantine service as one value: the batch loop over every DLQ topic, and the publisher of acts that are due.
Wiring only; what a death means is in `decide`, what people may do in `acts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from factmesh import kafka
from factmesh.batch import Change, Handler
from factmesh.effects import Effect
from factmesh.message import Message
from factmesh.metrics import Metrics
from factmesh.postgres import Connection, is_transient
from factmesh.service import Context, Parts, Service
from factmesh_quarantine import queries, store
from factmesh_quarantine.acts import Acts
from factmesh_quarantine.decide import file
from factmesh_quarantine.model import NAME, State, Thread
from factmesh_quarantine.reading import Reader, as_message, death_of, dlq_topics

LOOK_EVERY_S = 2.0
"""Between two looks for DLQ topics that are new and acts that are due."""
PUBLISH_AFTER_S = 5.0
"""Who raised an act publishes it; what is still due after this was left behind by a tool that was killed."""
FORGET_EVERY_S = 3600.0
MEASURE_EVERY_S = 15.0
FIGURES_DAYS = 30
BYTES_DAYS = 30
"""How long the bytes of a closed record are kept for people who look back."""

log = structlog.get_logger("factmesh.quarantine")


async def load(conn: Connection, messages: Sequence[Message], now: datetime) -> Mapping[str, Thread]:
    threads = await store.load(conn, [death_of(m) for m in messages], now)
    return {str(id_): thread for id_, thread in threads.items()}


def decide(thread: Thread, message: Message, now: datetime) -> tuple[Thread, Sequence[Effect]]:
    return file(thread, death_of(message)), ()


async def save(conn: Connection, changes: Sequence[Change[Thread]]) -> None:
    await store.save(conn, [c.after for c in changes])
    await store.save_progress(conn, [death_of(m) for c in changes for m, _ in c.steps])


def _initial(message: Message) -> Thread:
    raise AssertionError(f"load makes every thread: {message.where}")


class _Topics:
    """The DLQ topics that exist; new ones (of a new connector) are followed as they appear."""

    def __init__(self, bootstrap: str, namespace: str) -> None:
        self._bootstrap = bootstrap
        self._namespace = namespace
        self._found: tuple[str, ...] = ()

    def __call__(self) -> Sequence[str]:
        return self._found

    async def look(self) -> None:
        self._found = dlq_topics(await kafka.list_topics(self._bootstrap), self._namespace)


async def build(context: Context) -> Parts:
    namespace = context.settings.topic_prefix
    topics = _Topics(context.settings.kafka_bootstrap, namespace)
    await topics.look()
    reader = Reader(context.records, context.group, NAME, context.version)
    acts = Acts(context.pool, context.registry, namespace, context.publisher.publish)
    handler = Handler(
        topics=topics,
        decode=lambda delivery: as_message(reader.death(delivery)),
        load=load,
        key=lambda message: str(death_of(message).thread),
        decide=decide,
        save=save,
        initial=_initial,
    )

    async def look_for_topics() -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await topics.look()
            except Exception as error:
                # Whatever keeps the broker from answering: those that are followed already stay followed.
                log.warning("quarantine.topics_wait", error=f"{type(error).__name__}: {error}")

    async def publish_what_is_due() -> None:
        while True:
            try:
                before = context.clock.now() - timedelta(seconds=PUBLISH_AFTER_S)
                if n := await acts.publish_due(before, context.clock.now):
                    log.info("quarantine.published", message="acts that were left unpublished", count=n)
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning("quarantine.publish_waits", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(LOOK_EVERY_S)

    async def forget_old_bytes() -> None:
        while True:
            await asyncio.sleep(FORGET_EVERY_S)
            try:
                await context.pool.execute(store.SQL.forget_bytes, BYTES_DAYS)
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning("quarantine.forget_waits", error=f"{type(error).__name__}: {error}")

    async def measure() -> None:
        while True:
            try:
                figures = await queries.stats(context.pool, context.clock.now() - timedelta(days=FIGURES_DAYS))
                _show(context.metrics, figures)
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning("quarantine.measure_waits", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(MEASURE_EVERY_S)

    background = (look_for_topics, publish_what_is_due, forget_old_bytes, measure)
    return Parts(handlers=(handler,), background=background)


def _show(metrics: Metrics, figures: Mapping[str, Any]) -> None:
    """The figures of E3 as gauges; ratio and mean only once there is something to measure."""
    for state in State:
        records = sum(states.get(state, 0) for states in figures["owners"].values())
        metrics.set("factmesh_quarantine_records", records, state)
    metrics.set("factmesh_quarantine_acts_due", figures["replays"]["due"])
    if figures["replays"]["success_rate"] is not None:
        metrics.set("factmesh_replay_success_ratio", figures["replays"]["success_rate"])
    if figures["recovery"]["mean_s"] is not None:
        metrics.set("factmesh_recovery_mean_seconds", figures["recovery"]["mean_s"])


SERVICE = Service(name=NAME, build=build, migrations=Path(__file__).parent / "migrations")
