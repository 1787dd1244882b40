"""The trace goes on over every hop, sampled or not; a torn context is none; spans hold no payload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import telemetry
from factmesh.telemetry import Hop, format_traceparent, messaging, new_traceparent, parse_traceparent

TRACE, SPAN = "a" * 32, "b" * 16


@pytest.fixture
def trace_file(tmp_path: Path) -> Iterator[Path]:
    before = telemetry._tracer, telemetry._provider
    telemetry.setup_tracing("svc", version="1", sample_ratio=1.0, trace_file=tmp_path / "spans.jsonl")
    yield tmp_path / "spans.jsonl"
    telemetry._tracer, telemetry._provider = before


def test_a_hop_is_a_child_of_the_context_that_came_in(trace_file: Path) -> None:
    """F2: one tree: the same trace id, the sender's span as parent, the own span handed on."""
    with Hop("process t", f"00-{TRACE}-{SPAN}-01", "consumer", messaging("t", "process", 1, 2)) as hop:
        handed_on = parse_traceparent(hop.traceparent)
        hop.note(**{"factmesh.disposition": "done", "absent": None})
    telemetry.flush()
    (span,) = [json.loads(line) for line in trace_file.read_text().splitlines()]
    assert (span["trace_id"], span["parent_id"], span["service"]) == (TRACE, SPAN, "svc")
    assert handed_on is not None
    assert f"{handed_on.span_id:016x}" == span["span_id"]
    assert span["attributes"]["messaging.destination.name"] == "t"
    assert span["attributes"]["messaging.kafka.offset"] == 2
    assert "absent" not in span["attributes"]


def test_a_failure_is_told_by_its_type_only(trace_file: Path) -> None:
    """F5: the text of an exception may quote the payload; it never reaches a span."""
    with pytest.raises(ValueError), Hop("process t", None):
        raise ValueError("card 4111 1111")
    telemetry.flush()
    text = trace_file.read_text()
    assert "4111" not in text
    assert json.loads(text)["attributes"]["error.type"] == "ValueError"
    assert json.loads(text)["status"] == "error"


def test_what_is_not_sampled_makes_no_span_and_hands_its_context_on(trace_file: Path) -> None:
    """DESIGN 13.2: a flag check; the decision of the trace's root holds on every hop."""
    context = f"00-{TRACE}-{SPAN}-00"
    with Hop("process t", context) as hop:
        assert hop.traceparent == context
    telemetry.flush()
    assert not trace_file.exists() or trace_file.read_text() == ""


def test_a_trace_that_begins_here_is_sampled_at_its_ratio(trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F2, DESIGN 13.2: drawn once, before the vendor makes a span; what is not drawn has a context that says so."""
    monkeypatch.setattr(telemetry, "_sample_ratio", 0.25)
    hops = [Hop("process t", None) for _ in range(800)]
    told = [parse_traceparent(hop.traceparent) for hop in hops]
    assert len({context.trace_id for context in told if context is not None}) == 800
    assert [context.trace_flags.sampled for context in told if context is not None] == [h.recording for h in hops]
    assert 100 < sum(hop.recording for hop in hops) < 300
    begun = [telemetry.carried(None) for _ in range(800)]
    assert 100 < sum(sampled for _, sampled in begun) < 300
    for context, sampled in begun:
        parsed = parse_traceparent(context)
        assert (parsed is None) == sampled
        assert parsed is None or not parsed.trace_flags.sampled
    monkeypatch.setattr(telemetry, "_sample_ratio", 0.0)
    assert Hop("process t", None, drawn=True).recording


@pytest.mark.parametrize(
    "torn",
    [
        None,
        "",
        "00-x",
        f"01-{TRACE}-{SPAN}-01x",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
    ],
)
def test_a_torn_context_is_none(torn: str | None) -> None:
    """W3C: an invalid traceparent is ignored, never handed on."""
    assert parse_traceparent(torn) is None
    assert Hop("x", torn).traceparent is None or telemetry._tracer is not None


@given(st.text(max_size=60))
def test_no_header_raises(text: str) -> None:
    """A stranger may write any header."""
    parse_traceparent(text)


@given(st.booleans())
def test_a_fresh_context_is_whole(sampled: bool) -> None:
    """An entrance whose caller sent none begins a trace."""
    text = new_traceparent(sampled)
    context = parse_traceparent(text)
    assert context is not None
    assert bool(context.trace_flags.sampled) == sampled
    assert format_traceparent(context) == text
