"""The generated models run, so that only the GPU is left to be found when they are first measured on one."""

from __future__ import annotations

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
    assert gpu_onnxruntime.run(gpu_onnxruntime._Given({})) == {"skipped": "the NVIDIA driver is not there (libcuda.so.1)"}
