"""The claim loop around a call: leases, epochs, paused workers, calls that work and never answer, three strategies.
What follows an attempt is asked of the product's own `follow`, `accounted` and `admit`; only their switches are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

from tests.model.explore import Model, Rule, replaced

from factmesh.claims import Claimed
from factmesh.errors import ErrorClass
from factmesh.retry import RetryPolicy
from factmesh_connector import follow
from factmesh_connector.attempt import accounted, admit
from factmesh_connector.follow import Found, Move, Next
from factmesh_connector.model import History, Operation, Strategy

T0 = datetime(2026, 3, 1, 12, tzinfo=UTC)
NAMES = ("A", "B")
ID = UUID("0192f000-0000-8000-8000-000000000001")
TIMEOUT, LEASE, IN_FLIGHT_MAX, KEY_VALID, DEADLINE = 1, 2, 1, 3, 1
#: What a downstream adds to the `key_valid_s` that is declared for it: a call may come as late as this after it was
#: admitted, by the rest of its lease and its time in flight.
KEY_MARGIN = LEASE + IN_FLIGHT_MAX
FOR_EVER = 10_000
POLICY = RetryPolicy(attempts_max=2, base_s=1, factor=1, delay_max_s=1, total_max_s=1000)


class Past(NamedTuple):
    """`History` in whole seconds; the fields have its names."""

    settled: int = 0
    calls: int = 0
    first_attempt_at: int | None = None
    ambiguous_since: int | None = None
    ended_at: int | None = None
    asks: int = 0
    first_ask_at: int | None = None
    stopped: bool = False


class Row(NamedTuple):
    """The claims row. `told`: its outcome is marked published."""

    state: str = "pending"
    epoch: int = 0
    due: int = 0
    attempts: int = 0
    lease_ended: int | None = None
    past: Past = Past()
    told: bool = False


class Worker(NamedTuple):
    """`then` is the settlement that it has in hand: (state, due)."""

    phase: str = "idle"
    epoch: int = 0
    lease_ends: int = 0
    attempt: int = 0
    sent: int = 0
    past: Past = Past()
    then: tuple[str, int] = ("", 0)
    paused: bool = False


IDLE = Worker()


class Call(NamedTuple):
    """A call at the downstream: `flying`, then `worked`, `busy` (known to have done nothing) or `gone`."""

    sent: int
    worker: int
    state: str = "flying"


class State(NamedTuple):
    """`effects` are the instants at which something happened at the downstream."""

    strategy: Strategy
    remembers: int
    deadline: int | None
    now: int = 0
    row: Row = Row()
    workers: tuple[Worker, ...] = (IDLE, IDLE)
    calls: tuple[Call, ...] = ()
    effects: tuple[int, ...] = ()
    published: frozenset[str] = frozenset()
    faults: int = 2


class Claim(Model[State]):
    NAME = "claim"
    ABOUT = (
        "One command's row, two workers, a downstream that works late or never answers, the strategies `key`, `lookup`"
        f" and `none`. In seconds: timeout {TIMEOUT}, lease {LEASE}, `in_flight_max_s` {IN_FLIGHT_MAX}, `key_valid_s`"
        f" {KEY_VALID}, two attempts, in one world a deadline. Two faults, of"
        " these: a worker stops for any time, or crashes; a question gets no answer; an outage."
    )
    ACTIONS = frozenset(
        {"claim", "decide", "send", "too_short", "works", "busy", "answer", "timeout", "ask", "settle", "refused",
         "publish", "publish_due", "pause", "resume", "crash", "outage", "tick"}
    )  # fmt: skip
    RULES: ClassVar = {
        "epoch-settles": Rule(
            "", "a settlement counts from the current lease epoch only", "any settlement of a leased row counts",
            "INV-X",
        ),
        "returned-rows-published": Rule(
            "returned", "only rows returned by the settlement statement are published",
            "a worker publishes what it meant to settle", "INV-F",
        ),
        "unpublished-is-due": Rule(
            "returned", "an outcome that is not marked published is a due row for any replica",
            "who settles it publishes it, or nobody does", "INV-L",
        ),
        "failed-is-known": Rule(
            "failed", "failed means that every attempt is known not to have worked",
            "exhausted retries end `failed`", "INV-X",
        ),
        "deadline-is-no-answer": Rule(
            "failed", "a deadline does not make failed what may have worked", "past its deadline a command is failed",
            "INV-X",
        ),
        "lost-lease-is-a-maybe": Rule(
            "failed", "an attempt whose lease ended without a settlement may have worked",
            "an attempt that nobody settled did not happen", "INV-X",
        ),
        "none-is-not-repeated": Rule(
            "failed", "strategy `none`: after a call that may have worked no other is made", "it is called again",
            "INV-X",
        ),
        "lookup-asks-first": Rule(
            "failed", "strategy `lookup`: after a call that may have worked the downstream is asked first",
            "it is called again", "INV-X",
        ),
        "not-found-in-flight": Rule(
            "not-found", '"not found" counts only once `in_flight_max_s` has passed since the last lease ended',
            "it counts at once", "INV-X",
        ),
        "lease-covers-timeout": Rule(
            "not-found", "immediately before the first byte, the lease still covers the timeout",
            "the call is sent whenever the worker comes to it", "INV-X",
        ),
        "key-grows-old": Rule(
            "failed", "strategy `key`: an ambiguous attempt older than `key_valid_s` ends unknown",
            "the key is taken to be honoured for ever", "INV-X",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield "strategy none", State(Strategy.NONE, 0, None)
        yield f"strategy none, deadline after {DEADLINE} s", State(Strategy.NONE, 0, DEADLINE)
        yield "strategy lookup", State(Strategy.LOOKUP, 0, None)
        yield "strategy key, remembered long enough", State(Strategy.KEY, FOR_EVER, None, faults=1)
        yield "strategy key, forgotten in the end", State(Strategy.KEY, KEY_VALID + KEY_MARGIN, None, faults=1)

    # --- the product's own decisions, some of them switched off ------------------------------------------------------

    def _before(self, s: State, past: Past) -> Next:
        refused, then = _before(self._operation(s), past, s.now, s.deadline)
        tainted = past.ambiguous_since is not None
        if refused and tainted and not self.on("deadline-is-no-answer"):
            return Next(Move.FAILED)
        if tainted and refused is None:
            repeats = {Strategy.NONE: "none-is-not-repeated", Strategy.LOOKUP: "lookup-asks-first"}
            rule = repeats.get(s.strategy)
            if rule is not None and not self.on(rule):
                return Next(Move.CALL)
        return self._ending(then)

    def _ending(self, then: Next) -> Next:
        if then.move is Move.UNKNOWN and not self.on("failed-is-known"):
            return Next(Move.FAILED, why=then.why)
        return then

    def _operation(self, s: State) -> Operation:
        long = s.remembers == FOR_EVER or not self.on("key-grows-old")
        return _operation(s.strategy, FOR_EVER if long else KEY_VALID)

    # --- what may happen ---------------------------------------------------------------------------------------------

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        for action, text, after in self._all(s):
            yield action, text, _tidy(after) if after.calls else after

    def _all(self, s: State) -> Iterable[tuple[str, str, State]]:
        urgent = False
        for i, w in enumerate(s.workers):
            if w.paused:
                yield "resume", f"{NAMES[i]} goes on", _worker(s, i, w._replace(paused=False))
                continue
            for action, text, after in self._steps(s, i, w):
                urgent = True
                yield action, text, after
            if w.phase == "calling":
                yield from self._answers(s, i, w)
            if s.faults and w.phase != "idle":
                fewer = s._replace(faults=s.faults - 1)
                yield "crash", f"{NAMES[i]} crashes", _worker(fewer, i, IDLE)
                yield "pause", f"{NAMES[i]} stops for a while", _worker(fewer, i, w._replace(paused=True))
        yield from self._downstream(s)
        if s.faults and s.strategy is Strategy.KEY and s.row.state == "pending" and s.workers == (IDLE, IDLE):
            down = KEY_VALID + KEY_MARGIN
            after = s._replace(now=s.now + down, faults=s.faults - 1)
            gone = tuple(c._replace(state="gone") for c in s.calls)
            yield "outage", f"no worker is up for {down} s", after._replace(calls=gone)
        if not urgent and self._waits(s):
            # Time goes on only when everything that is due is done: what is slow has stopped, and that is a fault.
            later = s._replace(now=s.now + 1)
            gone = tuple(
                c._replace(state="gone") if c.state == "flying" and later.now >= c.sent + TIMEOUT + IN_FLIGHT_MAX else c
                for c in s.calls
            )
            yield "tick", f"the clock says {later.now} s", later._replace(calls=gone)

    def _waits(self, s: State) -> bool:
        open_row = s.row.state in ("pending", "leased") and s.now < s.row.due
        return open_row or any(w.phase == "calling" and not w.paused for w in s.workers) or any(
            c.state == "flying" for c in s.calls
        )

    def _steps(self, s: State, i: int, w: Worker) -> Iterable[tuple[str, str, State]]:
        name = NAMES[i]
        if w.phase == "idle":
            if i == 0 or s.workers[0].phase != "idle":  # two idle workers are one like the other
                yield from self._claim(s, i)
        elif w.phase == "claimed":
            then = self._before(s, w.past)
            if then.move in (Move.CALL, Move.ASK):
                text = "a call is admitted" if then.move is Move.CALL else "the downstream is to be asked"
                yield "decide", f"{name}: {text}", _worker(s, i, w._replace(phase=str(then.move)))
            else:
                yield "decide", f"{name} calls no more: {then.move}", _worker(s, i, _settling(w, then, s.now))
        elif w.phase == "call":
            yield from self._send(s, i, w)
        elif w.phase == "checked":
            yield "send", f"{name} sends the call", _sent(s, i, w)
        elif w.phase == "ask":
            yield from self._ask(s, i, w)
        elif w.phase == "calling":
            if s.now >= w.sent + TIMEOUT:
                yield "timeout", f"{name} gets no answer in time", self._called(s, i, w, ErrorClass.AMBIGUOUS)
        elif w.phase == "settling":
            yield from self._settle(s, i, w)
        elif w.phase == "publishing":
            yield "publish", f"{name} publishes `{w.then[0]}`", _publish(_worker(s, i, IDLE), w.then[0], w.epoch)

    def _claim(self, s: State, i: int) -> Iterable[tuple[str, str, State]]:
        row, name = s.row, NAMES[i]
        if row.state in ("pending", "leased"):
            if row.due > s.now:
                return
            was_leased = row.state == "leased"
            ended = row.due if was_leased else row.lease_ended
            taken = row._replace(
                state="leased", epoch=row.epoch + 1, attempts=row.attempts + 1, lease_ended=ended, due=s.now + LEASE
            )
            past = row.past
            if self.on("lost-lease-is-a-maybe"):
                past = _accounted(past, taken.attempts, was_leased, ended, s.now)
            after = s._replace(row=taken)
            worker = Worker("claimed", taken.epoch, s.now + LEASE, taken.attempts, 0, past)
            lost = ", whose last lease ended without a word" if was_leased else ""
            yield "claim", f"{name} claims the row, epoch {taken.epoch}{lost}", _worker(after, i, worker)
        elif not row.told and self.on("unpublished-is-due"):
            text = f"{name} finds `{row.state}` unpublished and publishes it"
            yield "publish_due", text, _publish(s, row.state, row.epoch)

    def _send(self, s: State, i: int, w: Worker) -> Iterable[tuple[str, str, State]]:
        name = NAMES[i]
        if w.lease_ends - s.now < TIMEOUT and self.on("lease-covers-timeout"):
            text = f"{name} sends nothing: its lease does not cover the timeout"
            yield "too_short", text, _worker(s, i, _settling(w, Next(Move.WAIT), s.now))
        elif s.remembers == FOR_EVER:
            # Keys that are honoured cover a process that stops between its last check and its send.
            yield "send", f"{name}'s lease covers the call", _worker(s, i, w._replace(phase="checked"))
        else:
            yield "send", f"{name} sends the call", _sent(s, i, w)

    def _downstream(self, s: State) -> Iterable[tuple[str, str, State]]:
        for n, call in enumerate(s.calls):
            if call.state != "flying":
                continue
            late = "" if s.now <= call.sent + TIMEOUT else f", {s.now - call.sent} s after it was sent"
            known = s.strategy is Strategy.KEY and any(s.now < e + s.remembers for e in s.effects)
            effects = s.effects if known else (*s.effects, s.now)
            what = "is known by its key" if known else "works"
            calls = replaced(s.calls, n, call._replace(state="worked"))
            yield (
                "works", f"{NAMES[call.worker]}'s call {what} at the downstream{late}",
                s._replace(calls=calls, effects=effects),
            )  # fmt: skip
            if s.now <= call.sent + TIMEOUT:
                after = s._replace(calls=replaced(s.calls, n, call._replace(state="busy")))
                yield "busy", f"the downstream is busy and does nothing for {NAMES[call.worker]}", after

    def _answers(self, s: State, i: int, w: Worker) -> Iterable[tuple[str, str, State]]:
        """An answer comes, or does not: then there is only the timeout."""
        for call in s.calls:
            if call.worker == i and call.sent == w.sent and call.state in ("worked", "busy"):
                error = None if call.state == "worked" else ErrorClass.THROTTLED
                yield "answer", f"{NAMES[i]} gets its answer: {call.state}", self._called(s, i, w, error)

    def _called(self, s: State, i: int, w: Worker, error: ErrorClass | None) -> State:
        """As `attempt._call` after a call: what is known of it, and what follows."""
        past = w.past._replace(calls=w.past.calls + 1, first_attempt_at=_or(w.past.first_attempt_at, w.sent))
        then = _after_call(self._operation(s), past, error, s.now, s.deadline)
        if error is ErrorClass.AMBIGUOUS:
            past = past._replace(ambiguous_since=_or(past.ambiguous_since, w.sent), ended_at=s.now)
        return _worker(s, i, _settling(w._replace(past=past), self._ending(then), s.now))

    def _ask(self, s: State, i: int, w: Worker) -> Iterable[tuple[str, str, State]]:
        """As `attempt._ask`; a question takes no time here, and its answer is true or does not come."""
        name, past = NAMES[i], w.past
        counts = follow.counts_from(IN_FLIGHT_MAX, _instant(past.ended_at), _at(s.now))
        early = _at(s.now) < counts and self.on("not-found-in-flight")
        absent = Found.ABSENT_TOO_EARLY if early else Found.ABSENT
        for found in (Found.FOUND if s.effects else absent, *((Found.NO_ANSWER,) if s.faults else ())):
            asks = past.asks + 1 if found is Found.NO_ANSWER else 0
            asked = past._replace(asks=asks, first_ask_at=_or(past.first_ask_at, s.now) if asks else None)
            then = self._ending(_after_ask(self._operation(s), asked, found, s.now, s.deadline))
            if found is Found.ABSENT:
                asked = asked._replace(ambiguous_since=None, ended_at=None)
            now = w._replace(past=asked)
            calls = then.move is Move.CALL
            after = _worker(s, i, now._replace(phase="call") if calls else _settling(now, then, s.now))
            if found is Found.NO_ANSWER:
                after = after._replace(faults=s.faults - 1)
            yield "ask", f"{name} asks: {str(found).replace('_', ' ')}, so {then.move}", after

    def _settle(self, s: State, i: int, w: Worker) -> Iterable[tuple[str, str, State]]:
        name, (state, due) = NAMES[i], w.then
        current = s.row.state == "leased" and (s.row.epoch == w.epoch or not self.on("epoch-settles"))
        publishing = state != "pending" and (current or not self.on("returned-rows-published"))
        after = _worker(s, i, Worker("publishing", w.epoch, then=w.then) if publishing else IDLE)
        if current:
            row = Row(state, s.row.epoch)
            if state == "pending":
                row = s.row._replace(state=state, due=due, lease_ended=s.now, past=w.past)
            again = f"pending, again at {due} s" if state == "pending" else state
            yield "settle", f"{name} settles epoch {w.epoch}: {again}", after._replace(row=row)
        else:
            yield "refused", f"{name}'s settlement of epoch {w.epoch} changes nothing", after

    # --- what must hold ----------------------------------------------------------------------------------------------

    def broken(self, s: State) -> str | None:
        if len(s.effects) > 1:
            return f"INV-X: the effect happened {len(s.effects)} times, at {' s and '.join(map(str, s.effects))} s"
        if s.effects and ("failed" in s.published or s.row.state == "failed"):
            return "INV-X: the command is `failed`, and its effect happened"
        if not s.published <= {s.row.state}:
            told = " and ".join(sorted(s.published))
            return f"INV-F: `{told}` was published, and the row is {s.row.state}"
        return None

    def unrest(self, s: State) -> str | None:
        if s.row.state in ("pending", "leased"):
            return "INV-L: the row is never settled"
        if s.row.state not in s.published:
            return f"INV-L: the row is {s.row.state}, and nobody is ever told"
        if s.row.state == "done" and not s.effects:
            return "INV-X: the command is `done`, and nothing happened"
        return None


def _tidy(s: State) -> State:
    """Calls that can have no effect any more, and whose answer nobody waits for, are forgotten."""
    kept = tuple(
        c
        for c in s.calls
        if c.state == "flying"
        or (c.state != "gone" and s.workers[c.worker].phase == "calling" and s.workers[c.worker].sent == c.sent)
    )
    return s if len(kept) == len(s.calls) else s._replace(calls=kept)


def _worker(s: State, i: int, w: Worker) -> State:
    return s._replace(workers=replaced(s.workers, i, w))


def _sent(s: State, i: int, w: Worker) -> State:
    return _worker(s, i, w._replace(phase="calling", sent=s.now))._replace(calls=(*s.calls, Call(s.now, i)))


def _publish(s: State, outcome: str, epoch: int) -> State:
    """Published, and marked so where the row is still at that epoch."""
    row = s.row._replace(told=True) if s.row.epoch == epoch and s.row.state == outcome else s.row
    return s._replace(published=s.published | {outcome}, row=row)


def _settling(w: Worker, then: Next, now: int) -> Worker:
    """As `attempt._settlement`."""
    past = w.past._replace(settled=w.attempt, stopped=w.past.stopped or then.stopped is not None)
    due = now if then.at is None else -int((T0 - then.at).total_seconds() // 1)
    state = "pending" if then.move is Move.WAIT else str(then.move)
    return w._replace(phase="settling", past=past, then=(state, max(due, now) if state == "pending" else 0))


def _or(value: int | None, other: int) -> int:
    return other if value is None else value


def _at(seconds: int) -> datetime:
    return T0 + timedelta(seconds=seconds)


def _instant(seconds: int | None) -> datetime | None:
    return None if seconds is None else _at(seconds)


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int((at - T0).total_seconds())


@cache
def _operation(strategy: Strategy, key_valid_s: int) -> Operation:
    return Operation(
        "charge", strategy, timeout_s=TIMEOUT, lookup_timeout_s=TIMEOUT, retry=POLICY, in_flight_max_s=IN_FLIGHT_MAX,
        key_valid_s=key_valid_s,
    )  # fmt: skip


class _Task(NamedTuple):
    deadline: datetime | None


@cache
def _task(deadline: int | None) -> Any:
    """All that `admit` reads of a task."""
    return _Task(_instant(deadline))


@cache
def _history(past: Past) -> History:
    given: Mapping[str, Any] = {
        "settled": past.settled,
        "calls": past.calls,
        "first_attempt_at": _instant(past.first_attempt_at),
        "ambiguous_since": _instant(past.ambiguous_since),
        "ended_at": _instant(past.ended_at),
        "asks": past.asks,
        "first_ask_at": _instant(past.first_ask_at),
        "stopped": "stopped" if past.stopped else None,
    }
    return History(**given)


@cache
def _accounted(past: Past, attempt: int, interrupted: bool, ended: int | None, now: int) -> Past:
    claimed = Claimed(
        id=ID, kind="attempt.bank", epoch=1, attempts=attempt, interrupted=interrupted, payload=b"", progress=None,
        created_at=T0, claimed_at=_at(now), lease_ends=0.0, last_lease_ended_at=_instant(ended),
    )  # fmt: skip
    h = accounted(_history(past), claimed, LEASE)
    return Past(
        h.settled, h.calls, _seconds(h.first_attempt_at), _seconds(h.ambiguous_since), _seconds(h.ended_at), h.asks,
        _seconds(h.first_ask_at), h.stopped is not None,
    )  # fmt: skip


@cache
def _before(operation: Operation, past: Past, now: int, deadline: int | None) -> tuple[str | None, Next]:
    refused = admit(_task(deadline), POLICY, _history(past), _at(now))
    return refused, follow.before(operation, _history(past), _at(now), refused)


@cache
def _after_call(operation: Operation, past: Past, error: ErrorClass | None, now: int, deadline: int | None) -> Next:
    return follow.after_call(
        operation, POLICY, _history(past), error, _at(now), id_=ID, deadline=_instant(deadline)
    )


@cache
def _after_ask(operation: Operation, past: Past, found: Found, now: int, deadline: int | None) -> Next:
    refused = admit(_task(deadline), POLICY, _history(past), _at(now))
    return follow.after_ask(
        operation, POLICY, _history(past), found, ErrorClass.AMBIGUOUS, _at(now), id_=ID, refused=refused
    )
