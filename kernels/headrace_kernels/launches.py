"""What to launch for which sizes: kernel, grid, block and arguments. Pure.

Arguments are ctypes values of the kernel's own parameter types, and plain ints for addresses. Sizes that a kernel does not take raise
ValueError; nothing to do is no launch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from headrace_kernels.normalize import Normalize
from headrace_kernels.sources import CHANNELS, DATATYPES, FLOATS, ITEMSIZE

Argument = int | ctypes.c_int | ctypes.c_uint | ctypes.c_longlong | ctypes.c_ulonglong | ctypes.c_float

MOST_LINES = 65_535
"""CUDA's limit of a grid's second axis; kernels go on from there in steps of the grid."""

# As the sources have them.
GATHER_UNROLL = 4
NORMALIZE_THREADS = 128
TILE = 2048
SCREEN_WARPS = 8
HISTOGRAM_THREADS = 256
HISTOGRAM_UNROLL = 4
TEAM = 256
ROWS_A_BLOCK = 4

WARP_CLASSES = 1024
"""Up to which a row's classes are one warp's: 32 for each lane."""
SHARED_LIMIT = 48 << 10
"""What a block may have on every architecture without asking for more."""
SHARED_BUDGET = 32 << 10
"""Up to which counters get copies: leaves room for several blocks a multiprocessor on each architecture."""


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: str
    grid: tuple[int, int]
    block: tuple[int, int]
    arguments: tuple[Argument, ...]
    shared: int = 0


def gather(
    *, slab: int, table: int, into: int, rows: int, width: int, source: str, target: str, pad: float = 0, mask: int = 0
) -> tuple[Launch, ...]:
    """Rows from anywhere in `slab` to [rows, width] of `target` at `into`; gather.gather is the definition.

    `table`: int64 [rows, 2] in device memory: byte offset of the row in the slab, a multiple of the element's size (16 is fastest), and
    its elements. What is missing to `width` is `pad`. gather.row_table makes one from requests; its padding rows point at row 0 of
    the batch, so that only real rows cross the bus. `mask`: [rows, width] of `target`, 1 where an element came from the slab,
    else 0; 0: not wanted. `source` and `target` are DATATYPES.
    """
    _check("gather", "source", source, DATATYPES)
    _check("gather", "target", target, DATATYPES)
    if not rows or not width:
        return ()
    vector = 16 // max(ITEMSIZE[source], ITEMSIZE[target])
    threads = min(256, _up(_parts(width, vector * GATHER_UNROLL), 32))
    grid = (_parts(width, vector * GATHER_UNROLL * threads), min(rows, MOST_LINES))
    arguments = (slab, table, into, mask, ctypes.c_longlong(rows), ctypes.c_longlong(width), ctypes.c_ulonglong(pad_bits(pad, target)))
    return (Launch(f"gather_{source}_{target}", grid, (threads, 1), arguments),)


def pad_bits(pad: float, target: str) -> int:
    """The bytes of a pad value, as the kernel takes them."""
    import numpy as np

    from headrace_kernels.gather import cast

    whole = isinstance(pad, int)
    bits = cast(np.asarray([pad], np.int64 if whole else np.float32), "int64" if whole else "float32", target)
    return int.from_bytes(bits.tobytes(), "little")


def normalize(
    *, images: int, into: int, rows: int, height: int, width: int, channels: int, normalize: Normalize, table: int = 0
) -> tuple[Launch, ...]:
    if channels not in CHANNELS:
        raise ValueError(f"normalize: expected {CHANNELS} channels, got {channels}")
    to_height, to_width = normalize.size or (height, width)
    if not rows or not height or not width:
        return ()
    layout = f"{normalize.layout.lower()}_{normalize.datatype}_{channels}"
    factors, terms = coefficients(normalize, channels)
    constants: tuple[Argument, ...] = (*_floats(factors), *_floats(terms), ctypes.c_int(normalize.reverse_channels))
    lines, pixels = min(rows, MOST_LINES), to_height * to_width
    if (to_height, to_width) == (height, width):
        sizes: tuple[Argument, ...] = (ctypes.c_longlong(rows), ctypes.c_longlong(pixels))
        kernel, grid = f"normalize_{layout}", (_parts(pixels, TILE), lines)
    else:
        numbers = [ctypes.c_int(number) for number in (to_height, to_width, height, width, normalize.antialias)]
        sizes = (ctypes.c_longlong(rows), *numbers)
        kernel, grid = f"resize_{layout}", (_parts(pixels, NORMALIZE_THREADS), lines)
    return (Launch(kernel, grid, (NORMALIZE_THREADS, 1), (images, table, into, *sizes, *constants)),)


def _floats(numbers: list[float]) -> list[ctypes.c_float]:
    return [ctypes.c_float(number) for number in numbers]


def coefficients(normalize: Normalize, channels: int) -> tuple[list[float], list[float]]:
    """(factors, terms) of four channels, in the source's order: a byte times its factor and plus its term is the result."""
    mean, deviation = (
        values if len(values) == channels else values * channels if len(values) == 1 else None
        for values in (normalize.mean, normalize.deviation)
    )
    if mean is None or deviation is None:
        raise ValueError(f"normalize: expected mean and deviation of 1 or {channels} numbers, got {normalize.mean}, {normalize.deviation}")
    factors = [normalize.scale / one for one in deviation]
    terms = [-m / d for m, d in zip(mean, deviation, strict=True)]
    order = -1 if normalize.reverse_channels else 1
    rest = [0.0] * (4 - channels)
    return factors[::order] + rest, terms[::order] + rest


def screen(
    *,
    values: int,
    datatype: str,
    rows: int,
    features: int,
    owners: int,
    by_feature: int = 0,
    by_request: int = 0,
    requests: int = 0,
    multiprocessors: int = 132,
) -> tuple[Launch, ...]:
    """What is in [rows, features] of DATATYPES: screen.screen is the definition. Both results are written whole, not added to.

    `owners`: int32 [rows] in device memory, the request of each row; -1: padding, not looked at. `by_feature`: [features] of
    screen.RECORD; `by_request`: [requests] of it. 0: not wanted.
    """
    _check("screen", "datatype", datatype, DATATYPES)
    launches = [
        Launch("screen_reset", (_parts(count, 256), 1), (256, 1), (records, ctypes.c_longlong(count)))
        for records, count in ((by_feature, features), (by_request, requests))
        if records and count
    ]
    if not rows or not features or not launches:
        return tuple(launches)
    tiles = _parts(features, 32 * (2 if datatype == "int64" else 4))
    # Few rows a warp where there is little to do, so that it is done at once; more where that only means more atomics.
    each = max(4, min(64, _parts(rows * tiles, multiprocessors * 2 * SCREEN_WARPS)))
    each = max(each, _parts(rows, MOST_LINES * SCREEN_WARPS))
    arguments = (values, ctypes.c_longlong(rows), ctypes.c_longlong(features), owners, by_feature, by_request, ctypes.c_int(each))
    launches.append(Launch(f"screen_{datatype}", (tiles, _parts(rows, each * SCREEN_WARPS)), (32, SCREEN_WARPS), arguments))
    return tuple(launches)


def histogram(
    *,
    values: int,
    datatype: str,
    rows: int,
    features: int,
    edges: int,
    edge_count: int,
    counts: int,
    live: int = 0,
    multiprocessors: int = 132,
) -> tuple[Launch, ...]:
    """Adds to `counts` what histogram.count_columns counts of the values as fp32: exactly its numbers.

    `edges`: fp32 [features, edge_count], ascending, padded with +inf. `counts`: int64 [features, edge_count + 1]. `live`: address of
    an int32: the first so many rows are counted; 0: all.
    """
    _check("histogram", "datatype", datatype, DATATYPES)
    if not rows or not features:
        return ()
    vector = 16 // ITEMSIZE[datatype]
    needed = _parts(rows * features, vector * HISTOGRAM_UNROLL * HISTOGRAM_THREADS)
    copies = counter_copies(features, edge_count)
    shared = 4 * features * ((edge_count + 1) * copies + edge_count)
    arguments: tuple[Argument, ...] = (
        *(values, ctypes.c_longlong(rows), ctypes.c_int(features), edges, ctypes.c_int(edge_count), counts, live),
        *((ctypes.c_int(copies),) if copies else ()),
    )
    where, blocks = ("shared", min(needed, 4 * multiprocessors)) if copies else ("global", min(needed, 8 * multiprocessors))
    return (Launch(f"histogram_{where}_{datatype}", (blocks, 1), (HISTOGRAM_THREADS, 1), arguments, shared if copies else 0),)


def counter_copies(features: int, edge_count: int) -> int:
    """How often shared memory holds all counters: a power of two; 0: it does not."""
    copies = 32
    while copies and 4 * features * ((edge_count + 1) * copies + edge_count) > (SHARED_BUDGET if copies > 1 else SHARED_LIMIT):
        copies //= 2
    return copies


def softmax(*, scores: int, into: int, rows: int, classes: int, datatype: str) -> tuple[Launch, ...]:
    _check("softmax", "datatype", datatype, FLOATS)
    if not rows or not classes:
        return ()
    return (_of_rows("softmax", datatype, rows, classes, (scores, into, ctypes.c_longlong(rows), ctypes.c_uint(classes))),)


def topk(*, scores: int, values: int, indices: int, rows: int, classes: int, k: int, softmax: bool, datatype: str) -> tuple[Launch, ...]:
    _check("topk", "datatype", datatype, FLOATS)
    if not 1 <= k <= classes:
        raise ValueError(f"topk: expected k of 1 to {classes}, got {k}")
    if not rows:
        return ()
    sizes = (ctypes.c_longlong(rows), ctypes.c_uint(classes), ctypes.c_uint(k), ctypes.c_int(softmax))
    return (_of_rows("topk", datatype, rows, classes, (scores, values, indices, *sizes)),)


def _of_rows(kernel: str, datatype: str, rows: int, classes: int, arguments: tuple[Argument, ...]) -> Launch:
    if classes <= WARP_CLASSES:
        return Launch(f"{kernel}_warp_{datatype}", (_parts(rows, ROWS_A_BLOCK), 1), (32 * ROWS_A_BLOCK, 1), arguments)
    return Launch(f"{kernel}_block_{datatype}", (rows, 1), (TEAM, 1), arguments)


def _check(kernel: str, what: str, datatype: str, expected: tuple[str, ...]) -> None:
    if datatype not in expected:
        raise ValueError(f"{kernel}: expected {what} of {', '.join(expected)}, got {datatype}")


def _parts(total: int, size: int) -> int:
    return -(-total // size)


def _up(number: int, to: int) -> int:
    return _parts(number, to) * to


__all__ = [
    "Argument",
    "Launch",
    "coefficients",
    "counter_copies",
    "gather",
    "histogram",
    "normalize",
    "pad_bits",
    "screen",
    "softmax",
    "topk",
]
