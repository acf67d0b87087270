"""Tensors in system shared memory, with the stock client's own module for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as triton
import tritonclient.utils.shared_memory as shm
from headrace.requests import Answer, InferRequest
from headrace.testing import serve_in_process
from scripted_models import ScriptedVersion, echo, hold
from served_models import Serve
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system keeps shared memory elsewhere")

Make = Callable[[str, int], Any]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """`make(name, size)`: a shared memory object of this test's own, its key is the handle's."""
    handles = []

    def create(name: str, size: int) -> Any:
        key = f"headrace_{abs(hash(tmp_path)):x}_{name}"
        handles.append(shm.create_shared_memory_region(name, key, size, create_only=True))
        return handles[-1]

    yield create
    for handle in handles:
        shm.destroy_shared_memory_region(handle)


@pytest.fixture
async def client(transport: str, tmp_path: Path) -> AsyncIterator[triton.InferenceServerClient]:
    """Of a server with four models: numbers [N,4] and matrix [2,4] give back x as y, words [N] in capitals; sums has two of each."""
    onnx_models.save(onnx_models.identity(), tmp_path / "numbers" / "1")
    onnx_models.save(onnx_models.fixed_batch(2), tmp_path / "matrix" / "1")
    onnx_models.save(onnx_models.strings_upper(), tmp_path / "words" / "1")
    onnx_models.save(onnx_models.two_inputs_two_outputs(), tmp_path / "sums" / "1")
    async with (
        serve_in_process(tmp_path, transport=transport, client_shared_memory=True) as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        yield client


async def register(client: triton.InferenceServerClient, handle: Any, size: int, offset: int = 0) -> None:
    await client.register_system_shared_memory(handle._triton_shm_name, handle._shm_key, size, offset)


def placed_input(region: str, shape: list[int], size: int, offset: int = 0, *, name: str = "x", datatype: str = "FP32") -> Any:
    tensor = triton.InferInput(name, shape, datatype)
    tensor.set_shared_memory(region, size, offset)
    return tensor


def placed_output(region: str, size: int, offset: int = 0, *, name: str = "y") -> Any:
    output = triton.InferRequestedOutput(name)
    output.set_shared_memory(region, size, offset)
    return output


def rows(count: int, start: float = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(start, start + 4 * count, dtype=np.float32).reshape(count, 4)


@pytest.mark.parametrize("model", ["numbers", "matrix"])
async def test_a_tensor_goes_and_comes_by_shared_memory(client: triton.InferenceServerClient, make: Make, model: str) -> None:
    given, taken = make("in", 40), make("out", 64)
    await register(client, given, 40)
    await register(client, taken, 56, offset=8)
    shm.set_shared_memory_region(given, [rows(2)], offset=8)
    result = await client.infer(model, [placed_input("in", [2, 4], 32, 8)], outputs=[placed_output("out", 48, 4)])
    np.testing.assert_array_equal(shm.get_contents_as_numpy(taken, np.float32, [2, 4], offset=12), rows(2))
    response = result.get_response()
    (output,) = response.outputs
    assert (list(output.shape), list(response.raw_output_contents)) == ([2, 4], [b""])
    assert output.parameters["shared_memory_region"].string_param == "out"
    assert (output.parameters["shared_memory_byte_size"].int64_param, output.parameters["shared_memory_offset"].int64_param) == (32, 4)


async def test_tensors_in_regions_and_in_messages_mix(client: triton.InferenceServerClient, make: Make) -> None:
    region = make("all", 64)
    await register(client, region, 64)
    shm.set_shared_memory_region(region, [np.ones((2, 3), np.float32)])
    sent = triton.InferInput("b", [2, 3], "FP32")
    sent.set_data_from_numpy(np.full((2, 3), 2, np.float32))
    wanted = [placed_output("all", 24, 24, name="product"), triton.InferRequestedOutput("sum")]
    result = await client.infer("sums", [placed_input("all", [2, 3], 24, name="a"), sent], outputs=wanted)
    assert result.as_numpy("sum").tolist() == [[3, 3, 3]] * 2
    assert shm.get_contents_as_numpy(region, np.float32, [2, 3], offset=24).tolist() == [[2, 2, 2]] * 2


async def test_strings_go_and_come_by_shared_memory(client: triton.InferenceServerClient, make: Make) -> None:
    region = make("words", 128)
    await register(client, region, 128)
    content = serialize_byte_tensor(np.array(["fish", "chips"], object))
    shm.set_shared_memory_region(region, [content])
    size = len(content.item())
    result = await client.infer("words", [placed_input("words", [2], size, datatype="BYTES")], outputs=[placed_output("words", 64, 64)])
    assert result.get_output("y").parameters["shared_memory_byte_size"].int64_param == size
    assert shm.get_contents_as_numpy(region, np.object_, [2], offset=64).tolist() == [b"FISH", b"CHIPS"]


async def test_many_at_once_each_get_their_own(client: triton.InferenceServerClient, make: Make) -> None:
    given, taken = make("in", 16 * 64), make("out", 16 * 64)
    await register(client, given, 16 * 64)
    await register(client, taken, 16 * 64)
    shm.set_shared_memory_region(given, [rows(64)])
    calls = [
        client.infer("numbers", [placed_input("in", [1, 4], 16, 16 * i)], outputs=[placed_output("out", 16, 16 * (63 - i))])
        for i in range(64)
    ]
    await asyncio.gather(*calls)
    np.testing.assert_array_equal(shm.get_contents_as_numpy(taken, np.float32, [64, 4]), rows(64)[::-1])


async def test_streams_use_regions_too(client: triton.InferenceServerClient, make: Make) -> None:
    region = make("both", 32)
    await register(client, region, 32)
    shm.set_shared_memory_region(region, [rows(1)])

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for name in ("both", "nowhere"):
            tensors = [placed_input(name, [1, 4], 16)]
            yield {"model_name": "numbers", "inputs": tensors, "outputs": [placed_output("both", 16, 16)], "request_id": name}

    (result, _), (_, error) = [answer async for answer in client.stream_infer(requests())]
    assert result.get_response().parameters["triton_final_response"].bool_param
    assert list(result.get_response().raw_output_contents) == [b""]
    np.testing.assert_array_equal(shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=16), rows(1))
    assert "Unable to find shared memory region: 'nowhere'" in str(error)


@pytest.mark.parametrize(
    ("tensor", "output", "status", "text"),
    [
        (placed_input("r", [1, 4], 12), None, "INVALID_ARGUMENT", "input byte size mismatch for input 'x' .* Expected 16, got 12"),
        (placed_input("r", [1, 4], 16, 33), None, "INVALID_ARGUMENT", "Invalid offset . byte size for shared memory region: 'r'"),
        (placed_input("r", [1, 4], 16, 48), None, "INVALID_ARGUMENT", "Invalid offset for shared memory region: 'r'"),
        (placed_input("s", [1, 4], 16), None, "NOT_FOUND", "Unable to find shared memory region: 's'"),
        (placed_input("r", [1, 4], 16), ("r", 12, 32), "INVALID_ARGUMENT", "output 'y' .12 bytes .* at least 16 bytes"),
        (placed_input("r", [1, 4], 16), ("s", 16), "NOT_FOUND", "Unable to find shared memory region: 's'"),
    ],
)
async def test_what_does_not_fit_is_refused_and_nothing_is_written(
    client: triton.InferenceServerClient, make: Make, tensor: Any, output: tuple[Any, ...] | None, status: str, text: str
) -> None:
    region = make("r", 48)
    await register(client, region, 48)
    with pytest.raises(InferenceServerException, match=text) as raised:
        await client.infer("numbers", [tensor], outputs=[placed_output(*output)] if output else None)
    assert raised.value.status() == f"StatusCode.{status}"
    assert not shm.get_contents_as_numpy(region, np.uint8, [48]).any()


async def test_regions_are_listed_and_forgotten_one_by_one_or_all(client: triton.InferenceServerClient, make: Make) -> None:
    for name in "abc":
        await register(client, make(name, 64), 16, offset=16)
    assert "system_shared_memory" in (await client.get_server_metadata()).extensions
    (found,) = (await client.get_system_shared_memory_status("a")).regions.values()
    assert (found.name, found.offset, found.byte_size) == ("a", 16, 16)
    await client.unregister_system_shared_memory("a")
    assert set((await client.get_system_shared_memory_status()).regions) == {"b", "c"}
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region: 'a'"):
        await client.get_system_shared_memory_status("a")
    with pytest.raises(InferenceServerException, match="already in manager") as raised:
        await client.register_system_shared_memory("b", "/b", 16)
    assert raised.value.status() == "StatusCode.ALREADY_EXISTS"
    await client.unregister_system_shared_memory()
    assert not (await client.get_system_shared_memory_status()).regions


async def test_cuda_regions_are_not_offered_and_forgetting_them_all_is_no_error(client: triton.InferenceServerClient) -> None:
    await client.unregister_cuda_shared_memory()
    for call in (client.register_cuda_shared_memory("c", b"aGFuZGxl", 0, 8), client.get_cuda_shared_memory_status()):
        with pytest.raises(InferenceServerException, match="CUDA shared memory is not supported") as raised:
            await call
        assert raised.value.status() == "StatusCode.UNIMPLEMENTED"


def write(version: ScriptedVersion, request: InferRequest) -> Answer:
    assert request.destinations is not None
    assert request.destinations[0] is not None
    request.destinations[0].view[:] = request.inputs[0].data
    return echo(version, request)


async def test_a_region_that_is_unregistered_stays_until_its_requests_are_answered(serve: Serve, make: Make) -> None:
    region, version = make("r", 32), ScriptedVersion(script=hold)
    async with serve(version, client_shared_memory=True) as served, triton.InferenceServerClient(served.address) as client:
        await register(client, region, 32)
        shm.set_shared_memory_region(region, [rows(1)])
        call = asyncio.ensure_future(client.infer("echo", [placed_input("r", [1, 4], 16)], outputs=[placed_output("r", 16, 16)]))
        await version.until(lambda: version.held != {})
        await client.unregister_system_shared_memory("r")
        await register(client, region, 8)  # the name is free at once
        version.release(write)
        await call
    np.testing.assert_array_equal(shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=16), rows(1))


async def test_where_it_is_off_registration_and_requests_name_the_flag(serve: Serve) -> None:
    async with serve(ScriptedVersion()) as served, triton.InferenceServerClient(served.address) as client:
        assert "system_shared_memory" not in (await client.get_server_metadata()).extensions
        sent = triton.InferInput("x", [1, 4], "FP32")
        sent.set_data_from_numpy(rows(1))
        for call in (
            client.register_system_shared_memory("r", "/r", 8),
            client.unregister_system_shared_memory(),
            client.get_system_shared_memory_status(),
            client.unregister_cuda_shared_memory(),
            client.infer("echo", [placed_input("r", [1, 4], 16)]),
            client.infer("echo", [sent], outputs=[placed_output("r", 16)]),
        ):
            with pytest.raises(InferenceServerException, match=r"Client shared memory is disabled.*--client-shared-memory") as raised:
                await call
            assert raised.value.status() == "StatusCode.UNIMPLEMENTED"


def test_headrace_serve_takes_the_flag(transport: str, tmp_path: Path, make: Make) -> None:
    onnx_models.save(onnx_models.mlp(16, 64, 64, 4), tmp_path / "mlp" / "1")
    command = [sys.executable, "-m", "headrace.cli", "serve", "--models", str(tmp_path), "--http", "", "--client-shared-memory"]
    socket = tmp_path / "s"
    with subprocess.Popen([*command, "--grpc", f"unix:{socket}", "--transport", transport], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            assert any("server ready" in line for line in server.stderr)
            region = make("r", 128)
            with sync_client.InferenceServerClient(f"unix:{socket}") as client:
                client.register_system_shared_memory("r", region._shm_key, 128)
                x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
                shm.set_shared_memory_region(region, [x])
                sent = sync_client.InferInput("x", [1, 16], "FP32")
                sent.set_data_from_numpy(x)
                expected = client.infer("mlp", [sent]).as_numpy("y")
                client.infer("mlp", [placed_input("r", [1, 16], 64)], outputs=[placed_output("r", 64, 64)])
            np.testing.assert_array_equal(shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=64), expected)
        finally:
            server.terminate()
            server.stderr.read()
