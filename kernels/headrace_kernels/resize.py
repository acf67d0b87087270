"""Bilinear resize of one image, in fp32: of `normalize`, which defines it.

Along each axis a pixel of the result is a weighted mean of pixels of the source, by a triangle around its centre (half-pixel centres: pixel
i of the result lies at (i + 0.5) * length / size). The triangle reaches one pixel to either side, and with antialiasing of a
reduction by s it reaches s pixels. Weights beyond the edge are left out, and the rest is divided by its sum.

Two pixels each are gathered; wider triangles are products with a few rows of weights at a time, and the source's rows under them.
"""

from __future__ import annotations

import threading
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
MOST_KEPT = 1 << 21
"""Pixels of the channels between the axes for which a thread keeps memory; 224 lines of 3,000 pixels."""
LONGEST_KEPT = 8192
"""Pixels of a side whose weights are kept for the next image: some 70 bytes for each."""


class _Band(NamedTuple):
    """`weights` [rows of the result, rows of the source]: rows `start` to `stop` of the one are made of `low` to `high` of the other."""

    start: int
    stop: int
    low: int
    high: int
    weights: NDArray[np.float32]


class _Scratch(threading.local):
    """Of a thread: two places for what lies between the axes. New memory for each image would be as many page faults as it has pages, which
    took a third of the time."""

    def __init__(self) -> None:
        self._kept = np.empty((2, 0), np.float32)

    def take(self, size: int) -> Array:
        """[2, size]"""
        if size > MOST_KEPT:
            return np.empty((2, size), np.float32)
        if self._kept.shape[1] < size:
            self._kept = np.empty((2, size), np.float32)
        return self._kept[:, :size]


_scratch = _Scratch()


def resize(image: Array, size: tuple[int, int], *, antialias: bool) -> NDArray[np.float32]:
    """[height, width, channels] of any size but none, uint8, to [channels, *size]."""
    height, width, channels = image.shape
    if size[0] * width > 2 * height * size[1]:
        # The other axis first: 1 x 4,000,000 pixels would have 224 times as many in between.
        return resize(image.transpose(1, 0, 2), (size[1], size[0]), antialias=antialias).transpose(0, 2, 1)
    part, planes = _scratch.take(size[0] * width * channels)
    part, planes = part.reshape(size[0], width * channels), planes.reshape(channels, size[0], width)
    _along_first(np.ascontiguousarray(image).reshape(height, width * channels), part, antialias)
    planes[...] = part.reshape(size[0], width, channels).transpose(2, 0, 1)
    result = np.empty((channels, *size), np.float32)
    _along_first(planes.reshape(-1, width).T, result.reshape(-1, size[1]).T, antialias)
    return result


def _along_first(lines: Array, into: Array, antialias: bool) -> None:
    """[length, n] to [size, n]"""
    length, size = len(lines), len(into)
    if size == length:
        into[...] = lines
    elif size > length or not antialias:
        _between_two(lines, into)
    else:
        for band in _bands(length, size) if length <= LONGEST_KEPT else make_bands(length, size):
            part = lines[band.low : band.high].astype(np.float32, copy=False)
            _weigh(band.weights, part, into[band.start : band.stop])


def _between_two(lines: Array, into: Array) -> None:
    length, size = len(lines), len(into)
    place = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    lower = place.astype(np.intp)
    into[...] = lines[lower]
    step = lines[np.minimum(lower + 1, length - 1)] - into
    step *= (place - lower).astype(np.float32)[:, None]
    into += step


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
