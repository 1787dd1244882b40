"""Same cause, same id: message ids, idempotency keys, body hashes and poison, each in a world of its own.
Ids and keys are made by the product's `ids` and judged by its `judge`; a switch leaves one part out of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple
from uuid import UUID

from tests.model.explore import Model, Rule

from factmesh import ids
from factmesh.verdict import Seen, Verdict, judge

INSTANT_MS = 1_772_352_000_000
INSTANCE = ids.entrance_id("model", "instance", INSTANT_MS)

#: What is emitted because of what: (name, service, root, opening, ordinal), and after which other emission it can be.
EMISSIONS: tuple[tuple[str, str, str, int, int, str], ...] = (
    ("parked(r)", "connector", "r", 0, 0, ""),
    ("released(r)", "connector", "r", 1, 0, "parked(r)"),
    ("result(r)", "connector", "r", 1, 1, "parked(r)"),
    ("told(r)", "notifier", "r", 0, 0, ""),
    ("parked(q)", "connector", "q", 0, 0, ""),
)


class State(NamedTuple):
    """`sent` is on its way as (name, id); `known` is what the receiver has in its ledger; `done` in order."""

    world: str
    step: str = ""
    sent: frozenset[tuple[str, UUID]] = frozenset()
    known: frozenset[tuple[UUID, str]] = frozenset()
    emitted: frozenset[str] = frozenset()
    done: tuple[str, ...] = ()
    records: int = 0


class Identity(Model[State]):
    NAME = "identity"
    ABOUT = (
        "Five small worlds: emissions of two services, roots and openings; a person's act whose tool is killed; the"
        " attempts and runs of one step; a sender's repeats; bytes that nobody can decode, redelivered."
    )
    ACTIONS = frozenset({"emit", "receive", "act", "again", "call", "run", "send", "poison", "redeliver"})
    RULES: ClassVar = {
        "id-has-service": Rule("ids", "message ids derive from the service", "the service is left out", "INV-L"),
        "id-has-root": Rule("ids", "… from the root id of the cause", "the root is left out", "INV-L"),
        "id-has-opening": Rule("ids", "… from the opening", "the opening is left out", "INV-L"),
        "id-has-ordinal": Rule("ids", "… and from the ordinal of the effect", "the ordinal is left out", "INV-L"),
        "act-keeps-its-instant": Rule(
            "ids", "acts of people take the instant recorded at their entrance", "they take that of each publication",
            "INV-X",
        ),
        "key-is-derived": Rule(
            "ids", "the idempotency key derives from (instance, step path, iteration, run)",
            "each attempt draws a key", "INV-X",
        ),
        "new-key-after-failure": Rule(
            "ids", "a new run, with a new key, comes only after a known failure", "a retry is a new run at once",
            "INV-X",
        ),
        "one-body-under-a-key": Rule(
            "ids", "another body under the key comes only after a known failure", "the corrected body goes out at once",
            "INV-K",
        ),
        "hash-without-ce-time": Rule(
            "ids", "the body hash leaves out `ce_time`, which senders restamp", "`ce_time` is hashed", "INV-D"
        ),
        "hash-with-occurred-at": Rule(
            "ids", "the body hash never leaves out `occurred_at`", "`occurred_at` is left out", "INV-L"
        ),
        "poison-by-coordinates": Rule(
            "ids", "poison is gated by its coordinates", "bytes that nobody can decode have no row", "INV-D"
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield "a receiver that knows messages by their id", State("emissions")
        yield "a person's act, told to the orchestrator", State("act")
        yield "a step's command, at a downstream that honours keys", State("key", step="first")
        yield "a fact that its sender repeats, restamped, and another under the same id", State("repeats")
        yield "bytes that nobody can decode", State("poison")

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        worlds: dict[str, Any] = {
            "emissions": self._emissions, "act": self._act, "key": self._key, "repeats": self._repeats,
            "poison": self._poison,
        }  # fmt: skip
        yield from worlds[s.world](s)
        for name, id_ in sorted(s.sent):
            yield from self._receive(s._replace(sent=s.sent - {(name, id_)}), name, id_)

    def _receive(self, s: State, name: str, id_: UUID) -> Iterable[tuple[str, str, State]]:
        first = next((n for known, n in s.known if known == id_), None)
        if first is None:
            after = s._replace(known=s.known | {(id_, name)}, done=tuple(sorted((*s.done, name))))
            yield "receive", f"`{name}` is handled", after
        else:
            lost = s._replace(step=f"`{name}` is lost: its id is that of `{first}`") if name != first else s
            yield "receive", f"`{name}` is taken for `{first}`, which has its id, and dropped", lost

    def _emissions(self, s: State) -> Iterable[tuple[str, str, State]]:
        for name, service, root, opening, ordinal, after in EMISSIONS:
            if name not in s.emitted and (not after or after in s.emitted):
                id_ = ids.message_id(
                    service if self.on("id-has-service") else "",
                    root if self.on("id-has-root") else "",
                    opening if self.on("id-has-opening") else 0,
                    ordinal if self.on("id-has-ordinal") else 0,
                    INSTANT_MS,
                )
                text = f"{service} emits `{name}`: opening {opening} of root {root}, effect {ordinal}"
                yield "emit", text, s._replace(emitted=s.emitted | {name}, sent=s.sent | {(name, id_)})

    def _act(self, s: State) -> Iterable[tuple[str, str, State]]:
        if s.step == "":
            id_ = ids.entrance_id("retry_step", "record:1", INSTANT_MS)
            after = s._replace(step="published", sent=s.sent | {("act", id_)})
            yield "act", "the tool publishes the act and is killed", after
        elif s.step == "published":
            instant = INSTANT_MS if self.on("act-keeps-its-instant") else INSTANT_MS + 1
            id_ = ids.entrance_id("retry_step", "record:1", instant)
            yield "again", "the next tool publishes it again", s._replace(step="twice", sent=s.sent | {("act", id_)})

    def _key(self, s: State) -> Iterable[tuple[str, str, State]]:
        """Calls (name = body, id = key) that the downstream tells apart by their key alone."""
        runs = {"first": 1, "second": 2, "third": 2}
        run = runs.get(s.step, 0)
        if not run:
            return
        draw = 0 if self.on("key-is-derived") else len(s.emitted)
        key = ids.idempotency_key(INSTANCE, "pay", draw, run)
        if len(s.emitted) < 3:
            called = s._replace(emitted=s.emitted | {f"call {len(s.emitted)} of run {run}: body 1"})
            yield "call", f"run {run} calls, no answer comes", called._replace(sent=s.sent | {("payment", key)})
        known_failed = not s.emitted  # nothing was sent: the only failure that is known in this world
        if s.step == "first" and (known_failed or not self.on("new-key-after-failure")):
            yield "run", "a person's retry begins run 2, under its own key", s._replace(step="second")
        if s.step == "first" and s.emitted and not self.on("one-body-under-a-key"):
            after = s._replace(step="mended", emitted=s.emitted | {"call 9 of run 1: body 2"})
            yield "run", "the workflow is mended: run 1 calls with another body", after

    def _repeats(self, s: State) -> Iterable[tuple[str, str, State]]:
        """(ce_time, occurred_at): the fact, its repeat, and what is another fact under the same id."""
        sends = {"fact": (1, 1), "its repeat": (2, 1), "another fact under its id": (2, 2)}
        first = {"fact"} if not s.emitted else set()
        for name, (ce_time, occurred_at) in sends.items():
            if name in s.emitted or (s.emitted and name in first) or (not s.emitted and name != "fact"):
                continue
            after = s._replace(emitted=s.emitted | {name})
            seen = None
            if name != "fact":
                seen = Seen("done", 0, False, same_body=self._hash(1, 1) == self._hash(ce_time, occurred_at))
            verdict = judge(0, seen, seen)
            if verdict is Verdict.CONFLICT:
                yield "send", f"the sender sends {name}: a conflict", after._replace(records=s.records + 1)
            elif verdict is Verdict.REPEAT:
                yield "send", f"the sender sends {name}: a repeat", after
            else:
                yield "send", f"the sender sends a {name}, and it is handled", after._replace(done=(*s.done, name))

    def _hash(self, ce_time: int, occurred_at: int) -> bytes:
        parts = ["data"]
        if not self.on("hash-without-ce-time"):
            parts.append(str(ce_time))
        if self.on("hash-with-occurred-at"):
            parts.append(str(occurred_at))
        return ids.body_hash(*parts)

    def _poison(self, s: State) -> Iterable[tuple[str, str, State]]:
        if s.step == "":
            text = "they are dead-lettered, and the service crashes before it commits the offset"
            yield "poison", text, s._replace(step="crashed", records=1)
        elif s.step == "crashed":
            seen = Seen("dead", 0, True, True) if self.on("poison-by-coordinates") else None
            again = judge(0, seen, seen) is Verdict.HANDLE
            text = "they are redelivered: " + ("a death like any other" if again else "the same DLQ record goes out")
            yield "redeliver", text, s._replace(step="over", records=s.records + int(again))

    def broken(self, s: State) -> str | None:
        if s.done.count("payment") > 1 or s.done.count("act") > 1:
            what = "payment" if "payment" in s.done else "act"
            return f"INV-X: one {what} is carried out twice, under two ids"
        if s.world == "emissions" and s.step:
            return f"INV-L: {s.step}"
        if s.world == "key" and len({name.rpartition(": ")[2] for name in s.emitted}) > 1:
            return "INV-K: two bodies under one key, and no failure between them is known"
        if s.world == "repeats" and s.records > int("another fact under its id" in s.emitted):
            return "INV-D: a record is open for what was only sent twice"
        if s.world == "repeats" and s.records < int("another fact under its id" in s.emitted):
            return "INV-L: another fact is dropped as a repeat, in silence"
        if s.world == "poison" and s.records > 1:
            return "INV-D: one message has two DLQ records"
        return None

    def unrest(self, s: State) -> str | None:
        lost = s.emitted - set(s.done) if s.world == "emissions" else set()
        return f"INV-L: `{min(lost)}` is lost" if lost else None
