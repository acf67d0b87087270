"""A version whose answers are garbage, while it fails nothing and is as fast as ever, is rolled back by what drift counts of them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as client
from headrace.app import Server
from headrace.config import ServerConfig
from headrace.lifecycle.events import Event
from onnx import numpy_helper
from sklearn.datasets import load_digits

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "digits"
CLEAN = load_digits().data.astype(np.float32)
SETTINGS = """
[drift]
learn_rows = 600
budget = 0

[rollout]
mode = "canary"
percent = 50
probation_s = 0.5
min_requests = 100
max_latency_ratio = 0
"""


def send(address: str, requests: int, seed: int) -> None:
    """Requests of 8 random rows each, one after the other."""
    random = np.random.default_rng(seed)
    with client.InferenceServerClient(address) as stub:
        for _ in range(requests):
            rows = CLEAN[random.integers(0, len(CLEAN), 8)]
            tensor = client.InferInput("image", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            stub.infer("digits", [tensor])


def publish(repository: Path, version: int, *, is_mirrored: bool) -> None:
    """The example again; mirrored, it takes each picture's pixels in the opposite order."""
    model = onnx.load(EXAMPLE / "1" / "model.onnx")
    for weights in model.graph.initializer:
        if is_mirrored and weights.name == "w1":
            weights.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weights)[::-1]), "w1"))
    hidden = repository / f"version-{version}"
    hidden.mkdir()
    (hidden / "model.onnx").write_bytes(model.SerializeToString())
    hidden.rename(repository / "digits" / str(version))


async def decided(server: Server, version: int) -> Event:
    """What came of the trial, under load."""
    kinds = ("rolled_back", "promoted")
    async with asyncio.timeout(60):
        for seed in range(1000):
            await asyncio.to_thread(send, server.grpc_addresses[0], 20, seed)
            for event in server.models.event_log.since(0):
                if event.version == version and event.kind in kinds:
                    return event
    raise AssertionError(f"version {version} is still on trial")


@pytest.mark.parametrize("criterion", ["max_accuracy_drop = 0.02", "max_drift = 0.2"])
async def test_a_version_whose_answers_are_garbage_is_rolled_back_and_a_good_one_is_promoted(tmp_path: Path, criterion: str) -> None:
    repository = tmp_path / "models"
    shutil.copytree(EXAMPLE, repository / "digits")
    settings = repository / "digits" / "model.toml"
    settings.write_text(f"{settings.read_text()}{SETTINGS}{criterion}\n")
    server = Server(ServerConfig(models=(str(repository),), grpc=("127.0.0.1:0",), http="", poll_interval=0.1, settle=0))
    await server.start()
    try:
        await asyncio.to_thread(send, server.grpc_addresses[0], 100, 0)
        publish(repository, 2, is_mirrored=True)
        bad = await decided(server, 2)
        publish(repository, 3, is_mirrored=False)
        good = await decided(server, 3)
    finally:
        await server.stop()
    assert bad.kind == "rolled_back"
    expected = "estimated accuracy " if "accuracy" in criterion else "output probabilities."
    assert bad.reason.startswith(expected)
    assert ";" not in bad.reason.replace("; at most", ""), "nothing but the answers was wrong"
    assert good.kind == "promoted"
    assert "not judged" not in good.reason
