"""The fault rules in force: the file's, or those given at run time, which outlive a restart.
It counts attempts and asks `faults.pick`; how a fault is carried out is the edges' business.
"""

from __future__ import annotations

import json
from typing import Any

from factmesh_sandbox.config import parse_rules
from factmesh_sandbox.faults import pick
from factmesh_sandbox.journal import Journal
from factmesh_sandbox.model import FaultRule, SandboxFile


class Switchboard:
    """One for the whole sandbox; HTTP and SMTP ask it."""

    def __init__(self, file: SandboxFile, journal: Journal) -> None:
        self._file = file
        self._journal = journal
        self._given: dict[str, tuple[FaultRule, ...]] = {}
        self._since: dict[str, int] = {}
        for name, (since, rules) in journal.fault_overrides().items():
            if name in file.names():
                self._since[name] = since
                if rules is not None:
                    self._given[name] = parse_rules(json.loads(rules))

    def strike(self, name: str, operation: str, subject: str | None) -> FaultRule | None:
        """Count this attempt and tell which fault it meets. Without a subject all attempts count as one subject's."""
        who = subject if subject is not None else ""
        attempt = self._journal.attempt(name, operation, who, self._since.get(name, 0))
        rules = self._rules(name)
        if not rules:
            return None
        return pick(rules, seed=self._file.seed, system=name, operation=operation, subject=who, attempt=attempt)

    def shown(self) -> dict[str, Any]:
        """All rules in force, by name."""
        return {name: [_json(rule) for rule in self._rules(name)] for name in self._file.names()}

    async def put(self, name: str, data: Any) -> dict[str, Any]:
        """Set the rules of a name from now on; attempts count anew. KeyError: no such name, ValueError: bad rules."""
        rules = parse_rules(data)
        self._file.check_rules_for(name, rules)
        text = json.dumps([_json(rule) for rule in rules])
        await self._set(name, text)
        self._given[name] = rules
        return {"system": name, "rules": [_json(rule) for rule in rules]}

    async def revert(self, name: str) -> dict[str, Any]:
        """Let the file's own rules apply again; attempts count anew."""
        self._file.rules_of(name)
        await self._set(name, None)
        self._given.pop(name, None)
        return {"system": name, "rules": [_json(rule) for rule in self._rules(name)]}

    async def _set(self, name: str, rules: str | None) -> None:
        since = self._journal.last_call_seq()
        await self._journal.commit(("put_faults", {"system": name, "since_seq": since, "rules": rules}))
        self._since[name] = since

    def _rules(self, name: str) -> tuple[FaultRule, ...]:
        given = self._given.get(name)
        return self._file.rules_of(name) if given is None else given


def _json(rule: FaultRule) -> dict[str, Any]:
    return rule.model_dump(mode="json", exclude_defaults=True)
