"""The notifier service as one value: two handlers, and a claim kind for each channel of the project.
Wiring only; what follows an attempt is in `follow`, how it is made in `send` and `transports`.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from pydantic import Field

from factmesh.batch import Handler
from factmesh.claim_loop import ClaimKind
from factmesh.http_client import HttpClient
from factmesh.message import Message
from factmesh.postgres import is_transient
from factmesh.project import Project
from factmesh.service import Context, Parts, Service
from factmesh.settings import Settings
from factmesh.templates import Templates
from factmesh_notifier import channels, store
from factmesh_notifier.decide import SERVICE as NAME
from factmesh_notifier.decide import STATUS, decide, decide_status, object_key, watched_key
from factmesh_notifier.model import Catalogue, State, Watched
from factmesh_notifier.send import Sends, lease_s

EXPIRE_EVERY_S = 86_400.0
log = structlog.get_logger("factmesh.notifier")


class NotifierSettings(Settings):
    """What the notifier is told besides the common settings."""

    concurrency: int = Field(default=16, ge=1, le=1000, description="attempts at once, for each channel of a replica")


async def build(context: Context) -> Parts:
    """Wire what the project declares. Raises DefinitionError or SecretError where that cannot serve."""
    settings = context.settings
    assert isinstance(settings, NotifierSettings)
    http = HttpClient(connections_max=2 * settings.concurrency)
    try:
        wired = channels.load(settings.project, http=http, clock=context.clock)
        templates = Templates(Project.load(settings.project).template_files if settings.project is not None else {})
        channels.check_templates(wired.rules, templates.names)
    except BaseException:
        await http.close()
        raise
    catalogue = Catalogue(wired.channels, templates.render, wired.rules)
    log.info("notifier.serves", channels=sorted(wired.channels), templates=sorted(templates.names))
    sends = Sends(wired.channels, wired.transports, context.clock, context.metrics)
    return Parts(
        handlers=_handlers(context, catalogue),
        claims=tuple(
            ClaimKind(c.claim_kind, sends.work, lease_s(c), concurrency=settings.concurrency, save=store.save_sends)
            for c in wired.channels.values()
        ),
        background=(partial(_close_at_the_end, http), partial(_expire, context)),
    )


def _handlers(context: Context, catalogue: Catalogue) -> tuple[Handler[Any], ...]:
    """Statuses are read only where a rule wants them: they are the topic with the most messages."""
    commands: Handler[State] = Handler(
        topics=lambda: (context.topic("command.notifier"),),
        decode=context.records.expect({"command", "resolution"}),
        schema_id=context.records.needs_schema,
        load=store.load,
        key=object_key,
        decide=partial(decide, catalogue),
        save=store.save,
        initial=_nothing,
    )
    if not catalogue.rules:
        return (commands,)
    key = partial(watched_key, catalogue)
    statuses: Handler[Watched] = Handler(
        name=STATUS,
        topics=lambda: (context.topic("status"),),
        decode=context.records.expect({"status"}),
        schema_id=context.records.needs_schema,
        load=partial(store.load_watched, key),
        key=key,
        decide=partial(decide_status, catalogue, f"{context.group}-{STATUS}"),
        save=store.save_watched,
        initial=_unseen,
    )
    return commands, statuses


def _nothing(_message: Message) -> State:
    return State()


def _unseen(_message: Message) -> Watched:
    return Watched()


async def _close_at_the_end(http: HttpClient) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await http.close()


async def _expire(context: Context) -> None:
    """The log of attempts is kept as long as the ledger's rows."""
    while True:
        first_kept = (context.clock.now() - timedelta(days=context.settings.audit_days)).date()
        try:
            async with context.pool.acquire() as conn:
                await store.expire(conn, first_kept)
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("notifier.expire_waits", error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(EXPIRE_EVERY_S)


SERVICE = Service(name=NAME, build=build, migrations=Path(__file__).parent / "migrations", settings=NotifierSettings)
