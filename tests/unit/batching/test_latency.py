from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from headrace.batching.latency import (
    BATCH_OVERHEAD,
    FRESH,
    OUTLIER,
    Interference,
    LatencyTable,
    inline_rows,
    levelled,
    worthwhile_batch,
)

MAGIKA = {1: 1 / 154, 2: 2 / 150, 4: 4 / 145, 8: 8 / 141, 16: 16 / 136, 32: 32 / 130, 64: 64 / 114}
GPU = {1: 0.004, 2: 0.0041, 4: 0.0043, 8: 0.005, 16: 0.0065, 32: 0.01, 64: 0.018}
TINY = {1: 10e-6, 8: 12e-6, 64: 40e-6}


@pytest.mark.parametrize(("seconds", "expected"), [(MAGIKA, 1), (GPU, 64), (TINY, 64), ({}, 32)])
def test_worthwhile_batch_is_the_smallest_that_is_about_as_fast_as_the_best(seconds: dict[int, float], expected: int) -> None:
    assert worthwhile_batch(seconds, 32 if not seconds else 64) == expected
    assert LatencyTable(seconds, 32 if not seconds else 64).worthwhile == expected


GROWING = {1: 150e-6, 2: 250e-6, 4: 450e-6, 8: 850e-6, 16: 1.6e-3, 64: 6.4e-3}


@pytest.mark.parametrize(("seconds", "expected"), [(TINY, 7 * 64), (GROWING, 8), (MAGIKA, 0), ({}, 0), ({1: 150e-6}, 4)])
def test_no_more_rows_run_inline_than_a_caller_may_be_held_up_for(seconds: dict[int, float], expected: int) -> None:
    assert inline_rows(seconds, 64) == expected


class Model:
    """Runs batches in virtual time and reports them to its table."""

    def __init__(self, table: LatencyTable, latency: Callable[[int], float]) -> None:
        self.table = table
        self.latency = latency
        self.now = 100.0

    def run(self, rows: int, times: int = 1, idle: float = 0.0) -> None:
        for _ in range(times):
            took = self.latency(rows)
            self.now += idle + took
            self.table.observe(rows, took, self.now)


def linear(rows: int) -> float:
    return 0.004 + 0.0002 * rows


SIZES = (1, 2, 4, 8, 16, 32, 64)
LINEAR = {rows: linear(rows) for rows in SIZES}


def test_sizes_between_and_beyond_the_measured_ones_are_linear() -> None:
    table = LatencyTable({2: 0.002, 4: 0.003}, 64)
    alone = [table.mean(rows) - BATCH_OVERHEAD for rows in (1, 2, 3, 4, 8)]
    assert alone == pytest.approx([0.002, 0.002, 0.0025, 0.003, 0.005])


def test_sequences_that_fall_are_levelled() -> None:
    assert levelled([1, 3, 2, 4, 1]) == pytest.approx([1, 2.5, 2.5, 2.5, 2.5])
    assert levelled([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_estimates_never_fall_with_the_size_and_rows_within_is_their_inverse(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    model = Model(LatencyTable(LINEAR, 64), lambda rows: linear(rows) * rng.uniform(0.3, 3))
    for _ in range(100):
        model.run(rng.randint(1, 64), idle=rng.random())
        means = [model.table.mean(rows) for rows in range(1, 65)]
        assert all(more - less > -1e-9 for less, more in itertools.pairwise(means))
        seconds = rng.uniform(0.5, 1.5) * rng.choice(means)
        within = model.table.rows_within(seconds)
        assert within == 0 or means[within - 1] <= seconds * 1.000001
        assert within == 64 or means[within] >= seconds * 0.999999


def test_a_model_slower_than_its_warm_up_is_known_after_a_few_batches() -> None:
    model = Model(LatencyTable(LINEAR, 64), lambda rows: 3 * linear(rows))
    model.run(16, times=20)
    assert model.table.mean(16) == pytest.approx(3 * linear(16), rel=0.15)
    assert model.table.mean(64) == pytest.approx(3 * linear(64), rel=0.2)


def test_what_all_models_of_a_device_suffer_reaches_one_that_has_not_run_since() -> None:
    device = Interference()
    busy = Model(LatencyTable(LINEAR, 64, device), linear)
    other = LatencyTable(LINEAR, 64, device)
    busy.run(16, times=100)
    before = other.mean(8)
    busy.latency = lambda rows: 2 * linear(rows)
    busy.run(16, times=200)
    assert other.mean(8) > 1.6 * before
    busy.latency = linear
    busy.run(16, times=1000)
    assert other.mean(8) == pytest.approx(before, rel=0.1)


def test_after_a_rest_the_device_is_taken_for_free_and_the_model_for_what_it_was() -> None:
    device = Interference()
    model = Model(LatencyTable(LINEAR, 64, device), linear)
    model.run(16, times=100)
    usual = model.table.mean(16)
    model.latency = lambda rows: 3 * linear(rows)
    model.run(16, times=50)
    assert model.table.mean(16) > 1.8 * usual
    model.table.relax(model.now + 100.0)
    assert device.factor == 1.0
    model.latency = linear
    model.now += 100.0
    model.run(16)
    assert usual <= model.table.mean(16) < 1.8 * usual


def test_a_stray_batch_is_counted_and_changes_next_to_nothing() -> None:
    model = Model(LatencyTable(LINEAR, 64), linear)
    model.run(16, times=50)
    before = model.table.mean(16)
    model.table.observe(16, 2 * OUTLIER * before, model.now)
    assert model.table.stats().outliers == 1
    assert model.table.mean(16) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_upper_is_what_nearly_all_batches_stay_below(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    model = Model(LatencyTable(LINEAR, 64), lambda rows: linear(rows) * rng.lognormvariate(0, 0.3))
    model.run(16, times=200)
    below = 0
    for _ in range(1000):
        upper = model.table.upper(16)
        below += model.latency(16) <= upper
        model.run(16)
    assert 0.9 <= below / 1000 <= 0.99


def test_a_size_that_was_once_measured_badly_is_tried_again() -> None:
    model = Model(LatencyTable(LINEAR, 64), linear)
    model.latency = lambda rows: 4 * linear(rows)
    model.run(64, times=30)
    model.latency = linear
    model.run(8, times=10)
    assert model.table.worthwhile < 64
    model.run(8, times=round(FRESH) + 2, idle=1.0)
    assert model.table.worthwhile == 64


@pytest.mark.parametrize("seed", range(10))
def test_a_model_that_loses_by_batching_is_not_talked_into_it_by_noise(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    model = Model(LatencyTable(MAGIKA, 64), lambda rows: MAGIKA[rows] * rng.uniform(1.0, 1.3))
    ran = []
    for _ in range(300):
        ran.append(model.table.worthwhile)
        model.run(ran[-1])
    assert sum(ran) / len(ran) < 3


def test_without_a_warm_up_the_shape_is_learnt_from_what_runs() -> None:
    rng = random.Random(0)
    model = Model(LatencyTable({}, 64), MAGIKA.__getitem__)
    assert model.table.worthwhile == 64
    for _ in range(100):
        model.run(rng.choice([rows for rows in SIZES if rows <= model.table.worthwhile]))
    assert model.table.worthwhile <= 4
    assert model.table.mean(1) == pytest.approx(MAGIKA[1], rel=0.2)


def test_a_new_version_inherits_by_how_much_the_old_one_differed_from_its_warm_up() -> None:
    model = Model(LatencyTable(LINEAR, 64), lambda rows: 2 * linear(rows))
    model.run(16, times=50)
    slower = {rows: 1.5 * seconds for rows, seconds in LINEAR.items()}
    assert LatencyTable(slower, 64, before=model.table).mean(16) == pytest.approx(3 * linear(16), rel=0.15)
    assert LatencyTable({1: 0.1}, 64, before=model.table).mean(1) == pytest.approx(0.1 + BATCH_OVERHEAD)


@pytest.mark.parametrize(("rows", "expected"), [(8, 8), (9, 8), (12, 12), (15, 15), (3, 3), (20, 20)])
def test_of_restricted_sizes_the_one_that_does_more_rows_a_second(rows: int, expected: int) -> None:
    table = LatencyTable({4: 0.005, 8: 0.0056, 16: 0.0072}, 16, is_stepped=True)
    assert table.fill(rows) == expected
    assert table.mean(9) == table.mean(16)
