"""Judges a delivery by what the ledger holds of its root and of its own id: handle, repeat, conflict, or refuse.
Pure and total: the table of DESIGN section 9, "Openings", and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What happens to one delivery."""

    HANDLE = "handle"
    REPEAT = "repeat"
    REPUBLISH = "republish"
    """A redelivery from the recorded coordinates: what was emitted may not have gone out, so it goes out again."""
    CONFLICT = "conflict"
    """The same id with another body: dead, filed under its coordinates."""
    REFUSE = "refuse"
    """An opening of what is done already: dead again under its number, raising the root's `dead` row."""
    REFUSE_BESIDE = "refuse_beside"
    """As REFUSE, where the root's row is not `dead` and stays as it is: filed under the coordinates."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the ledger holds of one id."""

    disposition: str
    opening: int
    same_coordinates: bool
    same_body: bool


def judge(opening: int, root: Seen | None, own: Seen | None) -> Verdict:
    """`root` and `own` are the rows of the delivery's root and of its own id; both are the same row where the ids are.

    A mere duplicate publishes nothing, or one duplicate would ripple through the whole chain (DESIGN section 3).
    """
    if opening == 0:
        if root is None:
            return Verdict.HANDLE
        if root.same_coordinates:
            return Verdict.REPUBLISH
        return Verdict.REPEAT if root.same_body else Verdict.CONFLICT
    if root is not None and root.opening == opening:
        return Verdict.REPUBLISH if root.same_coordinates else Verdict.REPEAT
    if root is not None and (root.disposition != "dead" or root.opening > opening):
        return Verdict.REFUSE_BESIDE
    if own is not None and own.disposition != "dead":
        return Verdict.REFUSE if root is not None else Verdict.REFUSE_BESIDE
    return Verdict.HANDLE
