"""Filing deaths and correcting bytes, without parts: any order, any repetition keeps the numbers legal.
The same on PostgreSQL, with races and kills, is in the integration tier.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import dlq, schema_files
from factmesh.errors import ErrorClass, Reason, ValidationError
from factmesh.message import Delivery
from factmesh.registry import DirectoryRegistry
from factmesh_cli import dlq_edit
from factmesh_cli.dlq_filter import instant_of
from factmesh_quarantine.decide import file
from factmesh_quarantine.model import (
    OPEN_STATES,
    Death,
    Filing,
    Numbers,
    State,
    Thread,
    Verb,
    Way,
    discard_ends_command,
    may_discard,
    next_state,
    way_back,
)

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
THREAD = UUID(int=9)


def death(id_: int, number: int, *, is_resolution: bool = False) -> Death:
    at = Delivery("dlq.t", 0, id_, b"k", b"v")
    dead = dlq.DeadLetter(
        Delivery("t", 0, id_, b"k", b"v"), "id:x", number, "g", Reason.VALIDATION, ErrorClass.VALIDATION, "s/h", "E",
        f"death {id_}", T0, T0, "1", "0" * 16,
    )  # fmt: skip
    return Death(UUID(int=id_ + 1000), at, "s", dead, THREAD, number, is_resolution=is_resolution)


def raise_one(thread: Thread, record: UUID, verb: Verb = Verb.REPLAY) -> Thread:
    """What `acts.sql` does in one statement."""
    n = thread.records[record]
    assert n.is_open
    number = thread.counter + 1
    raised = Numbers(next_state(n.state, verb), number, n.published, n.dead)
    return replace(
        thread,
        counter=number,
        records={**thread.records, record: raised},
        openings={**thread.openings, number: record},
    )


def check(thread: Thread) -> None:
    for n in thread.records.values():
        assert n.published <= n.raised
        assert n.dead <= n.raised <= thread.counter
        assert (n.state in OPEN_STATES) == n.is_open


@given(
    st.lists(
        st.tuples(st.sampled_from(["conflict", "raise", "die", "again", "strange"]), st.integers(0, 7)), max_size=30
    )
)
def test_any_history_keeps_numbers_legal(steps: list[tuple[str, int]]) -> None:
    """DESIGN 9: whatever is raised, dies, comes twice or was never seen, numbers only rise."""
    thread = file(Thread(THREAD, T0), death(0, 0))
    seen = [death(0, 0)]
    for id_, (what, pick) in enumerate(steps, start=1):
        before = thread
        if what == "conflict":
            seen.append(death(id_, 0))
            thread = file(thread, seen[-1])
        elif what == "raise":
            records = [r for r, n in sorted(thread.records.items()) if n.is_open]
            if records:
                thread = raise_one(thread, records[pick % len(records)])
        elif what == "die" and thread.openings:
            numbers = sorted(thread.openings)
            seen.append(death(id_, numbers[pick % len(numbers)]))
            thread = file(thread, seen[-1])
        elif what == "again":
            thread = file(thread, seen[pick % len(seen)])
            assert thread is before
        elif what == "strange":
            seen.append(death(id_, thread.counter + 1 + pick))
            thread = file(thread, seen[-1])
        check(thread)
        for record, n in before.records.items():
            after = thread.records[record]
            assert (after.raised, after.published, after.dead) >= (n.raised, n.published, n.dead)


def test_death_opens_the_record_that_raised_its_number() -> None:
    """DESIGN 9: two records of one root; each death goes to the one whose opening it was."""
    thread = file(file(Thread(THREAD, T0), death(1, 0)), death(2, 0))
    one, two = UUID(int=1001), UUID(int=1002)
    thread = raise_one(raise_one(thread, two), one)
    thread = file(thread, death(3, 1))
    assert (thread.records[two].state, thread.records[one].state) == (State.FAILED_AGAIN, State.REPLAYED)
    assert [(f.record, f.how) for f in thread.filed] == [(one, Filing.NEW), (two, Filing.NEW), (two, Filing.AGAIN)]


def test_refused_resolution_without_its_act() -> None:
    """INV-D: an index that was rebuilt does not know the act; its refusal still belongs to the command's record."""
    thread = file(Thread(THREAD, T0), death(1, 0))
    thread = file(thread, death(2, 3, is_resolution=True))
    assert thread.records == {UUID(int=1001): Numbers(State.FAILED_AGAIN, 3, 3, 3)}


COMMAND, NOTIFIER, RESULT = "n.factmesh.command.billing.v1", "n.factmesh.command.notifier.v1", "n.factmesh.result.v1"


@pytest.mark.parametrize(
    ("topic", "reason", "way", "discardable"),
    [
        (RESULT, "validation", Way.OPENING, True),
        (COMMAND, "decode", Way.OPENING, True),
        (COMMAND, "exhausted", Way.RETRY_STEP, True),
        (COMMAND, "unknown", Way.RESOLUTION, False),
        (NOTIFIER, "exhausted", Way.OPENING, True),
        (NOTIFIER, "unknown", Way.RESOLUTION, True),
    ],
)
def test_way_back(topic: str, reason: str, way: Way, discardable: bool) -> None:
    """DESIGN 9: commands are not replayed; what is unknown is only resolved; the rest is an opening."""
    assert way_back(topic, reason, "n.") is way
    assert may_discard(topic, reason, State.OPEN, "n.") is discardable
    assert may_discard(topic, reason, State.FAILED_AGAIN, "n.")


def test_which_discards_end_a_command() -> None:
    """DESIGN 9: a command that died before it was a row is ended by a resolution, a conflicting twin of one is not."""
    command = UUID("018f0000-0000-8000-8000-000000000001")

    def ends(topic: str, reason: str) -> UUID | None:
        return discard_ends_command(topic, reason, f"id:{command}", "n.")

    assert ends(COMMAND, "validation") == ends(NOTIFIER, "bug") == ends(NOTIFIER, "unknown") == command
    assert [ends(COMMAND, r) for r in ("exhausted", "unknown", "conflict")] == [None] * 3
    assert ends(RESULT, "validation") is None
    assert discard_ends_command(COMMAND, "decode", "at:t:0:1", "n.") is None


# --- correcting ------------------------------------------------------------------------------------------------------


def test_paths() -> None:
    """E2: a correction changes what its path names in a copy; one that leads nowhere is refused."""
    data = {"a": {"b": [{"c": 1}]}, "d": None}
    assert dlq_edit.set_path(data, "a.b[0].c=2") == {"a": {"b": [{"c": 2}]}, "d": None}
    assert dlq_edit.set_path(data, "a.new=x=y")["a"]["new"] == "x=y"
    assert dlq_edit.set_path(data, 'd={"e": 1.5}')["d"] == {"e": 1.5}
    assert data == {"a": {"b": [{"c": 1}]}, "d": None}
    for bad, says in (
        ("x.y=1", "there is no x in"),
        ("a.b[3]=1", r"a\.b\[3\]"),
        ("a", "not PATH=VALUE"),
        ("a..b=1", "PATH"),
    ):
        with pytest.raises(ValidationError, match=says):
            dlq_edit.set_path(data, bad)


def test_headers_are_replaced_in_place() -> None:
    """E2: other headers keep their order and bytes, repeated ones of the name are replaced by one."""
    headers = (("a", b"1"), ("b", b"\xff"), ("a", b"2"), ("c", None))
    assert dlq_edit.set_headers(headers, ["a=3", "d=4"]) == (("a", b"3"), ("b", b"\xff"), ("c", None), ("d", b"4"))
    assert dlq_edit.set_headers(headers, ["a="]) == (("b", b"\xff"), ("c", None))
    with pytest.raises(ValidationError, match="NAME=VALUE"):
        dlq_edit.set_headers(headers, ["a"])


async def test_views_of_bytes() -> None:
    """E2: whatever lies there is shown, with the trouble it is in, and goes back to bytes of its kind or is refused."""
    registry = DirectoryRegistry([schema_files.platform_dir()])
    kinds = {}
    for value in (
        None,
        b"",
        b"plain",
        b'{"a": 1}',
        b"\xff\xfe",
        b"\x00\x00\x00\xff\xff\x01",
        b"\x00\x00\x00\x00\x05torn",
    ):
        seen = await dlq_edit.view(registry, value)
        kinds[value] = seen.kind
        assert isinstance(dlq_edit.pretty(seen), str)
        if seen.kind == "bytes":
            assert seen.trouble
            with pytest.raises(ValidationError, match="whole value"):
                dlq_edit.encode(seen, "x")
    assert list(kinds.values()) == ["none", "text", "text", "json", "bytes", "bytes", "bytes"]
    text = await dlq_edit.view(registry, b'{"b": 1, "a": "\xc3\xa9"}')
    assert dlq_edit.encode(text, text.data) == b'{"b":1,"a":"\xc3\xa9"}'


async def test_another_schema(tmp_path: Path) -> None:
    """E2: JSON that arrived where Avro was promised is corrected by writing it with the schema that it meant."""
    registry = DirectoryRegistry([schema_files.platform_dir()])
    schema = await registry.by_version("factmesh.signal", 1)
    record = {f: "x" for f in schema.field_names} | {
        "ce_time": "2026-01-01T00:00:00Z", "traceparent": None, "instance_seq": 1, "body": {"reason": "r"},
    }  # fmt: skip
    seen = dlq_edit.written_with(await dlq_edit.view(registry, dlq_edit.compact(record)), schema)
    value = dlq_edit.encode(seen, seen.data)
    again = await dlq_edit.view(registry, value)
    assert (again.kind, again.data["body"], again.data["ce_time"]) == (
        "avro",
        {"reason": "r"},
        "2026-01-01T00:00:00.000Z",
    )
    with pytest.raises(ValidationError, match="ce_time"):
        dlq_edit.encode(seen, record | {"ce_time": "2026-01-01T00:00:00"})


def test_since() -> None:
    """HOUSE_STYLE 5: an age or an instant with an offset; a naive one is refused, never guessed."""
    assert instant_of("90m", T0) == datetime(2026, 3, 1, 10, 30, tzinfo=UTC)
    assert instant_of("2026-02-01T00:00:00+01:00", T0) == datetime(2026, 1, 31, 23, 0, tzinfo=UTC)
    for bad in ("2026-02-01T00:00:00", "yesterday", "3w"):
        with pytest.raises(ValidationError, match="not an instant with an offset"):
            instant_of(bad, T0)
