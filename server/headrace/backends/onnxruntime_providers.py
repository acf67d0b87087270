"""ONNX Runtime's execution providers on a GPU: whether they can be used, with which options, and whether a session really has them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from headrace.backends.base import DeviceSpace
from headrace.backends.cuda import cuda_unavailable, device_spaces
from headrace.backends.onnxruntime_options import CUDA_OPTIONS, TENSORRT_OPTIONS, provider_options
from headrace.backends.onnxruntime_session import Provider, import_runtime
from headrace.config import InstanceConfig
from headrace.errors import LoadError
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


def gpu_unavailable() -> str:
    """Why no session can run on a GPU in this process, naming what is missing; empty: it can. Raises LoadError without the runtime."""
    if CUDA not in import_runtime().get_available_providers():
        return f"the installed onnxruntime has no {CUDA} (onnxruntime-gpu has; pip uninstall onnxruntime, then pip install 'headrace[gpu]')"
    return cuda_unavailable()


def is_on_gpu(device: str) -> bool:
    """Whether an instance whose model.toml says `device` is one on a GPU. 'auto': where there is one that can be used."""
    if device != "auto":
        return device.partition(":")[0] == "cuda"
    reason = gpu_unavailable()
    if reason:
        # Who has installed the runtime for GPUs wants to hear of it.
        say = log.info if CUDA in import_runtime().get_available_providers() else log.debug
        say("device chosen", device="cpu", reason=reason)
    return not reason


def find_devices(device: str) -> list[DeviceSpace]:
    """What Backend.devices says for this runtime."""
    if not is_on_gpu(device):
        return []
    if reason := gpu_unavailable():
        raise LoadError(f"device '{device}': {reason}")
    return device_spaces(device)


def make_providers(instance: InstanceConfig, ordinal: int, stream: int) -> list[Provider]:
    """In the order in which they are offered the graph's nodes. All work is queued on `stream`, a cudaStream_t's address."""
    given = instance.options
    place = {"device_id": str(ordinal), "user_compute_stream": str(stream)}
    cuda = {
        **place,
        # The default benchmarks all algorithms at each new shape: seconds, in which every request waits.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles what it takes each time; other instances want that memory too.
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "1" if given.get("cuda_graph") == "true" else "0",
        **provider_options(given, CUDA_OPTIONS),
    }
    if given.get("provider") != "tensorrt":
        return [(CUDA, cuda)]
    return [(TENSORRT, {**place, **provider_options(given, TENSORRT_OPTIONS)}), (CUDA, cuda)]


def check_providers(session: Any, wanted: list[Provider]) -> None:
    """The runtime goes on without a provider that it cannot load, in silence. Raises LoadError that says why it could not."""
    there = session.get_providers()
    for provider in wanted:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in there:
            raise LoadError(f"onnxruntime could not load its {name}: {provider_failure(name)}")


def explain(error: LoadError, wanted: list[Provider]) -> LoadError:
    """The same, or with the library's name where the runtime does not say which one it lacks."""
    if "TensorRT libraries" in str(error) and any(provider[0] == TENSORRT for provider in wanted):
        return LoadError(f"onnxruntime could not load its {TENSORRT}: {provider_failure(TENSORRT)}")
    return error


def provider_failure(name: str) -> str:
    """Why the library of a provider cannot be loaded.

    Only after the runtime has tried itself: its libraries find their host when they are loaded, and must not be so before it is there.
    """
    kind = {CUDA: "cuda", TENSORRT: "tensorrt"}[name]
    library = Path(import_runtime().__file__).parent / "capi" / f"libonnxruntime_providers_{kind}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{error}; {_HINTS[name]}"
    return "it loads, but refuses this machine; the driver may be older than the CUDA that it was built with, see standard error"


_HINTS = {
    CUDA: "pip install 'headrace[gpu]' brings NVIDIA's libraries, or put their directory on LD_LIBRARY_PATH",
    TENSORRT: "this provider needs libnvinfer.so.10 and libnvonnxparser.so.10 of TensorRT 10, whose directory belongs on LD_LIBRARY_PATH",
}

_LIBRARIES = ("nvrtc", "nvJitLink", "cudart", "cublasLt", "cublas", "curand", "cufft", "cudnn")
"""By their names in cuda.pathfinder, what others need first. The provider is not linked with the first two, but cuDNN and cuFFT compile
kernels by them, and look for them no earlier than then."""


def load_libraries() -> None:
    """Load NVIDIA's libraries from where pip puts them, which is no place that the dynamic loader looks into.

    What is not found is left to the loader, and to `check_providers` to name: it may be installed elsewhere, or not be needed. The
    runtime's own preload_dlls prints what it misses to standard output, where the access log goes.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return
    for name in _LIBRARIES:
        try:
            load_nvidia_dynamic_lib(name)
        except (RuntimeError, OSError) as error:
            log.debug("library not found", library=name, reason=str(error).partition("\n")[0])
