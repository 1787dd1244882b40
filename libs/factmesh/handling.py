"""What a handler is, and what its loop hands around: the service's side of a batch, and one delivery on its way.
Values only; the transaction that uses them is `batch`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar
from uuid import UUID

from factmesh import claims
from factmesh.effects import Effect
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
    what died. `dead_letters` False makes a handler whose dead messages block instead (there is no DLQ of a DLQ).
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
    emissions: list[Emission] = field(default_factory=list)
    hop: Hop | None = None

    @property
    def simple(self) -> bool:
        """Whether the fast path may try it: an undisturbed first sight."""
        return self.opening == 0 and self.error is None and not self.beside

    @property
    def order(self) -> tuple[str, int, int]:
        return (self.delivery.topic, self.delivery.partition, self.delivery.offset)


@dataclass(slots=True)
class Outcome:
    """What a committed batch leaves to do: bytes to publish in offset order, rows to start, timers to wake for."""

    emissions: list[Emission]
    started: list[claims.Claimed]
    scheduled: Mapping[str, datetime]
    items: Sequence[Item]
