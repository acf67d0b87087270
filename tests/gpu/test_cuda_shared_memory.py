"""Tensors in CUDA memory of another process, on a real device: what the runtime in the host's memory cannot show.

The server is a process of its own, because the process that exported a handle cannot open it.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.gpu


def why_not() -> str:
    """Why there is no device to test on, or empty."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        return f"cuda-bindings is not installed ({error})"
    code, count = runtime.cudaGetDeviceCount()
    return "" if not code and count else f"no CUDA device can be used: {code!r}"


@pytest.fixture(scope="module")
def shm() -> Any:
    """The stock client's module."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    return importlib.import_module("tritonclient.utils.cuda_shared_memory")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where the model is: copied to the host, or read where it lies as far as the backend can."""
    return str(request.param)


@pytest.fixture
def client(shm: Any, device: str, tmp_path: Path) -> Iterator[triton.InferenceServerClient]:
    onnx_models.save(onnx_models.identity(), tmp_path / "numbers" / "1")
    (tmp_path / "numbers" / "model.toml").write_text(f"[instances]\ndevice = '{device}'\n")
    command = [sys.executable, "-m", "headrace.cli", "serve", "--models", str(tmp_path), "--grpc", "127.0.0.1:0", "--http", ""]
    command += ["--client-cuda-shared-memory", "--log-format", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    address = ""
    events = []
    for line in process.stderr:
        events.append(json.loads(line))
        if events[-1]["event"] == "server listening":
            address = events[-1]["grpc"][0]
        if events[-1]["event"] in ("server ready", "version live", "version failed"):
            break
    try:
        if "version failed" in [event["event"] for event in events]:
            pytest.skip(f"no model on '{device}': {events[-1].get('reason')}")
        with triton.InferenceServerClient(address) as client:
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture
def region(shm: Any) -> Iterator[Any]:
    """1 MiB of this process's on the first device."""
    handle = shm.create_shared_memory_region("region", 1 << 20, 0)
    yield handle
    shm.destroy_shared_memory_region(handle)


def register(client: triton.InferenceServerClient, shm: Any, region: Any, size: int = 1 << 20) -> None:
    client.register_cuda_shared_memory("region", shm.get_raw_handle(region), 0, size)


def test_tensors_go_and_come_in_place_for_many_sizes(client: triton.InferenceServerClient, shm: Any, region: Any) -> None:
    register(client, shm, region)
    rng = np.random.default_rng(7)
    for count in (1, 3, 64, 64, 17):
        given = rng.standard_normal((count, 4), np.float32)
        shm.set_shared_memory_region(region, [given])
        tensor = triton.InferInput("x", [count, 4], "FP32")
        tensor.set_shared_memory("region", given.nbytes)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("region", given.nbytes, 1 << 19)
        client.infer("numbers", [tensor], outputs=[output])
        taken = shm.get_contents_as_numpy(region, np.float32, [1 << 18])
        np.testing.assert_array_equal(taken[1 << 17 : (1 << 17) + given.size], given.ravel())


def test_more_than_the_allocation_is_refused(client: triton.InferenceServerClient, shm: Any, region: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"expected at most the .* bytes that its memory has"):
        register(client, shm, region, 1 << 30)
    register(client, shm, region)


def test_a_handle_of_nothing_is_refused_and_the_device_goes_on(client: triton.InferenceServerClient, shm: Any, region: Any) -> None:
    with pytest.raises(InferenceServerException, match="failed to open CUDA IPC handle"):
        client.register_cuda_shared_memory("nothing", b"A" * 84 + b"AA==", 0, 16)
    register(client, shm, region)
    assert client.get_cuda_shared_memory_status().regions["region"].byte_size == 1 << 20


def test_registering_a_thousand_times_leaves_no_memory_behind(client: triton.InferenceServerClient, shm: Any, region: Any) -> None:
    runtime = importlib.import_module("cuda.bindings.runtime")
    register(client, shm, region)
    client.unregister_cuda_shared_memory("region")
    _, before, _ = runtime.cudaMemGetInfo()
    for _ in range(1000):
        register(client, shm, region)
        client.unregister_cuda_shared_memory("region")
    _, after, _ = runtime.cudaMemGetInfo()
    assert after >= before - (16 << 20)
    assert not client.get_cuda_shared_memory_status().regions
