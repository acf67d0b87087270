from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_models
import pytest
from headrace.backends.base import Array, ArtifactSignature
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.backends.processing import Processing
from headrace.bench.runs import available_cores
from headrace.bench.trial import Trial, measure, run_trial
from headrace.config import InstanceConfig
from headrace.errors import BackendError, LoadError
from headrace.lifecycle.warm_up import BatchAxisError
from headrace.signature import DataType, Signature, TensorSpec
from headrace.testing import FakeBackend
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import TopK

X, Y = TensorSpec("x", DataType.FP32, (-1, 2)), TensorSpec("y", DataType.FP32, (-1, 2))


def trial(
    path: Path = Path("m/1/model.fake"), *, backend: str = "fake", count: int = 1, sizes: tuple[int, ...] = (1, 2, 4), **more: object
) -> Trial:
    signature = Signature("m", (X,), (Y,), max(sizes))
    settings = {"signature": signature, "recorded": None, **more}
    instance = InstanceConfig(count=count, threads=1)
    return Trial(backend, path, instance=instance, cores=available_cores(1), sizes=sizes, seconds=0.001, is_first=False, **settings)  # type: ignore[arg-type]


def test_all_instances_run_side_by_side() -> None:
    together, calls = threading.Barrier(2, timeout=20), itertools.count()

    def execute(inputs: Mapping[str, Array]) -> list[Array]:
        # Each instance's first run of a size is on its own; the next two wait for each other.
        if len(inputs["x"]) == 4 and next(calls) in (2, 3):
            together.wait()
        return [inputs["x"].copy()]

    assert list(measure(trial(count=2), FakeBackend.make(execute))) == [1, 2, 4]


def test_a_model_is_measured_at_every_size_and_given_back() -> None:
    backend = FakeBackend.make()
    samples = measure(trial(count=2), backend)
    assert list(samples) == [1, 2, 4]
    assert all(sample.mean > 0 for sample in samples.values())
    assert backend.live == []


def test_recorded_inputs_are_repeated_to_the_size_of_the_batch() -> None:
    seen: dict[int, list[float]] = {}

    def execute(inputs: Mapping[str, Array]) -> list[Array]:
        seen[len(inputs["x"])] = inputs["x"][:, 0].tolist()
        return [inputs["x"].copy()]

    measure(trial(recorded={"x": np.array([[5, 0], [6, 0]], np.float32)}), FakeBackend.make(execute))
    assert seen == {1: [5], 2: [5, 6], 4: [5, 6, 5, 6]}


def test_a_false_batch_dimension_is_found_out() -> None:
    with pytest.raises(BatchAxisError, match=r"shape \(1, 2\) for a batch of 2"):
        measure(trial(), FakeBackend.make(lambda inputs: [np.zeros((1, 2), np.float32)]))


def test_a_model_that_refuses_what_it_is_tried_with_says_so() -> None:
    def execute(inputs: Mapping[str, Array]) -> list[Array]:
        raise BackendError("zero is no word")

    backend = FakeBackend.make(execute, artifact=ArtifactSignature((X,), (Y,)))
    with pytest.raises(LoadError, match="zero is no word; put a recorded request into warmup/"):
        measure(trial(), backend)
    assert backend.live == []


def test_a_real_model_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.identity("FP32", "N,2"), tmp_path / "m" / "1")
    assert set(run_trial(trial(path, backend="onnxruntime", count=2))) == {1, 2, 4}
    assert OnnxRuntimeBackend.inspect(path).inputs == (X,)


def test_why_a_process_failed_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m" / "1" / "model.onnx"
    with pytest.raises(LoadError, match=r"expected an ONNX file at 1/model\.onnx, found none"):
        run_trial(trial(path, backend="onnxruntime"))


def test_what_is_declared_around_the_model_is_measured_with_it_also_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.parse("g (float[N,1,2,2] x) => (float[N,4] y) { y = Flatten(x) }"), tmp_path / "m" / "1")
    best, classes = TensorSpec("y", DataType.FP32, (-1, 1)), TensorSpec("y_classes", DataType.INT32, (-1, 1))
    signature = Signature("m", (TensorSpec("x", DataType.UINT8, (-1, -1, -1, 1)),), (best, classes), 4)
    processing = Processing({"x": Normalize(size=(2, 2))}, {"y": TopK(1)})
    images = {"x": np.zeros((1, 5, 6, 1), np.uint8)}
    around = {"processing": processing, "output_names": ("y",)}
    samples = run_trial(trial(path, backend="onnxruntime", signature=signature, recorded=images, **around))
    assert list(samples) == [1, 2, 4]
