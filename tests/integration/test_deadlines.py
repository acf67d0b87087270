"""Deadlines from a client's timeout to the answer: refused at once, in time, or counted; and neighbours that do not starve."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from headrace.telemetry.counters import CounterSnapshot, DropCause, FailureReason
from headrace.testing import serve_in_process

WIDTH = 512
TRANSPORTS = pytest.mark.parametrize("transport", ["grpcio", "native"])


def save_model(folder: Path, name: str, toml: str = "") -> None:
    """A perceptron of a millisecond or so, so that the model is what requests wait for."""
    onnx_models.save(onnx_models.mlp(WIDTH, 2048, 2048, 4), folder / name / "1")
    (folder / name / "model.toml").write_text(toml)


async def infer(client: Any, model: str, rows: int = 1, **options: Any) -> str:
    """OK, or the name of the status."""
    tensor = triton.InferInput("x", [rows, WIDTH], "FP32")
    tensor.set_data_from_numpy(np.ones((rows, WIDTH), np.float32))
    try:
        await client.infer(model, [tensor], **options)
    except triton.InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode.")
    return "OK"


def counts_of(server: Any, model: str) -> CounterSnapshot:
    counters = server.models.resolve(model, "").counters
    snapshot = counters.snapshot()
    assert isinstance(snapshot, CounterSnapshot)
    return snapshot


@TRANSPORTS
async def test_a_deadline_below_what_the_model_takes_is_refused_without_a_run(tmp_path: Path, transport: str) -> None:
    save_model(tmp_path, "m", "slo_ms = 0.05\n")
    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert Counter([await infer(client, "m") for _ in range(20)]) == {"UNAVAILABLE": 20}
        counts = counts_of(server, "m")
    assert counts.batches == 0
    assert counts.drops[DropCause.REFUSED] + counts.drops[DropCause.EXPIRED] == counts.failures[FailureReason.REJECTED] == 20


@TRANSPORTS
async def test_the_timeout_that_a_request_names_is_a_deadline_too(tmp_path: Path, transport: str) -> None:
    save_model(tmp_path, "m")
    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert await infer(client, "m", timeout=50) == "UNAVAILABLE"
        assert await infer(client, "m", timeout=30_000_000) == "OK"
        assert await infer(client, "m", client_timeout=30.0) == "OK"


@TRANSPORTS
async def test_of_more_than_can_be_done_in_time_the_rest_is_refused_and_every_call_is_counted_once(tmp_path: Path, transport: str) -> None:
    save_model(tmp_path, "m", "max_batch_size = 1\nslo_ms = 60\n")
    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        ended = Counter(await asyncio.gather(*[infer(client, "m") for _ in range(600)]))
        counts = counts_of(server, "m")
    assert ended["OK"] + ended["UNAVAILABLE"] == 600
    assert min(ended["OK"], ended["UNAVAILABLE"]) > 0
    assert counts.success == ended["OK"]
    assert sum(counts.drops) - counts.drops[DropCause.LATE] == counts.failures[FailureReason.REJECTED] == ended["UNAVAILABLE"]


@TRANSPORTS
async def test_a_flood_for_one_model_does_not_starve_another(tmp_path: Path, transport: str) -> None:
    for name in ("flooded", "quiet"):
        save_model(tmp_path, name, "max_queue_size = 0\n")
    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        flood = [asyncio.create_task(infer(client, "flooded", rows=64)) for _ in range(150)]
        await flood[0]
        assert [await infer(client, "quiet") for _ in range(10)] == ["OK"] * 10
        assert server.models.resolve("flooded", "").pending_requests > 0
        assert Counter(await asyncio.gather(*flood)) == {"OK": 150}


async def test_what_the_scheduler_knows_and_drops_is_among_the_metrics(tmp_path: Path) -> None:
    save_model(tmp_path, "m", "slo_ms = 0.05\n")
    async with serve_in_process(tmp_path) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        await infer(client, "m")
        reader, writer = await asyncio.open_connection(*server.http_address.rsplit(":", 1))
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
    assert 'headrace_batch_latency_seconds{model="m",version="1",rows="1",estimate="upper"}' in text
    drops = re.findall(r'headrace_drops_total\{model="m",version="1",cause="(?:refused|expired)"\} (\d+)', text)
    assert sum(map(int, drops)) == 1
