"""The gateway to aiosmtplib: one message to one server, and after a failure whether it may have been accepted.
No policy lives here; error texts name the server and its status only, because answers may quote addresses.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import aiosmtplib

from factmesh.errors import ErrorClass, FactmeshError, Reason, TransientError
from factmesh.secrets import Secret

_START_INPUT = 354
_LINE_START_DOT = re.compile(rb"(?m)^\.")
#: A server that lost its login is a matter of credentials, not of this message (RFC 4954, 6).
_PERMISSION = frozenset({530, 534, 535, 538})


class Security(StrEnum):
    """How the connection is protected."""

    NONE = "none"
    STARTTLS = "starttls"
    TLS = "tls"


@dataclass(frozen=True, slots=True)
class Server:
    """Where mail is handed over. `helo` is the name that we give ourselves."""

    host: str
    port: int
    security: Security = Security.STARTTLS
    username: Secret | None = None
    password: Secret | None = None
    helo: str = "localhost"

    @property
    def name(self) -> str:
        return f"{self.host}:{self.port}"


class MailNotSentError(TransientError):
    """The server refused for now, or was not reached: it is known not to have taken the message."""


class MailRefusedError(FactmeshError):
    """The server refused for good: the same message again would not be taken either."""

    error_class = ErrorClass.VALIDATION
    reason = Reason.EXHAUSTED


class MailAmbiguousError(FactmeshError):
    """The content went out, or may have, and no answer says whether the server took it."""

    error_class = ErrorClass.AMBIGUOUS
    reason = Reason.UNKNOWN


async def send(
    server: Server,
    sender: str,
    recipients: Sequence[str],
    content: bytes,
    *,
    timeout_s: float,
    before_content: Callable[[], None],
) -> None:
    """Hand one message over: up to `timeout_s` until the server asks for the content, as long again for its answer.

    All recipients or none: one that is refused ends it before the content. `before_content` runs right before the
    content leaves; what it raises is raised here, and nothing was sent. Returns when the server has taken the message.
    Raises MailNotSentError, MailRefusedError, MailAmbiguousError.
    """
    client = aiosmtplib.SMTP(
        hostname=server.host,
        port=server.port,
        local_hostname=server.helo,
        timeout=timeout_s,
        use_tls=server.security is Security.TLS,
        start_tls=server.security is Security.STARTTLS,
        username=server.username.reveal() if server.username is not None else None,
        password=server.password.reveal() if server.password is not None else None,
    )
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await _envelope(client, server, sender, recipients)
        except (aiosmtplib.SMTPException, TimeoutError, OSError, ValueError) as error:
            raise _before_content(server, error) from None
        before_content()
        try:
            async with asyncio.timeout(timeout_s):
                code = await _content(client, content)
        except (aiosmtplib.SMTPException, TimeoutError, OSError) as error:
            raise MailAmbiguousError(
                f"mail server {server.name} gave no answer to the content ({type(error).__name__})",
                hint="it may have been accepted",
            ) from None
        if not 200 <= code < 300:
            raise _refused(server, code, "the content")
    finally:
        # No QUIT: the answer is in, and a round trip more could only fail.
        client.close()


async def _envelope(client: aiosmtplib.SMTP, server: Server, sender: str, recipients: Sequence[str]) -> None:
    await client.connect()
    await client.mail(sender)
    for recipient in recipients:
        await client.rcpt(recipient)
    answer = await client.execute_command(b"DATA")
    if answer.code != _START_INPUT:
        raise _refused(server, answer.code, "DATA")


async def _content(client: aiosmtplib.SMTP, content: bytes) -> int:
    """The answer's status. By hand, because the library's own call does not tell a lost DATA from a lost content."""
    protocol = client.protocol
    if protocol is None:
        raise aiosmtplib.SMTPServerDisconnected("Connection lost")
    body = _LINE_START_DOT.sub(b"..", content)
    protocol.write(body + (b"" if body.endswith(b"\r\n") else b"\r\n") + b".\r\n")
    answer = await protocol.read_response()
    return answer.code


def _before_content(server: Server, error: Exception) -> FactmeshError:
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return _refused(server, error.code, "the envelope")
    # The library's plain SMTPException: STARTTLS or a login was asked for, and the server offers none.
    unusable = type(error) in (aiosmtplib.SMTPException, aiosmtplib.SMTPNotSupported) or isinstance(error, ValueError)
    if unusable:
        return MailRefusedError(
            f"mail server {server.name} cannot be used as configured ({type(error).__name__})",
            hint="correct the channel's security and login, or the addresses",
        )
    return MailNotSentError(
        f"mail server {server.name} was not reached or broke off before the content ({type(error).__name__})",
        hint="nothing was sent; the attempt is repeated as declared",
    )


def _refused(server: Server, code: int, what: str) -> FactmeshError:
    """RFC 5321, 4.2.1: 4yz is for now, 5yz for good; anything else after the content says nothing."""
    text = f"mail server {server.name} answered {code} to {what}"
    if 400 <= code < 500:
        return MailNotSentError(text, hint="nothing was sent; the attempt is repeated as declared")
    if code in _PERMISSION:
        return MailRefusedError(text, hint="correct the channel's login", error_class=ErrorClass.PERMISSION)
    if 500 <= code < 600:
        return MailRefusedError(text, hint="correct the recipient or the channel, then replay")
    if what == "the content":
        return MailAmbiguousError(text, hint="it may have been accepted")
    return MailNotSentError(text, hint="nothing was sent; the attempt is repeated as declared")
