"""Rows of data out of what a server has captured: the requests of one model, whichever version answered them. Blocking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.capture.reading import list_contents, read_capture
from headrace.capture.records import Captured
from headrace.drift.extraction import as_numbers
from headrace.errors import ConfigError
from headrace.profiling.data_files import CHUNK_ROWS, Chunk

Array = NDArray[Any]


def read_capture_chunks(path: Path, model: str, rows: int = CHUNK_ROWS) -> Iterator[tuple[Chunk, float]]:
    """(inputs of requests that follow each other and are of one shape, how many of the requests are read by then, 0 to 1).

    Redacted inputs are not among them. Raises ConfigError where there is no request for the model, CaptureError for what is no capture.
    """
    contents = list_contents(path)
    total = sum([count for (name, _), count in contents.requests.items() if name == model])
    if not total:
        raise ConfigError(f"{path}: expected requests for model '{model}', got those for {', '.join(contents.models) or 'none'}")
    waiting: list[dict[str, Array]] = []
    done = 0
    for captured in read_capture(path):
        if captured.model != model:
            continue
        inputs = _inputs(captured)
        if waiting and (_shape(inputs) != _shape(waiting[0]) or sum([_rows(each) for each in waiting]) >= rows):
            yield _joined(waiting), done / total
            waiting = []
        waiting.append(inputs)
        done += 1
    yield _joined(waiting), 1.0


def _inputs(captured: Captured) -> dict[str, Array]:
    """With a dimension of rows first; BF16 as the numbers that its patterns mean."""
    found = {}
    for tensor in captured.inputs:
        array = tensor.array()
        if array is not None:
            array = as_numbers(array, is_bf16=True) if tensor.datatype == "BF16" else array
            found[tensor.name] = array if captured.is_batching else array[None]
    return found


def _shape(inputs: dict[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in inputs.items()}


def _rows(inputs: dict[str, Array]) -> int:
    return max([len(array) for array in inputs.values()], default=0)


def _joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
