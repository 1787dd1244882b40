"""One attempt to notify: claimed, admitted, delivered, classified, and settled by what `follow` says.
The edge between rows and channels; no table of decisions and no protocol lives here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog

from factmesh.claim_loop import Death, Settlement
from factmesh.claims import Claimed
from factmesh.clock import Clock
from factmesh.errors import ErrorClass, FactmeshError, Reason, TransientError
from factmesh.message import unpack_delivery
from factmesh.metrics import Metrics
from factmesh.retry import RetryPolicy
from factmesh.telemetry import Hop
from factmesh_notifier import follow
from factmesh_notifier.follow import Answer, Move, Next
from factmesh_notifier.model import Channel, History, Sent, Task, recipients_hash, unpack_task
from factmesh_notifier.transports import Attempt, Transport, about

log = structlog.get_logger("factmesh.notifier")

#: Between the end of an attempt and its settlement: the lease must still be ours then.
SETTLE_MARGIN_S = 5.0
DONE = "done"


class LeaseTooShort(TransientError):
    """Nothing was sent: what is left of the lease does not cover the timeout, so somebody else may begin meanwhile."""


class NotificationFailed(FactmeshError):
    """A notification ended, and every attempt of it is known not to have worked."""

    reason = Reason.EXHAUSTED


class NotificationUnknown(FactmeshError):
    """A notification of which a person must find out whether it was sent."""

    error_class = ErrorClass.AMBIGUOUS
    reason = Reason.UNKNOWN


def lease_s(channel: Channel) -> float:
    """A lease covers the longest attempt, and its settlement."""
    return channel.longest_s + 2 * SETTLE_MARGIN_S


def admit(task: Task, policy: RetryPolicy, history: History, now: datetime) -> str | None:
    """Why no further attempt may begin, or None. Limits and breakers will live here."""
    if task.deadline is not None and now >= task.deadline:
        return f"the deadline {task.deadline.isoformat()} has passed"
    if history.sends >= policy.attempts_max:
        return f"all {policy.attempts_max} attempts are used up"
    return None


def accounted(history: History, row: Claimed, lease: float) -> History:
    """The history with the leases that ended without a settlement: each may have sent.

    When a lost lease began is not recorded: the latest one began `lease` before it ended, earlier ones not before the
    row did. The oldest counts, so that the doubt never makes a receiver's memory look longer than it is.
    """
    lost = row.attempts - 1 - history.settled
    if lost <= 0 and not row.interrupted:
        return history
    ended_at = row.last_lease_ended_at or row.claimed_at
    began_at = ended_at - timedelta(seconds=lease) if lost <= 1 else row.created_at
    since = began_at if history.ambiguous_since is None else min(began_at, history.ambiguous_since)
    return history.model_copy(
        update={
            "settled": row.attempts - 1,
            "sends": history.sends + max(1, lost),
            "first_attempt_at": history.first_attempt_at or began_at,
            "first_failed_at": history.first_failed_at or ended_at,
            "ambiguous_since": since,
            "ended_at": ended_at,
            "error_class": ErrorClass.AMBIGUOUS,
            "error_message": "an attempt was cut off before its outcome was recorded",
        }
    )


@dataclass(slots=True)
class _Try:
    """What one attempt works with. `began` ties PostgreSQL's clock, which judges, to this process's monotonic one."""

    row: Claimed
    task: Task
    delivery: bytes
    channel: Channel
    policy: RetryPolicy
    began: float
    sent: Sent | None = field(default=None)


class Sends:
    """The work of the claim kinds `send.<channel>`."""

    def __init__(
        self, channels: Mapping[str, Channel], transports: Mapping[str, Transport], clock: Clock, metrics: Metrics
    ) -> None:
        self._channels, self._transports = channels, transports
        self._clock, self._metrics = clock, metrics

    async def work(self, row: Claimed) -> Settlement:
        """One attempt, from the claim to what is to be settled."""
        task, delivery = unpack_task(row.payload)
        channel = self._channels[task.channel]
        one = _Try(row, task, delivery, channel, task.retry or channel.retry, self._clock.monotonic())
        history = accounted(History.from_bytes(row.progress), row, lease_s(channel))
        now = self._now(one)
        then = follow.before(channel, history, now, admit(task, one.policy, history, now))
        notes = {"factmesh.command_id": str(task.id), "factmesh.instance_id": str(task.instance_id)}
        with Hop(f"notify {task.channel}", task.traceparent, "client", notes) as hop:
            traceparent = hop.traceparent or task.traceparent
            if then.move is Move.SEND:
                try:
                    history, then = await self._send(one, history, traceparent)
                except LeaseTooShort as error:
                    log.warning("notifier.lease_too_short", **about(task), error=str(error))
                    then = Next(Move.WAIT)
            hop.note(**{"factmesh.move": str(then.move), "factmesh.attempt": row.attempts})
        return self._settlement(one, history, then, traceparent)

    def _now(self, one: _Try) -> datetime:
        return one.row.claimed_at + timedelta(seconds=self._clock.monotonic() - one.began)

    async def _send(self, one: _Try, history: History, traceparent: str | None) -> tuple[History, Next]:
        """The attempt, and what follows it."""
        task, channel, row = one.task, one.channel, one.row

        def covered() -> None:
            """⚑ Immediately before the first byte: does the lease still cover the timeout?"""
            left_s = row.lease_ends - self._clock.monotonic()
            if left_s < channel.timeout_s:
                raise LeaseTooShort(
                    f"{left_s:.1f} s of the lease are left and an attempt may take {channel.timeout_s:g} s",
                    where=f"notification {task.id}",
                    hint="nothing was sent; the attempt is claimed again at once",
                )

        covered()
        began_at, began = self._now(one), self._clock.monotonic()
        error: FactmeshError | None = None
        try:
            await self._transports[channel.name].deliver(task, Attempt(traceparent, channel.timeout_s, covered))
        except LeaseTooShort:
            raise
        except FactmeshError as failure:
            error = failure
        except Exception as bug:
            # Its text may quote anything, so only its type is told.
            log.error("notifier.bug", **about(task), exception=type(bug).__qualname__)
            error = FactmeshError(
                f"channel {channel.name} raised {type(bug).__qualname__}",
                hint="until it is corrected the outcome counts as unknown",
            )
        self._note(one, began_at, began, error)
        now = self._now(one)
        history = history.model_copy(
            update={"sends": history.sends + 1, "first_attempt_at": history.first_attempt_at or began_at}
        )
        error_class = error.error_class if error is not None else None
        then = follow.after(
            channel,
            one.policy,
            history,
            error_class,
            now,
            id_=task.id,
            deadline=task.deadline,
            retry_after_s=getattr(error, "retry_after_s", None),
        )
        if error is None:
            return history, then
        update: dict[str, Any] = {
            "first_failed_at": history.first_failed_at or now,
            "error_class": error.error_class,
            "error_message": error.message,
        }
        if follow.answer_of(error_class) is Answer.MAYBE:
            update |= {"ambiguous_since": history.ambiguous_since or began_at, "ended_at": now}
        return history.model_copy(update=update), then

    def _note(self, one: _Try, began_at: datetime, began: float, error: FactmeshError | None) -> None:
        """Record the attempt with its duration: in the table of sends, the metrics and the log."""
        task, seconds = one.task, self._clock.monotonic() - began
        ended = DONE if error is None else str(error.error_class)
        one.sent = Sent(
            task.channel, task.template, len(task.to), recipients_hash(task.to), began_at, int(seconds * 1000), ended
        )
        self._metrics.inc("factmesh_notifications_total", task.channel, ended)
        log.info(
            "notifier.attempt",
            **about(task),
            attempt=one.row.attempts,
            ended=ended,
            ms=one.sent.ms,
            error=error.message if error is not None else None,
        )

    # --- settling ----------------------------------------------------------------------------------------------------

    def _settlement(self, one: _Try, history: History, then: Next, traceparent: str | None) -> Settlement:
        task, row, now = one.task, one.row, self._now(one)
        history = history.model_copy(update={"settled": row.attempts})
        if then.move is Move.WAIT:
            return Settlement("pending", due_at=then.at, progress=history.to_bytes(), save=one.sent)
        if then.move is Move.DONE:
            return Settlement("done", progress=history.to_bytes(), save=one.sent)
        unknown = then.move is Move.UNKNOWN and not task.notice
        error = _ending(task, history, then, unknown=unknown)
        record = _record(task)
        death = Death(
            original=unpack_delivery(one.delivery),
            root=task.root,
            error=error,
            attempts=max(1, history.sends),
            first_failed_at=history.first_failed_at or now,
            record={**record, "traceparent": traceparent},
            # An exhausted notification has no step that waits for it: it is opened like any message.
            replayable=not unknown,
            opening=history.opening,
            group=task.group,
        )
        return Settlement(
            # A notice's receivers can tell a repeat by its id (`channels` takes no other channel for one), so what is
            # not known to have arrived may be sent again: no person is asked about it.
            "unknown" if unknown else "failed",
            progress=history.to_bytes(),
            cause=record,
            traceparent=traceparent,
            death=death,
            save=one.sent,
        )


def _ending(task: Task, history: History, then: Next, *, unknown: bool) -> FactmeshError:
    """Why a notification ended without having arrived for certain, for its DLQ record; no payload, no address."""
    last = history.error_message or "no attempt was made"
    text = f"{last}; {then.why}" if then.why else last
    where = f"notification {task.id} ({task.channel}, {task.template})"
    if unknown:
        hint = "find out whether it was sent, then: factmesh dlq resolve --happened {} | --not-happened"
        return NotificationUnknown(text, where=where, hint=hint)
    error_class = history.error_class or ErrorClass.TRANSIENT
    return NotificationFailed(text, where=where, hint="correct the cause, then replay", error_class=error_class)


def _record(task: Task) -> dict[str, Any]:
    """The message's fields that emissions inherit and diagnosis headers show.

    A notice that did not arrive parks nobody: the instance it tells of goes on as it was.
    """
    record: dict[str, Any] = {
        "correlation_id": task.correlation_id,
        "actor": task.actor,
        "business_object_type": task.business_object_type,
        "business_object_id": task.business_object_id,
        "instance_seq": task.instance_seq,
        "step": task.step,
        "workflow": task.workflow,
    }
    return record if task.notice else record | {"command_id": str(task.id), "instance_id": str(task.instance_id)}
