"""What a declared system answers: routing, validation, its own rules, idempotency keys, effects and look-ups.
It decides over the journal's reads and names the rows to write; no socket is touched here and no fault happens here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl

from factmesh_sandbox.journal import Found, Journal, Row
from factmesh_sandbox.model import FieldType, Operation, RequestShape, SandboxFile, System, ValueRule
from factmesh_sandbox.template import render, resolve

JSON = "application/json"
PROBLEM = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request, read whole."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    raw: bytes

    def correlation_id(self) -> str | None:
        """The correlation id, under the names that callers commonly use."""
        return self.headers.get("x-correlation-id") or self.headers.get("correlation-id")

    def idempotency_key(self) -> str | None:
        """The key as sent; the quotes that the header's draft asks for are taken off."""
        key = self.headers.get("idempotency-key")
        if key and len(key) > 1 and key[0] == key[-1] == '"':
            return key[1:-1]
        return key or None

    def body_sha256(self) -> str:
        """The hash of the body's bytes as they came."""
        return sha256(self.raw).hexdigest()


@dataclass(frozen=True, slots=True)
class Answer:
    """What would be sent, if nothing goes wrong on the way."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = JSON
    replayed: bool = False
    rows: tuple[Row, ...] = ()

    def payload(self) -> bytes:
        """The body's bytes."""
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Matched:
    """A request with the operation that it means, and its values for the templates."""

    system: System
    operation: Operation
    scope: dict[str, Any]
    subject: str | None


def problem(status: int, title: str, detail: str, *, code: str | None = None, **headers: str) -> Answer:
    """An RFC 9457 problem."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    if code:
        body["code"] = code
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, body, headers=sent, content_type=PROBLEM)


class Systems:
    """The declared systems over one journal."""

    def __init__(self, file: SandboxFile, journal: Journal) -> None:
        self._journal = journal
        self._systems = {system.name: system for system in file.systems}
        self._routes: dict[str, list[tuple[str, re.Pattern[str], Operation]]] = {
            system.name: [(operation.method, operation.pattern(), operation) for operation in system.operations]
            for system in file.systems
        }
        self._indexed: dict[tuple[str, str], set[str]] = {}
        for system in file.systems:
            for operation in system.operations:
                if operation.lookup:
                    self._indexed.setdefault((system.name, operation.lookup.effect), set()).add(operation.lookup.by)
                if operation.requires:
                    self._indexed.setdefault((system.name, operation.requires.effect), set()).add("id")

    def system_of(self, path: str) -> System | None:
        """The system whose address space the path lies in."""
        return self._systems.get(path.lstrip("/").split("/", 1)[0])

    def match(self, system: System, request: Request) -> Matched | Answer:
        """The operation that the request means, or the refusal: 400, 401, 404, 405."""
        if system.auth and request.headers.get("authorization") != f"Bearer {system.auth.bearer}":
            return problem(401, "Unauthorized", f"{system.name} wants its bearer token", www_authenticate="Bearer")
        rest = request.path[len(system.name) + 1 :] or "/"
        allowed: list[str] = []
        for method, pattern, operation in self._routes[system.name]:
            found = pattern.match(rest)
            if found and method == request.method:
                return self._scope(system, operation, request, found.groupdict())
            if found:
                allowed.append(method)
        if allowed:
            return problem(405, "Method Not Allowed", f"{rest} knows {', '.join(allowed)}", allow=", ".join(allowed))
        return problem(404, "Not Found", f"{system.name} has no operation at {rest}")

    def _scope(self, system: System, operation: Operation, request: Request, path: dict[str, str]) -> Matched | Answer:
        body: Any = None
        if request.raw:
            try:
                body = json.loads(request.raw)
            except (ValueError, RecursionError):
                return problem(400, "Bad Request", "the body is no JSON", code="malformed")
        scope = {"body": body, "path": path, "query": dict(request.query), "headers": dict(request.headers)}
        subject = resolve(operation.subject, scope) if operation.subject else None
        if subject is None and operation.lookup:
            subject = resolve(operation.lookup.value, scope)
        return Matched(system, operation, scope, None if subject is None else str(subject) or None)

    def recorded(self, matched: Matched, request: Request, *, now_epoch_s: float) -> Answer | None:
        """The answer that is due to the idempotency key alone, or None when the work is to be done."""
        system, key = matched.system, request.idempotency_key()
        if system.idempotency != "honour" or matched.operation.effect is None:
            return None
        if key is None:
            if not system.key_required:
                return None
            return problem(400, "Bad Request", "this operation wants an Idempotency-Key", code="key_missing")
        known = self._journal.remembered(system.name, key)
        if known is None or (system.key_valid_s and now_epoch_s - known.at_epoch_s > system.key_valid_s):
            return None
        if known.request_sha256 != _fingerprint(request):
            return problem(
                422, "Unprocessable Content", f"Idempotency-Key {key} was used with another request", code="key_reused"
            )
        return Answer(known.status, known.response, headers={"idempotent-replayed": "true"}, replayed=True)

    def perform(self, matched: Matched, request: Request, *, call: int, at: str, now_epoch_s: float) -> Answer:
        """Do the operation's work: the answer, with the rows that make it true."""
        operation, scope = matched.operation, dict(matched.scope)
        errors = _shape_errors(operation.request, scope["body"])
        if errors:
            return problem(422, "Unprocessable Content", "; ".join(errors), code="validation")
        if operation.requires:
            parent = self._one(matched.system.name, operation.requires.effect, render(operation.requires.id, scope))
            if parent is None:
                return problem(404, "Not Found", f"there is no such {operation.requires.effect}", code="not_found")
            scope["parent"] = parent.scope()
        rule = _rule(operation.rules, scope)
        if rule and rule.refuse:
            return problem(rule.refuse.status, rule.refuse.title, rule.refuse.title, code=rule.refuse.code)
        scope["values"] = render(rule.values, scope) if rule else {}
        if operation.lookup:
            return self._look_up(matched, scope)
        return self._make(matched, request, scope, call=call, at=at, now_epoch_s=now_epoch_s)

    def _make(
        self, matched: Matched, request: Request, scope: dict[str, Any], *, call: int, at: str, now_epoch_s: float
    ) -> Answer:
        system, operation, kind = matched.system, matched.operation, str(matched.operation.effect)
        number, seq, key = self._journal.effect_number(system.name, kind), self._journal.effect_seq(), None
        scope["effect"] = {"number": number}
        effect_id = str(render(operation.effect_id, scope))
        scope["effect"] = {"number": number, "id": effect_id}
        subject = matched.subject if matched.subject is not None else resolve("parent.subject", scope)
        response = render(operation.response, scope)
        key = request.idempotency_key()
        body_text = json.dumps(scope["body"], ensure_ascii=False)
        effect = {
            "seq": seq, "at": at, "system": system.name, "kind": kind, "number": number, "effect_id": effect_id,
            "subject": subject, "idempotency_key": key, "body": body_text,
            "response": json.dumps(response, ensure_ascii=False), "call": call,
        }  # fmt: skip
        rows: list[Row] = [("add_effect", effect)]
        for name in sorted(self._indexed.get((system.name, kind), ())):
            value = effect_id if name == "id" else resolve(name, {**_mapping(scope["body"])})
            if value is not None:
                indexed = {"system": system.name, "kind": kind, "field": name, "value": str(value), "effect": seq}
                rows.append(("add_effect_field", indexed))
        if key is not None and system.idempotency == "honour":
            remembered = {
                "system": system.name, "key": key, "at_epoch_s": now_epoch_s, "status": operation.status,
                "request_sha256": _fingerprint(request), "response": json.dumps(response, ensure_ascii=False),
            }  # fmt: skip
            rows.append(("remember_key", remembered))
        return Answer(operation.status, response, rows=tuple(rows))

    def _look_up(self, matched: Matched, scope: dict[str, Any]) -> Answer:
        lookup, operation = matched.operation.lookup, matched.operation
        assert lookup is not None
        value = resolve(lookup.value, scope)
        if value is None:
            return problem(400, "Bad Request", f"the look-up wants {lookup.value}", code="value_missing")
        found = self._journal.find(matched.system.name, lookup.effect, lookup.by, str(value))
        if lookup.answer == "list":
            items = [item.response for item in found]
            response = (
                {"items": items}
                if operation.response is None
                else render(operation.response, {**scope, "items": items})
            )
            return Answer(operation.status, response)
        if not found:
            return problem(404, "Not Found", f"there is no {lookup.effect} with this {lookup.by}", code="not_found")
        scope["parent"] = found[0].scope()
        response = found[0].response if operation.response is None else render(operation.response, scope)
        return Answer(operation.status, response)

    def _one(self, system: str, kind: str, effect_id: str) -> Found | None:
        found = self._journal.find(system, kind, "id", str(effect_id))
        return found[0] if found else None


def read_query(query_string: bytes) -> dict[str, str]:
    """The query's parameters; of a repeated one, the last."""
    return dict(parse_qsl(query_string.decode("latin-1"), keep_blank_values=True))


def _fingerprint(request: Request) -> str:
    return sha256(b"\x00".join((request.method.encode(), request.path.encode(), request.raw))).hexdigest()


def _mapping(body: Any) -> Mapping[str, Any]:
    return body if isinstance(body, dict) else {}


def _rule(rules: tuple[ValueRule, ...], scope: Mapping[str, Any]) -> ValueRule | None:
    for rule in rules:
        if all(_holds(resolve(path, scope), wanted) for path, wanted in rule.when.items()):
            return rule
    return None


def _holds(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (list, tuple)) else bool(value == wanted)


_TYPES: dict[FieldType, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,), "object": (dict,),
    "array": (list,), "any": (object,),
}  # fmt: skip


def _shape_errors(shape: RequestShape, body: Any) -> list[str]:
    if not shape.required and not shape.optional:
        return []
    if not isinstance(body, dict):
        return ["the body must be a JSON object"]
    errors = [f"{name} is missing" for name in shape.required if body.get(name) is None]
    for name, kind in {**shape.optional, **shape.required}.items():
        value = body.get(name)
        if value is None:
            continue
        numeric_bool = isinstance(value, bool) and kind in ("number", "integer")
        if numeric_bool or not isinstance(value, _TYPES[kind]):
            errors.append(f"{name} must be of type {kind}")
        elif value == "" and name in shape.required:
            errors.append(f"{name} is empty")
    return errors
