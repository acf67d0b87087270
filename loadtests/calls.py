"""One inference call in the three forms that measuring needs: arrays, an encoded ModelInfer message, and its right answer.

The right answer comes from ONNX Runtime in this process, with the session options that the server's backend uses.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

Array = NDArray[Any]
Arrays = dict[str, Array]

INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"
TOLERANCE = 1e-5
"""Batches of different sizes run different kernels; their sums differ in the last bits."""

_DTYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16, "tensor(bool)": np.bool_,
    "tensor(int8)": np.int8, "tensor(int16)": np.int16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
}  # fmt: skip


class WrongAnswer(Exception):
    """A server answered, and not with what the model gives."""


def open_session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """The model in this process, set up as a server sets it up that shares its cores with an event loop."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sample_inputs(session: ort.InferenceSession, rows: int, rng: np.random.Generator, free: int = 1) -> Arrays:
    """Random inputs that fit the model: the first free dimension is the batch, `free` stands for the others.

    Integers are bytes (0-255), which all models here that take integers take. Raises ValueError for a datatype without a rule.
    """
    inputs = {}
    for tensor in session.get_inputs():
        shape = [size if isinstance(size, int) else (rows if axis == 0 else free) for axis, size in enumerate(tensor.shape)]
        inputs[tensor.name] = random_array(tensor.type, shape, rng)
    return inputs


def random_array(kind: str, shape: Sequence[int], rng: np.random.Generator) -> Array:
    if kind not in _DTYPES:
        raise ValueError(f"no rule to make up a {kind}; known are {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[kind])
    if dtype.kind == "f":
        return rng.uniform(-1.0, 1.0, shape).astype(dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else 127 if dtype == np.int8 else 256, shape).astype(dtype)


def right_answer(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def infer_message(model: str, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> bytes:
    """An encoded ModelInferRequest with raw tensors."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    return bytes(request.SerializeToString())


def grpc_frame(message: bytes) -> bytes:
    """The message as gRPC puts it into HTTP/2 data: not compressed, length, content."""
    return b"\0" + struct.pack(">I", len(message)) + message


def decode_answer(message: bytes) -> Arrays:
    return answer_arrays(triton.InferResult(service_pb2.ModelInferResponse.FromString(message)))


def answer_arrays(result: triton.InferResult) -> Arrays:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def infer_inputs(inputs: Mapping[str, Array]) -> list[triton.InferInput]:
    made = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def difference(got: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest |got - expected| / (1 + |expected|) over all outputs; inf where names, shapes or NaNs do not agree."""
    if got.keys() != expected.keys():
        return float("inf")
    return max((_array_difference(got[name], expected[name]) for name in expected), default=0.0)


def _array_difference(got: Array, expected: Array) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if expected.dtype.kind not in "fiu":
        return 0.0 if np.array_equal(got, expected) else float("inf")
    wide, right = got.astype(np.float64), expected.astype(np.float64)
    if not np.array_equal(np.isnan(wide), np.isnan(right)):
        return float("inf")
    with np.errstate(invalid="ignore"):
        relative = np.abs(wide - right) / (1.0 + np.abs(right))
    return float(np.nanmax(np.where(wide == right, 0.0, relative), initial=0.0))


def is_bitwise_equal(got: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    return got.keys() == expected.keys() and all(
        got[name].shape == right.shape and got[name].dtype == right.dtype and got[name].tobytes() == right.tobytes()
        for name, right in expected.items()
    )


def check_answer(
    address: str, model: str, inputs: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = TOLERANCE
) -> None:
    """Call once with tritonclient. Raises WrongAnswer; tritonclient's own exception says a status that is not OK."""
    with triton.InferenceServerClient(address) as client:
        got = answer_arrays(client.infer(model, infer_inputs(inputs), client_timeout=30.0))
    off = difference(got, expected)
    if off > tolerance:
        shapes = {name: value.shape for name, value in got.items()}
        raise WrongAnswer(f"{model} at {address}: expected the model's outputs to {tolerance:g}, got {shapes} off by {off:g}")


@dataclass(frozen=True, slots=True)
class BatchCount:
    """ModelStatistics' count of rows and of executions. The difference of two says how large batches were between."""

    rows: int
    executions: int

    def __sub__(self, other: BatchCount) -> BatchCount:
        return BatchCount(self.rows - other.rows, self.executions - other.executions)

    @property
    def mean(self) -> float:
        return self.rows / self.executions if self.executions else 0.0


def count_batches(address: str, model: str) -> BatchCount:
    with triton.InferenceServerClient(address) as client:
        statistics = client.get_inference_statistics(model).model_stats
    return BatchCount(sum(s.inference_count for s in statistics), sum(s.execution_count for s in statistics))
