"""Parked: what an instance shows of a quarantined message, whatever order its signals come in and whoever is killed.
The product's own `Park` and `Instance.status` say what is shown; who emits which signal when is the model's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import ClassVar, NamedTuple
from uuid import UUID

from tests.model.explore import Model, Rule

from factmesh_orchestrator.model import NO_PARK, Instance, Park, Status

OPENINGS_MAX = 2
RECORD, COMMAND = "r", "c"
BREEDS_MAX = 3


class State(NamedTuple):
    """`truth` is what became of the message under its latest `opening`; `unsent` is in a process's memory only."""

    command: bool = False
    truth: str = "new"
    opening: int = 0
    signals: frozenset[tuple[str, int]] = frozenset()
    unsent: frozenset[tuple[str, int]] = frozenset()
    park: Park = NO_PARK
    resolved: bool = False
    bred: int = 0
    kills: int = 1


#: What the instance has to show once every signal is in.
SHOWN = {
    "dead": Status.PARKED,
    "handled": Status.RUNNING,
    "discarded": Status.NEEDS_RESOLUTION,
    "resolved": Status.RUNNING,
}


class Parks(Model[State]):
    NAME = "parks"
    ABOUT = (
        "A message of an instance dies, is opened, dies again, is handled or given up; or a command is unknown and a"
        " person resolves it. The signals come in any order; a service or a tool is killed once; signals die too."
    )
    ACTIONS = frozenset({"die", "emit", "kill", "raise", "handle", "discard", "resolve", "arrive", "signal_dies"})
    RULES: ClassVar = {
        "park-in-transaction": Rule(
            "parked", "who quarantines a message of a known instance emits `MessageParked` in the same transaction",
            "it emits it afterwards", "INV-L",
        ),
        "release-by-the-handler": Rule(
            "parked", "who handles a later opening emits `MessageReleased`, in its transaction",
            "the tool emits it when it has published", "INV-L",
        ),
        "discard-is-due": Rule(
            "parked", "a discard is a due row until its `MessageDiscarded` is acknowledged", "the tool sends it once",
            "INV-L",
        ),
        "numbers-only-rise": Rule(
            "parked", "per record the instance keeps the highest park, release and discard",
            "the signal that comes last counts", "INV-L",
        ),
        "release-cancels-lower": Rule(
            "parked", "a release cancels lower parks", "it cancels the park of its own opening too", "INV-L"
        ),
        "resolution-cancels-all": Rule(
            "parked", "a resolution's result cancels every park of its command, whichever arrives first",
            "it cancels those that are there", "INV-L",
        ),
        "park-signals-park-nothing": Rule(
            "parked", "quarantining one of these signals emits none, so nothing loops",
            "it parks like any other message", "LOOP",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield "a message of a running instance", State()
        yield "a command of a running instance, which ends unknown", State(command=True)

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        n = s.opening
        if s.truth in ("new", "raised", "handled") and not (s.truth == "handled" and n == 0):
            late = " after all" if s.truth == "handled" else ""
            yield (
                "die", f"the message dies under opening {n}{late}",
                self._emit(s._replace(truth="dead"), "parked", n, "park-in-transaction"),
            )  # fmt: skip
        if s.truth == "dead" and not s.command:
            if n < OPENINGS_MAX:
                raised = s._replace(truth="raised", opening=n + 1)
                if not self.on("release-by-the-handler"):
                    raised = raised._replace(unsent=raised.unsent | {("released", n + 1)})
                yield "raise", f"a person raises opening {n + 1}, and it is published", raised
            given_up = s._replace(truth="discarded", unsent=s.unsent | {("discarded", n)})
            yield "discard", f"a person discards the record, opening {n}", given_up
        if s.truth == "raised":
            handled = s._replace(truth="handled")
            if self.on("release-by-the-handler"):
                handled = handled._replace(signals=handled.signals | {("released", n)})
            yield "handle", f"opening {n} is handled", handled
        if s.truth == "dead" and s.command:
            resolved = s._replace(truth="resolved", signals=s.signals | {("result", 0)})
            yield "resolve", "a person resolves the command, and its result goes out", resolved
        for kind, number in sorted(s.unsent):
            sent = s._replace(unsent=s.unsent - {(kind, number)}, signals=s.signals | {(kind, number)})
            yield "emit", f"`{kind} {number}` is sent", sent
        if s.kills and s.unsent:
            # A due row outlives who wrote it; the next tool sends it.
            kept = frozenset(u for u in s.unsent if u[0] == "discarded" and self.on("discard-is-due"))
            yield "kill", "who was about to send it is killed", s._replace(unsent=kept, kills=s.kills - 1)
        yield from self._arrive(s)

    def _emit(self, s: State, kind: str, number: int, rule: str) -> State:
        signal = {(kind, number)}
        return s._replace(signals=s.signals | signal) if self.on(rule) else s._replace(unsent=s.unsent | signal)

    def _arrive(self, s: State) -> Iterable[tuple[str, str, State]]:
        for kind, number in sorted(s.signals):
            left = s._replace(signals=s.signals - {(kind, number)})
            if kind == "result":
                park = s.park if self.on("resolution-cancels-all") else NO_PARK
                known = self.on("resolution-cancels-all")
                yield "arrive", "the resolution's result comes", left._replace(resolved=known, park=park)
                continue
            park = {
                "parked": Park(parked=number, command_id=COMMAND if s.command else None),
                "released": Park(released=number),
                "discarded": Park(discarded=number),
            }[kind]
            merged = s.park.merge(park) if self.on("numbers-only-rise") else park
            yield "arrive", f"`{kind} {number}` comes", left._replace(park=merged)
            if kind == "parked" and not s.bred:
                # The signal itself is quarantined: replayed it comes again, and what it parks is the question.
                bred = 0 if self.on("park-signals-park-nothing") else 1
                yield "signal_dies", f"`{kind} {number}` dies itself, and is replayed", s._replace(bred=bred)
        if 0 < s.bred < BREEDS_MAX:
            yield "signal_dies", "the park of that signal dies too, and parks", s._replace(bred=s.bred + 1)

    def broken(self, s: State) -> str | None:
        if s.bred >= BREEDS_MAX:
            return "LOOP: every park signal that dies makes another one"
        if s.signals or s.unsent or s.truth not in SHOWN:
            return None
        shown, wanted = _shown(s.park, s.resolved), SHOWN[s.truth]
        if not self.on("release-cancels-lower") and s.park.parked <= s.park.released:
            shown = _shown(s.park._replace(parked=-1), s.resolved)
        if shown is not wanted:
            return f"INV-L: the message is {s.truth}, every signal is in, and its instance shows {shown}, not {wanted}"
        return None

    def unrest(self, s: State) -> str | None:
        return None if s.truth in SHOWN else f"INV-L: the message rests {s.truth}"


@cache
def _shown(park: Park, resolved: bool) -> Status:
    return Instance(
        id=UUID(int=1), workflow="w", version="1", definition_hash="", base=Status.RUNNING, seq=1,
        business_object_type="o", business_object_id="1", correlation_id="c", actor="a", fact_id="f", input={},
        step="s", started_at=0, occurred_at=0, due_by=None, parks={RECORD: park} if park != NO_PARK else {},
        resolved=(COMMAND,) if resolved else (),
    ).status  # fmt: skip
