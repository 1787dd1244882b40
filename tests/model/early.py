"""Early facts: a fact that nobody awaits yet, the step that will, and the horizon, in every order and side by side.
The product's own orchestrator decides over real messages; locks, the ledger's row and the replay are the model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from tests.model.explore import Model, Rule, replaced
from tests.support.orchestrator import bench, deploy, more_kinds

from factmesh.effects import MarkLedger
from factmesh.message import Message
from factmesh.verdict import Seen, Verdict, judge
from factmesh_orchestrator.decide import KEPT_HORIZON_S, decide_with
from factmesh_orchestrator.model import ObjectState

NAMES = ("A", "B")
FACT, START, HORIZON = "fact", "start", "horizon"
SHOWN = {
    FACT: "the fact that the step awaits",
    START: "the fact that starts the workflow",
    HORIZON: "the horizon of the early fact",
}


class Work(NamedTuple):
    """What a replica has in hand: a message, and the object as it loaded it."""

    message: str = ""
    loaded: int = -1


class State(NamedTuple):
    """`row` is the early fact's in the ledger; `stale`: it has a DLQ record; `taken`: a step got it."""

    objekt: int = 0
    handled: frozenset[str] = frozenset()
    replicas: tuple[Work, ...] = (Work(), Work())
    row: str = ""
    stale: bool = False
    replayed: bool = False
    taken: bool = False


class Early(Model[State]):
    NAME = "early-fact"
    ABOUT = (
        "A fact that a step awaits and the fact that starts the workflow come in any order, handled by two replicas"
        " side by side; the horizon may come at any moment after the fact was kept; what went stale may be replayed."
    )
    ACTIONS = frozenset({"load", "commit", "replay"})
    RULES: ClassVar = {
        "early-is-kept": Rule(
            "kept", "a fact that nobody awaits yet is kept under its business object", "it is dropped", "INV-L"
        ),
        "step-looks-first": Rule(
            "kept", "a step that starts to wait looks there first", "it waits for the next one", "INV-L"
        ),
        "keeping-and-waiting-locked": Rule(
            "kept", "both happen under the object's lock", "each loads without waiting for the other", "INV-F"
        ),
        "horizon-locked": Rule(
            "kept", "at the horizon a signal is handled under the same lock", "the horizon looks without the lock",
            "INV-X",
        ),
        "stale-row-is-dead": Rule(
            "kept", "a fact that went stale has its ledger row set `dead`", "its row stays `done`", "INV-D"
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield "a workflow whose only step awaits a fact; nothing has come yet", State()

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        coming = {START, FACT} - s.handled - {w.message for w in s.replicas}
        if _mesh().states[s.objekt].kept and HORIZON not in s.handled | {w.message for w in s.replicas}:
            coming.add(HORIZON)
        for i, work in enumerate(s.replicas):
            if not work.message:
                if i == 1 and not s.replicas[0].message:
                    continue  # two idle replicas are one like the other
                for m in sorted(coming):
                    if not any(self._locks(w.message) for w in s.replicas) or not self._locks(m):
                        after = s._replace(replicas=replaced(s.replicas, i, Work(m, s.objekt)))
                        yield "load", f"{NAMES[i]} loads the object for {SHOWN[m]}", after
            else:
                yield "commit", *self._commit(s, i, work)
        if s.stale and not s.replayed:
            yield from self._replay(s)

    def _locks(self, message: str) -> bool:
        if not message:
            return False
        return self.on("horizon-locked") if message == HORIZON else self.on("keeping-and-waiting-locked")

    def _commit(self, s: State, i: int, work: Work) -> tuple[str, State]:
        name, m = NAMES[i], work.message
        folded = _mesh().fold(work.loaded, m, looks=self.on("step-looks-first"))
        after = s._replace(
            replicas=replaced(s.replicas, i, Work()), handled=s.handled | {m}, objekt=folded.after,
            taken=s.taken or folded.taken,
        )  # fmt: skip
        what = "nothing changes"
        if m == FACT:
            after = after._replace(row="done")
            if folded.taken:
                what = "it wakes the step"
            elif self.on("early-is-kept"):
                what = "nobody awaits it, it is kept"
            else:
                what, after = "nobody awaits it", after._replace(objekt=work.loaded)
        elif m == START:
            what = "the step takes the kept one" if folded.taken else "its step waits"
        elif folded.stale:
            after = after._replace(stale=True, row="dead" if self.on("stale-row-is-dead") else s.row)
            what = "it is still kept, and goes to the DLQ, stale"
        return f"{name} commits {SHOWN[m]}: {what}", after

    def _replay(self, s: State) -> Iterable[tuple[str, str, State]]:
        """A person replays the stale record: an opening, judged by the product's table."""
        seen = Seen(s.row, 0, same_coordinates=False, same_body=True)
        after = s._replace(replayed=True)
        if judge(1, seen, seen) is Verdict.HANDLE:
            after = after._replace(stale=False, handled=s.handled - {FACT, HORIZON}, row="")
            yield "replay", "the stale record is replayed, and comes again", after
        else:
            yield "replay", "the stale record is replayed, and refused: its row is not dead", after

    def broken(self, s: State) -> str | None:
        state = _mesh().states[s.objekt]
        if s.taken and s.stale:
            return "INV-X: the fact was taken by its step, and is on the DLQ as stale too"
        if s.replayed and s.stale and s.row == "done":
            return "INV-D: the record can never be replayed"
        awaits = any(i.awaits for i in state.instances.values())
        idle = not any(w.message for w in s.replicas)
        if idle and state.kept and awaits:
            return "INV-L: the step waits for the fact that is kept beside it, and nobody will wake it"
        if idle and START in s.handled and not state.instances:
            return "INV-F: the workflow was started, and its instance is overwritten"
        if idle and FACT in s.handled and not (state.kept or s.taken or s.stale):
            lost = "overwritten" if self.on("early-is-kept") else "dropped"
            return f"{'INV-F' if lost == 'overwritten' else 'INV-L'}: the fact was acknowledged, and is {lost}"
        return None

    def unrest(self, s: State) -> str | None:
        return None if s.taken or s.stale else "INV-L: the fact has neither reached its step nor a DLQ"


@dataclass(frozen=True, slots=True)
class Folded:
    after: int
    taken: bool
    stale: bool


class _Mesh:
    """States of the object by number, and the three messages, made once."""

    def __init__(self) -> None:
        with more_kinds():
            definition = deploy("- get: {listen: parcel.arrived}")
            b = bench(definition)
            self.messages: dict[str, Message] = {
                START: b.fact("order.delayed", {"note": "n"}), FACT: b.fact("parcel.arrived", {"note": "n"})
            }  # fmt: skip
            self.now = b.now
            other = bench(definition)
            other.take(self.messages[FACT])
            (timer,) = other.timers
            self.messages[HORIZON] = other.fired(timer)
        self.states: list[ObjectState] = []
        self._known: dict[str, int] = {}
        self._folded: dict[tuple[int, str, bool], Folded] = {}
        self._number(b.state)

    def _number(self, state: ObjectState) -> int:
        plain = [state.row(), [i.to_json() for i in state.instances.values()]]
        key = json.dumps(plain, sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = len(self.states)
            self.states.append(state)
        return self._known[key]

    def fold(self, before: int, name: str, *, looks: bool) -> Folded:
        key = before, name, looks
        if key not in self._folded:
            self._folded[key] = self._fold(*key)
        return self._folded[key]

    def _fold(self, before: int, name: str, looks: bool) -> Folded:
        state = self.states[before]
        unseen = state.kept if name == START and not looks else ()
        shown = self._with_kept(state, ()) if unseen else state
        with more_kinds():
            after, effects = decide_with(shown, self.messages[name], self.now, KEPT_HORIZON_S)
        assert isinstance(after, ObjectState)
        if unseen:
            after = self._with_kept(after, unseen)
        ended = sum(i.ended for i in after.instances.values()) > sum(i.ended for i in state.instances.values())
        stale = any(isinstance(e, MarkLedger) for e in effects)
        return Folded(self._number(after), ended, stale)

    @staticmethod
    def _with_kept(state: ObjectState, kept: tuple[object, ...]) -> ObjectState:
        return ObjectState(
            key=state.key, kept=kept, queue=state.queue, active=state.active,  # type: ignore[arg-type]
            instances=state.instances, definitions=state.definitions,
        )  # fmt: skip


@cache
def _mesh() -> _Mesh:
    return _Mesh()
