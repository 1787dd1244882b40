"""Ways back of commands: exhausted, unknown, dead before it was a row; each judged by the log of the system outside."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.support.ways_back import Depot, number

from factmesh_quarantine.acts import RefusedError
from factmesh_quarantine.model import State

pytestmark = pytest.mark.stack


async def test_an_exhausted_command_is_retried_until_its_system_is_well(depot: Depot) -> None:
    """H1, E2: parked while it is ill, each replay a new run under a new key, completed after healing, one effect."""
    parcel = number()
    await depot.ill("scales", parcel, fault="server_error")
    id_ = await depot.arrive(parcel, "weigh")
    shown = await depot.until_status(parcel, "parked", "weigh")
    assert shown["due_by"] is not None, "the SLA clock goes on while it is parked"
    assert shown["attention_since"] is not None
    first = await depot.of(id_, "exhausted")
    assert (first["attempts"], first["step"], first["error_class"]) == (2, "weigh", "transient")

    # Still ill: the new run fails as the first did, and is a record of its own, because it is a command of its own.
    assert (await depot.replay(first["id"])).number == 1
    second = await depot.of(id_, "exhausted")
    assert second["id"] != first["id"]
    shown = await depot.until_status(parcel, "parked", "weigh")
    assert (await depot.read(first["id"]))["state"] == State.REPLAYED
    with pytest.raises(RefusedError, match="it is replayed by ann, not open"):
        await depot.replay(first["id"])

    await depot.well("scales", parcel)
    ran = await depot.run("dlq", "replay", str(second["id"]), "--yes", "--by", "ann")
    assert (ran.code, ran.out.strip()) == (0, "replay: 1 done, 0 skipped, of 1"), ran.err
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, weighing=1, mail=1)
    again = await depot.run("dlq", "replay", str(second["id"]), "--yes")
    assert again.code == 1
    assert "it is replayed by ann, not open" in again.err

    runs = await depot.commands("scales", id_)
    assert [m["run"] for m in runs] == [1, 2, 3]
    assert len({m["idempotency_key"] for m in runs}) == 3
    with depot.log() as log:
        keys = [c.idempotency_key for c in log.calls("scales", subject=parcel)]
    assert keys == [runs[0]["idempotency_key"]] * 2 + [runs[1]["idempotency_key"]] * 2 + [runs[2]["idempotency_key"]]
    assert await depot.nothing_open(id_)


async def test_an_unknown_command_that_happened(depot: Depot) -> None:
    """C2, E2, INV-X: no result and no replay; `happened` with a whole output ends it, one effect; a second none."""
    parcel = number()
    await depot.ill("books", parcel, fault="no_answer", hold_s=3)
    id_ = await depot.arrive(parcel, "enter")
    await depot.until_status(parcel, "parked", "enter")
    record = await depot.of(id_, "unknown")
    assert await depot.messages("factmesh.result.v1", id_) == []
    assert depot.effects(parcel) == {"entry": 1}

    ran = await depot.run("dlq", "replay", str(record["id"]), "--yes")
    assert ran.code == 1
    assert "whether it happened is unknown, so it is never simply replayed" in ran.err
    assert "factmesh dlq resolve" in ran.err
    ran = await depot.run("dlq", "discard", str(record["id"]), "--reason", "no", "--yes")
    assert ran.code == 1
    assert "factmesh dlq resolve" in ran.err

    # An output without the field that later steps read is refused by the connector, and the record is open again.
    await depot.resolve(record["id"], "happened", {"leaf": "P-1"})
    again = await depot.until_state(record["id"], State.FAILED_AGAIN, 1)
    assert again["id"] == record["id"]
    await depot.until_status(parcel, "parked")
    shown = await depot.run("dlq", "show", str(record["id"]))
    assert "the output lacks page" in shown.out

    output = json.dumps({"page": "P-7"})
    arguments = ("dlq", "resolve", str(record["id"]), "--happened", output, "--reason", "seen in the book", "--yes")
    ran = await depot.run(*arguments)
    assert ran.code == 0, ran.err
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, entry=1, mail=1)
    assert (await depot.state(id_))["steps"]["enter"][2] == {"page": "P-7"}
    ran = await depot.run(*arguments)
    assert ran.code == 1
    assert "it is resolved by" in ran.err
    assert await depot.nothing_open(id_)


async def test_an_unknown_command_that_did_not_happen(depot: Depot) -> None:
    """⚑ DESIGN 5, 9: said too early it is refused and shown; said again it counts; --retry runs under a new key."""
    parcel = number()
    await depot.ill("books", parcel, fault="hang", hold_s=2)
    id_ = await depot.arrive(parcel, "enter")
    await depot.until_status(parcel, "parked", "enter")
    record = await depot.of(id_, "unknown")
    await depot.resolve(record["id"], "not_happened")
    refused = await depot.until_state(record["id"], State.FAILED_AGAIN, 1)
    ran = await depot.run("dlq", "show", str(refused["id"]))
    assert "may still be in flight" in ran.out
    assert "look again after that instant" in ran.out
    assert f"factmesh dlq resolve {str(record['id'])[:13]} --happened OUTPUT" in ran.out
    shown = await depot.run("instance", "show", str(id_))
    assert f"factmesh dlq list --instance {id_}" in shown.out
    # The name by which the instance knows the record finds it too.
    assert str(record["thread"]) in shown.out
    found = await depot.run("dlq", "show", str(record["thread"]))
    assert (found.code, str(record["id"]) in found.out) == (0, True), found.err
    ran = await depot.run("dlq", "correct", str(record["id"]), "--set", "step=x", "--yes")
    assert ran.code == 2
    assert "a command that ended unknown is not sent again as it was" in ran.err
    assert ran.out == "", "no diff of what is refused"

    await depot.well("books", parcel)
    await depot.not_in_flight(record["id"])
    ran = await depot.run(
        "dlq", "resolve", str(record["id"]), "--not-happened", "--retry", "--reason", "not in the book", "--yes"
    )
    assert ran.code == 0, ran.err
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, entry=1, mail=1)
    runs = await depot.commands("books", id_)
    assert [m["run"] for m in runs] == [1, 2]
    assert len({m["idempotency_key"] for m in runs}) == 2
    assert (await depot.read(record["id"]))["state"] == State.RESOLVED
    assert await depot.nothing_open(id_)


async def test_a_retry_that_was_said_too_early_goes_with_its_word(depot: Depot) -> None:
    """⚑ DESIGN 9: a refused `--not-happened --retry` leaves no retry behind; said again, it is one new run."""
    parcels = {"again": number(), "rest": number(), "happened": number()}
    records = {}
    for parcel in parcels.values():
        await depot.ill("books", parcel, fault="hang", hold_s=2)
    ids_ = {name: await depot.arrive(parcel, "enter") for name, parcel in parcels.items()}
    for name, parcel in parcels.items():
        await depot.until_status(parcel, "parked", "enter")
        records[name] = (await depot.of(ids_[name], "unknown"))["id"]
        await depot.resolve(records[name], "not_happened", retry=True)
        await depot.until_state(records[name], State.FAILED_AGAIN, 1)
    for name, parcel in parcels.items():
        await depot.well("books", parcel)
        await depot.not_in_flight(records[name])

    await depot.resolve(records["again"], "not_happened", retry=True)
    await depot.resolve(records["rest"], "not_happened")
    await depot.resolve(records["happened"], "happened", {"page": "P-0"})
    await depot.until_status(parcels["again"], "completed")
    await depot.until_effects(parcels["again"], entry=1, mail=1)
    await depot.until_status(parcels["rest"], "needs_resolution")
    await depot.until_status(parcels["happened"], "completed")
    await depot.until_effects(parcels["happened"], mail=1)
    await asyncio.sleep(1.0)
    assert depot.effects(parcels["rest"]) == {}, "nobody asked for a new run"
    for name, record in records.items():
        assert (await depot.read(record))["state"] == State.RESOLVED, name
        assert await depot.nothing_open(ids_[name])
        assert len(await depot.commands("books", ids_[name])) == (2 if name == "again" else 1)
    ran = await depot.run(
        "instance", "end", str(ids_["rest"]), "--status", "cancelled", "--reason", "not wanted any more"
    )
    assert ran.code == 0, ran.err


async def test_two_operators_resolve_one_command(depot: Depot) -> None:
    """E2: of two words on one unknown outcome one counts; the other is refused with who was faster."""
    parcel = number()
    await depot.ill("books", parcel, fault="no_answer", hold_s=3)
    id_ = await depot.arrive(parcel, "enter")
    record = (await depot.of(id_, "unknown"))["id"]
    said = await asyncio.gather(
        *(depot.resolve(record, "happened", {"page": f"P-{n}"}) for n in range(4)), return_exceptions=True
    )
    refused = [s for s in said if isinstance(s, RefusedError)]
    assert len(refused) == 3
    assert all("it is resolved by ann" in str(s) for s in refused)
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, entry=1, mail=1)
    (result,) = await depot.messages("factmesh.result.v1", id_)
    assert result["verdict"] == "happened"


async def test_a_command_that_nobody_declared_is_corrected_and_goes_on(depot: Depot) -> None:
    """DESIGN 9: it died before it was a row, so it is replayed like any message; a bad body dies again."""
    parcel = number()
    id_ = await depot.arrive(parcel, "stamp")
    await depot.until_status(parcel, "parked", "stamp")
    record = await depot.of(id_, "validation")
    assert "no operation scales.stamp is declared here" in record["message"]
    await depot.correct(record["id"], "operation=weigh", "body=[1,2]")
    await depot.replay(record["id"])
    again = await depot.until_state(record["id"], State.FAILED_AGAIN, 1)
    assert "body is not a JSON object" in again["message"]
    await depot.until_status(parcel, "parked", "stamp")
    ran = await depot.run(
        "dlq", "correct", str(record["id"]), "--set", "operation=weigh", "--set", json.dumps({"parcel": parcel}).join(
            ("body=", "")
        ), "--yes",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    await depot.replay(record["id"])
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, weighing=1, mail=1)
    assert (await depot.read(record["id"]))["state"] == State.REPLAYED
    released = await depot.signals(id_, "message_released")
    assert [(s["record_id"], s["opening"]) for s in released] == [(str(record["thread"]), 2)]


async def test_a_command_that_nobody_declared_is_given_up(depot: Depot) -> None:
    """DESIGN 9: its discard is a resolution: the step failed, the instance needs a person, who ends it by hand."""
    parcel = number()
    id_ = await depot.arrive(parcel, "stamp")
    await depot.until_status(parcel, "parked", "stamp")
    record = await depot.of(id_, "validation")
    ran = await depot.run("instance", "end", str(id_), "--status", "cancelled", "--reason", "too early")
    assert ran.code == 1
    assert "a command of it is outstanding" in ran.err
    ran = await depot.run("dlq", "discard", str(record["id"]), "--reason", "no such machine", "--yes")
    assert ran.code == 0, ran.err
    shown = await depot.until_status(parcel, "needs_resolution", "stamp")
    (result,) = await depot.messages("factmesh.result.v1", id_)
    assert (result["outcome"], result["verdict"]) == ("failed", "discarded")
    assert (await depot.read(record["id"]))["state"] == State.DISCARDED
    ran = await depot.run("dlq", "replay", str(record["id"]), "--yes")
    assert ran.code == 1
    ran = await depot.run("instance", "end", str(shown["id"]), "--status", "cancelled", "--reason", "no such machine")
    assert ran.code == 0, ran.err
    assert "ended as cancelled" in ran.out
    assert depot.effects(parcel) == {}
