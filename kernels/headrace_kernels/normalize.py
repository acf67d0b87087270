"""`normalize`: uint8 images to what a vision model takes. This is the kernel's definition, and its path on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Normalize:
    """[rows, height, width, channels] uint8 to [rows, channels, height, width] (or the same order) of a floating type.

    `size`: (height, width) after a bilinear resize with half-pixel centres; None: as it came. `antialias`: the triangle filter is widened
    by the factor of a reduction, as Pillow does. Then (x * scale - mean[c]) / deviation[c], c after the reversal of channels.
    `datatype`: bfloat16 is given as its bits in uint16.
    """

    size: tuple[int, int] | None = None
    antialias: bool = True
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    reverse_channels: bool = False
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    datatype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __call__(self, images: Array) -> Array:
        raise NotImplementedError
