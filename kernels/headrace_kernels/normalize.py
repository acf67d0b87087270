"""`normalize`: uint8 images to what a vision model takes. This is the kernel's definition, and its path on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.resize import resize

Array = NDArray[Any]
Shape = tuple[int, ...]

Layout = Literal["NCHW", "NHWC"]
Datatype = Literal["float32", "float16", "bfloat16"]

LARGEST = 1e30
LEAST_DEVIATION = 1e-30
"""So that fp32 has them all, and nothing that is made of them is NaN."""


@dataclass(frozen=True, slots=True)
class Normalize:
    """[rows, height, width, channels] uint8 to [rows, channels, height, width] (or the same order) of a floating type.

    `size`: (height, width) after a bilinear resize with half-pixel centres; None: as it came. `antialias`: the triangle filter is widened
    by the factor of a reduction, as Pillow does. Then (x * scale - mean[c]) / deviation[c], c after the reversal of channels, in fp32;
    one mean or deviation is all channels'. `datatype`: rounded to the nearest, of two equally near ones to the even; bfloat16 is given as
    its bits in uint16.
    """

    size: tuple[int, int] | None = None
    antialias: bool = True
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    reverse_channels: bool = False
    layout: Layout = "NCHW"
    datatype: Datatype = "float32"

    def __post_init__(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size: expected height and width, each at least 1, got {list(self.size)}")
        if not abs(self.scale) <= LARGEST:
            raise ValueError(f"scale: expected a number of at most {LARGEST:g}, got {self.scale}")
        for name, values in (("mean", self.mean), ("deviation", self.deviation)):
            if not values or not all(abs(value) <= LARGEST for value in values):
                raise ValueError(f"{name}: expected a number of at most {LARGEST:g}, or one for each channel, got {list(values)}")
        if min(self.deviation) < LEAST_DEVIATION:
            raise ValueError(f"deviation: expected numbers above 0, at least {LEAST_DEVIATION:g}, got {list(self.deviation)}")
        if self.channels is not None and {len(self.mean), len(self.deviation)} - {1, self.channels}:
            raise ValueError(f"deviation: expected as many numbers as mean has, {len(self.mean)}, got {len(self.deviation)}")
        for name, value, choices in (("layout", self.layout, get_args(Layout)), ("datatype", self.datatype, get_args(Datatype))):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")

    @property
    def channels(self) -> int | None:
        """As many as `mean` or `deviation` has numbers; None where one is for all."""
        count = max(len(self.mean), len(self.deviation))
        return count if count > 1 else None

    def result_shape(self, images: Shape) -> Shape:
        rows, height, width, channels = images
        size = self.size or (height, width)
        return (rows, channels, *size) if self.layout == "NCHW" else (rows, *size, channels)

    def __call__(self, images: Array, out: Array | None = None) -> Array:
        """`out`: where the result goes, of its shape and type. Raises ValueError for what are no such images."""
        if images.dtype != np.uint8 or images.ndim != 4 or self.channels not in (None, images.shape[3]):
            raise ValueError(
                f"images: expected uint8 [rows, height, width, {self.channels or 'channels'}], got {images.dtype} {list(images.shape)}"
            )
        shape = self.result_shape(images.shape)
        dtype = np.dtype(np.uint16 if self.datatype == "bfloat16" else self.datatype)
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype:
            raise ValueError(f"out: expected {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
        if not out.size:
            return out
        # One at a time: what lies between is small enough for the cache.
        for image, into in zip(images, out, strict=True):
            values = into if self.datatype == "float32" else np.empty(into.shape, np.float32)
            with np.errstate(over="ignore"):  # beyond the type is an infinity
                self._write(image, values)
                if values is not into:
                    into[...] = _to_bfloat16(values) if self.datatype == "bfloat16" else values
        return out

    def _write(self, image: Array, values: NDArray[np.float32]) -> None:
        """[height, width, channels] to `values` in the layout."""
        if self.size is None or self.size == image.shape[:2]:
            planes: Array = image.transpose(2, 0, 1)
        else:
            planes = resize(image, self.size, antialias=self.antialias)
        if self.reverse_channels:
            planes = planes[::-1]
        is_nhwc = self.layout == "NHWC"
        np.multiply(planes.transpose(1, 2, 0) if is_nhwc else planes, np.float32(self.scale), out=values)
        # By lines of pixels: an axis of three channels is too short for numpy to be fast along it.
        lines = values.reshape(len(values), -1)
        if any(self.mean):
            lines -= self._by_line(self.mean, lines)
        if set(self.deviation) != {1.0}:
            lines /= self._by_line(self.deviation, lines)

    def _by_line(self, numbers: tuple[float, ...], lines: Array) -> NDArray[np.float32]:
        """One for each line, or in NHWC one for each element of any."""
        each = np.array(numbers, np.float32)
        if len(each) == 1:
            return each
        return np.tile(each, lines.shape[1] // len(each)) if self.layout == "NHWC" else each[:, None]


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest patterns, of two equally near ones the even. NaN cannot be among them."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
