"""The generated models run, so that only the GPU is left to be found when they are first measured on one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from loadtests import gpu_onnxruntime
from loadtests.gpu_models import make_cnn, make_transformer


@pytest.mark.parametrize(
    ("model", "given", "wanted"),
    [
        (make_cnn(width=4, blocks=(1, 2, 1, 1), classes=10), (2, 3, 224, 224), (2, 10)),
        (make_transformer(width=32, heads=4, length=6, layers=2), (3, 6, 32), (3, 6, 32)),
    ],
)
def test_generated_models_run_and_stay_finite(model, given, wanted):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.random.default_rng(1).standard_normal(given, np.float32)})
    assert result.shape == wanted
    assert np.isfinite(result).all()
    assert result.std() > 0.01


def test_without_a_gpu_the_report_says_why(monkeypatch):
    monkeypatch.setattr(gpu_onnxruntime, "gpu_unavailable", lambda: "the NVIDIA driver is not there (libcuda.so.1)")
    (check,) = gpu_onnxruntime.run(SimpleNamespace(device_id=0))["checks"]
    assert (check["passed"], check["got"]) == (None, "the NVIDIA driver is not there (libcuda.so.1)")


def test_what_is_asked_of_a_server_and_of_swaps():
    measured = {"model": "cnn", "overlap": 1.2, "of_bare": 0.9, "free": [1 << 30, 1 << 30, 1 << 30, (1 << 30) - (20 << 20)]}
    assert [check["passed"] for check in gpu_onnxruntime.checks(measured)] == [True, False, False]


def test_models_are_named_in_one_variable(tmp_path):
    assert gpu_onnxruntime.given_models("") == {}
    files = {name: tmp_path / f"{name}.onnx" for name in ("magika", "ocr_cls")}
    for file in files.values():
        file.touch()
    assert gpu_onnxruntime.given_models(",".join(f"{name}={file}" for name, file in files.items())) == files
