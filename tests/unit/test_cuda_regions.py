"""Regions of CUDA memory, over a runtime in the host's memory."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from fake_cuda_runtime import Code, FakeCuda, install
from headrace import cuda_regions
from headrace.client_memory import ClientMemory
from headrace.cuda_regions import CudaRegions
from headrace.cuda_runtime import CudaMemory, CudaMissing, Driver, Runtime
from headrace.errors import AlreadyExists, BackendError, InvalidRequest, NotFound


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def regions(cuda: FakeCuda) -> CudaRegions:
    return CudaRegions(lambda: CudaMemory(cuda, cuda))


def test_a_part_is_read_and_written_where_the_client_has_it(cuda: FakeCuda, regions: CudaRegions) -> None:
    handle, buffer = cuda.allocate(64)
    buffer[:] = bytes(range(64))
    regions.register("r", handle, 1, 48)
    part = regions.view("r", 8, 16)
    assert (part.device, part.nbytes, bytes(part.read())) == ("cuda:1", 16, bytes(range(8, 24)))
    part.write(b"new")
    assert buffer[:12] == bytes(range(8)) + b"new" + bytes([11])
    assert cuda.pending == 0, "it was not waited for"
    assert cuda.device == 0, "the thread's own device was changed"


def test_a_thread_without_a_device_wakes_the_regions_own_alone(cuda: FakeCuda, regions: CudaRegions) -> None:
    handle, _ = cuda.allocate(8)
    cuda.has_context = False
    regions.register("r", handle, 1, 8)
    regions.view("r", 0, 8).read()
    assert cuda.contexts == {1}


@pytest.mark.parametrize(
    ("size", "device", "handle", "text"),
    [
        (65, 0, None, "expected at most the 64 bytes that its memory has, got 65"),
        (0, 0, None, "expected a byte_size above 0, got 0"),
        (8, 2, None, "failed to open CUDA IPC handle: expected a device_id from 0 to 1, got 2"),
        (8, -1, None, "failed to open CUDA IPC handle: expected a device_id from 0 to 1, got -1"),
        (8, 0, b"", "expected a cudaIpcMemHandle of 64 bytes, got 0"),
        (8, 0, bytes(64), "failed to open CUDA IPC handle: invalid argument"),
    ],
)
def test_what_cannot_be_registered_leaves_nothing_open(
    cuda: FakeCuda, regions: CudaRegions, size: int, device: int, handle: bytes | None, text: str
) -> None:
    raw, _ = cuda.allocate(64)
    with pytest.raises(InvalidRequest, match=f"failed to register CUDA shared memory region 'r': {text}"):
        regions.register("r", raw if handle is None else handle, device, size)
    assert (cuda.opened, regions.status_of_all()) == ([], [])
    regions.register("r", raw, 0, 64)


def test_a_region_is_closed_on_its_device_by_the_last_who_uses_it(cuda: FakeCuda, regions: CudaRegions) -> None:
    handle, buffer = cuda.allocate(8)
    buffer[:] = b"content!"
    regions.register("r", handle, 1, 8)
    part = regions.view("r", 0, 8)
    regions.unregister("r")
    with pytest.raises(NotFound):
        regions.view("r", 0, 8)
    regions.register("r", handle, 0, 8)
    assert bytes(part.read()) == b"content!"
    assert len(cuda.opened) == 2
    del part
    assert [device for device, _ in cuda.opened] == [0]
    regions.unregister_all()
    assert cuda.opened == []
    regions.unregister("r")


def test_names_are_taken_once_and_their_number_is_bounded(cuda: FakeCuda, regions: CudaRegions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_regions, "MAX_REGIONS", 2)
    handle, _ = cuda.allocate(8)
    regions.register("a", handle, 0, 8)
    with pytest.raises(AlreadyExists, match="shared memory region 'a' already in manager"):
        regions.register("a", handle, 0, 8)
    regions.register("b", handle, 0, 8)
    with pytest.raises(InvalidRequest, match="expected at most 2 regions, there are 2"):
        regions.register("c", handle, 0, 8)
    assert [status.name for status in regions.status_of_all()] == ["a", "b"]


@pytest.mark.parametrize(("offset", "size", "text"), [(8, 1, "Invalid offset for"), (4, 5, "Invalid offset . byte size for")])
def test_a_part_is_within_its_region(cuda: FakeCuda, regions: CudaRegions, offset: int, size: int, text: str) -> None:
    handle, _ = cuda.allocate(64)
    regions.register("r", handle, 0, 8)
    with pytest.raises(InvalidRequest, match=f"{text} shared memory region: 'r'"):
        regions.view("r", offset, size)


def test_a_copy_that_fails_says_why(cuda: FakeCuda, regions: CudaRegions) -> None:
    handle, _ = cuda.allocate(8)
    regions.register("r", handle, 1, 8)
    cuda.failing = Code.ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match="on device 1 could not be copied: an illegal memory access was encountered"):
        regions.view("r", 0, 8).read()


@pytest.mark.parametrize(
    ("cuda", "text"),
    [
        (FakeCuda(0), "no CUDA device can be used: CUDA driver version is insufficient for CUDA runtime version"),
        (None, "the package cuda-bindings is not there .*; pip install 'cuda-bindings"),
    ],
)
def test_without_cuda_it_says_what_is_missing_and_status_is_empty(
    cuda: FakeCuda | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, cuda)
    regions = CudaRegions()
    with pytest.raises(InvalidRequest, match=f"failed to register CUDA shared memory region: 'r', GPUs not supported: {text}"):
        regions.register("r", bytes(64), 0, 8)
    assert regions.status_of_all() == []
    with pytest.raises(NotFound, match="Unable to find cuda shared memory region: 'r'"):
        regions.status("r")
    regions.unregister_all()


def test_one_name_is_of_one_kind(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda)
    memory = ClientMemory.make(with_system=True, with_cuda=True)
    assert memory is not None
    assert memory.system is not None
    assert memory.cuda is not None
    memory.cuda.register("r", cuda.allocate(8)[0], 0, 8)
    with pytest.raises(AlreadyExists):
        memory.system.register("r", "/r", 0, 8)
    with pytest.raises(NotFound, match="The region named 'r' is registered as CUDA shared memory, not system shared memory"):
        memory.system.status("r")
    memory.close()
    assert cuda.opened == []


@pytest.mark.parametrize("name", ["a", "b"])
def test_neither_kind_is_there_unless_it_is_asked_for(name: str) -> None:
    assert ClientMemory.make(with_system=False, with_cuda=False) is None
    only = ClientMemory.make(with_system=False, with_cuda=True)
    assert only is not None
    with pytest.raises(NotFound, match=f"Unable to find shared memory region: '{name}'"):
        only.view(name, 0, 1)


def members(protocol: Any) -> list[str]:
    return [name for name in {**protocol.__annotations__, **vars(protocol)} if name.startswith(("cu", "cuda"))]


def test_the_real_bindings_have_what_is_called_and_say_what_is_missing_without_a_driver() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    from cuda.bindings import driver

    for protocol, module in ((Runtime, runtime), (Driver, driver)):
        names = members(protocol)
        assert names
        for name in names:
            assert hasattr(module, name), name
            assert hasattr(FakeCuda, name), f"the fake has no {name}"
    assert runtime.CUDA_IPC_HANDLE_SIZE == 64
    assert runtime.cudaIpcMemLazyEnablePeerAccess == FakeCuda.cudaIpcMemLazyEnablePeerAccess
    assert inspect.isclass(runtime.cudaIpcMemHandle_t)
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal == FakeCuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert not int(driver.CUcontext())
    if runtime.cudaGetDeviceCount()[0]:
        with pytest.raises(CudaMissing, match="no CUDA device can be used: "):
            CudaMemory.load()
