"""The batch loop's transaction: two replicas, two messages about one object, and every order of their statements.
Publishing is one step here, `batch_publish` is its model; who owns a partition is left open, so anyone may be a zombie.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from tests.model.explore import Model, Rule, replaced

from factmesh.verdict import Seen, Verdict, judge

MESSAGES = ("m1", "m2")
NAMES = ("A", "B")
HOLDS_LOCK = {"locked", "loaded"}
HOLDS_ID = {"claimed", "waiting", "locked", "loaded"}


class Replica(NamedTuple):
    """`read` is the state that it loaded, as the messages applied so far; `stopped`: it will never go on."""

    phase: str = "idle"
    message: str = ""
    read: tuple[str, ...] = ()
    stopped: bool = False


IDLE = Replica()


class State(NamedTuple):
    """`applied` is the object's state and its sequence; ledger, out and offsets hold what is there of each message."""

    replicas: tuple[Replica, ...] = (IDLE, IDLE)
    applied: tuple[str, ...] = ()
    ledger: frozenset[str] = frozenset()
    out: frozenset[str] = frozenset()
    offsets: frozenset[str] = frozenset()
    crashes: int = 1
    doubts: int = 1
    stops: int = 1


class BatchLock(Model[State]):
    NAME = "batch-lock"
    ABOUT = (
        "Two replicas handle two messages about one business object, from different partitions; either may be a zombie"
        " that handles what the other handles too. A crash at each step, a commit whose outcome is unknown, a replica"
        " that stops in the middle of its transaction."
    )
    ACTIONS = frozenset(
        {"take", "insert", "repeat", "lock", "wait", "granted", "load", "commit", "doubt", "publish", "offset",
         "crash", "stop", "timeout"}
    )  # fmt: skip
    RULES: ClassVar = {
        "row-lock": Rule(
            "lock", "the row lock on the business object carries safety, not the partition",
            "state is loaded and saved without locking the object's row", "INV-F",
        ),
        "load-inside-lock": Rule(
            "lock", "state is only ever written from a load inside its lock",
            "state is loaded first and locked before it is saved", "INV-F",
        ),
        "read-after-wait": Rule(
            "lock", "the state is read in a statement after the lock, whose snapshot is older than the wait for it",
            "one statement locks and reads: its snapshot is that of its beginning", "INV-F",
        ),
        "insert-claims-id": Rule(
            "lock", "the id is inserted, unique, before anything is decided",
            "the ledger is read for the id, and the row is written with the state", "INV-X",
        ),
        "unknown-commit-retries": Rule(
            "lock", "a commit whose outcome is unknown is transient: the batch is tried again",
            "it is taken for committed", "INV-L",
        ),
        "timeout-frees-locks": Rule(
            "lock", "transaction_timeout frees a stopped replica's locks", "locks are held until their holder goes on",
            "INV-L",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield "m1 and m2 are about one object and lie in two partitions", State()

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        for i, r in enumerate(s.replicas):
            if r.stopped:
                if self.on("timeout-frees-locks"):
                    yield "timeout", f"PostgreSQL ends {NAMES[i]}'s transaction", self._with(s, i, IDLE)
                continue
            yield from self._steps(s, i, r)
            if r.phase not in ("idle", "begun") and s.crashes:
                yield "crash", f"{NAMES[i]} crashes", self._with(s, i, IDLE)._replace(crashes=s.crashes - 1)
            if r.phase in HOLDS_ID and s.stops:
                stopped = self._with(s, i, r._replace(stopped=True))
                yield "stop", f"{NAMES[i]} stops for good, its transaction open", stopped._replace(stops=s.stops - 1)

    def _with(self, s: State, i: int, r: Replica) -> State:
        return s._replace(replicas=replaced(s.replicas, i, r))

    def _steps(self, s: State, i: int, r: Replica) -> Iterable[tuple[str, str, State]]:
        name, other = NAMES[i], s.replicas[1 - i]
        if r.phase == "idle":
            for m in MESSAGES:
                if m not in s.offsets:
                    early = s.applied if not self.on("load-inside-lock") else ()
                    text = f"{name} begins {m}" + ("" if self.on("load-inside-lock") else f" and loads {_shown(early)}")
                    yield "take", text, self._with(s, i, Replica("begun", m, early))
        elif r.phase == "begun":
            yield from self._insert(s, i, r, other)
        elif r.phase in ("claimed", "waiting"):
            yield from self._lock(s, i, r, other)
        elif r.phase == "locked":
            read = s.applied if self.on("load-inside-lock") and self.on("read-after-wait") else r.read
            yield "load", f"{name} reads {_shown(read)}", self._with(s, i, r._replace(phase="loaded", read=read))
        elif r.phase == "loaded":
            yield from self._commit(s, i, r)
        elif r.phase == "committed":
            out = s.out | {r.message}
            yield (
                "publish", f"{name} publishes what {r.message} emitted",
                self._with(s, i, r._replace(phase="published"))._replace(out=out),
            )  # fmt: skip
        elif r.phase == "published":
            yield (
                "offset", f"{name} commits the offset of {r.message}",
                self._with(s, i, IDLE)._replace(offsets=s.offsets | {r.message}),
            )  # fmt: skip

    def _insert(self, s: State, i: int, r: Replica, other: Replica) -> Iterable[tuple[str, str, State]]:
        name = NAMES[i]
        seen = Seen("done", 0, same_coordinates=True, same_body=True) if r.message in s.ledger else None
        if judge(0, seen, seen) is Verdict.REPUBLISH:
            # Redelivered from the recorded coordinates: nothing but the publication is done again.
            yield (
                "repeat", f"{name} finds {r.message} in the ledger: handled already",
                self._with(s, i, r._replace(phase="committed", read=())),
            )  # fmt: skip
        elif self.on("insert-claims-id"):
            if not (other.message == r.message and other.phase in HOLDS_ID):
                yield "insert", f"{name} inserts the id of {r.message}", self._with(s, i, r._replace(phase="claimed"))
        else:
            yield "insert", f"{name} does not find {r.message}", self._with(s, i, r._replace(phase="claimed"))

    def _lock(self, s: State, i: int, r: Replica, other: Replica) -> Iterable[tuple[str, str, State]]:
        name = NAMES[i]
        if not self.on("row-lock"):
            after = self._with(s, i, r._replace(phase="loaded", read=s.applied))
            yield "load", f"{name} reads {_shown(s.applied)}, unlocked", after
            return
        # One statement that locks and reads takes its snapshot when it begins, not when it is granted.
        snapshot = s.applied if not self.on("read-after-wait") else r.read
        if other.phase in HOLDS_LOCK:
            if r.phase == "claimed":
                after = self._with(s, i, r._replace(phase="waiting", read=snapshot))
                yield "wait", f"{name} waits for the lock", after
        elif r.phase == "claimed":
            yield "lock", f"{name} locks the object", self._with(s, i, r._replace(phase="locked", read=snapshot))
        else:
            yield "granted", f"{name} is granted the lock", self._with(s, i, r._replace(phase="locked"))

    def _commit(self, s: State, i: int, r: Replica) -> Iterable[tuple[str, str, State]]:
        name, m = NAMES[i], r.message
        written = s._replace(applied=(*r.read, m), ledger=s.ledger | {m})
        yield "commit", f"{name} commits {m} as the object's message {len(r.read) + 1}", self._with(
            written, i, r._replace(phase="committed", read=())
        )
        if s.doubts:
            # On: the batch begins anew, whatever became of the commit. Off: it goes on as if it had been committed.
            again = Replica("begun", m) if self.on("unknown-commit-retries") else Replica("committed", m)
            for state, became in ((written, "it was committed"), (s, "it was not")):
                after = self._with(state, i, again)._replace(doubts=s.doubts - 1)
                yield "doubt", f"{name}'s connection is cut in the commit of {m}; {became}", after

    def broken(self, s: State) -> str | None:
        for m in MESSAGES:
            if s.applied.count(m) > 1:
                return f"INV-X: {m} is applied twice"
            if m in s.ledger and m not in s.applied:
                return f"INV-F: {m} is `done` in the ledger and its change is overwritten: {_shown(s.applied)}"
            if m in s.offsets and (m not in s.ledger or m not in s.out):
                what = "handled" if m not in s.ledger else "published"
                return f"INV-L: the offset of {m} is committed, and it was never {what}"
        return None

    def unrest(self, s: State) -> str | None:
        for m in MESSAGES:
            if m not in s.offsets:
                return f"INV-L: {m} is not handled, and nobody can handle it"
        return None


def _shown(applied: tuple[str, ...]) -> str:
    return f"the object with {' and '.join(applied)}" if applied else "the empty object"
