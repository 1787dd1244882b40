"""The generated code for our own records is an accelerator: it agrees with the strict path on all that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factmesh import avro, ids
from factmesh.avro_strict import strip_logical
from factmesh.errors import FactmeshError
from factmesh.message import Delivery, Message
from factmesh.records import INSTANT_MS_MIN, UUID_FIELDS, Records
from factmesh.registry import DirectoryRegistry
from factmesh.schema_files import platform_dir

KINDS = ("command", "fact", "resolution", "result", "signal", "status")


async def _open(monkeypatch: pytest.MonkeyPatch, *, strict: bool) -> Records:
    with monkeypatch.context() as patch:
        if strict:
            patch.setattr(avro.Schema, "compile", lambda _self, _rules: None)
        records = await Records.open(DirectoryRegistry([platform_dir()]))
        for kind in records.kinds:
            records._route(records.schema(kind).id, "")
    return records


@pytest.fixture(scope="module")
async def both() -> tuple[Records, Records]:
    with pytest.MonkeyPatch.context() as patch:
        return await _open(patch, strict=False), await _open(patch, strict=True)


def _said(work: Callable[[], Any]) -> Any:
    """What came of it, or the whole text of what was refused."""
    try:
        return work()
    except FactmeshError as error:
        return type(error), str(error)


texts = st.text("aé: 0", max_size=6) | st.sampled_from(["b" * 63, "b" * 64, "b" * 200, "é" * 40, "noop", ""])
uuids = st.uuids(version=4).map(str) | st.just(str(ids.entrance_id("x", "y", 7)))
times = st.integers(1_600_000_000_000, 2_000_000_000_000) | st.integers(0, 2**42)
ints = st.integers(-(2**31), 2**31 - 1) | st.integers(0, 200)
longs = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 10_000)
last = ids.INSTANT_MS_MAX
odd_times = st.sampled_from([INSTANT_MS_MIN - 1, INSTANT_MS_MIN, last, last + 1, -1, 0, 2**63 - 1, 2**34 - 1, 2**41])
odd_ids = st.sampled_from(
    ["", "x", "A" * 36, "0" * 36, "-" * 36, " " * 36, str(ids.uuid_of(0)), str(ids.uuid_of(0)) * 2]
)
odd: st.SearchStrategy[Any] = (
    odd_times | odd_ids | st.sampled_from(["a\0b", "\0", None, 1.5, True, b"x", 2**70, -(2**31) - 1, []])
)
"""Values that are wrong for some field or other, and some at the edge that are right."""


def _values(field: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    kind, nullable = field["type"], isinstance(field["type"], list)
    if nullable:
        kind = next(k for k in kind if k != "null")
    timed = isinstance(kind, Mapping)
    plain = strip_logical(kind)
    if field["name"] in UUID_FIELDS:
        found: st.SearchStrategy[Any] = uuids
    elif timed:
        found = times
    else:
        found = {"string": texts, "bytes": st.binary(max_size=200), "int": ints, "long": longs}[plain]
    return st.none() | found if nullable else found


def _bodies(records: Records, kind: str) -> st.SearchStrategy[dict[str, Any]]:
    fields = records.schema(kind).source["fields"]
    must = {f["name"]: _values(f) for f in fields if "default" not in f}
    must["ce_id"] = st.just(str(ids.entrance_id("x", "y", 1_700_000_000_000)))
    return st.fixed_dictionaries(must, optional={f["name"]: _values(f) for f in fields if "default" in f})


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_both_write_the_same(both: tuple[Records, Records], kind: str, data: st.DataObject) -> None:
    """The same bytes, or the same refusal: also of a field that is missing, unknown or of another type."""
    fast, strict = both
    body = data.draw(_bodies(fast, kind))
    for _ in range(data.draw(st.sampled_from([0, 1, 1, 2]))):
        name = data.draw(st.sampled_from([*sorted(body), "colour"]))
        if data.draw(st.integers(0, 3)) == 0:
            body.pop(name, None)
        else:
            body[name] = data.draw(odd)
    assert _said(lambda: fast.encode(kind, body)) == _said(lambda: strict.encode(kind, body))


def _decoded(records: Records, delivery: Delivery) -> Any:
    found = _said(lambda: records.decode(delivery))
    return (found, list(found.record)) if isinstance(found, Message) else found


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_both_read_the_same(both: tuple[Records, Records], kind: str, data: st.DataObject) -> None:
    """The same message with the same hash, or the same refusal: of whole, changed, cut and lengthened bytes."""
    fast, strict = both
    body = {**fast._shapes[kind].defaults, **data.draw(_bodies(fast, kind))}
    name, value = data.draw(st.sampled_from(sorted(body))), data.draw(odd)
    if type(body[name]) is type(value):
        body[name] = value
    try:
        raw = bytearray(avro.encode(fast.schema(kind), body))
    except FactmeshError:
        return  # out of the type's range
    for _ in range(data.draw(st.sampled_from([0, 0, 1, 2]))):
        at = data.draw(st.integers(5, len(raw)))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    delivery = Delivery("t", 0, 7, b"k", bytes(raw))
    assert _decoded(fast, delivery) == _decoded(strict, delivery)


async def test_both_agree_on_every_odd_value(both: tuple[Records, Records]) -> None:
    """Each field of each kind with each value that may be wrong for it, one at a time, by both."""
    fast, strict = both
    numbers = [-1, 0, 2**31, 2**63, last, last + 1, INSTANT_MS_MIN, INSTANT_MS_MIN - 1, 2**34, 2**41, True, 1.5, None]
    id_ = str(ids.uuid_of(0))
    words = ["", "a\0b", "é\0", "é", "x" * 5000, "0" * 36, id_, f"{id_} {id_}", f"{id_}\n", b"", b"\0", b"x" * 5000]
    agreed = refused = 0
    for kind in KINDS:
        plain = {f["name"]: _plain_value(f) for f in fast.schema(kind).source["fields"]}
        for name in plain:
            for value in [*numbers, *words]:
                body = {**plain, name: value}
                assert _said(partial(fast.encode, kind, body)) == _said(partial(strict.encode, kind, body)), (
                    name,
                    value,
                )
                try:
                    raw = avro.encode(fast.schema(kind), body)
                except FactmeshError:
                    refused += 1
                    continue
                delivery = Delivery("t", 0, 7, b"k", raw)
                assert _decoded(fast, delivery) == _decoded(strict, delivery), (kind, name, value)
                agreed += 1
    assert agreed > 500
    assert refused > 500


def _plain_value(field: Mapping[str, Any]) -> Any:
    kind = strip_logical(field["type"])
    kind = kind[1] if isinstance(kind, list) else kind
    if field["name"] in UUID_FIELDS:
        return str(ids.entrance_id("x", "y", 1_700_000_000_000))
    return {"string": "text", "bytes": b"{}", "int": 1, "long": 1_700_000_000_000}[kind]


def test_every_record_of_ours_has_it(both: tuple[Records, Records]) -> None:
    """A field that leaves the fast path would cost each message three times as much, and nobody would see why."""
    fast, strict = both
    assert set(KINDS) == fast.kinds
    assert all(fast._shapes[kind].encode and fast._shapes[kind].read for kind in KINDS)
    assert not any(strict._shapes[kind].encode or strict._plain for kind in KINDS)
