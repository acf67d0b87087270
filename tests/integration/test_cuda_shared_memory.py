"""Tensors in CUDA memory of the client's, with the stock client, over a runtime in the host's memory."""

from __future__ import annotations

import asyncio
import base64
import ctypes
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc.aio as triton
from devices import DeviceBackend
from fake_cuda_runtime import Code, CopyKind, FakeCuda, install
from headrace.backends.base import Array, DeviceArray
from headrace.testing import serve_in_process
from tritonclient.utils import InferenceServerException, serialize_byte_tensor


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    install(monkeypatch, cuda)
    return cuda


@pytest.fixture
async def client(transport: str, tmp_path: Path, cuda: FakeCuda) -> AsyncIterator[triton.InferenceServerClient]:
    """Of a server on the host with numbers [N,4], which gives back x as y, and words [N], in capitals."""
    onnx_models.save(onnx_models.identity(), tmp_path / "numbers" / "1")
    onnx_models.save(onnx_models.strings_upper(), tmp_path / "words" / "1")
    async with (
        serve_in_process(tmp_path, transport=transport, client_shared_memory=True, client_cuda_shared_memory=True) as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        yield client
    assert cuda.opened == [], "the server has stopped and holds on to its clients' memory"


async def register(client: triton.InferenceServerClient, cuda: FakeCuda, name: str, size: int, device: int = 0) -> Any:
    """The client's memory."""
    handle, buffer = cuda.allocate(size)
    await client.register_cuda_shared_memory(name, base64.b64encode(handle), device, size)
    return buffer


def placed_input(region: str, shape: list[int], size: int, offset: int = 0, *, datatype: str = "FP32") -> Any:
    tensor = triton.InferInput("x", shape, datatype)
    tensor.set_shared_memory(region, size, offset)
    return tensor


def placed_output(region: str, size: int, offset: int = 0) -> Any:
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory(region, size, offset)
    return output


def rows(count: int, start: float = 0) -> Any:
    return np.arange(start, start + 4 * count, dtype=np.float32).reshape(count, 4)


async def test_a_tensor_goes_and_comes_by_device_memory_with_one_copy_each_way(
    client: triton.InferenceServerClient, cuda: FakeCuda
) -> None:
    given, taken = await register(client, cuda, "in", 40, device=1), await register(client, cuda, "out", 64)
    given[8:] = rows(2).tobytes()
    result = await client.infer("numbers", [placed_input("in", [2, 4], 32, 8)], outputs=[placed_output("out", 48, 16)])
    assert bytes(taken[16:48]) == rows(2).tobytes()
    assert cuda.copies == [CopyKind.cudaMemcpyDeviceToHost, CopyKind.cudaMemcpyHostToDevice]
    (output,) = result.get_response().outputs
    assert list(result.get_response().raw_output_contents) == [b""]
    assert output.parameters["shared_memory_region"].string_param == "out"
    assert output.parameters["shared_memory_byte_size"].int64_param == 32


async def test_many_at_once_each_get_their_own(client: triton.InferenceServerClient, cuda: FakeCuda) -> None:
    given, taken = await register(client, cuda, "in", 16 * 64), await register(client, cuda, "out", 16 * 64)
    given[:] = rows(64).tobytes()
    calls = [
        client.infer("numbers", [placed_input("in", [1, 4], 16, 16 * i)], outputs=[placed_output("out", 16, 16 * (63 - i))])
        for i in range(64)
    ]
    await asyncio.gather(*calls)
    assert bytes(taken) == rows(64)[::-1].tobytes()


async def test_strings_go_and_come_by_device_memory(client: triton.InferenceServerClient, cuda: FakeCuda) -> None:
    region = await register(client, cuda, "words", 128)
    content = serialize_byte_tensor(np.array(["fish", "chips"], object)).item()
    region[: len(content)] = content
    await client.infer("words", [placed_input("words", [2], len(content), datatype="BYTES")], outputs=[placed_output("words", 64, 64)])
    assert bytes(region[64 : 64 + len(content)]) == content.upper()


async def test_regions_are_listed_and_forgotten_one_by_one_or_all(client: triton.InferenceServerClient, cuda: FakeCuda) -> None:
    for name in "abc":
        await register(client, cuda, name, 64, device=1)
    assert "cuda_shared_memory" in (await client.get_server_metadata()).extensions
    (found,) = (await client.get_cuda_shared_memory_status("a")).regions.values()
    assert (found.name, found.device_id, found.byte_size) == ("a", 1, 64)
    await client.unregister_cuda_shared_memory("a")
    await client.unregister_cuda_shared_memory("never there")
    assert set((await client.get_cuda_shared_memory_status()).regions) == {"b", "c"}
    with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 'a'"):
        await client.get_cuda_shared_memory_status("a")
    with pytest.raises(InferenceServerException, match="shared memory region 'b' already in manager") as raised:
        await register(client, cuda, "b", 64)
    assert raised.value.status() == "StatusCode.ALREADY_EXISTS"
    await client.unregister_cuda_shared_memory()
    assert not (await client.get_cuda_shared_memory_status()).regions
    assert cuda.opened == []


async def test_what_does_not_fit_is_refused_and_nothing_is_written(client: triton.InferenceServerClient, cuda: FakeCuda) -> None:
    region = await register(client, cuda, "r", 48)
    for tensor, output, text in (
        (placed_input("r", [1, 4], 12), None, "input byte size mismatch for input 'x' .* Expected 16, got 12"),
        (placed_input("r", [1, 4], 16, 33), None, "Invalid offset . byte size for shared memory region: 'r'"),
        (placed_input("r", [1, 4], 16), placed_output("r", 12, 32), r"output 'y' \(12 bytes .* at least 16 bytes"),
        (placed_input("s", [1, 4], 16), None, "Unable to find shared memory region: 's'"),
    ):
        with pytest.raises(InferenceServerException, match=text):
            await client.infer("numbers", [tensor], outputs=[output] if output else None)
    with pytest.raises(InferenceServerException, match="failed to register CUDA shared memory region 'c': failed to open CUDA IPC handle"):
        await client.register_cuda_shared_memory("c", base64.b64encode(bytes(64)), 0, 8)
    assert bytes(region) == bytes(48)


async def test_a_copy_that_fails_fails_its_request_alone(client: triton.InferenceServerClient, cuda: FakeCuda) -> None:
    await register(client, cuda, "r", 32)
    cuda.failing = Code.ILLEGAL_ADDRESS
    for outputs in (None, [placed_output("r", 16, 16)]):
        with pytest.raises(InferenceServerException, match="an illegal memory access was encountered") as raised:
            await client.infer("numbers", [placed_input("r", [1, 4], 16)], outputs=outputs)
        assert raised.value.status() == "StatusCode.INTERNAL"
    sent = triton.InferInput("x", [1, 4], "FP32")
    sent.set_data_from_numpy(rows(1))
    np.testing.assert_array_equal((await client.infer("numbers", [sent])).as_numpy("y"), rows(1))


class Reading(DeviceBackend):
    """Reads inputs on its device where they are; `lent` keeps what it was given."""

    accepts_device_inputs = True
    lent: ClassVar[list[DeviceArray]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lent: Mapping[str, DeviceArray] = {}

    def lend(self, inputs: Mapping[str, DeviceArray]) -> None:
        self._lent = inputs

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        lent, self._lent = self._lent, {}
        self.lent.extend(lent.values())
        read = {}
        for name, array in lent.items():
            size = int(np.prod(array.shape)) * array.dtype.itemsize
            read[name] = np.frombuffer(ctypes.string_at(array.pointer, size), array.dtype).reshape(array.shape)
        return super().execute({**inputs, **read}, outputs)


@pytest.mark.parametrize(("device", "is_lent"), [(0, True), (1, False)])
async def test_a_backend_that_can_reads_an_input_on_its_device_where_it_is(
    transport: str, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, device: int, is_lent: bool
) -> None:
    backend: Any = Reading.make_on("cuda:0", lent=[])
    monkeypatch.setattr("headrace.app.load_backends", lambda: {"fake": backend})
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.fake").touch()
    async with (
        serve_in_process(tmp_path, transport=transport, client_cuda_shared_memory=True) as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        region = await register(client, cuda, "r", 24, device)
        region[8:] = np.array([[1, 2], [3, 4]], np.float32).tobytes()
        result = await client.infer("m", [placed_input("r", [2, 2], 16, 8)])
        assert result.as_numpy("y").tolist() == [[1, 2], [3, 4]]
        assert len(backend.lent) == is_lent
        assert cuda.copies == ([] if is_lent else [CopyKind.cudaMemcpyDeviceToHost])
        if is_lent:
            (lent,) = backend.lent
            assert (lent.device, lent.pointer, lent.shape, lent.dtype) == ("cuda:0", ctypes.addressof(region) + 8, (2, 2), np.float32)
        lent = None
        backend.lent.clear()
    assert cuda.opened == []


async def test_values_are_checked_in_device_memory_too(
    transport: str, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.app.load_backends", lambda: {"fake": Reading.make_on("cuda:0", lent=[])})
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.fake").touch()
    (tmp_path / "m" / "model.toml").write_text('[[input]]\nname = "x"\nmaximum = 5.0\non_invalid = "refuse"\n')
    async with (
        serve_in_process(tmp_path, transport=transport, client_cuda_shared_memory=True) as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        region = await register(client, cuda, "r", 8)
        region[:] = np.array([1, 6], np.float32).tobytes()
        with pytest.raises(InferenceServerException, match="at most 5"):
            await client.infer("m", [placed_input("r", [1, 2], 8)])


@pytest.mark.parametrize(("installed", "text"), [(True, "no CUDA device can be used"), (False, "the package cuda-bindings is not there")])
async def test_without_a_gpu_registering_says_what_is_missing_and_the_rest_is_no_error(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, text: str
) -> None:
    install(monkeypatch, FakeCuda(devices=0) if installed else None)
    async with (
        serve_in_process(tmp_path, transport=transport, client_cuda_shared_memory=True) as server,
        triton.InferenceServerClient(server.grpc_addresses[0]) as client,
    ):
        await client.unregister_cuda_shared_memory()
        with pytest.raises(InferenceServerException, match=f"'c', GPUs not supported: {text}") as raised:
            await client.register_cuda_shared_memory("c", base64.b64encode(bytes(64)), 0, 8)
        assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert not (await client.get_cuda_shared_memory_status()).regions
        with pytest.raises(InferenceServerException, match="Client shared memory is disabled"):
            await client.get_system_shared_memory_status()
