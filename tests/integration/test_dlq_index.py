"""The quarantine index on real Kafka and PostgreSQL: filing, raising, discarding, killed tools, racing operators.
The services that die and handle are other tests' matter; here records are put on DLQ topics as their loops do.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

import factmesh
from factmesh import dlq, ids, kafka
from factmesh.errors import ErrorClass, IllegalTransitionError, Reason, ValidationError
from factmesh.message import H_GROUP, H_ROOT_ID, Delivery, Emission, Headers
from factmesh.postgres import Migrations, migrate
from factmesh.settings import Settings
from factmesh.stack import Stack
from factmesh.topics import COMMAND, COMMAND_NOTIFIER, FACTS_RAW, RESULT, SIGNAL
from factmesh_cli import dlq_edit, dlq_operate
from factmesh_cli.dlq_index import Index, catch_up, open_index
from factmesh_quarantine import queries, store
from factmesh_quarantine.acts import Raised, RefusedError, original_of
from factmesh_quarantine.messages import Person
from factmesh_quarantine.model import TRANSITIONS, State, Verb, next_state
from factmesh_quarantine.service import SERVICE

pytestmark = pytest.mark.stack

T0 = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
INSTANCE = UUID("018f0000-0000-8000-8000-0000000000aa")


def root(n: int = 1) -> UUID:
    return ids.entrance_id("test", str(n), 1_780_000_000_000)


def letter(topic: str, n: int = 1, **changes: object) -> dlq.DeadLetter:
    headers: Headers = (("ce_id", b"7"), ("blob", b"\xff\x00"))
    base = dlq.DeadLetter(
        original=Delivery(topic, 0, 10 + n, b"key", b"\x00\x00\x00\xff\xff\x01", headers, 1_780_000_000_000),
        root=f"id:{root(n)}",
        opening=0,
        group="g",
        reason=Reason.VALIDATION,
        error_class=ErrorClass.VALIDATION,
        stage="svc/main",
        exception_type="ValidationError",
        message=f"field {n} is missing",
        first_failed_at=T0,
        failed_at=T0 + timedelta(seconds=n),
        service_version="1",
        fingerprint=ids.fingerprint("x"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def again(dead: dlq.DeadLetter, opening: int, **changes: object) -> dlq.DeadLetter:
    moved = replace(dead.original, offset=dead.original.offset + 1000 * opening)
    return replace(dead, opening=opening, original=moved, **changes)  # type: ignore[arg-type]


class Bench:
    """One index of its own, with the topics that its messages come from."""

    def __init__(self, index: Index, settings: Settings) -> None:
        self.index = index
        self.settings = settings
        self.raw = FACTS_RAW.of(index.namespace)
        self.command = COMMAND.of(index.namespace, "billing")
        self.notifier = COMMAND_NOTIFIER.of(index.namespace)
        self.result = RESULT.of(index.namespace)
        self.signal = SIGNAL.of(index.namespace)
        self.publisher = kafka.Publisher(settings.kafka_bootstrap, client_id="bench")

    async def dies(self, *letters: dlq.DeadLetter) -> list[UUID]:
        """What a service's loop does with a dead message; then the index is brought up to the end."""
        await self.publisher.publish([dlq.record(dead, "svc") for dead in letters])
        await catch_up(self.index)
        return [dlq.dlq_id("svc", dead) for dead in letters]

    async def on(self, *topics: str) -> list[Delivery]:
        return await kafka.read_all(self.settings.kafka_bootstrap, topics)

    async def row(self, record: UUID) -> dict[str, object]:
        return dict((await self.index.acts.read(self.index.pool, record)).items())

    async def numbers(self, record: UUID) -> tuple[object, ...]:
        row = await self.row(record)
        return (row["state"], row["raised"], row["published"], row["dead"])

    async def raise_only(self, record: UUID, by: str = "ann") -> Raised:
        """The first half of a replay: what a tool that is killed before it publishes has done."""
        async with self.index.pool.acquire() as conn, conn.transaction():
            return await self.index.acts.replay(conn, record, person(by))

    async def replay(self, record: UUID, by: str = "ann") -> Raised:
        raised = await self.raise_only(record, by)
        assert await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised

    async def discard(self, record: UUID) -> Raised:
        async with self.index.pool.acquire() as conn, conn.transaction():
            raised = await self.index.acts.discard(conn, record, person("ann"))
        await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised

    async def resolve(self, record: UUID, verdict: str, output: bytes | None = None, *, retry: bool = False) -> Raised:
        async with self.index.pool.acquire() as conn, conn.transaction():
            raised = await self.index.acts.resolve(
                conn, record, person("ann"), verdict=verdict, output=output, retry=retry
            )
        await self.index.acts.publish_act(raised.act, self.index.clock.now)
        return raised


def person(by: str) -> Person:
    return Person(by, "because", datetime.now(UTC))


@asynccontextmanager
async def open_bench(stack: Stack, namespace: str) -> AsyncIterator[Bench]:
    schema = f"{namespace}_quarantine"
    dsn = await stack.provide_schema(schema)
    library = Migrations("factmesh", Path(factmesh.__file__).with_name("migrations"))
    await migrate(dsn, schema, [library, Migrations("quarantine", SERVICE.migrations)])
    settings = Settings(kafka_bootstrap=stack.bootstrap, postgres_dsn=dsn, namespace=namespace)
    prefix = settings.topic_prefix
    names = [t.of(prefix) for t in (FACTS_RAW, COMMAND_NOTIFIER, RESULT, SIGNAL)] + [COMMAND.of(prefix, "billing")]
    specs = [kafka.TopicSpec(n, 2) for n in names]
    await kafka.ensure_topics(stack.bootstrap, [*specs, *map(kafka.dlq_spec, specs)])
    async with open_index(settings) as index:
        bench = Bench(index, settings)
        try:
            yield bench
        finally:
            await bench.publisher.close()


@pytest.fixture
async def bench(stack: Stack, namespace: str) -> AsyncIterator[Bench]:
    async with open_bench(stack, namespace) as opened:
        yield opened


def decoded(bench: Bench, delivery: Delivery) -> dict[str, object]:
    return dict(bench.index.reader._records.decode(delivery).record)


# --- filing ----------------------------------------------------------------------------------------------------------


async def test_filed_once_whoever_reads(bench: Bench) -> None:
    """INV-D: a record is filed once, with its bytes, however often and by however many readers it is read."""
    dead = letter(bench.raw)
    (record, _) = await bench.dies(dead, dead)
    await asyncio.gather(*(catch_up(bench.index) for _ in range(3)))
    await bench.index.pool.execute("DELETE FROM progress")
    assert await catch_up(bench.index) == 0
    row = await bench.row(record)
    assert (row["state"], row["raised"], row["published"], row["dead"], row["counter"]) == ("open", 0, 0, 0, 0)
    assert row["thread"] == ids.record_id(dead.root, dead.group)
    assert len(await queries.list_records(bench.index.pool, queries.Filter(states=None))) == 1


async def test_foreign_record_is_filed_too(bench: Bench) -> None:
    """INV-D: what something else wrote to a DLQ topic is a record about that topic, and can be discarded."""
    await bench.publisher.publish([Emission(f"dlq.{bench.raw}", b"k", b"what is this", (("a", b"1"),))])
    await catch_up(bench.index)
    (row,) = await queries.list_records(bench.index.pool, queries.Filter())
    assert (row["topic"], row["reason"], row["grp"]) == (
        f"dlq.{bench.raw}",
        "decode",
        f"{bench.index.namespace}factmesh-quarantine",
    )
    assert "something else writes" in row["message"]
    await bench.discard(row["id"])
    assert (await bench.numbers(row["id"]))[0] == "discarded"


async def test_hostile_headers_are_filed(bench: Bench) -> None:
    """INV-D: NUL characters and huge numbers in diagnosis headers cannot stop the index."""
    good = dlq.record(letter(bench.raw), "svc")
    nul = tuple((k, b"a\x00b" if k in ("factmesh-dlq-root-id", "factmesh-dlq-step") else v) for k, v in good.headers)
    huge = tuple((k, b"9" * 18 if k == "factmesh-dlq-opening" else v) for k, v in good.headers)
    await bench.publisher.publish(
        [replace(good, headers=(*nul, ("factmesh-dlq-step", b"a\x00b"))), replace(good, headers=huge)]
    )
    assert await catch_up(bench.index) == 2
    roots = {bytes(r["root"]) for r in await queries.list_records(bench.index.pool, queries.Filter())}
    assert b"a\x00b" in roots


async def test_death_under_an_opening_goes_to_who_raised_it(bench: Bench) -> None:
    """DESIGN 9: a death under opening n opens the record that raised n again; a late repeat of it changes nothing."""
    dead = letter(bench.raw)
    (record,) = await bench.dies(dead)
    assert (await bench.replay(record)).number == 1
    assert await bench.numbers(record) == ("replayed", 1, 1, 0)
    second = again(dead, 1, reason=Reason.BUSINESS, message="refused")
    await bench.dies(second)
    assert await bench.numbers(record) == ("failed_again", 1, 1, 1)
    row = await bench.row(record)
    assert (row["reason"], row["message"], row["offset"], row["closed_at"]) == ("business", "refused", 1011, None)
    assert (await bench.replay(record)).number == 2
    await bench.dies(second)
    assert await bench.numbers(record) == ("replayed", 2, 2, 1)


async def test_unseen_opening_makes_a_record(bench: Bench) -> None:
    """DESIGN 9: an index that was rebuilt and never raised n has a record with raised = dead = n, and counts on from
    it.
    """
    dead = again(letter(bench.raw), 4)
    (record,) = await bench.dies(dead)
    assert await bench.numbers(record) == ("open", 4, 4, 4)
    assert (await bench.replay(record)).number == 5


async def test_numbers_count_per_root_and_group_conflicts_included(bench: Bench) -> None:
    """DESIGN 9: a late conflict record counts on from the numbers of the id that it fought over."""
    first = letter(bench.raw)
    (one,) = await bench.dies(first)
    assert (await bench.replay(one)).number == 1
    twin = replace(first, reason=Reason.CONFLICT, original=replace(first.original, offset=99, value=b"other"))
    (two,) = await bench.dies(twin)
    other_group = replace(first, group="h")
    (three,) = await bench.dies(other_group)
    assert await bench.numbers(two) == ("open", 0, 0, 0)
    assert (await bench.replay(two)).number == 2
    assert (await bench.replay(three)).number == 1
    await bench.dies(again(first, 1), again(twin, 2))
    assert (await bench.numbers(one), await bench.numbers(two)) == (
        ("failed_again", 1, 1, 1),
        ("failed_again", 2, 2, 2),
    )
    values = {d.opening: d.value for d in await bench.on(bench.raw) if d.header(H_GROUP) == "g"}
    assert values == {1: first.original.value, 2: b"other"}


# --- raising ---------------------------------------------------------------------------------------------------------


async def test_replay_restores_the_message(bench: Bench) -> None:
    """E2: key, value and headers as they were, to their topic, with root, number and group."""
    dead = letter(bench.raw)
    (record,) = await bench.dies(dead)
    await bench.replay(record)
    (got,) = await bench.on(bench.raw)
    assert (got.key, got.value, got.original_headers) == (b"key", dead.original.value, dead.original.headers)
    assert (got.opening, got.header(H_ROOT_ID), got.header(H_GROUP)) == (1, dead.root, "g")


async def test_two_operators_raise_once(bench: Bench) -> None:
    """E2: many operators on one record give one opening; the others are told who was faster."""
    (record,) = await bench.dies(letter(bench.raw))

    async def try_it(n: int) -> object:
        try:
            return (await bench.replay(record, f"operator {n}")).number
        except RefusedError as error:
            return str(error)

    outcomes = await asyncio.gather(*(try_it(n) for n in range(12)))
    assert [o for o in outcomes if isinstance(o, int)] == [1]
    assert sum("it is replayed by operator" in str(o) for o in outcomes) == 11
    assert [d.opening for d in await bench.on(bench.raw)] == [1]


async def test_two_operators_on_twins_get_two_numbers(bench: Bench) -> None:
    """DESIGN 9: records of one root raised at the same time never share a number."""
    first = letter(bench.raw)
    twins = [replace(first, reason=Reason.CONFLICT, original=replace(first.original, offset=100 + n)) for n in range(6)]
    records = await bench.dies(first, *twins)
    raised = await asyncio.gather(*(bench.replay(r) for r in records))
    assert sorted(r.number for r in raised) == [1, 2, 3, 4, 5, 6, 7]


async def test_killed_between_raise_and_publish(bench: Bench) -> None:
    """DESIGN 9: what was raised and not published is published later under the same number, with the same bytes."""
    (record,) = await bench.dies(letter(bench.raw))
    raised = await bench.raise_only(record)
    assert await bench.numbers(record) == ("replayed", 1, 0, 0)
    with pytest.raises(RefusedError, match="it is replayed by ann, not open"):
        await bench.replay(record, "bob")
    assert await bench.on(bench.raw) == []
    published = await asyncio.gather(*(dlq_operate.publish_left_over(bench.index) for _ in range(4)))
    assert sum(published) == 1
    (got,) = await bench.on(bench.raw)
    assert (got.opening, got.value, tuple(got.headers)) == (1, raised.emissions[0].value, raised.emissions[0].headers)
    assert await bench.numbers(record) == ("replayed", 1, 1, 0)


async def test_killed_between_publish_and_mark(bench: Bench) -> None:
    """DESIGN 9: killed after the publication, before it was written down: published again under the same number."""
    (record,) = await bench.dies(letter(bench.raw))
    raised = await bench.raise_only(record)

    class Killed(Exception):
        pass

    async def publish_and_die(emissions: object) -> None:
        await bench.publisher.publish(list(raised.emissions))
        raise Killed

    patched = type(bench.index.acts)(bench.index.pool, bench.index.registry, bench.index.namespace, publish_and_die)
    with pytest.raises(Killed):
        await patched.publish_act(raised.act, bench.index.clock.now)
    assert await dlq_operate.publish_left_over(bench.index) == 1
    got = await bench.on(bench.raw)
    assert [(d.opening, d.value) for d in got] == [(1, raised.emissions[0].value)] * 2


async def test_death_proves_the_publication(bench: Bench) -> None:
    """DESIGN 9: an opening that died was published, whatever was written down."""
    dead = letter(bench.raw)
    (record,) = await bench.dies(dead)
    await bench.raise_only(record)
    await bench.dies(again(dead, 1))
    assert await bench.numbers(record) == ("failed_again", 1, 1, 1)
    assert await dlq_operate.publish_left_over(bench.index) == 0


async def test_numbers_only_rise(bench: Bench) -> None:
    """DESIGN 9: PostgreSQL itself refuses a statement that takes one of the three numbers back."""
    (record,) = await bench.dies(again(letter(bench.raw), 3))
    for column in ("raised", "published", "dead"):
        with pytest.raises(Exception, match="only rise"):
            await bench.index.pool.execute(f"UPDATE record SET {column} = {column} - 1 WHERE id = $1", record)
    with pytest.raises(Exception, match="check constraint"):
        await bench.index.pool.execute("UPDATE record SET raised = raised + 1 WHERE id = $1", record)


async def test_a_raise_waits_for_a_death_that_is_being_filed(bench: Bench) -> None:
    """INV-F: filing holds the thread's lock from load to save; a raise in between sees what was saved."""
    dead = letter(bench.raw)
    (record,) = await bench.dies(dead)
    pool = bench.index.pool
    late = bench.index.reader.death(_as_delivery(dlq.record(again(dead, 5), "svc")))
    async with pool.acquire() as conn, conn.transaction():
        await store.load(conn, [late], T0)
        raising = asyncio.create_task(bench.raise_only(record))
        await asyncio.sleep(0.2)
        assert not raising.done()
        await store.file_all(conn, [late], T0)
    assert (await raising).number == 6


def _as_delivery(e: Emission) -> Delivery:
    return Delivery(e.topic, 0, 77, e.key, e.value, e.headers, 1)


# --- discarding, resolving, retrying ---------------------------------------------------------------------------------


async def test_discard_tells_the_instance(bench: Bench) -> None:
    """H1: a discard closes an open record and its signal is due until acknowledged."""
    dead = letter(bench.result, instance_id=INSTANCE, correlation_id="c", business_object_id="b")
    (record,) = await bench.dies(dead)
    async with bench.index.pool.acquire() as conn, conn.transaction():
        await bench.index.acts.discard(conn, record, person("ann"))
    assert await bench.numbers(record) == ("discarded", 0, 0, 0)
    assert await dlq_operate.publish_left_over(bench.index) == 1
    (got,) = await bench.on(bench.signal)
    said = decoded(bench, got)
    assert (said["signal"], got.key) == ("message_discarded", str(INSTANCE).encode())
    body = json.loads(said["body"])  # type: ignore[arg-type]
    assert body == {"record_id": str(ids.record_id(dead.root, "g")), "opening": 0, "reason": "because"}
    for act in (bench.replay, bench.discard):
        with pytest.raises(RefusedError, match="discarded by ann, not open"):
            await act(record)


async def test_exhausted_command_is_retried_by_signal(bench: Bench) -> None:
    """DESIGN 9: a command that was a row is not replayed; the orchestrator is asked, and may refuse under that
    opening.
    """
    dead = letter(bench.command, reason=Reason.EXHAUSTED, instance_id=INSTANCE, command_id=root())
    (record,) = await bench.dies(dead)
    await bench.replay(record)
    assert await bench.on(bench.command) == []
    (got,) = await bench.on(bench.signal)
    said = decoded(bench, got)
    assert said["signal"] == "retry_step"
    assert json.loads(said["body"]) == {  # type: ignore[arg-type]
        "command_id": str(root()), "record_id": str(ids.record_id(dead.root, "g")), "root_id": dead.root, "group": "g",
        "opening": 1, "reason": "because",
    }  # fmt: skip
    refused = again(dead, 1, reason=Reason.BUSINESS, message="not its step's latest")
    refused = replace(refused, original=replace(refused.original, topic=bench.signal, value=got.value))
    await bench.dies(refused)
    row = await bench.row(record)
    assert (row["state"], row["dead"], row["reason"], row["topic"]) == ("failed_again", 1, "exhausted", bench.command)
    assert row["message"] == "not its step's latest"
    assert (await bench.replay(record)).verb is Verb.RETRY_STEP


async def test_unknown_is_resolved_never_replayed(bench: Bench) -> None:
    """E2, C2: an unknown outcome cannot be replayed or discarded, only resolved."""
    dead = letter(bench.command, reason=Reason.UNKNOWN, instance_id=INSTANCE, command_id=root())
    (record,) = await bench.dies(dead)
    with pytest.raises(RefusedError, match="never simply replayed"):
        await bench.replay(record)
    with pytest.raises(RefusedError, match="can only be resolved"):
        await bench.discard(record)
    await bench.resolve(record, "happened", b'{"account":"A"}')
    assert await bench.numbers(record) == ("resolved", 1, 1, 0)
    (got,) = await bench.on(bench.command)
    said = decoded(bench, got)
    assert (said["verdict"], said["output"], said["command_id"]) == ("happened", b'{"account":"A"}', str(root()))
    assert (said["record_id"], said["opening"]) == (str(ids.record_id(dead.root, "g")), 1)
    with pytest.raises(RefusedError, match="it is resolved by ann"):
        await bench.resolve(record, "not_happened")


async def test_refused_resolution_opens_the_record_again(bench: Bench) -> None:
    """DESIGN 9: look again — a resolution that the connector refuses is shown on the command's record, still
    `unknown`.
    """
    dead = letter(bench.command, reason=Reason.UNKNOWN, instance_id=INSTANCE, command_id=root())
    (record,) = await bench.dies(dead)
    await bench.resolve(record, "not_happened", retry=True)
    (word,) = await bench.on(bench.command)
    assert [decoded(bench, d)["signal"] for d in await bench.on(bench.signal)] == ["retry_step"]
    refusal = letter(bench.command, 2, message="in flight until 12:00: look again", original=word)
    await bench.dies(refusal)
    row = await bench.row(record)
    assert (row["state"], row["raised"], row["dead"], row["reason"]) == ("failed_again", 1, 1, "unknown")
    assert "look again" in str(row["message"])
    assert len(await queries.list_records(bench.index.pool, queries.Filter(states=None))) == 1
    assert (await bench.resolve(record, "happened", b"{}")).number == 2
    # Its connector may not hold it as unknown any more: after a refusal, a discard can close the record.
    await bench.dies(
        letter(bench.command, 3, message="it is done, not unknown", original=(await bench.on(bench.command))[-1])
    )
    assert (await bench.discard(record)).verb is Verb.DISCARD


async def test_resolving_needs_an_unknown(bench: Bench) -> None:
    """C2: what is known cannot be resolved, and what happened is not retried."""
    (known, unknown) = await bench.dies(
        letter(bench.command, reason=Reason.EXHAUSTED, instance_id=INSTANCE),
        letter(bench.command, 2, reason=Reason.UNKNOWN, instance_id=INSTANCE),
    )
    with pytest.raises(RefusedError, match="its outcome is known"):
        await bench.resolve(known, "happened", b"{}")
    with pytest.raises(RefusedError, match="what happened is not retried"):
        await bench.resolve(unknown, "happened", b"{}", retry=True)


async def test_discarding_a_command_that_was_no_row_ends_it(bench: Bench) -> None:
    """DESIGN 9: it is a resolution `discarded` under a number of its own; refused, the record is open again."""
    dead = letter(bench.command, instance_id=INSTANCE)
    (record, twin) = await bench.dies(
        dead, replace(dead, reason=Reason.CONFLICT, original=replace(dead.original, offset=500))
    )
    assert (await bench.discard(record)).verb is Verb.GIVE_UP
    assert await bench.numbers(record) == ("discarded", 1, 1, 0)
    (word,) = await bench.on(bench.command)
    said = decoded(bench, word)
    assert (said["verdict"], said["command_id"], said["opening"]) == ("discarded", str(root()), 1)
    # Giving up a conflicting twin must not end the command that lives under the same id.
    assert (await bench.discard(twin)).verb is Verb.DISCARD
    await bench.dies(letter(bench.command, 3, message="it is a row", original=word))
    assert await bench.numbers(record) == ("failed_again", 1, 1, 1)


async def test_exhausted_notification_is_opened(bench: Bench) -> None:
    """D2: a notification has no step that waits; an exhausted one is replayed as it was, an unknown one may be given
    up.
    """
    (exhausted, unknown) = await bench.dies(
        letter(bench.notifier, reason=Reason.EXHAUSTED, instance_id=INSTANCE),
        letter(bench.notifier, 2, reason=Reason.UNKNOWN, instance_id=INSTANCE),
    )
    assert (await bench.replay(exhausted)).verb is Verb.REPLAY
    with pytest.raises(RefusedError, match="never simply replayed"):
        await bench.replay(unknown)
    assert (await bench.discard(unknown)).verb is Verb.GIVE_UP


# --- correcting ------------------------------------------------------------------------------------------------------


async def test_correction_is_kept_beside_the_original(bench: Bench) -> None:
    """E2: the replay carries the corrected bytes, the original stays, and who corrected it is recorded."""
    dead = letter(bench.raw, original=replace(letter(bench.raw).original, value=b'{"country":"XX"}'))
    (record,) = await bench.dies(dead)
    row = await bench.index.acts.read(bench.index.pool, record)
    await bench.index.acts.correct(row, b'{"country":"DE"}', (("ce_id", b"7"),), person("ann"))
    with pytest.raises(RefusedError, match="somebody corrected"):
        await bench.index.acts.correct(row, b"{}", (), person("bob"))
    await bench.replay(record)
    (got,) = await bench.on(bench.raw)
    assert (got.value, got.original_headers) == (b'{"country":"DE"}', (("ce_id", b"7"),))
    after = await bench.row(record)
    assert after["corrected_by"] == "ann"
    history, _ = await queries.story(bench.index.pool, record)
    assert [(h["event"], h["by"]) for h in history] == [
        ("quarantined", "quarantine index"), ("correct", "ann"), ("replay", "ann"),
    ]  # fmt: skip
    # The bytes of the first death stay, even when the corrected opening dies as well.
    await bench.dies(replace(dead, opening=1, original=replace(dead.original, offset=5000, value=got.value)))
    assert original_of(await bench.index.acts.read(bench.index.pool, record)).original == dead.original


async def test_avro_is_corrected_under_its_own_schema(bench: Bench) -> None:
    """E2: a decoded record, its JSON fields too, is changed by path and encoded again with the schema it names."""
    dead = letter(bench.result, instance_id=INSTANCE)
    (record,) = await bench.dies(dead)
    raised = await bench.discard(record)
    value = raised.emissions[0].value
    seen = await dlq_edit.view(bench.index.registry, value)
    assert (seen.kind, dlq_edit.encode(seen, seen.data)) == ("avro", value)
    data = dlq_edit.set_path(dlq_edit.set_path(seen.data, "body.reason=other"), "instance_seq=4")
    changed = dlq_edit.encode(seen, data)
    assert changed[:5] == (value or b"")[:5]
    said = decoded(bench, Delivery("t", 0, 0, None, changed))
    assert (said["instance_seq"], json.loads(said["body"])["reason"]) == (4, "other")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="instance_seq"):
        dlq_edit.encode(seen, dlq_edit.set_path(seen.data, "instance_seq=many"))


# --- operations, figures, retention ----------------------------------------------------------------------------------


async def test_two_operators_share_a_cohort_and_either_is_killed(bench: Bench) -> None:
    """E2: an operation that two work off, one of them killed after each raise, publishes every member exactly once."""
    records = await bench.dies(*(letter(bench.raw, n) for n in range(1, 41)))
    index = bench.index
    operation = await dlq_operate.begin(index, "replay", "ann", "all", "{}", records)

    async def half_alive() -> None:
        async def raise_and_die(conn: object, record: UUID, who: Person) -> Raised:
            await index.acts.replay(conn, record, who)  # type: ignore[arg-type]
            raise ConnectionAbortedError

        for _ in range(8):
            with pytest.raises(ConnectionAbortedError):
                await dlq_operate.next_step(index, operation, raise_and_die, "bob")

    async def killed_before_publishing() -> None:
        acts = type(index.acts)(index.pool, index.registry, index.namespace, _never)
        dead_index = replace(index, acts=acts)
        for _ in range(8):
            with pytest.raises(ConnectionAbortedError):
                await dlq_operate.next_step(dead_index, operation, acts.replay, "bob")

    async def alive() -> None:
        await dlq_operate.run(index, operation, index.acts.replay, "ann", rate=500, told=lambda _step: None)

    await asyncio.gather(half_alive(), killed_before_publishing(), alive(), alive())
    assert await dlq_operate.publish_left_over(index) == 8
    assert await dlq_operate.tally(index, operation) == dlq_operate.Tally(40, 40, 0)
    got = await bench.on(bench.raw)
    assert sorted(d.header(H_ROOT_ID) or "" for d in got) == sorted(f"id:{root(n)}" for n in range(1, 41))
    assert {d.opening for d in got} == {1}


async def _never(_emissions: object) -> None:
    raise ConnectionAbortedError


async def test_figures(bench: Bench) -> None:
    """E3: owners and states, the share of replays that helped, and the time to recovery."""
    letters = [letter(bench.raw, n) for n in range(1, 5)]
    records = await bench.dies(*letters)
    for record in records[:3]:
        await bench.replay(record)
    await bench.dies(again(letters[0], 1))
    await bench.index.acts.assign(records[3], "team:billing", person("ann"))
    figures = await queries.stats(bench.index.pool, None)
    assert figures["owners"] == {"service:svc": {"failed_again": 1, "replayed": 2}, "team:billing": {"open": 1}}
    assert figures["replays"] == {"published": 3, "failed_again": 1, "due": 0, "success_rate": 2 / 3}
    assert figures["recovery"]["records"] == 2
    assert figures["recovery"]["mean_s"] > 0


async def test_bytes_live_while_open(bench: Bench) -> None:
    """DESIGN 8: quarantined bytes live while they are open; closed ones are forgotten after their time, the rest
    stays.
    """
    (kept, closed) = await bench.dies(letter(bench.raw), letter(bench.raw, 2))
    await bench.replay(closed)
    await bench.index.pool.execute("UPDATE record SET closed_at = now() - interval '31 days' WHERE state = 'replayed'")
    await bench.index.pool.execute(store.SQL.forget_bytes, 30)
    assert [(await bench.row(r))["original"] is None for r in (kept, closed)] == [False, True]
    await bench.dies(again(letter(bench.raw, 2), 1))
    with pytest.raises(RefusedError, match="past their retention"):
        await bench.replay(closed)


def test_state_table_is_whole() -> None:
    """HOUSE_STYLE 1: every pair that is not in the table raises and changes nothing."""
    legal = 0
    for state in State:
        for verb in Verb:
            if (state, verb) in TRANSITIONS:
                legal += 1
                assert next_state(state, verb) is TRANSITIONS[state, verb]
            else:
                with pytest.raises(IllegalTransitionError, match=f"is {state} cannot {verb}"):
                    next_state(state, verb)
    assert legal == len(TRANSITIONS) == 13
