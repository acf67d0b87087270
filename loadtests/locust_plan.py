"""What the locustfile decides without Locust: inputs that fit a model's metadata, and how many users there are when. Pure.

Apart from it, because importing Locust patches the standard library of whoever imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import triton_to_np_dtype


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """As ModelMetadata gives it; -1 stands for a free size, the batch's first."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def random_inputs(tensors: Sequence[TensorMetadata], rows: int, free: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """By tensor. A free first size is `rows`, other free ones are `free`. Raises ValueError for an unknown datatype."""
    return {tensor.name: _random_array(tensor, rows, free, rng) for tensor in tensors}


def _random_array(tensor: TensorMetadata, rows: int, free: int, rng: np.random.Generator) -> NDArray[Any]:
    """Integers stay below 128: most take a byte, a token or a class, and all types hold it."""
    shape = [size if size >= 0 else (rows if axis == 0 else free) for axis, size in enumerate(tensor.shape)]
    if tensor.datatype == "BYTES":
        return np.array([f"text {number}".encode() for number in range(int(np.prod(shape)))], object).reshape(shape)
    dtype = triton_to_np_dtype(tensor.datatype)
    if dtype is None:
        raise ValueError(f"input {tensor.name!r}: no rule to make up a {tensor.datatype}")
    if np.dtype(dtype).kind == "f":
        return rng.uniform(-1.0, 1.0, shape).astype(dtype)
    return rng.integers(0, 2 if tensor.datatype == "BOOL" else 128, shape).astype(dtype)


Shape = Callable[[float, float, int], int | None]
"""(seconds since the start, of the whole, users at the peak) to how many users there are now; None: it is over."""


def ramp(elapsed: float, seconds: float, peak: int) -> int | None:
    """Evenly up to the peak over three quarters, then held: where answers get slow is where the server is full."""
    if elapsed >= seconds:
        return None
    return max(1, min(peak, round(peak * elapsed / (0.75 * seconds))))


def spike(elapsed: float, seconds: float, peak: int) -> int | None:
    """A tenth of the peak, the peak in the middle fifth, a tenth again: does it come through, and is it afterwards as before."""
    if elapsed >= seconds:
        return None
    return peak if 0.4 <= elapsed / seconds < 0.6 else max(1, peak // 10)


SHAPES: dict[str, Shape] = {"ramp": ramp, "spike": spike}
EVERY = "all"


def selected_shapes(text: str | None) -> set[str]:
    """The shapes that Locust gets to see: without a class picker it takes the first it sees. Raises ValueError."""
    if not text:
        return set()
    if text != EVERY and text not in SHAPES:
        raise ValueError(f"HEADRACE_SHAPE: expected {', '.join(SHAPES)} or {EVERY}, got {text!r}")
    return {*SHAPES} if text == EVERY else {text}
