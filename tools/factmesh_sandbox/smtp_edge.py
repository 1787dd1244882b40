"""The mail server: accepts, rejects, or accepts and never says so, for each recipient as its fault rule wants.
An accepted message is logged before it is acknowledged; nothing is ever delivered anywhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
from email import message_from_bytes, policy
from email.message import EmailMessage
from hashlib import sha256
from typing import Any

from aiosmtpd.smtp import SMTP

from factmesh.clock import Clock
from factmesh_sandbox import wire
from factmesh_sandbox.journal import Journal, JournalError, Row
from factmesh_sandbox.model import FaultRule, Mail
from factmesh_sandbox.switchboard import Switchboard

#: The prefix of the headers whose values the log keeps as the message's ids.
IDS_PREFIX = "x-factmesh-"


class SmtpEdge:
    """The hooks that aiosmtpd calls, and the factory of its protocol."""

    def __init__(self, mail: Mail, journal: Journal, switchboard: Switchboard, clock: Clock) -> None:
        self._mail = mail
        self._journal = journal
        self._switchboard = switchboard
        self._clock = clock
        # aiosmtpd logs each message's lines when it is asked for debug output: content stays out of our logs.
        logging.getLogger("mail.log").setLevel(logging.ERROR)

    def protocol(self) -> SMTP:
        """A fresh protocol for one connection."""
        return SMTP(
            self, data_size_limit=self._mail.size_bytes_max, enable_SMTPUTF8=True, hostname="sandbox.invalid",
            ident="factmesh-sandbox", loop=asyncio.get_running_loop(),
        )  # fmt: skip

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        """Meet the recipient's fault: a rejection now, a drop at the end of the message."""
        fault = self._switchboard.strike(self._mail.name, "send", address.lower())
        if fault and fault.fault in ("reject_temporary", "reject_permanent"):
            status = 451 if fault.fault == "reject_temporary" else 550
            try:
                await self._journal.commit(self._call(address, b"", status=status, answered=True, fault=fault))
            except JournalError as error:
                return f"451 4.3.0 {error}"
            temporary = "451 4.2.1 mailbox busy, try again later"
            return temporary if status == 451 else "550 5.1.1 no such mailbox"
        if not hasattr(envelope, "faults"):
            envelope.faults = {}
        envelope.faults[address] = fault
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """Log the message and acknowledge it, or carry out its recipients' fault."""
        faults: dict[str, FaultRule | None] = getattr(envelope, "faults", {})
        struck = {address: fault for address, fault in faults.items() if fault is not None}
        content = bytes(envelope.original_content)
        slow = max((fault.delay_s for fault in struck.values() if fault.fault == "slow"), default=0.0)
        if slow:
            await self._clock.sleep(slow)
        kinds = {fault.fault for fault in struck.values()}
        dropped = kinds & {"drop_before", "drop_after"}
        # With both wanted in one message, the harder case is played: it is accepted.
        accepted = "drop_before" not in kinds or "drop_after" in kinds
        rows = [
            self._call(address, content, status=None if dropped else 250, answered=not dropped, fault=faults[address])
            for address in envelope.rcpt_tos
        ]
        if accepted:
            rows.append(self._row(envelope, content, min(kinds) if kinds else None, answered=not dropped))
        try:
            await self._journal.commit(*rows)
        except JournalError as error:
            return f"451 4.3.0 {error}"
        if dropped:
            wire.reset(server.transport)
            # aiosmtpd cancels this handler when the connection is lost, which is now.
            await asyncio.Event().wait()
        return "250 2.0.0 accepted"

    def _call(
        self, address: str, content: bytes, *, status: int | None, answered: bool, fault: FaultRule | None
    ) -> Row:
        return "add_call", {
            "seq": self._journal.call_seq(), "at": self._clock.now().isoformat(), "system": self._mail.name,
            "operation": "send", "method": "SMTP", "path": address, "idempotency_key": None, "correlation_id": None,
            "traceparent": None, "subject": address.lower(), "body_sha256": sha256(content).hexdigest(),
            "fault": fault.fault if fault else None, "retry_after_s": None, "status": status, "replayed": False,
            "answered": answered,
        }  # fmt: skip

    def _row(self, envelope: Any, content: bytes, fault: str | None, *, answered: bool) -> Row:
        message = message_from_bytes(content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        ids = {name.lower(): str(value) for name, value in message.items() if name.lower().startswith(IDS_PREFIX)}
        return "add_mail", {
            "seq": self._journal.mail_seq(), "at": self._clock.now().isoformat(), "mail_from": envelope.mail_from or "",
            "rcpt_to": json.dumps(envelope.rcpt_tos), "message_id": _header(message, "message-id"),
            "subject": _header(message, "subject"), "ids": json.dumps(ids), "body": _text(message), "fault": fault,
            "answered": answered,
        }  # fmt: skip


def _header(message: EmailMessage, name: str) -> str | None:
    value = message.get(name)
    return None if value is None else str(value).strip()


def _text(message: EmailMessage) -> str:
    part = message.get_body(preferencelist=("plain", "html"))
    if part is None:
        return ""
    try:
        return str(part.get_content()).replace("\r\n", "\n")
    except (LookupError, UnicodeError):
        return bytes(part.get_payload(decode=True) or b"").decode("utf-8", "replace")
