"""Every way in which the HTTP entrance says no, as one table: RFC 9457 problem details and what the caller does next.
Pure. The `type` of a problem is the address of its page, which this table fills too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factmesh.errors import DecodeError, FactmeshError, SchemaError, StaleError, TransientError, ValidationError
from factmesh_intake import model

CONTENT_TYPE = "application/problem+json"
PATH = "/problems/"


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of refusal. `retry_after_s` where the same request may succeed later."""

    slug: str
    status: int
    title: str
    advice: str
    retry_after_s: int | None = None


TABLE: tuple[Problem, ...] = (
    Problem("unreadable", 400, "The bytes cannot be read", "Send well-formed CloudEvents 1.0: the detail says where."),
    Problem("invalid", 422, "A field is missing or wrong", "Correct the field that the detail names, send it again."),
    Problem(
        "naive-timestamp",
        422,
        "A timestamp without an offset",
        "Add Z or an offset like +01:00, or have the zone declared in the adapter of your source.",
    ),
    Problem(
        "unmapped-value",
        422,
        "A value that no table translates",
        "Send a value that the adapter's table holds, or have it added there. Nothing is guessed.",
    ),
    Problem("future", 422, "The fact lies in the future", "Check the sender's clock, its zone and the unit."),
    Problem(
        "stale",
        422,
        "The fact is too old to be proved new",
        "Ids are remembered for the dedup horizon. Publish it to the topic facts.raw: there it is quarantined, and an"
        " operator who knows that it is new accepts it with `factmesh dlq replay`.",
    ),
    Problem("unknown-schema", 422, "A schema version that is not accepted", "Name a version that the detail lists."),
    Problem("unknown-type", 422, "A type of fact that nobody takes", "Correct the type, or have an adapter added."),
    Problem(
        "source-not-allowed", 403, "This source may not send this type", "Correct the source, or have an adapter added."
    ),
    Problem(
        "too-large", 413, "Too many bytes", "Send a reference to a document instead of the document; split batches."
    ),
    Problem("too-slow", 408, "The body did not come in time", "Nothing was accepted. Send it again, in one go."),
    Problem(
        "unsupported-media-type",
        415,
        "A content type that is not spoken here",
        "Send application/json, application/avro (Confluent wire format), application/cloudevents+json or"
        " application/cloudevents-batch+json; the body as it is, without a Content-Encoding.",
    ),
    Problem(
        "not-seen",
        404,
        "No fact is known under this correlation id",
        "A fact that was acknowledged a moment ago appears within seconds: ask again. Otherwise correct the id.",
        retry_after_s=2,
    ),
    Problem("not-found", 404, "There is no such resource", "See the README of the intake service for its addresses."),
    Problem("not-allowed", 405, "That method is not for this address", "See the README of the intake service."),
    Problem("busy", 503, "Too much is in flight", "Nothing was accepted. Send it again after Retry-After.", 1),
    Problem(
        "unavailable",
        503,
        "The fact could not be made durable",
        "It may or may not have been written: send it again under the same id, repeats are dropped.",
        5,
    ),
    Problem("error", 500, "An error of ours", "It is in the log of the service. Send it again under the same id."),
)
BY_SLUG: Mapping[str, Problem] = {p.slug: p for p in TABLE}

#: The most particular class first.
_OF_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (model.TooLargeError, "too-large"),
    (model.TooSlowError, "too-slow"),
    (model.UnsupportedMediaError, "unsupported-media-type"),
    (model.NaiveTimeError, "naive-timestamp"),
    (model.UnmappedError, "unmapped-value"),
    (model.FutureError, "future"),
    (model.UnknownTypeError, "unknown-type"),
    (model.SourceRefusedError, "source-not-allowed"),
    (StaleError, "stale"),
    (SchemaError, "unknown-schema"),
    (DecodeError, "unreadable"),
    (ValidationError, "invalid"),
    (TransientError, "unavailable"),
)


def of_error(error: BaseException) -> Problem:
    """The row for an exception; `error` for what is not ours."""
    for kind, slug in _OF_CLASS:
        if isinstance(error, kind):
            if slug == "invalid" and _is_naive(error):
                slug = "naive-timestamp"
            return BY_SLUG[slug]
    return BY_SLUG["error"]


def _is_naive(error: BaseException) -> bool:
    """The schema's own check of JSON has no class for it; its text is that module's contract with its tests."""
    return isinstance(error, FactmeshError) and "no offset from UTC" in error.message


def document(problem: Problem, base_url: str, error: BaseException | None = None, **members: Any) -> dict[str, Any]:
    """The problem as RFC 9457 says. A bug's text stays inside: it may quote the payload."""
    body: dict[str, Any] = {
        "type": f"{base_url.rstrip('/')}{PATH}{problem.slug}",
        "title": problem.title,
        "status": problem.status,
    }
    if isinstance(error, FactmeshError):
        body["detail"] = f"{error.message} ({error.hint})" if error.hint else error.message
        body["reason"] = str(error.reason)
        if isinstance(error, model.FieldError):
            body["field"] = error.field
        if error.where:
            body["where"] = error.where
    else:
        body["detail"] = problem.advice
    body.update({k: v for k, v in members.items() if v is not None})
    return body


def page(problem: Problem) -> str:
    """What stands at the address of a problem's type."""
    retry = f"\nThe same request may succeed after {problem.retry_after_s} s.\n" if problem.retry_after_s else ""
    return f"{problem.title} (HTTP {problem.status})\n\n{problem.advice}\n{retry}\nRunbook: services/intake/README.md\n"
