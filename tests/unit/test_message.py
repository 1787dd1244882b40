"""Bytes as the ledger and the claims keep them: packed and unpacked without any loss; headers read without trust."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factmesh.errors import DecodeError
from factmesh.message import (
    H_GROUP,
    H_OPENING,
    H_ROOT_ID,
    Delivery,
    Emission,
    from_ms,
    pack,
    pack_delivery,
    rfc3339,
    to_ms,
    unpack,
    unpack_delivery,
)

BYTES = st.none() | st.binary(max_size=40)
NAMES = st.text(max_size=12)
HEADERS = st.lists(st.tuples(NAMES, BYTES), max_size=4).map(tuple)
EMISSIONS = st.builds(Emission, NAMES, BYTES, BYTES, HEADERS)
DELIVERIES = st.builds(
    Delivery, NAMES, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1), BYTES, BYTES, HEADERS, st.integers(0, 2**48)
)


@given(st.lists(EMISSIONS, max_size=5))
def test_what_was_emitted_is_published_again_byte_for_byte(emissions: list[Emission]) -> None:
    """DESIGN 1.3: the recorded bytes are the emitted ones; null keys, values and headers stay null, never empty."""
    assert unpack(pack(emissions)) == tuple(emissions)


@given(DELIVERIES)
def test_a_kept_delivery_comes_back_whole(delivery: Delivery) -> None:
    """E1: a row that is dead-lettered later still has key, value, headers, coordinates and timestamp."""
    assert unpack_delivery(pack_delivery(delivery)) == delivery


@given(st.lists(EMISSIONS, min_size=1, max_size=3), st.data())
def test_torn_bytes_never_read_as_something_else(emissions: list[Emission], data: st.DataObject) -> None:
    """A row that was cut off raises; it is never published as fewer or shorter messages."""
    raw = pack(emissions)
    assert raw is not None
    cut = data.draw(st.integers(1, len(raw) - 1))
    with pytest.raises((DecodeError, struct.error)):
        unpack(raw[:cut])


def test_bytes_of_a_newer_format_are_refused() -> None:
    """A rolled back replica says so instead of publishing nonsense."""
    with pytest.raises(DecodeError, match="newer version"):
        unpack(b"\x02rest")


def test_nothing_emitted_is_no_bytes() -> None:
    assert pack([]) is None
    assert unpack(None) == unpack(b"") == ()


@given(st.binary(max_size=12) | st.text(max_size=12).map(str.encode) | st.integers().map(lambda n: str(n).encode()))
def test_any_header_is_a_number_or_no_opening(raw: bytes) -> None:
    """A stranger may write any header: it is never an exception, and never a negative or endless number."""
    delivery = Delivery("t", 0, 0, None, None, ((H_OPENING, raw), (H_ROOT_ID, b"at:t:0:1")))
    assert 0 <= delivery.opening <= 999_999_999
    assert (delivery.root_override is not None) <= (delivery.opening > 0)


def test_the_last_header_of_a_name_counts_and_a_replays_are_taken_off() -> None:
    """DESIGN 9: the original headers are restored exactly, the opening's are not among them."""
    headers = (("x", b"1"), (H_ROOT_ID, b"at:t:0:1"), ("x", b"2"), (H_OPENING, b"3"), (H_GROUP, b"g"), ("y", None))
    delivery = Delivery("t", 0, 0, None, None, headers)
    assert (delivery.header("x"), delivery.header("y"), delivery.opening) == ("2", None, 3)
    assert delivery.original_headers == (("x", b"1"), ("x", b"2"), ("y", None))


@given(st.integers(0, 253_402_300_799_999))
def test_instants_survive_the_way_there_and_back(ms: int) -> None:
    """Milliseconds lose nothing as datetimes, and RFC 3339 text says UTC."""
    assert to_ms(from_ms(ms)) == ms
    assert rfc3339(ms).endswith("Z")
