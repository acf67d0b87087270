"""When requests arrive, in seconds from the start of a run: decided before it begins, so that no answer can hold one back. Pure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
"""Ascending, from 0 on."""


def constant(rate: float, seconds: float) -> Times:
    """One every 1/rate."""
    return np.arange(round(rate * seconds)) / rate


def poisson(rate: float, seconds: float, seed: int) -> Times:
    """Callers who know nothing of each other: as many as there happen to be, not rate * seconds."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))


def bursts(rate: float, seconds: float, seed: int, *, peak: float = 4.0, share: float = 0.2, length: float = 0.1) -> Times:
    """Poisson arrivals whose rate jumps between two (MMPP): `peak` times the mean in bursts, which are `share` of the time.

    Bursts last `length` seconds on average and the quiet in between as long as the share leaves, both exponentially distributed.
    With peak * share = 1 nothing arrives in the quiet. Raises ValueError where more would arrive in bursts than altogether.
    """
    if not (0 < share < 1 and peak >= 1 and peak * share <= 1 + 1e-9):
        raise ValueError(f"bursts: expected 0 < share < 1, peak >= 1 and peak * share <= 1, got peak {peak:g} and share {share:g}")
    rng = np.random.default_rng(seed)
    rates = (rate * max(0.0, 1 - peak * share) / (1 - share), rate * peak)
    lengths = (length * (1 - share) / share, length)
    parts, at, state = [], 0.0, int(rng.random() < share)
    while at < seconds:
        until = min(seconds, at + rng.exponential(lengths[state]))
        parts.append(rng.uniform(at, until, rng.poisson(rates[state] * (until - at))))
        at, state = until, 1 - state
    return np.sort(np.concatenate(parts))


def ramp(first: float, last: float, seconds: float, seed: int) -> Times:
    """Poisson arrivals whose rate goes from the first to the last in a straight line."""
    rng = np.random.default_rng(seed)
    part = rng.uniform(0.0, 1.0, rng.poisson((first + last) / 2 * seconds))
    if first == last:
        return np.sort(part * seconds)
    # The inverse of the share of all arrivals that came by then.
    slope = last - first
    return np.sort((np.sqrt(first**2 + part * (last**2 - first**2)) - first) / slope * seconds)


def read_trace(path: Path, speed: float = 1.0) -> Times:
    """A recorded one: a time in seconds a line, whose first counts as 0. `speed` 2 replays it in half the time.

    Raises ValueError with the line that is no number, not finite, or earlier than the one before.
    """
    times: list[float] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            at = float(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected a time in seconds, got {line!r}") from None
        if not math.isfinite(at) or (times and at < times[-1]):
            raise ValueError(f"{path}, line {number}: expected times in ascending order, got {line!r} after {times[-1] if times else '-'}")
        times.append(at)
    if not times:
        raise ValueError(f"{path}: expected a time in seconds a line, got none")
    return (np.array(times) - times[0]) / speed
