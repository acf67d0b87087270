"""`topk` and `softmax` of class scores. These are the kernels' definitions, and their path on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LOW = np.int64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Softmax:
    """Along the last axis, in fp32. Scores of any floating type; uint16 holds the bits of bfloat16.

    NaN or +inf among a row's scores, or nothing but -inf, makes all of the row NaN.
    """

    def __call__(self, scores: Array) -> Array:
        return _softmax(_as_float32(scores))


@dataclass(frozen=True, slots=True)
class TopK:
    """[rows, classes] to the `k` largest of each row, descending, equal ones by class ascending, NaN last: (values fp32, classes int32).

    Scores as for Softmax. With `softmax` the values are those of the whole row's; the order is still that of the scores, which tells
    apart what is the same as a probability. 0.0 and -0.0 are equal.
    """

    k: int
    softmax: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")

    def __call__(self, scores: Array) -> tuple[Array, Array]:
        if scores.ndim != 2 or scores.shape[1] < self.k:
            raise ValueError(f"scores: expected [rows, {self.k} classes or more], got {list(scores.shape)}")
        values = _as_float32(scores)
        keys = _keys(values)
        if self.k < keys.shape[1]:
            keys = np.partition(keys, keys.shape[1] - self.k, axis=1)[:, -self.k :]
        keys = np.sort(keys, axis=1)[:, ::-1]
        classes = _LOW - (keys & _LOW)
        found = np.take_along_axis(_softmax(values) if self.softmax else values, classes, axis=1)
        return found, classes.astype(np.int32)


def _as_float32(scores: Array) -> NDArray[np.float32]:
    if scores.dtype == np.uint16:
        return (scores.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what fp64 holds and fp32 does not is an infinity
        return np.asarray(scores, np.float32)


def _softmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not values.size:
        return values.copy()
    with np.errstate(invalid="ignore"):  # inf - inf
        powers: NDArray[np.float32] = np.exp(values - values.max(axis=-1, keepdims=True))
        powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def _keys(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Value and class of each score as one number, all different, larger for what comes first: the rule for ties costs nothing then."""
    bits = (values + np.float32(0)).view(np.int32)  # -0.0 + 0.0 is 0.0
    # Of negative floats the larger pattern is the lesser number.
    order = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    order[np.isnan(values)] = np.iinfo(np.int32).min
    return np.asarray((order << 32) | (_LOW - np.arange(values.shape[1], dtype=np.int64)))
