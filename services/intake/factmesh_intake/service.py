"""The intake service as one value: facts in by Kafka and HTTP, canonical facts out, and what is said of them.
Wiring only; what a fact means is in `mapping`, what becomes of it in `decide`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from factmesh.batch import Handler
from factmesh.errors import SettingsError
from factmesh.expressions import default_expressions
from factmesh.message import Message
from factmesh.postgres import Connection, is_transient
from factmesh.project import Project
from factmesh.records import Records
from factmesh.service import Context, Parts, Service
from factmesh_intake import reading, store
from factmesh_intake.decide import decide_fact, decide_status
from factmesh_intake.http import Entrance, make_app
from factmesh_intake.model import Desk

NAME = "intake"
FORGET_EVERY_S = 3600.0

log = structlog.get_logger("factmesh.intake")


async def build(context: Context) -> Parts:
    """Compile the project's adapters once, and wire both entrances to the same desk."""
    settings = context.settings
    if settings.project is None:
        raise SettingsError("intake needs a project folder with adapters", hint="set FACTMESH_PROJECT")
    documents = list(Project.load(settings.project).adapters.values())
    mapper = await reading.build_mapper(documents, context.registry, default_expressions())
    if not mapper.types:
        raise SettingsError(
            "the project has no adapter, so no fact could be accepted",
            where=str(settings.project / "adapters"),
            hint="add one; services/intake/README.md shows how",
        )
    desk = Desk(mapper, timedelta(days=settings.dedup_horizon_days))
    facts = context.topic("facts.raw")
    entrance = Entrance(
        desk=desk,
        registry=context.registry,
        publisher=context.publisher,
        pool=context.pool,
        clock=context.clock,
        metrics=context.metrics,
        topic=facts,
    )

    async def forget() -> None:
        """What is said of facts is kept as long as the ledger that it is drawn from."""
        while True:
            await asyncio.sleep(FORGET_EVERY_S)
            before = (context.clock.now() - timedelta(days=settings.audit_days)).date()
            try:
                if gone := await store.forget(context.pool, before):
                    log.info("intake.forgotten", rows=gone)
            except Exception as error:
                if not is_transient(error):
                    raise
                log.warning("intake.forget_waits", error=type(error).__name__)

    handlers = (_facts(context, desk, facts), _status(context.records, context.topic("status")))
    return Parts(handlers=handlers, app=make_app(entrance), background=(forget,))


def _facts(context: Context, desk: Desk, topic: str) -> Handler[Desk]:
    registry = context.registry

    async def load(conn: Connection, messages: Sequence[Message], now: datetime) -> Mapping[str, Desk]:
        return {"": desk}

    return Handler(
        topics=lambda: (topic,),
        decode=lambda delivery: reading.decode(delivery, registry),
        load=load,
        key=lambda message: "",
        decide=decide_fact,
        save=store.save_facts,
        initial=lambda message: desk,
        dead=store.save_dead,
        schema_id=lambda delivery: reading.needs_schema(delivery, registry),
    )


def _status(records: Records, topic: str) -> Handler[None]:
    async def load(conn: Connection, messages: Sequence[Message], now: datetime) -> Mapping[str, None]:
        return {}

    return Handler(
        name="status",
        topics=lambda: (topic,),
        decode=records.expect(("status",)),
        load=load,
        key=lambda message: "",
        decide=decide_status,
        save=store.save_status,
        initial=lambda message: None,
        schema_id=records.needs_schema,
        projection=True,
    )


SERVICE = Service(name=NAME, build=build, migrations=Path(__file__).parent / "migrations")
