"""Bilinear resize of one image, in fp32: of `normalize`, which defines it.

Along each axis a pixel of the result is a weighted mean of pixels of the source, by a triangle around its centre (half-pixel centres: pixel
i of the result lies at (i + 0.5) * length / size). The triangle reaches one pixel to either side, and with antialiasing of a
reduction by s it reaches s pixels. Weights beyond the edge are left out, and the rest is divided by its sum.

Two pixels each are gathered; wider triangles are products with a few rows of weights at a time, and the source's rows under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROWS_AT_A_TIME = 8
"""Of a result that one product makes. More of them share less of the source, fewer are more calls."""
MOST_PRODUCTS = 1 << 18
"""Multiplications of one product at most. OpenBLAS, which numpy computes with, takes larger ones to threads of its own, which then spin on
cores that others serve with: 1080 x 1920 to 224 x 224 took 38 ms so and 16 in parts, on two busy cores, and a third of the CPU time."""
LONGEST_KEPT = 8192
"""Pixels of a side whose weights are kept for the next image: some 70 bytes for each."""


class _Band(NamedTuple):
    """`weights` [rows of the result, rows of the source]: rows `start` to `stop` of the one are made of `low` to `high` of the other."""

    start: int
    stop: int
    low: int
    high: int
    weights: NDArray[np.float32]


def resize(image: Array, size: tuple[int, int], *, antialias: bool) -> NDArray[np.float32]:
    """[height, width, channels] of any size but none, uint8, to [channels, *size]."""
    height, width, channels = image.shape
    if size[0] * width > 2 * height * size[1]:
        # The other axis first: 1 x 4,000,000 pixels would have 224 times as many in between.
        return resize(image.transpose(1, 0, 2), (size[1], size[0]), antialias=antialias).transpose(0, 2, 1)
    lines = np.ascontiguousarray(image).reshape(height, width * channels)
    part = _along_first(lines, size[0], antialias).reshape(size[0], width, channels)
    planes = np.ascontiguousarray(part.transpose(2, 0, 1)).reshape(channels * size[0], width)
    return _along_first(planes.T, size[1], antialias).T.reshape(channels, *size)


def _along_first(lines: Array, size: int, antialias: bool) -> NDArray[np.float32]:
    """[length, n] to [size, n]"""
    length = len(lines)
    if size == length:
        return lines.astype(np.float32)
    if not antialias or size > length:
        return _between_two(lines, size)
    result = np.empty((size, lines.shape[1]), np.float32)
    for band in _bands(length, size) if length <= LONGEST_KEPT else make_bands(length, size):
        part = lines[band.low : band.high].astype(np.float32, copy=False)
        _weigh(band.weights, part, result[band.start : band.stop])
    return result


def _between_two(lines: Array, size: int) -> NDArray[np.float32]:
    length = len(lines)
    place = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    lower = place.astype(np.intp)
    result = lines[lower].astype(np.float32)
    step = lines[np.minimum(lower + 1, length - 1)].astype(np.float32)
    step -= result
    step *= (place - lower).astype(np.float32)[:, None]
    result += step
    return result


def make_bands(length: int, size: int) -> Sequence[_Band]:
    """Of a reduction, antialiased."""
    scale = length / size
    centre = (np.arange(size) + 0.5) * scale
    low = np.maximum(centre - scale + 0.5, 0).astype(np.intp)
    high = np.minimum(centre + scale + 0.5, length).astype(np.intp)
    bands = []
    for start in range(0, size, ROWS_AT_A_TIME):
        rows = slice(start, min(start + ROWS_AT_A_TIME, size))
        first, last = int(low[rows.start]), int(high[rows.stop - 1])
        pixels = np.arange(first, last)
        weights = np.maximum(1 - np.abs(pixels + 0.5 - centre[rows, None]) / scale, 0)
        weights[(pixels < low[rows, None]) | (pixels >= high[rows, None])] = 0
        weights /= weights.sum(axis=1, keepdims=True)
        bands.append(_Band(rows.start, rows.stop, first, last, weights.astype(np.float32)))
    return bands


_bands = lru_cache(maxsize=64)(make_bands)


def _weigh(weights: Array, lines: Array, into: Array) -> None:
    """The product, in parts of at most MOST_PRODUCTS."""
    count = lines.shape[1]
    width = min(max(MOST_PRODUCTS // weights.size, 1), count)
    whole = count // width * width
    parts = [array[:, :whole].reshape(len(array), -1, width).transpose(1, 0, 2) for array in (lines, into)]
    np.matmul(weights, parts[0], out=parts[1])
    if whole < count:
        np.matmul(weights, lines[:, whole:], out=into[:, whole:])
