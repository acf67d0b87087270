"""Several instances of a model, on a real server and a stock client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from headrace.backends.base import Array
from headrace.testing import FakeBackend, serve_in_process


def place(folder: Path, toml: str) -> Path:
    (folder / "m" / "1").mkdir(parents=True)
    (folder / "m" / "1" / "model.fake").touch()
    (folder / "m" / "model.toml").write_text(toml)
    return folder


async def ask(client: Any, value: float) -> float:
    tensor = triton.InferInput("x", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.full((1, 2), value, np.float32))
    return float((await client.infer("m", [tensor])).as_numpy("y")[0, 0])


async def test_instances_run_batches_side_by_side(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=20)

    def execute(inputs: Mapping[str, Array]) -> list[Array]:
        if inputs["x"][0, 0] > 0:  # the warm-up's are zeros
            together.wait()
        return [inputs["x"].copy()]

    monkeypatch.setattr("headrace.app.load_backends", lambda: {"fake": FakeBackend.make(execute)})
    models = place(tmp_path, "max_batch_size = 1\n[instances]\ncount = 3\n")
    async with serve_in_process(models, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        assert await asyncio.gather(*(ask(client, value) for value in (1, 2, 3))) == [1, 2, 3]


@pytest.mark.parametrize(("count", "is_inline"), [(1, True), (2, False)])
async def test_only_a_single_instance_runs_where_requests_arrive(
    count: int, is_inline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()

    def execute(inputs: Mapping[str, Array]) -> list[Array]:
        if inputs["x"][0, 0] > 0:
            threads.add(threading.get_ident())
        return [inputs["x"].copy()]

    monkeypatch.setattr("headrace.app.load_backends", lambda: {"fake": FakeBackend.make(execute)})
    models = place(tmp_path, f"[instances]\ncount = {count}\n")
    async with serve_in_process(models, transport="grpcio") as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        await ask(client, 1)
    assert threads
    assert (threading.get_ident() in threads) is is_inline
