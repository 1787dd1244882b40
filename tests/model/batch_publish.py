"""The batch loop after its transaction: publications in flight, acknowledgements in any order, offsets, crashes.
A transaction is one step here (`batch_lock` takes it apart); what is judged is judged by the product's own `judge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

from tests.model.explore import Model, Rule, replaced

from factmesh.verdict import Seen, Verdict, judge

NAMES = ("A", "B")
COPIES_MAX = 3
KILLED_MAX = 2

#: What lies in the partition, by world. `a'` is a mere duplicate of `a`: the same id and body at another offset.
WORLDS: Mapping[str, tuple[str, ...]] = {
    "the partition holds a, b, and a once more, sent twice by its sender": ("a", "b", "a'"),
    "the partition holds a message whose emission is too large for its topic, then b": ("large", "b"),
    "the partition holds bytes that cannot be decoded, then b": ("junk", "b"),
    "the partition holds a message that kills the interpreter, then b": ("killer", "b"),
}


class Loop(NamedTuple):
    """One replica: its next offset, and the batches whose bytes are on their way: (offset, acknowledged)."""

    position: int = -1
    in_flight: tuple[tuple[int, bool], ...] = ()


AWAY = Loop()


class State(NamedTuple):
    """`ledger` has (id, offset, disposition); `copies` is how often each emission lies on its topic."""

    log: tuple[str, ...]
    loops: tuple[Loop, Loop] = (Loop(0), AWAY)
    owner: int = 0
    committed: int = 0
    ledger: frozenset[tuple[str, int, str]] = frozenset()
    copies: tuple[tuple[str, int], ...] = ()
    killed: int = 0
    crashes: int = 1
    lost_acks: int = 1
    rebalances: int = 1
    refusals: int = 1


def id_of(message: str) -> str:
    return message.rstrip("'")


class BatchPublish(Model[State]):
    NAME = "batch-publish"
    ABOUT = (
        "One partition, its owner, and after a rebalance a second owner beside a zombie. Up to two batches are in"
        " flight; acknowledgements come in any order or are lost; the DLQ may refuse a record. Crash at each step."
    )
    ACTIONS = frozenset({"handle", "repeat", "ack", "lost_ack", "refused", "offset", "crash", "rebalance", "killed"})
    RULES: ClassVar = {
        "offsets-after-publish": Rule(
            "offsets", "offsets are committed when the batch's bytes are acknowledged",
            "they are committed with the transaction", "INV-L",
        ),
        "offsets-in-order": Rule(
            "offsets", "offsets never pass a batch that is not yet published, however many are in flight",
            "the newest acknowledged batch's offset is committed", "INV-L",
        ),
        "redelivery-publishes": Rule(
            "ripple", "a redelivery from the recorded coordinates publishes the ledger's bytes again",
            "what is in the ledger is taken for published", "INV-L",
        ),
        "duplicate-is-silent": Rule(
            "ripple", "a mere duplicate, from other coordinates, publishes nothing",
            "every repeat publishes the ledger's bytes again", "RIPPLE",
        ),
        "too-large-dies-in-decide": Rule(
            "size", "an emission too large for its topic fails in `decide`, before the commit, and its message is dead",
            "the broker is left to refuse it", "INV-L",
        ),
        "dlq-blocks-offset": Rule(
            "", "a DLQ that cannot be written blocks the offset; nothing is dropped",
            "a refused DLQ record is logged, and the loop goes on", "INV-L",
        ),
        "careful-start": Rule(
            "", "after an unclean stop messages go one by one, with a durable mark, and are dead at the limit",
            "a start after an unclean stop is like any other", "INV-L",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        for world, log in WORLDS.items():
            yield world, State(log)

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        for i, loop in enumerate(s.loops):
            if loop.position < 0:
                continue
            if loop.position < len(s.log) and len(loop.in_flight) < 2:
                yield from self._handle(s, i, loop)
            yield from self._publish(s, i, loop)
            if i == s.owner:
                yield from self._offset(s, i, loop)
            if s.crashes and (loop.in_flight or loop.position > s.committed):
                yield "crash", f"{NAMES[i]} crashes", self._restarted(s, i)._replace(crashes=s.crashes - 1)
        if s.rebalances:
            loops = (s.loops[0], Loop(s.committed))
            yield (
                "rebalance", "the partition goes to B, A does not know it yet",
                s._replace(loops=loops, owner=1, rebalances=0),
            )  # fmt: skip

    def _restarted(self, s: State, i: int) -> State:
        """The process is gone with all that it had in hand; the owner begins again where the offsets are."""
        loop = Loop(s.committed) if i == s.owner else AWAY
        return s._replace(loops=_loops(s, i, loop))

    def _handle(self, s: State, i: int, loop: Loop) -> Iterable[tuple[str, str, State]]:
        name, at = NAMES[i], loop.position
        message = s.log[at]
        row = next((r for r in s.ledger if r[0] == id_of(message)), None)
        seen = Seen(row[2], 0, same_coordinates=row[1] == at, same_body=True) if row else None
        verdict = judge(0, seen, seen)
        if verdict is Verdict.REPEAT and not self.on("duplicate-is-silent"):
            verdict = Verdict.REPUBLISH
        if verdict is Verdict.REPUBLISH and not self.on("redelivery-publishes"):
            verdict = Verdict.REPEAT
        if verdict is not Verdict.HANDLE:
            again = verdict is Verdict.REPUBLISH
            what = "it goes out again" if again else "nothing goes out"
            after = _loops(s, i, Loop(at + 1, (*loop.in_flight, (at, not again))))
            yield "repeat", f"{name} finds {message} (offset {at}) in the ledger: {what}", s._replace(loops=after)
            return
        if message == "killer" and (s.killed < KILLED_MAX or not self.on("careful-start")):
            after_death = self._restarted(s, i)
            if self.on("careful-start"):
                after_death = after_death._replace(killed=s.killed + 1)
            yield "killed", f"{name} dies of the message at offset {at}", after_death
            return
        dead = message in ("junk", "killer") or (message == "large" and self.on("too-large-dies-in-decide"))
        ledger = s.ledger | {(id_of(message), at, "dead" if dead else "done")}
        loops = _loops(s, i, Loop(at + 1, (*loop.in_flight, (at, False))))
        yield (
            "handle", f"{name} commits {message} (offset {at}) as {'dead' if dead else 'done'}",
            s._replace(ledger=ledger, loops=loops),
        )  # fmt: skip

    def _publish(self, s: State, i: int, loop: Loop) -> Iterable[tuple[str, str, State]]:
        name = NAMES[i]
        for n, (at, acked) in enumerate(loop.in_flight):
            if acked:
                continue
            what = id_of(s.log[at])
            dead = any(r[0] == what and r[2] == "dead" for r in s.ledger)
            if what == "large" and not dead:
                continue  # the broker refuses it for ever
            where = f"dlq({what})" if dead else f"emitted({what})"
            there = s._replace(copies=_one_more(s.copies, where))
            done = Loop(loop.position, replaced(loop.in_flight, n, (at, True)))
            yield "ack", f"{where} of {name} is written and acknowledged", there._replace(loops=_loops(s, i, done))
            if s.lost_acks:
                text = f"{where} of {name} is written, the acknowledgement is lost"
                yield "lost_ack", text, there._replace(lost_acks=s.lost_acks - 1)
            if dead and s.refusals:
                dropped = s if self.on("dlq-blocks-offset") else s._replace(loops=_loops(s, i, done))
                yield "refused", f"the broker refuses {where}", dropped._replace(refusals=s.refusals - 1)

    def _offset(self, s: State, i: int, loop: Loop) -> Iterable[tuple[str, str, State]]:
        count = 0
        if not self.on("offsets-after-publish"):
            count = len(loop.in_flight)
        elif not self.on("offsets-in-order"):
            count = max((n + 1 for n, (_, acked) in enumerate(loop.in_flight) if acked), default=0)
        else:
            while count < len(loop.in_flight) and loop.in_flight[count][1]:
                count += 1
        if count:
            offset = max(s.committed, loop.in_flight[count - 1][0] + 1)
            kept = loop.in_flight[count:]
            if not (self.on("offsets-after-publish") and self.on("offsets-in-order")):
                kept = tuple((at, acked) for at, acked in loop.in_flight if not acked)  # they go on being published
            after = s._replace(loops=_loops(s, i, Loop(loop.position, kept)), committed=offset)
            yield "offset", f"{NAMES[i]} commits the offset {offset}", after

    def broken(self, s: State) -> str | None:
        copies = dict(s.copies)
        for at in range(s.committed):
            what = id_of(s.log[at])
            on_its_way = any(s.log[o] == s.log[at] and not acked for loop in s.loops for o, acked in loop.in_flight)
            if not copies.get(f"emitted({what})") and not copies.get(f"dlq({what})") and not on_its_way:
                return f"INV-L: the offset has passed {what}, which is nowhere, and nobody will publish it"
        if copies.get("emitted(a)", 0) > 3 - s.crashes - s.lost_acks - s.rebalances + 1:
            return (
                f"RIPPLE: emitted(a) lies {copies['emitted(a)']} times on its topic without a fault of ours;"
                " every service behind doubles it again"
            )
        return None

    def unrest(self, s: State) -> str | None:
        for at in range(s.committed, len(s.log)):
            return f"INV-L: {s.log[at]} (offset {at}) blocks its partition for ever, and what is behind it too"
        return None


def _loops(s: State, i: int, loop: Loop) -> tuple[Loop, Loop]:
    return (loop, s.loops[1]) if i == 0 else (s.loops[0], loop)


def _one_more(copies: tuple[tuple[str, int], ...], what: str) -> tuple[tuple[str, int], ...]:
    now = dict(copies)
    now[what] = min(COPIES_MAX, now.get(what, 0) + 1)
    return tuple(sorted(now.items()))
