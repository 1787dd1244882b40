"""What the service asks of a connector, declared in YAML or written in Python: the plug-in's whole interface.
No connector lives here. A plug-in is an entry point of the group `factmesh.connectors` that makes a `Connector`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from factmesh.errors import ErrorClass, FactmeshError, Reason
from factmesh_connector.model import Operation, Strategy

__all__ = ["CallContext", "CallFailed", "Connector", "Operation", "Strategy"]


class CallFailed(FactmeshError):
    """A call's end that is no success, with its class (REQUIREMENTS C3).

    `ambiguous` says that it may have worked; every other class says that it is known not to have. In doubt: ambiguous.
    The text goes into results, logs and DLQ headers: name the operation and the status, never what was sent or read.
    """

    reason = Reason.EXHAUSTED

    def __init__(
        self, message: str, error_class: ErrorClass, *, hint: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, hint=hint, error_class=error_class)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a call carries besides its input (REQUIREMENTS C7), and the check it makes before the first byte."""

    idempotency_key: str
    correlation_id: str
    traceparent: str | None
    #: `business_object_type`, `business_object_id`, `instance_id`, `step`, `workflow`, and the two ids above.
    command: Mapping[str, str] = field(repr=False)
    #: Call it when the connection stands and nothing was sent; it raises where the lease no longer covers the timeout.
    before_first_byte: Callable[[], None]


class Connector(Protocol):
    """One system of record.

    `call` carries an operation out and returns its output, a JSON object. It raises a FactmeshError whose class says
    what happened; any other exception counts as a bug after the call, so as ambiguous. The service repeats, waits and
    gives up by the `Operation`; `call` itself never repeats.
    """

    @property
    def name(self) -> str: ...

    @property
    def operations(self) -> Mapping[str, Operation]: ...

    async def call(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any]: ...

    async def look_up(
        self, operation: str, input: Mapping[str, Any], ctx: CallContext
    ) -> Mapping[str, Any] | None:
        """What the operation would have answered if an earlier call with this input worked; None if none did.

        Asked for strategy `lookup` only. Raises as `call` does when there is no usable answer.
        """
        ...

    async def close(self) -> None: ...
