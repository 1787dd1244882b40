"""The judge: pure functions that hold what happened against the invariants of DESIGN section 12 and name each breach.
It reads only evidence that others gathered; it asks the mesh nothing, and knows no workflow, no system and no process.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID

from factmesh import dlq, ids
from factmesh.errors import FactmeshError
from factmesh.ids import Root
from factmesh.message import Delivery, Message
from factmesh_cli.demo_plan import Effects
from factmesh_orchestrator.model import ENDED, Status, shown_moves
from factmesh_quarantine.model import OPEN_STATES, State, Way, way_back
from factmesh_sandbox.log import Call, Effect, Mail


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One breach. `invariant` is L, X, K, F or D."""

    invariant: str
    what: str

    def __str__(self) -> str:
        return f"INV-{self.invariant}: {self.what}"


@dataclass(frozen=True, slots=True)
class Sent:
    """One sending of the generator's own log that was acknowledged."""

    source: str
    id: str
    body: bytes

    @property
    def name(self) -> tuple[str, str]:
        return (self.source, self.id)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """`note` is decoded."""

    service: str
    id: UUID
    disposition: str
    topic: str
    opening: int = 0
    note: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """`waits_for` is how many facts and timers its step waits for; a command is somebody's work, not a rest."""

    id: UUID
    status: Status
    seq: int
    object_id: str
    correlation_id: str
    waits_for: int = 0


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A row of a claims table. `due`: somebody still has to do something about it."""

    service: str
    id: UUID
    kind: str
    state: str
    due: bool


@dataclass(frozen=True, slots=True)
class RecordRow:
    """A record of the quarantine index."""

    id: UUID
    root: str
    state: State
    topic: str
    reason: str
    instance_id: UUID | None = None
    object_id: str | None = None
    raised: int = 0
    published: int = 0
    unpublished_acts: int = 0


@dataclass(frozen=True)
class Evidence:
    """Everything that was found. `final`: the DLQs are triaged, so nothing may be missing any more.

    `messages` are our own records of all topics but the DLQs, in offset order, decoded; `deliveries` is everything that
    lies on any topic, `dead` what lies on the DLQs. `filed` are the ids of deaths that the index knows.
    """

    namespace: str = ""
    final: bool = False
    sent: Sequence[Sent] = ()
    intended: Mapping[str, Effects] = field(default_factory=dict)
    messages: Sequence[Message] = ()
    deliveries: Mapping[str, Delivery] = field(default_factory=dict)
    dead: Sequence[Delivery] = ()
    ledger: Sequence[LedgerRow] = ()
    instances: Sequence[InstanceRow] = ()
    claims: Sequence[ClaimRow] = ()
    records: Sequence[RecordRow] = ()
    filed: frozenset[UUID] = frozenset()
    calls: Sequence[Call] = ()
    effects: Sequence[Effect] = ()
    mails: Sequence[Mail] = ()


def judge(e: Evidence) -> list[Anomaly]:
    """Every breach of every invariant; empty is the only good answer."""
    out: list[Anomaly] = []
    for check in (lost, unsettled, doubled, keys, same_id_same_bytes, sequences, statuses, settlements, letters):
        out += check(e)
    return out


def text(anomalies: Sequence[Anomaly], shown_max: int = 40) -> str:
    """For an assertion's message: counts by invariant, then the breaches."""
    counts = ", ".join(f"INV-{k}: {n}" for k, n in sorted(Counter(a.invariant for a in anomalies).items()))
    return "\n".join([counts, *(str(a) for a in anomalies[:shown_max])])


# --- INV-L -----------------------------------------------------------------------------------------------------------


def lost(e: Evidence) -> list[Anomaly]:
    """Every acknowledged fact is in exactly one instance, or on a DLQ with a record that is not given back."""
    instances = Counter(i.correlation_id for i in e.instances)
    dead_bodies: dict[tuple[str, str], set[bytes | None]] = defaultdict(set)
    dead_roots: dict[tuple[str, str], set[str]] = defaultdict(set)
    for d in e.dead:
        source, id_ = d.header("ce_source"), d.header("ce_id")
        if source and id_:
            dead_bodies[(source, id_)].add(d.value)
            # Bytes that nobody can read are known by where they lie, not by what their headers say.
            dead_roots[(source, id_)].add(d.header(f"{dlq.P}root-id") or "")
    held: dict[str, list[RecordRow]] = defaultdict(list)
    for r in e.records:
        held[r.root].append(r)
    out = []
    bodies: dict[tuple[str, str], set[bytes]] = defaultdict(set)
    for s in e.sent:
        bodies[s.name].add(s.body)
    for (source, id_), sent in sorted(bodies.items()):
        n = instances[str(ids.correlation_id(source, id_))]
        unplaced = sent - dead_bodies[(source, id_)]
        where = f"fact {id_} of {source}"
        if n > 1:
            out.append(Anomaly("L", f"{where} is in {n} instances"))
        elif len(unplaced) > n:
            out.append(Anomaly("L", f"{where}: {len(unplaced)} acknowledged bodies are on no DLQ, {n} instance(s)"))
        elif n == 0:
            roots = {Root.stranger(source, id_).text, *dead_roots[(source, id_)]}
            states = [r.state for root in sorted(roots) for r in held[root]]
            if not any(s in OPEN_STATES or s is State.DISCARDED for s in states):
                out.append(Anomaly("L", f"{where} has no instance, and its records are {states or 'none'}"))
    return out + _facts_taken(e)


def _facts_taken(e: Evidence) -> list[Anomaly]:
    """Every fact that intake gave on is an instance's, or lies on the DLQ of the topic it went over."""
    taken = {i.correlation_id for i in e.instances}
    dead = {d.header(f"{dlq.P}root-id") for d in e.dead}
    return [
        Anomaly("L", f"fact {m.id} was given on, and no instance and no DLQ has it")
        for m in _distinct(m for m in e.messages if m.kind == "fact")
        if m["correlation_id"] not in taken and f"id:{m.id}" not in dead
    ]


def unsettled(e: Evidence) -> list[Anomaly]:
    """At rest nothing is half done: no instance runs, no row is claimed or due, no act waits to be published."""
    out = []
    open_of = Counter(r.instance_id for r in e.records if r.state in OPEN_STATES and r.instance_id is not None)
    for i in e.instances:
        if i.status is Status.RUNNING:
            out.append(Anomaly("L", f"instance {i.id} of {i.object_id} is still running"))
        elif i.status is Status.WAITING and not i.waits_for:
            out.append(Anomaly("L", f"instance {i.id} of {i.object_id} waits for nothing"))
        elif i.status is Status.PARKED and not open_of[i.id]:
            out.append(Anomaly("L", f"instance {i.id} of {i.object_id} is parked without an open record"))
        elif e.final and i.status not in ENDED:
            out.append(Anomaly("L", f"instance {i.id} of {i.object_id} is {i.status} after the triage"))
    out += [
        Anomaly("L", f"{r.service}: ledger row {r.id} ({r.topic}) was claimed and never decided")
        for r in e.ledger
        if r.disposition == "claimed"
    ]
    out += [
        Anomaly("L", f"{c.service}: {c.kind} row {c.id} is {c.state} and still due")
        for c in e.claims
        if c.due and c.kind != "timer"
    ]
    for r in e.records:
        if r.unpublished_acts:
            out.append(Anomaly("L", f"record {r.id}: {r.unpublished_acts} act(s) raised and never published"))
        if e.final and r.state in OPEN_STATES:
            out.append(Anomaly("L", f"record {r.id} ({r.topic}, {r.reason}) is {r.state} after the triage"))
    return out


# --- INV-X, INV-K ----------------------------------------------------------------------------------------------------


def doubled(e: Evidence) -> list[Anomaly]:
    """Each intended effect once, by the log of the systems themselves; less only where a person is still to look."""
    resting = {i.object_id for i in e.instances if i.status in (Status.PARKED, Status.NEEDS_RESOLUTION)}
    resting |= {r.object_id for r in e.records if r.state in OPEN_STATES and r.object_id}
    begun = {i.object_id for i in e.instances}
    done = Counter((f.subject, (f.system, f.kind)) for f in e.effects)
    mailed = Counter(to.lower() for m in e.mails for to in m.rcpt_to)
    wanted: Counter[tuple[str | None, tuple[str, str]]] = Counter()
    addresses: Counter[str] = Counter()
    out = []
    for subject, effects in e.intended.items():
        may_lack = not e.final and (subject in resting or subject not in begun)
        for what, n in effects.effects.items():
            wanted[(subject, what)] = n
            if done[(subject, what)] < n and not may_lack:
                out.append(Anomaly("X", f"{subject}: {done[(subject, what)]} x {what}, {n} intended"))
        for address, n in effects.mails.items():
            addresses[address.lower()] += n
            if mailed[address.lower()] < n and not may_lack:
                out.append(Anomaly("X", f"{subject}: {mailed[address.lower()]} mails to {address}, {n} intended"))
    out += [
        Anomaly("X", f"{s}: {n} x {w}, {wanted[(s, w)]} intended") for (s, w), n in done.items() if n > wanted[(s, w)]
    ]
    out += [Anomaly("X", f"{n} mails to {a}, {addresses[a]} intended") for a, n in mailed.items() if n > addresses[a]]
    return out


def keys(e: Evidence) -> list[Anomaly]:
    """Calls under one key carry one body, until a failure that is known: answered as an error, and nothing was done."""
    worked = {f.call for f in e.effects}
    under: dict[tuple[str, str | None, str], list[Call]] = defaultdict(list)
    for call in sorted(e.calls, key=lambda c: c.seq):
        if call.idempotency_key:
            under[(call.system, call.operation, call.idempotency_key)].append(call)
    out = []
    for (system, operation, key), calls in under.items():
        for before, after in pairwise(calls):
            known = before.answered and (before.status or 0) >= 400 and before.seq not in worked
            if before.body_sha256 != after.body_sha256 and not known:
                out.append(Anomaly("K", f"{system}.{operation}: key {key} was used with two bodies, call {after.seq}"))
    return out


# --- INV-F -----------------------------------------------------------------------------------------------------------


def same_id_same_bytes(e: Evidence) -> list[Anomaly]:
    """Same cause, same id, same bytes: a message that is published again is the one that was recorded."""
    first: dict[tuple[str, UUID], Message] = {}
    out = []
    for m in e.messages:
        if m.id is None:
            continue
        known = first.setdefault((m.delivery.topic, m.id), m)
        if known.delivery.value != m.delivery.value and m.opening == 0:
            out.append(
                Anomaly("F", f"{m.kind} {m.id} has other bytes at {m.delivery.where} than at {known.delivery.where}")
            )
    return out


def sequences(e: Evidence) -> list[Anomaly]:
    """The ledger's notes of an instance count from 1 to its `seq`, each number once: no write was lost or repeated."""
    noted: dict[str, list[int]] = defaultdict(list)
    for row in e.ledger:
        for note in _notes(row.note):
            if "instance_id" in note and "seq" in note:
                noted[note["instance_id"]].append(note["seq"])
    out = []
    for i in e.instances:
        seen = sorted(noted.pop(str(i.id), []))
        if seen != list(range(1, i.seq + 1)):
            out.append(Anomaly("F", f"instance {i.id} is at {i.seq}, its ledger rows say {seen}"))
    out += [Anomaly("F", f"ledger rows speak of instance {id_}, which is not there") for id_ in noted]
    return out


def _notes(note: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    if note is None:
        return ()
    return (note, *note.get("also", ()))


def statuses(e: Evidence) -> list[Anomaly]:
    """What readers are told of an instance: one status a number, each move legal and from where the last one led."""
    told: dict[UUID | None, list[Message]] = defaultdict(list)
    for m in _distinct(m for m in e.messages if m.kind == "status"):
        told[m.instance_id].append(m)
    legal = shown_moves()
    out: list[Anomaly] = []
    for i in e.instances:
        story = sorted(told.pop(i.id, []), key=lambda m: int(m["instance_seq"]))
        out += _story(i, story, legal)
    out += [Anomaly("F", f"statuses of instance {id_}, which is not there") for id_ in told]
    return out


def _story(i: InstanceRow, story: Sequence[Message], legal: frozenset[tuple[Status, Status]]) -> Iterable[Anomaly]:
    at: Status | None = None
    seq = 0
    for m in story:
        number, now, before = int(m["instance_seq"]), Status(m["status"]), m["previous_status"]
        where = f"instance {i.id}, status {number}"
        if number <= seq:
            yield Anomaly("F", f"{where} is told twice under different ids")
        if (before or None) != (str(at) if at else None):
            yield Anomaly("F", f"{where} follows {before}, but {at} was told before it")
        if at is not None and now is not at and (at, now) not in legal:
            yield Anomaly("F", f"{where}: {at} to {now} is not in the table")
        if at in ENDED:
            yield Anomaly("F", f"{where} comes after the end ({at})")
        at, seq = now, number
    if at is not i.status:
        yield Anomaly("F", f"instance {i.id} is {i.status}, readers were told {at}")
    if seq > i.seq:
        yield Anomaly("F", f"instance {i.id} is at {i.seq}, readers were told of {seq}")


def settlements(e: Evidence) -> list[Anomaly]:
    """One command a key, one outcome a command: no settlement of a stale lease went out."""
    commands: dict[str, set[UUID | None]] = defaultdict(set)
    outcomes: dict[str, set[tuple[UUID | None, str]]] = defaultdict(set)
    for m in e.messages:
        if m.kind == "command":
            commands[m["idempotency_key"]].add(m.id)
        elif m.kind == "result":
            outcomes[m["command_id"]].add((m.id, m["outcome"]))
    out = [Anomaly("F", f"key {k} has {len(c)} commands") for k, c in commands.items() if len(c) > 1]
    out += [
        Anomaly("F", f"command {c} has {len(o)} outcomes: {sorted(x for _, x in o)}")
        for c, o in outcomes.items()
        if len(o) > 1
    ]
    known = {str(id_) for found in commands.values() for id_ in found}
    out += [Anomaly("F", f"a result of command {c}, which nobody gave") for c in outcomes if c not in known]
    return out


# --- INV-D -----------------------------------------------------------------------------------------------------------


def letters(e: Evidence) -> list[Anomaly]:
    """Every DLQ record reads back, holds the original byte for byte, has a way back, and is in the index."""
    out = []
    for d in e.dead:
        try:
            record = dlq.parse(d)
        except FactmeshError as error:
            out.append(Anomaly("D", f"DLQ record at {d.where} cannot be read: {error}"))
            continue
        dead = record.dead
        origin = e.deliveries.get(dead.original.where)
        if origin is None:
            out.append(Anomaly("D", f"DLQ record at {d.where} names {dead.original.where}, where nothing lies"))
        elif _content(origin) != _content(dead.original):
            out.append(Anomaly("D", f"DLQ record at {d.where} is not what lies at {dead.original.where}"))
        way = way_back(dead.original.topic, str(dead.reason), e.namespace)
        has_command = dead.command_id is not None or Root(dead.root).id is not None
        if way is not Way.OPENING and (dead.instance_id is None or not has_command):
            out.append(Anomaly("D", f"DLQ record at {d.where} ({dead.reason}) lacks its instance or its command"))
        if way is Way.OPENING and not dead.root:
            out.append(Anomaly("D", f"DLQ record at {d.where} has no root to be opened under"))
        if record.id not in e.filed:
            out.append(Anomaly("D", f"DLQ record at {d.where} ({record.id}) is not in the index"))
    return out


def _content(d: Delivery) -> tuple[object, ...]:
    return (d.key, d.value, dlq.original_headers(d.headers))


def _distinct(messages: Iterable[Message]) -> list[Message]:
    """One of each id, the first."""
    out: dict[UUID | None, Message] = {}
    for m in messages:
        out.setdefault(m.id, m)
    return list(out.values())
