"""Decisions of the orchestrator as message histories: what each message changes, and the effects that it must have."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from tests.support.orchestrator import FOUR_STEPS, PATIENT, bench, deploy, four_steps, more_kinds, started

from factmesh import ids
from factmesh.effects import Discard, Note, Publish
from factmesh.errors import BusinessError, ExpressionError, OnBehalf, ValidationError
from factmesh_orchestrator.bench import GROUP, Bench
from factmesh_orchestrator.model import Status
from factmesh_orchestrator.steps import STEPS_PER_MESSAGE_MAX
from factmesh_orchestrator.turn import INSTANCE_BYTES_MAX, OUTPUT_BYTES_MAX

FAILED = ("permission", "not allowed")
TELL_SUM = "- tell: {call: bank.x, with: {a: '${ steps.paid.sum }'}}"


def told(b: Bench) -> list[tuple[str, str | None]]:
    return [(s["status"], s["step"]) for s in b.statuses]


# --- facts, calls, choices -------------------------------------------------------------------------------------------


def test_a_fact_starts_an_instance_pinned_to_the_current_version() -> None:
    """B1, B2: the fact that the schedule names starts one instance, on the deployed version."""
    b = four_steps()
    effects = b.take(b.fact("order.delayed", {"note": "late", "ignored": "x" * 1000}))
    i = b.instance
    assert (i.workflow, i.version, i.seq, i.status, i.step) == ("exception", "1.0.0", 1, Status.RUNNING, "look")
    assert i.input == {"id": "o-1", "note": "late"}
    assert b.state.active == {i.id: "exception"}
    assert [type(e) for e in effects] == [Publish, Publish, Note]


def test_a_command_carries_key_correlation_actor_step_and_deadline() -> None:
    """B4: every command carries a deterministic idempotency key, correlation id, actor, step, deadline."""
    b = four_steps()
    fact = b.fact("order.delayed", {"note": "late"}, correlation_id="corr", actor="partner:p")
    b.take(fact)
    c, i = b.command("look"), b.instance
    assert c.key == str(ids.idempotency_key(i.id, "look", 0, 1))
    assert (c.record["correlation_id"], c.record["actor"], c.record["step"]) == ("corr", "partner:p", "look")
    assert c.record["deadline"] == int(b.now.timestamp() * 1000) + 600_000
    assert c.record["instance_seq"] == 1
    assert c.body == {"id": "o-1"}
    assert c.record["retry"] is None
    b.take(b.result(c, output={"amount": 50}))
    assert json.loads(b.command("credit").record["retry"])["attempts_max"] == 9


def test_the_same_message_decides_the_same() -> None:
    """B4, DESIGN 1: same cause, same ids; a decision repeated gives the very same effects and state."""
    runs = []
    for _ in range(2):
        b = four_steps()
        fact = b.fact("order.delayed", {"note": "n"})
        effects = b.take(fact)
        runs.append((effects, b.state.instances))
    assert runs[0] == runs[1]


def test_a_switch_takes_the_first_case_that_holds() -> None:
    """B3: switch goes on by the first case whose condition holds, else by its own then."""
    assert [c.name for c in started(5).commands] == ["shop.look_up", "notifier.notify"]
    assert [c.name for c in started(50).commands] == ["shop.look_up", "bank.credit"]
    assert started(5).instance.status is Status.COMPLETED


def test_a_notification_is_a_command_that_nobody_waits_for() -> None:
    """B3: notify hands the message to the notifier and goes on."""
    b = started(5)
    c = b.command("tell")
    assert c.body == {"template": "told", "to": "o-1", "channel": "email", "data": {"note": "n"}}
    assert not b.instance.commands
    assert b.instance.ended_at is not None


def test_raise_ends_the_instance_as_failed_with_a_problem_that_people_can_read() -> None:
    """B3: raise ends the instance as failed."""
    b = started(5000)
    assert b.instance.status is Status.FAILED
    assert b.instance.reason == "Too much (about:too-much, 422): n"
    assert b.statuses[-1]["status"] == "failed"
    assert b.statuses[-1]["reason"] == b.instance.reason


def test_every_status_change_and_step_change_is_told_with_what_comes_next() -> None:
    """A2, F1: the status topic tells stage, next step and due time."""
    b = started()
    b.take(b.result(b.command("credit"), output={}))
    assert told(b) == [("running", "look"), ("running", "credit"), ("completed", "tell")]
    assert [s["next_step"] for s in b.statuses] == ["choose", "tell", None]
    assert [s["instance_seq"] for s in b.statuses] == [1, 2, 3]
    assert b.statuses[0]["previous_status"] is None


def test_due_by_is_the_facts_or_follows_from_the_sla() -> None:
    """F1: the clock runs from the business start, before intake saw the fact."""
    b = bench(deploy(FOUR_STEPS.replace(", outcome: null", ""), policies=PATIENT, extra="sla: {target: PT1H}"))
    b.take(b.fact("order.delayed", {"note": "n"}, occurred_at=1_000_000))
    assert b.instance.due_by == 1_000_000 + 3_600_000
    c = four_steps()
    c.take(c.fact("order.delayed", {"note": "n"}, due_by=77))
    assert c.instance.due_by == 77


def test_each_folded_message_raises_seq_by_one_and_what_changes_nothing_does_not() -> None:
    """INV-F: the state sequence of an instance is gapless; the ledger's note says which seq a message made."""
    b = started()
    b.take(b.again(b.result(b.command("look"), output={})))
    b.take(b.result(b.command("credit"), output={}))
    assert b.instance.seq == 3
    assert [n["seq"] for n in b.notes] == [1, 2, 3]
    assert {(n["version"], n["commit"]) for n in b.notes} == {("1.0.0", "c0ffee")}


# --- results ---------------------------------------------------------------------------------------------------------


def test_a_result_counts_only_while_its_command_is_outstanding() -> None:
    """B4, DESIGN 4: the same result twice, or one of a command that nobody lists, changes nothing."""
    b = started()
    credit = b.result(b.command("credit"), output={"credit": 1})
    b.take(credit)
    before = b.state
    effects = b.take(b.again(credit))
    assert isinstance(effects[0], Discard)
    assert "has ended" in effects[0].reason
    assert b.state is before
    assert len(b.commands) == 3


def test_a_failed_step_rests_and_is_shown_parked_while_its_record_is_open() -> None:
    """H1: exhausted is failed and parked; both orders of result and park end equal."""
    for order in (0, 1):
        b = started()
        c = b.command("credit")
        messages = [b.result(c, failed=FAILED), b.parked(c, "exhausted")]
        for m in messages if order else reversed(messages):
            b.take(m)
        assert b.instance.base is Status.NEEDS_RESOLUTION
        assert b.instance.status is Status.PARKED
        assert b.instance.steps["credit"].error_class == "permission"


def test_an_output_beyond_its_bound_kills_its_message_not_the_instance() -> None:
    """B10: declared outputs only, capped in size; the message dies with a text that says what to do."""
    b = started()
    before = b.state
    error = b.dies(b.result(b.command("credit"), output={"blob": "x" * OUTPUT_BYTES_MAX}))
    assert isinstance(error, ValidationError)
    assert "at most 65536 are kept" in str(error)
    assert "response mapping" in str(error)
    assert b.state is before


def test_an_instance_keeps_no_more_than_its_bound_in_all() -> None:
    """B10: many outputs within their own bound do not add up without one."""
    n = INSTANCE_BYTES_MAX // 60_000 + 2
    do = "\n".join(f"- s{i}: {{call: shop.get, with: {{}}}}" for i in range(n))
    b = bench(deploy(do))
    b.take(b.fact("order.delayed", {"note": "n"}))
    error = None
    for _ in range(n):
        error = b.dies(b.result(b.commands[-1], output={"blob": "x" * 60_000}))
        if error is not None:
            break
    assert isinstance(error, ValidationError)
    assert f"at most {INSTANCE_BYTES_MAX}" in str(error)


def test_an_input_that_cannot_be_evaluated_kills_the_fact() -> None:
    """A fact without what the workflow declares dies with the missing field's name; nothing is started."""
    b = four_steps()
    error = b.dies(b.fact("order.delayed", {"other": 1}))
    assert isinstance(error, ExpressionError)
    assert "note" in str(error)
    assert not b.instances


def test_a_chain_without_waiting_is_bounded() -> None:
    """A definition that runs in circles without waiting kills its message with the step's name, and hangs nothing."""
    never = """switch: [{never: {when: '${ input.id == "x" }', then: end}}]"""
    b = bench(deploy(f"- a: {{{never}, then: b}}\n- b: {{{never}, then: a}}"))
    error = b.dies(b.fact("order.delayed", {"note": "n"}))
    assert isinstance(error, BusinessError)
    assert f"more than {STEPS_PER_MESSAGE_MAX} steps" in str(error)


def test_an_unknown_instance_kills_a_result_and_discards_a_park() -> None:
    """H1: a result for nobody is dead; its park is discarded, or parks of parks would loop."""
    b = started()
    other = started()
    result = other.result(other.command("credit"), output={})
    stranger = {**result.record, "instance_id": "019b76da-a800-86c2-b07d-cec74a9c0001"}
    error = b.dies(b._message("result", "t", stranger))
    assert isinstance(error, ValidationError)
    assert "no instance 019b76da-a800-86c2-b07d-cec74a9c0001" in str(error)
    park = b.signal("message_parked", {"record_id": "r", "opening": 0}, UUID(int=7 << 80 | 8 << 76 | 2 << 62))
    assert isinstance(b.take(park)[0], Discard)


# --- second facts and facts that nobody awaits -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["ignore", "reject", "queue", "start"])
def test_what_a_second_starting_fact_means_is_declared(policy: str) -> None:
    """DESIGN 4: a workflow declares what a second starting fact for the same object means."""
    b = four_steps(extra=f"onRepeat: {policy}")
    b.take(b.fact("order.delayed", {"note": "first"}))
    second = b.fact("order.delayed", {"note": "second"})
    error = b.dies(second)
    if policy == "reject":
        assert isinstance(error, BusinessError)
        assert "a second is rejected" in str(error)
        assert len(b.instances) == 1
        return
    assert error is None
    assert len(b.instances) == (2 if policy == "start" else 1)
    assert bool(b.discards) == (policy == "ignore")
    assert not b.state.kept
    b.take(b.result(b.command("look"), output={"amount": 5})) if policy != "start" else None
    assert len(b.instances) == (1 if policy == "ignore" else 2)
    if policy == "queue":
        assert b.instances[0].status is Status.COMPLETED
        assert b.instances[1].input["note"] == "second"
        assert b.instances[1].fact_id == str(second.id)
        assert not b.state.queue
        assert list(b.state.active) == [b.instances[1].id]


def test_one_fact_may_start_several_workflows() -> None:
    """B1: each workflow that a fact schedules starts, with ids of their own."""
    b = bench(*(deploy("- a: {call: shop.get, with: {}}", name=n) for n in ("two", "one")))
    b.take(b.fact("order.delayed", {"note": "n"}))
    assert [i.workflow for i in b.instances] == ["one", "two"]
    assert len({c.id for c in b.commands}) == 2
    assert b.notes[0]["also"][0]["workflow"] == "two"


def test_a_fact_that_nobody_awaits_is_kept_and_found_by_the_step_that_waits_later() -> None:
    """DESIGN 4: an early fact is kept under its object; a step that starts to wait looks there first."""
    with more_kinds():
        b = bench(deploy("- get: {call: shop.get, with: {}}\n- paid: {listen: order.paid}\n" + TELL_SUM))
        b.take(b.fact("order.paid", {"sum": 3}))
        assert [f.type for f in b.state.kept] == ["order.paid"]
        assert len(b.timers) == 1
        b.take(b.fact("order.delayed", {"note": "n"}))
        b.take(b.result(b.command("get"), output={}))
        assert b.command("tell").body == {"a": 3}
        assert not b.state.kept
        assert not b.timers


def test_a_fact_wakes_the_step_that_awaits_it_once() -> None:
    """DESIGN 4: the awaited fact wakes its step; a second one is kept, not lost."""
    with more_kinds():
        b = bench(deploy("- paid: {listen: order.paid, within: PT1H}\n" + TELL_SUM))
        b.take(b.fact("order.delayed", {"note": "n"}))
        assert b.instance.status is Status.WAITING
        b.take(b.fact("order.paid", {"sum": 3}))
        assert b.instance.status is Status.RUNNING
        assert b.command("tell").body == {"a": 3}
        assert not b.timers
        b.take(b.fact("order.paid", {"sum": 4}))
        assert [f.type for f in b.state.kept] == ["order.paid"]
        assert told(b) == [("waiting", "paid"), ("running", "tell")]


def test_a_kept_fact_goes_stale_at_its_horizon() -> None:
    """DESIGN 4: at the horizon one that is still kept is dead, stale, with its original bytes for the DLQ."""
    b = four_steps()
    fact = b.fact("order.paid", {"sum": 3})
    b.take(fact)
    b.advance(14 * 86400 + 1)
    assert not b.state.kept
    (mark,) = b.marks
    assert (mark.root, mark.disposition, mark.reason) == (fact.root.text, "dead", "stale")
    assert mark.original is not None
    assert b"factmesh.fact.v1" in mark.original


def test_a_horizon_that_comes_after_the_fact_was_taken_changes_nothing() -> None:
    """DESIGN 4: taking and going stale happen under the same lock; whichever is first, the other sees it."""
    with more_kinds():
        b = bench(deploy("- paid: {listen: order.paid}\n" + TELL_SUM))
        b.take(b.fact("order.paid", {"sum": 3}))
        (timer,) = b.timers
        late = b.fired(timer)
        b.take(b.fact("order.delayed", {"note": "n"}))
        b.take(late)
        assert b.discards == [f"fact {json.loads(late['body'])['fact_id']} is not kept any more: a step took it"]
        assert not b.marks


def test_early_facts_under_one_object_are_bounded() -> None:
    """Every queue has a bound: beyond it the fact is dead with a text, not dropped."""
    b = four_steps()
    errors = [b.dies(b.fact("order.paid", {"n": n})) for n in range(33)]
    assert errors[:32] == [None] * 32
    assert isinstance(errors[32], BusinessError)


# --- timers ----------------------------------------------------------------------------------------------------------


def test_a_timer_counts_once_and_only_while_it_is_outstanding() -> None:
    """DESIGN 4: firing twice is harmless, a timer of a step that went on counts no more."""
    with more_kinds():
        b = bench(deploy("- pause: {wait: PT1H}\n- tell: {call: bank.x, with: {}}"))
        b.take(b.fact("order.delayed", {"note": "n"}))
        (timer,) = b.timers
        fired = b.fired(timer)
        b.advance(3599)
        assert not b.commands
        b.advance(2)
        assert len(b.commands) == 1
        b.take(b.again(fired))
        assert len(b.commands) == 1
        assert "not outstanding" in b.discards[0]


def test_a_timer_that_a_step_set_is_taken_back_when_the_step_is_done() -> None:
    """DESIGN 4: a listen with a time limit ends by whichever comes first."""
    with more_kinds():
        b = bench(deploy("- paid: {listen: order.paid, within: PT1H}\n- tell: {call: bank.x, with: {}}"))
        b.take(b.fact("order.delayed", {"note": "n"}))
        b.advance(3601)
        assert b.instance.status is Status.REJECTED
        assert not b.instance.awaits


def test_an_instance_past_its_maximum_age_needs_a_person_and_can_still_finish() -> None:
    """DESIGN 8: none runs for ever; what is outstanding may still come."""
    b = started(extra="maxAge: P1D")
    body = {"timer_id": "", "name": "max_age", "step": None}
    b.take(b.signal("timer_fired", body))
    assert b.instance.status is Status.RUNNING
    b.advance(86400)
    b.take(b.signal("timer_fired", body))
    assert b.instance.status is Status.NEEDS_RESOLUTION
    assert "older than its maximum age" in (b.instance.reason or "")
    b.take(b.result(b.command("credit"), output={}))
    assert b.instance.status is Status.COMPLETED


# --- a person's acts -------------------------------------------------------------------------------------------------


def test_a_retry_is_a_new_run_under_a_new_key() -> None:
    """DESIGN 9: accepted only for the latest, failed command of its step; a new key only after a known failure."""
    b = started()
    first = b.command("credit")
    b.take(b.result(first, failed=FAILED))
    b.take(b.parked(first, "exhausted"))
    b.take(b.retry(first))
    second = b.command("credit")
    assert (first.run, second.run) == (1, 2)
    assert first.key != second.key == str(ids.idempotency_key(b.instance.id, "credit", 0, 2))
    assert b.instance.status is Status.RUNNING
    assert b.instance.reason is None
    b.take(b.result(second, output={}))
    assert b.instance.status is Status.COMPLETED


def test_a_retry_of_anything_else_dies_on_behalf_of_its_record() -> None:
    """DESIGN 9: otherwise the record is dead-lettered again under that opening; cancelled instances too."""
    b = started()
    first = b.command("credit")
    b.take(b.result(first, failed=FAILED))
    b.take(b.retry(first))
    error = b.dies(b.retry(first, opening=2))
    assert isinstance(error, BusinessError)
    assert error.on_behalf == OnBehalf(f"id:{first.id}", 2, GROUP)
    assert "not its step's latest" in str(error)
    b.take(b.result(b.command("credit"), failed=FAILED))
    b.take(b.signal("end_instance", {"status": "cancelled", "reason": "given up"}))
    error = b.dies(b.retry(b.command("credit"), opening=1))
    assert error is not None
    assert "its instance is cancelled" in str(error)


@pytest.mark.parametrize("ends", ["failed", "done"])
def test_a_retry_while_the_command_is_outstanding_is_kept_until_its_result(ends: str) -> None:
    """DESIGN 9: kept while outstanding; a failure starts the new run, a success makes it dead again."""
    b = started()
    c = b.command("credit")
    b.take(b.parked(c, "unknown"))
    b.take(b.retry(c))
    assert len(b.commands) == 2
    # Said again it is one retry: the later word counts, in whichever order they come.
    later = b.retry(c, opening=3)
    b.take(later)
    b.take(b.retry(c, opening=2))
    assert b.instance.retries[str(c.id)].opening == 3
    assert b.discards[-1] == f"a later retry of command {c.id} is kept: opening 3"
    if ends == "failed":
        b.take(b.result(c, failed=FAILED, verdict="not_happened"))
        assert b.command("credit").run == 2
        assert b.instance.status is Status.RUNNING
        assert not b.marks
    else:
        b.take(b.result(c, output={}, verdict="happened"))
        assert b.instance.status is Status.COMPLETED
        (mark,) = b.marks
        assert (mark.root, mark.disposition) == (later.root.text, "dead")
        assert mark.on_behalf == OnBehalf(f"id:{c.id}", 3, GROUP)
    assert not b.instance.retries


@pytest.mark.parametrize("park_first", [True, False])
def test_a_retry_goes_with_the_word_that_it_was_said_with(park_first: bool) -> None:
    """DESIGN 9: `--not-happened --retry` is refused, too early: its retry does not wait for a later word."""
    b = started()
    c = b.command("credit")
    b.take(b.parked(c, "unknown"))
    messages = [b.parked(c, "validation", opening=1), b.retry(c, opening=1)]
    for m in messages if park_first else reversed(messages):
        b.take(m)
    assert not b.instance.retries
    assert b.instance.status is Status.PARKED
    b.take(b.result(c, failed=FAILED, verdict="not_happened"))
    assert b.instance.status is Status.NEEDS_RESOLUTION
    b.take(b.retry(c, opening=2))
    assert b.command("credit").run == 2
    assert not b.marks


def test_an_unknown_outcome_is_resolved_as_happened_and_goes_on() -> None:
    """E2, DESIGN 9: a resolution's result ends every park of its command, whichever arrives first."""
    for order in (0, 1):
        b = started()
        c = b.command("credit")
        messages = [b.parked(c, "unknown"), b.result(c, output={}, verdict="happened")]
        for m in messages if order == 0 else reversed(messages):
            b.take(m)
        assert b.instance.status is Status.COMPLETED
        assert not b.instance.has_park


@pytest.mark.parametrize("status", ["failed", "cancelled", "completed", "rejected"])
def test_a_person_ends_what_needs_a_person(status: str) -> None:
    """B5: marked as resolved by hand with a reason, which the status topic tells."""
    b = started()
    b.take(b.result(b.command("credit"), failed=FAILED))
    b.take(b.parked(b.command("credit"), "exhausted"))
    b.take(b.signal("end_instance", {"status": status, "reason": "paid by hand"}))
    assert b.instance.status == status
    assert b.instance.outcome == status
    assert b.statuses[-1]["reason"] == "person:tester: paid by hand"
    assert not b.state.active


def test_ending_is_refused_while_it_runs_and_over_an_unknown() -> None:
    """DESIGN 5: cancelling waits until outstanding results are in; the refusal is recorded and nothing changes."""
    b = started()
    end = {"status": "cancelled", "reason": "x"}
    b.take(b.signal("end_instance", end))
    b.take(b.parked(b.command("credit"), "unknown"))
    b.take(b.signal("end_instance", end))
    assert b.instance.status is Status.PARKED
    assert "only what is parked or needs_resolution" in b.discards[0]
    assert "is outstanding; replay, resolve or discard" in b.discards[1]
    with pytest.raises(ValidationError, match="an instance is ended as"):
        b.take(b.signal("end_instance", {"status": "running", "reason": "x"}))


def test_an_instance_that_is_too_old_is_not_ended_over_a_command_that_is_out() -> None:
    """⚑ DESIGN 5: past its maximum age it needs a person, who waits for the result all the same, for it may stand."""
    b = started(extra="maxAge: P1D")
    b.advance(86400)
    b.take(b.signal("timer_fired", {"timer_id": "", "name": "max_age", "step": None}))
    assert b.instance.status is Status.NEEDS_RESOLUTION
    end = {"status": "cancelled", "reason": "x"}
    b.take(b.signal("end_instance", end))
    assert b.instance.status is Status.NEEDS_RESOLUTION
    assert "is outstanding" in b.discards[-1]
    b.take(b.result(b.command("credit"), failed=FAILED))
    b.take(b.signal("end_instance", end))
    assert b.instance.status is Status.CANCELLED


def test_a_given_up_message_leaves_an_instance_that_a_person_can_end() -> None:
    """DESIGN 9: any discard left is needs_resolution, which a person can end, though a command is outstanding."""
    b = started()
    b.take(b.parked(b.command("credit"), "decode"))
    record = b.record_of(b.command("credit"))
    b.take(b.signal("message_discarded", {"record_id": record, "opening": 0, "reason": "torn"}))
    assert b.instance.status is Status.NEEDS_RESOLUTION
    b.take(b.signal("end_instance", {"status": "failed", "reason": "torn"}))
    assert b.instance.status is Status.FAILED


@pytest.mark.parametrize(
    "body", [{}, {"record_id": "r"}, {"record_id": "", "opening": 0}, {"record_id": "r", "opening": True}]
)
def test_a_torn_signal_dies_with_the_field_that_is_wrong(body: dict[str, object]) -> None:
    """A person's or service's signal that lacks a field gets a clear answer."""
    b = started()
    assert isinstance(b.dies(b.signal("message_parked", body)), ValidationError)
    assert "no signal is called" in str(b.dies(b.signal("nonsense", {})))
