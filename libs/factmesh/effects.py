"""What a decision may ask for: a closed union of values that the loops carry out after `decide` has returned.
Nothing here does anything; a decision that needs something else extends this union and the loops together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime
from typing import Any
from uuid import UUID

from factmesh.errors import OnBehalf, Reason
from factmesh.values import frozen_value


@frozen_value
class Publish:
    """Emit one record of ours. The loop completes the envelope: ce_id, ce_source, ce_time, traceparent, cause_id.

    Attributes:
        topic: short name in the topic table, e.g. `fact`, `result`, or `command.<connector>`.
        record: the record's name, e.g. `fact`, `command`, `result`, `signal`, `status`: a subject `factmesh.<record>`.
        key: the Kafka key, as text.
        body: every other field of the record; `correlation_id`, `actor`, `business_object_*`, `instance_id` and
            `instance_seq` default to those of the message that caused it.
        id: an explicit id where the rule says so (a result's derives from command id and epoch), else derived.
    """

    topic: str
    record: str
    key: str
    body: Mapping[str, Any]
    id: UUID | None = None


@frozen_value
class Schedule:
    """Write a row that some replica claims when it is due (timers, attempts, sends): DESIGN section 3b.

    Attributes:
        kind: which claim loop works on it.
        id: the row's id; a row that exists already is left as it is, unless it ended `failed`: then it starts over.
        due_at: when it may be claimed; ignored when `start_now`.
        payload: what to do, opaque to the loop.
        start_now: insert it already claimed by this process, which begins right after the commit.
        tag: what a `Unschedule` or an operator finds it by (an instance id), or None.
        hand: what `payload` says, ready for use: given to the attempt where this very process starts it. It is never
            stored, so work must do the same with it as without.
    """

    kind: str
    id: UUID
    payload: bytes
    due_at: datetime | None = None
    start_now: bool = False
    tag: UUID | None = None
    hand: Any = field(default=None, repr=False, compare=False)


@frozen_value
class Unschedule:
    """Take a row back that is not settled yet; nothing happens where it is gone or settled."""

    kind: str
    id: UUID


@frozen_value
class Amend:
    """Settle a claims row from a message (a person's resolution): only from `expected` state, raising the epoch.

    The state was loaded under the row's lock, so the guard can only fail where a decision is wrong (INV-F).
    `state` is `done`, `failed` or `pending` (due again at once, `progress` replaced).
    """

    kind: str
    id: UUID
    expected: str
    state: str
    progress: bytes | None = None


@frozen_value
class Discard:
    """The message ends `discarded`: understood and deliberately not applied, with the reason in the ledger."""

    reason: str


@frozen_value
class MarkLedger:
    """Change the disposition of an earlier ledger row: a kept fact that went stale, a discarded command.

    `original` is the kept delivery (`message.pack_delivery`) that goes to the DLQ when `disposition` is `dead`, filed
    to the quarantine record that `on_behalf` names, where it is not its own.
    """

    root: str
    disposition: str
    reason: Reason
    detail: str
    original: bytes | None = None
    on_behalf: OnBehalf | None = None


@frozen_value
class Note:
    """Facts for the message's ledger row: the step, the version and commit it was decided by, what it touched (B10)."""

    fields: Mapping[str, Any] = field(default_factory=dict)


Effect = Publish | Schedule | Unschedule | Amend | Discard | MarkLedger | Note
