"""Metrics: one table, bounded labels, and a name that it does not hold is an error, not a new metric."""

from __future__ import annotations

import re

import pytest

from factmesh.metrics import TABLE, Metrics

BOUNDED = {
    "topic", "disposition", "verdict", "reason", "handler", "why", "partition", "kind", "state", "dependency",
    "operation", "result", "route", "status", "entrance", "answer", "workflow", "channel", "service",
}  # fmt: skip


def test_the_table_is_legal_and_its_labels_are_bounded() -> None:
    """F5, F3: Prometheus names, a meaning each, and no label that could hold an id, a key or a text."""
    names = [m.name for m in TABLE]
    assert len(set(names)) == len(names)
    for metric in TABLE:
        assert re.fullmatch(r"factmesh_[a-z_]+", metric.name)
        assert metric.meaning
        assert set(metric.labels) <= BOUNDED, metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_each_metric_of_the_table_is_rendered_with_its_value() -> None:
    """F2: what is counted is what `/metrics` shows."""
    metrics = Metrics()
    for metric in TABLE:
        labels = ["x"] * len(metric.labels)
        if metric.kind == "counter":
            metrics.inc(metric.name, *labels, by=3)
        elif metric.kind == "gauge":
            metrics.set(metric.name, 3, *labels)
        else:
            metrics.observe(metric.name, 3, *labels)
    text = metrics.render().decode()
    for metric in TABLE:
        suffix = "_sum" if metric.kind in ("sizes", "durations") else ""
        assert re.search(rf"^{metric.name}{suffix}(\{{[^}}]*\}})? 3\.0$", text, re.MULTILINE), metric.name


def test_a_name_that_the_table_does_not_hold_raises() -> None:
    """A typing error never becomes a silent second metric."""
    with pytest.raises(KeyError):
        Metrics().inc("factmesh_mesages_total")
    with pytest.raises(ValueError):
        Metrics().inc("factmesh_messages_total", "only-one-label")


def test_two_processes_in_one_do_not_share_a_registry() -> None:
    """`factmesh up` and tests run several services in one process."""
    one, other = Metrics(), Metrics()
    one.inc("factmesh_publish_retries_total")
    assert b"factmesh_publish_retries_total 0.0" in other.render()


def test_a_forgotten_gauge_is_told_again_when_it_is_set_again() -> None:
    """F3: children are kept at hand; one that was forgotten must not be counted on where nobody reads it."""
    metrics = Metrics()
    metrics.set("factmesh_consumer_lag", 3, "t", "0")
    metrics.forget("factmesh_consumer_lag", "t", "0")
    assert b"factmesh_consumer_lag{" not in metrics.render()
    metrics.set("factmesh_consumer_lag", 5, "t", "0")
    assert b'factmesh_consumer_lag{partition="0",topic="t"} 5.0' in metrics.render()
