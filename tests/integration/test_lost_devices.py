"""A device lost under load, on a real server: a stock client's requests but for one batch are answered, and everybody is told why."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from devices import DeviceBackend
from headrace.lifecycle import model as module
from headrace.testing import serve_in_process
from tritonclient.utils import InferenceServerException

REASON = "unspecified launch failure"


def place(folder: Path, model: str, toml: str) -> None:
    (folder / model / "1").mkdir(parents=True)
    (folder / model / "1" / "model.fake").touch()
    (folder / model / "model.toml").write_text(toml)


def tensor(value: float) -> Any:
    given = triton.InferInput("x", [1, 2], "FP32")
    given.set_data_from_numpy(np.full((1, 2), value, np.float32))
    return given


async def ask(client: Any, model: str, value: float) -> str:
    """How it ended; a wrong answer is no answer."""
    try:
        result = await client.infer(model, [tensor(value)])
    except InferenceServerException as error:
        return f"{error.status()}: {REASON in str(error)}"
    assert result.as_numpy("y").tolist() == [[value, value]]
    return "answered"


async def ask_on(client: Any, model: str, outcomes: Counter[str], stop: asyncio.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        outcomes[await ask(client, model, float(number))] += 1


def read(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}") as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_with_two_instances_only_the_batch_that_failed_is_lost(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = DeviceBackend.make_on("cuda:0", "cuda:1")
    monkeypatch.setattr("headrace.app.load_backends", lambda: {"fake": backend})
    place(tmp_path, "m", "max_batch_size = 4\n[instances]\ncount = 2\n")
    outcomes, stop = Counter[str](), asyncio.Event()
    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(ask_on(client, "m", outcomes, stop))
            await until(lambda: outcomes["answered"] > 100)
            backend.broken.add("cuda:0")
            await until(lambda: backend.lost_batches)
            before = outcomes["answered"]
            await until(lambda: outcomes["answered"] > before + 200)
            stop.set()
        assert len(backend.lost_batches) == 1
        assert sum(outcomes.values()) - outcomes["answered"] == outcomes["StatusCode.INTERNAL: True"] == backend.lost_batches[0]
        assert (await asyncio.to_thread(read, server.http_address, "/readyz"))[0] == 200
        _, metrics = await asyncio.to_thread(read, server.http_address, "/metrics")
    for line in (
        'headrace_device_lost{device="cuda:0"} 1.0',
        'headrace_version_instances{device="cuda:0",model="m",version="1"} 0.0',
        'headrace_version_instances{device="cuda:1",model="m",version="1"} 1.0',
        'headrace_version_device_memory_bytes{device="cuda:1",model="m",version="1"} 1000.0',
        'headrace_model_events_total{event="device_lost",model="m"} 1.0',
    ):
        assert line in metrics


async def test_without_another_instance_the_model_is_unavailable_and_the_others_serve_on(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER_LOSS", 3600.0)
    backend = DeviceBackend.make_on("cuda:0")
    monkeypatch.setattr("headrace.app.load_backends", lambda: {"fake": backend})
    place(tmp_path, "m", "max_batch_size = 4\n")
    place(tmp_path, "host", "[instances]\ndevice = 'cpu'\n")
    outcomes, others, stop = Counter[str](), Counter[str](), asyncio.Event()
    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(ask_on(client, "m", outcomes, stop))
                group.create_task(ask_on(client, "host", others, stop))
            await until(lambda: outcomes["answered"] > 50)
            backend.broken.add("cuda:0")
            await until(lambda: outcomes["StatusCode.UNAVAILABLE: True"] > 50)
            before = others["answered"]
            await until(lambda: others["answered"] > before + 50)
            stop.set()
        assert set(others) == {"answered"}
        assert set(outcomes) == {"answered", "StatusCode.INTERNAL: True", "StatusCode.UNAVAILABLE: True"}
        assert outcomes["StatusCode.INTERNAL: True"] == sum(backend.lost_batches)
        rows = {row.name: (row.state, row.reason) for row in (await client.get_model_repository_index()).models}
        assert rows == {"host": ("READY", ""), "m": ("UNAVAILABLE", f"cuda:0: {REASON}")}
        assert not await client.is_model_ready("m")
        status, body = await asyncio.to_thread(read, server.http_address, "/readyz")
        assert (status, json.loads(body)["models"]) == (
            503,
            [{"model": "m", "version": "1", "state": "UNAVAILABLE", "reason": f"cuda:0: {REASON}"}],
        )
        _, metrics = await asyncio.to_thread(read, server.http_address, "/metrics")
        await asyncio.to_thread(backend.wait_for_live, "cpu")
    assert 'headrace_version_state{model="m",version="1",state="failed"} 1' in metrics
    assert 'headrace_device_lost{device="cuda:0"} 1.0' in metrics
