"""Openings: two operators, a tool that may be killed, the index's three numbers, and the receiver's table.
The product's own `judge` (receiver), `file` and transition table (index) decide; SQL's conditional updates are steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast
from uuid import UUID

from tests.model.explore import Model, Rule, replaced

from factmesh.dlq import DeadLetter
from factmesh.verdict import Seen, Verdict, judge
from factmesh_quarantine.decide import file
from factmesh_quarantine.model import OPEN_STATES, Death, Numbers, Thread, Verb, next_state
from factmesh_quarantine.model import State as Record

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OPERATORS = ("Ann", "Bob")
NUMBER_MAX = 2
TWIN = 0
HANDLES, REFUSALS = (Verdict.HANDLE,), (Verdict.REFUSE, Verdict.REFUSE_BESIDE)


class Row(NamedTuple):
    """A ledger row: what became of an id, under which opening, from which offset."""

    disposition: str
    opening: int
    at: int


class Entry(NamedTuple):
    """A message on the topic: an opening of a record's bytes, or (number 0) what the sender sent again."""

    number: int
    record: int


class Act(NamedTuple):
    number: int
    record: int
    verb: Verb
    published: bool = False


class Tool(NamedTuple):
    """An operator's tool: what it has read, and the act that it has in hand."""

    phase: str = "idle"
    record: int = 0
    seen: Numbers | None = None
    counter: int = 0
    verb: Verb = Verb.REPLAY
    act: int = -1


IDLE = Tool()


class Receiver(NamedTuple):
    """`doing` is what goes out for the entry at `offset`: the emission, a DLQ record, or nothing more."""

    offset: int = 0
    doing: str = ""


class State(NamedTuple):
    """`handled` are the records (and TWIN) whose bytes were applied; `records` is the index."""

    world: str
    log: tuple[Entry, ...] = ()
    receiver: Receiver = Receiver()
    root: Row | None = None
    own: Row | None = None
    handled: tuple[int, ...] = ()
    emitted: bool = True
    records: tuple[tuple[int, Numbers], ...] = ()
    counter: int = 0
    acts: tuple[Act, ...] = ()
    tools: tuple[Tool, ...] = (IDLE, IDLE)
    deaths: int = 1
    crashes: int = 1
    kills: int = 1


OPEN = Numbers(Record.OPEN, 0, 0, 0)


class Openings(Model[State]):
    NAME = "openings"
    ABOUT = (
        "A quarantined message, two operators who replay or discard, one tool killed anywhere, the index, the receiver"
        " with one crash; a second death; a corrected message that meets its resent twin; a conflict's second record."
    )
    ACTIONS = frozenset(
        {"read", "raise", "too_late", "discard", "publish", "mark", "kill", "due", "handle", "repeat", "refuse", "out",
         "offset", "crash", "twin"}
    )  # fmt: skip
    RULES: ClassVar = {
        "raise-is-conditional": Rule(
            "numbers", "raising is one conditional update: of two operators, one raises", "whoever asks raises", "INV-L"
        ),
        "stored-before-published": Rule(
            "numbers", "the bytes to be published are stored, with their number, before they are published",
            "the tool publishes, and then writes down that it did", "INV-L",
        ),
        "unpublished-again": Rule(
            "numbers", "an opening that is not marked published is published again",
            "what a killed tool did not publish stays so", "INV-L",
        ),
        "under-the-same-number": Rule(
            "numbers", "it is published again under the same number", "it gets the next number", "INV-L"
        ),
        "only-open-is-discarded": Rule(
            "numbers", "only open records are opened or discarded", "a record is discarded in any state", "INV-L"
        ),
        "same-opening-repeats": Rule(
            "openings", "the same opening is a repeat", "an opening is handled whenever it comes", "INV-X"
        ),
        "never-in-silence": Rule(
            "openings", "an opening of what is done is dead-lettered again under its number",
            "it is taken for a repeat and dropped", "INV-L",
        ),
        "own-id-too": Rule(
            "openings", "the receiver judges by the root id and by the message's own id too", "by the root id only",
            "INV-X",
        ),
        "coordinates-overwritten": Rule(
            "ripple", "handling a new opening overwrites the recorded coordinates", "the first ones stay recorded",
            "INV-L",
        ),
        "conflict-beside": Rule(
            "openings", "a conflict's `dead` row is filed under its coordinates", "it takes the row of its id", "INV-X"
        ),
        "numbers-per-root": Rule(
            "openings", "numbers count per root id and group, conflict records included", "each record counts its own",
            "INV-L",
        ),
        "others-pass-over": Rule(
            "openings", "an opening names the group that failed, and others pass it over", "every group judges it",
            "INV-D",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        dead, done = Row("dead", 0, -1), Row("done", 0, -1)
        yield "m died once and is quarantined as record 1", State("dead", root=dead, records=((1, OPEN),))
        yield (
            "m was garbled and is quarantined as record 1; the operator corrects it, and its sender sends it again",
            State("twin", root=dead, records=((1, OPEN),)),
        )  # fmt: skip
        both = ((1, OPEN), (2, OPEN))
        yield "m died (record 1), and another body under its id died of the conflict (record 2)", State(
            "two bodies", root=dead, records=both
        )
        over = done if self.on("conflict-beside") else Row("dead", 0, -2)
        yield "m is done, and another body under its id died of the conflict (record 2)", State(
            "conflict", root=over, handled=(1,), records=((2, OPEN),)
        )

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        for i, tool in enumerate(s.tools):
            if tool != IDLE or i == 0 or s.tools[0] != IDLE:  # two idle operators are one like the other
                yield from self._operate(s, i, tool)
        yield from self._due(s)
        yield from self._receive(s)
        if s.world == "twin" and not any(e.record == TWIN for e in s.log):
            yield "twin", "the sender sends m again, whole", s._replace(log=(*s.log, Entry(0, TWIN)))

    # --- the tool and the index --------------------------------------------------------------------------------------

    def _operate(self, s: State, i: int, tool: Tool) -> Iterable[tuple[str, str, State]]:
        name = OPERATORS[i]
        if tool.phase == "idle":
            for record, numbers in s.records:
                if numbers.state in OPEN_STATES and s.counter < NUMBER_MAX:
                    counter = s.counter if self.on("numbers-per-root") else numbers.raised
                    read = Tool("read", record, numbers, counter)
                    yield "read", f"{name} reads record {record}, which is open", _tool(s, i, read)
                wanted = numbers.state in OPEN_STATES or not self.on("only-open-is-discarded")
                if wanted and s.world == "dead" and numbers.state is not Record.DISCARDED:
                    read = Tool("read", record, numbers, s.counter, Verb.DISCARD)
                    yield "read", f"{name} is about to discard record {record} ({numbers.state})", _tool(s, i, read)
        elif tool.phase == "read":
            yield from self._raise(s, i, tool)
        elif tool.phase == "raised":
            act = s.acts[tool.act]
            text = f"{name} publishes opening {act.number} of record {act.record}"
            after = s._replace(log=(*s.log, Entry(act.number, act.record)))
            yield "publish", text, _tool(after, i, tool._replace(phase="published"))
            yield from self._kill(s, i)
        elif tool.phase == "early":
            yield from self._raise(s, i, tool)
            yield from self._kill(s, i)
        elif tool.phase == "published":
            yield "mark", f"{name} marks it published", _tool(_marked(s, tool.act), i, IDLE)
            yield from self._kill(s, i)

    def _kill(self, s: State, i: int) -> Iterable[tuple[str, str, State]]:
        if s.kills:
            yield "kill", f"{OPERATORS[i]}'s tool is killed", _tool(s, i, IDLE)._replace(kills=s.kills - 1)

    def _raise(self, s: State, i: int, tool: Tool) -> Iterable[tuple[str, str, State]]:
        name, now = OPERATORS[i], dict(s.records)[tool.record]
        assert tool.seen is not None
        if tool.verb is Verb.DISCARD:
            if now == tool.seen and (now.is_open or not self.on("only-open-is-discarded")):
                closed = Numbers(Record.DISCARDED, now.raised, now.published, now.dead)
                after = s._replace(records=_put(s, tool.record, closed))
                yield "discard", f"{name} discards record {tool.record}", _tool(after, i, IDLE)
            else:
                yield "too_late", f"{name} is too late: the record has changed", _tool(s, i, IDLE)
            return
        number = tool.counter + 1
        if not self.on("stored-before-published") and tool.phase == "read":
            log = (*s.log, Entry(number, tool.record))
            text = f"{name} publishes opening {number} of record {tool.record}"
            yield "publish", text, _tool(s, i, tool._replace(phase="early"))._replace(log=log)
            return
        if self.on("raise-is-conditional"):
            counter = s.counter if self.on("numbers-per-root") else now.raised
            if now != tool.seen or not now.is_open or counter != tool.counter:
                yield "too_late", f"{name} is too late: the record has changed", _tool(s, i, IDLE)
                return
        else:
            number = s.counter + 1
        state = next_state(now.state, Verb.REPLAY) if now.state in OPEN_STATES else now.state
        raised = Numbers(state, number, now.published, now.dead)
        after = s._replace(
            records=_put(s, tool.record, raised),
            counter=max(s.counter, number),
            acts=(*s.acts, Act(number, tool.record, Verb.REPLAY, tool.phase == "early")),
        )
        tool = Tool("raised", tool.record, act=len(s.acts)) if tool.phase == "read" else IDLE
        yield "raise", f"{name} raises opening {number} of it", _tool(after, i, tool)

    def _due(self, s: State) -> Iterable[tuple[str, str, State]]:
        """Whoever comes later publishes what a killed tool left; the row's lock keeps it from a tool that lives."""
        held = {t.act for t in s.tools}
        for n, act in enumerate(s.acts):
            if act.published or n in held or not self.on("unpublished-again"):
                continue
            number, after = act.number, s
            if not self.on("under-the-same-number"):
                number = s.counter + 1
                after = s._replace(counter=number)
            text = f"the next tool finds opening {act.number} unpublished and publishes it as opening {number}"
            yield "due", text, _marked(after._replace(log=(*s.log, Entry(number, act.record))), n)

    # --- the receiver ------------------------------------------------------------------------------------------------

    def _receive(self, s: State) -> Iterable[tuple[str, str, State]]:
        r = s.receiver
        if r.doing:
            entry = s.log[r.offset]
            if r.doing == "emission":
                after, text = s._replace(emitted=True), "the receiver publishes what it emitted"
            elif r.doing == "dead":
                after, text = self._filed(s, entry), f"the DLQ record of opening {entry.number} is filed in the index"
            else:
                yield "offset", "the receiver commits the offset", s._replace(receiver=Receiver(r.offset + 1))
                return
            yield "out", text, after._replace(receiver=Receiver(r.offset, "offset"))
            if s.crashes:
                yield "crash", "the receiver crashes", s._replace(receiver=Receiver(r.offset), crashes=s.crashes - 1)
        elif r.offset < len(s.log):
            yield from self._judge(s, s.log[r.offset], r.offset)

    def _judge(self, s: State, entry: Entry, at: int) -> Iterable[tuple[str, str, State]]:
        is_twin = entry.record == TWIN
        row = s.own if is_twin else s.root
        own = s.own if s.world == "twin" else row
        seen = [Seen(x.disposition, x.opening, x.at == at, same_body=True) if x else None for x in (row, own)]
        verdict = judge(entry.number, seen[0], seen[1] if self.on("own-id-too") else None)
        if entry.number and verdict is Verdict.REPEAT and not self.on("same-opening-repeats"):
            verdict = Verdict.HANDLE
        what = "the resent m" if is_twin else f"opening {entry.number}"
        if not self.on("others-pass-over") and entry.number:
            # Another group, which handled opening 0 long ago, judges it too.
            other = judge(entry.number, Seen("done", 0, False, True), Seen("done", 0, False, True))
            if other in REFUSALS and not any(n > 90 for n, _ in s.records):
                text = f"another group, where m is done, dead-letters {what}"
                yield "refuse", text, s._replace(records=_put(s, 99, OPEN))
        if verdict is Verdict.HANDLE:
            done = self._row(s, is_twin, Row("done", entry.number, at))
            done = done._replace(handled=(*s.handled, entry.record), emitted=False)
            yield "handle", f"the receiver handles {what}", done._replace(receiver=Receiver(at, "emission"))
            if s.deaths and not is_twin:
                dead = self._row(s, is_twin, Row("dead", entry.number, at))._replace(deaths=s.deaths - 1)
                yield "handle", f"{what} dies again", dead._replace(receiver=Receiver(at, "dead"))
        elif verdict is Verdict.REPUBLISH:
            assert row is not None
            doing = "emission" if row.disposition == "done" else "dead"
            yield "repeat", f"{what} is redelivered: it goes out again", s._replace(receiver=Receiver(at, doing))
        elif verdict in REFUSALS and self.on("never-in-silence"):
            after = self._row(s, is_twin, Row("dead", entry.number, at)) if verdict is Verdict.REFUSE else s
            text = f"{what} comes for what is done: the receiver dead-letters it"
            yield "refuse", text, after._replace(receiver=Receiver(at, "dead"))
        else:
            yield "repeat", f"{what} is taken for a repeat", s._replace(receiver=Receiver(at, "offset"))

    def _row(self, s: State, is_twin: bool, row: Row) -> State:
        before = s.own if is_twin else s.root
        if before is not None and not self.on("coordinates-overwritten"):
            row = row._replace(at=before.at)
        if is_twin:
            return s._replace(own=row)
        own = row if s.world == "twin" and row.disposition == "done" else s.own
        return s._replace(root=row, own=own)

    def _filed(self, s: State, entry: Entry) -> State:
        openings = tuple((a.number, a.record) for a in s.acts)
        records, counter = _file(s.records, s.counter, openings, entry.number)
        return s._replace(records=records, counter=counter)

    # --- what must hold ----------------------------------------------------------------------------------------------

    def broken(self, s: State) -> str | None:
        if len(s.handled) > 1:
            return f"INV-X: the effect of m happened {len(s.handled)} times"
        for record, numbers in s.records:
            if not numbers.dead <= numbers.raised >= numbers.published:
                return f"INV-D: the numbers of record {record} contradict each other: {numbers}"
        return None

    def unrest(self, s: State) -> str | None:
        if not s.emitted:
            return "INV-L: m is done, and what it emitted was never published"
        for record, numbers in s.records:
            handled = record in s.handled
            if record > 2:
                return f"INV-D: a record {record} is open for a message that is handled"
            if numbers.state in OPEN_STATES and handled:
                return f"INV-D: record {record} is open, and its message is done"
            if numbers.state is Record.DISCARDED and handled:
                return f"INV-L: record {record} is discarded, and its message is done"
            if numbers.state is Record.REPLAYED and not handled:
                return f"INV-L: record {record} is replayed, and its message is neither done nor quarantined"
        return None


def _tool(s: State, i: int, tool: Tool) -> State:
    return s._replace(tools=replaced(s.tools, i, tool))


def _put(s: State, record: int, numbers: Numbers) -> tuple[tuple[int, Numbers], ...]:
    return tuple(sorted({**dict(s.records), record: numbers}.items(), key=lambda item: item[0]))


def _marked(s: State, n: int) -> State:
    act = s.acts[n]
    now = dict(s.records)[act.record]
    marked = Numbers(now.state, now.raised, max(now.published, act.number), now.dead)
    return s._replace(acts=replaced(s.acts, n, act._replace(published=True)), records=_put(s, act.record, marked))


@cache
def _file(
    records: tuple[tuple[int, Numbers], ...], counter: int, openings: tuple[tuple[int, int], ...], number: int
) -> tuple[tuple[tuple[int, Numbers], ...], int]:
    """The product's filing of a death under this number."""
    thread = Thread(
        UUID(int=9), NOW, counter, {UUID(int=r): n for r, n in records}, {n: UUID(int=r) for n, r in openings}
    )
    # All that filing reads of a dead letter is its message, for the history.
    letter = cast(DeadLetter, cast(Any, SimpleNamespace(message="refused")))
    delivery: Any = None
    after = file(thread, Death(UUID(int=10 + number), delivery, "service", letter, thread.id, number))
    return tuple(sorted((r.int, n) for r, n in after.records.items())), after.counter
