"""Logs and traces: structlog JSON with the ids that matter, OpenTelemetry spans by the messaging conventions.
The only importer of opentelemetry; no payload and no secret passes through here.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sys
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from factmesh.dlq import describe

_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_SAMPLED = frozenset("13579bdf")
"""The last digit of flags that say: sampled."""
EXPORT_DELAY_MS = 500
_tracer: Tracer | None = None
_provider: TracerProvider | None = None
_sample_ratio = 0.0


class JsonLinesExporter(SpanExporter):
    """Spans as JSON lines in a file: one object a span, appended whole, for tests and machines without a collector."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        lines = []
        for span in spans:
            context, parent = span.get_span_context(), span.parent
            if context is None:
                continue
            lines.append(
                json.dumps(
                    {
                        "trace_id": f"{context.trace_id:032x}",
                        "span_id": f"{context.span_id:016x}",
                        "parent_id": f"{parent.span_id:016x}" if parent else None,
                        "name": span.name,
                        "kind": span.kind.name.lower(),
                        "start_ns": span.start_time,
                        "end_ns": span.end_time,
                        "status": span.status.status_code.name.lower(),
                        "service": span.resource.attributes.get("service.name"),
                        "attributes": dict(span.attributes or {}),
                    },
                    default=str,
                )
            )
        # Unbuffered: one write at the file's end, so that several processes may share the file.
        with self._lock, self._path.open("ab", buffering=0) as out:
            out.write("".join(line + "\n" for line in lines).encode())
        return SpanExportResult.SUCCESS


def setup_tracing(
    service: str, *, version: str, sample_ratio: float, trace_file: Path | None = None, otlp_endpoint: str | None = None
) -> None:
    """Make this process's tracer. Without an exporter, sampled spans are made (ids must be real) and go nowhere."""
    global _tracer, _provider, _sample_ratio
    _sample_ratio = sample_ratio
    resource = Resource.create({"service.name": service, "service.version": version})
    # Where a trace begins, `_drawn` has said that it is sampled before the vendor is asked to make its span.
    provider = TracerProvider(resource=resource, sampler=ParentBased(ALWAYS_ON))
    if trace_file is not None:
        provider.add_span_processor(
            BatchSpanProcessor(JsonLinesExporter(trace_file), schedule_delay_millis=EXPORT_DELAY_MS)
        )
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        endpoint = otlp_endpoint.rstrip("/") + "/v1/traces"
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    _provider, _tracer = provider, provider.get_tracer("factmesh")


def flush() -> None:
    """Hand what is collected to the exporters; called at a clean stop."""
    if _provider is not None:
        _provider.shutdown()


def parse_traceparent(text: str | None) -> SpanContext | None:
    """A W3C Trace Context `traceparent` (level 1), or None where it is absent or torn."""
    match = _TRACEPARENT.match(text or "")
    if match is None:
        return None
    trace_id, span_id = int(match[1], 16), int(match[2], 16)
    if not trace_id or not span_id:
        return None
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(int(match[3], 16)))


def format_traceparent(context: SpanContext) -> str:
    """The header's text."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def carried(traceparent: str | None) -> tuple[str | None, bool]:
    """(what a hop hands on: the trace that came in, or None where it is torn; whether a span is to be made).

    As `Hop` judges, without its price: most traces are not sampled, and most messages need nothing else. Where a
    trace begins here it is drawn here too: a hop for it is made with `drawn`.
    """
    text = traceparent or ""
    if _TRACEPARENT.match(text) is None or text[3:35] == _NO_TRACE or text[36:52] == _NO_SPAN:
        if _tracer is None:
            return None, False
        return (None, True) if _drawn() else (new_traceparent(sampled=False), False)
    return text, _tracer is not None and text[54] in _SAMPLED


def _drawn() -> bool:
    """Whether a trace that begins here is sampled. The vendor asks its sampler after most of a span's work is done."""
    return random.random() < _sample_ratio


class Hop:
    """One span of one message's way. Use as a context manager; `traceparent` is what goes on with what it emits.

    Where the trace is not sampled no span is made, and `traceparent` is the one that came in: a flag check, not 14 µs.
    """

    __slots__ = ("_span", "traceparent")

    def __init__(
        self,
        name: str,
        traceparent: str | None,
        kind: str = "consumer",
        attributes: Mapping[str, Any] | None = None,
        *,
        drawn: bool = False,
    ) -> None:
        self._span: Span | None = None
        parent = parse_traceparent(traceparent)
        self.traceparent = traceparent if parent is not None else None
        if _tracer is None or (parent is not None and not parent.trace_flags.sampled):
            return
        if parent is None and not drawn and not _drawn():
            self.traceparent = new_traceparent(sampled=False)
            return
        context = set_span_in_context(NonRecordingSpan(parent)) if parent is not None else None
        span = _tracer.start_span(name, context, SpanKind[kind.upper()], attributes)
        self._span = span
        self.traceparent = format_traceparent(span.get_span_context())

    @property
    def recording(self) -> bool:
        """Whether there is a span: where not, what would be noted need not be put together."""
        return self._span is not None

    def note(self, **attributes: Any) -> None:
        """Attributes known only later."""
        if self._span is not None:
            self._span.set_attributes({k: v for k, v in attributes.items() if v is not None})

    def fail(self, error_type: str) -> None:
        """Mark the span; the error's type only, never its text."""
        if self._span is not None:
            self._span.set_status(Status(StatusCode.ERROR))
            self._span.set_attribute("error.type", error_type)

    def end(self) -> None:
        if self._span is not None:
            self._span.end()

    def __enter__(self) -> Hop:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is not None:
            self.fail(exc_type.__qualname__)
        self.end()


def new_traceparent(sampled: bool = True) -> str:
    """A fresh root context, for entrances where the caller sent none."""
    return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-{'01' if sampled else '00'}"


def messaging(
    topic: str, operation: str, partition: int | None = None, offset: int | None = None, group: str | None = None
) -> dict[str, Any]:
    """Attributes by the OpenTelemetry semantic conventions for messaging (Kafka): `operation` is send or process."""
    attributes: dict[str, Any] = {
        "messaging.system": "kafka",
        "messaging.destination.name": topic,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    if partition is not None:
        attributes["messaging.destination.partition.id"] = str(partition)
    if offset is not None:
        attributes["messaging.kafka.offset"] = offset
    if group is not None:
        attributes["messaging.consumer.group.name"] = group
    return attributes


def frames_only(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Exceptions by type and frames: their texts, and asyncio's picture of a task, may quote a payload (F5)."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
    if isinstance(error, BaseException):
        _, event["error"], event["stack"] = describe(error)
    record = event.get("_record")
    if isinstance(record, logging.LogRecord) and record.name == "asyncio":
        event["event"] = str(event["event"]).partition("\n")[0]
    return event


def setup_logging(service: str, *, level: str = "info", fmt: str = "json") -> None:
    """structlog to standard error, one JSON object a line (or readable lines), standard library's logs included."""
    number = getattr(logging, level.upper())
    renderer: Any = structlog.processors.JSONRenderer() if fmt == "json" else structlog.dev.ConsoleRenderer(
        exception_formatter=structlog.dev.plain_traceback
    )

    def named(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        # No context variable: those are lost on the threads that Kafka's clients log from.
        event.setdefault("service", service)
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        named,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, frames_only, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, frames_only],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
