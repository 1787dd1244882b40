"""Same cause, same id: every id and key is derived from what caused it, so a repeated cause repeats them.
No randomness and no clock lives here; instants come in as arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from hashlib import blake2b
from typing import Final
from uuid import UUID

from factmesh.document import canonical_json as canonical_json
from factmesh.errors import ValidationError

ORDINAL_MAX = 0xFFFF
INSTANT_MS_MAX = 253_402_300_799_999
"""The last millisecond of the year 9999: beyond it no calendar has a day."""
ROOT_CHARS_MAX = 1024
"""Above what intake lets a source and an id be, or Kafka a topic's name."""
_MS_MAX = (1 << 48) - 1
_EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
_DAY_MS = 86_400_000


def _digest(person: bytes, *parts: str | bytes) -> bytes:
    """16 bytes of BLAKE2b (RFC 7693) over length-prefixed parts, so that no two lists of parts read the same."""
    whole: list[bytes] = []
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        whole += (len(raw).to_bytes(4, "big"), raw)
    return blake2b(b"".join(whole), digest_size=16, person=person).digest()


def uuid_of(number: int) -> UUID:
    """The UUID of a number of 128 bits; the constructor judges ways to be called for four times as long."""
    made = _new(UUID)
    _set_number(made, number)
    _set_safety(made, _SAFETY)
    return made


_new = object.__new__
_set_number = UUID.__dict__["int"].__set__
_set_safety = UUID.__dict__["is_safe"].__set__
_SAFETY = UUID(int=0).is_safe


def _number8(instant_ms: int, digest: bytes, ordinal: int) -> int:
    """RFC 9562 version 8: 48 bits of Unix milliseconds, 12 + 46 bits of hash, 16 bits of ordinal."""
    if not 0 <= instant_ms <= _MS_MAX:
        raise ValidationError(f"instant {instant_ms} ms does not fit an id", hint="use Unix milliseconds")
    if not 0 <= ordinal <= ORDINAL_MAX:
        raise too_many(ordinal)
    h = int.from_bytes(digest[:8], "big")
    value = instant_ms << 80
    value |= 0x8 << 76
    value |= (h & 0xFFF) << 64
    value |= 0b10 << 62
    value |= ((h >> 12) & ((1 << 46) - 1)) << 16
    value |= ordinal
    return value


def _uuid8(instant_ms: int, digest: bytes, ordinal: int) -> UUID:
    return uuid_of(_number8(instant_ms, digest, ordinal))


def too_many(ordinal: int) -> ValidationError:
    """A message has more effects than its ids can number."""
    return ValidationError(f"ordinal {ordinal} does not fit an id", hint=f"at most {ORDINAL_MAX} effects a message")


def _stamped(digest: bytes) -> UUID:
    """A UUID that is a hash alone: RFC 9562 version 8, and no instant in it."""
    value = int.from_bytes(digest, "big")
    value = value & ~(0xF << 76) | 0x8 << 76
    value = value & ~(0b11 << 62) | 0b10 << 62
    return uuid_of(value)


def message_id(service: str, root: str, opening: int, ordinal: int, instant_ms: int) -> UUID:
    """The id of the `ordinal`-th message that `service` emits because of `root` under `opening` (DESIGN section 7).

    `instant_ms` is the instant of the root cause, when intake first saw the fact, so that ids tell their own day.
    """
    return _uuid8(instant_ms, _message_digest(service, root, opening), ordinal)


def _message_digest(service: str, root: str, opening: int) -> bytes:
    return _digest(b"fm.message", service, root, str(opening))


def message_id_stem(service: str, root: str, opening: int, instant_ms: int) -> str:
    """The text of `message_id` up to the ordinal, which is the last four digits: `stem + f"{ordinal:04x}"`."""
    t = f"{_number8(instant_ms, _message_digest(service, root, opening), 0):032x}"
    return f"{t[:8]}-{t[8:12]}-{t[12:16]}-{t[16:20]}-{t[20:28]}"


def entrance_id(kind: str, name: str, instant_ms: int) -> UUID:
    """The id of something that entered from outside at a recorded instant: a stranger's root, an act of a person."""
    return _uuid8(instant_ms, _digest(b"fm.entrance", kind, name), 0)


def instance_id(workflow: str, fact_id: UUID) -> UUID:
    """The instance that this workflow starts for this fact; it lies in the fact's day."""
    return _uuid8(instant_ms_of(fact_id), _digest(b"fm.instance", workflow, fact_id.bytes), 0)


def idempotency_key(instance: UUID, step_path: str, iteration: int, run: int) -> UUID:
    """One key for each intended effect: a new run is a new intent, and comes only after a known failure (INV-K)."""
    return _uuid8(
        instant_ms_of(instance), _digest(b"fm.key", instance.bytes, step_path, str(iteration), str(run)), 0
    )


def correlation_id(source: str, event_id: str) -> UUID:
    """The correlation id of a fact: derived from (source, id), so that posting it again returns the same."""
    return _stamped(_digest(b"fm.correlation", source, event_id))


def gate_hash(root: str) -> bytes:
    """16 bytes under which intake's gate and the poison gate know a root that is not an id of ours."""
    return _digest(b"fm.gate", root)


def body_hash(*parts: bytes | str) -> bytes:
    """16 bytes by which two bodies under one id or key are told apart (INV-K, REQUIREMENTS A4)."""
    return _digest(b"fm.body", *parts)


def instant_ms_of(id_: UUID) -> int:
    """The Unix milliseconds that one of our ids carries."""
    return id_.int >> 80


def day_of(id_: UUID) -> date:
    """The UTC day that one of our ids lies in: the ledger's partition."""
    return date.fromordinal(_EPOCH_ORDINAL + (id_.int >> 80) // _DAY_MS)


def one_of_each_day(ids_: Iterable[UUID]) -> Iterable[UUID]:
    """One id of each UTC day among these: a batch's ids lie in one or two days, and a date costs more than a number."""
    return {(id_.int >> 80) // _DAY_MS: id_ for id_ in ids_}.values()


def first_id_of(day: date) -> UUID:
    """The lower bound of a day's ids, for range partitions."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return UUID(int=int(start.timestamp() * 1000) << 80)


def is_ours(id_: UUID) -> bool:
    """Whether an id has the form of ours: version 8, RFC 9562 variant."""
    return (id_.int >> 76) & 0xF == 0x8 and (id_.int >> 62) & 0b11 == 0b10


_ROOT = re.compile(r"id:[0-9a-f-]{36}\Z|ce:\d{1,4}:.|at:[^:]+:\d{1,10}:\d{1,19}\Z")
#: NUL is what PostgreSQL's text cannot hold; the others have no place in a header either.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


class Root:
    """What a message goes back to, as text: one of our ids, a stranger's (source, id), or coordinates.

    `text` is the header `factmesh-root-id`: `id:<uuid>`, `ce:<source length>:<source>:<id>` or
    `at:<topic>:<partition>:<offset>`. Only the first tells its day; the others are known by `gate_hash(text)`.
    A value: equal by its text. `known` spares reading an id that is at hand: the very one that the text names.
    """

    __slots__ = ("_id", "text")

    def __init__(self, text: str, known: UUID | None = None) -> None:
        self.text: Final = text
        self._id = known

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Root) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Root({self.text!r})"

    @classmethod
    def own(cls, id_: UUID) -> Root:
        return cls(f"id:{id_}")

    @classmethod
    def stranger(cls, source: str, event_id: str) -> Root:
        return cls(f"ce:{len(source)}:{source}:{event_id}")

    @classmethod
    def coordinates(cls, topic: str, partition: int, offset: int) -> Root:
        return cls(f"at:{topic}:{partition}:{offset}")

    @classmethod
    def parse(cls, text: str) -> Root | None:
        """The root that a header names; None for text that no mesh wrote. A stranger may write any header."""
        if len(text) > ROOT_CHARS_MAX or _CONTROL.search(text) or not _ROOT.match(text):
            return None
        root = cls(text)
        if text.startswith("id:") and (root.id is None or instant_ms_of(root.id) > INSTANT_MS_MAX):
            return None
        return root

    @property
    def id(self) -> UUID | None:
        """The id, where the root is one of ours; None for strangers and coordinates."""
        if self._id is None and self.text.startswith("id:"):
            try:
                id_ = UUID(self.text[3:])
            except ValueError:
                return None
            self._id = id_ if is_ours(id_) else None
        return self._id


def record_id(root: str, group: str) -> UUID:
    """The quarantine record's id as instances know it: numbers count per root id and group (DESIGN section 9)."""
    return _stamped(_digest(b"fm.record", root, group))


def fingerprint(*parts: str) -> str:
    """16 hex digits that group failures of one cause."""
    return _digest(b"fm.cause", *parts)[:8].hex()


def as_mapping(value: object) -> Mapping[str, object]:
    """The value if it is a JSON object; raises ValidationError otherwise."""
    if not isinstance(value, Mapping):
        raise ValidationError(f"expected a JSON object, found {type(value).__name__}")
    return value
