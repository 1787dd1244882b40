"""Same cause, same id: what the derivations promise to every receiver (DESIGN 2 and 7)."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh import ids
from factmesh.errors import ValidationError

INSTANTS = st.integers(0, 253_402_300_799_999)
TEXTS = st.text(max_size=12)


@given(TEXTS, TEXTS, st.integers(0, 9), st.integers(0, ids.ORDINAL_MAX), INSTANTS)
def test_the_same_cause_gives_the_same_id_that_tells_its_instant(
    service: str, root: str, opening: int, ordinal: int, ms: int
) -> None:
    """⚑ DESIGN 7: (service, root, opening, ordinal) decide the id; it carries the instant, and is a version 8 UUID."""
    id_ = ids.message_id(service, root, opening, ordinal, ms)
    assert id_ == ids.message_id(service, root, opening, ordinal, ms)
    assert ids.instant_ms_of(id_) == ms
    assert ids.is_ours(id_)
    assert (id_.version, id_.variant) == (8, UUID(int=0x8 << 76 | 0b10 << 62).variant)
    assert id_.int & 0xFFFF == ordinal


@given(st.lists(st.tuples(TEXTS, TEXTS, st.integers(0, 3), st.integers(0, 5)), unique=True, max_size=30))
def test_two_causes_never_share_an_id(causes: list[tuple[str, str, int, int]]) -> None:
    """⚑ DESIGN 7: another service, root, opening or ordinal is another id, at the same instant too."""
    made = {ids.message_id(*cause, 1_760_000_000_000) for cause in causes}
    assert len(made) == len(causes)


@given(st.lists(TEXTS, max_size=5), st.lists(TEXTS, max_size=5))
def test_no_two_lists_of_parts_read_the_same(one: list[str], other: list[str]) -> None:
    """A cause is never mistaken for another whose parts join to the same text: ("ab", "c") is not ("a", "bc")."""
    assert (ids.body_hash(*one) == ids.body_hash(*other)) == (one == other)
    assert (ids.fingerprint(*one) == ids.fingerprint(*other)) == (one == other)


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_strangers_are_told_apart(source: str, id_: str, other_source: str, other_id: str) -> None:
    """A4: (source, id) is one root, one correlation id and one gate entry; another pair never shares them."""
    same = (source, id_) == (other_source, other_id)
    one, other = ids.Root.stranger(source, id_), ids.Root.stranger(other_source, other_id)
    assert (one == other) == same
    assert (ids.gate_hash(one.text) == ids.gate_hash(other.text)) == same
    assert (ids.correlation_id(source, id_) == ids.correlation_id(other_source, other_id)) == same
    assert one.id is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ids.message_id("s", "r", 0, 0, 1), ids.entrance_id("s", "r", 1)),
        (ids.instance_id("w", UUID(int=5 << 80)), ids.entrance_id("w", "", 5)),
        (ids.record_id("r", "g"), ids.correlation_id("r", "g")),
        (ids.gate_hash("x"), ids.body_hash("x")),
    ],
)
def test_each_kind_of_id_has_a_space_of_its_own(one: object, other: object) -> None:
    """The same texts in another derivation are another id."""
    assert one != other


@given(INSTANTS, INSTANTS, TEXTS, TEXTS)
def test_ids_sort_by_their_instant(earlier: int, later: int, a: str, b: str) -> None:
    """DESIGN 13.3: time-ordered, so that the ledger grows at its end."""
    if earlier < later:
        assert ids.entrance_id("k", a, earlier) < ids.entrance_id("k", b, later)


@given(TEXTS, st.integers(0, ids.ORDINAL_MAX - 1), INSTANTS)
def test_effects_of_one_message_sort_by_ordinal(root: str, ordinal: int, ms: int) -> None:
    """Two effects of one cause differ in the ordinal alone."""
    assert ids.message_id("s", root, 0, ordinal + 1, ms).int - ids.message_id("s", root, 0, ordinal, ms).int == 1


@given(st.dates(date(1970, 1, 1), date(9999, 12, 30)), st.integers(0, 86_399_999), TEXTS)
def test_an_id_lies_inside_the_bounds_of_its_day(day: date, ms_of_day: int, name: str) -> None:
    """⚑ DESIGN 8: at midnight too, an id belongs to exactly one partition, by its own bits."""
    start = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)
    id_ = ids.entrance_id("k", name, start + ms_of_day)
    assert ids.day_of(id_) == day
    assert ids.first_id_of(day) <= id_ < ids.first_id_of(day + timedelta(days=1))


@pytest.mark.parametrize("ms", [-1, 1 << 48])
def test_an_instant_that_does_not_fit_is_refused(ms: int) -> None:
    """Never cut off: it would be another instant."""
    with pytest.raises(ValidationError, match="does not fit an id"):
        ids.entrance_id("k", "n", ms)


@pytest.mark.parametrize("ordinal", [-1, ids.ORDINAL_MAX + 1])
def test_more_effects_than_ordinals_are_refused(ordinal: int) -> None:
    """The 65,536th effect would share the id of another message's first."""
    with pytest.raises(ValidationError, match="ordinal"):
        ids.message_id("s", "r", 0, ordinal, 1)


@given(st.uuids(), TEXTS, st.integers(0, 5), st.integers(0, 5))
def test_an_idempotency_key_is_one_for_each_run(instance: UUID, path: str, iteration: int, run: int) -> None:
    """INV-K: repeats of a run share the key; a new run, iteration or step has another."""
    key = ids.idempotency_key(instance, path, iteration, run)
    assert key == ids.idempotency_key(instance, path, iteration, run)
    others = [(path + "x", iteration, run), (path, iteration + 1, run), (path, iteration, run + 1)]
    assert key not in {ids.idempotency_key(instance, *o) for o in others}
    assert ids.instant_ms_of(key) == ids.instant_ms_of(instance)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, lambda c: st.lists(c) | st.dictionaries(TEXTS, c))
)
def test_equal_json_has_equal_bytes(value: object) -> None:
    """Whatever order a mapping was built in."""

    def turned(v: object) -> object:
        if isinstance(v, dict):
            return {k: turned(v[k]) for k in reversed(list(v))}
        return [turned(x) for x in v] if isinstance(v, list) else v

    assert ids.canonical_json(value) == ids.canonical_json(turned(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused(value: float) -> None:
    """No receiver could read it."""
    with pytest.raises(ValueError):
        ids.canonical_json({"x": value})


def test_a_root_tells_its_id_only_where_it_is_one_of_ours() -> None:
    """DESIGN 8: only our own ids tell their day; a foreign UUID must go through the gate."""
    own = ids.entrance_id("k", "n", 1)
    assert ids.Root.own(own).id == own
    for text in (f"id:{UUID(int=7)}", "id:torn", "ce:1:a:b", "at:t:0:1", str(own)):
        assert ids.Root(text).id is None
