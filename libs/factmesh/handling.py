"""What a handler is, and what its loop hands around: the service's side of a batch, and one delivery on its way.
Values only; the transaction that uses them is `batch`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar
from uuid import UUID

from factmesh import claims, ids
from factmesh.effects import Effect
from factmesh.errors import OnBehalf
from factmesh.ids import Root
from factmesh.message import Delivery, Emission, Message
from factmesh.postgres import Connection
from factmesh.telemetry import Hop
from factmesh.verdict import Verdict

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Change(Generic[S]):
    """What a batch did to one object: the state that was loaded, the state to save, and the messages that led there."""

    key: str
    before: S | None
    after: S
    steps: Sequence[tuple[Message, Sequence[Effect]]]


@dataclass(frozen=True, slots=True)
class Dead:
    """A delivery that died in this transaction; `message` is None where it could not be decoded."""

    delivery: Delivery
    message: Message | None
    error: BaseException


@dataclass(frozen=True)
class Handler(Generic[S]):
    """What a service does with some topics.

    `load` must lock what it loads: safety comes from the row lock on the business object, not from the partition.
    `decide` is pure; a `FactmeshError` from it kills its message only. `dead` is told, inside the transaction, of
    what died.

    `projection` True promises that `save` guards each row by a number that the messages carry (`instance_seq`), so
    that one which comes again or late changes nothing. Then a message that is applied and asks for nothing else leaves
    no ledger row; one that dies, is opened, is discarded or has effects is handled and recorded as ever.
    """

    topics: Callable[[], Sequence[str]]
    decode: Callable[[Delivery], Message]
    load: Callable[[Connection, Sequence[Message], datetime], Awaitable[Mapping[str, S]]]
    key: Callable[[Message], str]
    decide: Callable[[S, Message, datetime], tuple[S, Sequence[Effect]]]
    save: Callable[[Connection, Sequence[Change[S]]], Awaitable[None]]
    initial: Callable[[Message], S]
    name: str = ""
    identify: Callable[[Delivery], Root | None] = lambda _delivery: None
    dead: Callable[[Connection, Sequence[Dead]], Awaitable[None]] | None = None
    schema_id: Callable[[Delivery], int | None] = lambda _delivery: None
    projection: bool = False


@dataclass(slots=True)
class Item:
    """One delivery on its way through a batch."""

    delivery: Delivery
    message: Message | None
    error: BaseException | None
    root: Root
    own: Root
    opening: int
    hash: bytes
    attempts: int = 1
    verdict: Verdict = Verdict.HANDLE
    beside: bool = False
    ledger_id: UUID | None = None
    disposition: str = "done"
    detail: str | None = None
    note: Mapping[str, Any] | None = None
    emissions: Sequence[Emission] = ()
    traceparent: str | None = None
    hop: Hop | None = None

    @property
    def simple(self) -> bool:
        """Whether the fast path may try it: an undisturbed first sight."""
        return self.opening == 0 and self.error is None and not self.beside

    @property
    def plain(self) -> bool:
        """Whether its decision changed its object, and nothing else is to be told of it."""
        return self.disposition == "done" and self.error is None and not self.emissions and self.note is None

    @property
    def order(self) -> tuple[str, int, int]:
        return (self.delivery.topic, self.delivery.partition, self.delivery.offset)

    def on_behalf(self, group: str) -> OnBehalf | None:
        """A refused word on a command dies for the record that it was about, under the number that it was said with.

        A park under an id of its own would outlive the next word: only the record's own numbers cancel it.
        """
        message = self.message
        if message is None or message.kind != "resolution" or self.verdict is not Verdict.HANDLE:
            return None
        root = f"id:{message['command_id']}"
        if message["record_id"] != str(ids.record_id(root, group)):
            return None
        return OnBehalf(root, message["opening"], group)

    def diagnosis(self) -> dict[str, Any]:
        """The record's fields that a death tells. A dead command names itself: the result of a person's word on it
        ends its park. Its conflicting twin does not: that word is about the body that lives.
        """
        message = self.message
        record = dict(message.record) if message is not None else {}
        if message is not None and message.kind == "command" and self.verdict is Verdict.HANDLE:
            record["command_id"] = record["ce_id"]
        return record


@dataclass(slots=True)
class Outcome:
    """What a committed batch leaves to do: bytes to publish in offset order, rows to start, timers to wake for."""

    emissions: list[Emission]
    started: list[claims.Claimed]
    scheduled: Mapping[str, datetime]
    items: Sequence[Item]


def ids_of(message: Message | None) -> dict[str, str]:
    """What a span is found by, the same ids as in the logs."""
    if message is None:
        return {}
    record = message.record
    found = {
        "messaging.message.id": str(message.id or ""),
        "factmesh.correlation_id": record.get("correlation_id"),
        "factmesh.instance_id": record.get("instance_id"),
    }
    return {name: str(value) for name, value in found.items() if value}
