"""The sign-ups that `factmesh demo` sends: two vendors, two versions, duplicates, poison, and what should come of it.
Everything is drawn from one seed, so that a run can be repeated; the expectations are this file's own, not the mesh's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from factmesh import avro
from factmesh.schema_files import read_dir
from factmesh_cli.demo_plan import Effects, Fate, Plan, Remedy, Sending
from factmesh_sandbox.log import open_log

SHOP, PARTNER = "//shop.example/web", "//partner.example/crm-export"
TYPE = "customer.signed_up"
ELIGIBLE, REFUSED = ("AT", "DE", "CH", "IT"), "IR"
REFUSED_SHARE = 0.06
DUPLICATES = 0.10
UNREADABLE, UNKNOWN_SCHEMA, UNMAPPED, CONFLICTS, OLD, BAD_REQUESTS = 8, 6, 10, 6, 4, 10


def plan(count: int, seed: int, project: Path) -> Plan:
    """`count` sendings in a shuffled order; a duplicate never comes before its original."""
    return _Generator(count, seed, project).plan()


class _Generator:
    def __init__(self, count: int, seed: int, project: Path) -> None:
        self.count, self.random = count, random.Random(seed)
        files = read_dir(project / "schemas")
        self.schemas = {f.schema.version: f.schema for f in files if f.schema.subject == TYPE}
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.next = 0
        self.people: dict[str, Mapping[str, Any]] = {}

    def plan(self) -> Plan:
        duplicates = int(self.count * DUPLICATES)
        bad = [
            *(self.unreadable() for _ in range(UNREADABLE)),
            *(self.unknown_schema() for _ in range(UNKNOWN_SCHEMA)),
            *(self.unmapped() for _ in range(UNMAPPED)),
            *(self.old() for _ in range(OLD)),
            *(self.bad_request(n) for n in range(BAD_REQUESTS)),
        ]
        good = [self.good(n) for n in range(self.count - duplicates - len(bad) - CONFLICTS)]
        order = [*good, *bad]
        self.random.shuffle(order)
        # Conflicts and half of the duplicates follow at some distance, the others much later.
        for n, original in enumerate(self.random.sample(good, CONFLICTS + duplicates)):
            again = self.conflict(original) if n < CONFLICTS else self.duplicate(original)
            at = order.index(original)
            far = n % 2 == 0
            order.insert(self.random.randint(at + 1, len(order)) if far else min(len(order), at + 1 + n % 5), again)
        wanted = [s for s in order if s.fate is Fate.ACCEPTED or s.remedy in (Remedy.CORRECT, Remedy.REPLAY)]
        return Plan(order, {s.subject: self.effects(s) for s in wanted}, self.look, self.observe)

    # --- good ones ---------------------------------------------------------------------------------------------------

    def person(self) -> dict[str, Any]:
        self.next += 1
        refused = self.random.random() < REFUSED_SHARE
        given, family = self.random.choice(_GIVEN), self.random.choice(_FAMILY)
        return {
            "n": self.next,
            "email": f"{given}.{family}.{self.next}@example.org".lower(),
            "country": REFUSED if refused else self.random.choice(ELIGIBLE),
            "given": given,
            "family": family,
            "at": self.now - timedelta(seconds=self.random.randint(1, 7200)),
        }

    def good(self, n: int) -> Sending:
        # A little more than half: most of the bad ones can come by Kafka only, and half of all is to come by HTTP.
        entrance = "http" if n % 39 < 20 else "kafka"
        person = self.person()
        match n % 5:
            case 0 | 1:
                return self.shop(person, 1, entrance)
            case 2 | 3:
                return self.shop(person, 2, entrance)
            case _:
                return self.partner(person, entrance)

    def shop(self, person: Mapping[str, Any], version: int, entrance: str, **changes: Any) -> Sending:
        subject = f"C-{person['n']:05d}"
        data: dict[str, Any] = {
            "customer_id": subject,
            "email": person["email"],
            "country": person["country"],
            "signed_up_at": int(person["at"].timestamp() * 1000),
            "full_name": f"{person['given']} {person['family']}",
            "marketing": self.random.choice([True, False, None]),
            "plan": self.random.choice(["free", "basic", "premium"]),
        }
        if version == 2:
            data |= {"given_name": person["given"], "family_name": person["family"], "segment": "consumer"}
            data["phones"] = [f"+43660{person['n']:07d}"]
        data |= changes
        schema = self.schemas[version]
        as_avro = entrance == "kafka" and person["n"] % 3 != 0
        if as_avro:
            body, content = avro.encode(schema, data), "application/avro"
        else:
            data["signed_up_at"] = datetime.fromtimestamp(data["signed_up_at"] / 1000, UTC).isoformat()
            body, content = json.dumps(data).encode(), "application/json"
        return self.sending(entrance, SHOP, f"shop-{person['n']}", body, content, subject, person, f"v{version}")

    def partner(self, person: Mapping[str, Any], entrance: str, tariff: str = "T20") -> Sending:
        subject = f"P-{person['n']:05d}"
        local = person["at"].astimezone(ZoneInfo("Europe/Vienna"))
        record = {
            "crmNumber": subject,
            "signedOn": local.strftime("%d.%m.%Y %H:%M:%S"),
            "tariff": tariff,
            "clientGroup": "PRV",
            "optIn": "J",
            "contact": {
                "mail": person["email"],
                "name": {"first": person["given"], "last": person["family"]},
                "phones": [{"use": "mobile", "numbers": [{"e164": f"+43660{person['n']:07d}"}]}],
            },
            "address": {"country": person["country"].lower()},
        }
        body = json.dumps({"export": {"run": f"{self.now:%Y-%m-%d}", "agent": "a.huber"}, "record": record}).encode()
        return self.sending(entrance, PARTNER, f"partner-{person['n']}", body, "application/json", subject, person)

    def sending(
        self,
        entrance: str,
        source: str,
        id_: str,
        body: bytes,
        content: str,
        subject: str,
        person: Mapping[str, Any],
        version: str = "",
    ) -> Sending:
        mark = "ce-" if entrance == "http" else "ce_"
        headers = {
            f"{mark}specversion": "1.0",
            f"{mark}id": id_,
            f"{mark}source": source,
            f"{mark}type": TYPE,
            f"{mark}time": person["at"].isoformat(),
            "content-type": content,
        }
        if version:
            headers[f"{mark}dataschema"] = f"//shop.example/schemas/{TYPE}/{version}"
        self.people.setdefault(subject, person)
        return Sending(entrance, source, id_, headers, body, Fate.ACCEPTED, subject)

    # --- bad ones ----------------------------------------------------------------------------------------------------

    def _dead(self, s: Sending, why: str, remedy: Remedy, **changes: Any) -> Sending:
        values = {f: getattr(s, f) for f in ("entrance", "source", "id", "headers", "body", "subject")}
        return Sending(**{**values, **changes}, fate=Fate.DEAD, remedy=remedy, why=why)

    def unreadable(self) -> Sending:
        s = self.shop(self.person(), 2, "kafka")
        headers = {**s.headers, "content-type": "application/avro"}
        body = b"\x00torn" + bytes(self.random.randbytes(30)) if self.next % 2 else b"<signup>no avro</signup>"
        if body.startswith(b"\x00"):
            body = self.schemas[2].id.to_bytes(5, "big") + b"\xff" * 12
        return self._dead(s, "not readable", Remedy.DISCARD, headers=headers, body=body)

    def unknown_schema(self) -> Sending:
        s = self.shop(self.person(), 2, "kafka")
        body = (900_000 + self.next).to_bytes(5, "big") + b"whatever"
        headers = {**s.headers, "content-type": "application/avro"}
        return self._dead(s, "nobody knows its schema", Remedy.DISCARD, headers=headers, body=body)

    def unmapped(self) -> Sending:
        """A plan code that the adapter's table does not hold: an operator asks the partner and corrects it."""
        s = self.partner(self.person(), "kafka", tariff="T99")
        return self._dead(s, "unmapped code", Remedy.CORRECT, correction={"record.tariff": "T20"})

    def old(self) -> Sending:
        """Older than the dedup horizon: an operator's replay is the recorded acceptance."""
        s = self.shop({**self.person(), "at": self.now - timedelta(days=40)}, 1, "kafka")
        return self._dead(s, "older than the horizon", Remedy.REPLAY)

    def conflict(self, original: Sending) -> Sending:
        person = {**self.people[original.subject], "email": "somebody.else@example.org"}
        other = (
            self.partner(person, "kafka") if original.source == PARTNER else self.shop(person, 2, "kafka", plan="free")
        )
        return self._dead(other, "same id, another body", Remedy.DISCARD, id=original.id, subject="")

    def duplicate(self, original: Sending) -> Sending:
        values = {f: getattr(original, f) for f in ("entrance", "source", "id", "headers", "body", "subject")}
        return Sending(**values, fate=Fate.DUPLICATE)

    def bad_request(self, n: int) -> Sending:
        """Refused at once: a missing field, a naive time, an unmapped code, an unknown type, a key that is twice."""
        s = self.shop(self.person(), 2, "http")
        data = json.loads(s.body)
        headers = dict(s.headers)
        body = s.body
        match n % 5:
            case 0:
                del data["customer_id"]
                body = json.dumps(data).encode()
            case 1:
                data["signed_up_at"] = "2026-11-23T10:00:00"
                body = json.dumps(data).encode()
            case 2:
                data["plan"] = "platinum"
                body = json.dumps(data).encode()
            case 3:
                headers["ce-type"] = "customer.vanished"
            case _:
                body = b'{"customer_id": "C-1", "customer_id": "C-2"}'
        return Sending("http", s.source, s.id, headers, body, Fate.REFUSED)

    # --- what should come of it --------------------------------------------------------------------------------------

    def effects(self, s: Sending) -> Effects:
        person = self.people[s.subject]
        done = {("risk", "check"): 1}
        if person["country"] != REFUSED:
            done |= {("crm", "account"): 1, ("helpdesk", "ticket"): 1}
        return Effects(done, {person["email"]: 1})

    def look(self, subject: str, step: str, log_path: Path) -> Mapping[str, Any] | None:
        """What an operator learns by asking the system itself: the answer it would have given, or None for nothing."""
        with open_log(log_path) as log:
            if step == "open_ticket":
                for effect in log.effects("helpdesk", subject=subject, kind="ticket"):
                    return {"ticket": effect.effect_id, "status": "open"}
            if step == "create_account":
                for effect in log.effects("crm", subject=subject, kind="account"):
                    return {"account": effect.effect_id}
            if step == "verify":
                for effect in log.effects("risk", subject=subject, kind="check"):
                    return {"check": effect.effect_id, "verdict": effect.response["verdict"]}
            if step in ("welcome", "reject"):
                return {} if log.mails(str(self.people[subject]["email"])) else None
        return None

    def observe(self, log_path: Path) -> Mapping[str, Effects]:
        """What the systems' own log says: effects by subject, mails under the subject whose address they went to."""
        subjects = {str(p["email"]): subject for subject, p in self.people.items()}
        effects: dict[str, dict[tuple[str, str], int]] = {}
        mails: dict[str, dict[str, int]] = {}
        with open_log(log_path) as log:
            for effect in log.effects():
                mine = effects.setdefault(effect.subject or "", {})
                mine[effect.system, effect.kind] = mine.get((effect.system, effect.kind), 0) + 1
            for mail in log.mails():
                for address in mail.rcpt_to:
                    theirs = mails.setdefault(subjects.get(address, address), {})
                    theirs[address] = theirs.get(address, 0) + 1
        return {s: Effects(effects.get(s, {}), mails.get(s, {})) for s in effects.keys() | mails.keys()}


_GIVEN = ("Ada", "Grace", "Barbara", "Edsger", "Tony", "Margaret", "Donald", "Leslie", "Frances", "Niklaus")
_FAMILY = ("Lovelace", "Hopper", "Liskov", "Dijkstra", "Hoare", "Hamilton", "Knuth", "Lamport", "Allen", "Wirth")
