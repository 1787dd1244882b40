"""Order and memory: readers outside who see an instance's messages in any order, and how long each side remembers.
Nothing of the product is pure here but its idea; the real clocks are compared when a service starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from tests.model.explore import Model, Rule

STATUSES = ("waiting", "running", "completed")


class Reading(NamedTuple):
    """`topic` are the places in STATUSES as they lie there; `read` how far the reader is and what it shows."""

    topic: tuple[tuple[int, int], ...] = ()
    published: int = 0
    again: int = 1
    read: int = 0
    shown: tuple[int, int] = (-1, -1)


class Order(Model[Reading]):
    NAME = "order"
    ABOUT = "Three statuses of one instance, the first two of one batch; one is published again late, after a crash."
    ACTIONS = frozenset({"publish", "again", "read"})
    RULES: ClassVar = {
        "lower-is-ignored": Rule(
            "order", "readers outside ignore a lower `instance_seq` than they have seen", "what comes last is shown",
            "ORDER",
        ),
        "message-raises-seq": Rule(
            "lock", "each folded message raises the instance's `seq` by one", "each batch raises it by one", "ORDER"
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, Reading]]:
        yield "a reader who follows the status topic", Reading()

    def _seq(self, n: int) -> int:
        return n if self.on("message-raises-seq") else (0, 0, 1)[n]

    def moves(self, s: Reading) -> Iterable[tuple[str, str, Reading]]:
        if s.published < len(STATUSES):
            n = s.published
            yield (
                "publish", f"`{STATUSES[n]}` is published, seq {self._seq(n)}",
                s._replace(published=n + 1, topic=(*s.topic, (n, self._seq(n)))),
            )  # fmt: skip
        for n in range(s.published if s.again else 0):
            yield (
                "again", f"`{STATUSES[n]}`, seq {self._seq(n)}, is published again",
                s._replace(again=0, topic=(*s.topic, (n, self._seq(n)))),
            )  # fmt: skip
        if s.read < len(s.topic):
            n, seq = s.topic[s.read]
            old = seq < s.shown[1] and self.on("lower-is-ignored")
            text = f"the reader sees `{STATUSES[n]}`" + (" and ignores it" if old else " and shows it")
            yield "read", text, s._replace(read=s.read + 1, shown=s.shown if old else (n, seq))

    def broken(self, s: Reading) -> str | None:
        if s.read == len(s.topic) and s.published and s.shown[0] < s.published - 1:
            right, shown = STATUSES[s.published - 1], STATUSES[s.shown[0]]
            return f"ORDER: the instance is {right}, the reader has read everything, and shows {shown}"
        return None

    def unrest(self, s: Reading) -> str | None:
        return None


HORIZON, AUDIT, END = 2, 4, 6


class Days(NamedTuple):
    """`again` is how often it may still come; `handled` counts, the first time was on day 0."""

    kind: str
    today: int = 0
    again: int = 1
    handled: int = 1
    dead: bool = False


class Clocks(Model[Days]):
    NAME = "clocks"
    ABOUT = (
        f"In days: strangers' ids and emitted bytes live for {HORIZON}, ledger rows for {AUDIT}. A message that was"
        " handled on day 0 comes once more: a stranger's fact with any `ce_time`, bytes that its sender has"
        " recorded, one of ours that somebody kept for very long."
    )
    ACTIONS = frozenset({"day", "send", "republish", "old"})
    RULES: ClassVar = {
        "receiver-remembers-longer": Rule(
            "", "every receiver remembers ids longer than its sender can emit them again",
            "ledger rows live for one day, emitted bytes for two", "INV-X",
        ),
        "by-first-sight": Rule(
            "", "strangers' ids live for the horizon by first sight, never by a time that the sender sets",
            "they live by the sender's `ce_time`", "INV-X",
        ),
        "too-old-is-dead": Rule(
            "", "a fact whose `occurred_at` is older than the horizon goes to the DLQ, never through",
            "it goes through", "INV-X",
        ),
        "gone-day-is-stale": Rule(
            "", "a message of a day that is gone is dead, `stale`", "what is not in the ledger is new", "INV-X"
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, Days]]:
        yield "a stranger's fact that occurred on day 0, with a `ce_time` of long ago, is handled", Days("stranger")
        yield "a message of ours is handled; its sender has recorded its bytes", Days("ours")
        yield "a message of ours is handled; somebody keeps a copy of it", Days("old")

    def moves(self, s: Days) -> Iterable[tuple[str, str, Days]]:
        if s.today < END:
            yield "day", f"it is day {s.today + 1}", s._replace(today=s.today + 1)
        if not s.again:
            return
        after = s._replace(again=0)
        if s.kind == "stranger":
            lives = HORIZON if self.on("by-first-sight") else -END
            known, stale = s.today <= lives, s.today > HORIZON and self.on("too-old-is-dead")
            action, what = "send", "the fact is sent again"
        elif s.kind == "ours":
            if s.today > HORIZON:
                return  # the sender has the bytes no more
            known, stale = s.today < (AUDIT if self.on("receiver-remembers-longer") else 1), False
            action, what = "republish", "its sender publishes the bytes again"
        else:
            known, stale = s.today < AUDIT, s.today >= AUDIT and self.on("gone-day-is-stale")
            action, what = "old", "the copy comes"
        if known:
            yield action, f"{what}: a repeat", after
        elif stale:
            yield action, f"{what}: too old to be told from a repeat, it is dead", after._replace(dead=True)
        else:
            yield action, f"{what}: nobody remembers it, it is handled", after._replace(handled=s.handled + 1)

    def broken(self, s: Days) -> str | None:
        return f"INV-X: one message is handled {s.handled} times" if s.handled > 1 else None

    def unrest(self, s: Days) -> str | None:
        return None
