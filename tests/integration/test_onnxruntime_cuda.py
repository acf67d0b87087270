"""A whole server on the CUDA backend, on the host's memory: what fake_cuda.py says that this can show."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import onnxruntime
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from fake_cuda import HostBackend
from headrace.testing import serve_in_process


class Watched(HostBackend):
    made: list[HostBackend]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.made.append(self)


async def ask(client: Any, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return (await client.infer("m", [tensor])).as_numpy("y")


@pytest.mark.parametrize("settings", ["", "allowed_batch_sizes = [4, 16]\nmax_batch_size = 16\n"], ids=["any size", "padded"])
async def test_every_request_gets_its_own_answer(settings: str, transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type("Backend", (Watched,), {"made": []})
    monkeypatch.setattr("headrace.app.load_backends", lambda: {"onnxruntime": backend})
    model = onnx_models.mlp(16, 64, 4)
    reference = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    onnx_models.save(model, tmp_path / "m" / "1")
    (tmp_path / "m" / "model.toml").write_text(settings)
    rng = np.random.default_rng(5)
    given = [rng.standard_normal((1 + number % 3, 16), np.float32) for number in range(150)]

    async with serve_in_process(tmp_path, transport=transport) as server, aio.InferenceServerClient(server.grpc_addresses[0]) as client:
        answers = await asyncio.gather(*(ask(client, x) for x in given))

    for x, answer in zip(given, answers, strict=True):
        np.testing.assert_allclose(answer, reference.run(None, {"x": x})[0], rtol=1e-5, atol=1e-6)
    (instance,) = backend.made  # type: ignore[attr-defined]
    assert not instance.host.blocks, "all memory is back after the server"
