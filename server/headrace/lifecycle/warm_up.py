"""Running a loaded instance before anybody waits for it: lazy work is done, l(b) is learnt, a false batch axis is found out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from headrace.backends.base import Array, Backend
from headrace.backends.worker import WarmUp
from headrace.errors import HeadraceError
from headrace.signature import Signature

FREE_DIMENSION_GUESSES = (64, 32, 224, 1)
"""Tried in turn for dimensions that the signature leaves open; convolutions with strides need more than 1."""
TIME_BUDGET = 10.0
"""Seconds after which larger batch sizes are left out: a slow model must not take minutes to go live."""


class BatchAxisError(HeadraceError):
    """The outputs of a batch of two do not have two rows: the free first dimension is no batch dimension."""


def batch_sizes(max_batch_size: int, allowed: Sequence[int]) -> list[int]:
    """The sizes worth running: the allowed ones, or the powers of two up to the largest."""
    if not max_batch_size:
        return [1]
    if allowed:
        return list(allowed)
    sizes = [1 << power for power in range(max_batch_size.bit_length()) if 1 << power <= max_batch_size]
    return sizes if sizes[-1] == max_batch_size else [*sizes, max_batch_size]


def synthesise(signature: Signature, rows: int, guess: int) -> dict[str, Array]:
    """Zeros (empty strings) of the signature's shapes; required inputs only. Zero is a valid index, token and pixel."""
    inputs: dict[str, Array] = {}
    for spec in signature.inputs:
        if spec.optional:
            continue
        tail = spec.shape[1:] if signature.max_batch_size else spec.shape
        shape = tuple(guess if dim < 0 else dim for dim in tail)
        if signature.max_batch_size:
            shape = (rows, *shape)
        if spec.datatype.itemsize:
            inputs[spec.name] = np.zeros(shape, spec.datatype.dtype)
        else:
            inputs[spec.name] = np.full(shape, b"", object)
    return inputs


def warm_up(backend: Backend, signature: Signature, sizes: Sequence[int], runs: int) -> WarmUp:
    """Run every size `runs` times. Synthesised inputs that the model refuses are no failure of the model: it says so and goes on.

    Raises BatchAxisError when the model batches by its signature but not in fact.
    """
    failure = ""
    for guess in FREE_DIMENSION_GUESSES if has_free_dimension(signature) else FREE_DIMENSION_GUESSES[-1:]:
        try:
            return WarmUp(_measure(backend, signature, sizes, runs, guess))
        except BatchAxisError:
            raise
        except HeadraceError as error:
            failure = str(error)
    return WarmUp({}, failure)


def has_free_dimension(signature: Signature) -> bool:
    start = 1 if signature.max_batch_size else 0
    return any(-1 in spec.shape[start:] for spec in signature.inputs)


def _measure(backend: Backend, signature: Signature, sizes: Sequence[int], runs: int, guess: int) -> Mapping[int, float]:
    seconds: dict[int, float] = {}
    began = time.monotonic()
    _check_batch_axis(backend, signature, guess)
    for rows in sizes:
        inputs = synthesise(signature, rows, guess)
        for _ in range(max(runs, 1)):
            start = time.monotonic()
            backend.warm(inputs)
            took = time.monotonic() - start
            seconds[rows] = min(took, seconds.get(rows, took))
            if time.monotonic() - began > TIME_BUDGET:
                return seconds
    return seconds


def _check_batch_axis(backend: Backend, signature: Signature, guess: int) -> None:
    if signature.max_batch_size < 2:
        return
    outputs = backend.execute(synthesise(signature, 2, guess), None)
    for spec, array in zip(signature.outputs, outputs, strict=True):
        if array.ndim == 0 or array.shape[0] != 2:
            raise BatchAxisError(f"output '{spec.name}' has shape {tuple(array.shape)} for a batch of 2")
