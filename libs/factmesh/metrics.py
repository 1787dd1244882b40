"""Every metric name with its meaning, in one table; services count through the values made here and nowhere else.
Label values are bounded: topics, dispositions, classes, kinds — never ids, keys or texts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...] = ()


TABLE: tuple[Metric, ...] = (
    Metric("factmesh_messages_total", "counter", "Messages by what became of them", ("topic", "disposition")),
    Metric("factmesh_repeats_total", "counter", "Deliveries that were there before", ("topic", "verdict")),
    Metric("factmesh_dead_total", "counter", "Messages sent to a DLQ", ("topic", "reason")),
    Metric("factmesh_published_total", "counter", "Messages published and acknowledged", ("topic",)),
    Metric("factmesh_publish_retries_total", "counter", "Publishes that failed and are tried again", ()),
    Metric("factmesh_batch_messages", "sizes", "Messages in one transaction", ("handler",)),
    Metric("factmesh_batch_seconds", "durations", "From decoding to commit of one batch", ("handler",)),
    Metric("factmesh_publish_seconds", "durations", "From commit to all acknowledgements of one batch", ("handler",)),
    Metric("factmesh_batch_retries_total", "counter", "Batches rolled back and tried again", ("handler", "why")),
    Metric("factmesh_consumer_lag", "gauge", "Messages not yet handled, by partition", ("topic", "partition")),
    Metric("factmesh_partitions_halted", "gauge", "Partitions stopped because too much died", ("handler",)),
    Metric("factmesh_claims", "gauge", "Rows that wait, are worked on, or are unknown", ("kind", "state")),
    Metric("factmesh_claims_late_seconds", "gauge", "How long the oldest due row has waited", ("kind",)),
    Metric("factmesh_settled_total", "counter", "Attempts by how they were settled", ("kind", "state")),
    Metric("factmesh_settle_refused_total", "counter", "Settlements refused because the lease was lost", ("kind",)),
    Metric("factmesh_work_seconds", "durations", "One attempt's work outside", ("kind",)),
    Metric("factmesh_calls_total", "counter", "Outgoing calls by result class", ("dependency", "operation", "result")),
    Metric("factmesh_call_seconds", "durations", "Outgoing calls", ("dependency", "operation")),
    Metric("factmesh_http_requests_total", "counter", "Requests to our HTTP entrances", ("route", "status")),
    Metric("factmesh_http_seconds", "durations", "Our HTTP entrances", ("route",)),
    Metric("factmesh_facts_total", "counter", "Facts at the entrances by the answer given", ("entrance", "answer")),
    Metric("factmesh_attention", "gauge", "Instances that need a person", ("workflow", "status")),
    Metric("factmesh_attention_seconds", "gauge", "How long the oldest of them has waited", ("workflow", "status")),
    Metric("factmesh_notifications_total", "counter", "Notifications by channel and result", ("channel", "result")),
    Metric("factmesh_quarantine_records", "gauge", "Quarantined messages by state", ("state",)),
    Metric("factmesh_quarantine_acts_due", "gauge", "Acts of people that are stored and not published yet", ()),
    Metric("factmesh_replay_success_ratio", "gauge", "Replays of the last 30 days that did not fail again, of all", ()),
    Metric("factmesh_recovery_mean_seconds", "gauge", "From first failure to the act that healed, last 30 days", ()),
    Metric("factmesh_up", "gauge", "1 while the service is ready", ("service",)),
)


class Metrics:
    """One process's metrics. `counter("factmesh_messages_total").labels(...)` as in prometheus_client."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        # The vendor's look-up of a child takes a lock and makes its key anew: most of what counting cost a message.
        self._children: dict[tuple[str, tuple[str, ...]], Counter | Gauge | Histogram] = {}
        for m in TABLE:
            if m.kind == "counter":
                self._made[m.name] = Counter(m.name, m.meaning, m.labels, registry=self.registry)
            elif m.kind == "gauge":
                self._made[m.name] = Gauge(m.name, m.meaning, m.labels, registry=self.registry)
            else:
                buckets = SIZE_BUCKETS if m.kind == "sizes" else DURATION_BUCKETS_S
                self._made[m.name] = Histogram(m.name, m.meaning, m.labels, registry=self.registry, buckets=buckets)

    def _child(self, name: str, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        found = self._children.get((name, labels))
        if found is None:
            metric = self._made[name]
            found = self._children[name, labels] = metric.labels(*labels) if labels else metric
        return found

    def inc(self, name: str, *labels: str, by: float = 1) -> None:
        """Count. Raises KeyError for a name that the table does not hold."""
        metric = self._child(name, labels)
        assert isinstance(metric, Counter)
        metric.inc(by)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        metric = self._child(name, labels)
        assert isinstance(metric, Gauge)
        metric.set(value)

    def forget(self, name: str, *labels: str) -> None:
        """Tell a gauge's value for these labels no longer: it is another process's to tell."""
        with contextlib.suppress(KeyError):
            self._made[name].remove(*labels)
        self._children.pop((name, labels), None)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Observe a size or a duration in seconds."""
        metric = self._child(name, labels)
        assert isinstance(metric, Histogram)
        metric.observe(value)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
