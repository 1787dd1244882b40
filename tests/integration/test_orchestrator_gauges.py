"""Instances that need a person are a figure that alerts can ask for."""

from __future__ import annotations

from pathlib import Path

import factmesh
from factmesh.metrics import Metrics
from factmesh.postgres import Migrations, create_pool, migrate
from factmesh.stack import Stack
from factmesh_orchestrator.gauges import Attention
from factmesh_orchestrator.service import MIGRATIONS


def figures(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    return {n: float(v) for n, v in (line.rsplit(" ", 1) for line in lines if line.startswith("factmesh_attention"))}


async def test_what_needs_a_person_is_counted_and_timed_until_it_is_settled(stack: Stack, namespace: str) -> None:
    """F3, G3: stuck instances are a metric; it falls to zero once nobody is waited for, or the alert would stay."""
    schema = f"{namespace}_orchestrator"
    dsn = await stack.provide_schema(schema)
    library = Path(factmesh.__file__).with_name("migrations")
    await migrate(dsn, schema, [Migrations("factmesh", library), Migrations("orchestrator", MIGRATIONS)])
    pool = await create_pool(dsn, schema=schema, application="test", size_max=2)
    try:
        metrics = Metrics()
        attention = Attention(pool, metrics)
        await attention.look()
        assert figures(metrics) == {}
        for n, age_s in enumerate((60, 4000)):
            await pool.execute(
                "INSERT INTO attention (instance_id, status, workflow, step, reason, since)"
                " VALUES ($1, 'parked', 'w', 's', 'r', now() - make_interval(secs => $2))",
                f"01a20881-1fd9-81aa-a965-0e331fae000{n}",
                float(age_s),
            )
        await attention.look()
        seen = figures(metrics)
        assert seen['factmesh_attention{status="parked",workflow="w"}'] == 2
        assert 4000 <= seen['factmesh_attention_seconds{status="parked",workflow="w"}'] < 4100
        await pool.execute("DELETE FROM attention")
        await attention.look()
        assert set(figures(metrics).values()) == {0.0}
    finally:
        await pool.close()
