"""What a quarantined message looks like and how it comes back: the pure half of DESIGN section 9.
Only values here; the index and the tool have their own tests on real parts.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import dlq
from factmesh.errors import BusinessError, DecodeError, ErrorClass, Reason, ValidationError
from factmesh.message import H_GROUP, H_OPENING, H_ROOT_ID, Delivery, Headers

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
NAMES = TEXT.filter(lambda n: not dlq.is_added(n) and n not in (H_ROOT_ID, H_OPENING, H_GROUP))
BYTES = st.none() | st.binary(max_size=60)
HEADERS = st.lists(st.tuples(NAMES, BYTES), max_size=5).map(tuple)
OPTIONAL = st.none() | TEXT.map(dlq.clean).filter(bool)
INSTANTS = st.datetimes(timezones=st.just(UTC)).filter(lambda d: 1970 < d.year < 2400)


def delivery(**changes: object) -> Delivery:
    base = Delivery("factmesh.fact.v1", 2, 17, b"k", b"\x00\x01v", (("a", b"\xff"), ("a", None), ("b", b"")), 1_700)
    return replace(base, **changes)  # type: ignore[arg-type]


def letter(**changes: object) -> dlq.DeadLetter:
    base = dlq.DeadLetter(
        original=delivery(),
        root="id:018f0000-0000-8000-8000-000000000001",
        opening=0,
        group="factmesh-orchestrator",
        reason=Reason.VALIDATION,
        error_class=ErrorClass.VALIDATION,
        stage="orchestrator/facts",
        exception_type="ValidationError",
        message="no field 'x'",
        first_failed_at=T0,
        failed_at=T0 + timedelta(seconds=3),
        service_version="0.1.0",
        fingerprint="00ff00ff00ff00ff",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


LETTERS = st.builds(
    dlq.DeadLetter,
    original=st.builds(
        Delivery,
        topic=st.from_regex(r"[a-z][a-z.]{0,20}", fullmatch=True),
        partition=st.integers(0, 100),
        offset=st.integers(0, 2**62),
        key=BYTES,
        value=BYTES,
        headers=HEADERS,
        timestamp_ms=st.integers(-1, 2**52),
    ),
    root=TEXT,
    opening=st.integers(0, 9),
    group=TEXT.map(dlq.clean),
    reason=st.sampled_from(Reason),
    error_class=st.sampled_from(ErrorClass),
    stage=TEXT.map(dlq.clean),
    exception_type=TEXT.map(dlq.clean),
    message=TEXT.map(dlq.clean),
    first_failed_at=INSTANTS,
    failed_at=INSTANTS,
    service_version=TEXT.map(dlq.clean),
    fingerprint=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
    attempts=st.integers(1, 99),
    step=OPTIONAL,
    instance_id=st.none() | st.uuids(),
    correlation_id=OPTIONAL,
    trace_id=OPTIONAL,
    command_id=st.none() | st.uuids(),
    business_object_type=OPTIONAL,
    business_object_id=OPTIONAL,
    stack=OPTIONAL,
)


def on_dlq(dead: dlq.DeadLetter, service: str = "orchestrator") -> Delivery:
    e = dlq.record(dead, service)
    return Delivery(e.topic, 0, 5, e.key, e.value, e.headers, 9_999)


@given(LETTERS)
def test_round_trip(dead: dlq.DeadLetter) -> None:
    """E1: everything that was said of a death, and its bytes, is read back from its record."""
    found = dlq.parse(on_dlq(dead))
    assert found == dlq.DeadRecord(dlq.dlq_id("orchestrator", dead), "orchestrator", dead)


@given(LETTERS, st.integers(1, 50))
def test_restored_byte_for_byte(dead: dlq.DeadLetter, opening: int) -> None:
    """E2: a replay has the original key, value and headers exactly, and three headers that authorise it."""
    restored = dlq.restore(dlq.parse(on_dlq(dead)).dead, opening)
    o = dead.original
    assert (restored.topic, restored.key, restored.value) == (o.topic, o.key, o.value)
    assert restored.headers[: len(o.headers)] == o.headers
    assert restored.headers[len(o.headers) :] == (
        (H_ROOT_ID, dead.root.encode()),
        (H_OPENING, str(opening).encode()),
        (H_GROUP, dead.group.encode()),
    )


@given(LETTERS, st.integers(1, 6))
def test_headers_never_grow(dead: dlq.DeadLetter, times: int) -> None:
    """DESIGN 9: a repeated failure replaces the diagnosis, so a message that dies often keeps its size."""
    first = len(dlq.record(dead, "orchestrator").headers)
    for n in range(1, times + 1):
        e = dlq.restore(dead, n)
        dead = replace(dead, opening=n, original=Delivery(e.topic, 0, n, e.key, e.value, e.headers, 1))
        record = dlq.record(dead, "orchestrator")
        assert len(record.headers) == first
        # A copy that somebody moved back by hand still carries our headers: they are replaced as well.
        dead = replace(dead, original=replace(dead.original, headers=record.headers))
        assert len(dlq.record(dead, "orchestrator").headers) == first


def test_the_listed_headers_are_there() -> None:
    """E1: the headers that DESIGN section 9 lists, by name, so that consoles and other tools find them."""
    dead = letter(
        step="charge", instance_id=UUID(int=1), correlation_id="c", trace_id="t", command_id=UUID(int=2), opening=2
    )
    got = {k: (v or b"").decode("utf-8", "replace") for k, v in dlq.record(dead, "orchestrator").headers}
    kafka = ("topic", "partition", "offset", "group", "delivery.count", "message")
    ours = set(
        re.findall(
            r"[\w-]+",
            "id reason error-class stage step exception-type fingerprint first-failed-at failed-at attempts"
            " original-timestamp-ms service-version instance-id correlation-id trace-id replay-count"
            " root-id opening command-id",
        )
    )
    assert {f"__dlq.errors.{n}" for n in kafka} | {f"factmesh-dlq-{n}" for n in ours} <= set(got)
    assert got["kafka_dlt-original-topic"] == got["__dlq.errors.topic"] == "factmesh.fact.v1"
    assert (got["__dlq.errors.partition"], got["__dlq.errors.offset"], got["factmesh-dlq-opening"]) == ("2", "17", "2")
    assert dlq.record(dead, "orchestrator").topic == "dlq.factmesh.fact.v1"


def test_one_id_for_each_death() -> None:
    """DESIGN 9: a redelivery has the same id; another opening, another group and a conflicting twin have their own."""
    one = letter()
    again = replace(one, failed_at=T0 + timedelta(hours=1), original=delivery(offset=18))
    assert dlq.dlq_id("s", one) == dlq.dlq_id("s", again)
    twin = replace(one, reason=Reason.CONFLICT)
    other_twin = replace(twin, original=delivery(offset=18))
    different = [one, replace(one, opening=1), replace(one, group="g"), replace(one, root="id:x"), twin, other_twin]
    assert len({dlq.dlq_id("s", d) for d in different}) == len(different)


def test_foreign_record_is_named() -> None:
    """INV-D: what something else wrote to a DLQ is refused with what is missing, never half understood."""
    with pytest.raises(DecodeError, match=r"dlq\.x\[0\]@5: no header __dlq\.errors\.topic .*something else writes"):
        dlq.parse(Delivery("dlq.x", 0, 5, None, b"", ()))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("factmesh-dlq-attempts", b"many", "header factmesh-dlq-attempts says 'many'"),
        ("factmesh-dlq-failed-at", b"2026-01-01T00:00:00", "factmesh-dlq-failed-at"),
        ("factmesh-dlq-id", b"7", "factmesh-dlq-id"),
        ("factmesh-dlq-reason", b"mood", "'mood' is not a valid Reason"),
        ("__dlq.errors.topic", b"other", "it lies on a wrong DLQ"),
    ],
)
def test_torn_record_is_named(name: str, value: bytes, says: str) -> None:
    """INV-D: a record that was altered is refused with the header that is wrong."""
    good = on_dlq(letter())
    headers: Headers = tuple((k, value if k == name else v) for k, v in good.headers)
    with pytest.raises(DecodeError, match=says):
        dlq.parse(replace(good, headers=headers))


def test_fingerprint_groups_one_cause() -> None:
    """E2: ids, numbers, instants and quoted values do not tell causes apart; text, step and stage do."""

    def of(message: str, step: str | None = "charge", stage: str = "c/x") -> str:
        return dlq.fingerprint_of("ValidationError", message, Reason.VALIDATION, stage, step)

    one = of("order 'A-17' of 018f0000-0000-8000-8000-000000000001 has 3 items at 2026-01-01T00:00:00Z")
    assert one == of("order 'B' of 018f0000-0000-8000-8000-0000000000ff has 12 items at 2027-02-03T04:05:06Z")
    assert (
        len({one, of("order has no items"), of("order has no items", "refund"), of("order has no items", stage="y")})
        == 4
    )


def test_a_bug_tells_where_and_not_what() -> None:
    """F5: the text of a foreign exception may quote the payload, so only its type and its path are kept."""
    try:
        {}["secret@example.org"]
    except KeyError as error:
        dead = dlq.dead_letter(
            delivery(headers=(("traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),)),
            error,
            root="at:t:0:1",
            opening=0,
            group="g",
            stage="s/h",
            first_failed_at=T0,
            failed_at=T0,
            service_version="1",
            record={"instance_id": str(UUID(int=7)), "correlation_id": "c", "body": b"x", "step": "charge"},
        )
    assert (dead.reason, dead.error_class, dead.trace_id) == (Reason.BUG, ErrorClass.BUG, "a" * 32)
    assert (dead.instance_id, dead.correlation_id, dead.step) == (UUID(int=7), "c", "charge")
    assert "secret" not in dead.message + str(dead.stack)
    assert "test_dlq.py" in str(dead.stack)


def test_our_errors_keep_their_words() -> None:
    """HOUSE_STYLE 5: what happened, to which message, what to do next reaches the operator, cut to its bound."""
    name, message, stack = dlq.describe(BusinessError("no cover", where="order 7", hint="ask sales"))
    assert (name, message, stack) == ("BusinessError", "order 7: no cover (ask sales)", None)
    _, long, _ = dlq.describe(ValidationError("x\x00" * 5000))
    assert len(long) == dlq.MESSAGE_CHARS_MAX and "\x00" not in long


def test_correction_replaces_only_what_it_says() -> None:
    """E2: a corrected opening has the new bytes under the same root, and the record's own bytes stay as they were."""
    dead = letter()
    fixed = dlq.restore(dead, 3, dlq.Correction(value=b"better", headers=(("a", b"1"), (H_OPENING, b"9"))))
    assert (fixed.key, fixed.value, fixed.headers[0]) == (b"k", b"better", ("a", b"1"))
    assert [v for k, v in fixed.headers if k == H_OPENING] == [b"3"]
    assert dead.original.value == b"\x00\x01v"
