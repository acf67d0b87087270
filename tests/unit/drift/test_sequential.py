"""Slow drift: found, and seldom where there is none."""

from __future__ import annotations

import numpy as np
from headrace.config import DriftConfig
from headrace.drift.reference import Reference
from headrace.drift.sequential import MOST, SlowDrift
from unit.drift.references import counts_of, numeric, reference_of

BINS = 10
CONFIG = DriftConfig(alpha=0.02)
"""A quarter of it is for slow drift: one false alarm in 200 windows at most."""


def sampled_reference(random: np.random.Generator, rows: int) -> Reference:
    counts = random.multinomial(rows, np.full(BINS, 1 / BINS))
    return reference_of(numeric("0", tuple(np.arange(1.0, BINS)), tuple(counts.tolist())))


def windows_until_alarm(random: np.random.Generator, shares: list[np.ndarray], rows: int, reference_rows: int) -> int:
    """The number of the window with which it is raised; one more than there are where it is not."""
    reference = sampled_reference(random, reference_rows)
    slow = SlowDrift(reference, CONFIG)
    for number, share in enumerate(shares, start=1):
        slow.update(counts_of(reference, tuple(random.multinomial(rows, share).tolist())))
        if slow.evidence()[0] >= 1:
            return number
    return len(shares) + 1


def test_without_drift_alarms_are_no_more_frequent_than_stated() -> None:
    """40 runs of 200 windows, each against a reference of 1,000 rows: 40 alarms are allowed on average."""
    random = np.random.default_rng(1)
    steady = [np.full(BINS, 1 / BINS)] * 200
    alarms = sum(windows_until_alarm(random, steady, 100, 1000) <= 200 for _ in range(40))
    assert alarms <= 40 * 200 * CONFIG.alpha / 4
    assert alarms <= 4  # and far fewer, since most of the evidence needs an effect too


def test_a_shift_that_no_window_shows_is_found_by_many() -> None:
    shares = np.full(BINS, 1 / BINS) * np.linspace(0.6, 1.4, BINS)
    found = [windows_until_alarm(np.random.default_rng(seed), [shares / shares.sum()] * 200, 100, 10_000) for seed in range(5)]
    assert 1 < max(found) < 100


def test_a_difference_too_small_to_matter_raises_nothing() -> None:
    shares = np.full(BINS, 1 / BINS) * np.linspace(0.95, 1.05, BINS)
    assert windows_until_alarm(np.random.default_rng(3), [shares / shares.sum()] * 100, 20_000, 100_000) == 101


def test_an_alarm_ends_once_new_windows_are_clean_or_it_is_restarted() -> None:
    random = np.random.default_rng(4)
    reference = sampled_reference(random, 10_000)
    slow = SlowDrift(reference, CONFIG)
    shifted, clean = np.linspace(0.5, 1.5, BINS) / BINS, np.full(BINS, 1 / BINS)

    def feed(shares: np.ndarray, windows: int) -> float:
        for _ in range(windows):
            slow.update(counts_of(reference, tuple(random.multinomial(500, shares).tolist())))
        return slow.evidence()[0]

    assert feed(shifted, 20) >= 1
    assert feed(clean, 30) < 1
    assert feed(shifted, 20) >= 1
    slow.restart([0])
    assert slow.evidence()[0] == 0
    assert feed(clean, 3) < 1


def test_starting_points_are_bounded() -> None:
    reference = reference_of()
    slow = SlowDrift(reference, CONFIG)
    for _ in range(300):
        slow.update(counts_of(reference, (25, 25, 25, 25)))
    assert f"{MOST} starting points" in repr(slow)


def test_a_constant_that_stays_so_is_no_evidence_however_long() -> None:
    reference = reference_of(numeric("0", (3.0, 4.0), (0, 2000, 0)))
    slow = SlowDrift(reference, DriftConfig(min_psi=0.0))
    for _ in range(40):
        slow.update(counts_of(reference, (0, 50_000, 0)))
        assert slow.evidence()[0] < 1
