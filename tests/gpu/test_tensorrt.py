"""TensorRT on a GPU. None of this has run where the project is built: it has no GPU, and the full TensorRT is on no registry it reaches.

With the lean runtime alone, set HEADRACE_TENSORRT_PLAN to a version-compatible plan; it is then loaded and run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models
import pytest
from headrace.backends.base import Expected
from headrace.backends.cuda import Gpu, cuda_unavailable
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.backends.processing import Processing
from headrace.backends.tensorrt import TensorRtBackend
from headrace.backends.tensorrt_api import find_library
from headrace.config import InstanceConfig
from headrace.errors import LoadError
from headrace.signature import Signature
from headrace_kernels.topk import Softmax, TopK
from onnx import ModelProto

from loadtests.gpu_models import make_cnn, make_transformer


def unavailable(*, to_build: bool) -> str:
    try:
        return cuda_unavailable() or (find_library(to_build=to_build) and "")
    except LoadError as error:
        return str(error)


FULL, ANY = unavailable(to_build=True), unavailable(to_build=False)
pytestmark = pytest.mark.gpu
needs_full = pytest.mark.skipif(bool(FULL), reason=FULL or "it is there")

EXACT = {"tf32": "false"}
"""TF32 has ten bits of mantissa; without it the results are those of fp32 up to the order of sums."""
SWAPS = 20
KEPT = 16 << 20
"""Bytes that the device may hold more after further swaps than after the first ones: what libraries take once comes with those."""
MODELS = {"mlp": onnx_models.mlp(16, 64, 4), "cnn": make_cnn(width=16, blocks=(1, 1, 1, 1)), "transformer": make_transformer(64, 4, 32, 2)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(
    model: ModelProto, directory: Path, options: Mapping[str, str] = EXACT, processing: Processing | None = None, largest: int = 8
) -> TensorRtBackend:
    path = onnx_models.save(model, directory)
    backend = TensorRtBackend(path, InstanceConfig(device="cuda:0", options=options))
    artifact = TensorRtBackend.inspect(path)
    backend.expect(Expected(artifact, Signature("m", artifact.inputs, artifact.outputs, largest)))
    if processing is not None:
        assert backend.adopt(processing)
    backend.load()
    return backend


def inputs_of(path: Path, rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal((rows, *spec.shape[1:]), np.float32) for spec in TensorRtBackend.inspect(path).inputs}


def on_cpu(backend: TensorRtBackend, inputs: Mapping[str, Any]) -> list[Any]:
    reference = OnnxRuntimeBackend(backend.path, InstanceConfig(device="cpu"))
    reference.load()
    try:
        return reference.execute(inputs, None)
    finally:
        reference.close()


def check(backend: TensorRtBackend, rows: int, seed: int) -> None:
    inputs = inputs_of(backend.path, rows, seed)
    for result, expected in zip(backend.execute(inputs, None), on_cpu(backend, inputs), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


@needs_full
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_answers_are_those_of_the_cpu_before_and_after_graphs_are_captured(name: str, graphs: str, tmp_path: Path) -> None:
    backend = load(MODELS[name], tmp_path / "m/1", {**EXACT, "cuda_graphs": graphs})
    try:
        for seed, rows in enumerate([1, 8, 3, 1, 8, 3, 1, 8, 8, 1, 8, 1]):
            check(backend, rows, seed)
    finally:
        backend.close()


@needs_full
def test_two_batches_are_in_flight_and_keep_apart(tmp_path: Path) -> None:
    backend = load(MODELS["mlp"], tmp_path / "m/1")
    for seed in range(6):
        given = [inputs_of(backend.path, 4, 2 * seed + each) for each in range(2)]
        pending = [backend.launch(inputs, None) for inputs in given]
        for inputs, each in zip(given, pending, strict=True):
            np.testing.assert_allclose(each.wait()[0], on_cpu(backend, inputs)[0], rtol=1e-3, atol=1e-4)
            each.release()
    backend.close()


@needs_full
def test_second_load_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(MODELS["mlp"], tmp_path / "m/1").close()
    monkeypatch.setattr("headrace.backends.tensorrt_plans.Build", None)
    backend = load(MODELS["mlp"], tmp_path / "m/1")
    check(backend, 4, 0)
    backend.close()


@needs_full
def test_refit_serves_the_next_version_without_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**EXACT, "refit": "true"}
    first = load(onnx_models.mlp(16, 64, 4, seed=1), tmp_path / "m/1", options)
    monkeypatch.setattr("headrace.backends.tensorrt_plans.Build", None)
    second = load(onnx_models.mlp(16, 64, 4, seed=2), tmp_path / "m/2", options)
    for backend in (first, second, first):
        check(backend, 4, 0)
    first.close()
    second.close()


@needs_full
def test_interrupted_build_ends(tmp_path: Path) -> None:
    path = onnx_models.save(make_cnn(), tmp_path / "m/1")
    backend = TensorRtBackend(path, InstanceConfig(device="cuda:0", options={"optimization_level": "5"}))
    artifact = TensorRtBackend.inspect(path)
    backend.expect(Expected(artifact, Signature("m", artifact.inputs, artifact.outputs, 64)))
    timer = threading.Timer(5.0, backend.interrupt)
    timer.start()
    with pytest.raises(LoadError, match="given up"):
        backend.load()
    timer.join()
    backend.close()


@needs_full
@pytest.mark.parametrize("step", [Softmax(), TopK(2), TopK(3, softmax=True)], ids=str)
def test_steps_after_the_model_are_those_of_their_definitions(step: Softmax | TopK, tmp_path: Path) -> None:
    [output] = onnx_models.mlp(16, 64, 4).graph.output
    backend = load(MODELS["mlp"], tmp_path / "m/1", processing=Processing({}, {output.name: step}))
    for seed, rows in enumerate([4, 4, 4, 4, 4, 4, 3, 3]):
        inputs = inputs_of(backend.path, rows, seed)
        wanted = step(on_cpu(backend, inputs)[0])
        for result, each in zip(backend.execute(inputs, None), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            np.testing.assert_allclose(result, each, rtol=1e-3, atol=1e-4)
    backend.close()


@needs_full
def test_output_whose_shape_only_the_data_decides(tmp_path: Path) -> None:
    backend = load(onnx_models.parse("g (float[8] x) => (int64[1, K] y) { y = NonZero(x) }"), tmp_path / "m/1", largest=0)
    for values in ([0, 1, 1, 0, 0, 0, 0, 1], [1] * 8, [0] * 7 + [1]):
        [y] = backend.execute({"x": np.array(values, np.float32)}, None)
        assert y.tolist() == [np.flatnonzero(values).tolist()]
    backend.close()


@needs_full
def test_device_memory_comes_back_over_swaps(tmp_path: Path) -> None:
    gpu, free = Gpu(0), []
    for _ in range(SWAPS):
        backend = load(MODELS["cnn"], tmp_path / "m/1")
        backend.warm(inputs_of(backend.path, 8, 0))
        backend.close()
        gpu.make_current()
        free.append(gpu.memory().free)
    assert free[SWAPS // 4] - free[-1] <= KEPT


@needs_full
def test_operator_that_tensorrt_lacks_is_told_with_its_node(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"TensorRT could not build an engine: .*Det"):
        load(onnx_models.parse("g (float[N, 3, 3] x) => (float[N] y) { y = Det(x) }"), tmp_path / "m/1")


@pytest.mark.skipif(bool(ANY), reason=ANY or "it is there")
def test_plan_that_was_given_runs() -> None:
    given = os.environ.get("HEADRACE_TENSORRT_PLAN", "")
    if not given:
        pytest.skip("HEADRACE_TENSORRT_PLAN names no plan")
    backend = TensorRtBackend(Path(given), InstanceConfig(device="cuda:0", options={"trust_plans": "true"}))
    backend.load()
    engine = backend._engine
    assert engine is not None
    for profile in engine.profiles:
        inputs = {spec.name: np.zeros(profile.inputs[spec.name].optimum, spec.datatype.dtype) for spec in engine.signature.inputs}
        results = [backend.execute(inputs, None) for _ in range(5)]
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                np.testing.assert_array_equal(one, other)
    backend.close()
