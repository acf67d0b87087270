"""The kernels on a GPU, over raw device addresses: whatever launches.py plans, with a method for each of those that backends launch.

A launcher allocates nothing, waits for nothing and reads nothing back, so it may stand in a CUDA graph: give it the graph's builder
for the stream. What may change from one replay to the next is in device memory (a row table, `live`, `owners`); every number that is
an argument is frozen with the graph. Memory is the caller's: it must stay until the stream has passed the launch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from headrace_kernels import launches
from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.launches import Launch
from headrace_kernels.modules import Modules, cuda_core, unavailable
from headrace_kernels.normalize import Normalize
from headrace_kernels.sources import CHANNELS, DATATYPES, FLOATS

if TYPE_CHECKING:
    from cuda.core import LaunchConfig, Stream
    from cuda.core.graph import GraphBuilder


class Kernels:
    """The kernels on one device. Raises KernelsUnavailable, when made or at a kernel's first launch, with what is missing.

    Its state is what has been loaded. A kernel is loaded at its first launch, and compiled then where there is no fatbin: launch once, or
    `load`, before a graph is captured. Use it from one thread at a time, with the device's context current on that thread
    (`cuda.core.Device(device_id).set_current()`). Every launcher raises ValueError, before anything is launched, for sizes or types that
    its kernel does not take.
    """

    def __init__(self, device_id: int = 0, fatbin: Path | None = None, cache: Path | None = None) -> None:
        core = cuda_core()
        try:
            device = core.Device(device_id)
            device.set_current()
            self.multiprocessors: int = device.properties.multiprocessor_count
            self.modules = Modules(f"sm_{device.arch}", fatbin, cache)
        except Exception as error:
            raise KernelsUnavailable(unavailable(f"device {device_id}", error)) from error
        self.device_id = device_id
        self._launch = core.launch

    def __repr__(self) -> str:
        return f"Kernels(device {self.device_id}, {self.modules!r})"

    @staticmethod
    def can_normalize(channels: int) -> bool:
        """Whether `normalize` takes such images: of 1, 3 or 4 channels."""
        return channels in CHANNELS

    def load(self, planned: tuple[Launch, ...]) -> None:
        """So that their first launch, which may be into a graph, finds them there."""
        for launch in planned:
            self.modules.kernel(launch.kernel)

    def run(self, stream: Stream | GraphBuilder, planned: tuple[Launch, ...]) -> None:
        """What one of the functions of launches.py planned."""
        for launch in planned:
            config = _config(launch.grid, launch.block, launch.shared)
            self._launch(stream, config, self.modules.kernel(launch.kernel), *launch.arguments)

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
        self.run(
            stream,
            launches.normalize(
                images=images,
                into=into,
                rows=rows,
                height=height,
                width=width,
                channels=channels,
                normalize=normalize,
                table=table,
            ),
        )

    def softmax(self, stream: Stream | GraphBuilder, *, scores: int, into: int, rows: int, classes: int, datatype: str) -> None:
        """topk.Softmax of [rows, classes] of FLOATS: fp32 `into`, which may be `scores` where that is fp32 too."""
        self.run(
            stream,
            launches.softmax(
                scores=scores,
                into=into,
                rows=rows,
                classes=classes,
                datatype=datatype,
            ),
        )

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
        self.run(
            stream,
            launches.topk(
                scores=scores,
                values=values,
                indices=indices,
                rows=rows,
                classes=classes,
                k=k,
                softmax=softmax,
                datatype=datatype,
            ),
        )


@lru_cache(maxsize=1024)
def _config(grid: tuple[int, int], block: tuple[int, int], shared: int) -> LaunchConfig:
    """Made once for each of the sizes that a server has: a launch is a few microseconds, and this is one of them."""
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, shmem_size=shared)


def normalize_tolerance(normalize: Normalize) -> float:
    """How far an element of the kernel may be from exact arithmetic before it is rounded to `normalize.datatype`.

    A product and a sum rounded in fp32, of constants that were: four roundings of no more than the larger of the two. With a resize the
    sums of taps come on top, their weights made in fp32 from positions in fp64.
    """
    largest = max(abs(255 * normalize.scale) + abs(mean) for mean in normalize.mean) / min(normalize.deviation)
    return largest * 2.0**-24 * (4 if normalize.size is None else 32)


__all__ = ["DATATYPES", "FLOATS", "Kernels", "normalize_tolerance"]
