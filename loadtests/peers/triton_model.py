"""ONNX Runtime in Triton's Python backend: a batch's requests joined, run once, and split. Runs in the peer's venv, within Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as backend


class TritonPythonModel:
    """The name and the methods are Triton's."""

    def initialize(self, arguments: dict[str, str]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = Path(arguments["model_repository"]) / arguments["model_version"] / "model.onnx"
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        parts = {name: [backend.get_input_tensor_by_name(request, name).as_numpy() for request in requests] for name in self.inputs}
        joined = {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}
        results = self.session.run(self.outputs, joined)
        ends = np.cumsum([array.shape[0] for array in parts[self.inputs[0]]])
        starts = [0, *ends[:-1]]
        return [
            backend.InferenceResponse([backend.Tensor(name, result[start:end]) for name, result in zip(self.outputs, results, strict=True)])
            for start, end in zip(starts, ends, strict=True)
        ]
