"""TensorRT's bindings as far as the backend uses them, around an "engine" that multiplies: y = x * weights, on the memory of fake_cuda.

It shows which calls are made, in which order and with what, and that what is queued finds the right bytes at the right addresses; each
method has the name and parameters that tests/unit/backends/test_tensorrt_api.py holds against the real bindings. It shows nothing of what
TensorRT does: neither that a call has the effect that is taken for granted here, nor that a real graph can be captured or replayed, nor
anything of kernels, builds or time. A plan is a line of JSON here.
"""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_models
import pytest
from fake_cuda import FakeStream, HostGpu, NumpyKernels, at
from headrace.backends import tensorrt, tensorrt_engine, tensorrt_plans
from headrace.backends.tensorrt_api import Library
from headrace.backends.tensorrt_build import Build

WIDTH = 16
STREAMS: dict[int, NumberedStream] = {}
"""As handles are all that TensorRT is given."""

BUILDER = """
import json, sys
order = json.loads(sys.stdin.readline())
print(json.dumps({"phase": "timing"}), flush=True)
sys.path.insert(0, TESTS)
from fake_tensorrt import plan_of, weights_of
weights = None if order["build"]["refit"] else weights_of(order["model"])
open(order["output"], "wb").write(plan_of(order["profiles"], weights))
print(json.dumps({"done": True}), flush=True)
""".replace("TESTS", repr(str(Path(__file__).parent)))
COMMAND = (sys.executable, "-c", BUILDER)


def weights_of(path: str | Path) -> list[float]:
    [initializer] = onnx.load(str(path)).graph.initializer
    weights: list[float] = onnx.numpy_helper.to_array(initializer).tolist()
    return weights


def plan_of(profiles: Sequence[Any], weights: Sequence[float] | None, **more: object) -> bytes:
    """`profiles`: as in a BuildOrder, or (least, largest) batches of x."""
    ranges = [
        [each["inputs"]["x"][end] for end in ("minimum", "optimum", "maximum")]
        if isinstance(each, dict)
        else [[rows, WIDTH] for rows in (each[0], each[1], each[1])]
        for each in profiles
    ]
    return json.dumps({"profiles": ranges, "weights": weights, **more}).encode()


class NumberedStream(FakeStream):
    def __init__(self) -> None:
        super().__init__()
        self.handle = len(STREAMS) + 1
        STREAMS[self.handle] = self


class StreamGpu(HostGpu):
    def create_stream(self) -> Any:
        self.streams.append(NumberedStream())
        return self.streams[-1]


class Machine:
    """A machine with one GPU and TensorRT. Graphs are captured unless there is a `capture_error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = StreamGpu()
        self.tensorrt = FakeTensorRt()
        self.graphs: list[FakeGraph] = []
        self.capture_error: Exception | None = None
        monkeypatch.setattr(tensorrt, "find_library", lambda: self.tensorrt.library)
        monkeypatch.setattr(tensorrt, "open_device", lambda _name: self.gpu)
        monkeypatch.setattr(tensorrt, "device_count", lambda: 1)
        monkeypatch.setattr(tensorrt, "Gpu", lambda _ordinal: self.gpu)
        monkeypatch.setattr(tensorrt_engine, "create_graph_builder", lambda: FakeGraphBuilder(self.graphs, self.capture_error))
        monkeypatch.setattr(tensorrt_plans, "describe_device", lambda _gpu: tensorrt_plans.Device("Fake", "9.0", 13))
        monkeypatch.setattr(tensorrt_plans, "Build", functools.partial(Build, command=COMMAND))


def scaling(weight: float) -> onnx.ModelProto:
    """y = x * w, as an ONNX model."""
    weights = onnx.numpy_helper.from_array(np.full(WIDTH, weight, np.float32), "w")
    model = onnx_models.parse(f"g (float[N,{WIDTH}] x) => (float[N,{WIDTH}] y) {{ y = Mul(x, w) }}")
    model.graph.initializer.append(weights)
    return model


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


class FakeGraph:
    def __init__(self, work: Sequence[Callable[[], None]]) -> None:
        self._work = tuple(work)
        self.launches = 0
        self.is_closed = False

    def launch(self, stream: Any) -> None:
        assert not self.is_closed
        self.launches += 1
        stream.queued.extend(self._work)

    def close(self) -> None:
        self.is_closed = True


class FakeGraphBuilder:
    """As cuda.core's: `queued` is its stream's, so that kernels can be given either. A capture that was spoilt (`error`) cannot be ended,
    and then `close`, which would end it, raises too."""

    def __init__(self, graphs: list[FakeGraph], error: Exception | None = None) -> None:
        self.stream = NumberedStream()
        self._graphs = graphs
        self._error = error
        self._is_building = False
        self.is_closed = False

    @property
    def queued(self) -> list[Callable[[], None]]:
        return self.stream.queued

    def begin_building(self, mode: str) -> None:
        assert mode == "thread_local"
        self._is_building = True

    def end_building(self) -> FakeGraphBuilder:
        if self._error is not None:
            raise self._error
        self._is_building = False
        return self

    def complete(self) -> FakeGraph:
        assert not self._is_building
        self._graphs.append(FakeGraph(self.queued))
        return self._graphs[-1]

    def close(self) -> None:
        self.is_closed = True
        if self._is_building:
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: the operation failed due to a previous error during capture")


class QueuedKernels:
    """fake_cuda's kernels, but on the stream that they are given."""

    def __init__(self) -> None:
        self._now = NumpyKernels()

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self._now, name)
        return lambda queue, **given: queue.queued.append(lambda: kernel(queue, **given))


# -- the bindings ------------------------------------------------------------------------------------------------------


class Severity(enum.Enum):
    ERROR = 1
    WARNING = 2


DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8")
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
TensorFormat = enum.Enum("TensorFormat", "LINEAR HWC")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "USER_MANAGED")


class Plain:
    """Base classes of the bindings from which we derive."""


class FakeContext:
    def __init__(self, owner: FakeTensorRt, described: dict[str, Any]) -> None:
        self._owner = owner
        self._described = described
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._allocator: Any = None
        self.profile = -1
        self.calls: list[str] = []

    def _call(self, name: str) -> bool:
        self.calls.append(name)
        self._owner.calls.append(name)
        error = self._owner.errors.pop(name, "")
        if error:
            self._owner.say(Severity.ERROR, error)
        return not error

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle in STREAMS
        self.profile = profile_index
        return self._call("set_optimization_profile_async")

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size == self._owner.scratch_bytes
        self._call("set_device_memory")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._described["profiles"][self.profile]
        assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)), "not of this profile"
        self._shape = shape
        return self._call("set_input_shape")

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return (-1, *self._shape[1:]) if name == "y" and self._described.get("dynamic") else self._shape

    def get_max_output_size(self, name: str) -> int:
        return 4 * int(np.prod(self._shape))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return self._call("set_tensor_address")

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self._allocator = output_allocator
        return self._call("set_output_allocator")

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._call("execute_async_v3"):
            return False
        shape, addresses, weights = self._shape, dict(self._addresses), self._described["weights"]
        assert weights is not None, "executed before it was refitted"
        if self._described.get("dynamic"):
            return self._execute_now(stream_handle)

        def work() -> None:
            at(addresses["y"], shape, "<f4")[...] = at(addresses["x"], shape, "<f4") * np.array(weights, "<f4")

        STREAMS[stream_handle].queued.append(work)
        return True

    def _execute_now(self, stream_handle: int) -> bool:
        """The rows whose first element is positive: their number is known once the input is, so that it waits for that."""
        STREAMS[stream_handle].sync()
        rows = at(self._addresses["x"], self._shape, "<f4")
        result = rows[rows[:, 0] > 0] * np.array(self._described["weights"], "<f4")
        address = self._allocator.reallocate_output_async("y", 0, result.nbytes, 256, stream_handle)
        self._allocator.notify_shape("y", result.shape)
        at(address, result.shape, "<f4")[...] = result
        return True


class FakeEngine:
    refittable = True

    def __init__(self, owner: FakeTensorRt, described: dict[str, Any]) -> None:
        self._owner = owner
        self.described = described

    @property
    def num_io_tensors(self) -> int:
        return 2

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.described["profiles"])

    @property
    def device_memory_size_v2(self) -> int:
        return self._owner.scratch_bytes

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> enum.Enum:
        return TensorIOMode["INPUT" if name == "x" else "OUTPUT"]

    def get_tensor_location(self, name: str) -> enum.Enum:
        return TensorLocation[self.described.get("location", "DEVICE")]

    def get_tensor_format(self, name: str, profile_index: int) -> enum.Enum:
        if self.described.get("is_lean"):
            raise TypeError("Unable to convert function return value to a Python type!")
        return TensorFormat[self.described.get("format", "LINEAR")]

    def get_tensor_format_desc(self, name: str, profile_index: int) -> str:
        return {"LINEAR": "Row major linear FP32 format (kLINEAR)", "HWC": "Channel major FP32 format (kHWC)"}[
            self.described.get("format", "LINEAR")
        ]

    def get_tensor_dtype(self, name: str) -> enum.Enum:
        return DataType[self.described.get("datatype", "FLOAT")]

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return (-1, WIDTH)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]:
        shapes: Sequence[Sequence[int]] = self.described["profiles"][profile_index]
        return shapes

    def create_execution_context(self, strategy: enum.Enum) -> FakeContext:
        assert strategy is ExecutionContextAllocationStrategy["USER_MANAGED"]
        context = FakeContext(self._owner, self.described)
        self._owner.contexts.append(context)
        return context


class FakeTensorRt:
    """Stands for the module. `errors`: what the next call of that name logs and fails with. `calls`: of all contexts."""

    __version__ = "11.4.fake"
    ILogger = IOutputAllocator = IProgressMonitor = Plain
    DataType, TensorIOMode, TensorLocation = DataType, TensorIOMode, TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    scratch_bytes: ClassVar[int] = 4096

    def __init__(self, name: str = "tensorrt") -> None:
        self.__name__ = name
        self.errors: dict[str, str] = {}
        self.calls: list[str] = []
        self.contexts: list[FakeContext] = []
        self.engines: list[FakeEngine] = []
        self.allowed_host_code: list[bool] = []
        self.library = Library(self)

    def say(self, severity: Severity, message: str) -> None:
        self.library.logger.log(severity, message)

    def init_libnvinfer_plugins(self, logger: object, namespace: str) -> bool:
        return "init_libnvinfer_plugins" not in self.errors

    def Runtime(self, logger: object) -> Any:  # noqa: N802  # as theirs
        owner = self

        class FakeRuntime:
            engine_host_code_allowed = False

            def deserialize_cuda_engine(self, serialized_engine: memoryview) -> FakeEngine | None:
                owner.allowed_host_code.append(self.engine_host_code_allowed)
                error = owner.errors.pop("deserialize_cuda_engine", "")
                try:
                    described = json.loads(bytes(serialized_engine))
                except ValueError:
                    error = error or "Magic tag does not match"
                if error:
                    owner.say(Severity.ERROR, error)
                    return None
                owner.engines.append(FakeEngine(owner, described))
                return owner.engines[-1]

        return FakeRuntime()

    def Refitter(self, engine: FakeEngine, logger: object) -> Any:  # noqa: N802  # as theirs
        owner = self

        class FakeRefitter:
            weights: list[float] | None = None

            def get_missing_weights(self) -> list[str]:
                return ["w"] if "get_missing_weights" in owner.errors else []

            def refit_cuda_engine(self) -> bool:
                engine.described["weights"] = self.weights
                owner.calls.append("refit_cuda_engine")
                return True

        return FakeRefitter()

    def OnnxParserRefitter(self, refitter: Any, logger: object) -> Any:  # noqa: N802  # as theirs
        class FakeParserRefitter:
            num_errors = 0

            def refit_from_file(self, model: str) -> bool:
                refitter.weights = weights_of(model)
                return True

        return FakeParserRefitter()
