"""The connector that a YAML file declares: mappings compiled once, one HTTP exchange a call, the answer classified.
One implementation of `protocol.Connector`; whether and when to call again is never decided here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from factmesh.clock import Clock
from factmesh.document import Document, Json
from factmesh.errors import DefinitionError, ErrorClass, ExpressionError, FactmeshError, ValidationError
from factmesh.evaluation import Expressions, Program, Template, compile_template, expression_in
from factmesh.http_client import HttpClient, Request, Response, retry_after_s
from factmesh.secrets import Secret, resolve, resolve_text
from factmesh_connector.declared import (
    ConnectorShape,
    Errors,
    KeyStrategy,
    LookupStrategy,
    OperationShape,
    RequestShape,
    class_of_status,
)
from factmesh_connector.model import Operation, Strategy
from factmesh_connector.protocol import CallContext, CallFailed

_REQUEST_NAMES = frozenset({"input", "command"})
_RESPONSE_NAMES = frozenset({"input", "command", "response"})
_PLACE = re.compile(r"\$\{([^{}]*)\}")
KEY_HEADER = "Idempotency-Key"
CORRELATION_HEADER = "X-Correlation-Id"
REQUEST_BYTES_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class _Question:
    """A request, compiled: the path's pieces are texts and programs in turn."""

    method: str
    path: tuple[str | Program, ...]
    query: Mapping[str, Template]
    headers: Mapping[str, Template]
    body: Template | None


@dataclass(frozen=True, slots=True)
class _Compiled:
    """One operation, compiled."""

    declared: Operation
    request: _Question
    output: Template
    translate: Mapping[str, Mapping[str, Json]]
    key_header: str
    tables: tuple[Errors, ...]
    rules: tuple[tuple[Program, ErrorClass], ...]
    lookup: _Question | None
    found: Program | None
    lookup_output: Template


class YamlConnector:
    """Made by `build`; holds the resolved address and secret, and shows neither."""

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: Mapping[str, str],
        auth: tuple[str, Secret] | None,
        operations: Mapping[str, _Compiled],
        http: HttpClient,
        clock: Clock,
        expressions: Expressions,
    ) -> None:
        self._name = name
        self._base_url = base_url.rstrip("/")
        self._headers = headers
        self._auth = auth
        self._compiled = operations
        self._operations = {name: compiled.declared for name, compiled in operations.items()}
        self._http = http
        self._clock = clock
        self._expressions = expressions

    @property
    def name(self) -> str:
        return self._name

    @property
    def operations(self) -> Mapping[str, Operation]:
        return self._operations

    def __repr__(self) -> str:
        return f"YamlConnector({self._name})"

    async def close(self) -> None:
        """The connections are shared by all connectors and closed by who made them."""

    async def call(self, operation: str, input: Mapping[str, Any], ctx: CallContext) -> Mapping[str, Any]:
        """As `Connector.call`."""
        compiled = self._compiled[operation]
        declared = compiled.declared
        request = self._request(compiled, compiled.request, input, ctx)
        answer = await self._http.send(
            request,
            timeout_s=declared.timeout_s,
            before_first_byte=ctx.before_first_byte,
            fresh=declared.strategy is Strategy.NONE,
        )
        values = self._read(compiled, answer, input, ctx)
        try:
            return self._mapped(compiled, compiled.output, values)
        except FactmeshError as error:
            # The answer says that it worked, and what it answered cannot be used: that is no failure of the call.
            raise CallFailed(
                f"{self._name}.{operation} answered {answer.status}, and its answer cannot be mapped: {error}",
                ErrorClass.AMBIGUOUS,
                hint="correct the response mapping, or resolve with the output",
            ) from None

    async def look_up(
        self, operation: str, input: Mapping[str, Any], ctx: CallContext
    ) -> Mapping[str, Any] | None:
        """As `Connector.look_up`."""
        compiled = self._compiled[operation]
        if compiled.lookup is None or compiled.found is None:
            raise ValidationError(f"{self._name}.{operation} declares no look-up")
        request = self._request(compiled, compiled.lookup, input, ctx)
        answer = await self._http.send(
            request, timeout_s=compiled.declared.lookup_timeout_s, before_first_byte=ctx.before_first_byte
        )
        try:
            values = self._read(compiled, answer, input, ctx)
            found = compiled.found.evaluate(values)
            if not isinstance(found, bool):
                raise ExpressionError("`found` is not a bool", hint="write a comparison")
        except CallFailed as error:
            if error.error_class is ErrorClass.NOT_FOUND:
                return None
            raise
        return self._mapped(compiled, compiled.lookup_output, values) if found else None

    # --- out ---------------------------------------------------------------------------------------------------------

    def _request(
        self, compiled: _Compiled, question: _Question, input: Mapping[str, Any], ctx: CallContext
    ) -> Request:
        """The request; nothing was sent when this raises, so the class of its errors stands as it is."""
        values = self._expressions.scope({"input": dict(input), "command": dict(ctx.command)})
        headers = {name: _text(t.evaluate(values), f"header {name}") for name, t in question.headers.items()}
        headers = {"Accept": "application/json", "User-Agent": "factmesh-connector", **self._headers, **headers}
        headers[compiled.key_header] = ctx.idempotency_key
        headers[CORRELATION_HEADER] = ctx.correlation_id
        if ctx.traceparent:
            headers["traceparent"] = ctx.traceparent
        body = None
        if question.body is not None:
            body = json.dumps(question.body.evaluate(values), separators=(",", ":"), ensure_ascii=False).encode()
            if len(body) > REQUEST_BYTES_MAX:
                raise ValidationError(f"the request body has {len(body)} bytes, at most {REQUEST_BYTES_MAX} are sent")
            headers["Content-Type"] = "application/json"
        if self._auth is not None:
            headers[self._auth[0]] = self._auth[1].reveal()
        query = []
        for name, template in question.query.items():
            value = template.evaluate(values)
            for item in value if isinstance(value, list) else [value]:
                if item is not None:
                    query.append((name, _text(item, f"query parameter {name}")))
        url = self._base_url + "".join(p if isinstance(p, str) else _segment(p, values) for p in question.path)
        return Request(question.method, url, headers, tuple(query), body)

    # --- in ----------------------------------------------------------------------------------------------------------

    def _read(
        self, compiled: _Compiled, answer: Response, input: Mapping[str, Any], ctx: CallContext
    ) -> Mapping[str, Json]:
        """The values of a successful answer, for the mappings. Raises CallFailed with the class of any other."""
        success = 200 <= answer.status < 300
        what = f"{self._name}.{compiled.declared.name} answered {answer.status}"
        try:
            body = _body(answer)
        except ValueError:
            if success:
                raise CallFailed(f"{what} with a body that is not JSON", ErrorClass.AMBIGUOUS) from None
            body = None
        response = {"status": answer.status, "headers": dict(answer.headers), "body": body}
        values = self._expressions.scope({"input": dict(input), "command": dict(ctx.command), "response": response})
        error_class: ErrorClass | None = None
        for program, named in compiled.rules:
            if _holds(program, values):
                error_class = named
                break
        if error_class is None:
            if success:
                return values
            error_class = class_of_status(answer.status, *compiled.tables)
        wait_s = retry_after_s(answer.headers.get("retry-after"), self._clock.now())
        raise CallFailed(what, error_class, retry_after_s=wait_s)

    def _mapped(self, compiled: _Compiled, template: Template, values: Mapping[str, Json]) -> Mapping[str, Any]:
        """The output: mapped, its words translated, and capped."""
        output: dict[str, Any] = template.evaluate(values)
        for name, table in compiled.translate.items():
            word = output[name]
            if not isinstance(word, str) or word not in table:
                raise ValidationError(
                    f"field {name!r} holds a word that its translation table does not have",
                    hint="add it to `translations`",
                )
            output[name] = table[word]
        size = len(json.dumps(output, separators=(",", ":"), ensure_ascii=False).encode())
        if size > compiled.declared.output_bytes_max:
            raise ValidationError(f"the output has {size} bytes, at most {compiled.declared.output_bytes_max} are kept")
        return output


def _holds(program: Program, values: Mapping[str, Json]) -> bool:
    """Whether a rule's condition is true; over an answer of another shape it is not."""
    try:
        return program.evaluate(values) is True
    except ExpressionError:
        return False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _body(answer: Response) -> Json:
    """The body as JSON, as text where the answer says that it is something else, None where it is empty."""
    if not answer.body:
        return None
    kind = answer.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        return answer.body.decode(errors="replace")
    try:
        return json.loads(answer.body, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _text(value: Json, what: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ValidationError(f"{what} is not a text or number", hint="correct the request mapping")
    text = str(value)
    if any(ord(c) < 32 for c in text):
        raise ValidationError(f"{what} has a control character", hint="correct the input, then replay")
    return text


def _segment(program: Program, values: Mapping[str, Json]) -> str:
    """One value in a path, escaped whole: data cannot leave its segment, nor vanish from it."""
    text = _text(program.evaluate(values), "a value in the path")
    if text in ("", ".", ".."):
        raise ValidationError("a value in the path is empty or dots", hint="correct the input, then replay")
    return quote(text, safe="")


# --- building --------------------------------------------------------------------------------------------------------


def build(
    shape: ConnectorShape,
    document: Document,
    *,
    http: HttpClient,
    clock: Clock,
    expressions: Expressions,
    environ: Mapping[str, str] | None = None,
) -> YamlConnector:
    """Resolve the references and compile the mappings of one file. Raises SettingsError or DefinitionError."""
    base_url = resolve_text(shape.base_url, environ=environ, where=document.where(("base_url",)))
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise DefinitionError(
            "base_url is not an http(s) address without query", where=document.where(("base_url",)), hint="correct it"
        )
    auth: tuple[str, Secret] | None = None
    if shape.auth is not None:
        secret = resolve(shape.auth.reference, environ=environ, where=document.where(("auth",)))
        if shape.auth.bearer is not None:
            auth = ("Authorization", Secret(f"Bearer {secret.reveal()}", secret.reference))
        else:
            auth = (shape.auth.header or "", secret)
    compiler = _Compiler(shape, document, expressions)
    operations = {name: compiler.operation(name, operation) for name, operation in shape.operations.items()}
    return YamlConnector(shape.connector, base_url, shape.headers, auth, operations, http, clock, expressions)


class _Compiler:
    """Compiles the expressions of one file; an error names the line."""

    def __init__(self, shape: ConnectorShape, document: Document, expressions: Expressions) -> None:
        self.shape = shape
        self.document = document
        self.expressions = expressions

    def operation(self, name: str, shape: OperationShape) -> _Compiled:
        at: tuple[str | int, ...] = ("operations", name)
        tables = (shape.errors, self.shape.errors)
        strategy = shape.idempotency
        asked = self.shape.lookup_request(name)
        lookup = strategy if isinstance(strategy, LookupStrategy) else None
        output: Json = shape.response.output
        lookup_output: Json = lookup.output if lookup is not None and lookup.output is not None else output
        rules = [
            (self.program(rule.when, _RESPONSE_NAMES, at), ErrorClass(rule.class_))
            for table in tables
            for rule in table.bodies
        ]
        return _Compiled(
            declared=self.shape.operation(name),
            request=self.request(shape.request, (*at, "request")),
            output=self.template(output, _RESPONSE_NAMES, (*at, "response", "output")),
            translate={field: self.shape.translations[t] for field, t in shape.response.translate.items()},
            key_header=strategy.header if isinstance(strategy, KeyStrategy) else KEY_HEADER,
            tables=tables,
            rules=tuple(rules),
            lookup=None if asked is None else self.request(asked, (*at, "idempotency")),
            found=None if lookup is None else self.program(lookup.found, _RESPONSE_NAMES, (*at, "idempotency")),
            lookup_output=self.template(lookup_output, _RESPONSE_NAMES, (*at, "idempotency")),
        )

    def request(self, shape: RequestShape, at: tuple[str | int, ...]) -> _Question:
        def templates(values: Mapping[str, Json], where: str) -> dict[str, Template]:
            return {k: self.template(v, _REQUEST_NAMES, (*at, where, k)) for k, v in values.items()}

        body = None if shape.body is None else self.template(shape.body, _REQUEST_NAMES, (*at, "body"))
        return _Question(
            shape.method, self.path(shape.path, at), templates(shape.query, "query"),
            templates(shape.headers, "headers"), body,
        )  # fmt: skip

    def path(self, text: str, at: tuple[str | int, ...]) -> tuple[str | Program, ...]:
        pieces = _PLACE.split(text)
        if any("$" in piece or "{" in piece or "?" in piece for piece in pieces[::2]):
            raise DefinitionError(
                "the path holds a `$`, `{` or `?` outside of `${ }`",
                where=self.document.where((*at, "path")),
                hint="write /things/${ input.id }; parameters go into `query`",
            )
        return tuple(
            self.program(f"${{{piece}}}", _REQUEST_NAMES, (*at, "path")) if index % 2 else piece
            for index, piece in enumerate(pieces)
        )

    def program(self, text: str, names: frozenset[str], at: tuple[str | int, ...]) -> Program:
        try:
            return self.expressions.compile(expression_in(text) or text, names)
        except ExpressionError as error:
            raise self.wrong(error, at) from None

    def template(self, node: Json, names: frozenset[str], at: tuple[str | int, ...]) -> Template:
        try:
            return compile_template(node, self.expressions, names)
        except ExpressionError as error:
            raise self.wrong(error, at) from None

    def wrong(self, error: ExpressionError, at: tuple[str | int, ...]) -> DefinitionError:
        return DefinitionError(str(error), where=self.document.where(at), hint="correct the expression")
