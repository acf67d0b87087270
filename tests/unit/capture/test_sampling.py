from __future__ import annotations

import random

import pytest
from headrace.capture.sampling import CaptureSampler


@pytest.mark.parametrize("fraction", [0.5, 0.03])
def test_each_request_has_the_same_chance_however_they_come_together(fraction: float) -> None:
    sampler, sizes = CaptureSampler(fraction, 1e9, 0.0, seed=1), random.Random(2)
    chosen = requests = firsts = batches = 0
    for _ in range(20_000):
        size = sizes.randint(1, 9)
        positions, too_fast = sampler.choose(size, 0.0)
        assert too_fast == 0
        assert positions == sorted(set(positions))
        assert all(0 <= position < size for position in positions)
        chosen, requests, firsts, batches = chosen + len(positions), requests + size, firsts + (0 in positions), batches + 1
    assert chosen / requests == pytest.approx(fraction, rel=0.05)
    assert firsts / batches == pytest.approx(fraction, rel=0.1)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 100), (0.0, 0)])
def test_all_and_none(fraction: float, expected: int) -> None:
    sampler = CaptureSampler(fraction, 1e9, 0.0)
    assert sum(len(sampler.choose(10, 0.0)[0]) for _ in range(10)) == expected


def test_no_more_than_the_rate_and_what_comes_too_fast_is_counted() -> None:
    sampler = CaptureSampler(1.0, 10.0, 0.0)
    chosen = too_fast = 0
    for step in range(100):  # 100 requests a second for ten seconds
        for _ in range(10):
            positions, beyond = sampler.choose(1, step / 10)
            chosen, too_fast = chosen + len(positions), too_fast + beyond
    assert chosen + too_fast == 1000
    assert 100 <= chosen <= 110  # the first second's worth is there at the start


def test_a_clock_that_stands_still_gives_no_allowance_and_a_rate_of_zero_nothing() -> None:
    sampler = CaptureSampler(1.0, 0.0, 5.0)
    assert [sampler.choose(3, now) for now in (5.0, 4.0, 1e6)] == [([], 3), ([], 3), ([], 3)]
