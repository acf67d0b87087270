"""ONNX Runtime's sessions for the backends that have one: opening them, and tensors as the runtime takes and gives them."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.backends.base import Array, ArtifactSignature
from headrace.errors import LoadError
from headrace.signature import DataType, TensorSpec

Provider = str | tuple[str, dict[str, str]]
"""The name of an execution provider, with its options."""

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
ONNX_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16"""

_RAW_STRINGS_LIMIT = 64 << 20
_REASON_LIMIT = 1000


def import_runtime() -> Any:
    # From 1.31 on it otherwise keeps an id of this machine below the user's cache directory, and reports to its makers.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Imported at first use: it takes a tenth of a second and 30 MB that `headrace --help` must not pay.
    try:
        import onnxruntime
    except ImportError as error:
        reason = str(error)
    else:
        return onnxruntime
    raise LoadError(f"onnxruntime is not there ({reason}); pip install 'headrace[cpu]'")


def open_session(path: Path, options: Any, providers: Sequence[Provider]) -> Any:
    """Raises LoadError. Never falls back to other providers by itself, which the runtime's Python interface does otherwise."""
    place = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise LoadError(f"expected an ONNX file at {place}, found none")
    runtime = import_runtime()
    try:
        return runtime.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # no common base
        reason = one_line(error).replace(str(path), place)
    raise LoadError(f"onnxruntime could not load {place}: {reason}")


def direct_run(session: Any) -> Callable[..., list[Array]]:
    """The session's own run, without the checks of names that the signature has already made: 2.7 µs a call instead of 3.3
    with onnxruntime 1.32, 4 instead of 7 before. The attribute is private, hence the public method where it is gone."""
    run: Callable[..., list[Array]] = getattr(getattr(session, "_sess", None), "run", session.run)
    return run


def one_line(error: BaseException) -> str:
    """The runtime's text on one line. Callers keep this and drop the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines)[:_REASON_LIMIT] or type(error).__name__


# -- tensors -----------------------------------------------------------------------------------------------------------


def signature_of(path: Path, session: Any) -> ArtifactSignature:
    return ArtifactSignature(_specs(path, "input", session.get_inputs()), _specs(path, "output", session.get_outputs()))


def _specs(path: Path, kind: str, tensors: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor in tensors:
        is_optional = tensor.type.startswith("optional(")
        plain = tensor.type.removeprefix("optional(").removesuffix(")") if is_optional else tensor.type
        if plain not in _DATATYPES:
            raise LoadError(
                f"{path.parent.name}/{path.name}: {kind} '{tensor.name}' is a {tensor.type}, which the protocol cannot carry; "
                f"expected a tensor of one of {', '.join(datatype.value for datatype in DataType)}"
            )
        shape = tuple(length if isinstance(length, int) and length >= 0 else -1 for length in tensor.shape)
        specs.append(TensorSpec(tensor.name, _DATATYPES[plain], shape, is_optional))
    return tuple(specs)


def check_string_path(path: Path, signature: ArtifactSignature) -> None:
    text = next((spec.name for spec in signature.inputs if spec.datatype is DataType.BYTES), None)
    narrow = next((spec.name for spec in signature.outputs if spec.datatype is DataType.BF16), None)
    if text is not None and narrow is not None:
        raise LoadError(
            f"{path.parent.name}/{path.name}: input '{text}' is BYTES and output '{narrow}' BF16; the one call of "
            "onnxruntime's Python interface that returns bfloat16 takes no strings. Cast the output to FP32 in the model"
        )


def check_present(names: Sequence[str], results: Sequence[Array | None]) -> None:
    for name, result in zip(names, results, strict=True):
        if result is None:
            raise ValueError(f"output '{name}' is optional and was not produced for this input; ask for the other outputs only")


def _string_array(name: str, array: Array) -> Array:
    """str objects, which is what the runtime encodes; given bytes objects it would take their repr()."""
    try:
        texts = [element.decode() if isinstance(element, bytes) else element for element in array.ravel()]
    except UnicodeDecodeError:
        return _raw_string_array(name, array)
    strings = np.empty(len(texts), object)
    strings[:] = texts
    return strings.reshape(array.shape)


def _raw_string_array(name: str, array: Array) -> Array:
    """The same for bytes that are not UTF-8, which str cannot hold: a fixed-width array, whose elements the runtime reads as
    they are up to a NUL, so that one request's odd bytes are the model's business and fail no batch mate.

    Raises ValueError for what does not fit such an array: bytes with NUL, and (width times count) beyond any honest text.
    """
    elements = [element if isinstance(element, bytes) else element.encode() for element in array.ravel()]
    width = 1 + max(map(len, elements))
    if width * len(elements) > _RAW_STRINGS_LIMIT or any(b"\0" in element for element in elements):
        position = next(i for i, element in enumerate(elements) if not _is_utf8(element))
        raise ValueError(f"input '{name}': expected UTF-8, element {position} of {len(elements)} is not")
    return np.array(elements, f"S{width}").reshape(array.shape)


def _is_utf8(element: bytes) -> bool:
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bfloat16_value(_name: str, array: Array) -> Any:
    """An OrtValue over the array's memory: numpy has no name for the type, so it cannot be passed as an array."""
    return import_runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_BFLOAT16)


def bfloat16_bits(value: Any) -> Array:
    """The 16-bit patterns of a BF16 OrtValue, copied out of its memory: numpy() and DLPack both refuse the type."""
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, np.uint16)
    buffer = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(buffer, np.uint16).reshape(shape)


CONVERSIONS: dict[DataType, Callable[[str, Array], Any]] = {DataType.BYTES: _string_array, DataType.BF16: _bfloat16_value}
"""What the runtime does not take as our arrays hold it."""
