"""Running a loaded instance before anybody waits for it: lazy work is done, l(b) is learnt, a false batch axis is found out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headrace.backends.base import Array, Backend, PipelinedBackend
from headrace.backends.worker import WarmUp
from headrace.batching.batch_queue import NEVER
from headrace.batching.latency import LatencyTable
from headrace.errors import HeadraceError, LoadError
from headrace.lifecycle.recorded import Recorded
from headrace.signature import Signature

FREE_DIMENSION_GUESSES = (64, 32, 224, 1)
"""Tried in turn for dimensions that the signature leaves open; convolutions with strides need more than 1."""
TIME_BUDGET = 10.0
"""Seconds after which larger batch sizes are left out: a slow model must not take minutes to go live."""
SAMPLE_SECONDS = 0.025
RUNS_A_SAMPLE = 20
"""One sample of l(b) is the shortest of so many runs, or of as many as fit: runs of microseconds vary by half."""
PROMISING = 0.9
"""Of the best rate so far: a size below it is not measured again, since noise alone does not make it the right one."""
CLEAR_FALLS = 2
"""Sizes in a row below that, after which none larger is tried."""


@dataclass(frozen=True, slots=True)
class Known:
    """l(b) of the version before this one, and whether it has the same graph, so that its batch dimension is one too.

    `table`: what its batches have shown since, by how much they differ from its warm-up.
    """

    seconds: Mapping[int, float]
    has_same_graph: bool = False
    table: LatencyTable | None = None


NOTHING_KNOWN = Known({})


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


def warm_up(
    backend: Backend,
    signature: Signature,
    sizes: Sequence[int],
    runs: int,
    *,
    must_run_all: bool = False,
    known: Known = NOTHING_KNOWN,
    recorded: Recorded = (),
) -> WarmUp:
    """Run and time the sizes in `runs` rounds, those that are not worth it left out; with `must_run_all` each once at least.

    `known`: of the version before this one; l(b) is this one's too unless it shows itself slower. Measuring takes half a second of a
    core that serves, and beside other load it measures that. Then the smallest batch that tells all is run, and the sizes that must.
    A PipelinedBackend runs all that have been measured, now or before, in each lane.
    Synthesised inputs that the model refuses are no failure of the model: it says so and goes on. `recorded` ones are, being what
    clients send: raises LoadError with the request's name.
    Raises BatchAxisError when the model batches by its signature but not in fact.
    """
    for name, inputs in recorded:
        _run_recorded(backend, name, inputs)
    failure = ""
    if not runs:
        return WarmUp({})
    for guess in FREE_DIMENSION_GUESSES if has_free_dimension(signature) else FREE_DIMENSION_GUESSES[-1:]:
        try:
            if isinstance(backend, PipelinedBackend):
                _warm_lanes(backend, signature, guess, [rows for rows in sizes if must_run_all or rows in known.seconds])
            first = _run_first(backend, signature, sizes, guess, must_be_pair=not known.has_same_graph)
            if known.seconds:
                if must_run_all and not isinstance(backend, PipelinedBackend):
                    _run_others(backend, signature, guess, sizes, first.rows)
                limit = SLOWER * known.seconds.get(first.rows, NEVER) + SLOWER_BY
                # What is done once may have made the first run slow: then the second one tells.
                if first.cpu_seconds <= limit or _time_one(backend, synthesise(signature, first.rows, guess)) <= limit:
                    return WarmUp(known.seconds)
            sample = functools.partial(_sample, backend, signature, guess)
            seconds = measure(sample, sizes, runs, must_run_all=must_run_all, left=_countdown(TIME_BUDGET))
            if isinstance(backend, PipelinedBackend) and not must_run_all:
                _warm_lanes(backend, signature, guess, list(seconds))
            backend.shrink(synthesise(signature, 1, guess))
            return WarmUp(seconds)
        except BatchAxisError:
            raise
        except HeadraceError as error:
            failure = str(error)
    return WarmUp({}, failure)


def _run_recorded(backend: Backend, name: str, inputs: Mapping[str, Array]) -> None:
    try:
        backend.warm(inputs)
    except HeadraceError as error:
        reason = str(error)
    else:
        return
    raise LoadError(f"the recorded request {name} fails: {reason}")


SLOWER = 3.0
SLOWER_BY = 50e-6
"""Times the l(b) of the version before, and seconds; beyond both the new one is measured anew. Not less: l(b) is the best of many runs,
and one run beside other threads, which push its weights out of the cache, took 1.5 times the CPU time of that in 1 of 60 swaps; the
half second that measuring takes was then the p99 of everybody (1.51 times the steady one instead of 1.16)."""


def _time_one(backend: Backend, inputs: Mapping[str, Array]) -> float:
    """The calling thread's CPU time."""
    began = time.thread_time()
    backend.warm(inputs)
    return time.thread_time() - began


def _run_others(backend: Backend, signature: Signature, guess: int, sizes: Sequence[int], done: int) -> None:
    """Each size but `done` once, for what is done once."""
    for rows in sizes:
        if rows != done:
            backend.warm(synthesise(signature, rows, guess))


def _warm_lanes(backend: PipelinedBackend, signature: Signature, guess: int, sizes: Sequence[int]) -> None:
    """Each size in each lane, the largest first: buffers that grow move, and a CUDA graph captured before that is captured anew by the
    next batch of its size, which would be a client's."""
    for rows in sorted(sizes, reverse=True):
        inputs = synthesise(signature, rows, guess)
        for _ in range(backend.lanes):
            backend.warm(inputs)


def has_free_dimension(signature: Signature) -> bool:
    start = 1 if signature.max_batch_size else 0
    return any(-1 in spec.shape[start:] for spec in signature.inputs)


def _countdown(seconds: float) -> Callable[[], float]:
    ends = time.monotonic() + seconds
    return lambda: ends - time.monotonic()


def _sample(backend: Backend, signature: Signature, guess: int, rows: int) -> float:
    """Seconds of one run, the shortest of a few."""
    inputs = synthesise(signature, rows, guess)
    shortest = NEVER
    began = start = time.monotonic()
    for _ in range(RUNS_A_SAMPLE):
        backend.warm(inputs)
        end = time.monotonic()
        shortest = min(shortest, end - start)
        if end - began > SAMPLE_SECONDS:
            break
        start = end
    return shortest


def measure(
    sample: Callable[[int], float], sizes: Sequence[int], runs: int, *, must_run_all: bool, left: Callable[[], float]
) -> dict[int, float]:
    """l(b) for `sizes`, which ascend, by `sample` of each, as long as seconds are `left`.

    The first round climbs until larger batches have clearly become slower by the row; the others go over what could still be
    the best, all of it in each round, so that a machine that is busy for a while is so for all.
    """
    seconds: dict[int, float] = {}
    falls = 0
    for rows in sizes:
        if not must_run_all and (falls == CLEAR_FALLS or _expected(seconds, rows) > left()):
            break
        seconds[rows] = sample(rows)
        if not _is_promising(seconds, rows) and seconds[rows] < left():
            seconds[rows] = min(seconds[rows], sample(rows))  # one bad sample may be a neighbour's doing
        falls = 0 if _is_promising(seconds, rows) else falls + 1
    for _ in range(1, runs):
        # One row also when it seems bad: whether requests may run inline depends on it.
        for rows in [rows for rows in seconds if rows == 1 or _is_promising(seconds, rows)]:
            if seconds[rows] > left():
                return seconds
            seconds[rows] = min(seconds[rows], sample(rows))
    return seconds


def _expected(seconds: Mapping[int, float], rows: int) -> float:
    largest = max(seconds, default=0)
    return seconds[largest] * rows / largest if largest else 0.0


def _is_promising(seconds: Mapping[int, float], rows: int) -> bool:
    return rows / seconds[rows] >= PROMISING * max(n / took for n, took in seconds.items())


class _FirstRun(NamedTuple):
    """`rows` of it, and what it took of the calling thread's CPU time: others may be busy on this core. Work on other threads and
    devices is not in that, so those seem fast; what they take shows in the batches to come."""

    rows: int
    cpu_seconds: float


def _run_first(backend: Backend, signature: Signature, sizes: Sequence[int], guess: int, *, must_be_pair: bool) -> _FirstRun:
    """The smallest batch; or one of two, or of as few more as there may be, which shows whether the batch dimension is one."""
    rows = next((size for size in sizes if size >= 2), sizes[0]) if must_be_pair else sizes[0]
    inputs = synthesise(signature, rows, guess)
    began = time.thread_time()
    outputs = backend.execute(inputs, None)
    took = time.thread_time() - began
    if rows > 1:
        for spec, array in zip(signature.outputs, outputs, strict=True):
            if array.ndim == 0 or array.shape[0] != rows:
                raise BatchAxisError(f"output '{spec.name}' has shape {tuple(array.shape)} for a batch of {rows}")
    return _FirstRun(rows, took)
