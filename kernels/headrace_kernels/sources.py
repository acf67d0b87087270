"""The kernels' CUDA sources and the names that they export."""

from __future__ import annotations

import hashlib
import re
from itertools import product
from pathlib import Path

DIRECTORY = Path(__file__).parent / "cuda"

DATATYPES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8")
"""What gather, screen and histogram read and gather writes. Names as numpy's, and bfloat16 for what numpy has as uint16 bits."""
FLOATS = ("float32", "float16", "bfloat16")
"""What softmax and topk read, and what normalize writes."""
CHANNELS = (1, 3, 4)
"""Of an image that normalize takes."""

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1}

_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


def kernel_names() -> dict[str, tuple[str, ...]]:
    """Of each source, without its suffix, the kernels in it."""
    return {
        "gather": tuple(f"gather_{source}_{target}" for source, target in product(DATATYPES, DATATYPES)),
        "normalize": tuple("_".join(parts) for parts in product(("normalize", "resize"), ("nchw", "nhwc"), FLOATS, map(str, CHANNELS))),
        "screen": ("screen_reset", *(f"screen_{datatype}" for datatype in DATATYPES)),
        "histogram": tuple(f"histogram_{where}_{datatype}" for where, datatype in product(("shared", "global"), DATATYPES)),
        "topk": tuple("_".join(parts) for parts in product(("softmax", "topk"), ("warp", "block"), FLOATS)),
    }


def source_of(kernel: str) -> str:
    """The source that a kernel is in."""
    first = kernel.partition("_")[0]
    return {"resize": "normalize", "softmax": "topk"}.get(first, first)


def text(source: str, directory: Path = DIRECTORY) -> str:
    """A source with what it includes in it, once each: NVRTC's cache takes only programs that are one text."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return _INCLUDE.sub(lambda match: expand(match[1]), (directory / name).read_text().replace("#pragma once\n", ""))

    return expand(f"{source}.cu")


def digest(directory: Path = DIRECTORY) -> str:
    """Of everything that is compiled: part of a fatbin's name, so that one of other sources is never loaded."""
    return hashlib.sha256(text("kernels", directory).encode()).hexdigest()[:16]


__all__ = ["CHANNELS", "DATATYPES", "DIRECTORY", "FLOATS", "ITEMSIZE", "digest", "kernel_names", "source_of", "text"]
