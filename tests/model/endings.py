"""Cancel and compensation: an instance with one step done and one command outstanding, which may work at any time.
No compensation runs in this release, so nothing of the product is called; in `commands` a person ends a real instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from tests.model.explore import Model, Rule


class State(NamedTuple):
    """`command` is what the connector knows, `result` what the orchestrator was told of it."""

    rowless: bool = False
    command: str = "out"
    worked: bool = False
    record: str = ""
    result: str = ""
    cancelled: bool = False
    late: bool = False
    compensated: frozenset[str] = frozenset()
    ended: bool = False


class Endings(Model[State]):
    NAME = "endings"
    ABOUT = (
        "An instance whose first step is done and whose second is a command on its way; a person cancels it. The"
        " command works, fails, ends unknown, passes its deadline, or dies before it became a row."
    )
    ACTIONS = frozenset({"works", "done", "failed", "unknown", "deadline", "cancel", "result", "resolve", "discard",
                         "compensate", "end"})  # fmt: skip
    RULES: ClassVar = {
        "compensation-waits": Rule(
            "cancel", "cancel and compensation wait until outstanding results are in",
            "compensation begins when the person says so", "INV-X",
        ),
        "never-over-unknown": Rule(
            "failed", "compensation never runs over an unknown", "an unknown is compensated like a failure", "INV-X"
        ),
        "only-the-connector-ends": Rule(
            "failed", "only the connector ends a command", "the orchestrator fails a step at its deadline", "INV-X"
        ),
        "discard-is-a-resolution": Rule(
            "commands", "discarding a command that died before it was a row is a resolution: its result is `failed`",
            "its record is closed", "INV-L",
        ),
    }  # fmt: skip

    def initial(self) -> Iterable[tuple[str, State]]:
        yield "step 1 is done, the command of step 2 is at its connector", State()
        yield "step 1 is done, the command of step 2 died before it became a row", State(True, "dead", record="open")

    def moves(self, s: State) -> Iterable[tuple[str, str, State]]:
        if s.command in ("out", "unknown") and not s.rowless and not s.worked:
            yield "works", "the call works at the downstream", s._replace(worked=True)
        if s.command == "out":
            if s.worked:
                yield "done", "the connector settles the command: done", s._replace(command="done")
            else:
                yield "failed", "the connector settles it: known to have failed", s._replace(command="failed")
            unknown = s._replace(command="unknown", record="open")
            yield "unknown", "no answer comes: the connector settles it unknown", unknown
        if s.command in ("out", "unknown") and not s.late:
            yield "deadline", "the step's deadline passes", s._replace(late=True)
        if not s.cancelled:
            yield "cancel", "a person cancels the instance", s._replace(cancelled=True)
        if s.command in ("done", "failed") and not s.result and not s.ended:
            yield "result", f"the result comes: {s.command}", s._replace(result=s.command)
        if s.command == "unknown" and s.record == "open":
            known = "done" if s.worked else "failed"
            text = f"a person finds out that it {'happened' if s.worked else 'did not happen, and cannot any more'}"
            yield "resolve", text, s._replace(command=known, record="resolved")
        if s.rowless and s.record == "open":
            command = "failed" if self.on("discard-is-a-resolution") else "dead"
            yield "discard", "a person discards the command's record", s._replace(record="discarded", command=command)
        yield from self._compensate(s)

    def _known(self, s: State) -> str:
        """What the orchestrator takes the second step for."""
        if s.result:
            return s.result
        if s.late and not self.on("only-the-connector-ends"):
            return "failed"
        if s.command == "unknown" and not self.on("never-over-unknown"):
            return "failed"
        return "outstanding"

    def _compensate(self, s: State) -> Iterable[tuple[str, str, State]]:
        known = self._known(s)
        if not s.cancelled or s.ended or (known == "outstanding" and self.on("compensation-waits")):
            return
        done = {"step 1"} | ({"step 2"} if known == "done" else set())
        for step in sorted(done - s.compensated):
            yield "compensate", f"{step} is compensated", s._replace(compensated=s.compensated | {step})
        if done <= s.compensated:
            yield "end", "the instance ends, compensated", s._replace(ended=True)

    def broken(self, s: State) -> str | None:
        if s.ended and s.worked and "step 2" not in s.compensated:
            return "INV-X: the instance is compensated, and the effect of step 2 stands"
        return None

    def unrest(self, s: State) -> str | None:
        if s.cancelled and not s.ended:
            return "INV-L: the instance waits for ever for a result that nobody will send"
        return None
