"""Every ⚑ rule of the design by a short name, with the tests of the product that guard it; and what no model says.
A list, and nothing that decides: `test_models` holds it against the models and against the tests that it names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flag:
    """A ⚑ rule: where the design says it, in what words, and which tests of the product hold it."""

    section: str
    says: str
    guards: tuple[str, ...]


BATCH = "tests/integration/test_batch_loop.py"
CLAIM = "tests/integration/test_claim_loop.py"
FAULTS = "tests/integration/test_kernel_faults.py"
OPENINGS = "tests/integration/test_kernel_openings.py"
SERVICE = "tests/integration/test_connector_service.py"
INDEX = "tests/integration/test_dlq_index.py"
DECIDE = "tests/unit/test_orchestrator_decide.py"
FOLLOW = "tests/unit/test_connector_follow.py"
VERDICT = "tests/unit/test_verdict.py"
STATE = "tests/unit/test_orchestrator_model.py"
IDS = "tests/unit/test_ids.py"

FLAGS: dict[str, Flag] = {
    "lock": Flag(
        "3", "The row lock on the business object carries safety, not the partition.",
        (f"{BATCH}::test_two_replicas_share_the_work_and_no_count_is_lost",
         "tests/integration/test_orchestrator.py::test_two_replicas_fold_one_object_one_after_the_other",
         f"{FAULTS}::test_an_unknown_commit_outcome_is_found_out"),
    ),
    "offsets": Flag(
        "3", "Offsets never pass a batch that is not yet published, however many batches are in flight.",
        (f"{BATCH}::test_offsets_do_not_pass_what_is_not_published",),
    ),
    "size": Flag(
        "3", "An emission too large for its topic fails in `decide`'s validation, before the commit.",
        ("tests/unit/test_emitting.py::test_what_does_not_fit_its_topic_fails_before_the_commit",),
    ),
    "ripple": Flag(
        "3", "Only a redelivery from the coordinates recorded for the row's current opening publishes again.",
        (f"{BATCH}::test_a_duplicate_publishes_nothing_a_redelivery_publishes_the_same_again",
         f"{OPENINGS}::test_only_the_coordinates_of_the_current_opening_publish_again"),
    ),
    "kept": Flag(
        "4", "A fact that nobody awaits yet is kept; a step looks there first; the horizon, all under one lock.",
        (f"{DECIDE}::test_a_fact_that_nobody_awaits_is_kept_and_found_by_the_step_that_waits_later",
         "tests/integration/test_orchestrator.py::test_a_kept_fact_goes_to_the_dlq_at_its_horizon",
         f"{OPENINGS}::test_a_message_that_was_kept_can_die_later_and_come_back"),
    ),
    "cancel": Flag(
        "5", "Cancel and compensation wait until outstanding results are in.",
        (f"{DECIDE}::test_ending_is_refused_while_it_runs_and_over_an_unknown",),
    ),
    "returned": Flag(
        "5", "Only rows returned by the settlement are published; an outcome that is not published is a due row.",
        (f"{CLAIM}::test_a_settlement_from_a_lost_lease_changes_nothing",
         f"{CLAIM}::test_an_outcome_that_was_not_published_is_published_by_any_replica"),
    ),
    "failed": Flag(
        "5", "Failed means known not to have worked.",
        (f"{FOLLOW}::test_no_row_fails_what_may_have_worked",),
    ),
    "not-found": Flag(
        "5", '"Not found" counts only after `in_flight_max_s`; the lease covers the timeout before the first byte.',
        (f"{SERVICE}::test_not_happened_counts_only_after_the_time_in_flight",
         "tests/unit/test_connector_attempt.py::test_no_byte_leaves_on_a_lease_that_does_not_cover_the_call"),
    ),
    "ids": Flag(
        "7", "Message ids and keys derive from their cause; a new run or body comes only after a known failure.",
        ("tests/unit/test_emitting.py::test_the_same_cause_emits_the_same_bytes",
         f"{BATCH}::test_the_same_id_with_another_body_is_a_conflict"),
    ),
    "order": Flag(
        "7", "No receiver relies on order between messages; readers outside ignore a lower `instance_seq`.",
        (f"{STATE}::test_any_history_keeps_the_sequence_gapless_and_the_shown_moves_legal",),
    ),
    "numbers": Flag(
        "9", "Per record three numbers only rise; raising is one conditional update, before the publication.",
        (f"{INDEX}::test_two_operators_raise_once", f"{INDEX}::test_killed_between_raise_and_publish",
         f"{INDEX}::test_killed_between_publish_and_mark", f"{INDEX}::test_numbers_only_rise"),
    ),
    "openings": Flag(
        "9", "A replay is a new opening of the same root; the receiver judges by root id and own id.",
        (f"{VERDICT}::test_every_row_of_the_table", f"{VERDICT}::test_no_opening_is_dropped_in_silence",
         f"{BATCH}::test_a_corrected_message_that_meets_its_twin_is_not_applied_twice"),
    ),
    "parked": Flag(
        "9", "Parked, released, discarded: emitted in the transactions that make them so; the highest ones count.",
        (f"{STATE}::test_any_order_and_any_repeats_of_park_signals_end_equal",
         f"{INDEX}::test_discard_tells_the_instance"),
    ),
    "commands": Flag(
        "9", "Commands are not replayed: retry-step, resolve, discard as a resolution.",
        (f"{SERVICE}::test_an_unknown_is_resolved_as_happened_once",
         f"{SERVICE}::test_a_command_that_never_became_a_row_is_discarded",
         f"{DECIDE}::test_a_retry_while_the_command_is_outstanding_is_kept_until_its_result"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Besides:
    """A part of a ⚑ rule that no switch stands for, why, and the test of the product that holds it."""

    flag: str
    what: str
    why: str
    guard: str


BESIDES: tuple[Besides, ...] = (
    Besides(
        "lock", "deadlock, timeout and a lost connection are transient: the batch is tried again",
        "to the model they are a crash: nothing of the transaction stays, and the batch comes again",
        f"{FAULTS}::test_a_deadlock_is_waited_out",
    ),
    Besides(
        "lock", "a unique violation reruns the batch on the slow path",
        "two ways to the same rows; the model knows the rows only",
        f"{FAULTS}::test_a_unique_violation_of_the_services_own_is_no_repeat",
    ),
    Besides(
        "kept", "a callback is kept like a fact", "this release has no callbacks",
        f"{DECIDE}::test_a_fact_that_nobody_awaits_is_kept_and_found_by_the_step_that_waits_later",
    ),
    Besides(
        "failed", "`lookup` asks once more before it ends unknown",
        "a matter of how often a person is troubled; without it every promise holds",
        f"{FOLLOW}::test_no_row_calls_again_what_cannot_be_repeated",
    ),
    Besides(
        "ids", "time-ordered UUIDs of version 8 that tell their own day",
        "a matter of form and speed; `clocks` has the rule that needs the day",
        "tests/integration/test_kernel_openings.py::test_an_opening_that_is_of_no_day_dies_under_its_own_number",
    ),
    Besides(
        "ids", "the instant of a fact is the one that intake's ledger recorded",
        "bytes once recorded are what is published again; no model found a way to derive an emission twice where the "
        "transaction was committed. It guards against a ledger that lost its newest rows, which is outside the promise",
        "tests/unit/test_emitting.py::test_the_same_cause_emits_the_same_bytes",
    ),
    Besides(
        "order", "every message about an instance carries seq, type and id of its business object",
        "a matter of the schema",
        "tests/unit/test_emitting.py::test_the_envelope_is_completed_from_the_cause_and_the_body_wins",
    ),
    Besides(
        "openings", "key, value and headers are restored exactly; a correction passes the conflict test",
        "the model has no bytes", "tests/unit/test_dlq.py::test_restored_byte_for_byte",
    ),
    Besides(
        "parked", "what an instance shows while several records are parked, and once it has ended",
        "one record at a time in the model; its status is the product's own",
        f"{STATE}::test_what_cancels_a_park",
    ),
    Besides(
        "commands", "`retry-step` only for its step's latest command",
        "the model's record has one command; a newer run needs a second record",
        "tests/mesh/ways_back/test_parks.py::test_a_retry_that_cannot_be_is_filed_to_its_record_again",
    ),
)  # fmt: skip
