"""The mail gateway against a server that says exactly what it is told to: what is known after each break."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import pytest

from factmesh.errors import ErrorClass, FactmeshError
from factmesh.secrets import Secret
from factmesh.smtp import MailAmbiguousError, MailNotSentError, MailRefusedError, Security, Server, send

GOOD = {"": "220 hello", "EHLO": "250 hello", "MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go", ".": "250 taken"}
DROP, SILENCE = "drop", "silence"
CONTENT = b"Subject: x\r\n\r\n.first\r\n..second\r\nlast"


@dataclass
class Script:
    """Answers by command; `.` is the one to the content. `drop` breaks the connection, `silence` says nothing."""

    answers: Mapping[str, str]
    commands: list[str] = field(default_factory=list)
    content: bytes = b""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            verb = ""
            while await self._say(writer, verb):
                line = await reader.readline()
                if not line:
                    break
                if verb == "DATA":
                    while line and line != b".\r\n":
                        self.content += line
                        line = await reader.readline()
                    verb = "."
                    continue
                verb = line.decode().split()[0].upper()
                self.commands.append(line.decode().strip())
        finally:
            writer.close()

    async def _say(self, writer: asyncio.StreamWriter, verb: str) -> bool:
        answer = self.answers.get(verb, "500 what")
        if answer == DROP:
            writer.transport.abort()
            return False
        if answer == SILENCE:
            await asyncio.sleep(30)
        writer.write(answer.encode() + b"\r\n")
        return True


@contextlib.asynccontextmanager
async def serving(**changes: str) -> AsyncIterator[tuple[Script, Server]]:
    names = {"greeting": "", "content": "."}
    script = Script({**GOOD, **{names.get(k, k): v for k, v in changes.items()}})
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(script(reader, writer))
        tasks.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield script, Server("127.0.0.1", server.sockets[0].getsockname()[1], Security.NONE, helo="mesh.example")
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def mail(server: Server, *to: str, timeout_s: float = 0.5) -> None:
    checked: list[bool] = []
    await send(
        server,
        "team@mesh.example",
        to or ("a@example.org",),
        CONTENT,
        timeout_s=timeout_s,
        before_content=lambda: checked.append(True),
    )
    assert checked == [True]


async def test_a_message_arrives_as_it_was_and_the_server_is_told_who_asks() -> None:
    """D1: lines that begin with a dot survive, every recipient is named, and no name of this machine is told."""
    async with serving() as (script, server):
        await mail(server, "a@example.org", "b@example.org")
        assert script.content == b"Subject: x\r\n\r\n..first\r\n...second\r\nlast\r\n"
        assert script.commands[0] == "EHLO mesh.example"
        assert [c for c in script.commands if c.startswith("RCPT")] == [
            "RCPT TO:<a@example.org>",
            "RCPT TO:<b@example.org>",
        ]


@pytest.mark.parametrize(
    ("changes", "kind", "error_class"),
    [
        ({"greeting": "421 busy"}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"greeting": "554 never"}, MailRefusedError, ErrorClass.VALIDATION),
        ({"greeting": DROP}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"greeting": SILENCE}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"MAIL": "451 later"}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"MAIL": "550 never a@example.org"}, MailRefusedError, ErrorClass.VALIDATION),
        ({"MAIL": "530 log in first"}, MailRefusedError, ErrorClass.PERMISSION),
        ({"RCPT": "450 later"}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"RCPT": "550 never a@example.org"}, MailRefusedError, ErrorClass.VALIDATION),
        ({"RCPT": SILENCE}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"DATA": "451 later"}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"DATA": "554 never"}, MailRefusedError, ErrorClass.VALIDATION),
        ({"DATA": DROP}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"DATA": SILENCE}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"content": "451 later"}, MailNotSentError, ErrorClass.TRANSIENT),
        ({"content": "554 never a@example.org"}, MailRefusedError, ErrorClass.VALIDATION),
        ({"content": DROP}, MailAmbiguousError, ErrorClass.AMBIGUOUS),
        ({"content": SILENCE}, MailAmbiguousError, ErrorClass.AMBIGUOUS),
        ({"content": "nonsense"}, MailAmbiguousError, ErrorClass.AMBIGUOUS),
        ({"content": "354 more"}, MailAmbiguousError, ErrorClass.AMBIGUOUS),
    ],
)
async def test_what_is_known_after_each_break(
    changes: dict[str, str], kind: type[FactmeshError], error_class: ErrorClass
) -> None:
    """⚑ C3: before the content everything is known not to have been sent, after it only what the server says; F5."""
    async with serving(**changes) as (_, server):
        with pytest.raises(kind) as caught:
            await mail(server)
        assert caught.value.error_class is error_class
        assert "a@example.org" not in str(caught.value)
        assert f"127.0.0.1:{server.port}" in str(caught.value)


async def test_one_refused_recipient_ends_it_for_all_before_the_content() -> None:
    """D2: there is no partial result: nobody gets what somebody was refused."""
    async with serving(RCPT="550 never") as (script, server):
        with pytest.raises(MailRefusedError):
            await mail(server, "a@example.org", "b@example.org")
        assert script.content == b""


async def test_the_last_check_can_still_stop_it() -> None:
    """⚑ DESIGN 5: what the check before the content raises is raised, and no byte of the content has left."""

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    async with serving() as (script, server):
        with pytest.raises(Stop):
            await send(server, "t@mesh.example", ["a@example.org"], CONTENT, timeout_s=1, before_content=stop)
        assert script.content == b""


async def test_a_server_that_is_not_there_was_not_reached() -> None:
    """C3: a refused connection is known not to have sent."""
    async with serving() as (_, server):
        pass
    with pytest.raises(MailNotSentError):
        await mail(server)


async def test_a_login_never_goes_out_in_the_clear_by_accident() -> None:
    """F5, G4: where STARTTLS is asked for and not offered, nothing is sent and the secret is not told."""
    async with serving() as (script, server):
        secure = Server(
            server.host, server.port, Security.STARTTLS, Secret("user", "ref+env://U"), Secret("hunter2", "ref+env://P")
        )
        with pytest.raises(MailRefusedError) as caught:
            await mail(secure)
        assert "hunter2" not in str(caught.value)
        assert not [c for c in script.commands if c.startswith(("AUTH", "MAIL"))]
