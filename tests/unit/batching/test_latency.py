from __future__ import annotations

import pytest
from headrace.batching.latency import inline_rows, worthwhile_batch

MAGIKA = {1: 1 / 154, 2: 2 / 150, 4: 4 / 145, 8: 8 / 141, 16: 16 / 136, 32: 32 / 130, 64: 64 / 114}
GPU = {1: 0.004, 2: 0.0041, 4: 0.0043, 8: 0.005, 16: 0.0065, 32: 0.01, 64: 0.018}
TINY = {1: 10e-6, 8: 12e-6, 64: 40e-6}


@pytest.mark.parametrize(("seconds", "expected"), [(MAGIKA, 1), (GPU, 64), (TINY, 64), ({}, 32)])
def test_worthwhile_batch_is_the_smallest_that_is_about_as_fast_as_the_best(seconds: dict[int, float], expected: int) -> None:
    assert worthwhile_batch(seconds, 32 if not seconds else 64) == expected


GROWING = {1: 150e-6, 2: 250e-6, 4: 450e-6, 8: 850e-6, 16: 1.6e-3, 64: 6.4e-3}


@pytest.mark.parametrize(("seconds", "expected"), [(TINY, 7 * 64), (GROWING, 8), (MAGIKA, 0), ({}, 0), ({1: 150e-6}, 4)])
def test_no_more_rows_run_inline_than_a_caller_may_be_held_up_for(seconds: dict[int, float], expected: int) -> None:
    assert inline_rows(seconds, 64) == expected
