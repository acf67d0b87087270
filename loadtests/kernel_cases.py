"""Inputs of the kernels, random and odd, and what their results are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
from headrace_kernels.gather import cast
from headrace_kernels.normalize import Normalize
from numpy.typing import NDArray

Array = NDArray[Any]

SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 3.4e38, 65504, 65519.99, 65520, 1e-8, 5.96e-8, 2.5, 3.5], np.float32)
"""Among them what is subnormal in fp32, the largest fp16 number and where it ends, what rounds to fp16's smallest or away."""


def numbers(generator: np.random.Generator, shape: tuple[int, ...], datatype: str, special: float = 0.1) -> Array:
    """Random values of a type, a share of them special ones where it has such."""
    if datatype in ("int32", "int64", "uint8"):
        limits = np.iinfo(datatype)
        small = generator.integers(0 if datatype == "uint8" else -300, 255, shape, dtype=datatype)
        return np.where(generator.random(shape) < 0.5, small, generator.integers(limits.min, limits.max, shape, datatype, endpoint=True))
    values = (generator.normal(size=shape) * 10.0 ** generator.integers(-3, 4, shape)).astype(np.float32)
    chosen = generator.random(shape) < special
    values[chosen] = generator.choice(SPECIAL, int(chosen.sum()))
    return cast(values, "float32", datatype)


def same(result: Array, expected: Array, datatype: str) -> None:
    """Equal element by element; all NaN are one, whatever their bits."""
    if datatype == "bfloat16":
        result, expected = cast(result, datatype, "float32"), cast(expected, datatype, "float32")
    np.testing.assert_array_equal(result, expected)


def slab_of(generator: np.random.Generator, rows: list[Array], alignment: int) -> tuple[Array, list[int]]:
    """The rows at random places of one slab, (slab, offsets). Whatever lies between is noise."""
    offsets, end = [], 0
    for row in rows:
        start = end + int(generator.integers(0, 3)) * alignment
        start += -start % alignment
        offsets.append(start)
        end = start + row.nbytes
    slab = generator.integers(0, 256, end + 1, dtype=np.uint8)
    for row, offset in zip(rows, offsets, strict=True):
        slab[offset : offset + row.nbytes] = row.view(np.uint8).reshape(-1)
    return slab, offsets


def normalized(images: Array, how: Normalize) -> Array:
    """What `how` asks for, in fp64 and before the last rounding; the resize by its sentence, a weight for every pair of pixels."""
    values: Array = images.astype(np.float64)
    if how.size is not None:
        down, across = (triangle(to, size, how.antialias) for to, size in zip(how.size, images.shape[1:3], strict=True))
        values = np.einsum("yi,xj,nijc->nyxc", down, across, values)
    if how.reverse_channels:
        values = values[..., ::-1]
    values = (values * how.scale - np.array(how.mean)) / np.array(how.deviation)
    return values.transpose(0, 3, 1, 2) if how.layout == "NCHW" else values


def triangle(to: int, size: int, antialias: bool) -> Array:
    """[to, size]: the weight of each pixel of the source in each of the result."""
    scale = size / to
    width = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(to) + 0.5) * scale
    weights: Array = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / width)
    # Without antialias a centre beyond the outermost ones has one neighbour: the edge.
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def near(result: Array, expected: Array, datatype: str, tolerance: float) -> None:
    """`expected` in fp64: each element within `tolerance` of it and the rounding to `datatype`."""
    precision = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[datatype]
    values = cast(result, datatype, "float32").astype(np.float64)
    smallest = 2.0**-25 if datatype == "float16" else 0.0
    error = np.abs(values - expected) - np.abs(expected) * precision * 1.001 - smallest
    assert error.max(initial=-1.0) <= tolerance, f"off by {error.max()} beyond rounding, expected at most {tolerance}"


__all__ = ["near", "normalized", "numbers", "same", "slab_of"]
