"""ONNX models on the CPU through ONNX Runtime. One session an instance."""

from __future__ import annotations

import ctypes
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.backends.base import Array, ArtifactSignature, Backend
from headrace.config import InstanceConfig
from headrace.errors import BackendError, LoadError
from headrace.signature import DataType, TensorSpec

_DATATYPES = {
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
    "tensor(uint16)": DataType.UINT16,
    "tensor(uint32)": DataType.UINT32,
    "tensor(uint64)": DataType.UINT64,
    "tensor(int8)": DataType.INT8,
    "tensor(int16)": DataType.INT16,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(float16)": DataType.FP16,
    "tensor(bfloat16)": DataType.BF16,
    "tensor(float)": DataType.FP32,
    "tensor(double)": DataType.FP64,
    "tensor(string)": DataType.BYTES,
}
_ONNX_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16"""
_OPTIMISATION_LEVELS = {"disable": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
OPTIONS = ("graph_optimization", "inter_op_threads", "enable_cpu_mem_arena", "enable_mem_pattern")


def _runtime() -> Any:
    # Imported at first use: it takes a tenth of a second and 60 MB that `headrace --help` must not pay.
    try:
        import onnxruntime
    except ImportError as error:
        raise LoadError(f"onnxruntime is not installed ({error}); pip install 'headrace[cpu]' or 'headrace[gpu]'") from None
    return onnxruntime


class OnnxRuntimeBackend(Backend):
    name = "onnxruntime"
    default_filename = "model.onnx"
    platform = "onnxruntime_onnx"

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self._session: Any = None
        self._datatypes: dict[str, DataType] = {}
        self._output_names: list[str] = []
        self._has_bfloat16 = False

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        ort = _runtime()
        options = ort.SessionOptions()
        # Only the declared tensors are wanted; optimising a large graph for them would load it twice.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = _open_session(path, options)
        return ArtifactSignature(_specs(path, session.get_inputs()), _specs(path, session.get_outputs()))

    @classmethod
    def estimate_memory(cls, path: Path) -> int:
        """Three times the files: weights as read, as initialisers, and once more where kernels prepack them."""
        files = [path] if path.parent.name != path.name else [file for file in path.parent.iterdir() if file.is_file()]
        return 3 * sum(file.stat().st_size for file in files)

    def load(self) -> None:
        session = _open_session(self.path, self._options())
        self._datatypes = {tensor.name: _DATATYPES[tensor.type] for tensor in (*session.get_inputs(), *session.get_outputs())}
        self._output_names = [tensor.name for tensor in session.get_outputs()]
        self._has_bfloat16 = DataType.BF16 in self._datatypes.values()
        self._session = session

    def _options(self) -> Any:
        ort = _runtime()
        given = self.instance.options
        for name in given:
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, 1)
                raise LoadError(f"unknown onnxruntime option '{name}'{f', did you mean {near[0]!r}' if near else ''}; known: {', '.join(OPTIONS)}")
        level = given.get("graph_optimization", "all")
        if level not in _OPTIMISATION_LEVELS:
            raise LoadError(f"onnxruntime option 'graph_optimization': expected one of {', '.join(_OPTIMISATION_LEVELS)}, got {level!r}")
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _OPTIMISATION_LEVELS[level])
        options.intra_op_num_threads = self.instance.threads or max(_cores() // self.instance.count, 1)
        options.inter_op_num_threads = int(given.get("inter_op_threads", "1"))
        options.enable_cpu_mem_arena = given.get("enable_cpu_mem_arena", "true") == "true"
        options.enable_mem_pattern = given.get("enable_mem_pattern", "true") == "true"
        # Idle intra-op threads spin for about 47 ms by default, which takes the core that the event loop needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        return options

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        names = self._output_names if outputs is None else list(outputs)
        try:
            if self._has_bfloat16:
                return self._execute_values(inputs, names)
            feed = {name: _decode_strings(array) if array.dtype == object else array for name, array in inputs.items()}
            # InferenceSession.run checks the names again and builds a list: 7 µs a call instead of 4.
            results = self._session._sess.run(names, feed, None)
        except Exception as error:
            # The runtime's exceptions have no common base. `from None`: their tracebacks keep the arrays alive.
            raise BackendError(f"onnxruntime: {_first_line(error)}") from None
        return [np.asarray(result) for result in results]

    def _execute_values(self, inputs: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        """By OrtValue, for models with BF16 tensors, which numpy cannot name."""
        ort = _runtime()
        feed = {}
        for name, array in inputs.items():
            if self._datatypes[name] is DataType.BF16:
                feed[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _ONNX_BFLOAT16)
            else:
                feed[name] = ort.OrtValue.ortvalue_from_numpy(_decode_strings(array) if array.dtype == object else np.ascontiguousarray(array))
        values = self._session.run_with_ort_values(list(names), feed)
        return [_bfloat16_bits(value) if self._datatypes[name] is DataType.BF16 else value.numpy() for name, value in zip(names, values, strict=True)]

    def close(self) -> None:
        self._session = None


def _open_session(path: Path, options: Any) -> Any:
    if not path.is_file():
        raise LoadError(f"expected an ONNX file at {path.parent.name}/{path.name}, found none")
    try:
        return _runtime().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"onnxruntime could not load {path.parent.name}/{path.name}: {_first_line(error)}") from None


def _specs(path: Path, tensors: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor in tensors:
        kind = tensor.type
        is_optional = kind.startswith("optional(")
        if is_optional:
            kind = kind.removeprefix("optional(").removesuffix(")")
        if kind not in _DATATYPES:
            raise LoadError(f"{path.name}: tensor '{tensor.name}' has type {tensor.type}, which the protocol cannot carry; expected a plain tensor")
        shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in tensor.shape)
        specs.append(TensorSpec(tensor.name, _DATATYPES[kind], shape, is_optional))
    return tuple(specs)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_strings(array: Array) -> Array:
    """ONNX strings are UTF-8; onnxruntime takes str objects."""
    flat = array.ravel()
    decoded = np.empty(flat.shape, object)
    for index, element in enumerate(flat):
        try:
            decoded[index] = element.decode() if isinstance(element, bytes) else element
        except UnicodeDecodeError as error:
            raise BackendError(f"a string element is not UTF-8: {error.reason} at byte {error.start}") from None
    return decoded.reshape(array.shape)


def _bfloat16_bits(value: Any) -> Array:
    """The 16-bit patterns of a BF16 OrtValue, copied out of its memory: numpy() and DLPack both refuse the type."""
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, np.uint16)
    buffer = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(buffer, np.uint16).reshape(shape)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
