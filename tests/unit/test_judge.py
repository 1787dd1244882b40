"""The judge finds what it is there to find: planted anomalies of each invariant, one at a time, and no other.
A judge that cannot find a planted breach would let every test of faults pass.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from tests.support.judge import ClaimRow, Evidence, InstanceRow, LedgerRow, RecordRow, Sent, judge, text

from factmesh import dlq, ids
from factmesh.errors import ErrorClass, Reason
from factmesh.ids import Root
from factmesh.message import Delivery, Message
from factmesh_cli.demo_plan import Effects
from factmesh_orchestrator.model import Status
from factmesh_quarantine.model import State
from factmesh_sandbox.log import Call, Effect, Mail

T0 = datetime(2026, 11, 1, tzinfo=UTC)
MS = 1_780_000_000_000
SOURCE = "//upstream"
FACT = ids.entrance_id("fact", "1", MS)
INSTANCE = ids.instance_id("w", FACT)
COMMAND = ids.entrance_id("command", "1", MS)
KEY = ids.idempotency_key(INSTANCE, "charge", 0, 1)
CORRELATION = str(ids.correlation_id(SOURCE, "1"))
COMMANDS = "factmesh.command.billing.v1"


def said(kind: str, id_: UUID, offset: int, **record: Any) -> Message:
    """A message of ours as it lies on its topic."""
    topic = COMMANDS if kind == "command" else f"factmesh.{kind}.v1"
    record = {"instance_id": str(INSTANCE), "correlation_id": CORRELATION, **record}
    delivery = Delivery(topic, 0, offset, b"k", repr(sorted(record.items())).encode())
    return Message(delivery, kind, Root.own(id_), id_, 0, record, b"", MS)


def status(seq: int, now: str, before: str | None, offset: int) -> Message:
    id_ = ids.entrance_id("status", str(seq), MS)
    return said("status", id_, offset, instance_seq=seq, status=now, previous_status=before)


def letter(reason: Reason = Reason.VALIDATION, **changes: Any) -> dlq.DeadLetter:
    original = Delivery("facts.raw", 0, 9, b"k", b"{torn", (("ce_source", SOURCE.encode()), ("ce_id", b"9")), MS)
    fields: dict[str, Any] = {
        "original": original,
        "root": Root.stranger(SOURCE, "9").text,
        "opening": 0,
        "group": "g",
        "reason": reason,
        "error_class": ErrorClass.VALIDATION,
        "stage": "intake/facts",
        "exception_type": "ValidationError",
        "message": "no country",
        "first_failed_at": T0,
        "failed_at": T0,
        "service_version": "1",
        "fingerprint": "f",
    }
    return dlq.DeadLetter(**{**fields, **changes})


def on_dlq(dead: dlq.DeadLetter, offset: int = 0) -> Delivery:
    e = dlq.record(dead, "intake")
    return Delivery(e.topic, 0, offset, e.key, e.value, e.headers, MS)


def call(seq: int, body: str = "a", status: int | None = 200, answered: bool = True) -> Call:
    return Call(
        seq, T0, "billing", "charge", "POST", "/", str(KEY), CORRELATION, None, "C-1", body, None, None, status, False,
        answered,
    )  # fmt: skip


def effect(seq: int, subject: str = "C-1") -> Effect:
    return Effect(seq, T0, "billing", "charge", seq, f"E-{seq}", subject, str(KEY), {}, {}, seq)


def mail(seq: int, to: str = "c@example.org") -> Mail:
    return Mail(seq, T0, "from@example.org", [to], None, None, {}, "", None, True)


def note(seq: int) -> LedgerRow:
    id_ = ids.entrance_id("row", str(seq), MS)
    return LedgerRow("orchestrator", id_, "done", "t", note={"instance_id": str(INSTANCE), "seq": seq})


def good() -> Evidence:
    """One fact through one instance with one effect and one mail, one repeat of everything; one dead fact, open."""
    dead = letter()
    started, ended = status(1, "running", None, 0), status(2, "completed", "running", 1)
    command = said("command", COMMAND, 0, idempotency_key=str(KEY))
    result = said("result", ids.entrance_id("result", "1", MS), 0, command_id=str(COMMAND), outcome="done")
    fact = said("fact", FACT, 0)
    again = replace(fact, delivery=replace(fact.delivery, offset=1))
    return Evidence(
        sent=(Sent(SOURCE, "1", b"{}"), Sent(SOURCE, "1", b"{}"), Sent(SOURCE, "9", b"{torn")),
        intended={"C-1": Effects({("billing", "charge"): 1}, {"c@example.org": 1})},
        messages=(fact, again, command, result, started, ended),
        deliveries={dead.original.where: dead.original},
        dead=(on_dlq(dead),),
        ledger=(note(1), note(2)),
        instances=(InstanceRow(INSTANCE, Status.COMPLETED, 2, "C-1", CORRELATION),),
        claims=(ClaimRow("connector", COMMAND, "attempt.billing", "done", False),),
        records=(RecordRow(dlq.dlq_id("intake", dead), dead.root, State.OPEN, "facts.raw", "validation"),),
        filed=frozenset({dlq.dlq_id("intake", dead)}),
        calls=(call(1),),
        effects=(effect(1),),
        mails=(mail(1),),
    )


def found(e: Evidence) -> list[str]:
    return [str(a) for a in judge(e)]


def test_nothing_is_found_where_nothing_is() -> None:
    """DESIGN 12: repeats, duplicates and an open record are no breach; after a triage an open record is one."""
    assert found(good()) == []
    (breach,) = found(replace(good(), final=True))
    assert breach.startswith("INV-L: record ")
    assert "open after the triage" in breach
    assert text(judge(replace(good(), final=True))).startswith("INV-L: 1\n")


def test_what_is_unknown_may_be_missing_until_it_is_resolved() -> None:
    """INV-X: less than intended is right while a person is still to look, and only then."""
    e = good()
    resting = replace(
        e,
        effects=(),
        mails=(),
        ledger=(*e.ledger[:1],),
        messages=(*e.messages[:4], status(1, "parked", None, 0)),
        instances=(InstanceRow(INSTANCE, Status.PARKED, 1, "C-1", CORRELATION),),
        records=(
            *e.records,
            RecordRow(COMMAND, f"id:{COMMAND}", State.OPEN, COMMANDS, "unknown", INSTANCE, "C-1"),
        ),
    )
    assert found(resting) == []
    assert any("0 x ('billing', 'charge'), 1 intended" in f for f in found(replace(resting, final=True)))


# --- planted anomalies -----------------------------------------------------------------------------------------------


def _lost(e: Evidence) -> Evidence:
    return replace(e, sent=(*e.sent, Sent(SOURCE, "2", b"{}")))


def _second_body_lost(e: Evidence) -> Evidence:
    return replace(e, sent=(*e.sent, Sent(SOURCE, "1", b"other")))


def _replayed_to_nowhere(e: Evidence) -> Evidence:
    return replace(e, records=(replace(e.records[0], state=State.REPLAYED),))


def _twice_an_instance(e: Evidence) -> Evidence:
    other = replace(e.instances[0], id=ids.instance_id("v", FACT))
    return replace(e, instances=(*e.instances, other))


def _fact_not_taken(e: Evidence) -> Evidence:
    lost = said("fact", ids.entrance_id("fact", "2", MS), 7, correlation_id="nobody")
    return replace(e, messages=(*e.messages, lost))


def _instance(status: Status) -> Any:
    def plant(e: Evidence) -> Evidence:
        return replace(e, instances=(replace(e.instances[0], status=status),))

    return plant


def _claimed(e: Evidence) -> Evidence:
    return replace(e, ledger=(*e.ledger, LedgerRow("intake", FACT, "claimed", "facts.raw")))


def _due(e: Evidence) -> Evidence:
    return replace(e, claims=(replace(e.claims[0], due=True),))


def _act_not_published(e: Evidence) -> Evidence:
    return replace(e, records=(replace(e.records[0], unpublished_acts=1),))


def _effect_twice(e: Evidence) -> Evidence:
    return replace(e, effects=(*e.effects, effect(2)))


def _effect_missing(e: Evidence) -> Evidence:
    return replace(e, effects=())


def _effect_of_nobody(e: Evidence) -> Evidence:
    return replace(e, effects=(*e.effects, effect(2, "C-2")))


def _mail_twice(e: Evidence) -> Evidence:
    return replace(e, mails=(mail(1), mail(2, "C@EXAMPLE.org")))


def _mail_missing(e: Evidence) -> Evidence:
    return replace(e, mails=())


def _two_bodies(e: Evidence) -> Evidence:
    return replace(e, calls=(call(1), call(2, "b")))


def _two_bodies_unanswered(e: Evidence) -> Evidence:
    return replace(e, calls=(call(3, status=None, answered=False), call(4, "b")))


def _other_bytes(e: Evidence) -> Evidence:
    fact = e.messages[0]
    other = replace(fact, delivery=replace(fact.delivery, offset=5, value=b"other"))
    return replace(e, messages=(*e.messages, other))


def _gap(e: Evidence) -> Evidence:
    return replace(e, ledger=(note(1),), instances=e.instances)


def _seq_twice(e: Evidence) -> Evidence:
    return replace(e, ledger=(*e.ledger, replace(note(2), id=FACT)))


def _also(e: Evidence) -> Evidence:
    row = replace(note(2), note={"also": [{"instance_id": "gone", "seq": 1}], **(note(2).note or {})})
    return replace(e, ledger=(note(1), row))


def _illegal_move(e: Evidence) -> Evidence:
    told = (status(1, "running", None, 0), status(2, "completed", "running", 1), status(3, "running", "completed", 2))
    row = replace(e.instances[0], seq=3, status=Status.RUNNING)
    return replace(e, messages=(*e.messages[:4], *told), ledger=(*e.ledger, note(3)), instances=(row,))


def _status_missing(e: Evidence) -> Evidence:
    told = (status(1, "running", None, 0), status(2, "completed", "waiting", 1))
    return replace(e, messages=(*e.messages[:4], *told))


def _status_not_told(e: Evidence) -> Evidence:
    return replace(e, messages=e.messages[:5])


def _status_twice(e: Evidence) -> Evidence:
    twin = said("status", FACT, 9, instance_seq=2, status="completed", previous_status="completed")
    return replace(e, messages=(*e.messages, twin))


def _two_commands(e: Evidence) -> Evidence:
    return replace(e, messages=(*e.messages, said("command", FACT, 5, idempotency_key=str(KEY))))


def _stale_settlement(e: Evidence) -> Evidence:
    return replace(e, messages=(*e.messages, said("result", FACT, 5, command_id=str(COMMAND), outcome="failed")))


def _result_of_nothing(e: Evidence) -> Evidence:
    return replace(e, messages=(*e.messages, said("result", FACT, 5, command_id=str(FACT), outcome="done")))


def _headless(e: Evidence) -> Evidence:
    torn = replace(e.dead[0], headers=tuple(h for h in e.dead[0].headers if h[0] != "factmesh-dlq-reason"))
    return replace(e, dead=(*e.dead, torn))


def _not_the_original(e: Evidence) -> Evidence:
    return replace(e, dead=(replace(e.dead[0], value=b"{torn?"),), sent=e.sent[:2])


def _from_nowhere(e: Evidence) -> Evidence:
    return replace(e, deliveries={})


def _no_way_back(e: Evidence) -> Evidence:
    origin = Delivery(COMMANDS, 0, 3, b"k", b"c", (), MS)
    dead = letter(Reason.UNKNOWN, original=origin, root=f"id:{COMMAND}")
    deliveries = {**e.deliveries, origin.where: origin}
    filed = e.filed | {dlq.dlq_id("intake", dead)}
    return replace(e, dead=(*e.dead, on_dlq(dead, 1)), deliveries=deliveries, filed=filed)


def _not_filed(e: Evidence) -> Evidence:
    return replace(e, filed=frozenset())


PLANTED = [
    (_lost, "L", "1 acknowledged bodies are on no DLQ, 0 instance"),
    (_second_body_lost, "L", "2 acknowledged bodies are on no DLQ, 1 instance"),
    (_replayed_to_nowhere, "L", "has no instance, and its records are"),
    (_twice_an_instance, "L", "is in 2 instances"),
    (_fact_not_taken, "L", "was given on, and no instance and no DLQ has it"),
    (_instance(Status.RUNNING), "L", "is still running"),
    (_instance(Status.WAITING), "L", "waits for nothing"),
    (_instance(Status.PARKED), "L", "is parked without an open record"),
    (_claimed, "L", "was claimed and never decided"),
    (_due, "L", "is done and still due"),
    (_act_not_published, "L", "1 act(s) raised and never published"),
    (_effect_twice, "X", "C-1: 2 x ('billing', 'charge'), 1 intended"),
    (_effect_missing, "X", "C-1: 0 x ('billing', 'charge'), 1 intended"),
    (_effect_of_nobody, "X", "C-2: 1 x ('billing', 'charge'), 0 intended"),
    (_mail_twice, "X", "2 mails to c@example.org, 1 intended"),
    (_mail_missing, "X", "C-1: 0 mails to c@example.org, 1 intended"),
    (_two_bodies, "K", "was used with two bodies, call 2"),
    (_two_bodies_unanswered, "K", "was used with two bodies, call 4"),
    (_other_bytes, "F", "has other bytes"),
    (_gap, "F", "is at 2, its ledger rows say [1]"),
    (_seq_twice, "F", "is at 2, its ledger rows say [1, 2, 2]"),
    (_also, "F", "ledger rows speak of instance gone"),
    (_illegal_move, "F", "completed to running is not in the table"),
    (_status_missing, "F", "follows waiting, but running was told before it"),
    (_status_not_told, "F", "is completed, readers were told running"),
    (_status_twice, "F", "is told twice under different ids"),
    (_two_commands, "F", "has 2 commands"),
    (_stale_settlement, "F", "has 2 outcomes: ['done', 'failed']"),
    (_result_of_nothing, "F", "which nobody gave"),
    (_headless, "D", "cannot be read"),
    (_not_the_original, "D", "is not what lies at"),
    (_from_nowhere, "D", "where nothing lies"),
    (_no_way_back, "D", "lacks its instance or its command"),
    (_not_filed, "D", "is not in the index"),
]


@pytest.mark.parametrize(("plant", "invariant", "says"), PLANTED, ids=[says for _, _, says in PLANTED])
def test_a_planted_anomaly_is_found(plant: Any, invariant: str, says: str) -> None:
    """INV-L, X, K, F, D: each class of breach is found, under its invariant, in words that name it."""
    breaches = judge(plant(good()))
    assert [a for a in breaches if a.invariant == invariant and says in a.what], [str(a) for a in breaches]


def test_another_body_after_a_known_failure_is_right() -> None:
    """INV-K: after a refusal that did nothing, the same key may carry a corrected body."""
    assert found(replace(good(), calls=(call(1), call(5, status=422), call(6, "b")), effects=(effect(1),))) == []
