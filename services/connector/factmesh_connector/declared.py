"""A connector in YAML, as typed models: what an author may write, and an error that names file and line otherwise.
Pure: nothing is resolved, compiled or called here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from factmesh.document import Document, Json
from factmesh.errors import DefinitionError, ErrorClass
from factmesh.retry import RetryPolicy
from factmesh_connector.model import OUTPUT_BYTES_MAX, Operation, Strategy

Name = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,62}$")]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$", max_length=100)]
#: `404`, or `5xx` for a whole hundred.
StatusPattern = Annotated[str, StringConstraints(pattern=r"^[1-5]([0-9][0-9]|xx)$")]
#: A class that an error table may give. `bug` is ours alone.
TableClass = Literal["transient", "throttled", "validation", "permission", "conflict", "not_found", "ambiguous"]


class Strict(BaseModel):
    """Unknown words are errors: a typing mistake never switches a timeout or a strategy off in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True)


class Auth(Strict):
    """How a call shows who it is, by secret reference only."""

    bearer: str | None = Field(None, description="a secret reference; sent as `Authorization: Bearer …`")
    header: HeaderName | None = Field(None, description="the header of an API key, with `secret`")
    secret: str | None = Field(None, description="a secret reference; the value of `header`")

    @model_validator(mode="after")
    def _one_way(self) -> Auth:
        if (self.bearer is None) == (self.header is None) or (self.header is None) != (self.secret is None):
            raise ValueError("give either `bearer`, or `header` together with `secret`")
        return self

    @property
    def reference(self) -> str:
        return self.bearer or self.secret or ""


class BodyRule(Strict):
    """A class chosen by what the answer says; a condition that cannot be evaluated does not hold."""

    when: str
    class_: TableClass = Field(alias="class")


class Errors(Strict):
    """The error table: body rules first, then exact statuses, then hundreds, then the connector's, then the default."""

    statuses: dict[StatusPattern, TableClass] = Field(default_factory=dict)
    bodies: tuple[BodyRule, ...] = ()

    @field_validator("statuses", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


class RequestShape(Strict):
    """One HTTP request. Each `${ }` is CEL over `input` and `command`; in the path its value is escaped."""

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str = Field(pattern=r"^/")
    query: dict[str, Json] = Field(default_factory=dict, description="a null value leaves the parameter out")
    headers: dict[HeaderName, str] = Field(default_factory=dict)
    body: Json = Field(None, description="the JSON body; absent sends none")


class ResponseShape(Strict):
    """What is kept of a successful answer: CEL over `response.status`, `.headers`, `.body`, and `input`, `command`."""

    output: dict[Name, Json] = Field(default_factory=dict)
    translate: dict[Name, Name] = Field(default_factory=dict, description="output field -> table of `translations`")

    @model_validator(mode="after")
    def _translated_fields_exist(self) -> ResponseShape:
        for name in self.translate:
            if name not in self.output:
                raise ValueError(f"`translate` names {name!r}, which `output` does not have")
        return self


class KeyStrategy(Strict):
    """The downstream honours an idempotency key."""

    strategy: Literal["key"]
    header: HeaderName = "Idempotency-Key"
    key_valid_s: float = Field(gt=0, le=400 * 86400, description="how long the downstream remembers a key")


class LookupStrategy(Strict):
    """It is asked whether an earlier call worked, before any repeat."""

    strategy: Literal["lookup"]
    operation: Name | None = Field(None, description="ask with this operation's request")
    request: RequestShape | None = Field(None, description="or with this one")
    found: str = Field(description="`${ }` over `response`: whether the effect is there; a 404 is a no as well")
    output: dict[Name, Json] | None = Field(None, description="the operation's output from this answer; default: as is")
    timeout_s: float = Field(default=10.0, gt=0, le=300)

    @model_validator(mode="after")
    def _one_question(self) -> LookupStrategy:
        if (self.operation is None) == (self.request is None):
            raise ValueError("give either `operation` or `request` to ask with")
        return self


class NoStrategy(Strict):
    """A repeat is not safe: what may have worked is never repeated, a person looks."""

    strategy: Literal["none"]


class OperationShape(Strict):
    """One operation."""

    description: str = ""
    request: RequestShape
    response: ResponseShape = ResponseShape()
    idempotency: KeyStrategy | LookupStrategy | NoStrategy = Field(discriminator="strategy")
    timeout_s: float | None = Field(None, gt=0, le=300)
    in_flight_max_s: float = Field(
        default=60.0, ge=0, le=86400, description="how long after we let go a call may still be carried out"
    )
    retry: RetryPolicy = RetryPolicy()
    errors: Errors = Errors()
    sensitive: bool = False
    output_bytes_max: int = Field(default=OUTPUT_BYTES_MAX, ge=2, le=OUTPUT_BYTES_MAX)

    @model_validator(mode="after")
    def _answers_agree(self) -> OperationShape:
        lookup = self.idempotency
        if isinstance(lookup, LookupStrategy) and lookup.output is not None:
            missing = sorted(set(self.response.output) ^ set(lookup.output))
            if missing:
                raise ValueError(f"the look-up's output and the response's must have the same fields: {missing}")
        return self


class ConnectorShape(Strict):
    """A whole connector file; its name is the file's, and the `x` of `call: x.operation`."""

    connector: Name
    description: str = ""
    base_url: str = Field(min_length=1, description="http(s)://…, or ref+env://NAME where it differs by environment")
    auth: Auth | None = None
    timeout_s: float = Field(default=10.0, gt=0, le=300)
    headers: dict[HeaderName, str] = Field(default_factory=dict, description="constants for every request")
    errors: Errors = Errors()
    translations: dict[Name, dict[str, Json]] = Field(
        default_factory=dict, description="tables of the downstream's words to ours; an unmapped word is an error"
    )
    operations: dict[Name, OperationShape] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_exist(self) -> ConnectorShape:
        for name, operation in self.operations.items():
            for field, table in operation.response.translate.items():
                if table not in self.translations:
                    raise ValueError(f"operation {name!r} translates {field!r} by {table!r}, which is no table here")
            lookup = operation.idempotency
            if isinstance(lookup, LookupStrategy) and lookup.operation and lookup.operation not in self.operations:
                raise ValueError(f"operation {name!r} looks up by {lookup.operation!r}, which is no operation here")
        return self

    def operation(self, name: str) -> Operation:
        """What decides about an operation's attempts."""
        shape = self.operations[name]
        strategy = shape.idempotency
        timeout_s = shape.timeout_s or self.timeout_s
        return Operation(
            name=name,
            strategy=Strategy(strategy.strategy),
            timeout_s=timeout_s,
            lookup_timeout_s=strategy.timeout_s if isinstance(strategy, LookupStrategy) else timeout_s,
            retry=shape.retry,
            in_flight_max_s=shape.in_flight_max_s,
            key_valid_s=strategy.key_valid_s if isinstance(strategy, KeyStrategy) else 0.0,
            sensitive=shape.sensitive,
            output_bytes_max=shape.output_bytes_max,
            output_fields=tuple(shape.response.output),
        )

    def lookup_request(self, name: str) -> RequestShape | None:
        """What an operation of strategy `lookup` asks with."""
        lookup = self.operations[name].idempotency
        if not isinstance(lookup, LookupStrategy):
            return None
        return lookup.request or self.operations[lookup.operation or ""].request


#: What a status means where no table says otherwise. Every other 4xx is `validation`. Every other status says nothing
#: certain: a 500 may come after the work, a 303 usually does. A downstream that promises more says so in its table.
DEFAULT_STATUSES: dict[str, ErrorClass] = {
    "401": ErrorClass.PERMISSION,
    "403": ErrorClass.PERMISSION,
    "404": ErrorClass.NOT_FOUND,
    "407": ErrorClass.PERMISSION,
    "408": ErrorClass.TRANSIENT,
    "409": ErrorClass.CONFLICT,
    "410": ErrorClass.NOT_FOUND,
    "412": ErrorClass.CONFLICT,
    "421": ErrorClass.TRANSIENT,
    "425": ErrorClass.TRANSIENT,
    "429": ErrorClass.THROTTLED,
    "4xx": ErrorClass.VALIDATION,
    "501": ErrorClass.VALIDATION,
    "503": ErrorClass.TRANSIENT,
    "505": ErrorClass.VALIDATION,
}


def class_of_status(status: int, *tables: Errors) -> ErrorClass:
    """The class of a status that is no success: by the first table that names it, then by the default."""
    exact, hundred = str(status), f"{status // 100}xx"
    for table in tables:
        named = table.statuses.get(exact) or table.statuses.get(hundred)
        if named is not None:
            return ErrorClass(named)
    return DEFAULT_STATUSES.get(exact) or DEFAULT_STATUSES.get(hundred) or ErrorClass.AMBIGUOUS


def parse(document: Document, *, stem: str) -> ConnectorShape:
    """The model of one file. Raises DefinitionError with every problem, each with its line."""
    if not isinstance(document.data, dict):
        raise DefinitionError(
            "a connector file is a mapping", where=document.file, hint="begin it with `connector: name`"
        )
    try:
        shape = ConnectorShape.model_validate(document.data)
    except pydantic.ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            path = tuple(part for part in item["loc"] if part not in ("key", "lookup", "none", "[key]"))
            problems.append(f"{document.where(path)}: {item['msg'].removeprefix('Value error, ')}")
        raise DefinitionError("; ".join(problems), hint="see services/connector/README.md") from None
    if shape.connector != stem:
        raise DefinitionError(
            f"the connector is called {shape.connector!r}, the file {stem!r}",
            where=document.where(("connector",)),
            hint="give both the same name",
        )
    return shape
