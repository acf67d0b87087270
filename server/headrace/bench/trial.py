"""One setup of a model, measured in a process of its own: threads are real ones, and all memory is given back."""

from __future__ import annotations

import os
import pickle
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headrace.backends.base import Array, ArtifactSignature, Backend, Expected
from headrace.backends.processed import processed
from headrace.backends.processing import Processing
from headrace.bench.choice import Sample
from headrace.config import InstanceConfig
from headrace.errors import HeadraceError, LoadError
from headrace.lifecycle.warm_up import FREE_DIMENSION_GUESSES, BatchAxisError, has_free_dimension, synthesise
from headrace.plugins import load_backends
from headrace.signature import Signature

FEWEST_RUNS = 3
LONGEST_BATCH = 10.0
"""Seconds; beyond a batch of that length larger ones are left out."""
PROMISING = 0.9
CLEAR_FALLS = 2
"""After so many sizes in a row below that part of the best rate so far, none larger is tried."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What to measure. `sizes` ascend; `seconds` for each. `recorded`: inputs to use instead of synthesised ones.

    `is_first`: sizes are left out when smaller ones have turned out to do clearly more rows a second.
    """

    backend: str
    path: Path
    signature: Signature
    instance: InstanceConfig
    cores: frozenset[int]
    sizes: tuple[int, ...]
    seconds: float
    is_first: bool
    recorded: Mapping[str, Array] | None = None
    processing: Processing = field(default_factory=Processing)
    output_names: Sequence[str] = ()
    """The artifact's."""


def run_trial(trial: Trial) -> dict[int, Sample]:
    """By batch size. Blocks; whatever ends it, the process is gone.

    Raises LoadError or BackendError with the model's reason, BatchAxisError when the batch dimension is none.
    """
    # In a session of its own: a Ctrl-C is ours, and ends it by way of us.
    command = [sys.executable, "-P", "-m", "headrace.bench.trial"]
    done = subprocess.run(command, input=pickle.dumps(trial), stdout=subprocess.PIPE, start_new_session=True, check=False)
    if done.returncode:
        raise LoadError(f"the process that measured it ended with {_exit(done.returncode)}")
    outcome: dict[int, Sample] | HeadraceError = pickle.loads(done.stdout)
    if isinstance(outcome, HeadraceError):
        raise outcome
    return outcome


def _exit(code: int) -> str:
    if code < 0:
        return f"{signal.Signals(-code).name}{', perhaps for want of memory' if -code == signal.SIGKILL else ''}"
    return f"status {code}; what it said stands above"


def main() -> None:
    """That process: a trial comes in, its samples or its error go out."""
    trial: Trial = pickle.load(sys.stdin.buffer)
    # What a runtime prints must not get between.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, trial.cores)
    outcome: dict[int, Sample] | HeadraceError
    try:
        outcome = measure(trial, load_backends()[trial.backend])
    except HeadraceError as error:
        outcome = error.with_traceback(None)
    with results:
        pickle.dump(outcome, results)


def measure(trial: Trial, backend: type[Backend]) -> dict[int, Sample]:
    """In this process."""
    with ExitStack() as stack:
        instances = [stack.enter_context(_Instance.open(_make(trial, backend))) for _ in range(trial.instance.count)]
        inputs = _find_inputs(trial, instances[0])
        samples: dict[int, Sample] = {}
        falls = 0
        for rows in trial.sizes:
            batch = inputs(rows)
            longest = max(instance.run(batch) for instance in instances)  # also the lazy work of this size
            samples[rows] = _sample(instances, batch, trial.seconds)
            if not trial.is_first:
                continue
            if not _is_promising(samples, rows):  # one bad sample may be a neighbour's doing
                samples[rows] = min(samples[rows], _sample(instances, batch, trial.seconds), key=lambda sample: sample.mean)
            falls = 0 if _is_promising(samples, rows) else falls + 1
            if falls == CLEAR_FALLS or longest > LONGEST_BATCH:
                break
        return samples


def _make(trial: Trial, backend: type[Backend]) -> Backend:
    made = backend(trial.path, trial.instance)
    made.expect(Expected(ArtifactSignature(trial.signature.inputs, trial.signature.outputs), trial.signature))
    return processed(made, trial.processing, trial.output_names)


class _Instance:
    """A loaded copy on its own thread, as the server has it."""

    def __init__(self, backend: Backend, thread: ThreadPoolExecutor) -> None:
        self.backend = backend
        self.thread = thread

    @classmethod
    @contextmanager
    def open(cls, backend: Backend) -> Iterator[_Instance]:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(backend.load).result()
            try:
                yield cls(backend, thread)
            finally:
                thread.submit(backend.close).result()

    def execute(self, inputs: Mapping[str, Array]) -> list[Array]:
        return self.thread.submit(self.backend.execute, inputs, None).result()

    def run(self, inputs: Mapping[str, Array]) -> float:
        """Seconds that it took."""
        began = time.perf_counter()
        self.execute(inputs)
        return time.perf_counter() - began


def _sample(instances: list[_Instance], inputs: Mapping[str, Array], seconds: float) -> Sample:
    """All of them at once."""
    until = time.perf_counter() + seconds
    running = [instance.thread.submit(_run_until, instance.backend, inputs, until) for instance in instances]
    took = [each for future in running for each in future.result()]
    return Sample(statistics.fmean(took), float(np.quantile(took, 0.95)))


def _run_until(backend: Backend, inputs: Mapping[str, Array], until: float) -> list[float]:
    took: list[float] = []
    start = time.perf_counter()
    while start < until or len(took) < FEWEST_RUNS:
        backend.execute(inputs, None)
        end = time.perf_counter()
        took.append(end - start)
        start = end
    return took


def _is_promising(samples: Mapping[int, Sample], rows: int) -> bool:
    return rows / samples[rows].mean >= PROMISING * max(n / sample.mean for n, sample in samples.items())


# -- inputs ------------------------------------------------------------------------------------------------------------


class _Inputs:
    """Batches of any size."""

    def __init__(self, trial: Trial, guess: int) -> None:
        self._trial = trial
        self._guess = guess

    def __call__(self, rows: int) -> dict[str, Array]:
        signature, recorded = self._trial.signature, self._trial.recorded
        if recorded is None:
            return synthesise(signature, rows, self._guess)
        if not signature.max_batch_size:
            return dict(recorded)
        return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in recorded.items()}


def _find_inputs(trial: Trial, instance: _Instance) -> _Inputs:
    """Those that the model takes. Raises its reason for refusing the last ones tried, BatchAxisError for a false batch dimension."""
    is_open = trial.recorded is None and has_free_dimension(trial.signature)
    guesses = FREE_DIMENSION_GUESSES if is_open else FREE_DIMENSION_GUESSES[-1:]
    failure = ""
    for guess in guesses:
        inputs = _Inputs(trial, guess)
        try:
            instance.run(inputs(trial.sizes[0]))
        except HeadraceError as error:
            failure = str(error)
            continue
        _check_batch_axis(trial, instance, inputs)
        return inputs
    hint = "" if trial.recorded is not None else "; put a recorded request into warmup/ beside the versions"
    raise LoadError(f"the inputs that it was tried with are refused: {failure}{hint}")


def _check_batch_axis(trial: Trial, instance: _Instance, inputs: _Inputs) -> None:
    rows = next((size for size in trial.sizes if size > 1), 1)
    if rows == 1:
        return
    for spec, array in zip(trial.signature.outputs, instance.execute(inputs(rows)), strict=True):
        if array.ndim == 0 or array.shape[0] != rows:
            raise BatchAxisError(f"output '{spec.name}' has shape {tuple(array.shape)} for a batch of {rows}")


if __name__ == "__main__":
    # By its own name: what is pickled here has to be found there.
    from headrace.bench.trial import main as run

    run()
