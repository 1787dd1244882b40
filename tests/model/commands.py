"""Commands that ended unknown or exhausted: a person's word, a step's retry, and everything crossing on its way.
The product's own connector and orchestrator decide over real messages; the mesh between them is the model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, ClassVar, NamedTuple

from tests.model.explore import Model, Rule
from tests.support.orchestrator import bench, deploy

from factmesh import ids
from factmesh.effects import Amend, MarkLedger, Publish, Schedule
from factmesh.errors import FactmeshError
from factmesh.ids import Root
from factmesh.message import Delivery, Message, to_ms
from factmesh_connector import decide as connector
from factmesh_connector import model as connector_model
from factmesh_orchestrator.decide import KEPT_HORIZON_S, decide_with
from factmesh_orchestrator.model import ATTENTION, Instance, ObjectState

T0 = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
IN_FLIGHT_MAX, LAST, NUMBER_MAX = 2, 2, 2
STEP = "- pay: {call: bank.charge, with: {id: '${ input.id }'}}"

Signal = tuple[Any, ...]
"""A message to the orchestrator: ("result", outcome, verdict), ("parked", n), ("retry", n) or ("end",)."""


class Word(NamedTuple):
    """A resolution on its way to the connector."""

    verdict: str
    number: int
    entered_at: int


class State(NamedTuple):
    """`orchestrator` names a state of the product's own orchestrator (`_Mesh`); `lost` may come again, once."""

    unknown: bool
    now: int = 0
    effects: frozenset[str] = frozenset()
    row: tuple[str, int] = ("unknown", 1)
    told: frozenset[str] = frozenset()
    orchestrator: int = 0
    issued: int = 1
    signals: frozenset[Signal] = frozenset()
    words: frozenset[Word] = frozenset()
    is_open: bool = True
    raised: int = 0
    dead: int = 0
    retries: frozenset[int] = frozenset()
    doubtful: bool = False
    rebuilt: bool = False
    ended: bool = False


class Commands(Model[State]):
    NAME = "commands"
    ABOUT = (
        "A command whose effect may still happen ends unknown, or is exhausted after known failures. A person looks and"
        " resolves it, with a retry or without, or ends the instance; signals, results and resolutions cross; the"
        " index is rebuilt once; a settlement whose commit was in doubt is tried again."
    )
    ACTIONS = frozenset(
        {"works", "tick", "resolve", "replay", "end", "connector", "orchestrator", "settle_again", "rebuild"}
    )
    RULES: ClassVar = {
        "not-happened-instant": Rule(
            "not-found", "`--not-happened` said before `in_flight_max_s` has passed is refused: look again",
            "a person's word counts at once", "INV-X",
        ),
        "only-while-unknown": Rule(
            "commands", "a resolution counts only while the row is `unknown`", "it counts whenever it comes", "INV-F"
        ),
        "resolution-raises-epoch": Rule(
            "commands", "a resolution raises the row's epoch", "it leaves the epoch as it is", "INV-F"
        ),
        "retry-after-failure": Rule(
            "commands", "`retry-step` is accepted only for its step's latest command, ended `failed`",
            "it runs the step again at once", "INV-X",
        ),
        "retry-is-kept": Rule(
            "commands", "`retry-step` is kept while its command is outstanding", "one that comes early is dropped",
            "INV-D",
        ),
        "moot-retry-dies-again": Rule(
            "commands", "any other `retry-step` dead-letters the record again under its opening",
            "what is not accepted is dropped", "INV-D",
        ),
        "end-waits": Rule(
            "cancel", "a person's end of an instance waits until the outstanding result is in",
            "it ends at once, whatever is out", "INV-X",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield (
            f"a call got no answer, may work until {IN_FLIGHT_MAX} s, and its command ends unknown",
            State(True, signals=frozenset({("parked", 0)}), doubtful=True),
        )  # fmt: skip
        yield (
            "a command is exhausted: every attempt is known not to have worked",
            State(False, 0, row=("failed", 1), told=frozenset({"failed"}),
                  signals=frozenset({("parked", 0), ("result", "failed", None)})),
        )  # fmt: skip

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        if s.unknown and s.now < IN_FLIGHT_MAX and "first" not in s.effects:
            yield "works", f"at {s.now} s the call works after all", s._replace(effects=s.effects | {"first"})
        if s.unknown and s.now < LAST:
            yield "tick", f"the clock says {s.now + 1} s", s._replace(now=s.now + 1)
        if s.is_open and s.raised < NUMBER_MAX:
            yield from self._act(s)
        if not s.ended and only(_mesh().states[s.orchestrator]).status in ATTENTION:
            yield "end", "a person cancels the instance", s._replace(ended=True, signals=s.signals | {("end",)})
        for word in sorted(s.words):
            yield self._connector(s, word)
        for signal in sorted(s.signals, key=str):
            yield self._orchestrator(s._replace(signals=s.signals - {signal}), signal)
        if s.doubtful and s.row[0] != "unknown":
            # Guarded by the epoch alone, as the design says; the product's SQL asks for `leased` too.
            again = s._replace(doubtful=False)
            if s.row[1] == 1:
                again = again._replace(row=("unknown", 1))
            yield "settle_again", "the worker tries its settlement of epoch 1 again, its commit was in doubt", again
        if s.unknown and not s.rebuilt and not s.is_open:
            after = s._replace(rebuilt=True, is_open=True, raised=max(0, s.dead))
            yield "rebuild", "the index is rebuilt and does not know of the act", after

    def _act(self, s: State) -> Iterable[tuple[str, str, State]]:
        number = s.raised + 1
        acted = s._replace(is_open=False, raised=number)
        retry: Signal = ("retry", number)
        if not s.unknown:
            after = acted._replace(signals=acted.signals | {retry}, retries=s.retries | {number})
            yield "replay", f"a person replays the record: retry-step {number}", after
            return
        verdict = "happened" if s.effects else "not_happened"
        said = acted._replace(words=s.words | {Word(verdict, number, s.now)})
        yield "resolve", f"at {s.now} s a person looks and says `{verdict}` ({number})", said
        if verdict == "not_happened":
            after = said._replace(signals=said.signals | {retry}, retries=s.retries | {number})
            yield "resolve", f"at {s.now} s a person looks and says `not_happened --retry` ({number})", after

    def _connector(self, s: State, word: Word) -> tuple[str, str, State]:
        entered_at = word.entered_at if self.on("not-happened-instant") else LAST
        state, epoch = s.row
        asked = state if self.on("only-while-unknown") else "unknown"
        outcome = _resolved(asked, epoch, word._replace(entered_at=entered_at), s.now)
        s = s._replace(words=s.words - {word})
        if outcome is None:
            died = self._died(s, word.number)
            return "connector", f"the connector, whose row is {state}, refuses `{word.verdict}` ({word.number})", died
        after = s._replace(
            row=(outcome, epoch + 1 if self.on("resolution-raises-epoch") else epoch),
            told=s.told | {outcome},
            signals=s.signals | {("result", outcome, word.verdict)},
        )
        return "connector", f"the connector takes `{word.verdict}`: its row is {outcome}, its result goes out", after

    def _died(self, s: State, number: int) -> State:
        """A death under this number: the record is open again, and its instance is told."""
        if number <= s.dead:
            return s
        raised = max(s.raised, number)
        return s._replace(raised=raised, dead=number, is_open=True, signals=s.signals | {("parked", number)})

    def _orchestrator(self, s: State, signal: Signal) -> tuple[str, str, State]:
        text = f"the orchestrator gets `{' '.join(str(x) for x in signal if x is not None)}`"
        before = s.orchestrator
        rules = {"retry": "retry-after-failure", "end": "end-waits"}
        if signal[0] in rules and not self.on(rules[signal[0]]):
            # As if the command were known to have failed.
            before = _mesh().fold(before, ("result", "failed", None)).after
        folded = _mesh().fold(before, signal)
        after = s._replace(orchestrator=folded.after)
        if signal[0] == "retry" and folded.kept:
            if not self.on("retry-is-kept"):
                return "orchestrator", f"{text} and drops it: the command is outstanding", s
            text += " and keeps it: the command is outstanding"
        for number in folded.died:
            if self.on("moot-retry-dies-again"):
                after = self._died(after, number)
            text += " and cannot carry it out"
        if signal[0] == "end":
            ended = only(_mesh().states[folded.after]).ended
            text += " and ends the instance" if ended else " and does not end the instance: its command is outstanding"
        if folded.issued:
            text += " and runs the step again: a new command, which works"
            number = after.issued + folded.issued
            after = after._replace(issued=number, effects=after.effects | {f"run {number}"})
        return "orchestrator", text, after

    def broken(self, s: State) -> str | None:
        if len(s.effects) > 1:
            return f"INV-X: the effect happened {len(s.effects)} times: {', '.join(sorted(s.effects))}"
        if len(s.told) > 1:
            return "INV-F: one command was told `done` and `failed`"
        if s.row[0] == "unknown" and only(_mesh().states[s.orchestrator]).ended:
            return "INV-X: the instance is cancelled, and whether its command happened is unknown"
        if s.told and s.row[0] == "unknown":
            return f"INV-F: `{next(iter(s.told))}` was told, and a stale settlement makes the row unknown again"
        return None

    def unrest(self, s: State) -> str | None:
        if s.row[0] == "unknown" and not s.is_open:
            return "INV-L: the row is unknown, and no record is open for it"
        lost = [n for n in s.retries if n > s.dead]
        if lost and s.issued == 1:
            return f"INV-D: the retry that a person asked for ({lost[0]}) is neither carried out nor dead-lettered"
        return None


# --- the product's own decisions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Folded:
    """What one message did to the orchestrator: the state after it, commands issued, retries refused or kept."""

    after: int
    issued: int = 0
    died: tuple[int, ...] = ()
    kept: bool = False


def only(state: ObjectState) -> Instance:
    """The one instance of an object."""
    (instance,) = state.instances.values()
    return instance


class _Mesh:
    """States of the orchestrator by number, and every message that may reach it, made once."""

    def __init__(self) -> None:
        b = bench(deploy(STEP))
        b.take(b.fact("order.delayed", {"note": "n"}))
        self.now, command = b.now, b.command("pay")
        end = b.signal("end_instance", {"status": "cancelled", "reason": "r"})
        self.messages: dict[Signal, Message] = {("end",): end}
        self.openings = {}
        for verdict in (None, "happened", "not_happened"):
            failed = ("permission", "not allowed")
            self.messages["result", "done", verdict] = b.result(command, output={}, verdict=verdict)
            self.messages["result", "failed", verdict] = b.result(command, failed=failed, verdict=verdict)
        for n in range(NUMBER_MAX + 1):
            self.messages["parked", n] = b.parked(command, "unknown", n)
            self.messages["retry", n] = b.retry(command, n)
            self.openings[self.messages["retry", n].root.text] = n
        self.states: list[ObjectState] = []
        self._known: dict[str, int] = {}
        self._folded: dict[tuple[int, Signal], Folded] = {}
        self._number(b.state)

    def _number(self, state: ObjectState) -> int:
        plain = [state.row(), [i.to_json() for i in state.instances.values()]]
        key = json.dumps(plain, sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = len(self.states)
            self.states.append(state)
        return self._known[key]

    def fold(self, before: int, signal: Signal) -> Folded:
        known = self._folded.get((before, signal))
        if known is None:
            known = self._folded[before, signal] = self._fold(before, signal)
        return known

    def _fold(self, before: int, signal: Signal) -> Folded:
        state, message = self.states[before], self.messages[signal]
        try:
            after, effects = decide_with(state, message, self.now, KEPT_HORIZON_S)
        except FactmeshError:
            return Folded(before, died=(signal[1],) if signal[0] == "retry" else ())
        assert isinstance(after, ObjectState)
        issued = sum(isinstance(e, Publish) and e.record == "command" for e in effects)
        died = tuple(self.openings[e.root] for e in effects if isinstance(e, MarkLedger))
        kept = len(only(after).retries) > len(only(state).retries)
        return Folded(self._number(after), issued, died, kept)


@cache
def _mesh() -> _Mesh:
    return _Mesh()


COMMAND = ids.message_id("orchestrator", "id:x", 0, 0, to_ms(T0))
INSTANCE = ids.message_id("intake", "id:y", 0, 0, to_ms(T0))
CATALOGUE: connector_model.Catalogue = {
    "bank": {
        "charge": connector_model.Operation("charge", connector_model.Strategy.NONE, in_flight_max_s=IN_FLIGHT_MAX)
    }
}


def _message(kind: str, **fields: Any) -> Message:
    record = {
        "ce_id": str(COMMAND), "correlation_id": "c", "actor": "person:ann", "traceparent": None,
        "business_object_type": "o", "business_object_id": "1", "instance_id": str(INSTANCE), "instance_seq": 1,
    }  # fmt: skip
    delivery = Delivery("factmesh.command.bank.v1", 0, 1, str(INSTANCE).encode(), b"v")
    return Message(delivery, kind, Root.own(COMMAND), COMMAND, 0, {**record, **fields}, b"h" * 16, to_ms(T0))


@cache
def _task() -> connector_model.Task:
    """The command as the connector takes it."""
    command = _message(
        "command", workflow="w", workflow_version="1.0.0", step="pay", iteration=0, run=0, connector="bank",
        operation="charge", idempotency_key=str(ids.idempotency_key(INSTANCE, "pay", 0, 0)), deadline=None, retry=None,
        body=b"{}",
    )  # fmt: skip
    _, effects = connector.decide(CATALOGUE, connector_model.State(), command, T0)
    return connector_model.unpack_task(next(e.payload for e in effects if isinstance(e, Schedule)))[0]


@cache
def _resolved(row: str, epoch: int, word: Word, now: int) -> str | None:
    """The connector's decision over a person's word: the row's new state, or None where it is refused."""
    history = connector_model.History(calls=1, ended_at=T0)
    state = connector_model.State(row=connector_model.Row(row, epoch, _task(), history, T0))
    resolution = _message(
        "resolution", command_id=str(COMMAND), verdict=word.verdict, reason="looked", record_id=None,
        output=b"{}" if word.verdict == "happened" else None, opening=word.number,
        entered_at=to_ms(T0 + timedelta(seconds=word.entered_at)),
    )  # fmt: skip
    try:
        _, effects = connector.decide(CATALOGUE, state, resolution, T0 + timedelta(seconds=now))
    except FactmeshError:
        return None
    return next(e.state for e in effects if isinstance(e, Amend))
