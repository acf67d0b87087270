"""ONNX Runtime as a runtime of MLServer: decode, run, encode, on its event loop. Runs in the peer's venv, within MLServer."""

from __future__ import annotations

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri


class OnnxRuntime(MLModel):  # type: ignore[misc] # a library that is not installed here
    """Its own attributes are private: MLModel has `inputs` and `outputs` of another meaning."""

    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = await get_model_uri(self._settings)
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [tensor.name for tensor in self._session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        results = self._session.run(self._names, {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs})
        encoded = [NumpyCodec.encode_output(name, result) for name, result in zip(self._names, results, strict=True)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=encoded)
