"""The kernels on a GPU: one launcher method for each, over raw device addresses.

A launcher allocates nothing, waits for nothing and reads nothing back, so it may stand in a CUDA graph: give it the graph's builder
for the stream. What may change from one replay to the next is in device memory (a row table, `live`, `owners`); every number that is
an argument is frozen with the graph. Memory is the caller's: it must stay until the stream has passed the launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace_kernels.normalize import Normalize

if TYPE_CHECKING:
    from cuda.core import GraphBuilder, Stream

DATATYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8")
"""What gather, screen and histogram read and gather writes. Names as numpy's, and bfloat16 for what numpy has as uint16 bits."""
FLOATS = ("float32", "float16", "bfloat16")
"""What softmax and topk read, and what normalize writes."""


class Kernels:
    """The kernels loaded on one device. Loaded when made: raises KernelsUnavailable with what is missing.

    Use it from one thread at a time, with the device's context current (`cuda.core.Device(device_id).set_current()` on that thread).
    Every launcher raises ValueError, before anything is launched, for sizes or types that its kernel does not take.
    """

    def __init__(self, device_id: int = 0) -> None:
        raise NotImplementedError

    @staticmethod
    def can_normalize(normalize: Normalize, channels: int) -> bool:
        """Whether `normalize` takes it: one to four channels."""
        raise NotImplementedError

    def gather(
        self,
        stream: Stream | GraphBuilder,
        *,
        slab: int,
        table: int,
        into: int,
        rows: int,
        width: int,
        source: str,
        target: str,
        pad: float = 0,
        mask: int = 0,
    ) -> None:
        """Rows from anywhere in `slab` to [rows, width] of `target` at `into`; gather.gather is the definition.

        `table`: int64 [rows, 2] in device memory: byte offset of the row in the slab, a multiple of the element's size (16 is fastest), and
        its elements. What is missing to `width` is `pad`. gather.row_table makes one from requests; its padding rows point at row 0 of
        the batch, so that only real rows cross the bus. `mask`: [rows, width] of `target`, 1 where an element came from the slab,
        else 0; 0: not wanted. `source` and `target` are DATATYPES.
        """
        raise NotImplementedError

    def normalize(
        self,
        stream: Stream | GraphBuilder,
        *,
        images: int,
        into: int,
        rows: int,
        height: int,
        width: int,
        channels: int,
        normalize: Normalize,
        table: int = 0,
    ) -> None:
        """uint8 [rows, height, width, channels] to what `normalize` says; it is the definition, kept to `normalize_tolerance`.

        `table`: as of gather, for images that lie anywhere in the slab at `images`; 0: one behind the other.
        """
        raise NotImplementedError

    def screen(
        self,
        stream: Stream | GraphBuilder,
        *,
        values: int,
        datatype: str,
        rows: int,
        features: int,
        owners: int,
        by_feature: int = 0,
        by_request: int = 0,
        requests: int = 0,
    ) -> None:
        """What is in [rows, features] of DATATYPES: screen.screen is the definition. Both results are written whole, not added to.

        `owners`: int32 [rows] in device memory, the request of each row; -1: padding, not looked at. `by_feature`: [features] of
        screen.RECORD; `by_request`: [requests] of it. 0: not wanted.
        """
        raise NotImplementedError

    def histogram(
        self,
        stream: Stream | GraphBuilder,
        *,
        values: int,
        datatype: str,
        rows: int,
        features: int,
        edges: int,
        edge_count: int,
        counts: int,
        live: int = 0,
    ) -> None:
        """Adds to `counts` what histogram.count_columns counts of the values as fp32: exactly its numbers.

        `edges`: fp32 [features, edge_count], ascending, padded with +inf. `counts`: int64 [features, edge_count + 1]. `live`: address of
        an int32: the first so many rows are counted; 0: all.
        """
        raise NotImplementedError

    def softmax(self, stream: Stream | GraphBuilder, *, scores: int, into: int, rows: int, classes: int, datatype: str) -> None:
        """topk.Softmax of [rows, classes] of FLOATS: fp32 `into`, which may be `scores` where that is fp32 too."""
        raise NotImplementedError

    def topk(
        self,
        stream: Stream | GraphBuilder,
        *,
        scores: int,
        values: int,
        indices: int,
        rows: int,
        classes: int,
        k: int,
        softmax: bool,
        datatype: str,
    ) -> None:
        """topk.TopK of [rows, classes] of FLOATS: `values` fp32 [rows, k] and `indices` int32 [rows, k]. 1 <= k <= classes."""
        raise NotImplementedError


def normalize_tolerance(normalize: Normalize) -> float:
    """How far an element of the kernel may be from exact arithmetic before it is rounded to `normalize.datatype`.

    A product and a sum rounded in fp32, of constants that were: four roundings of no more than the larger of the two. With a resize the
    sums of taps come on top, their weights made in fp32 from positions in fp64.
    """
    largest = max(abs(255 * normalize.scale) + abs(mean) for mean in normalize.mean) / min(normalize.deviation)
    return largest * 2.0**-24 * (4 if normalize.size is None else 32)


__all__ = ["DATATYPES", "FLOATS", "Kernels", "normalize_tolerance"]
