"""The quarantine index as the tool opens it: addresses, gateways, and the index brought up to the end of every DLQ.
The only importer of aiokafka: here asyncio and seeking matter more than rate. Nothing is printed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from factmesh import __version__, kafka
from factmesh import settings as settings_module
from factmesh.clock import Clock, SystemClock
from factmesh.errors import SettingsError
from factmesh.message import Delivery
from factmesh.postgres import Pool, create_pool, is_transient
from factmesh.records import Records
from factmesh.registry import Registry, open_registry
from factmesh.settings import Settings
from factmesh.topics import DLQ_BYTES_MAX
from factmesh_quarantine import store
from factmesh_quarantine.acts import Acts
from factmesh_quarantine.model import NAME, Death
from factmesh_quarantine.reading import Reader, dlq_topics

ADDRESSES_FILE = "addresses.env"
BATCH_MAX = 500
WAIT_MS = 300
FILE_TRIES_MAX = 5
"""Losing against the service's own filing this often means that something else is wrong."""

Progress = Callable[[int, int], None]
"""Called with (filed so far, to be filed)."""


@dataclass(frozen=True)
class Index:
    """Everything that a command needs."""

    settings: Settings
    pool: Pool
    registry: Registry
    acts: Acts
    reader: Reader
    clock: Clock

    @property
    def namespace(self) -> str:
        return self.settings.topic_prefix


def read_addresses(folder: Path) -> dict[str, str]:
    """The variables of a running `factmesh up`, as its folder tells them. Raises SettingsError."""
    path = folder / ADDRESSES_FILE if folder.is_dir() else folder
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingsError(
            f"no addresses there: {error.strerror}", where=str(path), hint="is `factmesh up` running with this folder?"
        ) from None
    pairs = (line.removeprefix("export ").partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def load_settings(given: dict[str, str]) -> Settings:
    """Settings of the environment, with those of `given` (a run folder) before them."""
    fields = {
        name.removeprefix("FACTMESH_").lower(): value
        for name, value in given.items()
        if name.startswith("FACTMESH_") and name.removeprefix("FACTMESH_").lower() in Settings.model_fields
    }
    own = given.get("FACTMESH_QUARANTINE_DSN")
    return settings_module.load(Settings, **(fields | ({"postgres_dsn": own} if own else {})))


@contextlib.asynccontextmanager
async def open_index(settings: Settings, clock: Clock | None = None) -> AsyncIterator[Index]:
    """Open the index with the quarantine service's role. Raises SettingsError when that service never ran here."""
    clock = clock or SystemClock()
    schema = settings.schema_name(NAME)
    async with contextlib.AsyncExitStack() as stack:
        pool = await create_pool(
            settings.postgres_dsn.get_secret_value(), schema=schema, application="factmesh-dlq", size_max=4
        )
        stack.push_async_callback(pool.close)
        if await pool.fetchval(store.SQL.is_there) is None:
            raise SettingsError(
                f"there is no quarantine index in schema {schema}",
                hint="start factmesh-quarantine once, with the same FACTMESH_NAMESPACE and database",
            )
        registry = open_registry(url=settings.registry_url, schemas_dir=settings.schemas_dir, project=settings.project)
        stack.push_async_callback(registry.close)
        await kafka.wait_for_broker(settings.kafka_bootstrap)
        publisher = kafka.Publisher(settings.kafka_bootstrap, client_id="factmesh-dlq")
        stack.push_async_callback(publisher.close)
        records = await Records.open(registry, settings.schemas_dir)
        group = f"{settings.topic_prefix}factmesh-{NAME}"
        acts = Acts(pool, registry, settings.topic_prefix, publisher.publish)
        yield Index(settings, pool, registry, acts, Reader(records, group, NAME, __version__), clock)


async def catch_up(index: Index, progress: Progress | None = None) -> int:
    """File everything that lies on the DLQ topics now. Returns how many records were new.

    It reads from where the index is, without joining the service's group: filing is idempotent under the thread's
    lock, so the tool needs no rebalance, works whether the service runs or not, and leaves its offsets alone.
    """
    consumer = AIOKafkaConsumer(
        bootstrap_servers=index.settings.kafka_bootstrap,
        client_id="factmesh-dlq",
        enable_auto_commit=False,
        max_partition_fetch_bytes=DLQ_BYTES_MAX + kafka.RECORD_OVERHEAD_BYTES_MAX,
    )
    await consumer.start()
    try:
        existing = await kafka.list_topics(index.settings.kafka_bootstrap)
        names = dlq_topics(existing, index.namespace)
        partitions = [TopicPartition(t, p) for t in names for p in range(existing[t])]
        if not partitions:
            return 0
        consumer.assign(partitions)  # what is not assigned has no metadata, hence no offsets
        ends = await consumer.end_offsets(partitions)
        begins = await consumer.beginning_offsets(partitions)
        known = {
            (r["topic"], r["partition"]): r["next_offset"] for r in await index.pool.fetch(store.SQL.read_progress)
        }
        starts = {tp: max(begins[tp], known.get((tp.topic, tp.partition), 0)) for tp in partitions}
        left = {tp: ends[tp] for tp in partitions if starts[tp] < ends[tp]}
        total = sum(end - starts[tp] for tp, end in left.items())
        if left:
            consumer.assign(list(left))
        for tp in left:
            consumer.seek(tp, starts[tp])
        return await _file(index, consumer, left, total, progress)
    finally:
        await consumer.stop()


async def _file(
    index: Index, consumer: Any, left: dict[TopicPartition, int], total: int, progress: Progress | None
) -> int:
    done = new = 0
    while left:
        found = await consumer.getmany(*left, timeout_ms=WAIT_MS, max_records=BATCH_MAX)
        deaths = [index.reader.death(_delivery(r)) for records in found.values() for r in records]
        if deaths:
            new += await _file_batch(index, deaths)
        done += len(deaths)
        if progress is not None:
            progress(min(done, total), total)
        for tp in list(left):
            if await consumer.position(tp) >= left[tp]:
                del left[tp]
    return new


async def _file_batch(index: Index, deaths: list[Death]) -> int:
    """One batch. The service may file the same ones at this moment: a deadlock between the two is tried again."""
    for tries_left in reversed(range(FILE_TRIES_MAX)):
        try:
            async with index.pool.acquire() as conn, conn.transaction():
                return await store.file_all(conn, deaths, index.clock.now())
        except Exception as error:
            if not tries_left or not is_transient(error):
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def _delivery(record: Any) -> Delivery:
    return Delivery(
        record.topic, record.partition, record.offset, record.key, record.value, tuple(record.headers), record.timestamp
    )
