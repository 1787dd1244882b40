"""How each kind of channel carries a notification: mail, a signed webhook, a line in the log.
One attempt each, never a repeat; what follows its end is decided in `follow`. Texts and addresses reach no log.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from typing import Protocol

import structlog

from factmesh import http_client, smtp, webhook_signature
from factmesh.clock import Clock
from factmesh.errors import ErrorClass, FactmeshError, Reason
from factmesh.http_client import HttpClient, Request
from factmesh.message import rfc3339, to_ms
from factmesh_notifier.model import Task

log = structlog.get_logger("factmesh.notifier")

RESPONSE_BYTES_MAX = 65_536
"""Nothing of a receiver's answer is used but its status."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What an attempt is given besides the notification."""

    traceparent: str | None
    timeout_s: float
    #: Immediately before the first byte that counts: raises where the lease no longer covers the rest.
    before_first_byte: Callable[[], None]


class Transport(Protocol):
    """Returns when the receiver has taken it; raises a FactmeshError whose class says what happened otherwise."""

    async def deliver(self, task: Task, attempt: Attempt) -> None: ...


class RefusedError(FactmeshError):
    """A receiver's answer that is no success; `retry_after_s` is what it asked for."""

    reason = Reason.EXHAUSTED

    def __init__(self, message: str, error_class: ErrorClass, *, hint: str = "", retry_after_s: float | None = None):
        super().__init__(message, hint=hint, error_class=error_class)
        self.retry_after_s = retry_after_s


def trace_headers(task: Task, traceparent: str | None) -> dict[str, str]:
    """The ids by which a receiver and we find the same thing."""
    headers = {
        "X-Factmesh-Message-Id": str(task.id),
        "X-Factmesh-Correlation-Id": task.correlation_id,
        "X-Factmesh-Instance-Id": str(task.instance_id),
    }
    return headers | ({"traceparent": traceparent} if traceparent else {})


# --- mail ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mail:
    """A plain SMTP client. The Message-ID derives from the command, so that receivers can tell a duplicate."""

    server: smtp.Server
    sender: str

    async def deliver(self, task: Task, attempt: Attempt) -> None:
        content = letter(task, self.sender, attempt.traceparent).as_bytes(policy=SMTP)
        await smtp.send(
            self.server,
            parseaddr(self.sender)[1],
            task.to,
            content,
            timeout_s=attempt.timeout_s,
            before_content=attempt.before_first_byte,
        )


def letter(task: Task, sender: str, traceparent: str | None) -> EmailMessage:
    """The same message in every attempt, but for the trace."""
    mail = EmailMessage(policy=SMTP)
    mail["From"] = sender
    mail["To"] = ", ".join(task.to)
    mail["Subject"] = task.subject
    mail["Date"] = format_datetime(task.at)
    mail["Message-ID"] = f"<{task.id}@{parseaddr(sender)[1].rpartition('@')[2]}>"
    # RFC 3834: no holiday notice answers this.
    mail["Auto-Submitted"] = "auto-generated"
    for name, value in trace_headers(task, traceparent).items():
        mail[name] = " ".join(value.split())
    mail.set_content(task.text)
    if task.html is not None:
        mail.add_alternative(task.html, subtype="html")
        mail.set_boundary(f"fm-{task.id.hex}")
    return mail


# --- webhook ---------------------------------------------------------------------------------------------------------

#: What a status means. Every other 4xx is `validation`; every other one says nothing certain, and is repeated under the
#: same id.
STATUSES: dict[int, ErrorClass] = {
    401: ErrorClass.PERMISSION,
    403: ErrorClass.PERMISSION,
    404: ErrorClass.NOT_FOUND,
    408: ErrorClass.TRANSIENT,
    410: ErrorClass.NOT_FOUND,
    421: ErrorClass.TRANSIENT,
    425: ErrorClass.TRANSIENT,
    429: ErrorClass.THROTTLED,
    503: ErrorClass.TRANSIENT,
}


def class_of_status(status: int) -> ErrorClass | None:
    """None for success."""
    if 200 <= status < 300:
        return None
    return STATUSES.get(status) or (ErrorClass.VALIDATION if 400 <= status < 500 else ErrorClass.AMBIGUOUS)


@dataclass(frozen=True)
class Webhook:
    """A signed delivery by Standard Webhooks. The id is the notification's: a receiver takes a repeat once."""

    url: str = field(repr=False)
    key: bytes = field(repr=False)
    http: HttpClient
    clock: Clock

    async def deliver(self, task: Task, attempt: Attempt) -> None:
        body = payload(task)
        now = self.clock.now()
        headers = {
            "content-type": "application/json",
            **trace_headers(task, attempt.traceparent),
            **webhook_signature.headers(self.key, str(task.id), int(now.timestamp()), body),
        }
        request = Request("POST", self.url, headers, body=body)
        answer = await self.http.send(
            request,
            timeout_s=attempt.timeout_s,
            before_first_byte=attempt.before_first_byte,
            response_bytes_max=RESPONSE_BYTES_MAX,
        )
        error_class = class_of_status(answer.status)
        if error_class is not None:
            raise RefusedError(
                f"webhook {request.host} answered {answer.status}",
                error_class,
                hint="correct the receiver or the channel, then replay",
                retry_after_s=http_client.retry_after_s(answer.headers.get("retry-after"), self.clock.now()),
            )


def payload(task: Task) -> bytes:
    """`type`, `timestamp`, `data`, as Standard Webhooks asks; the same bytes in every attempt."""
    about: dict[str, object] = {
        "id": str(task.id),
        "template": task.template,
        "to": list(task.to),
        "subject": task.subject,
        "text": task.text,
        "data": json.loads(task.data),
        "correlation_id": task.correlation_id,
        "business_object_type": task.business_object_type,
        "business_object_id": task.business_object_id,
        "instance_id": str(task.instance_id),
        "instance_seq": task.instance_seq,
        "workflow": task.workflow,
        "step": task.step,
        "status": task.status,
    }
    kind = "factmesh.status" if task.notice else "factmesh.notification"
    value = {"type": kind, "timestamp": rfc3339(to_ms(task.at)), "data": about}
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


# --- log -------------------------------------------------------------------------------------------------------------


class LogLine:
    """One structured line with the ids: never the text, the data or an address (F5)."""

    async def deliver(self, task: Task, attempt: Attempt) -> None:
        attempt.before_first_byte()
        log.info("notification", **about(task), template=task.template, status=task.status, step=task.step)


def about(task: Task) -> Mapping[str, object]:
    """What every log line about a notification carries."""
    return {
        "correlation_id": task.correlation_id,
        "instance_id": str(task.instance_id),
        "message_id": str(task.id),
        "workflow": task.workflow,
        "channel": task.channel,
        "recipients": len(task.to),
    }
