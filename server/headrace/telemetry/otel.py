"""Spans of OpenTelemetry from what was noted of traced requests. The only importer of opentelemetry.

The provider is this server's own and never the global one: two servers in one process, or an application that traces itself, do not
meet. Nothing here runs before requests have been answered; ids are those that were given out when they came.
"""

from __future__ import annotations

import json
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from google.protobuf.json_format import MessageToDict
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from headrace.errors import ConfigError
from headrace.telemetry.tracing import Ended, SpanExporter, TracedRequest

Attributes = dict[str, str | int]

METHOD = "inference.GRPCInferenceService/ModelInfer"
_SEND_WITHIN = 5
"""Seconds of one export, retries included."""
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SERVERS_FAULT = frozenset({"DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE"})
"""Statuses that make a server's span an error, by the semantic conventions for gRPC; the others are the client's own affair."""


def open_exporter(target: str, service_name: str, service_version: str) -> OtelExporter:
    """`target` as ServerConfig.tracing has it, and not empty. Raises ConfigError for a file that cannot be written.

    What OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE and OTEL_RESOURCE_ATTRIBUTES say holds, as for any user of OpenTelemetry.
    """
    resource = Resource.create({"service.name": service_name, "service.version": service_version})
    if target == "console":
        return OtelExporter(resource, _Lines(sys.stderr, is_own=False))
    if target.startswith("file:"):
        path = Path(target.removeprefix("file:"))
        try:
            return OtelExporter(resource, _Lines(path.open("a", encoding="utf-8"), is_own=True))
        except OSError as error:
            raise ConfigError(f"tracing: {path}: {error.strerror}") from None
    return OtelExporter(resource, _Collector(OTLPSpanExporter(endpoint=target, timeout=_SEND_WITHIN)))


class _GivenIds(IdGenerator):
    """Gives the span that is started next the ids that were promised for it. Tracing thread only."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.trace_id = 0
        self.span_id = 0

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, 0
        return given or self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        given, self.span_id = self.span_id, 0
        return given or self._random.generate_span_id()


class _Kept(SpanProcessor):
    """Keeps the spans that ended until they are taken: they are sent by the thread that made them, which bounds them already."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        spans, self._spans = self._spans, []
        return spans


class OtelExporter(SpanExporter):
    """Owns the provider and what sends. `export` on the tracing thread, `close` from any."""

    def __init__(self, resource: Resource, sender: _Collector | _Lines) -> None:
        self._ids = _GivenIds()
        self._kept = _Kept()
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(self._kept)
        self._tracer: Tracer = self._provider.get_tracer("headrace")
        self._sender = sender

    def export(self, ended: Sequence[Ended]) -> bool:
        for one in ended:
            self._make_spans(one)
        return self._sender.send(self._kept.take())

    def close(self) -> None:
        self._sender.close()
        self._provider.shutdown()

    # -- from what was noted to spans ----------------------------------------------------------------------------------

    def _make_spans(self, ended: Ended) -> None:
        """A trace of its own for the batch, linked with each traced request in it; below each request the stages it went through."""
        wall = _to_wall(ended.wall_offset)
        model: Attributes = {"headrace.model.name": ended.model, "headrace.model.version": ended.version}
        batch = self._batch(ended, model, wall) if ended.taken else None
        for request in ended.traced:
            self._request(request, ended, model, batch, wall)

    def _batch(self, ended: Ended, model: Attributes, wall: Callable[[float], int]) -> SpanContext:
        attributes = model | {
            "headrace.batch.id": ended.batch,
            "headrace.batch.requests": ended.requests,
            "headrace.batch.rows": ended.rows,
        }
        if ended.times is not None:
            attributes["headrace.batch.padded_rows"] = ended.times.padded_rows
        span = self._tracer.start_span(
            f"batch {ended.model}",
            context=Context(),
            attributes=attributes,
            links=[Link(_span_context(request.trace.trace_id, request.trace.span_id)) for request in ended.traced],
            start_time=wall(ended.taken),
        )
        if ended.times is None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(wall(ended.times.done if ended.times is not None else ended.left))
        return span.get_span_context()

    def _request(
        self, request: TracedRequest, ended: Ended, model: Attributes, batch: SpanContext | None, wall: Callable[[float], int]
    ) -> None:
        trace = request.trace
        parent = Context()
        if trace.parent_id:
            caller = _span_context(trace.trace_id, trace.parent_id, trace.state, is_remote=True)
            parent = set_span_in_context(NonRecordingSpan(caller), parent)
        # A span with a parent has its trace from there, and what was given would be the next batch's.
        self._ids.trace_id, self._ids.span_id = 0 if trace.parent_id else trace.trace_id, trace.span_id
        span = self._tracer.start_span(
            METHOD,
            context=parent,
            kind=SpanKind.SERVER,
            attributes=model | _call_attributes(request),
            links=[Link(batch)] if batch is not None else [],
            start_time=wall(request.arrived),
        )
        inside = set_span_in_context(span, Context())
        for name, began, done in _stages(request, ended):
            self._tracer.start_span(name, context=inside, start_time=wall(began)).end(wall(done))
        if request.code in _SERVERS_FAULT:
            span.set_status(Status(StatusCode.ERROR, request.code))
        span.end(wall(ended.left))


def _stages(request: TracedRequest, ended: Ended) -> list[tuple[str, float, float]]:
    """(name, began, done) of each stage that the request reached. Cases: refused; left the queue unrun; failed in its batch; answered."""
    if not request.enqueued:
        return [("decode", request.arrived, ended.left)]
    decode = ("decode", request.arrived, request.enqueued)
    if not ended.taken:
        return [decode, ("queue", request.enqueued, ended.left)]
    queue = ("queue", request.enqueued, ended.taken)
    times = ended.times
    if times is None:
        return [decode, queue, ("execute", ended.taken, ended.left)]
    return [
        decode,
        queue,
        ("gather", times.taken, times.input_done),
        ("execute", times.input_done, times.output_start),
        ("encode", times.output_start, times.done),
    ]


def _call_attributes(request: TracedRequest) -> Attributes:
    """By the semantic conventions for RPC where they have a name for it."""
    attributes: Attributes = {"rpc.system.name": "grpc", "rpc.method": METHOD, "rpc.response.status_code": request.code}
    if request.code != "OK":
        attributes["error.type"] = request.code
    if request.peer:
        attributes["network.peer.address"] = request.peer
    if request.user_agent:
        attributes["user_agent.original"] = request.user_agent
    if request.id:
        attributes["headrace.request.id"] = request.id
    if request.rows:
        attributes["headrace.request.rows"] = request.rows
    return attributes


def _span_context(trace_id: int, span_id: int, state: str = "", *, is_remote: bool = False) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote, _SAMPLED, TraceState.from_header([state]) if state else None)


def _to_wall(offset: float) -> Callable[[float], int]:
    """From time.monotonic() to nanoseconds since the epoch."""
    # Apart, since a float of seconds since the epoch knows no nanoseconds.
    shift = round(offset * 1e9)
    return lambda seconds: round(seconds * 1e9) + shift


# -- where spans go ----------------------------------------------------------------------------------------------------


class _Collector:
    """By OTLP over gRPC. The exporter is OpenTelemetry's synchronous one: its calls wait outside the interpreter's lock, on a thread
    that has nothing else to do."""

    def __init__(self, exporter: OTLPSpanExporter) -> None:
        self._exporter = exporter

    def send(self, spans: Sequence[ReadableSpan]) -> bool:
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()


class _Lines:
    """As lines of OTLP JSON, which collectors can read too (otlpjsonfile)."""

    def __init__(self, stream: TextIO, *, is_own: bool) -> None:
        self._stream = stream
        self._is_own = is_own
        self._lock = threading.Lock()
        self._is_closed = False

    def send(self, spans: Sequence[ReadableSpan]) -> bool:
        line = json.dumps(_with_hex_ids(MessageToDict(encode_spans(spans), use_integers_for_enums=True)), separators=(",", ":"))
        with self._lock:
            if self._is_closed:
                return False
            self._stream.write(line + "\n")
            self._stream.flush()
        return True

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._is_own:
                self._stream.close()


_IDS = frozenset({"traceId", "spanId", "parentSpanId"})


def _with_hex_ids(value: Any) -> Any:
    """OTLP's JSON writes ids in hexadecimal, where protobuf's would have base64."""
    if isinstance(value, dict):
        return {key: b64decode(inner).hex() if key in _IDS else _with_hex_ids(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_hex_ids(inner) for inner in value]
    return value
