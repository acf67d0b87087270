"""`gather`: rows of many requests, from anywhere in one slab, to a batch. This is the kernel's definition, and its path on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BFLOAT16 = "bfloat16"
"""numpy has no such type: its bits, in uint16."""


def row_table(offsets: Sequence[int], counts: Sequence[int], lengths: Sequence[int] | int, itemsize: int, rows: int) -> NDArray[np.int64]:
    """[rows, 2]: of each row of the batch its byte offset in the slab and its elements.

    Request r has counts[r] rows one behind the other from byte offsets[r], of lengths[r] elements each. Rows beyond the requests' own
    are row 0 again: a real row, not zeros, which can be far outside what a model was made for.
    """
    starts, times = np.asarray(offsets, np.int64), np.asarray(counts, np.int64)
    sizes = np.broadcast_to(np.asarray(lengths, np.int64), starts.shape)
    real = int(times.sum())
    if not 0 < real <= rows:
        raise ValueError(f"row table: expected 1 to {rows} rows of requests, got {real}")
    within = np.arange(real) - np.repeat(times.cumsum() - times, times)
    table = np.empty((rows, 2), np.int64)
    table[:real, 1] = np.repeat(sizes, times)
    table[:real, 0] = np.repeat(starts, times) + within * table[:real, 1] * itemsize
    table[real:] = table[0]
    return table


def gather(slab: Array, table: Array, width: int, source: str, target: str, pad: float = 0) -> tuple[Array, Array]:
    """(batch, mask), both [rows, width] of `target`. `slab`: bytes. Row i is the table's elements of type `source`, then `pad`; the mask is
    1 where an element came from the slab. Elements beyond `width` are cut off."""
    dtype = storage(source)
    batch = np.empty((len(table), width), storage(target))
    batch[:] = cast(
        np.asarray([pad], np.int64 if isinstance(pad, int) else np.float32), "int64" if isinstance(pad, int) else "float32", target
    )
    mask = cast(np.zeros(batch.shape, np.uint8), "uint8", target)
    one = cast(np.ones(1, np.uint8), "uint8", target)
    for row, (offset, length) in enumerate(table.tolist()):
        length = max(0, min(length, width))
        batch[row, :length] = cast(slab[offset : offset + length * dtype.itemsize].view(dtype), source, target)
        mask[row, :length] = one
    return batch, mask


def storage(datatype: str) -> np.dtype[Any]:
    """The numpy type that holds it."""
    return np.dtype(np.uint16 if datatype == BFLOAT16 else datatype)


def cast(values: Array, source: str, target: str) -> Array:
    """Numbers become 16-bit floats by way of fp32, ties to even. Floats become integers cut toward zero and saturate, NaN is 0: numpy
    leaves that to the processor. Integers wrap.
    """
    if source == target:
        return values
    integers = ("int32", "int64", "uint8")
    if source in integers and target in integers:
        return values.astype(target)
    numbers = _from_bfloat16(values) if source == BFLOAT16 else values.astype(np.float32)
    if target == BFLOAT16:
        return _to_bfloat16(numbers)
    if target in ("float32", "float16"):
        with np.errstate(over="ignore"):
            return numbers.astype(target)
    limits = np.iinfo(target)
    inside = (numbers > float(limits.min)) & (numbers < float(limits.max))
    cut = np.where(inside, numbers, 0).astype(target)
    cut[numbers >= float(limits.max)] = limits.max
    cut[numbers <= float(limits.min)] = limits.min
    return cut


def _from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(numbers: Array) -> Array:
    bits = numbers.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded)


__all__ = ["cast", "gather", "row_table", "storage"]
