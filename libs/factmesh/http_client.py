"""The gateway to httpx2: one request out, one whole answer in, and after a failure whether a byte had left before it.
No policy lives here: what a status means, whether to repeat and what to map belong to the caller.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2

from factmesh.errors import ErrorClass, FactmeshError, Reason, TransientError, ValidationError

#: A bound on memory, not on answers: what a mapping keeps of an answer is capped much lower.
RESPONSE_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 200
KEEPALIVE_S = 5.0
#: What every request says unless its caller says otherwise.
_HEADERS = {"accept": "*/*", "accept-encoding": "gzip, deflate", "user-agent": "factmesh"}

#: The event of the transport's trace hook that comes after connecting and right before the first byte of a request.
_FIRST_BYTE = ("http11.send_request_headers.started", "http2.send_request_headers.started")


class NotSentError(TransientError):
    """No byte of the request left: name resolution, connect or TLS failed, or no connection came free in time."""


class AmbiguousError(FactmeshError):
    """The request may have been received and carried out, and no answer says so."""

    error_class = ErrorClass.AMBIGUOUS
    reason = Reason.UNKNOWN


@dataclass(frozen=True, slots=True)
class Request:
    """What to send. `url` is complete and escaped; its text, the headers and the body never enter logs or errors."""

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    body: bytes | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """What an error text may name of the address."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer. Header names are in lower case; a repeated one is joined by commas."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds to wait that a `Retry-After` asks for (RFC 9110, 10.2.3: seconds or a date); None where it says nothing.

    A date in the past is 0. Nonsense is None: a downstream's mistake must not stop the retry.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text) if len(text) <= 9 else float(10**9)
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - now).total_seconds())


def _nothing() -> None:
    """The check of a caller that has none."""


class HttpClient:
    """A pool of connections. Redirects are not followed, and no setting is read from the environment.

    `fresh` requests use a new connection each: on a kept one a server's close can cross the request on the wire, and
    the caller could not tell whether it was received. That is worth a round trip where it costs a person's time.
    """

    def __init__(self, *, connections_max: int = CONNECTIONS_MAX, verify: bool = True) -> None:
        kept = httpx2.Limits(
            max_connections=connections_max, max_keepalive_connections=connections_max, keepalive_expiry=KEEPALIVE_S
        )
        fresh = httpx2.Limits(max_connections=connections_max, max_keepalive_connections=0)
        # Transports, not the vendor's clients: those would follow redirects, keep cookies and merge settings, and take
        # a third of the time of a call in not doing so.
        self._kept = httpx2.AsyncHTTPTransport(verify=verify, trust_env=False, limits=kept)
        self._fresh = httpx2.AsyncHTTPTransport(verify=verify, trust_env=False, limits=fresh)

    async def close(self) -> None:
        await self._kept.aclose()
        await self._fresh.aclose()

    async def send(
        self,
        request: Request,
        *,
        timeout_s: float,
        before_first_byte: Callable[[], None] = _nothing,
        fresh: bool = False,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
    ) -> Response:
        """Send, and read the whole answer, within `timeout_s` in all.

        `before_first_byte` runs on the open connection right before the request leaves; what it raises is raised here,
        and nothing was sent. Raises NotSentError when nothing was sent, AmbiguousError when something may have been.
        """
        sent = False

        async def watch(event: str, _info: Mapping[str, Any]) -> None:
            nonlocal sent
            if event in _FIRST_BYTE:
                before_first_byte()
                sent = True

        transport = self._fresh if fresh else self._kept
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(transport, request, watch, response_bytes_max)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            # LocalProtocolError: a header or method that may not go out; h11 refuses it before it writes.
            raise ValidationError(
                f"{request.method} to {request.host} is not a valid HTTP request: {type(error).__name__}",
                hint="correct the connector's address, path or headers",
            ) from None
        except (httpx2.HTTPError, httpx2.StreamError, TimeoutError, OSError) as error:
            raise _classified(request, error, sent=sent, timeout_s=timeout_s) from None

    async def _exchange(
        self, transport: httpx2.AsyncHTTPTransport, request: Request, watch: Any, response_bytes_max: int
    ) -> Response:
        outgoing = httpx2.Request(
            request.method,
            request.url,
            params=request.query or None,
            headers={**_HEADERS, **{name.lower(): value for name, value in request.headers.items()}},
            content=request.body,
            extensions={"trace": watch},
        )
        if outgoing.url.userinfo:
            raw = f"{outgoing.url.username}:{outgoing.url.password}".encode()
            outgoing.headers["authorization"] = "Basic " + b64encode(raw).decode()
        answer = await transport.handle_async_request(outgoing)
        try:
            body = bytearray()
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > response_bytes_max:
                    raise AmbiguousError(
                        f"{request.method} to {request.host} was answered {answer.status_code} with more than"
                        f" {response_bytes_max} bytes",
                        hint="ask for less, or raise the bound",
                    )
            return Response(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, bytes(body))
        finally:
            await answer.aclose()


def _classified(request: Request, error: BaseException, *, sent: bool, timeout_s: float) -> FactmeshError:
    """What a failed exchange means. Texts name host and kind only: httpx2's own may quote what was sent."""
    what = f"{request.method} to {request.host}"
    timed_out = isinstance(error, TimeoutError | httpx2.TimeoutException)
    if not sent:
        how = (
            f"could not connect within {timeout_s:g} s" if timed_out else f"could not connect ({type(error).__name__})"
        )
        return NotSentError(f"{what}: {how}; nothing was sent", hint="the attempt is repeated as declared")
    how = f"gave no whole answer within {timeout_s:g} s" if timed_out else f"broke off ({type(error).__name__})"
    return AmbiguousError(
        f"{what} {how}; it may have been carried out", hint="what follows is decided by the operation's strategy"
    )
