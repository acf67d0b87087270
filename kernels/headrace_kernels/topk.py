"""`topk` and `softmax` of class scores. These are the kernels' definitions, and their path on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Softmax:
    """Along the last axis, in fp32."""

    def __call__(self, scores: Array) -> Array:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class TopK:
    """[rows, classes] to the `k` largest of each row, descending, equal ones by class ascending, NaN last: (values, classes int32)."""

    k: int
    softmax: bool = False

    def __call__(self, scores: Array) -> tuple[Array, Array]:
        raise NotImplementedError
