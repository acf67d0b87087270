"""Batches that gathered, put together so that they are counted at once. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.drift.features import Side

Array = NDArray[Any]
Arrays = Mapping[str, Array]

JOINED_BYTES = 1 << 20
"""Larger tensors cost so much each that joining them saves nothing."""


class Kept(NamedTuple):
    """Of a batch what is counted: without its requests, and without whoever waited for them. `key`: equal for equal shapes of inputs."""

    key: Hashable
    rows: int
    inputs: Arrays
    outputs: Sequence[str]
    arrays: Sequence[Array]

    @property
    def nbytes(self) -> int:
        """Of strings too, each of which is an object of its own."""
        arrays = (*self.inputs.values(), *self.arrays)
        return sum([array.nbytes for array in arrays]) + sum([sum(map(len, array.flat)) for array in arrays if array.dtype.kind == "O"])


def is_borrowed(array: Array) -> bool:
    """Whether it lies in shared memory, which is its client's again: as a view of something else than a received message's bytes."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and not isinstance(base.obj, bytes)


def join(
    batches: Sequence[Kept], watched: frozenset[tuple[Side, str]], has_rows: bool
) -> Iterable[tuple[dict[str, Array], dict[str, Array], int]]:
    """Inputs, outputs and rows of batches of equal shapes put together, without padding and what is not watched. Each array gets a
    dimension of rows where it has none."""
    groups: dict[object, list[Kept]] = {}
    for position, batch in enumerate(batches):
        # Whether the outputs' shapes agree too is not known before they are looked at; those of large ones stay alone.
        shapes = tuple([array.shape[1:] if has_rows else array.shape for array in batch.arrays])
        if not has_rows:
            # The key has them without their first dimension, which then is one like the others.
            shapes += tuple([array.shape for array in batch.inputs.values()])
        # Of requests with equal keys some lack inputs that others have: those that were lent to the backend on its device.
        key = (batch.key, tuple(batch.inputs), tuple(batch.outputs), shapes) if batch.nbytes < JOINED_BYTES else position
        groups.setdefault(key, []).append(batch)
    for group in groups.values():
        first = group[0]
        inputs = {name: _joined([b.inputs[name] for b in group], group, has_rows) for name in first.inputs if (Side.INPUT, name) in watched}
        outputs = {
            name: _joined([b.arrays[index] for b in group], group, has_rows)
            for index, name in enumerate(first.outputs)
            if (Side.OUTPUT, name) in watched
        }
        yield inputs, outputs, sum([batch.rows for batch in group])


def _joined(arrays: Sequence[Array], group: Sequence[Kept], has_rows: bool) -> Array:
    parts = [array[: batch.rows] if has_rows else array[None] for array, batch in zip(arrays, group, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
