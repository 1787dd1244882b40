"""The notifier's decisions, tables, channels and messages, without a broker, a database or a server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import ids, webhook_signature, yaml
from factmesh.claims import Claimed
from factmesh.clock import ManualClock, SystemClock
from factmesh.effects import Amend, Discard, Effect, MarkLedger, Publish, Schedule
from factmesh.errors import DefinitionError, ErrorClass, FactmeshError, SettingsError, ValidationError
from factmesh.http_client import HttpClient
from factmesh.ids import Root
from factmesh.message import Delivery, Message, pack_delivery, to_ms
from factmesh.metrics import Metrics
from factmesh.project import Project
from factmesh.retry import RetryPolicy
from factmesh.smtp import MailAmbiguousError, MailNotSentError, MailRefusedError
from factmesh.templates import Templates
from factmesh_notifier import channels, follow, transports
from factmesh_notifier.decide import decide, decide_status, object_key, plausible, watched_key
from factmesh_notifier.follow import AFTER, BEFORE, Answer, Move
from factmesh_notifier.model import (
    Catalogue,
    Channel,
    ChannelKind,
    History,
    Row,
    Rule,
    State,
    Task,
    Watched,
    pack_task,
    unpack_task,
)
from factmesh_notifier.send import Sends, accounted, lease_s
from factmesh_sandbox import webhooks as receiver

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
NOW_MS = to_ms(NOW)
EXAMPLE = Path(__file__).parents[2] / "examples" / "customer_onboarding"
EMAIL = Channel("email", ChannelKind.SMTP, timeout_s=10, in_flight_max_s=30)
HOOKS = Channel("hooks", ChannelKind.WEBHOOK, timeout_s=5, key_valid_s=3600)
POLICY = RetryPolicy(attempts_max=3, base_s=1, total_max_s=100)


class Words:
    """A rendered message."""

    subject, text, html = "Hello", "Dear you", None


def render(name: str, data: Mapping[str, Any]) -> Words:
    if name != "welcome":
        raise ValidationError(f"there is no template {name!r}", hint="correct and replay")
    return Words()


RULES = (Rule("attention", "*", frozenset({"parked"}), "hooks", ("owners",)),)
CATALOGUE = Catalogue({"email": EMAIL, "hooks": HOOKS}, render, RULES)
INSTANCE = ids.entrance_id("instance", "i", NOW_MS)
COMMAND = ids.entrance_id("command", "c", NOW_MS)


def message(kind: str, *, number: int = 0, id_: UUID | None = None, **record: Any) -> Message:
    own = id_ or ids.entrance_id(kind, str(uuid4()), NOW_MS)
    base = {
        "ce_id": str(own), "ce_time": NOW_MS, "traceparent": None, "correlation_id": "c-1", "actor": "test",
        "business_object_type": "parcel", "business_object_id": "P-1", "instance_id": str(INSTANCE), "instance_seq": 3,
        "workflow": "shipping", "step": "tell", "opening": number,
    }  # fmt: skip
    delivery = Delivery("t", 0, 1, b"k", b"v")
    return Message(delivery, kind, Root.own(own), own, 0, {**base, **record}, b"h" * 16, NOW_MS)


def command(**body: Any) -> Message:
    asked = {"template": "welcome", "channel": "email", "to": "a@example.org", "data": {}, **body}
    return message(
        "command", id_=COMMAND, operation="notify", deadline=None, retry=None, body=json.dumps(asked).encode()
    )


def resolution(verdict: str, **record: Any) -> Message:
    return message(
        "resolution", command_id=str(COMMAND), verdict=verdict, entered_at=NOW_MS, reason="looked",
        record_id=str(ids.record_id("r", "g")), number=4, **record,
    )  # fmt: skip


def only(effects: Sequence[Effect], kind: type[Any]) -> Any:
    (found,) = (e for e in effects if isinstance(e, kind))
    return found


def task(**changes: Any) -> Task:
    _, effects = decide(CATALOGUE, State(), command(), NOW)
    return unpack_task(only(effects, Schedule).payload)[0].model_copy(update=changes)


# --- the tables ------------------------------------------------------------------------------------------------------


def test_the_tables_hold_every_case() -> None:
    """C2: no combination is left to chance."""
    truth = (False, True)
    assert set(BEFORE) == set(itertools.product(truth, truth))
    assert set(AFTER) == set(itertools.product(truth, Answer, truth))


@pytest.mark.parametrize("case", AFTER)
def test_failed_means_known_not_to_have_worked(case: tuple[bool, Answer, bool]) -> None:
    """⚑ `failed` only where every attempt is known not to have worked; DONE only where one is known to have."""
    _, answer, tainted = case
    for move in AFTER[case]:
        if move is Move.FAILED:
            assert not tainted and answer in (Answer.REFUSED, Answer.NOT_YET)
        assert (move is Move.DONE) == (answer is Answer.WORKED)


@pytest.mark.parametrize("case", AFTER)
def test_what_nobody_can_tell_apart_is_never_repeated(case: tuple[bool, Answer, bool]) -> None:
    """⚑ INV-X: after a maybe on a channel without ids there is no further attempt."""
    repeatable, answer, tainted = case
    if not repeatable and (tainted or answer is Answer.MAYBE):
        assert not {Move.WAIT, Move.SEND} & set(AFTER[case])
    assert Move.SEND not in BEFORE[(False, True)]
    assert AFTER[case][1] is not Move.WAIT, "a policy that has stopped waits for nothing"


@pytest.mark.parametrize(("error_class", "answer"), [
    (None, Answer.WORKED), (ErrorClass.AMBIGUOUS, Answer.MAYBE), (ErrorClass.BUG, Answer.MAYBE),
    (ErrorClass.TRANSIENT, Answer.NOT_YET), (ErrorClass.THROTTLED, Answer.NOT_YET),
    (ErrorClass.VALIDATION, Answer.REFUSED), (ErrorClass.PERMISSION, Answer.REFUSED),
    (ErrorClass.CONFLICT, Answer.REFUSED), (ErrorClass.NOT_FOUND, Answer.REFUSED),
])  # fmt: skip
def test_every_class_has_an_answer(error_class: ErrorClass | None, answer: Answer) -> None:
    """C3: the class decides."""
    assert follow.answer_of(error_class) is answer


@given(st.lists(st.sampled_from([None, *ErrorClass]), min_size=1, max_size=8), st.sampled_from([EMAIL, HOOKS]))
def test_any_history_of_attempts_ends_honestly(ends: list[ErrorClass | None], channel: Channel) -> None:
    """INV-X, INV-B: over any ends of attempts, moves are legal, attempts stay in the policy, and the end is true."""
    history, now, maybe = History(), NOW, False
    for error_class in ends:
        if follow.before(channel, history, now, None).move is not Move.SEND:
            break
        assert history.sends < POLICY.attempts_max
        assert channel.repeatable or not maybe
        history = history.model_copy(
            update={"sends": history.sends + 1, "first_attempt_at": history.first_attempt_at or now}
        )
        then = follow.after(channel, POLICY, history, error_class, now, id_=COMMAND, deadline=None)
        if follow.answer_of(error_class) is Answer.MAYBE:
            maybe = True
            history = history.model_copy(update={"ambiguous_since": history.ambiguous_since or now})
        if then.move is not Move.WAIT:
            assert (then.move is Move.DONE) == (error_class is None)
            assert (then.move is Move.FAILED) == (error_class is not None and not maybe)
            return
        assert then.at is not None and then.at > now
        now = then.at


def test_a_receiver_that_has_forgotten_the_id_is_not_asked_again() -> None:
    """C2: a repeat is safe only while the id is remembered."""
    history = History(sends=1, ambiguous_since=NOW)
    assert follow.before(HOOKS, history, NOW + timedelta(seconds=3599), None).move is Move.SEND
    late = follow.before(HOOKS, history, NOW + timedelta(seconds=3600), None)
    assert late.move is Move.UNKNOWN
    assert "remember its id for 3600 s only" in late.why


def test_a_lost_lease_counts_as_an_attempt_that_may_have_worked() -> None:
    """⚑ DESIGN 5: what ended without a settlement is not known to have failed, two of them neither."""
    row = Claimed(COMMAND, "send.email", 3, 3, True, b"", None, NOW, NOW + timedelta(seconds=60), 0.0, NOW)
    history = accounted(History(settled=1, sends=1), row, 30.0)
    assert history.tainted and history.sends == 2
    assert history.ambiguous_since == NOW - timedelta(seconds=30)
    clean = replace(row, interrupted=False, attempts=2)
    assert accounted(History(settled=1, sends=1), clean, 30.0).tainted is False


# --- commands and resolutions ----------------------------------------------------------------------------------------


def test_a_command_becomes_a_row_claimed_at_once() -> None:
    """D2: the row's id is the command's, so a repeat finds it; it carries the delivery byte for byte."""
    asked = command(to=["a@example.org", "b@example.org", "a@example.org"])
    _, effects = decide(CATALOGUE, State(), asked, NOW)
    row = only(effects, Schedule)
    assert (row.kind, row.id, row.start_now, row.tag) == ("send.email", COMMAND, True, INSTANCE)
    made, delivery = unpack_task(row.payload)
    assert delivery == pack_delivery(asked.delivery)
    assert (made.to, made.subject, made.notice) == (("a@example.org", "b@example.org"), "Hello", False)
    assert "a@example.org" not in repr(made)


@pytest.mark.parametrize("address", [
    "", "a", "a@", "@b", "a b@c.org", "a@b@c", "a@b..c", "a\n@b.org", "ä@b.org", "a@b.org\r\nBcc: x@y.org",
    "a" * 65 + "@b.org",
    "x@" + "b" * 260, None, 7, "<a@b.org>", "a@b.org,c@d.org",
])  # fmt: skip
def test_what_is_no_address_is_refused(address: object) -> None:
    """Bad input gets a clear answer: nothing that could become a second recipient or header passes."""
    assert not plausible(address, ChannelKind.SMTP)


def test_an_error_about_a_recipient_does_not_quote_it() -> None:
    """F5: the text goes into DLQ headers and logs."""
    with pytest.raises(ValidationError) as caught:
        decide(CATALOGUE, State(), command(to=["a@example.org", "not an address"]), NOW)
    assert "recipient 2 of 2 is no address for channel email" in str(caught.value)
    assert "not an address" not in str(caught.value)


def row(state: str = "unknown", history: History | None = None) -> State:
    return State(Row("send.email", state, task(), history or History(), NOW - timedelta(seconds=60)))


def test_happened_ends_it_and_its_park() -> None:
    """DESIGN 9: no result tells of a notification, so the word releases the park under its own number."""
    _, effects = decide(CATALOGUE, row(), resolution("happened"), NOW)
    amend, told = only(effects, Amend), only(effects, Publish)
    assert (amend.id, amend.expected, amend.state) == (COMMAND, "unknown", "done")
    assert (told.topic, told.body["signal"]) == ("signal", "message_released")
    assert json.loads(told.body["body"]) == {"record_id": str(ids.record_id("r", "g")), "opening": 4}


def test_not_happened_counts_only_after_the_flight() -> None:
    """⚑ DESIGN 5: said too early it is refused: the attempt may still be carried out. Later it is sent again."""
    early = row(history=History(ended_at=NOW - timedelta(seconds=29), ambiguous_since=NOW))
    with pytest.raises(ValidationError, match="may still be in flight"):
        decide(CATALOGUE, early, resolution("not_happened"), NOW)
    late = row(history=History(ended_at=NOW - timedelta(seconds=30), ambiguous_since=NOW, sends=3))
    _, effects = decide(CATALOGUE, late, resolution("not_happened"), NOW)
    amend = only(effects, Amend)
    assert amend.state == "pending"
    assert History.from_bytes(amend.progress) == History(opening=4)


def test_two_words_about_one_notification_are_one() -> None:
    """DESIGN 9: the second meets the state that the first left, and is refused and shown."""
    state, _ = decide(CATALOGUE, row(), resolution("happened"), NOW)
    with pytest.raises(ValidationError, match="is done, not unknown"):
        decide(CATALOGUE, state, resolution("discarded"), NOW)


def test_one_that_died_before_it_was_a_row_can_be_discarded() -> None:
    """DESIGN 9: its ledger row ends `discarded`, its instance is told."""
    _, effects = decide(CATALOGUE, State(None, "dead"), resolution("discarded"), NOW)
    assert only(effects, MarkLedger).disposition == "discarded"
    assert only(effects, Publish).body["signal"] == "message_discarded"
    with pytest.raises(ValidationError, match="nothing to resolve"):
        decide(CATALOGUE, State(None, "done"), resolution("discarded"), NOW)


def test_resolutions_are_decided_under_their_commands_row() -> None:
    """INV-F: the key is the row that `load` locks."""
    assert object_key(resolution("happened")) == f"row:{COMMAND}"


# --- statuses --------------------------------------------------------------------------------------------------------


def status(seq: int = 3, **record: Any) -> Message:
    given_ = {
        "status": "parked", "previous_status": "running", "workflow_version": "1.0.0", "outcome": None, "reason": None,
        "owner": "team", "instance_seq": seq, **record,
    }  # fmt: skip
    return message("status", **given_)


def test_an_owner_is_told_under_an_id_of_message_and_rule() -> None:
    """D2: the same status gives the same row in any opening; another rule another one."""
    told = status()
    state, effects = decide_status(CATALOGUE, "g", Watched(), told, NOW)
    again = decide_status(CATALOGUE, "g", Watched(), replace(told, opening=2), NOW)[1]
    assert state == Watched(3)
    assert only(effects, Schedule).id == only(again, Schedule).id != told.id
    made, _ = unpack_task(only(effects, Schedule).payload)
    assert (made.notice, made.to, made.group, made.subject) == (True, ("owners",), "g", "shipping: parked")


@pytest.mark.parametrize(
    "quiet",
    [status(status="running"), status(previous_status="parked"), status(2), status(ce_time=NOW_MS - 86_401_000)],
)
def test_nobody_is_told_of_what_is_not_declared_not_new_or_older_than_seen(quiet: Message) -> None:
    """DESIGN 7: readers outside ignore a lower `instance_seq`; a rule that is new to an old topic sends no flood."""
    _, effects = decide_status(CATALOGUE, "g", Watched(3), quiet, NOW)
    assert not [e for e in effects if isinstance(e, Schedule)]


def test_an_older_status_leaves_what_was_seen() -> None:
    """INV-F: the number only rises."""
    state, effects = decide_status(CATALOGUE, "g", Watched(9), status(8), NOW)
    assert state == Watched(9)
    assert only(effects, Discard).reason == "the instance has been seen at 9; 8 is older"


def test_workflows_without_a_rule_cost_nothing() -> None:
    """A status that nobody asked about is decided over nothing."""
    catalogue = replace(CATALOGUE, rules=(replace(RULES[0], workflow="billing"),))
    assert watched_key(catalogue, status()) == ""
    assert decide_status(catalogue, "g", Watched(), status(), NOW) == (Watched(), ())


# --- one attempt -----------------------------------------------------------------------------------------------------


class Says:
    """A transport that ends as it is told, after the check before the first byte."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.sent = error, 0

    async def deliver(self, task: Task, attempt: transports.Attempt) -> None:
        attempt.before_first_byte()
        self.sent += 1
        if self.error is not None:
            raise self.error


async def attempt(says: Says, *, channel: Channel = EMAIL, lease_ends: float = 100.0, of: Task | None = None) -> Any:
    clock = ManualClock(NOW)
    made = of or task(channel=channel.name)
    payload = pack_task(made, pack_delivery(command().delivery))
    claimed = Claimed(COMMAND, channel.claim_kind, 1, 1, False, payload, None, NOW, NOW, lease_ends)
    return await Sends({channel.name: channel}, {channel.name: says}, clock, Metrics()).work(claimed)


@pytest.mark.parametrize(("error", "state", "reason", "replayable"), [
    (None, "done", None, None),
    (MailNotSentError("421"), "pending", None, None),
    (MailRefusedError("550"), "failed", "exhausted", True),
    (MailAmbiguousError("no answer"), "unknown", "unknown", False),
    (RuntimeError("a bug that quotes a@example.org"), "unknown", "unknown", False),
])  # fmt: skip
async def test_an_attempt_is_settled_by_what_is_known(
    error: Exception | None, state: str, reason: str | None, replayable: bool | None
) -> None:
    """DESIGN 9: exhausted is replayable as an opening, unknown waits for a resolution, no text quotes an address."""
    settled = await attempt(Says(error))
    assert settled.state == state
    assert settled.save.ended == ("done" if error is None else settled.save.ended)
    if reason is None:
        assert settled.death is None
        return
    assert (settled.death.error.reason, settled.death.replayable) == (reason, replayable)
    assert settled.death.record["command_id"] == str(COMMAND)
    assert "a@example.org" not in str(settled.death.error)


async def test_a_lease_that_does_not_cover_the_timeout_sends_nothing() -> None:
    """⚑ DESIGN 5: checked immediately before the first byte; the attempt is claimed again, uncounted."""
    says = Says()
    settled = await attempt(says, lease_ends=9.9)
    assert (says.sent, settled.state, settled.due_at, settled.save) == (0, "pending", None, None)
    assert History.from_bytes(settled.progress).sends == 0
    assert lease_s(EMAIL) > 2 * EMAIL.timeout_s


async def test_a_notice_parks_nobody_and_asks_nobody() -> None:
    """D3: an owner's receiver that is down must not stop the workflow that it tells of."""
    notice = task(channel="hooks", status="parked", group="g", retry=RetryPolicy(attempts_max=1))
    settled = await attempt(Says(FactmeshError("?", error_class=ErrorClass.AMBIGUOUS)), channel=HOOKS, of=notice)
    assert (settled.state, settled.death.error.reason, settled.death.replayable) == ("failed", "exhausted", True)
    assert settled.death.group == "g"
    assert "instance_id" not in settled.death.record and "command_id" not in settled.death.record


async def test_a_deadline_ends_what_was_never_tried() -> None:
    """C4: no attempt begins after it, and none is known to have worked."""
    says = Says()
    settled = await attempt(says, of=task(deadline=NOW))
    assert (settled.state, says.sent) == ("failed", 0)
    assert "the deadline" in str(settled.death.error)


# --- what goes out ---------------------------------------------------------------------------------------------------


def test_a_letter_is_one_message_whatever_the_data_holds() -> None:
    """D2, F1: its id is the command's, its date the asking's; nothing in it can become another header."""
    made = task(subject="Hello", text=".dot\nbody", html="<p>x</p>", to=("a@example.org", "b@example.org"))
    raw = transports.letter(made, "Team <team@mesh.example>", "00-" + "a" * 32 + "-" + "b" * 16 + "-01").as_bytes()
    mail = message_from_bytes(raw, policy=policy.default)
    assert mail["Message-ID"] == f"<{COMMAND}@mesh.example>"
    assert (mail["To"], mail["X-Factmesh-Correlation-Id"]) == ("a@example.org, b@example.org", "c-1")
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail.get_content_type() == "multipart/alternative"
    assert raw == transports.letter(made, "Team <team@mesh.example>", mail["traceparent"]).as_bytes()


def test_a_webhook_is_accepted_by_a_receiver_that_knows_only_the_standard() -> None:
    """D1: Standard Webhooks, checked by an implementation that shares no code with ours."""
    secret = "whsec_dGVzdC1zZWNyZXQtdGVzdC1zZWNyZXQ="
    body = transports.payload(task())
    headers = webhook_signature.headers(webhook_signature.key_of(secret), str(COMMAND), 1000, body)
    verify: dict[str, Any] = {"now_epoch_s": 1000.0, "tolerance_s": 300}
    assert receiver.refusal(secret, headers, body, **verify) is None
    assert receiver.refusal(secret, headers, body + b" ", **verify) == "webhook-signature does not match"
    with pytest.raises(SettingsError) as caught:
        webhook_signature.key_of("whsec_short")
    assert "short" not in str(caught.value)


@pytest.mark.parametrize(("code", "error_class"), [
    (200, None), (204, None), (302, "ambiguous"), (400, "validation"), (401, "permission"), (404, "not_found"),
    (410, "not_found"), (429, "throttled"), (500, "ambiguous"), (502, "ambiguous"), (503, "transient"),
])  # fmt: skip
def test_a_status_means_what_is_known_of_it(code: int, error_class: str | None) -> None:
    """C3: a 500 may come after the work; only what is promised is known."""
    assert transports.class_of_status(code) == error_class


# --- templates -------------------------------------------------------------------------------------------------------


def templates(tmp_path: Path, **files: str) -> Templates:
    paths = {}
    for name, text in files.items():
        paths[name] = (tmp_path / f"{name}.yaml",)
        paths[name][0].write_text(text, encoding="utf-8")
    return Templates(paths)


def test_data_is_never_evaluated_and_makes_no_second_header(tmp_path: Path) -> None:
    """D1: what came from data is a value: not compiled, escaped in HTML, and one line in a subject."""
    made = templates(tmp_path, t="subject: 'For {{ data.x }}'\ntext: '{{ data.x }}'\nhtml: '<b>{{ data.x }}</b>'\n")
    words = made.render("t", {"data": {"x": "{{ 7*7 }}\r\nBcc: <a@b.c>"}})
    assert words.subject == "For {{ 7*7 }} Bcc: <a@b.c>"
    assert words.text.startswith("{{ 7*7 }}")
    assert words.html == "<b>{{ 7*7 }}\r\nBcc: &lt;a@b.c&gt;</b>"
    assert "7*7" not in repr(words)


@pytest.mark.parametrize(
    "source", ["{{ data.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_a_template_reaches_nothing_but_its_data(tmp_path: Path, source: str) -> None:
    """The sandbox refuses the ways out into the process."""
    made = templates(tmp_path, t=f'subject: s\ntext: "{source}"\n')
    with pytest.raises(ValidationError):
        made.render("t", {"data": {}})


@pytest.mark.parametrize(("source", "says"), [
    ("subject: s\n", "text"),
    ("subject: s\ntext: '{% if %}'\n", "line 1 of text is not a template"),
    ("subject: s\ntext: t\nbody: x\n", "body"),
])  # fmt: skip
def test_a_wrong_template_is_told_with_its_file_and_line(tmp_path: Path, source: str, says: str) -> None:
    """Bad input gets a clear answer: at the start, not at the first customer."""
    with pytest.raises(DefinitionError) as caught:
        templates(tmp_path, t=source)
    assert says in str(caught.value) and "t.yaml" in str(caught.value)


def test_a_missing_value_is_an_error_and_never_an_empty_place(tmp_path: Path) -> None:
    """A3's rule for people: nobody gets a letter to ` `."""
    made = templates(tmp_path, t="subject: s\ntext: 'Dear {{ data.name }}'\n")
    with pytest.raises(ValidationError, match="template 't' lacks a value"):
        made.render("t", {"data": {}})


# --- channels --------------------------------------------------------------------------------------------------------

ENVIRON = {
    "SMTP_HOST": "127.0.0.1", "SMTP_PORT": "2525", "HOOKS_URL": "http://127.0.0.1:1/hooks",
    "HOOKS_SECRET": "whsec_dGVzdC1zZWNyZXQtdGVzdC1zZWNyZXQ=",
}  # fmt: skip


def load(text: str, environ: Mapping[str, str] = ENVIRON) -> channels.Channels:
    document = yaml.parse(text, file="channels.yaml")
    return channels.wire(channels.parse(document), document, http=HttpClient(), clock=SystemClock(), environ=environ)


def test_the_example_can_be_served() -> None:
    """D1: what its workflows notify about is there, and every reference is one that the sandbox's addresses resolve."""
    wired = channels.load(EXAMPLE, http=HttpClient(), clock=SystemClock(), environ=ENVIRON)
    assert {"email", "hooks", "desk", "log"} == set(wired.channels)
    made = Templates(Project.load(EXAMPLE).template_files)
    words = made.render("welcome", {"data": {"name": "Ada", "account": "acc-1", "ticket": "T-1"}, "mesh": {}})
    assert words.subject == "Welcome, Ada"
    assert {"welcome", "refused"} <= made.names


def _smtp(text: str) -> str:
    return text.replace("%s", "kind: smtp, host: h, from: a@b.org")


@pytest.mark.parametrize(("text", "says"), [
    ("channels: {email: {kind: pigeon}}", "channels.yaml:1"),
    (_smtp("channels: {email: {%s, pass: x}}"), "pass"),
    ("channels: {email: {kind: smtp, host: h, from: nobody}}", "`from` is no mail address"),
    (_smtp("channels: {email: {%s, port: 70000}}"), "`port` is no port number"),
    (_smtp("channels: {email: {%s, username: 'ref+env://U'}}"), "a login needs both"),
    (_smtp("channels: {email: {%s, username: 'ref+env://SMTP_HOST', password: hunter2}}"), "is not a secret reference"),
    ("channels: {h: {kind: webhook, url: 'http://x', secret: 'ref+env://NOT_SET'}}", "NOT_SET is not set"),
    ("channels: {h: {kind: webhook, url: 'ftp://x', secret: 'ref+env://HOOKS_SECRET'}}", "`url` is no http address"),
    (_smtp("channels: {email: {%s}}\nowners: [{name: a, statuses: [parked], channel: email, to: a@b.org}]"),
     "owners are not told by smtp"),
    ("owners: [{name: a, statuses: [parked], channel: gone, to: x}]", "no channel is called 'gone'"),
])  # fmt: skip
def test_a_wrong_channel_stops_the_start_with_a_clear_answer(text: str, says: str) -> None:
    """Issue 6: a connector without a secret, an unknown word, a value where a reference belongs; never told itself."""
    with pytest.raises(FactmeshError) as caught:
        load(text)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_project_without_channels_still_has_the_log() -> None:
    """A project needs no server to tell something."""
    assert set(load("channels: {}").channels) == {"log"}
