"""Captured requests of plain arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from headrace.capture.records import Captured, CapturedTensor
from headrace.wire.tensors import encode_bytes_tensor
from numpy.typing import NDArray

DATATYPES = {"f": "FP32", "i": "INT64", "O": "BYTES"}


def tensor(name: str, array: NDArray[Any]) -> CapturedTensor:
    kind = array.dtype.kind
    data = encode_bytes_tensor(array) if kind == "O" else array.astype({"f": "<f4", "i": "<i8"}[kind]).tobytes()
    return CapturedTensor(name, DATATYPES[kind], array.shape, data)


def captured(
    inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]], *, model: str = "m", version: int = 1, id: str = "", at: float = 0.0
) -> Captured:
    rows = len(next(iter(inputs.values())))
    given, made = [tuple([tensor(name, array) for name, array in arrays.items()]) for arrays in (inputs, outputs)]
    return Captured(model, version, id, at, rows, True, given, made)


def plain(rows: int = 2, **options: Any) -> Captured:
    x = np.arange(3.0 * rows).reshape(rows, 3)
    return captured({"x": x, "name": np.array([[b"a"]] * rows, object)}, {"y": x * 2, "label": np.arange(rows)}, **options)
