"""`screen`: what is in a batch, by feature and by request. This is the kernel's definition, and its path on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.gather import BFLOAT16, cast

Array = NDArray[Any]

RECORD = np.dtype([("sum", "f8"), ("squares", "f8"), ("minimum", "f4"), ("maximum", "f4"), ("nonfinite", "u4"), ("finite", "u4")])
"""Of finite values: sum and sum of squares in fp64, least and largest (+inf and -inf where there is none) and how many; and how many
values are NaN or infinite. 32 bytes, as the kernel writes them."""


def screen(values: Array, owners: Array, requests: int) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """([features], [requests]) of RECORD of [rows, features] values, taken as fp32; uint16 holds the bits of bfloat16.

    `owners` [rows]: the request of each row; -1: padding, not looked at.

    Sums and squares are of fp32 numbers in fp64, where each square is exact; only their additions round, in any order. So two
    results differ by no more than values * 2^-53 times the sum of the magnitudes (`sum_tolerance`). Everything else is exact.
    """
    numbers = cast(values, BFLOAT16 if values.dtype == np.uint16 else values.dtype.name, "float32")
    real = owners >= 0
    by_feature = _records(numbers[real], values.shape[1])
    by_request = np.empty(requests, RECORD)
    for request in range(requests):
        by_request[request] = _records(numbers[owners == request].reshape(-1, 1), 1)[0]
    return by_feature, by_request


def _records(numbers: Array, columns: int) -> NDArray[np.void]:
    finite = np.isfinite(numbers)
    wide = np.where(finite, numbers, 0).astype(np.float64)
    records = np.empty(columns, RECORD)
    records["sum"] = wide.sum(axis=0)
    records["squares"] = (wide * wide).sum(axis=0)
    records["minimum"] = np.where(finite, numbers, np.inf).min(axis=0, initial=np.inf)
    records["maximum"] = np.where(finite, numbers, -np.inf).max(axis=0, initial=-np.inf)
    records["finite"] = finite.sum(axis=0)
    records["nonfinite"] = (~finite).sum(axis=0)
    return records


def sum_tolerance(records: NDArray[np.void]) -> tuple[Array, Array]:
    """How far sums and squares of two orders of addition may be apart. By Cauchy-Schwarz the magnitudes' sum is no more than
    sqrt(values * squares)."""
    values = records["finite"].astype(np.float64)
    return values * 2.0**-52 * np.sqrt(values * records["squares"]), values * 2.0**-52 * records["squares"]


__all__ = ["RECORD", "screen", "sum_tolerance"]
