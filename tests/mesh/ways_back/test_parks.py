"""Parks, releases, discards and retries of instances: in any order, of ended ones, and what must not loop."""

from __future__ import annotations

import asyncio
import itertools
import json
from functools import partial
from uuid import UUID, uuid4

import pytest
from tests.support.waiting import until
from tests.support.ways_back import Depot, number, person

from factmesh import ids
from factmesh.message import to_ms
from factmesh_quarantine.acts import about_of
from factmesh_quarantine.messages import retry_step
from factmesh_quarantine.model import State

pytestmark = pytest.mark.stack

RESULTS = "factmesh.result.v1"
SIGNALS = "factmesh.signal.v1"


async def resting(depot: Depot) -> tuple[str, UUID]:
    """An instance that rests after a known failure, its exhausted record discarded: only its own state is shown."""
    parcel = number()
    await depot.ill("scales", parcel, fault="server_error")
    id_ = await depot.arrive(parcel, "weigh")
    await depot.until_status(parcel, "parked", "weigh")
    return parcel, id_


async def test_poison_on_the_result_topic_parks_and_is_given_up(depot: Depot) -> None:
    """H1, INV-D: bytes that nobody can read, under an instance's key: parked, given up, a person ends the instance."""
    parcel = number()
    await depot.ill("scales", parcel, fault="slow", delay_s=2.5, attempts=1)
    id_ = await depot.arrive(parcel, "weigh")
    await depot.publish(RESULTS, str(id_).encode(), b"\x00\x00\x00\x00\x05corrupt")
    await depot.until_status(parcel, "parked")
    (record,) = await depot.find("the poison", instance_id=id_)
    assert record["reason"] in ("decode", "schema")
    # What it waits for goes on underneath; the instance is done with it, and is not parked by it any more.
    await depot.until_status(parcel, "completed")
    ran = await depot.run("dlq", "discard", str(record["id"]), "--reason", "noise", "--yes")
    assert ran.code == 0, ran.err
    await depot.until_effects(parcel, weighing=1, mail=1)
    assert (await depot.row(parcel))["status"] == "completed"  # type: ignore[index]

    parcel, id_ = await resting(depot)
    exhausted = await depot.of(id_, "exhausted")
    await depot.discard(exhausted["id"])
    await depot.until_status(parcel, "needs_resolution")
    await depot.publish(RESULTS, str(id_).encode(), b"\x00\x00")
    await depot.until_status(parcel, "parked")
    (record,) = await depot.find("the poison", instance_id=id_)
    ran = await depot.run("dlq", "show", str(record["id"]))
    assert ran.code == 0, ran.err
    await depot.discard(record["id"])
    await depot.until_status(parcel, "needs_resolution")
    ran = await depot.run("instance", "end", str(id_), "--status", "failed", "--reason", "given up")
    assert ran.code == 0, ran.err
    assert (await depot.row(parcel))["status"] == "failed"  # type: ignore[index]
    assert depot.effects(parcel) == {}


async def test_a_corrected_result_releases_and_counts_once(depot: Depot) -> None:
    """H1, DESIGN 9: a result whose bytes were torn is corrected and counts; its twin, sent again, changes nothing."""
    parcel = number()
    depot.mesh.kill("connector")
    try:
        id_ = await depot.arrive(parcel, "weigh")
        (command,) = await until("the command", lambda: depot.commands("scales", id_))
        good = depot.records.encode("result", _result_of(command.record))
        await depot.publish(RESULTS, str(id_).encode(), good[:-3])
        await depot.until_status(parcel, "parked", "weigh")
        (record,) = await depot.find("the torn result", instance_id=id_)
        await depot.correct(record["id"], value=good)
        await depot.replay(record["id"])
        await depot.until_status(parcel, "completed")
        await depot.publish(RESULTS, str(id_).encode(), good)
        released = await until("its release", lambda: depot.signals(id_, "message_released"))
        assert [(r["record_id"], r["opening"]) for r in released] == [(str(record["thread"]), 1)]
    finally:
        depot.mesh.restart("connector")
        await depot.mesh.until_ready(["connector"])
    await depot.until_effects(parcel, weighing=1, mail=1)
    await asyncio.sleep(1.0)
    assert await depot.nothing_open(id_)
    assert (await depot.row(parcel))["status"] == "completed"  # type: ignore[index]


def _result_of(command: dict[str, object]) -> dict[str, object]:
    now_ms = int(str(command["ce_time"]))
    same = (
        "correlation_id", "business_object_type", "business_object_id", "instance_id", "instance_seq", "step",
        "idempotency_key",
    )  # fmt: skip
    return {
        **{name: command[name] for name in same},
        "ce_id": str(ids.entrance_id("test.result", str(command["ce_id"]), now_ms)), "ce_source": "/test",
        "ce_type": "scales.weigh.done", "ce_time": now_ms, "traceparent": None, "cause_id": str(command["ce_id"]),
        "actor": "service:scales", "command_id": str(command["ce_id"]), "outcome": "done",
        "output": b'{"grams":"1200"}', "error_class": None, "error_message": None, "attempts": 1, "duration_ms": 1,
        "verdict": None, "epoch": 1,
    }  # fmt: skip


async def test_parks_releases_and_discards_in_any_order(depot: Depot) -> None:
    """⚑ DESIGN 9: per record the highest park, release and discard count, in every order over the real topic."""
    said = [("message_parked", 0), ("message_released", 1), ("message_parked", 1), ("message_discarded", 1)]
    orders = list(itertools.permutations(said))
    cases = {"needs_resolution": orders[::4], "released": [o[:2] for o in itertools.permutations(said[:2])]}
    waiting: list[tuple[str, str, str]] = []
    for wanted, given in cases.items():
        for order in given:
            parcel = number()
            await depot.ill("scales", parcel, fault="server_error")
            waiting.append((parcel, wanted, json.dumps(order)))
    ids_ = {parcel: await depot.arrive(parcel, "weigh") for parcel, _, _ in waiting}
    for parcel, _, order_text in waiting:
        await depot.until_status(parcel, "parked", "weigh")
        own = await depot.of(ids_[parcel], "exhausted")
        await depot.discard(own["id"])
        await depot.until_status(parcel, "needs_resolution", "weigh")
        record = str(uuid4())
        for n, (name, opening) in enumerate(json.loads(order_text)):
            body = {"record_id": record, "opening": opening, "reason": "validation", "step": None, "command_id": None}
            value = depot.signal(ids_[parcel], parcel, name, body, n)
            await depot.publish(SIGNALS, str(ids_[parcel]).encode(), value)
    for parcel, wanted, order_text in waiting:
        await until(f"all of {order_text}", partial(_told, depot, ids_[parcel], order_text))
        shown = await depot.row(parcel)
        assert shown is not None
        assert shown["status"] == "needs_resolution", order_text
        (park,) = [p for p in (await depot.state(ids_[parcel]))["parks"].values() if p[0] >= 0 and p[3] is None]
        assert park[:3] == ([1, 1, 1] if wanted == "needs_resolution" else [0, 1, -1]), order_text


async def _told(depot: Depot, id_: UUID, order_text: str) -> bool:
    """Whether what the signals say together is in the state."""
    parks = [p for p in (await depot.state(id_)).get("parks", {}).values() if p[3] is None]
    highest = {name: max(n for m, n in json.loads(order_text) if m == name) for name, _ in json.loads(order_text)}
    wanted = [highest.get(f"message_{verb}", -1) for verb in ("parked", "released", "discarded")]
    return any(p[:3] == wanted for p in parks)


async def test_a_retry_that_cannot_be_is_filed_to_its_record_again(depot: Depot) -> None:
    """⚑ DESIGN 9: of an ended instance, or over a newer run: dead again under its number, and shown."""
    parcel, id_ = await resting(depot)
    record = await depot.of(id_, "exhausted")
    ran = await depot.run("instance", "end", str(id_), "--status", "cancelled", "--reason", "not wanted")
    assert ran.code == 0, ran.err
    await depot.replay(record["id"])
    again = await depot.until_state(record["id"], State.FAILED_AGAIN, 1)
    assert "cannot be retried: its instance is cancelled" in again["message"]
    assert (again["raised"], again["published"], again["dead"], again["reason"]) == (1, 1, 1, "exhausted")
    ran = await depot.run("dlq", "show", str(record["id"]))
    assert "its instance is cancelled" in ran.out
    assert "discard the record" in ran.out
    await depot.discard(record["id"])
    assert await depot.nothing_open(id_)
    assert (await depot.row(parcel))["status"] == "cancelled"  # type: ignore[index]

    # A retry from an index that was lost and built again: its number is new to it, the run is an old one.
    parcel, id_ = await resting(depot)
    record = await depot.of(id_, "exhausted")
    await depot.replay(record["id"])
    newer = await depot.of(id_, "exhausted")
    assert newer["id"] != record["id"]
    about = about_of(await depot.read(record["id"]))
    stale = await retry_step(depot.index.registry, depot.mesh.prefix, about, record["command_id"], 2, person())
    await depot.publisher.publish([stale])
    refused = await until("the refusal", lambda: _refused(depot, record["thread"], newer["id"]))
    assert "it is not its step's latest command" in refused["message"]
    assert len(await depot.commands("scales", id_)) == 2
    await depot.discard(refused["id"])
    await depot.well("scales", parcel)
    await depot.replay(newer["id"])
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, weighing=1, mail=1)


async def _refused(depot: Depot, thread: UUID, newer: UUID) -> object:
    found = [r for r in await depot.find("some", 1, thread=thread) if r["id"] != newer]
    return found[0] if found else None


async def test_a_retry_over_an_outstanding_command_is_kept_and_then_moot(depot: Depot) -> None:
    """⚑ DESIGN 9: kept while outstanding; moot when the command worked: dead, to its record."""
    parcel = number()
    await depot.ill("books", parcel, fault="no_answer", hold_s=3)
    id_ = await depot.arrive(parcel, "enter")
    record = await depot.of(id_, "unknown")
    about = about_of(record)
    kept = await retry_step(depot.index.registry, depot.mesh.prefix, about, record["command_id"], 1, person())
    await depot.publisher.publish([kept])
    await until("the kept retry", lambda: _kept(depot, id_))
    await depot.resolve(record["id"], "happened", {"page": "P-1"})
    await depot.until_status(parcel, "completed")
    await depot.until_effects(parcel, entry=1, mail=1)
    again = await depot.until_state(record["id"], State.FAILED_AGAIN, 1)
    assert f"the retry of command {record['command_id']} is moot" in again["message"]
    assert again["reason"] == "unknown"
    await depot.discard(record["id"])
    assert await depot.nothing_open(id_)
    assert (await depot.row(parcel))["status"] == "completed"  # type: ignore[index]


async def _kept(depot: Depot, id_: UUID) -> bool:
    return bool((await depot.state(id_)).get("retries"))


async def test_nothing_loops(depot: Depot) -> None:
    """⚑ DESIGN 9: an ended instance only records park signals, and quarantining one of these emits none."""
    parcel = number()
    id_ = await depot.arrive(parcel, "weigh")
    await depot.until_status(parcel, "completed")
    statuses = len(await depot.messages("factmesh.status.v1", id_))
    record = str(uuid4())
    for n, name in enumerate(("message_parked", "message_released", "message_discarded")):
        body = {"record_id": record, "opening": n, "reason": "validation", "step": None, "command_id": None}
        await depot.publish(SIGNALS, str(id_).encode(), depot.signal(id_, parcel, name, body, n))
    await until("they are recorded", lambda: _recorded(depot, id_, record))
    assert (await depot.state(id_))["base"] == "completed"
    # Two of these signals that cannot be applied: one without its number, one without its object's instance.
    bad = {"record_id": record, "opening": "many"}
    await depot.publish(SIGNALS, str(id_).encode(), depot.signal(id_, parcel, "message_parked", bad))
    unknown = ids.instance_id("parcel", ids.entrance_id("nobody", parcel, to_ms(person().at)))
    await depot.publish(SIGNALS, str(unknown).encode(), depot.signal(unknown, parcel, "message_released", bad))
    records = await depot.find("the bad signals", 2, business_object_id=parcel)
    await asyncio.sleep(1.5)
    assert len(await depot.messages(SIGNALS, id_)) == 4
    assert len(await depot.messages(SIGNALS, unknown)) == 1
    assert len(await depot.messages("factmesh.status.v1", id_)) == statuses
    for r in records:
        await depot.discard(r["id"])
    await asyncio.sleep(1.5)
    assert (await depot.row(parcel))["status"] == "completed"  # type: ignore[index]
    # A discard tells whoever waits for the message, once; that is recorded, and nothing follows from it.
    assert len(await depot.messages(SIGNALS, id_)) <= 5
    assert len(await depot.messages(SIGNALS, unknown)) <= 2


async def _recorded(depot: Depot, id_: UUID, record: str) -> bool:
    park = (await depot.state(id_)).get("parks", {}).get(record)
    return park is not None and park[:3] == [0, 1, 2]
