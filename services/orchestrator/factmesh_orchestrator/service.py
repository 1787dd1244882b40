"""The orchestrator's wiring: what it consumes, its timers, and how it hears of deployed definitions.
No decision and no SQL lives here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

import structlog
from pydantic import Field

from factmesh.batch import Handler
from factmesh.errors import DefinitionError, FactmeshError
from factmesh.expressions import default_expressions
from factmesh.postgres import is_transient, listen
from factmesh.project import Project
from factmesh.service import Context, Parts, Service
from factmesh.settings import Settings
from factmesh.workflow import CallStep
from factmesh.workflow.linter import errors_of
from factmesh_orchestrator import store as tables
from factmesh_orchestrator.decide import State, decide_with
from factmesh_orchestrator.definitions import Deployed
from factmesh_orchestrator.gauges import Attention
from factmesh_orchestrator.store import Store
from factmesh_orchestrator.timers import TIMERS, Ageing

log = structlog.get_logger("factmesh.orchestrator")

MIGRATIONS = Path(__file__).with_name("migrations")
LOOK_EVERY_S = 5.0
"""How late a replica hears of a deployment whose hint was lost."""


class OrchestratorSettings(Settings):
    """What only the orchestrator asks for."""

    deploy_on_start: bool = Field(default=False, description="deploy the project's workflows that are not there yet")
    kept_horizon_s: float = Field(
        default=14 * 86400.0, gt=0, description="how long a fact that nobody awaits is kept before it is stale"
    )


async def build(context: Context) -> Parts:
    """The parts of the running service."""
    store = Store(default_expressions())
    settings = context.settings
    assert isinstance(settings, OrchestratorSettings)
    if settings.deploy_on_start and settings.project is not None:
        await deploy_missing(context, Project.load(settings.project))
    watch = Watch(context, store)
    await watch.look()
    handler: Handler[State] = Handler(
        topics=lambda: (context.topic("fact"), context.topic("result"), context.topic("signal")),
        decode=context.records.expect(("fact", "result", "signal")),
        load=store.load,
        key=tables.key,
        decide=functools.partial(decide_with, kept_horizon_s=settings.kept_horizon_s),
        save=store.save,
        initial=store.initial,
        schema_id=context.records.needs_schema,
    )
    background = (watch.run, Ageing(context, store).run, Attention(context.pool, context.metrics).run)
    return Parts(handlers=(handler,), claims=(TIMERS,), background=background)


async def deploy_missing(context: Context, project: Project) -> None:
    """For development: deploy what the project has and this mesh has not. Raises DefinitionError where lint refuses."""
    findings = errors_of(project.lint(default_expressions(), plugins=offered_plugins()))
    if findings:
        raise DefinitionError(
            f"the project's workflows break {len(findings)} rule(s); the first: {findings[0]}",
            where=str(project.root),
            hint="run `factmesh workflow lint`",
        )
    async with context.pool.acquire() as conn:
        for (name, major), text in texts_of(project).items():
            act = await tables.deploy(
                conn,
                context.schema,
                text,
                project.policies,
                by="service:orchestrator",
                commit="development",
                if_absent=True,
            )
            log.info("workflow.deployed", workflow=name, major=major, act=act)


def offered_plugins() -> set[str]:
    """Connectors written in Python that are installed here: a workflow may call them without any YAML."""
    return {entry.name for entry in entry_points(group="factmesh.connectors")}


def texts_of(project: Project) -> dict[tuple[str, int], str]:
    """The text of each definition as it lies in the project's folder, lower versions first."""
    documents = sorted(project.workflow_documents.items())
    return {key: Path(document.file).read_text(encoding="utf-8") for key, document in documents}


def connectors_of(deployed: Iterable[Deployed]) -> set[str]:
    """The connectors whose command topics these workflows write to; the notifier's is always there."""
    steps = (step for d in deployed for step in d.compiled.workflow.steps)
    return {step.connector for step in steps if isinstance(step, CallStep)} - {"notifier"}


class Watch:
    """Keeps the store's current definitions as they are deployed: hints first, and a look every few seconds."""

    def __init__(self, context: Context, store: Store) -> None:
        self._context, self._store = context, store
        self._connectors: set[str] = set()

    async def look(self) -> None:
        """Take up what is current now; the topics that it writes to are there before it takes effect."""
        current = await self._store.read_current(self._context.pool)
        missing = connectors_of(current) - self._connectors
        if missing:
            await self._context.ensure_topics(sorted(f"command.{name}" for name in missing))
            self._connectors |= missing
        known = {(d.name, d.version) for ds in self._store.definitions.by_fact.values() for d in ds}
        for d in current:
            if (d.name, d.version) not in known:
                log.info("workflow.current", workflow=d.name, version=d.version, definition=d.content_hash[:16])
        self._store.use(current)

    async def run(self) -> None:
        """For ever."""
        context = self._context
        async with listen(context.dsn, tables.channel(context.schema)) as hints:
            while True:
                await hints.wait(LOOK_EVERY_S)
                try:
                    await self.look()
                except FactmeshError as error:
                    # One that this release cannot use must not stop those that it runs; a fresh start does refuse it.
                    log.error("definitions.unusable", error=str(error), message="the versions before stay in force")
                except Exception as error:
                    if not is_transient(error):
                        raise
                    log.warning("definitions.waiting", error=f"{type(error).__name__}: {error}")


SERVICE = Service(name="orchestrator", build=build, migrations=MIGRATIONS, settings=OrchestratorSettings)
