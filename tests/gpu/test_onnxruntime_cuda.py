"""ONNX Runtime on a GPU. None of this has run where the project is built: it has no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
from headrace.backends.cuda import Gpu
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from headrace.backends.onnxruntime_providers import gpu_unavailable, load_libraries
from headrace.backends.processing import Processing
from headrace.config import InstanceConfig
from headrace.errors import LoadError
from headrace.signature import DataType
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK
from onnx import ModelProto

from loadtests.gpu_models import make_cnn, make_transformer

REASON = gpu_unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "there is a GPU")]

EXACT = {"use_tf32": "false"}
"""TF32 has ten bits of mantissa; without it the results are those of fp32 up to the order of sums."""
SWAPS = 20
KEPT = 16 << 20
"""Bytes that the device may hold more after further swaps than after the first ones: what libraries take once comes with those."""


def load(
    model: ModelProto,
    tmp_path: Path,
    options: Mapping[str, str] = EXACT,
    processing: Processing | None = None,
    backend: type[OnnxRuntimeBackend] = OnnxRuntimeBackend,
) -> OnnxRuntimeCudaBackend:
    loaded = backend(onnx_models.save(model, tmp_path / "m/1"), InstanceConfig(device="cuda:0", options=options))
    assert isinstance(loaded, OnnxRuntimeCudaBackend)
    if processing is not None:
        assert loaded.adopt(processing)
    loaded.load()
    return loaded


def on_cpu(model: ModelProto, tmp_path: Path) -> OnnxRuntimeBackend:
    backend = OnnxRuntimeBackend(onnx_models.save(model, tmp_path / "m/1"), InstanceConfig(device="cpu"))
    backend.load()
    return backend


def inputs_of(backend: OnnxRuntimeBackend, rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    artifact = type(backend).inspect(backend.path)
    return {spec.name: rng.standard_normal((rows, *spec.shape[1:]), np.float32) for spec in artifact.inputs}


MODELS = {"mlp": onnx_models.mlp(16, 64, 4), "cnn": make_cnn(width=16, blocks=(1, 1, 1, 1)), "transformer": make_transformer(64, 4, 32, 2)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [EXACT, {**EXACT, "cuda_graph": "true"}], ids=["plain", "graphs"])
def test_answers_are_those_of_the_cpu(name: str, options: Mapping[str, str], tmp_path: Path) -> None:
    backend, reference = load(MODELS[name], tmp_path, options), on_cpu(MODELS[name], tmp_path)
    try:
        for rows in (2, 1, 5):
            backend.execute(inputs_of(reference, rows, 0), None)  # the warm-up, in which graphs are captured
        for seed in range(6):
            given = inputs_of(reference, (2, 1, 5)[seed % 3], seed)
            pending = backend.launch(given, None)
            results = [array.copy() for array in pending.wait()]
            pending.release()
            for result, expected in zip(results, reference.execute(given, None), strict=True):
                np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)
    finally:
        backend.close()


@pytest.mark.parametrize("datatype", [d for d in DataType if d is not DataType.BYTES])
def test_every_datatype_comes_out_bit_for_bit(datatype: DataType, tmp_path: Path) -> None:
    backend = load(onnx_models.identity(datatype.value), tmp_path)
    raw = np.random.default_rng(7).integers(0, 2 if datatype is DataType.BOOL else 128, 12 * datatype.itemsize, np.uint8)
    given = raw.view(datatype.dtype).reshape(3, 4)
    for _ in range(3):
        assert backend.execute({"x": given}, None)[0].tobytes() == given.tobytes()
    backend.close()


def test_strings_run_as_on_the_cpu(tmp_path: Path) -> None:
    backend = load(onnx_models.identity("BYTES"), tmp_path)
    assert backend.execute({"x": np.array([[b"a", b"b", b"c", b"d"]], object)}, None)[0].tolist() == [["a", "b", "c", "d"]]
    backend.close()


def test_outputs_whose_shape_depends_on_values(tmp_path: Path) -> None:
    backend = load(onnx_models.parse("g (float[N] x) => (int64[1, K] y) { y = NonZero(x) }"), tmp_path)
    for values, expected in (([0, 1, 1], [1, 2]), ([1, 1, 1], [0, 1, 2]), ([0, 0, 1], [2]), ([5, 0, 1], [0, 2])):
        assert backend.execute({"x": np.array(values, np.float32)}, None)[0].tolist() == [expected]
    backend.close()


class TimedGpu(Gpu):
    def create_event(self) -> Any:
        from cuda.core import Device, EventOptions

        return Device(self.ordinal).create_event(options=EventOptions(blocking_sync=True, timing_enabled=True))


class TimedBackend(OnnxRuntimeCudaBackend):
    def _open_device(self) -> Gpu:
        load_libraries()
        return TimedGpu(0)


def test_one_batch_is_uploaded_while_another_one_computes(tmp_path: Path) -> None:
    model = onnx_models.mlp(4096, 4096, 4096, 4096, 4096, 8)
    backend = load(model, tmp_path, backend=TimedBackend)
    given = inputs_of(backend, 2048, 0)
    for _ in range(3):
        backend.execute(given, None)
    lanes = backend._lanes
    assert lanes is not None
    first_lane, second_lane = lanes.first, lanes.all[1 - lanes.all.index(lanes.first)]  # type: ignore[arg-type]  # both are free
    assert first_lane is not None
    first, second = backend.launch(given, None), backend.launch(given, None)
    first.wait()
    second.wait()
    assert first_lane.computed - second_lane.uploaded > 0, "the second upload ended after the first batch had been computed"
    first.release()
    second.release()
    backend.close()


def test_steps_around_the_model_are_those_of_their_definitions(tmp_path: Path) -> None:
    model = onnx_models.parse(
        "g (float[N,3,32,32] x) => (float[N,3072] scores, float[N,3072] odds) { scores = Flatten(x) odds = Flatten(x) }"
    )
    steps = Processing({"x": Normalize(size=(32, 32), mean=(0.5, 0.4, 0.3))}, {"scores": TopK(5), "odds": Softmax()})
    backend = load(model, tmp_path, processing=steps)
    images = np.random.default_rng(1).integers(0, 256, (3, 48, 40, 3), np.uint8)
    flat = steps.inputs["x"](images).reshape(3, -1)
    for _ in range(3):
        values, classes, odds = backend.execute({"x": images}, None)
        np.testing.assert_allclose(values, TopK(5)(flat)[0], atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(flat, classes.astype(np.int64), 1), values, atol=1e-5)
        np.testing.assert_allclose(odds, Softmax()(flat), atol=1e-6)
    backend.close()


@pytest.mark.parametrize("options", [EXACT, {**EXACT, "cuda_graph": "true"}], ids=["plain", "graphs"])
def test_swaps_leave_no_device_memory_behind(options: Mapping[str, str], tmp_path: Path) -> None:
    free = []
    for _ in range(SWAPS):
        backend = load(MODELS["cnn"], tmp_path, options)
        for rows in (2, 8):
            backend.execute(inputs_of(backend, rows, 0), None)
        assert backend.device_memory > 0
        backend.close()
        gpu = Gpu(0)
        gpu.make_current()
        free.append(gpu.memory().free)
    assert free[2] - free[-1] < KEPT, f"free bytes after each swap: {free}"


def test_a_graph_is_refused_for_a_model_that_computes_on_the_cpu_too(tmp_path: Path) -> None:
    """Unique has no CUDA kernel."""
    model = onnx_models.parse("g (float[N] x) => (float[K] y) { y = Unique(x) }")
    with pytest.raises(LoadError, match="graph capture feature"):
        load(model, tmp_path, {"cuda_graph": "true"})


def test_nodes_on_the_cpu_are_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    model = onnx_models.parse("g (float[N] x) => (float[K] y) { y = Unique(x) }")
    with pytest.raises(LoadError, match=r"disable_cpu_ep_fallback|CPU"):
        load(model, tmp_path, {"session.disable_cpu_ep_fallback": "true"})


LOSE = """
import sys
from pathlib import Path
import numpy as np
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.config import InstanceConfig

backend = OnnxRuntimeBackend(Path(sys.argv[1]), InstanceConfig(device="cuda:0"))
backend.load()
x = {"x": np.ones((1, 4), np.float32)}
backend.execute(x, None)
code = 'extern "C" __global__ void fail() { *reinterpret_cast<volatile int*>(8) = 1; }'
kernel = Program(code, "c++", ProgramOptions(arch=f"sm_{Device(0).arch}")).compile("cubin").get_kernel("fail")
launch(backend._lanes.streams.compute, LaunchConfig(grid=1, block=1), kernel)
try:
    pending = backend.launch(x, None)
    pending.wait()
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_device_that_gave_up_is_lost(tmp_path: Path) -> None:
    """In a process of its own: nothing runs on the device in that one afterwards."""
    path = onnx_models.save(onnx_models.identity(), tmp_path / "m/1")
    done = subprocess.run([sys.executable, "-c", LOSE, str(path)], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.startswith("DeviceLost onnxruntime: "), done.stdout + done.stderr
