"""Many simulated trials at once: the batch times of a candidate and of its baseline, as they would be counted at each look."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from headrace.lifecycle.rollout import Evidence, SizeTimes
from numpy.typing import NDArray

ROWS = (1, 2, 4, 8)
SECONDS = np.array([1.0, 1.4, 2.2, 4.0]) * 1e-3
CANARY_SHARES = (0.7, 0.2, 0.07, 0.03)
BASELINE_SHARES = (0.2, 0.3, 0.3, 0.2)
Sums = NDArray[np.float64]


def sums(rng: np.random.Generator, trials: int, looks: int, step: int, shares: tuple[float, ...], factor: float) -> Sums:
    """[trial, look, size, what]: sums up to each look. Times vary as exp(0.5 gauss), and one in a hundred takes twenty times as
    long, as when a neighbour or the collector has the core."""
    shape = (trials, looks, step)
    size = rng.choice(len(ROWS), shape, p=shares).astype(np.int8)
    seconds = SECONDS[size] * factor * np.exp(rng.normal(0, 0.5, shape)) * np.where(rng.random(shape) < 0.01, 20, 1)
    logs = np.log(seconds)
    columns = (np.ones(shape), seconds, seconds**2, logs, logs**2)
    parts = [[np.where(size == each, column, 0).sum(axis=2) for column in columns] for each in range(len(ROWS))]
    return np.moveaxis(np.array(parts), (0, 1), (2, 3)).cumsum(axis=1)


def evidence(counted: Sums) -> Evidence:
    sizes = {rows: SizeTimes(int(each[0]), *each[1:].tolist()) for rows, each in zip(ROWS, counted, strict=True) if each[0]}
    requests = sum(times.batches for times in sizes.values())
    return Evidence(answered=requests, sizes=sizes)


def trials(
    rng: np.random.Generator, count: int, *, looks: int, step: int, factor: float, baseline: float
) -> Iterator[list[tuple[Evidence, Evidence]]]:
    """Each trial is its looks: (the candidate, the baseline) after `step` batches more of the first, `baseline` times that of the other."""
    new = sums(rng, count, looks, step, CANARY_SHARES, factor)
    old = sums(rng, count, looks, round(step * baseline), BASELINE_SHARES, 1.0)
    for a, b in zip(new, old, strict=True):
        yield [(evidence(x), evidence(y)) for x, y in zip(a, b, strict=True)]
