"""Ways back of notifications and facts: nobody is told twice, and a fact is accepted once, however it came back."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from tests.support.waiting import until
from tests.support.ways_back import Depot, number

from factmesh.message import Emission, unpack_delivery
from factmesh.postgres import Record
from factmesh_cli.dlq_index import catch_up
from factmesh_quarantine import queries
from factmesh_quarantine.acts import RefusedError
from factmesh_quarantine.model import State

pytestmark = pytest.mark.stack

NOTIFIER = "factmesh.command.notifier.v1"
RAW = "facts.raw"


# --- notifications ----------------------------------------------------------------------------------------------------


async def test_a_mail_that_is_refused_for_now_is_tried_again(depot: Depot) -> None:
    """D2, C4: 451 is known not to have been sent; the retry sends it once, nobody is asked."""
    parcel = number()
    await depot.ill("mail", depot.address(parcel), fault="reject_temporary", attempts=2)
    id_ = await depot.arrive(parcel, "weigh")
    await depot.until_effects(parcel, weighing=1, mail=1)
    assert await depot.nothing_open(id_)


async def test_a_mail_of_which_nobody_knows_is_resolved(depot: Depot) -> None:
    """D2, E2: taken without an answer it is unknown: `happened` sends none, `not_happened` sends again."""
    told, lost = number(), number()
    await depot.ill("mail", depot.address(told), fault="drop_after")
    await depot.ill("mail", depot.address(lost), fault="drop_before")
    ids_ = {parcel: await depot.arrive(parcel, "weigh") for parcel in (told, lost)}
    records = {parcel: (await depot.of(id_, "unknown"))["id"] for parcel, id_ in ids_.items()}
    assert depot.effects(told) == {"weighing": 1, "mail": 1}
    assert depot.effects(lost) == {"weighing": 1}
    for parcel in (told, lost):
        await depot.until_status(parcel, "completed")
        await depot.well("mail", depot.address(parcel))
        ran = await depot.run("dlq", "replay", str(records[parcel]), "--yes")
        assert ran.code == 1
        assert "never simply replayed" in ran.err

    ran = await depot.run("dlq", "resolve", str(records[lost]), "--not-happened", "--retry", "--reason", "x", "--yes")
    assert ran.code == 1
    assert "sent again by itself" in ran.err
    await depot.not_in_flight(records[lost])
    ran = await depot.run("dlq", "resolve", str(records[told]), "--happened", "{}", "--reason", "seen", "--yes")
    assert ran.code == 0, ran.err
    ran = await depot.run("dlq", "resolve", str(records[lost]), "--not-happened", "--reason", "asked", "--yes")
    assert ran.code == 0, ran.err
    await depot.until_effects(lost, weighing=1, mail=1)
    await depot.until_effects(told, weighing=1, mail=1)
    with pytest.raises(RefusedError, match="it is resolved by"):
        await depot.resolve(records[lost], "not_happened")
    for id_ in ids_.values():
        assert await depot.nothing_open(id_)


async def test_a_mail_said_too_early_not_to_have_happened(depot: Depot) -> None:
    """⚑ DESIGN 5: an attempt may be in flight; the word is refused and shown, and counts when it is said again."""
    parcel = number()
    await depot.ill("mail", depot.address(parcel), fault="drop_before")
    id_ = await depot.arrive(parcel, "weigh")
    record = (await depot.of(id_, "unknown"))["id"]
    await depot.resolve(record, "not_happened")
    refused = await depot.until_state(record, State.FAILED_AGAIN, 1)
    assert "may still be in flight" in refused["message"]
    assert "look again after that instant" in refused["message"]
    await depot.well("mail", depot.address(parcel))
    await depot.not_in_flight(record)
    await depot.resolve(record, "not_happened")
    await depot.until_effects(parcel, weighing=1, mail=1)
    assert await depot.nothing_open(id_)
    # Every park of it is cancelled by the release, so nothing would hold an instance that goes on.
    released = await until("its release", lambda: depot.signals(id_, "message_released"))
    parked = await depot.signals(id_, "message_parked")
    assert {p["record_id"] for p in parked} == {r["record_id"] for r in released}
    assert max(p["opening"] for p in parked) < max(r["opening"] for r in released)


async def test_a_mail_to_nobody_is_corrected_and_sent_once(depot: Depot) -> None:
    """D2, E2: refused for good; replayed as it is it dies again; with the right address it is sent once."""
    parcel = number()
    wrong = f"nobody-{parcel.lower()}@home.example"
    await depot.ill("mail", wrong, fault="reject_permanent")
    id_ = await depot.arrive(parcel, "weigh", email=wrong)
    record = await depot.of(id_, "exhausted")
    assert wrong not in record["message"], "no address in a diagnosis"
    await depot.replay(record["id"])
    await depot.until_state(record["id"], State.FAILED_AGAIN, 1)
    body = json.dumps({"template": "told", "channel": "email", "to": depot.address(parcel), "data": {"parcel": parcel}})
    ran = await depot.run("dlq", "correct", str(record["id"]), "--set", f"body={body}", "--yes")
    assert ran.code == 0, ran.err
    await depot.replay(record["id"])
    await depot.until_effects(parcel, weighing=1, mail=1)
    assert await depot.nothing_open(id_)

    # Redelivered, and replayed once more under a number that was given out: nobody is told twice.
    sent = [d for d in await depot.raw(NOTIFIER) if d.key == str(id_).encode()]
    assert [d.opening for d in sent] == [0, 1, 2]
    await depot.publisher.publish([Emission(d.topic, d.key, d.value, d.headers) for d in sent])
    with pytest.raises(RefusedError):
        await depot.replay(record["id"])
    await asyncio.sleep(2.0)
    assert await depot.nothing_open(id_)
    assert depot.effects(parcel) == {"weighing": 1, "mail": 1}
    with depot.log() as log:
        assert log.mails(wrong) == []


# --- facts ------------------------------------------------------------------------------------------------------------


async def test_a_stale_fact_is_accepted_once(depot: Depot) -> None:
    """DESIGN 8: too old to be proved new: dead; its opening is the operator's word, and it is accepted once."""
    parcel = number()
    old = datetime.now(UTC) - timedelta(days=30)
    data = depot.data(parcel, "weigh") | {"seen_at": old.replace(microsecond=0).isoformat().replace("+00:00", "Z")}
    await depot.publish_fact(parcel, data)
    record = await dead_fact(depot, parcel, "stale")
    assert await depot.row(parcel) is None
    await depot.replay(record)
    await depot.until_status(parcel, "completed")
    await depot.publish_fact(parcel, data)
    with pytest.raises(RefusedError, match="it is replayed by ann"):
        await depot.replay(record)
    await depot.until_effects(parcel, weighing=1, mail=1)
    await asyncio.sleep(1.0)
    assert (await depot.read(record))["state"] == State.REPLAYED


async def test_a_conflict_never_counts_under_a_taken_id(depot: Depot) -> None:
    """A4, DESIGN 9: another body under a taken id; replayed or corrected it is refused, and stays."""
    first, second = number(), number()
    await depot.publish_fact(first, depot.data(first, "weigh"), "one-id-" + first)
    await depot.until_status(first, "completed")
    await depot.publish_fact(second, depot.data(second, "weigh"), "one-id-" + first)
    record = await dead_fact(depot, second, "conflict")
    await depot.replay(record)
    again = await depot.until_state(record, State.FAILED_AGAIN, 1)
    assert "a message that is done already" in again["message"]
    # The root is the id that it came with, whatever a correction says: its row is done.
    ran = await depot.run("dlq", "correct", str(record), "--header", f"ce_id=other-{second}", "--yes")
    assert ran.code == 0, ran.err
    await depot.replay(record)
    again = await depot.until_state(record, State.FAILED_AGAIN, 2)
    assert "its sender" in again["message"]
    assert "under an id of its own" in again["message"]
    assert await depot.row(second) is None
    seen_at = depot.data(second, "weigh")["seen_at"]
    for _ in range(2):
        await depot.publish_fact(second, depot.data(second, "weigh") | {"seen_at": seen_at}, f"new-{second}")
    ran = await depot.run("dlq", "discard", str(record), "--reason", "sent under its own id", "--yes")
    assert ran.code == 0, ran.err
    await depot.until_status(second, "completed")
    await depot.until_effects(first, weighing=1, mail=1)
    await depot.until_effects(second, weighing=1, mail=1)
    assert (await depot.read(record))["state"] == State.DISCARDED


async def test_a_corrected_fact_meets_its_resent_twin(depot: Depot) -> None:
    """⚑ DESIGN 9: upstream resends what it had sent wrong while an operator corrects it: accepted once."""
    for twin_first in (True, False):
        parcel = number()
        good = depot.data(parcel, "weigh")
        bad = {k: v for k, v in good.items() if k != "email"}
        await depot.publish_fact(parcel, bad)
        record = await dead_fact(depot, parcel, "validation")
        original = unpack_delivery((await depot.read(record))["original"])
        assert original.header("ce_id") == f"fact-{parcel}"
        await depot.correct(record, value=json.dumps(good).encode())
        if twin_first:
            await depot.publish_fact(parcel, good, f"resent-{parcel}")
            await depot.until_status(parcel, "completed")
            await depot.correct_headers(record, ("ce_id", f"resent-{parcel}"))
            await depot.replay(record)
            again = await depot.until_state(record, State.FAILED_AGAIN, 1)
            assert "done already" in again["message"]
            ran = await depot.run("dlq", "discard", str(record), "--reason", "it was sent again", "--yes")
            assert ran.code == 0, ran.err
        else:
            await depot.replay(record)
            await depot.until_status(parcel, "completed")
            await depot.publish_fact(parcel, good)
            await asyncio.sleep(1.0)
            assert (await depot.read(record))["state"] == State.REPLAYED
        await depot.until_effects(parcel, weighing=1, mail=1)


async def dead_fact(depot: Depot, parcel: str, reason: str) -> UUID:
    """The id of the one record of a fact that lies on the DLQ of the raw topic."""

    async def found() -> Record | None:
        await catch_up(depot.index)
        rows = await queries.list_records(depot.index.pool, queries.Filter(topic=RAW))
        mine = [r for r in rows if unpack_delivery(r["original"]).key == parcel.encode()]
        assert len(mine) <= 1, [r["message"] for r in mine]
        return mine[0] if mine else None

    row = await until(f"{reason} of {parcel}", found)
    assert row["reason"] == reason, row["message"]
    id_: UUID = row["id"]
    return id_
