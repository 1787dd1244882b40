"""The state machine and the algebra of parks: tables, round trips, and properties over every order and any repeats."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.orchestrator import bench, deploy, more_kinds, started

from factmesh.errors import IllegalTransitionError
from factmesh_orchestrator.bench import Bench
from factmesh_orchestrator.model import (
    ENDED,
    OVERLAYS,
    TRANSITIONS,
    Event,
    Instance,
    Park,
    Status,
    advance,
    diagram,
    shown_moves,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("status", [None, *Status])
@pytest.mark.parametrize("event", Event)
def test_a_pair_that_the_table_does_not_hold_is_illegal(status: Status | None, event: Event) -> None:
    """INV-F: an illegal pair raises and changes nothing."""
    if (status, event) in TRANSITIONS:
        assert advance(status, event) is TRANSITIONS[status, event]
        return
    with pytest.raises(IllegalTransitionError, match="nothing was changed"):
        advance(status, event)


def test_nothing_leaves_an_end() -> None:
    """INV-L: an instance that ended rests in exactly one state."""
    assert not {a for a, _ in TRANSITIONS if a in ENDED}
    assert not {a for a, _ in OVERLAYS if a in ENDED}
    assert not {a for a, _ in shown_moves() if a in ENDED}


def test_every_state_can_be_reached_and_every_open_one_can_end() -> None:
    """INV-L: none is running for ever: from every open state some end can be reached."""
    moves = shown_moves() | {(Status.RUNNING, Status.PARKED)}
    assert {b for _, b in moves} | {Status.RUNNING} == set(Status)
    for status in set(Status) - ENDED:
        assert any(a is status and b in ENDED for a, b in moves)


def test_the_diagram_shows_every_row_of_the_tables() -> None:
    """HOUSE_STYLE 1: the diagram in the docs is drawn from the table."""
    text = diagram()
    for (source, event), target in TRANSITIONS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"    {source or '[*]'} --> {target}:"))
        assert event in line
    for status in Status:
        assert status in text


# --- parks -----------------------------------------------------------------------------------------------------------

numbers = st.integers(min_value=-1, max_value=4)
parks = st.builds(Park, numbers, numbers, numbers, st.sampled_from([None, "c1"]))


@given(parks, parks, parks)
def test_merging_parks_knows_no_order_and_no_repeats(a: Park, b: Park, c: Park) -> None:
    """DESIGN 9: per record the instance keeps the highest of each number, whichever arrives first."""
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a


@pytest.mark.parametrize(
    ("park", "parked", "discarded"),
    [
        (Park(), False, False),
        (Park(parked=0), True, False),
        (Park(parked=0, released=1), False, False),  # opening 1 was handled
        (Park(parked=1, released=1), True, False),  # and what it became died later, under the same opening
        (Park(parked=1, released=2), False, False),
        (Park(released=1), False, False),  # the release came first
        (Park(parked=1, discarded=1), False, True),
        (Park(parked=0, discarded=1), False, True),
        (Park(discarded=0), False, True),  # the discard came first
        (Park(parked=2, released=1, discarded=1), True, True),
    ],
)
def test_what_cancels_a_park(park: Park, parked: bool, discarded: bool) -> None:
    """DESIGN 9: a release cancels lower parks, a discard those up to its own opening."""
    assert (park.is_parked, park.is_discarded) == (parked, discarded)


def _history(b: Bench) -> list[object]:
    """Everything that quarantine may tell of one instance, and a person's word on the outstanding command."""
    command = b.command("credit")
    record = b.record_of(command)
    return [
        b.parked(command, "unknown"),
        b.signal("message_parked", {"record_id": "r1", "opening": 0, "reason": "decode", "step": None}),
        b.signal("message_released", {"record_id": "r1", "opening": 1}),
        b.signal("message_parked", {"record_id": "r1", "opening": 1, "reason": "decode", "step": None}),
        b.signal("message_released", {"record_id": "r1", "opening": 2}),
        b.signal("message_parked", {"record_id": "r2", "opening": 0, "reason": "bug", "step": None}),
        b.signal("message_discarded", {"record_id": "r2", "opening": 0, "reason": "x"}),
        b.parked(command, "unknown", 1),
        b.signal("message_released", {"record_id": record, "opening": 1}),
        b.result(command, failed=("ambiguous", "no"), verdict="not_happened"),
    ]



@settings(max_examples=60, deadline=None)
@given(st.permutations(range(10)), st.lists(st.integers(0, 9), max_size=6), st.integers(1, 10))
def test_any_order_and_any_repeats_of_park_signals_end_equal(order: list[int], again: list[int], n: int) -> None:
    """DESIGN 9, H1: no receiver relies on order: the same set of signals leaves the same instance, however it comes."""

    def fold(indexes: list[int]) -> tuple[object, ...]:
        b = started()
        messages = _history(b)
        for index in indexes:
            b.take(messages[index])  # type: ignore[arg-type]
        i = b.instance
        return (i.status, i.base, i.parks, set(i.resolved), i.steps["credit"].status)

    chosen = order[:n]
    assert fold(sorted(chosen)) == fold(chosen + [i for i in again if i in chosen])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["look", "credit", "again", "park", "release", "retry", "end", "old"]), max_size=12))
def test_any_history_keeps_the_sequence_gapless_and_the_shown_moves_legal(acts: list[str]) -> None:
    """INV-F: whatever comes, seq rises by one, what readers see follows the table, and the state reads back."""
    b = started()
    for act in acts:
        c = b.commands[-1] if b.commands[-1].connector != "notifier" else b.command("credit")
        message = {
            "look": lambda: b.result(b.command("look"), output={"amount": 1}),
            "credit": lambda c=c: b.result(c, output={}),
            "again": lambda c=c: b.result(c, failed=("validation", "no")),
            "park": lambda c=c: b.parked(c, "exhausted"),
            "release": lambda c=c: b.signal("message_released", {"record_id": b.record_of(c), "opening": 1}),
            "retry": lambda c=c: b.retry(c),
            "end": lambda: b.signal("end_instance", {"status": "failed", "reason": "x"}),
            "old": lambda: b.signal("message_discarded", {"record_id": "old", "opening": 0, "reason": "x"}),
        }[act]()
        b.dies(message)
    assert [n["seq"] for n in b.notes] == list(range(1, b.instance.seq + 1))
    shown = [Status(s["status"]) for s in b.statuses]
    moves = shown_moves() | {(s, s) for s in Status if s not in ENDED}
    assert all(pair in moves for pair in itertools.pairwise(shown)), shown
    kept = orjson.dumps(b.instance.to_json())
    assert Instance.from_json(orjson.loads(kept)) == b.instance


def test_a_state_of_a_newer_release_is_refused() -> None:
    """B2: a roll-back meets newer state with a clear text, not with a guess."""
    raw = json.loads(orjson.dumps(started().instance.to_json()))
    with pytest.raises(IllegalTransitionError, match="a newer orchestrator wrote it"):
        Instance.from_json({**raw, "v": 99})


def test_the_objects_row_reads_back() -> None:
    """B2: what waits under an object survives as it was kept."""
    with more_kinds():
        b = bench(deploy("- a: {listen: order.paid}", extra="onRepeat: queue"))
        b.take(b.fact("order.shipped", {"n": [1, {"a": None}]}))
        b.take(b.fact("order.delayed", {"note": "1"}))
        b.take(b.fact("order.delayed", {"note": "2"}))
        state = b.state
        raw = json.loads(json.dumps(state.row()))
        back = type(state).from_row(state.key, raw, state.active)
        assert (back.kept, back.queue, back.active) == (state.kept, state.queue, state.active)
        assert len(back.kept) == len(back.queue) == 1
