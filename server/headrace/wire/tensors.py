"""Tensor contents between their three forms: typed protobuf fields, the raw wire layout, numpy."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidRequest
from headrace.wire.messages import InferTensorContents

_LENGTH = struct.Struct("<I")

# -- BYTES -----------------------------------------------------------------------------------------------------------------


def decode_bytes_tensor(raw: bytes | memoryview, count: int, name: str, model: str) -> NDArray[np.object_]:
    """Elements of a BYTES tensor: [u32 little-endian length][bytes] each. Raises InvalidRequest in Triton's words."""
    raw = bytes(raw)
    end = len(raw)
    elements: list[bytes] = []
    append = elements.append
    unpack = _LENGTH.unpack_from
    position = 0
    while end - position >= 4:
        start = position + 4
        position = start + unpack(raw, position)[0]
        if position > end:
            raise InvalidRequest(
                f"incomplete string data for inference input '{name}' for model '{model}', "
                f"expecting string of length {position - start} but only {end - start} bytes available"
            )
        append(raw[start:position])
        if len(elements) > count:
            raise InvalidRequest(
                f"unexpected number of string elements {len(elements)} for inference input '{name}' for model '{model}', expecting {count}"
            )
    if position != end:
        raise InvalidRequest(
            f"incomplete string length indicator for inference input '{name}' for model '{model}', "
            f"expecting 4 bytes but only {end - position} bytes available. Expecting {count - len(elements)} string elements"
        )
    if len(elements) != count:
        raise _too_few(len(elements), count, name, model)
    return _object_array(elements)


def encode_bytes_tensor(array: NDArray[Any]) -> bytes:
    """The wire layout of an object or string array, row-major; str elements as UTF-8."""
    parts: list[bytes] = []
    pack = _LENGTH.pack
    for element in array.ravel().tolist():
        content = element if isinstance(element, bytes) else str(element).encode()
        parts += (pack(len(content)), content)
    return b"".join(parts)


def _too_few(got: int, count: int, name: str, model: str) -> InvalidRequest:
    return InvalidRequest(f"expected {count} string elements for inference input '{name}' for model '{model}', got {got}")


def _object_array(elements: Sequence[bytes]) -> NDArray[np.object_]:
    # Not np.array(elements, object): with elements of equal length numpy would still look into each of them.
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


# -- typed contents ----------------------------------------------------------------------------------------------------------

_FIELDS = {
    "BOOL": ("bool_contents", "?", "?"),
    "INT8": ("int_contents", "<i4", "i1"),
    "INT16": ("int_contents", "<i4", "<i2"),
    "INT32": ("int_contents", "<i4", "<i4"),
    "INT64": ("int64_contents", "<i8", "<i8"),
    "UINT8": ("uint_contents", "<u4", "u1"),
    "UINT16": ("uint_contents", "<u4", "<u2"),
    "UINT32": ("uint_contents", "<u4", "<u4"),
    "UINT64": ("uint64_contents", "<u8", "<u8"),
    "FP32": ("fp32_contents", "<f4", "<f4"),
    "FP64": ("fp64_contents", "<f8", "<f8"),
    "BYTES": ("bytes_contents", "", ""),
}
"""Datatype -> (field of InferTensorContents, what its elements are, what the tensor's are). FP16 and BF16 have no field."""


def decode_typed(contents: InferTensorContents, datatype: str, count: int, name: str, model: str) -> bytes | NDArray[np.object_]:
    """An InferTensorContents as raw bytes, or the elements of BYTES, whose number must be `count`.

    Raises InvalidRequest when another field than the datatype's is filled, or a value does not fit the datatype.
    """
    subject = f"unexpected explicit tensor data for input tensor '{name}' for model '{model}' of type '{datatype}'"
    if datatype not in _FIELDS:
        raise InvalidRequest(f"{subject}: expected raw_input_contents, this datatype has no typed field")
    field, given, wanted = _FIELDS[datatype]
    wrong = [descriptor.name for descriptor, _ in contents.ListFields() if descriptor.name != field]
    if wrong:
        raise InvalidRequest(f"{subject}: expected {field}, got {', '.join(wrong)}")
    values = getattr(contents, field)
    if datatype != "BYTES":
        return _narrow(np.array(values, given), np.dtype(wanted), subject).tobytes()
    if len(values) > count:
        raise InvalidRequest(
            f"unexpected number of string elements {len(values)} for inference input '{name}' for model '{model}', expecting {count}"
        )
    if len(values) < count:
        raise _too_few(len(values), count, name, model)
    return _object_array(values[:])


def _narrow(values: NDArray[Any], dtype: np.dtype[Any], subject: str) -> NDArray[Any]:
    """int_contents carries INT8 and INT16 in 32 bits; a value that does not fit is the client's mistake, not ours to wrap."""
    if values.dtype == dtype:
        return values
    limits = np.iinfo(dtype)
    if values.size and not limits.min <= values.min() <= values.max() <= limits.max:
        raise InvalidRequest(f"{subject}: expected values from {limits.min} to {limits.max}, got {values.min()} to {values.max()}")
    return values.astype(dtype)
