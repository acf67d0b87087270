"""A whole server on the TensorRT backend, on stand-ins: what fake_tensorrt.py and fake_cuda.py say that this can show."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from fake_tensorrt import WIDTH, Machine, scaling
from headrace.backends.tensorrt import TensorRtBackend
from headrace.testing import serve_in_process

SETTINGS = """
backend = "tensorrt"
filename = "model.onnx"
max_batch_size = 16
{}
[instances.options]
cache_directory = "{}"
refit = "true"
"""


async def ask(client: Any, version: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return (await client.infer("m", [tensor], model_version=version)).as_numpy("y")


@pytest.mark.parametrize("settings", ["", "allowed_batch_sizes = [4, 16]"], ids=["any size", "padded"])
async def test_every_request_gets_its_own_answer_of_its_own_version(
    settings: str, transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setattr("headrace.app.load_backends", lambda: {"tensorrt": TensorRtBackend})
    models = tmp_path / "models"
    for version in (1, 2):
        onnx_models.save(scaling(float(version)), models / f"m/{version}")
    toml = f'version_policy = "all"\n{SETTINGS.format(settings, tmp_path / "engines")}'
    (models / "m" / "model.toml").write_text(toml)
    rng = np.random.default_rng(5)
    given = [rng.standard_normal((1 + number % 3, WIDTH), np.float32) for number in range(150)]

    async with serve_in_process(models, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        answers = await asyncio.gather(*(ask(client, str(1 + number % 2), x) for number, x in enumerate(given)))

    for number, (x, answer) in enumerate(zip(given, answers, strict=True)):
        np.testing.assert_array_equal(answer, x * np.float32(1 + number % 2))
    assert machine.graphs
    assert len(list((tmp_path / "engines").glob("*.plan"))) == 1, "versions of one graph share an engine"
    assert not machine.gpu.blocks, "all memory is back after the server"
