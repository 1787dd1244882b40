"""From two vendors' shapes to one canonical fact: adapters, translation tables, zones, upcasts, and every refusal.
The example project's own adapters and schemas are used as they lie there; smaller ones are written beside the test.
"""

from __future__ import annotations

import base64
import copy
import json
import struct
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import avro, ids, yaml
from factmesh.effects import Note, Publish
from factmesh.errors import DefinitionError, FactmeshError, StaleError, ValidationError
from factmesh.expressions import default_expressions
from factmesh.message import Delivery, Message
from factmesh.project import Project
from factmesh.registry import DirectoryRegistry, open_registry
from factmesh_intake import adapters, events, reading
from factmesh_intake.decide import accept, decide_fact
from factmesh_intake.mapping import Mapper, version_in
from factmesh_intake.model import (
    Canonical,
    Desk,
    FieldError,
    FutureError,
    NaiveTimeError,
    SourceRefusedError,
    TooLargeError,
    UnknownTypeError,
    UnmappedError,
    VersionError,
)

PROJECT = Path(__file__).parents[2] / "examples" / "customer_onboarding"
TYPE = "customer.signed_up"
SHOP = "//shop.example/web"
PARTNER = "//partner.example/crm-export"
NOW = datetime(2026, 3, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def registry() -> DirectoryRegistry:
    found = open_registry(project=PROJECT)
    assert isinstance(found, DirectoryRegistry)
    return found


@pytest.fixture(scope="module")
async def mapper(registry: DirectoryRegistry) -> Mapper:
    return await reading.build_mapper(list(Project.load(PROJECT).adapters.values()), registry, default_expressions())


def event(source: str, data: Any, **more: Any) -> events.Event:
    return events.from_json({"specversion": "1.0", "id": "1", "source": source, "type": TYPE, "data": data, **more})


def canonical(mapper: Mapper, registry: DirectoryRegistry, one: events.Event) -> Canonical:
    return mapper.map(reading.read(one, registry))


def of_v1(**changes: Any) -> dict[str, Any]:
    return {
        "customer_id": "C-1",
        "email": "ada@example.org",
        "country": "AT",
        "signed_up_at": "2026-03-01T09:30:00+01:00",
        "full_name": "Ada Lovelace",
        "plan": "premium",
        **changes,
    }


def exported(**changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "crmNumber": "P-1001",
        "signedOn": "01.03.2026 09:30:00",
        "tariff": "T20",
        "clientGroup": "PRV",
        "optIn": "J",
        "contact": {
            "mail": "ada@example.org",
            "name": {"first": "Ada", "last": "Lovelace"},
            "phones": [
                {"use": "mobile", "numbers": [{"e164": "+436601"}, {"e164": "+436602"}]},
                {"use": "fax", "numbers": [{"e164": "+431"}]},
                {"use": "home", "numbers": []},
            ],
        },
        "address": {"country": "at"},
    }
    return {"export": {"run": "r", "agent": "a.huber"}, "record": {**record, **changes}}


# --- the two vendors -------------------------------------------------------------------------------------------------


def test_two_vendors_come_out_as_one_shape(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """A3: what follows intake cannot tell the vendors apart by their shapes."""
    ours = canonical(mapper, registry, event(SHOP, of_v1(), dataschema="https://x/customer.signed_up/v1"))
    theirs = canonical(mapper, registry, event(PARTNER, exported()))
    assert json.loads(ours.data).keys() == json.loads(theirs.data).keys()
    assert ours.schema_version == theirs.schema_version == 2
    assert ours.occurred_at == theirs.occurred_at == int(datetime(2026, 3, 1, 8, 30, tzinfo=UTC).timestamp() * 1000)
    assert (ours.business_object_type, theirs.business_object_type) == ("customer", "customer")
    assert (ours.actor, theirs.actor) == ("customer:C-1", "partner:a.huber")


def test_nested_arrays_tables_and_nulls_of_the_partner(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """A3: lists of lists become a list, codes are translated, what the vendor writes for nothing becomes null."""
    data = json.loads(canonical(mapper, registry, event(PARTNER, exported())).data)
    assert data["phones"] == ["+436601", "+436602"]
    assert (data["plan"], data["segment"], data["country"], data["marketing"]) == ("basic", "consumer", "AT", True)
    for nothing in ("", "-", None):
        data = json.loads(canonical(mapper, registry, event(PARTNER, exported(optIn=nothing))).data)
        assert data["marketing"] is None
    without = exported()
    del without["record"]["optIn"]
    assert json.loads(canonical(mapper, registry, event(PARTNER, without)).data)["marketing"] is None


@pytest.mark.parametrize("field", ["tariff", "clientGroup", "optIn"])
def test_an_unmapped_code_is_an_error_and_never_a_default(
    mapper: Mapper, registry: DirectoryRegistry, field: str
) -> None:
    """A3: the error names field and table, not the value: texts go to logs and headers (F5)."""
    with pytest.raises(UnmappedError, match="does not translate") as caught:
        canonical(mapper, registry, event(PARTNER, exported(**{field: "SECRET-CODE"})))
    assert "SECRET-CODE" not in str(caught.value)
    assert caught.value.field in {"plan", "segment", "marketing"}


def test_v1_is_upcast_by_resolution_and_the_declared_transformation(
    mapper: Mapper, registry: DirectoryRegistry
) -> None:
    """A5: v1 and v2 side by side from one source, as JSON and as Avro; v1 comes out as v2."""
    as_json = canonical(mapper, registry, event(SHOP, of_v1(), dataschema="https://x/v1"))
    v1 = registry.cached(10000)
    assert v1 is not None
    assert v1.version == 1
    out = BytesIO()
    record = of_v1(signed_up_at=datetime(2026, 3, 1, 8, 30, tzinfo=UTC), marketing=None)
    fastavro.schemaless_writer(out, fastavro.parse_schema(copy.deepcopy(v1.source)), record)
    framed = b"\0" + struct.pack(">I", v1.id) + out.getvalue()
    headers = {"ce_specversion": "1.0", "ce_id": "1", "ce_source": SHOP, "ce_type": TYPE}
    delivery = Delivery("facts.raw", 0, 0, None, framed, tuple((k, v.encode()) for k, v in headers.items()))
    as_avro = canonical(mapper, registry, events.from_kafka(delivery))
    assert as_avro == as_json
    data = json.loads(as_json.data)
    assert (data["given_name"], data["family_name"], data["segment"]) == ("Ada Lovelace", "", "business")
    assert data["phones"] == []


# --- versions, types, sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("https://schemas.example/customer.signed_up/v2", (TYPE, 2)),
        ("customer.signed_up/v1", (TYPE, 1)),
        ("https://schemas.example/v3", (None, 3)),
        ("/v12", (None, 12)),
        ("https://schemas.example/v0", None),
        ("https://schemas.example/customer.signed_up", None),
        ("https://[schemas.example/v1", None),
    ],
)
def test_dataschema_ends_in_the_version(uri: str, found: tuple[str | None, int] | None) -> None:
    """A5: the version of JSON data is said by `dataschema`."""
    assert version_in(uri) == found


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({}, VersionError, "does not say which version"),
        ({"dataschema": "https://x/v3"}, VersionError, "version 3 is not accepted"),
        ({"dataschema": "https://x/order.lost/v1"}, VersionError, "dataschema names order.lost"),
        ({"dataschema": "https://x/v1", "source": "//nobody.example"}, SourceRefusedError, "source: no adapter"),
        ({"dataschema": "https://x/v1", "type": "order.lost"}, UnknownTypeError, "type: no adapter"),
    ],
)
def test_what_is_not_declared_is_not_accepted(
    mapper: Mapper, registry: DirectoryRegistry, change: dict[str, Any], kind: type[FactmeshError], text: str
) -> None:
    """A3, A5: unknown versions, types and sources are refused with what to do, never guessed."""
    with pytest.raises(kind, match=text) as caught:
        canonical(mapper, registry, event(change.pop("source", SHOP), of_v1(), **change))
    assert caught.value.hint
    assert "fact 1 of" in caught.value.where


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (of_v1(email=None), "field email: expected text, found null"),
        (of_v1(plan="gold"), "field plan: expected one of"),
        (of_v1(signed_up_at="2026-03-01T09:30:00"), "no offset from UTC"),
        ({k: v for k, v in of_v1().items() if k != "email"}, "field email: missing"),
        (of_v1(shoe=42), "unknown fields: shoe"),
        ([1], "expected an object"),
        (of_v1(customer_id=""), "business_object_id: text is required, the adapter made empty text"),
        (of_v1(customer_id="x" * 513), "513 characters, more than 512"),
        (of_v1(customer_id="a\u0007b"), "business_object_id: control characters"),
    ],
)
def test_data_that_does_not_fit_its_schema_is_refused(
    mapper: Mapper, registry: DirectoryRegistry, data: Any, text: str
) -> None:
    """A2, issue "Bad input": wrong types, missing fields, unmapped enums, naive timestamps, each by its field."""
    with pytest.raises(ValidationError) as caught:
        canonical(mapper, registry, event(SHOP, data, dataschema="https://x/v1"))
    assert text in str(caught.value)


def test_a_fact_that_is_too_large_is_refused(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """Issue "Bad input", oversize payload: the bound is on the data, as sent and as carried."""
    with pytest.raises(TooLargeError, match="more than 262144"):
        canonical(mapper, registry, event(SHOP, of_v1(full_name="x" * 262_144), dataschema="https://x/v1"))
    with pytest.raises(TooLargeError, match="canonical data"):
        canonical(mapper, registry, event(SHOP, of_v1(full_name="x" * 200_000), dataschema="https://x/v1"))


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "utc"),
    [
        ("01.03.2026 09:30:00", "2026-03-01T08:30:00.000Z"),
        ("01.07.2026 09:30:00", "2026-07-01T07:30:00.000Z"),
        ("25.10.2026 02:30:00", "2026-10-25T01:30:00.000Z"),  # the clock shows it twice: `ambiguous: later`
        ("29.03.2026 03:00:00", "2026-03-29T01:00:00.000Z"),  # the first instant after the skipped hour
    ],
)
def test_local_times_are_read_in_the_declared_zone(
    mapper: Mapper, registry: DirectoryRegistry, local: str, utc: str
) -> None:
    """A3: time zones, summer time included."""
    data = json.loads(canonical(mapper, registry, event(PARTNER, exported(signedOn=local))).data)
    assert data["signed_up_at"] == utc


def test_a_time_that_clocks_skipped_is_no_time(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """A3: between 02:00 and 03:00 on the day of the change there is no instant to guess."""
    with pytest.raises(FieldError, match="signed_up_at: a local time that clocks skipped"):
        canonical(mapper, registry, event(PARTNER, exported(signedOn="29.03.2026 02:30:00")))


@pytest.mark.parametrize("bad", ["2026-03-01", "31.02.2026 00:00:00", "", 20260301, "01.03.2026 09:30:00+01:00"])
def test_another_format_than_declared_is_refused(mapper: Mapper, registry: DirectoryRegistry, bad: Any) -> None:
    """A3: a time is of the declared format, or it is an error."""
    with pytest.raises(FieldError, match="signed_up_at"):
        canonical(mapper, registry, event(PARTNER, exported(signedOn=bad)))


def value_of(spec: str, data: Any, tables: str = "{}") -> Any:
    """What a spec makes of data."""
    text = f"upcast: a.b\nfrom: 1\nto: 2\ntables: {tables}\nset:\n  x: {spec}\n"
    document = yaml.parse(text, file="x.yaml")
    model = adapters.read(document)
    assert isinstance(model, adapters.Upcast)
    compiled = adapters.compile_upcast(model, document, default_expressions())
    return compiled.set["x"](default_expressions().scope({"data": data, "resolved": {}}))


def test_the_hour_that_comes_twice_is_a_declared_choice() -> None:
    """A3: refused unless the adapter says which; a text that says its offset is believed."""
    spec = "{of: '${ data }', time: {zone: Europe/Vienna%s}}"
    with pytest.raises(NaiveTimeError, match="showed twice"):
        value_of(spec % "", "2026-10-25T02:30:00")
    assert value_of(spec % ", ambiguous: earlier", "2026-10-25T02:30:00") == "2026-10-25T00:30:00.000Z"
    assert value_of(spec % ", ambiguous: later", "2026-10-25T02:30:00") == "2026-10-25T01:30:00.000Z"
    assert value_of(spec % "", "2026-10-25T02:30:00+02:00") == "2026-10-25T00:30:00.000Z"


def test_without_a_zone_a_time_needs_its_offset() -> None:
    """A3: a naive timestamp is refused."""
    spec = "{of: '${ data }', time: {}}"
    assert value_of(spec, "2026-01-01T00:00:00-05:00") == "2026-01-01T05:00:00.000Z"
    with pytest.raises(NaiveTimeError, match="x: a timestamp without an offset"):
        value_of(spec, "2026-01-01T00:00:00")
    assert value_of("{of: '${ data }', time: {format: '%d.%m.%Y', to: date}}", "31.01.2026") == "2026-01-31"


@given(st.datetimes(min_value=datetime(1980, 1, 1), max_value=datetime(2100, 1, 1)))  # noqa: DTZ001
def test_every_local_time_is_one_instant_or_an_error(local: datetime) -> None:
    """A3: what is read shows the same clock in that zone again; nothing else ever comes out."""
    from zoneinfo import ZoneInfo

    local = local.replace(microsecond=0)
    try:
        text = value_of("{of: '${ data }', time: {zone: Europe/Vienna}}", local.isoformat())
    except FieldError:
        return
    assert datetime.fromisoformat(text).astimezone(ZoneInfo("Europe/Vienna")).replace(tzinfo=None) == local


# --- value specs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "data", "value"),
    [
        ("7", None, 7),
        ("text", None, "text"),
        ("'${ data.a + data.b }'", {"a": 1, "b": 2}, 3),
        ("{of: '${ data }', table: t}", "a", "A"),
        ("{of: '${ data }', table: t}", 1, "one"),
        ("{of: '${ data }', table: t}", True, "yes"),
        ("{of: '${ data }', nulls: [0], table: t}", 0, None),
        ("{of: '${ data }', nulls: [1], table: t}", True, "yes"),
        ("{each: '${ data }', item: '${ item * 2 }'}", [1, 2], [2, 4]),
        ("{each: '${ data }', item: '${ item }'}", None, None),
        ("{each: '${ data }', flat: true, item: '${ item }'}", [[1], [], [2, 3]], [1, 2, 3]),
        ("{fields: {p: '${ data.a }', q: {of: x}}}", {"a": 1}, {"p": 1, "q": "x"}),
        ("{each: '${ data }', item: {fields: {n: {of: '${ item }', table: t}}}}", ["a"], [{"n": "A"}]),
    ],
)
def test_value_specs(spec: str, data: Any, value: Any) -> None:
    """A3: constants, expressions, tables, nulls, lists and records."""
    assert value_of(spec, data, "{t: {a: A, '1': one, 'true': 'yes'}}") == value


@pytest.mark.parametrize(
    ("spec", "data", "text"),
    [
        ("'${ data.b }'", {"a": 1}, "x: field 'b' is missing"),
        ("{of: '${ data }', table: t}", [1], "x: a list cannot be translated by table t"),
        ("{each: '${ data }', item: '${ item }'}", "abc", "x: a list is expected, found str"),
        ("{each: '${ data }', items_max: 2, item: '${ item }'}", [1, 2, 3], "x: more than 2 items"),
        ("{each: '${ data }', item: {of: '${ item }', table: t}}", ["q"], "x[]: a value (text of 1 characters)"),
        ("{fields: {p: {of: '${ data }', table: t}}}", "q", "x.p: a value"),
    ],
)
def test_value_specs_name_the_field_that_fails(spec: str, data: Any, text: str) -> None:
    """HOUSE_STYLE 5: errors speak, of the place and never of the value."""
    with pytest.raises(FieldError) as caught:
        value_of(spec, data, "{t: {a: A}}")
    assert text in str(caught.value)


# --- definitions that are wrong --------------------------------------------------------------------------------------

GOOD = """\
adapter: one
type: customer.signed_up
source: //a
shape: schema
accepts: [1]
canonical:
  business_object_type: customer
  business_object_id: '${ fact.customer_id }'
  actor: a
  occurred_at: '${ fact.signed_up_at }'
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("adapter: one", "adaptor: one"), "is neither an adapter nor an upcast"),
        (GOOD.replace("accepts: [1]", "accepts: []"), "name the versions that are taken"),
        (GOOD.replace("accepts: [1]", "accepts: [9]"), "version 9 of customer.signed_up is not registered"),
        (GOOD.replace("accepts: [1]", "accepts: [1]\nunnamed_version: 2"), "must be one of `accepts`"),
        (GOOD.replace("shape: schema", "shape: own"), "data: belongs to shape `own`"),
        (GOOD.replace("//a", "'*'"), "exact, or one `*` at the end"),
        (GOOD.replace("actor: a", "actor: '${ facts.x }'"), "knows no facts"),
        (GOOD.replace("actor: a", "actor: '${ ( }'"), "does not compile"),
        (GOOD.replace("actor: a", "actor: {of: x, table: t}"), "no table is called t"),
        (GOOD.replace("actor: a", "actor: {of: x, time: {zone: Europe/Wien}}"), "no time zone is called Europe/Wien"),
        (GOOD.replace("actor: a", "actor: {of: x, time: {format: '%Y'}}"), "a format needs a zone"),
        (GOOD.replace("actor: a", "actor: {off: x}"), "x.yaml:9"),
        (GOOD.replace("customer.signed_up", "order.lost"), "no schema is registered for order.lost"),
        ("upcast: a.b\nfrom: 1\nto: 3\n", "leads to the next version"),
        (f"upcast: {TYPE}\nfrom: 1\nto: 2\nset: {{shoe: 1}}\n", "has no field shoe"),
    ],
)
async def test_a_wrong_definition_is_refused_at_start_with_its_place(
    registry: DirectoryRegistry, text: str, expected: str
) -> None:
    """HOUSE_STYLE 5, B1: the service does not start with it; file, line and what to do are told."""
    documents = [yaml.parse(text, file="x.yaml")]
    if text.startswith("upcast"):
        documents.append(yaml.parse(GOOD, file="good.yaml"))
    with pytest.raises(DefinitionError) as caught:
        await reading.build_mapper(documents, registry, default_expressions())
    assert expected in str(caught.value)


async def test_the_most_particular_adapter_takes_the_fact(registry: DirectoryRegistry) -> None:
    """A3, A5: an exact source before a prefix, a longer prefix before a shorter: how one source is rolled out apart."""
    texts = [
        GOOD,
        GOOD.replace("one", "two").replace("//a", "//a*").replace("actor: a", "actor: b"),
        GOOD.replace("one", "three").replace("//a", "//a/x*").replace("actor: a", "actor: c"),
    ]
    documents = [yaml.parse(t, file=f"{n}.yaml") for n, t in enumerate(texts)]
    made = await reading.build_mapper(documents, registry, default_expressions())
    actors = {
        source: canonical(made, registry, event(source, of_v1(), dataschema="/v1")).actor
        for source in ("//a", "//ab", "//a/xy")
    }
    assert actors == {"//a": "a", "//ab": "b", "//a/xy": "c"}
    with pytest.raises(DefinitionError, match="two adapters take"):
        again = yaml.parse(GOOD.replace("one", "four"), file="x.yaml")
        await reading.build_mapper([*documents, again], registry, default_expressions())


async def test_a_symbol_that_the_next_version_lacks_is_an_error(tmp_path: Path) -> None:
    """A3: Avro resolution would read it as the enum's default in silence; a declared translation is the way."""

    def schema(symbols: list[str]) -> dict[str, Any]:
        return {
            "type": "record",
            "name": "moved",
            "fields": [
                {"name": "id", "type": "string"},
                {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
                {"name": "how", "type": {"type": "enum", "name": "how", "symbols": symbols, "default": symbols[0]}},
            ],
        }

    folder = tmp_path / "thing.moved"
    folder.mkdir()
    (folder / "v1.avsc").write_text(json.dumps(schema(["unknown", "cart", "car"])))
    (folder / "v2.avsc").write_text(json.dumps(schema(["unknown", "car"])))
    (tmp_path / "ids.lock").write_text(json.dumps({"thing.moved/v1": 10000, "thing.moved/v2": 10001}))
    registry = DirectoryRegistry([tmp_path])
    adapter = GOOD.replace(TYPE, "thing.moved").replace("customer_id", "id").replace("signed_up_at", "at")
    documents = [yaml.parse(adapter, file="x.yaml")]
    plain = await reading.build_mapper(documents, registry, default_expressions())

    def map_with(made: Mapper, how: str) -> Any:
        data = {"id": "1", "at": "2026-01-01T00:00:00Z", "how": how}
        one = event("//a", data, dataschema="/v1", type="thing.moved")
        return json.loads(made.map(reading.read(one, registry)).data)["how"]

    assert map_with(plain, "car") == "car"
    with pytest.raises(UnmappedError, match="how: a symbol that the next version"):
        map_with(plain, "cart")
    upcast = "upcast: thing.moved\nfrom: 1\nto: 2\ntables: {t: {cart: car, car: car, unknown: unknown}}\n"
    upcast += "set: {how: {of: '${ data.how }', table: t}}\n"
    declared = await reading.build_mapper(
        [*documents, yaml.parse(upcast, file="u.yaml")], registry, default_expressions()
    )
    assert map_with(declared, "cart") == "car"


# --- deciding --------------------------------------------------------------------------------------------------------


def delivery(data: bytes, opening: int = 0, **more: str) -> Delivery:
    headers = {
        "ce_specversion": "1.0",
        "ce_id": "1",
        "ce_source": SHOP,
        "ce_type": TYPE,
        "ce_dataschema": "/v1",
        "content-type": "application/json",
        **more,
    }
    if opening:
        headers |= {"factmesh-root-id": "at:facts.raw:0:9", "factmesh-opening": str(opening)}
    return Delivery("facts.raw", 0, 9, None, data, tuple((k, v.encode()) for k, v in headers.items()))


def message(registry: DirectoryRegistry, opening: int = 0, **changes: Any) -> Message:
    return reading.decode(delivery(json.dumps(of_v1(**changes)).encode(), opening), registry)


def test_an_accepted_fact_is_one_canonical_fact(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """A3, B4: keyed by the business object, correlated by (source, id); the ledger's note says what it was about."""
    desk = Desk(mapper, timedelta(days=14))
    state, effects = decide_fact(desk, message(registry), NOW)
    publish, note = effects
    assert state is desk
    assert isinstance(publish, Publish)
    assert (publish.topic, publish.record, publish.key) == ("fact", "fact", "C-1")
    assert publish.body["ce_type"] == TYPE
    assert publish.body["correlation_id"] == str(ids.correlation_id(SHOP, "1"))
    assert (publish.body["source"], publish.body["source_id"]) == (SHOP, "1")
    assert isinstance(note, Note)
    assert note.fields["business_object_id"] == "C-1"


def test_the_horizon_is_waived_by_an_opening_only(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """DESIGN 8: older than the horizon cannot be proved new; an opening is the operator's recorded acceptance."""
    desk = Desk(mapper, timedelta(days=14))
    at = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)
    decide_fact(desk, message(registry), at + timedelta(days=14))
    with pytest.raises(StaleError, match="older than the dedup horizon of 14 days"):
        decide_fact(desk, message(registry), at + timedelta(days=14, seconds=1))
    _, effects = decide_fact(desk, message(registry, opening=1), at + timedelta(days=300))
    assert isinstance(effects[0], Publish)


def test_the_future_is_refused_beyond_what_clocks_differ(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """A2: a few minutes are clocks, more is a wrong zone or unit; an opening does not make it right."""
    desk = Desk(mapper, timedelta(days=14))
    at = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)
    decide_fact(desk, message(registry), at - timedelta(minutes=5))
    for opening in (0, 1):
        with pytest.raises(FutureError, match="occurred_at: more than 5 minutes in the future"):
            decide_fact(desk, message(registry, opening=opening), at - timedelta(minutes=5, seconds=1))


def test_the_body_hash_leaves_out_what_senders_restamp(registry: DirectoryRegistry) -> None:
    """A4, DESIGN 7: a restamped ce_time or trace is the same body; the business instant is part of it."""
    raw = json.dumps(of_v1()).encode()
    first = reading.decode(delivery(raw), registry).hash
    assert reading.decode(delivery(raw, ce_time="2026-01-01T00:00:00Z", traceparent="x"), registry).hash == first
    assert reading.decode(delivery(json.dumps(of_v1(), indent=1, sort_keys=True).encode()), registry).hash == first
    assert message(registry, signed_up_at="2026-03-01T09:30:01+01:00").hash != first
    assert reading.decode(delivery(raw, ce_dataschema="/v2"), registry).hash != first
    assert reading.decode(delivery(raw, ce_subject="s"), registry).hash != first


def test_a_replay_keeps_both_identities(registry: DirectoryRegistry) -> None:
    """DESIGN 9: judged by the root that it names and by its own id, so that a corrected message meets its twin."""
    opened = message(registry, opening=2)
    assert opened.opening == 2
    assert opened.root.text == "at:facts.raw:0:9"
    assert opened.own == ids.Root.stranger(SHOP, "1")
    assert message(registry).root == ids.Root.stranger(SHOP, "1")


def test_avro_that_json_cannot_carry_is_refused_not_a_bug(registry: DirectoryRegistry, tmp_path: Path) -> None:
    """Issue "Bad input": a NaN inside Avro is the sender's error, named as such."""
    schema = {"type": "record", "name": "weighed", "fields": [{"name": "kg", "type": "double"}]}
    folder = tmp_path / "thing.weighed"
    folder.mkdir()
    (folder / "v1.avsc").write_text(json.dumps(schema))
    (tmp_path / "ids.lock").write_text(json.dumps({"thing.weighed/v1": 10000}))
    own = DirectoryRegistry([tmp_path])
    writer = own.cached(10000)
    assert writer is not None
    framed = avro.encode(writer, {"kg": float("nan")})
    with pytest.raises(ValidationError, match="not finite"):
        reading.decode(delivery(framed, **{"content-type": "application/avro", "ce_type": "thing.weighed"}), own)


@given(
    st.fixed_dictionaries(
        {
            "customer_id": st.text(min_size=1, max_size=50),
            "email": st.text(max_size=50),
            "country": st.text(max_size=5),
            "full_name": st.text(max_size=100),
            "plan": st.sampled_from(["unknown", "free", "basic", "premium"]),
            "marketing": st.none() | st.booleans(),
            "signed_up_at": st.integers(0, 253_370_764_799_000),
        }
    )
)
def test_whatever_a_vendor_sends_is_mapped_or_refused(
    mapper: Mapper, registry: DirectoryRegistry, data: dict[str, Any]
) -> None:
    """A3, A5: v1 comes out as valid v2 with the same values, or as an error of ours; never as anything else."""
    v2 = next(s for s in (registry.cached(10001),) if s is not None)
    try:
        made = canonical(mapper, registry, event(SHOP, data, dataschema="/v1"))
    except (ValidationError, VersionError):
        return
    fields = json.loads(made.data)
    assert {k: fields[k] for k in data if k != "signed_up_at"} == {k: v for k, v in data.items() if k != "signed_up_at"}
    assert made.occurred_at == data["signed_up_at"]
    assert set(fields) == set(v2.field_names)


def test_the_precheck_asks_what_the_handler_asks(mapper: Mapper, registry: DirectoryRegistry) -> None:
    """A2: one function for both entrances, so that what was acknowledged is not refused later for the same reason."""
    desk = Desk(mapper, timedelta(days=14))
    incoming = reading.read(event(SHOP, of_v1(), dataschema="/v1"), registry)
    published = decide_fact(desk, message(registry), NOW)[1][0]
    assert isinstance(published, Publish)
    assert accept(desk, incoming, NOW).data == published.body["data"]


def test_schemas_that_are_missing_are_named_before_decoding(registry: DirectoryRegistry) -> None:
    """DESIGN 7: a decode never waits, so what it needs is fetched before; also where the frame lies inside of JSON."""
    framed = b"\0" + struct.pack(">I", 777) + b"x"
    whole = {"specversion": "1.0", "id": "1", "source": SHOP, "type": TYPE, "datacontenttype": "application/avro"}
    inside = json.dumps({**whole, "data_base64": base64.b64encode(framed).decode()}).encode()
    structured = Delivery("t", 0, 0, None, inside, (("content-type", b"application/cloudevents+json"),))
    assert reading.needs_schema(delivery(framed), registry) == 777
    assert reading.needs_schema(structured, registry) == 777
    assert reading.needs_schema(delivery(b"\0" + struct.pack(">I", 10000) + b"x"), registry) is None
    for raw in (b"{}", b"", b"\0\0", b'{"data_base64": 1'):
        assert reading.needs_schema(delivery(raw), registry) is None
