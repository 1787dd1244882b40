"""The connector service as one value: a handler and a claim kind for each connector that this process serves.
Wiring only; what follows a call is in `follow`, how it is made in `attempt` and in the connectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import structlog
from pydantic import Field

from factmesh.batch import Handler
from factmesh.claim_loop import ClaimKind
from factmesh.expressions import default_expressions
from factmesh.http_client import HttpClient
from factmesh.message import Message
from factmesh.postgres import is_transient
from factmesh.service import Context, Parts, Service
from factmesh.settings import Settings
from factmesh_connector import catalogue, store
from factmesh_connector.attempt import SETTLE_MARGIN_S, Attempts
from factmesh_connector.decide import SERVICE as NAME
from factmesh_connector.decide import decide, object_key
from factmesh_connector.model import KIND_PREFIX, State
from factmesh_connector.protocol import Connector

EXPIRE_EVERY_S = 86_400.0
TURN_WAIT_S = 5.0
"""Part of a lease in which a command may wait in memory for its call; one that waited longer goes back to its row."""
BATCHES_HELD_MAX = 4
"""One that is written, one that is worked on, and those that are being settled."""
log = structlog.get_logger("factmesh.connector")


class ConnectorSettings(Settings):
    """What a connector service is told besides the common settings."""

    connectors: str = Field(
        default="", description="names, separated by commas; empty serves every YAML connector of the project"
    )
    concurrency: int = Field(default=64, ge=1, le=2000, description="calls at once, for each connector of a replica")

    @property
    def connector_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.connectors.split(",") if name.strip())


def lease_s(connector: Connector) -> float:
    """A lease covers a wait, the longest attempt that may be declared, and its settlement."""
    longest_s = max(operation.longest_s for operation in connector.operations.values())
    return TURN_WAIT_S + longest_s + 2 * SETTLE_MARGIN_S


async def build(context: Context) -> Parts:
    """Wire the connectors that the settings name. Raises SettingsError when one of them cannot serve."""
    settings = context.settings
    assert isinstance(settings, ConnectorSettings)
    http = HttpClient(connections_max=2 * settings.concurrency)
    folder = settings.project / "connectors" if settings.project is not None else None
    try:
        connectors = catalogue.load(
            folder, settings.connector_names, http=http, clock=context.clock, expressions=default_expressions()
        )
    except BaseException:
        await http.close()
        raise
    for name, connector in connectors.items():
        log.info("connector.serves", connector=name, operations=sorted(connector.operations))
    return Parts(
        handlers=tuple(_handler(context, name, connectors) for name in connectors),
        claims=kinds(context, connectors, settings),
        background=(partial(_close_at_the_end, http, connectors), partial(_expire, context)),
        topics=tuple(f"command.{name}" for name in connectors),
    )


def _handler(context: Context, name: str, connectors: Mapping[str, Connector]) -> Handler[State]:
    """One consumer group a connector: teams move connectors between services, and a sick one holds up only itself."""
    keys = store.Store()
    return Handler(
        name=name,
        topics=lambda: (context.topic(f"command.{name}"),),
        decode=context.records.expect({"command", "resolution"}),
        schema_id=context.records.needs_schema,
        load=keys.load,
        key=object_key,
        decide=partial(decide, {name: connectors[name].operations}),
        save=keys.save,
        initial=_initial,
    )


def _initial(_message: Message) -> State:
    return State()


def kinds(
    context: Context, connectors: Mapping[str, Connector], settings: ConnectorSettings
) -> tuple[ClaimKind, ...]:
    """A kind for each connector: the claims table is shared by services that serve different ones."""
    leases_s = {KIND_PREFIX + name: lease_s(connector) for name, connector in connectors.items()}
    attempts = Attempts(connectors, context.clock, context.metrics, leases_s)
    return tuple(
        ClaimKind(
            kind,
            attempts.work,
            lease_s=lease,
            concurrency=settings.concurrency,
            held_max=max(settings.concurrency, BATCHES_HELD_MAX * settings.batch_max),
            wait_s=TURN_WAIT_S,
            handler=kind.removeprefix(KIND_PREFIX),
            save=store.save_calls,
        )
        for kind, lease in leases_s.items()
    )


async def _close_at_the_end(http: HttpClient, connectors: Mapping[str, Connector]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        for connector in connectors.values():
            await connector.close()
        await http.close()


async def _expire(context: Context) -> None:
    """Keys and calls are kept as long as the ledger's rows."""
    while True:
        first_kept = (context.clock.now() - timedelta(days=context.settings.audit_days)).date()
        try:
            async with context.pool.acquire() as conn:
                await store.expire(conn, first_kept)
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("connector.expire_waits", error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(EXPIRE_EVERY_S)


SERVICE = Service(
    name=NAME, build=build, migrations=Path(__file__).parent / "migrations", settings=ConnectorSettings
)
