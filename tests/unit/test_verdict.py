"""The table of DESIGN 9, "Openings": every row of it, and any history against a reference of what was applied."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh.verdict import Seen, Verdict, judge

DISPOSITIONS = ("done", "dead", "discarded")
OPENINGS = (0, 1, 2, 3)
ROWS = [None, *(Seen(d, o, c, b) for d, o, c, b in product(DISPOSITIONS, OPENINGS, (True, False), (True, False)))]


def expected(opening: int, root: Seen | None, own: Seen | None) -> Verdict:
    """The table, row by row, written down a second time in its own words."""
    lower_dead = root is not None and root.disposition == "dead" and root.opening < opening
    own_free = own is None or own.disposition == "dead"
    if root is not None and root.opening == opening:
        if root.same_coordinates:
            return Verdict.REPUBLISH
        if opening == 0 and not root.same_body:
            return Verdict.CONFLICT
        return Verdict.REPEAT
    if (root is None or lower_dead) and (opening == 0 or own_free):
        return Verdict.HANDLE
    if opening == 0:
        assert root is not None
        if root.same_coordinates:
            return Verdict.REPUBLISH
        return Verdict.REPEAT if root.same_body else Verdict.CONFLICT
    return Verdict.REFUSE if lower_dead else Verdict.REFUSE_BESIDE


@pytest.mark.parametrize("opening", OPENINGS)
def test_every_row_of_the_table(opening: int) -> None:
    """⚑ DESIGN 9: each opening, with each row of the root and each of the own id; the own row is the root's in most."""
    for root, own in product(ROWS, ROWS):
        if opening == 0 and root != own:
            continue  # a message that is no opening is its own root
        assert judge(opening, root, own) is expected(opening, root, own), (opening, root, own)


@pytest.mark.parametrize("opening", OPENINGS)
def test_nothing_that_is_done_is_handled_again(opening: int) -> None:
    """INV-X: whatever else the ledger holds, a done or discarded root or own id is not applied once more."""
    for root, own in product(ROWS, ROWS):
        done = any(r is not None and r.disposition != "dead" for r in ((root, own) if opening else (root,)))
        if done:
            assert judge(opening, root, own) is not Verdict.HANDLE


@pytest.mark.parametrize("opening", OPENINGS[1:])
def test_no_opening_is_dropped_in_silence(opening: int) -> None:
    """⚑ DESIGN 9: an opening that is neither handled nor a repeat of itself is dead-lettered under its number."""
    for root, own in product(ROWS, ROWS):
        verdict = judge(opening, root, own)
        if verdict in (Verdict.REPEAT, Verdict.REPUBLISH):
            assert root is not None
            assert root.opening == opening


def test_only_recorded_coordinates_publish_again() -> None:
    """⚑ DESIGN 3: a mere duplicate publishes nothing, or one would ripple through the whole chain."""
    for opening, root, own in product(OPENINGS, ROWS, ROWS):
        if judge(opening, root, own) is Verdict.REPUBLISH:
            assert root is not None
            assert root.same_coordinates


# --- any history -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """One record on the topic: its place, its root, its own id, its opening, its body, and whether deciding fails."""

    at: int
    root: str
    own: str
    opening: int
    body: int
    dies: bool


@dataclass
class RowOf:
    disposition: str
    opening: int
    at: int
    body: int | None


@dataclass
class Reference:
    """A receiver as the loops are one, on the verdict alone: rows by id, what it applied, what it dead-lettered."""

    rows: dict[str, RowOf] = field(default_factory=dict)
    applied: list[tuple[str, str]] = field(default_factory=list)
    dead: list[tuple[str, int]] = field(default_factory=list)

    def seen(self, id_: str, sent: Sent) -> Seen | None:
        row = self.rows.get(id_)
        if row is None:
            return None
        return Seen(row.disposition, row.opening, row.at == sent.at, row.body in (None, sent.body))

    def deliver(self, sent: Sent) -> Verdict:
        verdict = judge(sent.opening, self.seen(sent.root, sent), self.seen(sent.own, sent))
        before = self.rows.get(sent.root)
        match verdict:
            case Verdict.HANDLE:
                body = before.body if before is not None and before.body is not None else sent.body
                state = "dead" if sent.dies else "done"
                self.rows[sent.root] = RowOf(state, sent.opening, sent.at, body)
                if sent.dies:
                    self.dead.append((sent.root, sent.opening))
                else:
                    self.applied.append((sent.root, sent.own))
                    if sent.own != sent.root:
                        twin = self.rows.get(sent.own)
                        kept = twin.body if twin is not None and twin.body is not None else sent.body
                        self.rows[sent.own] = RowOf("done", twin.opening if twin else 0, sent.at, kept)
            case Verdict.REFUSE:
                assert before is not None
                self.rows[sent.root] = replace(before, opening=sent.opening, at=sent.at)
                self.dead.append((sent.root, sent.opening))
            case Verdict.REFUSE_BESIDE:
                self.dead.append((sent.root, sent.opening))
            case Verdict.CONFLICT:
                self.dead.append((f"at:{sent.at}", 0))
        return verdict


@st.composite
def histories(draw: st.DrawFn) -> list[Sent]:
    """Messages of three ids, poison at its coordinates, openings of any of them as any of them; then redelivered."""
    names = ["a", "b", "c"]
    sent: list[Sent] = []
    for at in range(draw(st.integers(1, 8))):
        own = draw(st.sampled_from(names))
        opening = draw(st.integers(0, 3))
        root = own if opening == 0 else draw(st.sampled_from([*names, "at:9", own]))
        sent.append(Sent(at, root, own, opening, draw(st.integers(0, 1)), draw(st.booleans())))
    order = draw(st.lists(st.integers(0, len(sent) - 1), min_size=len(sent), max_size=20))
    return sent + [sent[n] for n in order]


@settings(max_examples=600)
@given(histories())
def test_any_history_applies_each_id_once_and_loses_no_opening(history: list[Sent]) -> None:
    """INV-L, INV-X, ⚑ DESIGN 9: deliveries, redeliveries, duplicates and openings of one root, in any order."""
    receiver = Reference()
    for sent in history:
        before = len(receiver.dead)
        verdict = receiver.deliver(sent)
        # Every delivery comes to something: applied, dead-lettered, or a repeat of what has come to something.
        if verdict in (Verdict.REPEAT, Verdict.REPUBLISH):
            row = receiver.rows[sent.root]
            assert sent.opening == 0 or row.opening == sent.opening
        elif verdict is not Verdict.HANDLE or sent.dies:
            assert len(receiver.dead) == before + 1
        if sent.opening > 0 and verdict in (Verdict.REFUSE, Verdict.REFUSE_BESIDE):
            assert receiver.dead[-1] == (sent.root, sent.opening)
        assert verdict is not Verdict.CONFLICT or sent.opening == 0
    roots = [root for root, _ in receiver.applied]
    owns = [own for _, own in receiver.applied]
    assert len(set(roots)) == len(roots)
    assert len(set(owns)) == len(owns)
    # A message that was sent is in the ledger: done, dead, or told apart from the one that has its id.
    assert all(sent.root in receiver.rows or (sent.root, sent.opening) in receiver.dead for sent in history)
