"""The error classes and the one hierarchy: a class of failure decides what happens next, never an exception's type.
No handling lives here, and nothing catches `Exception` to decide: what is not a `FactmeshError` is a bug.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class ErrorClass(StrEnum):
    """What kind of failure it was. The class decides: wait, retry, compensate, escalate, stop (REQUIREMENTS C3)."""

    TRANSIENT = "transient"
    THROTTLED = "throttled"
    VALIDATION = "validation"
    PERMISSION = "permission"
    CONFLICT = "conflict"
    NOT_FOUND = "not_found"
    AMBIGUOUS = "ambiguous"
    BUG = "bug"


#: Classes after which the same attempt may succeed later.
RETRYABLE = frozenset({ErrorClass.TRANSIENT, ErrorClass.THROTTLED})


class Reason(StrEnum):
    """Why a message lies on a DLQ: the header `factmesh-dlq-reason` (DESIGN section 9)."""

    DECODE = "decode"
    SCHEMA = "schema"
    VALIDATION = "validation"
    CONFLICT = "conflict"
    BUSINESS = "business"
    EXHAUSTED = "exhausted"
    UNKNOWN = "unknown"
    STALE = "stale"
    BUG = "bug"


@dataclass(frozen=True, slots=True)
class OnBehalf:
    """A message that dies for another: the quarantine record that its death belongs to (DESIGN section 9)."""

    root: str
    opening: int
    group: str


class FactmeshError(Exception):
    """The root. `str()` says what happened, to which thing, and what to do next.

    Attributes:
        error_class: decides what happens next.
        reason: what the DLQ record says when a message dies of it.
        where: the thing it happened to (a message's coordinates, a file and line, a field), or "".
        hint: what to do next, or "".
        on_behalf: the quarantine record that the death is filed to, where it is not the message's own.
    """

    error_class: ErrorClass = ErrorClass.BUG
    reason: Reason = Reason.BUG

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        hint: str = "",
        error_class: ErrorClass | None = None,
        reason: Reason | None = None,
        on_behalf: OnBehalf | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        self.on_behalf = on_behalf
        if error_class is not None:
            self.error_class = error_class
        if reason is not None:
            self.reason = reason
        super().__init__(message)

    def about(self, where: str) -> Self:
        """A copy that names the message that it happened to; the place that it named stays in its text."""
        named = copy(self)
        named.message = f"{self.message} in {self.where}" if self.where else self.message
        named.where = where
        return named

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class DecodeError(FactmeshError):
    """Bytes that are not what their topic promises: no magic byte, torn, trailing bytes, not the schema's shape."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.DECODE


class SchemaError(FactmeshError):
    """A writer's schema that nobody knows, or that this reader cannot resolve."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.SCHEMA


class ValidationError(FactmeshError):
    """Decoded, and not acceptable: a missing field, a wrong type, an unmapped enum, a naive timestamp, too large."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.VALIDATION


class ConflictError(FactmeshError):
    """The same id with another body (REQUIREMENTS A4), or the same idempotency key with another body (INV-K)."""

    error_class = ErrorClass.CONFLICT
    reason = Reason.CONFLICT


class StaleError(FactmeshError):
    """Too old to be proved new, or of a day that the ledger no longer holds (DESIGN section 8)."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.STALE


class BusinessError(FactmeshError):
    """Refused by a declared rule of the workflow, not by a fault."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.BUSINESS


class TransientError(FactmeshError):
    """May succeed if tried again unchanged: the batch or attempt is retried, nothing is dead-lettered."""

    error_class = ErrorClass.TRANSIENT
    reason = Reason.EXHAUSTED


class DefinitionError(FactmeshError):
    """A file that people wrote (workflow, adapter, connector, policy, schema) is wrong; `where` names file and line."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.VALIDATION


class ExpressionError(FactmeshError):
    """An expression does not compile, or cannot be evaluated over these values."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.VALIDATION


class IllegalTransitionError(FactmeshError):
    """A pair (state, event) that the transition table does not hold; nothing was changed (INV-F)."""

    error_class = ErrorClass.BUG
    reason = Reason.BUG


class SettingsError(FactmeshError):
    """The process cannot start as configured."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.VALIDATION


def class_of(error: BaseException) -> ErrorClass:
    """The class of any exception: its own, or `bug` for one that is not ours."""
    return error.error_class if isinstance(error, FactmeshError) else ErrorClass.BUG


def reason_of(error: BaseException) -> Reason:
    """The DLQ reason of any exception: its own, or `bug` for one that is not ours."""
    return error.reason if isinstance(error, FactmeshError) else Reason.BUG
