"""What a project's `demo.py` gives to `factmesh demo`: what is sent, what should come of it, and how an operator knows.
Values only; a process of another team brings its own generator, and nothing here knows what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Fate(StrEnum):
    """What the generator expects of one sending, before anybody triages."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    REFUSED = "refused"
    """Answered at once with a problem; nothing durable was made of it."""
    DEAD = "dead"
    """On the DLQ of the topic where facts arrive."""


class Remedy(StrEnum):
    """What an operator does with a dead one."""

    CORRECT = "correct"
    REPLAY = "replay"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Sending:
    """One fact on its way in: by HTTP (`headers` are ce-…) or on the Kafka topic (`headers` are ce_…)."""

    entrance: str
    source: str
    id: str
    headers: Mapping[str, str]
    body: bytes
    fate: Fate
    subject: str = ""
    remedy: Remedy | None = None
    correction: Mapping[str, str] = field(default_factory=dict)
    """PATH -> VALUE for `factmesh dlq correct --set`."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Effects:
    """Which effects one subject should have in the sandbox's log: (system, kind) -> how many, and mails by address."""

    effects: Mapping[tuple[str, str], int]
    mails: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        sendings: in the order in which they are sent.
        intended: by subject, what its workflow should have done once everything is triaged.
        look: the operator's phone call: (business object id, step, sandbox log) -> the answer that the system would
            have given, or None where it says that nothing happened.
        observe: from the sandbox's log, what really happened, by subject; mails stand under their recipient's subject.
    """

    sendings: Sequence[Sending]
    intended: Mapping[str, Effects]
    look: Callable[[str, str, Path], Mapping[str, Any] | None]
    observe: Callable[[Path], Mapping[str, Effects]]


PlanFactory = Callable[[int, int, Path], Plan]
"""`plan(how many sendings, seed, project folder)`, the function that a project's `demo.py` defines."""
