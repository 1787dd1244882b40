"""`channels.yaml` of a project, as typed models, and the channels and transports that it makes.
The only place where the notifier resolves secrets; errors name the file and line, never a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parseaddr
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from factmesh import secrets, webhook_signature, yaml
from factmesh.clock import Clock
from factmesh.document import Document
from factmesh.errors import DefinitionError
from factmesh.http_client import HttpClient
from factmesh.retry import RetryPolicy
from factmesh.smtp import Security, Server
from factmesh_notifier.decide import plausible
from factmesh_notifier.model import RECIPIENTS_MAX, Channel, ChannelKind, Rule
from factmesh_notifier.transports import LogLine, Mail, Transport, Webhook

FILE = "channels.yaml"
LOG_CHANNEL = "log"
"""There without being declared: a project needs no server to tell something."""
Name = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class _Declared(_Model):
    timeout_s: float = Field(default=10.0, gt=0, le=120)
    retry: RetryPolicy = RetryPolicy()
    in_flight_max_s: float = Field(default=60.0, ge=0, le=86_400)


class SmtpChannel(_Declared):
    """Mail by a plain SMTP client."""

    kind: Literal["smtp"]
    host: str = Field(min_length=1)
    port: int | str = 587
    sender: str = Field(alias="from", min_length=3)
    security: Security = Security.STARTTLS
    username: str | None = None
    password: str | None = None
    helo: str | None = None


class WebhookChannel(_Declared):
    """A signed webhook (Standard Webhooks)."""

    kind: Literal["webhook"]
    url: str = Field(min_length=1)
    secret: str = Field(min_length=1)
    key_valid_s: float = Field(default=86_400.0, gt=0, le=30 * 86_400)


class LogChannel(_Model):
    """A structured line in the service's log."""

    kind: Literal["log"]


class OwnerRule(_Model):
    """Tell an owner when an instance comes into a state."""

    name: Name
    workflow: str = Field(default="*", min_length=1)
    statuses: list[str] = Field(min_length=1)
    channel: Name
    to: str | list[str]
    template: Name | None = None


class ChannelsFile(_Model):
    """The whole file."""

    channels: dict[Name, Annotated[SmtpChannel | WebhookChannel | LogChannel, Field(discriminator="kind")]] = {}
    owners: list[OwnerRule] = []


@dataclass(frozen=True)
class Channels:
    """What the file makes."""

    channels: Mapping[str, Channel]
    transports: Mapping[str, Transport]
    rules: tuple[Rule, ...]


def load(project: Path | None, *, http: HttpClient, clock: Clock, environ: Mapping[str, str] | None = None) -> Channels:
    """Read and wire the project's channels. Raises DefinitionError or SecretError; then the service does not start."""
    path = project / FILE if project is not None else None
    document = yaml.load(path) if path is not None and path.is_file() else Document(FILE, {"channels": {}})
    return wire(parse(document), document, http=http, clock=clock, environ=environ)


def parse(document: Document) -> ChannelsFile:
    """The models. Raises DefinitionError with every problem, each with its line."""
    try:
        return ChannelsFile.model_validate(document.data)
    except pydantic.ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            path = tuple(part for part in item["loc"] if part not in ("smtp", "webhook", "log", "[key]"))
            problems.append(f"{document.where(path)}: {item['msg'].removeprefix('Value error, ')}")
        raise DefinitionError("; ".join(problems), hint="see services/notifier/README.md") from None


def wire(
    file: ChannelsFile, document: Document, *, http: HttpClient, clock: Clock, environ: Mapping[str, str] | None = None
) -> Channels:
    """Channels and transports, references resolved."""
    channels = {LOG_CHANNEL: Channel(LOG_CHANNEL, ChannelKind.LOG)}
    transports: dict[str, Transport] = {LOG_CHANNEL: LogLine()}
    for name, declared in file.channels.items():
        where = document.where(("channels", name))

        def text(value: str, where: str = where) -> str:
            return secrets.resolve_text(value, environ=environ, where=where)

        def secret(value: str, where: str = where) -> secrets.Secret:
            return secrets.resolve(value, environ=environ, where=where)

        if isinstance(declared, LogChannel):
            channels[name], transports[name] = Channel(name, ChannelKind.LOG), LogLine()
        elif isinstance(declared, SmtpChannel):
            channels[name] = _channel(name, ChannelKind.SMTP, declared)
            transports[name] = _mail(declared, text, secret, where)
        else:
            channels[name] = _channel(name, ChannelKind.WEBHOOK, declared, declared.key_valid_s)
            key = webhook_signature.key_of(secret(declared.secret).reveal(), where)
            transports[name] = Webhook(_url(text(declared.url), where), key, http, clock)
    rules = tuple(_rule(rule, n, channels, document, environ) for n, rule in enumerate(file.owners))
    if len({rule.name for rule in rules}) < len(rules):
        raise DefinitionError("two owner rules have one name", where=document.where(("owners",)), hint="rename one")
    return Channels(channels, transports, rules)


def _channel(name: str, kind: ChannelKind, declared: _Declared, key_valid_s: float = 86_400.0) -> Channel:
    return Channel(name, kind, declared.timeout_s, declared.retry, declared.in_flight_max_s, key_valid_s)


def _mail(declared: SmtpChannel, text: Any, secret: Any, where: str) -> Mail:
    sender = text(declared.sender)
    address = parseaddr(sender)[1]
    if not plausible(address, ChannelKind.SMTP):
        raise DefinitionError("`from` is no mail address", where=where, hint="write Name <name@example.com>")
    if (declared.username is None) is not (declared.password is None):
        raise DefinitionError("a login needs both", where=where, hint="give username and password, or neither")
    port = text(str(declared.port))
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise DefinitionError("`port` is no port number", where=where, hint="465, 587, 25, or a reference to one")
    server = Server(
        host=text(declared.host),
        port=int(port),
        security=declared.security,
        username=secret(declared.username) if declared.username is not None else None,
        password=secret(declared.password) if declared.password is not None else None,
        helo=declared.helo or address.rpartition("@")[2],
    )
    return Mail(server, sender)


def _url(url: str, where: str) -> str:
    if not url.startswith(("https://", "http://")):
        raise DefinitionError("`url` is no http address", where=where, hint="https://…, or a reference to one")
    return url


def _rule(
    rule: OwnerRule, n: int, channels: Mapping[str, Channel], document: Document, environ: Mapping[str, str] | None
) -> Rule:
    where = document.where(("owners", n))
    channel = channels.get(rule.channel)
    if channel is None:
        raise DefinitionError(
            f"no channel is called {rule.channel!r}", where=where, hint=f"there are: {', '.join(sorted(channels))}"
        )
    if not channel.repeatable:
        raise DefinitionError(
            f"owners are not told by {channel.kind}: its receivers cannot tell a repeat, and nobody resolves a notice",
            where=where,
            hint="use a webhook or log channel",
        )
    listed = [rule.to] if isinstance(rule.to, str) else rule.to
    to = tuple(secrets.resolve_text(one, environ=environ, where=where) for one in listed)
    if not 1 <= len(to) <= RECIPIENTS_MAX or not all(plausible(one, channel.kind) for one in to):
        raise DefinitionError("`to` names nobody that this channel can tell", where=where, hint="correct it")
    return Rule(rule.name, rule.workflow, frozenset(rule.statuses), rule.channel, to, rule.template)


def check_templates(rules: tuple[Rule, ...], names: frozenset[str]) -> None:
    """Raise DefinitionError for a rule whose template is not there."""
    for rule in rules:
        if rule.template is not None and rule.template not in names:
            raise DefinitionError(
                f"rule {rule.name!r} names template {rule.template!r}, which is not there",
                where=FILE,
                hint=f"there are: {', '.join(sorted(names)) or 'none'}",
            )
