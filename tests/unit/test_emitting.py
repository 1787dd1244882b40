"""What a decision publishes becomes the same bytes each time, complete, and small enough for its topic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from factmesh import ids, topics
from factmesh.effects import Publish
from factmesh.emitting import Cause, Emitter
from factmesh.errors import ValidationError

NOW = datetime(2026, 1, 2, tzinfo=UTC)
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
RECORD = {
    "correlation_id": "c",
    "actor": "anna",
    "business_object_type": "thing",
    "business_object_id": "o1",
    "instance_id": str(ids.entrance_id("i", "1", 5)),
    "instance_seq": 7,
}


def encode(_record: str, body: Mapping[str, Any]) -> bytes:
    return ids.canonical_json({k: v.decode() if isinstance(v, bytes) else v for k, v in body.items()})


EMITTER = Emitter("svc", "n.", encode)


def cause(root: str = "id:x", opening: int = 0, trace: str | None = TRACE) -> Cause:
    return Cause(root, opening, 1_700_000_000_000, "id:x", RECORD, trace)


def publish(record: str = "signal", key: str = "k", **body: Any) -> Publish:
    return Publish("signal" if record != "status" else "status", record, key, body)


def test_the_same_cause_emits_the_same_bytes() -> None:
    """DESIGN 1.2: and each of opening, ordinal and root gives another id, so that no receiver drops the other."""
    one = EMITTER.emit(publish(), cause(), 0, NOW)
    assert one == EMITTER.emit(publish(), cause(), 0, NOW)
    others = [
        EMITTER.emit(publish(), cause(), 1, NOW),
        EMITTER.emit(publish(), cause(opening=1), 0, NOW),
        EMITTER.emit(publish(), cause(root="id:y"), 0, NOW),
    ]
    assert len({json.loads(e.value or b"")["ce_id"] for e in [one, *others]}) == 4


def test_the_envelope_is_completed_from_the_cause_and_the_body_wins() -> None:
    """DESIGN 7: each message about an instance carries its object, seq, correlation, cause and trace."""
    emission = EMITTER.emit(publish(actor="policy"), cause(), 0, NOW)
    body = json.loads(emission.value or b"")
    assert body == body | {
        **RECORD,
        "actor": "policy",
        "traceparent": TRACE,
        "cause_id": "x",
        "ce_source": "/factmesh/svc",
    }
    assert ids.instant_ms_of(UUID(body["ce_id"])) == 1_700_000_000_000
    assert (emission.topic, emission.key) == ("n.factmesh.signal.v1", b"k")
    assert emission.headers == (("traceparent", TRACE.encode()),)
    assert EMITTER.emit(publish(), cause(trace=None), 0, NOW).headers == ()


def test_only_what_others_read_carries_the_cloudevent_headers() -> None:
    """DESIGN 7, 13.1: ten headers a message cost nearly half of the throughput; status pays, for its readers."""
    names = [name for name, _ in EMITTER.emit(publish("status"), cause(), 0, NOW).headers]
    assert {"ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject", "content-type"} <= set(names)


@pytest.mark.parametrize(
    "too_large",
    [
        publish(body="x" * topics.VALUE_BYTES_MAX),
        publish(key="k" * topics.VALUE_BYTES_MAX),
        publish("status", business_object_id="x" * (topics.VALUE_BYTES_MAX // 2)),
    ],
)
def test_what_does_not_fit_its_topic_fails_before_the_commit(too_large: Publish) -> None:
    """⚑ DESIGN 3: by value, key or headers, it kills its message; published, it would block the partition for ever."""
    with pytest.raises(ValidationError, match="weighs") as caught:
        EMITTER.emit(too_large, cause(), 0, NOW)
    assert "pass a reference" in str(caught.value)
