"""From the arrays of a batch to one value a row of each feature. Pure.

Numbers come as float64, which holds every value of the tensors' types exactly, 64-bit integers beyond 2**53 apart; BF16 arrives as its
bit pattern. A row that holds NaN has NaN for everything that is computed from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.drift.features import OF_SCORES, Extract, Feature
from headrace.drift.plan import PROJECTIONS, channels_of

Array = NDArray[Any]
Values = NDArray[np.float64]


def as_numbers(array: Array, is_bf16: bool = False) -> Array:
    """Floats or integers as they are; BF16's patterns as the floats that they mean; booleans as 0 and 1."""
    if is_bf16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    return np.asarray(array, np.float32) if array.dtype == np.float16 else array


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest patterns, of two equally near ones the even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def numbers(array: Array, features: Sequence[Feature], is_bf16: bool = False) -> Values:
    """[rows, features]: the values of one tensor's numeric features; `array` has a dimension of rows first."""
    if array.dtype.kind == "O":
        return _lengths(array, features)
    array = as_numbers(array, is_bf16)
    flat = array.reshape(len(array), -1)
    out = np.empty((len(array), len(features)))
    columns = [(position, feature.index) for position, feature in enumerate(features) if feature.extract is Extract.COLUMN]
    if columns:
        out[:, [position for position, _ in columns]] = flat[:, [index for _, index in columns]]
    rest = [(position, feature) for position, feature in enumerate(features) if feature.extract is not Extract.COLUMN]
    if rest:
        # Infinities and NaN are data here, and what they make of a sum is meant.
        with np.errstate(all="ignore"):
            _derive(array, flat, rest, out)
    return out


def _lengths(array: Array, features: Sequence[Feature]) -> Values:
    flat = array.reshape(len(array), -1)
    lengths = np.array([len(each) for each in flat[:, 0]], np.float64) if flat.size else np.zeros(len(array))
    return np.repeat(lengths[:, None], len(features), axis=1)


def _derive(array: Array, flat: Array, rest: Sequence[tuple[int, Feature]], out: Values) -> None:
    projected = [(position, feature.index) for position, feature in rest if feature.extract is Extract.PROJECTION]
    if projected:
        signs = directions(flat.shape[1])[:, [index for _, index in projected]]
        out[:, [position for position, _ in projected]] = flat.astype(np.float32) @ signs
    by_channel: dict[int, list[tuple[int, Extract]]] = {}
    scores: list[tuple[int, Feature]] = []
    for position, feature in rest:
        if feature.extract in OF_SCORES:
            scores.append((position, feature))
        elif feature.extract is not Extract.PROJECTION:
            by_channel.setdefault(feature.index, []).append((position, feature.extract))
    channels = max(by_channel, default=-1) + 1
    for channel, wanted in by_channel.items():
        _summarise(_channel(array, channel, channels), wanted, out)
    if scores:
        _score(probabilities(flat, scores[0][1].is_logits), scores, out)


def _channel(array: Array, channel: int, channels: int) -> Array:
    """[rows, ...]: one channel of pictures, or all of a row."""
    if channel < 0:
        return array
    found = channels_of(array.shape[1:])
    # Pictures whose sides are free may be smaller than what is taken for one: those of [[preprocess]] have their channels last.
    is_last = found[0] == array.ndim - 2 if found is not None else array.shape[-1] == channels
    return np.asarray(np.take(array, channel, axis=array.ndim - 1 if is_last else 1))


def _summarise(part: Array, wanted: Sequence[tuple[int, Extract]], out: Values) -> None:
    flat = part.reshape(len(part), -1)
    if not flat.shape[1]:
        for position, extract in wanted:
            out[:, position] = 0.0 if extract is Extract.LENGTH else np.nan
        return
    for position, extract in wanted:
        if extract is Extract.MEAN:
            out[:, position] = flat.mean(axis=1, dtype=np.float64)
        elif extract is Extract.DEVIATION:
            out[:, position] = flat.std(axis=1, dtype=np.float64)
        elif extract is Extract.MINIMUM:
            out[:, position] = flat.min(axis=1)
        elif extract is Extract.MAXIMUM:
            out[:, position] = flat.max(axis=1)
        elif extract is Extract.NORM:
            out[:, position] = np.sqrt(np.einsum("ij,ij->i", flat, flat, dtype=np.float64))
        elif extract is Extract.LENGTH:
            out[:, position] = flat.shape[1]
        else:
            out[:, position] = _sharpness(part)


def _sharpness(part: Array) -> Values:
    """The root of the mean square of differences of neighbours, along every axis behind the rows."""
    total, count = np.zeros(len(part)), 0
    for axis in range(1, part.ndim):
        steps = np.diff(part.astype(np.float32), axis=axis).reshape(len(part), -1)
        total += np.einsum("ij,ij->i", steps, steps, dtype=np.float64)
        count += steps.shape[1]
    return np.sqrt(total / max(count, 1))


def probabilities(scores: Array, is_logits: bool) -> Values:
    """[rows, classes]. Softmax of logits, less the row's largest so that nothing overflows."""
    values = scores.astype(np.float64)
    if not is_logits:
        return values
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _score(chances: Values, wanted: Sequence[tuple[int, Feature]], out: Values) -> None:
    best = chances.max(axis=1)
    for position, feature in wanted:
        if feature.extract is Extract.CONFIDENCE:
            out[:, position] = best
        elif feature.extract is Extract.ENTROPY:
            out[:, position] = -np.where(chances > 0, chances * np.log(np.where(chances > 0, chances, 1.0)), 0.0).sum(axis=1)
        elif chances.shape[1] > 1:
            out[:, position] = best - np.partition(chances, -2, axis=1)[:, -2]
        else:
            out[:, position] = best


def categories(array: Array, feature: Feature) -> Array:
    """[rows]: the feature's values to be told apart: integers, floats or bytes. Strings lie in object arrays."""
    flat = array.reshape(len(array), -1)
    if feature.extract is Extract.CLASS:
        return np.asarray(flat.argmax(axis=1))
    return np.asarray(flat[:, feature.index])


def as_text(value: object) -> str:
    """A category's name. Bytes that are no UTF-8 keep what they are, visibly."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.9g}"  # enough to tell any two FP32 apart
    return str(value)


@lru_cache(maxsize=64)
def directions(size: int) -> NDArray[np.float32]:
    """[size, PROJECTIONS]: of each direction the element is +1 or -1, divided by the root of `size`.

    The sign of element i in direction j is bit j of splitmix64's i-th output from state 0 (Steele, Lea and Flood 2014; i from 0): a
    reference stays valid whoever computes it, in whatever language. Such projections keep distances (Achlioptas 2003).
    """
    with np.errstate(over="ignore"):
        z = (np.arange(1, size + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    bits = (z[:, None] >> np.arange(PROJECTIONS, dtype=np.uint64)) & np.uint64(1)
    return ((bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(size))).astype(np.float32)
