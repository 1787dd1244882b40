"""Redrive: what the ledgers emitted can be published again after Kafka lost data, and receivers drop what they have."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from tests.support import toy
from tests.support.waiting import until

from factmesh import kafka
from factmesh.errors import SettingsError
from factmesh.service import open_service
from factmesh.stack import Stack
from factmesh_cli import redrive

pytestmark = pytest.mark.stack


async def test_emissions_and_outcomes_are_published_again_byte_for_byte(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 3: the same bytes go out again, a dry run publishes nothing, and the receiver's counts stay (INV-X)."""
    monkeypatch.setattr(redrive, "SERVICES", ("toy",))
    settings = await toy.settings(stack, namespace)
    given = {
        "FACTMESH_KAFKA_BOOTSTRAP": stack.bootstrap,
        "FACTMESH_NAMESPACE": namespace,
        "FACTMESH_TOY_DSN": settings.postgres_dsn.get_secret_value(),
        "FACTMESH_POSTGRES_DSN": settings.postgres_dsn.get_secret_value(),
    }
    since = datetime.now(UTC) - timedelta(minutes=1)
    async with open_service(toy.service(), settings) as running:
        context = running.context
        topics = [context.topic("status"), context.topic("signal")]
        work = [toy.asking(running, "result", "o", do=do) for do in ("count", "count", "work")]
        await context.publisher.publish(work)

        async def emitted() -> bool:
            return len(await kafka.read_all(stack.bootstrap, topics)) == 3

        await until("two statuses and one outcome", emitted)
        assert await redrive._run(given, since, None, None, 1000.0, True) == 0
        assert await emitted()
        assert await redrive._run(given, since, None, None, 1000.0, False) == 0
        found = [(d.topic, d.key, d.value) for d in await kafka.read_all(stack.bootstrap, topics)]
        assert len(found) == 6
        assert len(set(found)) == 3
        # Their own results sent again: the receiver drops what it has.
        await context.publisher.publish(work)
        assert await toy.counts(running) == {"o": 3}


async def test_a_ledger_that_the_role_does_not_see_is_named(
    stack: Stack, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4: least privilege shows as an answer that says which address to give, not as a stack trace."""
    monkeypatch.setattr(redrive, "SERVICES", ("toy",))
    dsn = await stack.provide_schema(f"{namespace}_other")
    given = {
        "FACTMESH_KAFKA_BOOTSTRAP": stack.bootstrap,
        "FACTMESH_NAMESPACE": namespace,
        "FACTMESH_POSTGRES_DSN": dsn,
    }
    with pytest.raises(SettingsError, match="FACTMESH_TOY_DSN"):
        await redrive._run(given, datetime.now(UTC), None, None, 1000.0, True)
