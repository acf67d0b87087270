"""A collector of OpenTelemetry's protocol on a free loopback port, that keeps the spans it is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

SERVER = trace_pb2.Span.SpanKind.SPAN_KIND_SERVER
ERROR = trace_pb2.Status.StatusCode.STATUS_CODE_ERROR


@dataclass(frozen=True)
class Received:
    """A span as it came. Ids in hexadecimal, times in nanoseconds; `links` are (trace id, span id)."""

    name: str
    trace: str
    id: str
    parent: str
    state: str
    kind: int
    began: int
    ended: int
    attributes: Mapping[str, str | int]
    links: Sequence[tuple[str, str]]
    is_error: bool
    resource: Mapping[str, str | int]

    @property
    def duration(self) -> int:
        return self.ended - self.began


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Owns the spans received so far."""

    def __init__(self) -> None:
        self._spans: list[Received] = []
        self._arrived = threading.Condition()
        self.endpoint = ""

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._arrived:
            for group in request.resource_spans:
                resource = _attributes(group.resource.attributes)
                self._spans += [_received(span, resource) for scope in group.scope_spans for span in scope.spans]
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def requests(self, count: int) -> list[Received]:
        """The spans of requests, once there are so many. From a thread that may block."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self._servers()) >= count, timeout=20), f"{len(self._servers())} of {count} spans"
            return self._servers()

    def below(self, span: Received) -> dict[str, Received]:
        """Its children by name."""
        return {other.name: other for other in self._spans if (other.trace, other.parent) == (span.trace, span.id)}

    def named(self, name: str) -> list[Received]:
        return [span for span in self._spans if span.name == name]

    def _servers(self) -> list[Received]:
        return [span for span in self._spans if span.kind == SERVER]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def _received(span: trace_pb2.Span, resource: Mapping[str, str | int]) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.kind,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        span.status.code == ERROR,
        resource,
    )


def _attributes(pairs: object) -> dict[str, str | int]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}  # type: ignore[attr-defined]
