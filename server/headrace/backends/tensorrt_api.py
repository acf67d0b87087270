"""What is used of TensorRT's Python bindings, as protocols; and the one place that imports them.

The names are common to TensorRT 10.1 and later and 11, read off the bindings themselves; tests/unit/backends/test_tensorrt_api.py holds
every one of them, with its parameters, against each installed build of the bindings. Three of these share their classes: `tensorrt`
builds and runs engines; `tensorrt_lean` (44 MB) and `tensorrt_dispatch` run version-compatible ones alone.

Without a usable device the constructors do not raise, but log an error and return an object around a null pointer: whatever is asked of
it, its destruction included, ends the process (seen with tensorrt_lean 11.4). Hence `make` is the only way to such an object.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from headrace.errors import LoadError
from headrace.signature import DataType
from headrace.telemetry.log import get_logger

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = get_logger(__name__)

MODULES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch")
BUILDER = MODULES[0]
"""The only one that builds and refits."""

DATATYPES = {
    "FLOAT": DataType.FP32,
    "HALF": DataType.FP16,
    "BF16": DataType.BF16,
    "INT8": DataType.INT8,
    "INT32": DataType.INT32,
    "INT64": DataType.INT64,
    "BOOL": DataType.BOOL,
    "UINT8": DataType.UINT8,
}
"""By the name of a member of its DataType; the other members (FP8, INT4, FP4) have no name in the protocol."""

_REASON_LIMIT = 1000
_ERRORS_KEPT = 8


# -- of every build ----------------------------------------------------------------------------------------------------


class Enumerated(Protocol):
    """A member of one of its enumerations."""

    @property
    def name(self) -> str: ...


class Dims(Protocol):
    def __iter__(self) -> Iterator[int]: ...


class IHostMemory(Protocol):
    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class IExecutionContext(Protocol):
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def get_tensor_shape(self, name: str) -> Dims: ...
    def get_max_output_size(self, name: str) -> int: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def set_output_allocator(self, name: str, output_allocator: object) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    @property
    def num_io_tensors(self) -> int: ...
    @property
    def num_optimization_profiles(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    @property
    def refittable(self) -> bool: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Enumerated: ...
    def get_tensor_shape(self, name: str) -> Dims: ...
    def get_tensor_dtype(self, name: str) -> Enumerated: ...
    def get_tensor_location(self, name: str) -> Enumerated: ...
    def get_tensor_format(self, name: str, profile_index: int) -> Enumerated: ...
    def get_tensor_format_desc(self, name: str, profile_index: int) -> str: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Dims]: ...
    def create_execution_context(self, strategy: Enumerated) -> IExecutionContext | None: ...


class Runtime(Protocol):
    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: Buffer) -> ICudaEngine | None: ...


# -- of the full build -------------------------------------------------------------------------------------------------


class ITensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def is_shape_tensor(self) -> bool: ...


class INetworkDefinition(Protocol):
    @property
    def num_inputs(self) -> int: ...
    def get_input(self, index: int) -> ITensor: ...


class ITimingCache(Protocol):
    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def serialize(self) -> IHostMemory: ...


class IOptimizationProfile(Protocol):
    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None: ...


class IBuilderConfig(Protocol):
    builder_optimization_level: int
    max_aux_streams: int
    hardware_compatibility_level: Enumerated
    progress_monitor: object

    def set_flag(self, flag: Enumerated) -> None: ...
    def clear_flag(self, flag: Enumerated) -> None: ...
    def set_memory_pool_limit(self, pool: Enumerated, pool_size: int) -> None: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: Buffer) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    @property
    def num_errors(self) -> int: ...
    def get_error(self, index: int) -> ParserError: ...
    def parse_from_file(self, model: str) -> bool: ...


class Refitter(Protocol):
    def get_missing_weights(self) -> list[str]: ...
    def refit_cuda_engine(self) -> bool: ...


class OnnxParserRefitter(Protocol):
    @property
    def num_errors(self) -> int: ...
    def get_error(self, index: int) -> ParserError: ...
    def refit_from_file(self, model: str) -> bool: ...


RUN_CLASSES: tuple[type, ...] = (IHostMemory, IExecutionContext, ICudaEngine, Runtime)
BUILD_CLASSES: tuple[type, ...] = (
    ITensor, INetworkDefinition, ITimingCache, IOptimizationProfile, IBuilderConfig, Builder, ParserError, OnnxParser, Refitter,
    OnnxParserRefitter,
)  # fmt: skip
CONSTRUCTORS = {
    "Runtime": ("logger",),
    "Builder": ("logger",),
    "OnnxParser": ("network", "logger"),
    "Refitter": ("engine", "logger"),
    "OnnxParserRefitter": ("refitter", "logger"),
}
FUNCTIONS = {"init_libnvinfer_plugins": ("logger", "namespace")}
"""Of the full build."""
MEMBERS = {
    "DataType": tuple(DATATYPES),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "TensorLocation": ("DEVICE", "HOST"),
    "TensorFormat": ("LINEAR",),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "BuilderFlag": ("REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE", "TF32"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "MemoryPoolType": ("WORKSPACE",),
    "HardwareCompatibilityLevel": ("NONE", "AMPERE_PLUS"),
}
"""Of its enumerations, those used."""
BASES = {
    "ILogger": {"log": ("severity", "msg")},
    "IProgressMonitor": {
        "phase_start": ("phase_name", "parent_phase", "num_steps"),
        "step_complete": ("phase_name", "step"),
        "phase_finish": ("phase_name",),
    },
    "IOutputAllocator": {},
}
"""Derived from here. The bindings say nothing of what IOutputAllocator calls but in its text: `reallocate_output_async`, `notify_shape`."""


# -- which of them is there --------------------------------------------------------------------------------------------


class Library:
    """One imported build of the bindings, and the process's logger for it: TensorRT has one at a time, the first that it was given."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name: str = module.__name__
        self.version: str = module.__version__
        self.logger: Any = _logger_class(module)()

    def __repr__(self) -> str:
        return f"Library({self.name} {self.version})"

    @property
    def can_build(self) -> bool:
        return self.name == BUILDER

    def register_plugins(self) -> None:
        """TensorRT's own, which some engines and models need; other libraries' are never loaded. Lean and dispatch have none of them.

        Raises LoadError. May be called again.
        """
        if self.can_build and not self.module.init_libnvinfer_plugins(None, ""):
            raise LoadError(f"{self.name} {self.version} cannot register its plugins: {self.take_errors() or 'no reason given'}")

    def member(self, enumeration: str, name: str) -> Any:
        return getattr(getattr(self.module, enumeration), name)

    def make(self, kind: str, *arguments: object) -> Any:
        """An object of that class. Raises LoadError with what TensorRT had to say instead."""
        self.take_errors()
        try:
            made = getattr(self.module, kind)(*arguments, self.logger)
        except (TypeError, RuntimeError) as error:  # "factory function returned nullptr", where the bindings look
            reason = self.take_errors() or str(error)
        else:
            reason = self.take_errors()
            if not reason:
                return made
            # Its destructor would end the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        raise LoadError(f"{self.name} {self.version} cannot make a {kind}: {reason}{_advice(reason)}")

    def take_errors(self, *, of_all_threads: bool = False) -> str:
        """What was logged as errors on the calling thread since the last time, on one line."""
        lines: list[str] = self.logger.take(None if of_all_threads else threading.get_ident())
        return "; ".join(lines)[:_REASON_LIMIT]


def _logger_class(module: Any) -> Callable[[], Any]:
    class _Logger(module.ILogger):  # type: ignore[misc]  # the module is not there when types are checked
        """Called from any thread. Owns the latest errors: they are no lines of our log, but end in the exception of whoever called."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._errors: deque[tuple[int, str]] = deque(maxlen=_ERRORS_KEPT)

        def log(self, severity: Any, msg: str) -> None:
            line = " ".join(msg.split())
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                with self._lock:
                    self._errors.append((threading.get_ident(), line))
            elif severity.name == "WARNING":
                log.warning("tensorrt warned", reason=line)

        def take(self, thread: int | None) -> list[str]:
            with self._lock:
                taken = [error for error in self._errors if thread in (None, error[0])]
                for error in taken:
                    self._errors.remove(error)
            return [line for _, line in taken]

    return _Logger


def _advice(reason: str) -> str:
    if any(hint in reason for hint in ("driver version is insufficient", "error: 35", "error: 100", "no CUDA-capable device")):
        return ". It needs an NVIDIA GPU and a driver as new as its CUDA (580 or later for CUDA 13)"
    return ""


@functools.cache
def _open(name: str) -> Library:
    return Library(importlib.import_module(name))


def find_library(*, to_build: bool = False) -> Library:
    """The first build of the bindings that imports. Raises LoadError that says what to install."""
    reasons = []
    for name in MODULES[:1] if to_build else MODULES:
        try:
            return _open(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that it needs
            reasons.append(f"{name}: {error}")
    what = "builds engines of ONNX models" if to_build else "runs engines"
    raise LoadError(
        f"no TensorRT that {what} is there ({'; '.join(reasons)}); pip install 'headrace[cpu,tensorrt]'"
        + ("" if to_build else ", or tensorrt-lean-cu13 for version-compatible plans alone")
    )
