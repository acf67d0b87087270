"""What of CUDA can be said without a GPU: why it cannot be used, what errors mean, and where tensors lie in a lane's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from fake_cuda import HostGpu
from headrace.backends import cuda
from headrace.backends.cuda_lanes import ALIGNMENT, Completion, Lanes, Slab, lay_out
from headrace.errors import BackendError, DeviceLost, LoadError

FLOAT = np.dtype(np.float32)
BYTE = np.dtype(np.uint8)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    cuda.cuda_unavailable.cache_clear()
    yield
    cuda.cuda_unavailable.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **driver: object) -> None:
    """Stand-ins for cuda.core and cuda.bindings, of which only what is asked first is there."""
    bindings, core, package = ModuleType("cuda.bindings"), ModuleType("cuda.core"), ModuleType("cuda")
    codes = SimpleNamespace(CUDA_ERROR_NO_DEVICE=100)
    names = {
        "cuGetErrorName": lambda code: (0, b"CUDA_ERROR_NOT_INITIALIZED"),
        "cuGetErrorString": lambda code: (0, b"initialization error"),
    }
    bindings.driver = SimpleNamespace(CUresult=codes, **names, **driver)  # type: ignore[attr-defined]
    core.Device = object  # type: ignore[attr-defined]
    for name, module in (("cuda", package), ("cuda.bindings", bindings), ("cuda.core", core)):
        monkeypatch.setitem(sys.modules, name, module)


# -- whether there is any ----------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert "the Python package cuda-core is not there" in cuda.cuda_unavailable()
    assert "pip install cuda-core" in cuda.cuda_unavailable()
    assert cuda.device_count() == 0
    with pytest.raises(LoadError, match="device 'cuda:0': the Python package cuda-core is not there"):
        cuda.open_device("cuda:0")


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(flags: int) -> None:
        raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.')

    install(monkeypatch, cuInit=not_found)
    assert cuda.cuda_unavailable() == "the NVIDIA driver is not there (libcuda.so.1)"


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuInit=lambda flags: (100,))
    assert "finds no GPU (CUDA_ERROR_NO_DEVICE)" in cuda.cuda_unavailable()


def test_another_failure_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuInit=lambda flags: (3,))
    assert cuda.cuda_unavailable() == ("the NVIDIA driver cannot be used: cuInit: CUDA_ERROR_NOT_INITIALIZED (initialization error)")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuInit=lambda flags: (0,), cuDeviceGetCount=lambda: (0, 2))
    assert cuda.cuda_unavailable() == ""
    assert cuda.open_device("cuda:1").ordinal == 1
    with pytest.raises(LoadError, match="device 'cuda:2': expected one below cuda:2, as this process sees 2"):
        cuda.open_device("cuda:2")


@pytest.mark.parametrize(("device", "ordinal"), [("cuda", 0), ("auto", 0), ("cuda:0", 0), ("cuda:11", 11)])
def test_ordinals(device: str, ordinal: int) -> None:
    assert cuda.device_ordinal(device) == ordinal


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "cuEventSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)",
        "CUDA_ERROR_LAUNCH_FAILED: An exception occurred on the device while executing a kernel.",
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h ; file=cuda_call.cc",
        "CUDA failure 214: uncorrectable ECC error encountered ; GPU=0",
        "CUDA error 719: unspecified launch failure",
        "Error Code 1: Cuda Runtime (unspecified launch failure)",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
    ],
)
def test_errors_after_which_nothing_runs_any_more(text: str) -> None:
    assert cuda.is_device_lost(text)
    assert type(cuda.device_error("onnxruntime", RuntimeError(text))) is DeviceLost


@pytest.mark.parametrize(
    "text",
    [
        "cuMemAlloc of 10 bytes on cuda:0: CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=h",
        "CUDA_ERROR_INVALID_VALUE",
        "Got invalid dimensions for input: x index: 1 Got: 700 Expected: 4",
        "cudaErrorInvalidValue",
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "cudaErrorDevicesUnavailable",
        "CUDA failure 101: invalid device ordinal ; GPU=7",
        "",
    ],
)
def test_errors_of_one_batch(text: str) -> None:
    assert not cuda.is_device_lost(text)
    error = cuda.device_error("onnxruntime", RuntimeError(text))
    assert type(error) is BackendError
    assert str(error).startswith("onnxruntime: ")


# -- lanes -------------------------------------------------------------------------------------------------------------


def test_tensors_lie_aligned_one_behind_the_other() -> None:
    layout = lay_out({"a": ((3, 5), BYTE), "b": ((2,), FLOAT), "empty": ((0, 7), FLOAT), "scalar": ((), FLOAT)})
    assert {name: place.offset for name, place in layout.places.items()} == {"a": 0, "b": ALIGNMENT, "empty": 512, "scalar": 512}
    assert layout.size == 512 + 4
    assert lay_out({}).size == 0


def test_a_slab_grows_by_need_to_its_bound_and_keeps_what_fits() -> None:
    gpu = HostGpu()
    slab = Slab(gpu, limit=300_000)
    sizes = []
    for need in (1, 65_536, 65_537, 200_000, 10):
        slab.reserve(need)
        sizes.append((slab.size, slab.generation))
    assert sizes == [(65_536, 1), (65_536, 1), (131_072, 2), (262_144, 3), (262_144, 3)]
    assert len(gpu.blocks) == 2, "one on the device, one on the host"
    slab.reserve(300_000)
    with pytest.raises(BackendError, match="take 300001 bytes: expected at most 300000"):
        slab.reserve(300_001)
    slab.close()
    assert not gpu.blocks


def test_a_slab_that_gets_no_memory_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HostGpu()

    def refuse(size: int) -> int:
        raise cuda.CudaError("cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY (out of memory)")

    monkeypatch.setattr(gpu, "allocate_pinned", refuse)
    slab = Slab(gpu)
    with pytest.raises(cuda.CudaError):
        slab.reserve(10)
    assert slab.size == 0
    slab.close()
    assert not gpu.blocks


def test_what_goes_up_comes_down_when_it_is_waited_for() -> None:
    gpu = HostGpu()
    lanes = Lanes(gpu, 2)
    lane = lanes.take()
    layout = lay_out({"a": ((4,), FLOAT), "b": ((2,), BYTE)})
    lane.inputs.reserve(layout.size)
    lane.outputs.reserve(layout.size)
    lane.inputs.array(layout.places["a"])[...] = 7
    lane.upload(layout.size)
    gpu.copy(lane.outputs.address(layout.places["a"]), lane.inputs.address(layout.places["a"]), 16, lane.streams.compute)
    lane.download(layout.size)
    result = lane.outputs.array(layout.places["a"])
    assert not (result == 7).any(), "nobody has waited yet"

    pending = Completion("m", lanes, lane, [result])

    assert (pending.wait()[0] == 7).all()
    assert gpu.copied == [258, 16, 258]
    pending.release()
    assert lanes.take() is lanes.all[1]
    assert lanes.take() is lane
    with pytest.raises(BackendError, match="at most 2 batches"):
        lanes.take()


def test_closing_gives_back_memory_events_and_streams() -> None:
    gpu = HostGpu()
    lanes = Lanes(gpu, 2)
    for lane in lanes.all:
        for slab in (lane.inputs, lane.outputs, lane.scratch):
            slab.reserve(1)
    assert len(gpu.blocks) == 2 * 5
    lanes.close()
    assert not gpu.blocks
    assert all(each.is_closed for each in [*gpu.streams, *gpu.events])


def test_the_calls_of_the_bindings_are_there() -> None:
    """Where cuda-core is installed: the names that Gpu calls, with what they take. That they do what is meant only a GPU shows."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-core is not installed")
    core = pytest.importorskip("cuda.core")
    calls = (
        "cuInit", "cuDeviceGetCount", "cuGetErrorName", "cuGetErrorString", "cuThreadExchangeStreamCaptureMode", "cuMemGetInfo",
        "cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuMemcpyAsync",
    )  # fmt: skip
    assert all(callable(getattr(driver, name)) for name in calls)
    assert isinstance(driver.CU_MEMHOSTALLOC_PORTABLE, int)
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.name
    assert core.StreamOptions(nonblocking=True).nonblocking
    assert core.EventOptions(blocking_sync=True).blocking_sync
    lost = {getattr(driver.CUresult, f"CUDA_ERROR_{name}").value for name in cuda._LOST.values()}
    assert lost == set(cuda._LOST)
