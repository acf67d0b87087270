"""Traces as a collector receives them, of requests that the stock client sent."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from headrace.errors import ConfigError
from headrace.testing import serve_in_process
from otlp_collector import Collector, Received, collecting
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from scripted_models import infer_message

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=kept"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
OTHERS = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
STAGES = ["decode", "queue", "gather", "execute", "encode"]
METHOD = "inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`echo`: y = x; `slow` waits 2 s for 8 rows to run together; `picky` fails while it runs for an index beyond 2."""
    onnx_models.save(onnx_models.identity(), tmp_path / "echo" / "1")
    onnx_models.save(onnx_models.slow(2000), tmp_path / "slow" / "3")  # the same time for 8 rows as for 1: they are worth waiting for
    (tmp_path / "slow" / "model.toml").write_text("max_batch_size = 8\nmax_queue_delay_ms = 2000\n")
    onnx_models.save(onnx_models.fails_on_large_index(), tmp_path / "picky" / "1")
    return tmp_path


def ones(rows: int = 1) -> triton.InferInput:
    tensor = triton.InferInput("x", [rows, 4], "FP32")
    tensor.set_data_from_numpy(np.ones((rows, 4), np.float32))
    return tensor


async def infer(
    server: Any, model: str, headers: dict[str, str] | None = None, tensor: triton.InferInput | None = None, **options: Any
) -> str:
    """OK, or the name of the status."""
    async with aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        try:
            await client.infer(model, [ones() if tensor is None else tensor], headers=headers, **options)
        except triton.InferenceServerException as error:
            return str(error.status()).removeprefix("StatusCode.")
    return "OK"


async def requests(collector: Collector, count: int = 1) -> list[Received]:
    return await asyncio.to_thread(collector.requests, count)


async def scrape(server: Any, accept: str = "application/openmetrics-text") -> str:
    url = f"http://{server.http_address}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url, headers={"Accept": accept}) as response:
        return await response.text()


async def test_a_request_is_a_span_below_its_callers_with_its_stages_below_it(models: Path, transport: str) -> None:
    with collecting() as collector:
        options = {"tracing": collector.endpoint, "transport": transport, "trace_service_name": "shop"}
        async with serve_in_process(models, **options) as server:
            assert await infer(server, "echo", SAMPLED, ones(2), request_id="r-7") == "OK"
            (span,) = await requests(collector)
    assert (span.name, span.trace, span.parent, span.state, span.is_error) == (METHOD, TRACE, PARENT, "vendor=kept", False)
    assert span.resource["service.name"] == "shop"
    expected = {
        "rpc.system.name": "grpc", "rpc.method": METHOD, "rpc.response.status_code": "OK", "headrace.model.name": "echo",
        "headrace.model.version": "1", "headrace.request.id": "r-7", "headrace.request.rows": 2,
    }  # fmt: skip
    assert {name: span.attributes.get(name) for name in expected} == expected
    assert "127.0.0.1" in str(span.attributes["network.peer.address"])
    assert "grpc" in str(span.attributes["user_agent.original"])
    below = collector.below(span)
    assert list(below) == STAGES
    stages = [below[name] for name in STAGES]
    assert span.began <= stages[0].began
    assert all(one.ended <= other.began for one, other in pairwise(stages))
    assert stages[-1].ended <= span.ended
    assert below["queue"].duration + below["execute"].duration <= span.duration


async def test_requests_of_a_batch_are_linked_with_it_and_it_with_them(models: Path, transport: str) -> None:
    with collecting() as collector:
        async with serve_in_process(models, tracing=collector.endpoint, trace_fraction=1.0, transport=transport) as server:
            assert await asyncio.gather(*[infer(server, "slow", tensor=ones(2)) for _ in range(4)]) == ["OK"] * 4
            spans = await requests(collector, 4)
    batches = {(batch.trace, batch.id): batch for batch in collector.named("batch slow")}
    assert len(batches) in (1, 2), "8 rows at once, or 4 where the batcher tries what those are worth"
    for span in spans:
        (link,) = span.links
        assert (span.trace, span.id) in batches[link].links
        below = collector.below(span)
        assert (below["queue"].ended, below["encode"].ended) == (batches[link].began, batches[link].ended)
    assert sum(len(batch.links) for batch in batches.values()) == 4
    assert len({span.trace for span in spans} | {trace for trace, _ in batches}) == 4 + len(batches)
    attributes = [batch.attributes for batch in batches.values()]
    assert sum(int(one["headrace.batch.rows"]) for one in attributes) == 8
    assert sum(int(one["headrace.batch.requests"]) for one in attributes) == 4
    assert {one["headrace.model.version"] for one in attributes} == {"3"}


@pytest.mark.parametrize(
    ("fraction", "headers", "is_traced"),
    [(0.0, None, False), (1.0, None, True), (0.0, SAMPLED, True), (1.0, NOT_SAMPLED, False), (1.0, {"traceparent": "00-bad"}, True)],
)
async def test_the_caller_decides_whether_a_request_is_traced_and_else_the_fraction(
    models: Path, transport: str, fraction: float, headers: dict[str, str] | None, is_traced: bool
) -> None:
    with collecting() as collector:
        async with serve_in_process(models, tracing=collector.endpoint, trace_fraction=fraction, transport=transport) as server:
            assert await infer(server, "echo", headers) == "OK"
            assert await infer(server, "echo", OTHERS) == "OK"
        # Stopping has sent all there was.
        assert len([span for span in collector.requests(1) if span.trace != "1" * 32]) == is_traced


async def test_errors_are_marked_where_they_are_the_servers_and_named_in_any_case(models: Path, transport: str) -> None:
    index = triton.InferInput("index", [1], "INT64")
    index.set_data_from_numpy(np.array([9]))
    with collecting() as collector:
        async with serve_in_process(models, tracing=collector.endpoint, trace_fraction=1.0, transport=transport) as server:
            assert await infer(server, "picky", tensor=index) == "INTERNAL"
            assert await infer(server, "unknown") == "NOT_FOUND"
            assert await infer(server, "slow", tensor=ones(9)) == "INVALID_ARGUMENT"
            spans = {str(span.attributes["headrace.model.name"]): span for span in await requests(collector, 3)}
    marks = {name: (span.attributes["error.type"], span.is_error) for name, span in spans.items()}
    assert marks == {"picky": ("INTERNAL", True), "unknown": ("NOT_FOUND", False), "slow": ("INVALID_ARGUMENT", False)}
    assert list(collector.below(spans["picky"])) == ["decode", "queue", "execute"]
    assert list(collector.below(spans["unknown"])) == ["decode"]
    assert [batch.is_error for batch in collector.named("batch picky")] == [True]
    assert collector.named("batch slow") == []


async def test_a_request_that_leaves_the_queue_unrun_ends_there(models: Path, transport: str) -> None:
    with collecting() as collector:
        async with serve_in_process(models, tracing=collector.endpoint, trace_fraction=1.0, transport=transport) as server:
            waiting = asyncio.ensure_future(infer(server, "slow"))
            while not server.models.resolve("slow", "").pending_requests:
                await asyncio.sleep(0.001)
            waiting.cancel()
            (span,) = await requests(collector)
            await asyncio.gather(waiting, return_exceptions=True)
    assert span.attributes["error.type"] == "CANCELLED"
    assert list(collector.below(span)) == ["decode", "queue"]
    assert collector.below(span)["queue"].ended == span.ended


async def test_the_trailers_say_where_the_trace_of_a_request_is(models: Path, transport: str) -> None:
    with collecting() as collector:
        async with (
            serve_in_process(models, tracing=collector.endpoint, trace_fraction=1.0, transport=transport) as server,
            grpc.aio.insecure_channel(server.grpc_addresses[0]) as channel,
        ):
            call = channel.unary_unary(f"/{METHOD}")(infer_message())
            await call
            answered = dict(await call.trailing_metadata())["traceresponse"]
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(f"/{METHOD}")(infer_message("unknown"))
            failed = dict(raised.value.trailing_metadata())["traceresponse"]
            spans = await requests(collector, 2)
    assert {answered, failed} == {f"00-{span.trace}-{span.id}-01" for span in spans}


async def test_each_request_of_a_stream_is_a_span(models: Path, transport: str) -> None:
    async def messages() -> Any:
        for number in range(3):
            yield {"model_name": "echo", "inputs": [ones()], "request_id": str(number)}

    with collecting() as collector:
        async with serve_in_process(models, tracing=collector.endpoint, transport=transport) as server:
            async with aio.InferenceServerClient(server.grpc_addresses[0]) as client:
                answers = [error async for _, error in client.stream_infer(messages(), headers=SAMPLED)]
            spans = await requests(collector, 3)
    assert answers == [None] * 3
    assert {span.attributes["headrace.request.id"] for span in spans} == {"0", "1", "2"}
    assert {(span.trace, span.parent) for span in spans} == {(TRACE, PARENT)}


async def test_a_collector_that_is_down_costs_traces_and_nothing_else(models: Path, transport: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: whoever connects is refused
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        async with asyncio.timeout(30):  # or else stopping waits for a collector that is not there
            async with serve_in_process(models, tracing=endpoint, trace_fraction=1.0, transport=transport) as server:
                assert [await infer(server, "echo") for _ in range(5)] == ["OK"] * 5
    stats = server.tracing.stats()
    assert (stats.exported, stats.not_sent) == (0, 5)


async def test_what_is_beyond_the_rate_is_answered_untraced_and_counted(models: Path, transport: str) -> None:
    with collecting() as collector:
        options = {"tracing": collector.endpoint, "trace_max_per_second": 0.0, "transport": transport}
        async with serve_in_process(models, **options) as server:
            assert [await infer(server, "echo", SAMPLED) for _ in range(4)] == ["OK"] * 4
            text = await scrape(server)
    assert 'headrace_untraced_requests_total{cause="rate"} 3.0' in text  # the first is what a bucket holds at least
    assert len(collector.requests(1)) == 1


async def test_buckets_of_the_histograms_lead_to_traces(models: Path, transport: str) -> None:
    with collecting() as collector:
        async with serve_in_process(models, tracing=collector.endpoint, transport=transport) as server:
            assert await infer(server, "echo", SAMPLED) == "OK"
            assert await infer(server, "echo", NOT_SAMPLED) == "OK"
            (span,) = await requests(collector)
            while not server.tracing.stats().exported:
                await asyncio.sleep(0.001)
            text, plain = await scrape(server), await scrape(server, "text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in ("request", "queue", "compute_input", "compute", "compute_output"):
        samples = families[f"headrace_{name}_duration_seconds"].samples
        (sample,) = [sample for sample in samples if sample.exemplar is not None]
        assert sample.exemplar.labels == {"trace_id": TRACE}
        assert sample.exemplar.value <= float(sample.labels["le"])
        assert float(sample.exemplar.timestamp) == pytest.approx(span.ended / 1e9, abs=0.001)  # both are of the same moment
    assert "# {" not in plain


async def test_the_access_log_names_the_trace_and_the_batch(models: Path, transport: str) -> None:
    with collecting() as collector, redirect_stdout(io.StringIO()) as output:
        options = {"tracing": collector.endpoint, "trace_fraction": 0.0, "access_log": True, "transport": transport}
        async with serve_in_process(models, **options) as server:
            assert await infer(server, "echo", SAMPLED, request_id="sampled") == "OK"
            assert await infer(server, "echo", NOT_SAMPLED, request_id="not sampled") == "OK"
            assert await infer(server, "echo", request_id="in no trace") == "OK"
            assert await infer(server, "unknown", SAMPLED, request_id="refused") == "NOT_FOUND"
            spans = {span.attributes["headrace.request.id"]: span for span in await requests(collector, 2)}
    lines = {line["id"]: line for line in map(json.loads, output.getvalue().splitlines())}
    for id in ("sampled", "refused"):
        assert (lines[id]["trace_id"], lines[id]["span_id"]) == (TRACE, spans[id].id)
    assert lines["refused"]["error"].startswith("Request for unknown model")
    assert lines["not sampled"]["trace_id"] == TRACE
    assert "span_id" not in lines["not sampled"]
    assert "trace_id" not in lines["in no trace"]
    (batch,) = collector.named("batch echo")
    assert lines["sampled"]["batch"] == batch.attributes["headrace.batch.id"] == 1
    assert "grpc" in lines["sampled"]["user_agent"]
    assert "127.0.0.1" in lines["sampled"]["peer"]


async def test_spans_go_into_a_file_that_collectors_can_read(models: Path, tmp_path: Path, transport: str) -> None:
    path = tmp_path / "spans.jsonl"
    async with serve_in_process(models, tracing=f"file:{path}", transport=transport) as server:
        assert await infer(server, "echo", SAMPLED) == "OK"
    groups = [group for line in path.read_text().splitlines() for group in json.loads(line)["resourceSpans"]]
    spans = [span for group in groups for scope in group["scopeSpans"] for span in scope["spans"]]
    (request,) = [span for span in spans if span.get("parentSpanId") == PARENT]
    assert (request["traceId"], request["kind"]) == (TRACE, 2)
    assert [span["name"] for span in spans if span.get("parentSpanId") == request["spanId"]] == STAGES


async def test_a_file_that_cannot_be_written_is_said_at_start(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracing: .*No such file or directory"):
        async with serve_in_process(models, tracing=f"file:{models}{os.sep}none{os.sep}spans.jsonl"):
            pass


async def test_two_servers_in_one_process_trace_each_to_its_own_collector(models: Path) -> None:
    with collecting() as one, collecting() as other:
        async with (
            serve_in_process(models, tracing=one.endpoint, trace_service_name="one") as first,
            serve_in_process(models, tracing=other.endpoint, trace_service_name="other") as second,
        ):
            assert await infer(first, "echo", SAMPLED) == "OK"
            assert await infer(second, "echo", SAMPLED) == "OK"
    assert [span.resource["service.name"] for span in one.requests(1)] == ["one"]
    assert [span.resource["service.name"] for span in other.requests(1)] == ["other"]
