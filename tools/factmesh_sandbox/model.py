"""What a sandbox file may say: systems, operations, faults, mail and webhooks, as frozen typed models.
Pure: no file, no socket, no clock is touched here; the names of the systems come from the file, never from this code.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from factmesh_sandbox.template import check_path, check_template
from factmesh_sandbox.webhooks import secret_key

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
FieldType = Literal["string", "number", "integer", "boolean", "object", "array", "any"]

#: Faults of HTTP calls that strike before the work: no effect exists.
BEFORE_WORK = ("throttled", "server_error", "unavailable", "reset_before", "hang")
#: Faults of HTTP calls that strike after the work: the effect exists and is logged.
AFTER_WORK = ("reset_after", "no_answer", "malformed", "partial")
#: Faults of mail, decided for each recipient.
MAIL_FAULTS = ("reject_temporary", "reject_permanent", "drop_before", "drop_after", "slow")

FaultKind = Literal[
    "throttled", "server_error", "unavailable", "reset_before", "hang",
    "reset_after", "no_answer", "malformed", "partial", "slow",
    "reject_temporary", "reject_permanent", "drop_before", "drop_after",
]  # fmt: skip


class Strict(BaseModel):
    """Unknown words are errors, so that a typing mistake never switches a fault off in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class FaultRule(Strict):
    """One fault and whom it hits. At most one of `share`, `probability` and `subjects`; none of them: everybody.

    `share` takes a slice of all subjects by hash, the slices of a system's rules lie side by side, so no subject is
    hit by two shares. `attempts: N` limits the rule to a subject's first N attempts at each operation.
    """

    fault: FaultKind
    share: float | None = Field(default=None, gt=0, le=1)
    probability: float | None = Field(default=None, gt=0, le=1)
    subjects: tuple[str, ...] = ()
    attempts: int | None = Field(default=None, ge=1)
    operations: tuple[str, ...] = ()
    retry_after_s: int | None = Field(default=None, ge=0, le=86_400)
    retry_after_form: Literal["seconds", "http_date"] = "seconds"
    delay_s: float = Field(default=1.0, ge=0, le=600, description="slow: the wait before the work")
    hold_s: float = Field(default=300.0, gt=0, le=3600, description="hang, no_answer: a reset ends the wait")

    @model_validator(mode="after")
    def _one_selector(self) -> FaultRule:
        if sum((self.share is not None, self.probability is not None, bool(self.subjects))) > 1:
            raise ValueError("give at most one of share, probability and subjects")
        return self


def check_rules(rules: tuple[FaultRule, ...], operations: frozenset[str], allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the shares fit side by side and each rule can strike what it names."""
    total = sum(rule.share or 0.0 for rule in rules)
    if total > 1.0 + 1e-9:
        raise ValueError(f"the shares add up to {total:g}; together they may take at most 1")
    for rule in rules:
        if rule.fault not in allowed:
            raise ValueError(f"fault {rule.fault!r} cannot strike here; possible: {', '.join(allowed)}")
        unknown = sorted(set(rule.operations) - operations)
        if unknown:
            raise ValueError(f"fault {rule.fault!r} names operations that do not exist: {', '.join(unknown)}")


HTTP_FAULTS = (*BEFORE_WORK, *AFTER_WORK, "slow")


class Refusal(Strict):
    """An answer of the system's own rules: the request was understood and is refused; nothing is done."""

    status: int = Field(default=422, ge=400, le=499)
    title: str
    code: str | None = None


class ValueRule(Strict):
    """Values for the templates, chosen by the request; the first rule whose `when` holds is taken."""

    when: dict[str, Any] = Field(default_factory=dict)
    values: dict[str, Any] = Field(default_factory=dict)
    refuse: Refusal | None = None

    @field_validator("when")
    @classmethod
    def _paths(cls, when: dict[str, Any]) -> dict[str, Any]:
        for path in when:
            check_path(path)
        return when


class RequestShape(Strict):
    """The fields that a request body must and may have; others are let through."""

    required: dict[str, FieldType] = Field(default_factory=dict)
    optional: dict[str, FieldType] = Field(default_factory=dict)


class Requires(Strict):
    """An earlier effect that must exist, else 404; it is `parent` in the templates."""

    effect: Name
    id: str

    _templates = field_validator("id")(check_template)


class Lookup(Strict):
    """A question about earlier effects: `by` is a field of the request that made them, or `id`."""

    effect: Name
    by: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")
    value: str = Field(description="a path such as query.external_id or path.id")
    answer: Literal["list", "one"] = "list"

    _value = field_validator("value")(check_path)


class Operation(Strict):
    """One method and path of a system: it makes an effect, or it looks earlier effects up."""

    name: Name
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str = Field(pattern=r"^/[A-Za-z0-9_\-./{}]*$")
    subject: str | None = None
    request: RequestShape = RequestShape()
    rules: tuple[ValueRule, ...] = ()
    requires: Requires | None = None
    effect: Name | None = None
    effect_id: str = "{effect.number}"
    lookup: Lookup | None = None
    status: int = Field(default=200, ge=200, le=299)
    response: Any = None

    _templates = field_validator("effect_id", "response")(check_template)

    @field_validator("subject")
    @classmethod
    def _subject(cls, path: str | None) -> str | None:
        return path if path is None else check_path(path)

    @model_validator(mode="after")
    def _one_meaning(self) -> Operation:
        if (self.effect is None) == (self.lookup is None):
            raise ValueError(f"operation {self.name!r} needs either `effect` or `lookup`")
        return self

    def pattern(self) -> re.Pattern[str]:
        """The path as an expression whose groups are the template's names."""
        parts = re.split(r"\{([a-z_][a-z0-9_]*)\}", self.path)
        text = "".join(f"(?P<{part}>[^/]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
        return re.compile(f"^{text}$")


class Auth(Strict):
    """The bearer token that a caller must show, else 401. A sandbox token, never one of a real system."""

    bearer: str = Field(min_length=1)


class System(Strict):
    """One external system, served under `/NAME`: `honour` keeps idempotency keys, `naive` never looks at them."""

    name: Name
    auth: Auth | None = None
    idempotency: Literal["honour", "naive"] = "naive"
    key_required: bool = False
    key_valid_s: int | None = Field(default=None, ge=1)
    concurrent: Literal["conflict", "wait"] = "conflict"
    operations: tuple[Operation, ...] = Field(min_length=1)
    faults: tuple[FaultRule, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> System:
        names = [operation.name for operation in self.operations]
        routes = [(operation.method, operation.path) for operation in self.operations]
        for what, values in (("operation names", names), ("method and path", routes)):
            if len(set(values)) != len(values):
                raise ValueError(f"system {self.name!r}: {what} must differ")
        kinds = {operation.effect for operation in self.operations}
        for operation in self.operations:
            wanted = [part.effect for part in (operation.lookup, operation.requires) if part is not None]
            for kind in wanted:
                if kind not in kinds:
                    raise ValueError(f"operation {operation.name!r} asks for effect {kind!r}, which nothing here makes")
        check_rules(self.faults, frozenset(names), HTTP_FAULTS)
        return self


class Webhook(Strict):
    """A receiver of signed webhooks (Standard Webhooks) under `/NAME`; the secret has the form `whsec_BASE64`."""

    name: Name
    secret: str = Field(pattern=r"^whsec_[A-Za-z0-9+/=_-]+$")
    tolerance_s: int = Field(default=300, ge=1)
    faults: tuple[FaultRule, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Webhook:
        secret_key(self.secret)
        check_rules(self.faults, frozenset({"receive"}), HTTP_FAULTS)
        return self


class Mail(Strict):
    """The mail server; its faults are decided for each recipient's address."""

    name: Name = "mail"
    size_bytes_max: int = Field(default=1_000_000, ge=1024)
    faults: tuple[FaultRule, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Mail:
        check_rules(self.faults, frozenset({"send"}), MAIL_FAULTS)
        return self


class SandboxFile(Strict):
    """A whole sandbox file."""

    sandbox: Literal[1] = Field(description="the version of this file format")
    seed: int = 0
    systems: tuple[System, ...] = ()
    webhooks: tuple[Webhook, ...] = ()
    mail: Mail = Mail()

    @model_validator(mode="after")
    def _names_differ(self) -> SandboxFile:
        names = [part.name for part in self._parts()]
        if len(set(names)) != len(names):
            raise ValueError("the names of systems, webhooks and mail must differ: they share one address space")
        return self

    def rules_of(self, name: str) -> tuple[FaultRule, ...]:
        """The fault rules that the file gives to a system, a webhook receiver or the mail server."""
        return self._part(name).faults

    def check_rules_for(self, name: str, rules: tuple[FaultRule, ...]) -> None:
        """Raise ValueError unless these rules could stand in the file at that name; KeyError for an unknown name."""
        part = self._part(name)
        if isinstance(part, System):
            check_rules(rules, frozenset(operation.name for operation in part.operations), HTTP_FAULTS)
        elif isinstance(part, Webhook):
            check_rules(rules, frozenset({"receive"}), HTTP_FAULTS)
        else:
            check_rules(rules, frozenset({"send"}), MAIL_FAULTS)

    def names(self) -> tuple[str, ...]:
        """All names that fault rules can be given to."""
        return tuple(part.name for part in self._parts())

    def _parts(self) -> list[System | Webhook | Mail]:
        return [*self.systems, *self.webhooks, self.mail]

    def _part(self, name: str) -> System | Webhook | Mail:
        for part in self._parts():
            if part.name == name:
                return part
        raise KeyError(name)
