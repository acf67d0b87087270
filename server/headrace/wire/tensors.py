"""Tensor contents between their three forms: typed protobuf fields, the raw wire layout, numpy."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import InvalidRequest

_LENGTH = struct.Struct("<I")

TYPED_FIELDS: dict[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", "O"),
}
"""Datatype -> (field of InferTensorContents, wire dtype). FP16 and BF16 have no typed field."""


def decode_bytes_tensor(raw: bytes | memoryview, count: int, name: str, model: str) -> NDArray[np.object_]:
    """Elements of a BYTES tensor: [u32 little-endian length][bytes] each. Raises InvalidRequest in Triton's words."""
    raw = bytes(raw)
    end = len(raw)
    elements: list[bytes] = []
    position = 0
    unpack = _LENGTH.unpack_from
    while end - position >= 4:
        if len(elements) >= count:
            raise InvalidRequest(
                f"unexpected number of string elements {len(elements) + 1} for inference input '{name}' for model '{model}', expecting {count}"
            )
        start = position + 4
        position = start + unpack(raw, position)[0]
        if position > end:
            raise InvalidRequest(
                f"incomplete string data for inference input '{name}' for model '{model}', "
                f"expecting string of length {position - start} but only {end - start} bytes available"
            )
        elements.append(raw[start:position])
    if position != end:
        raise InvalidRequest(
            f"incomplete string length indicator for inference input '{name}' for model '{model}', "
            f"expecting 4 bytes but only {end - position} bytes available. Expecting {count - len(elements)} string elements"
        )
    if len(elements) != count:
        raise InvalidRequest(
            f"expected {count} string elements for inference input '{name}' for model '{model}', got {len(elements)}"
        )
    return _object_array(elements)


def _object_array(elements: Sequence[bytes]) -> NDArray[np.object_]:
    # Not np.array(elements, object): with elements of equal length numpy would still look into each of them.
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def encode_bytes_tensor(array: NDArray[Any]) -> bytes:
    """The wire layout of an object or string array, row-major; str elements as UTF-8."""
    parts: list[bytes] = []
    pack = _LENGTH.pack
    for element in array.ravel().tolist():
        content = element if isinstance(element, bytes) else str(element).encode()
        parts.append(pack(len(content)))
        parts.append(content)
    return b"".join(parts)


def decode_typed(contents: Any, datatype: str, count: int, name: str, model: str) -> bytes | NDArray[np.object_]:
    """An InferTensorContents as raw bytes (BYTES: its elements). Raises InvalidRequest on another field than the datatype's."""
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    field, dtype = TYPED_FIELDS.get(datatype, ("", ""))
    if not field:
        raise InvalidRequest(f"input '{name}' for model '{model}': datatype '{datatype}' has no typed contents, expected raw_input_contents")
    wrong = [other for other in filled if other != field]
    if wrong:
        raise InvalidRequest(f"input '{name}' for model '{model}': expected '{field}' for datatype '{datatype}', got '{', '.join(wrong)}'")
    values = getattr(contents, field)
    if datatype == "BYTES":
        if len(values) != count:
            raise InvalidRequest(f"expected {count} string elements for inference input '{name}' for model '{model}', got {len(values)}")
        return _object_array(list(values))
    return _narrow(np.array(values), np.dtype(dtype), name, model).tobytes()


def _narrow(values: NDArray[Any], dtype: np.dtype[Any], name: str, model: str) -> NDArray[Any]:
    """int_contents carries INT8 and INT16 in 32 bits; a value that does not fit is the client's mistake, not ours to wrap."""
    if values.size and dtype.kind in "iu" and dtype.itemsize < 4:
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise InvalidRequest(
                f"input '{name}' for model '{model}': expected values between {limits.min} and {limits.max}, "
                f"got {values.min()} to {values.max()}"
            )
    return values.astype(dtype)
