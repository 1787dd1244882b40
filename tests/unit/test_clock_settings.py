"""The clock and the settings: what time a component is told, and what an operator is told about a wrong variable."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from factmesh.clock import ManualClock, SystemClock
from factmesh.errors import SettingsError
from factmesh.settings import Settings, load

START = datetime(2026, 1, 1, tzinfo=UTC)


async def test_a_manual_clock_wakes_sleepers_in_order_and_not_early() -> None:
    """DESIGN 4: the clock is injected; time passes when it is told to, and each sleeper sees its own due time."""
    clock, woken = ManualClock(START), []  # type: ManualClock, list[str]

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(name)

    tasks = [asyncio.create_task(sleeper("late", 20)), asyncio.create_task(sleeper("soon", 5))]
    await asyncio.sleep(0)
    clock.advance(4.9)
    await asyncio.sleep(0)
    assert woken == []
    clock.advance(100)
    await asyncio.gather(*tasks)
    assert woken == ["soon", "late"]
    assert clock.now() == START + timedelta(seconds=104.9)
    with pytest.raises(ValueError, match="cannot move a clock back"):
        clock.advance(-1)


def test_clocks_are_aware() -> None:
    """A3: no naive timestamp enters by our own clock."""
    assert SystemClock().now().tzinfo is UTC
    with pytest.raises(ValueError, match="no time zone"):
        ManualClock(datetime(2026, 1, 1))  # noqa: DTZ001  the mistake under test


GIVEN = {"FACTMESH_KAFKA_BOOTSTRAP": "k:9092", "FACTMESH_POSTGRES_DSN": "postgresql://a:secret@h/d"}


def test_missing_settings_are_all_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 6, bad input: a service that cannot start names every variable that is missing or wrong, and no value."""
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FACTMESH_BATCH_MAX", "0")
    with pytest.raises(SettingsError) as caught:
        load(Settings)
    text = str(caught.value)
    for name in (*GIVEN, "FACTMESH_BATCH_MAX"):
        assert name in text


def test_retention_clocks_are_checked_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 8: ids must outlive what can be emitted again; a horizon as long as the audit period is refused."""
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="dedup_horizon_days must be shorter than audit_days"):
        load(Settings, dedup_horizon_days=400)


def test_a_namespace_prefixes_topics_and_schemas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Issue 6.2: several meshes live on one stack without meeting; F5: the address's password is not printed."""
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    settings = load(Settings, namespace="t1", project=tmp_path)
    assert (settings.topic_prefix, settings.schema_name("intake")) == ("t1.", "t1_intake")
    assert load(Settings).schema_name("intake") == "intake"
    assert "secret" not in repr(settings)
    with pytest.raises(SettingsError, match="FACTMESH_NAMESPACE: .*must be empty or match"):
        load(Settings, namespace="Has.Dots")
