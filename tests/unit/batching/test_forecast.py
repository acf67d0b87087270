from __future__ import annotations

import pytest
from headrace.batching.forecast import MARGIN, Forecast
from headrace.batching.latency import LatencyTable

STEEP = {rows: 0.0019 + 0.0008 * rows for rows in (1, 2, 4, 8, 16, 32, 64)}
"""With the server's own part 2.0 ms and 0.8 ms a row."""


def forecast(rate: float = 0.0, slack: float = 0.0) -> Forecast:
    made = Forecast(LatencyTable(STEEP, 64))
    if rate:
        made.count(round(rate), 1.0)
    if slack:
        made.saw_deadline(slack)
    return made


def test_batches_grow_no_larger_than_two_in_a_row_have_time_for() -> None:
    target = forecast(slack=0.03).target(1, 1.0)
    upper = forecast().table.upper
    assert 2 * upper(target) + MARGIN <= 0.03 < 2 * upper(target + 1) + MARGIN


def test_with_more_instances_less_is_waited_for_and_batches_may_be_larger() -> None:
    assert forecast(slack=0.03).target(4, 1.0) > forecast(slack=0.03).target(1, 1.0)


def test_without_deadlines_batches_are_as_large_as_is_worth_it() -> None:
    assert forecast().target(1, 1.0) == forecast().table.worthwhile


@pytest.mark.parametrize(("rate", "expected"), [(100, 1), (600, 3), (1000, 10), (5000, 64)])
def test_the_smallest_batch_that_keeps_up_grows_with_what_comes(rate: float, expected: int) -> None:
    assert forecast(rate=rate).sustaining(1, 1.0) == expected


def test_a_request_is_answered_after_what_runs_what_is_ahead_and_its_own_batch() -> None:
    made = forecast(slack=0.03)
    target, mean, upper = made.target(1, 1.0), made.table.mean, made.table.upper
    start, answer = made.start_and_answer(1.0, [1.5], target + 2, target + 2, 1)
    assert start == pytest.approx(1.5 + mean(target))
    assert answer == pytest.approx(start + upper(3) + MARGIN)


def test_a_free_instance_beside_a_busy_one_is_what_counts() -> None:
    start, _ = forecast().start_and_answer(1.0, [0.9, 1.5], 0, 0, 1)
    assert start == 1.0


def test_under_load_a_request_is_foreseen_in_the_batch_that_will_have_grown_by_then() -> None:
    _, quiet = forecast(rate=10).start_and_answer(1.0, [1.05], 0, 0, 1)
    _, busy = forecast(rate=1000).start_and_answer(1.0, [1.05], 0, 0, 1)
    assert busy - quiet > 0.005


def test_a_deadline_is_easy_only_beyond_two_batches_and_all_rows_ahead() -> None:
    made = forecast()
    assert not made.is_easy(100.0, 0)
    made.look(1, 0, 1.0)
    both = 2 * (made.table.upper(64) + MARGIN)
    assert made.is_easy(both + 0.001, 0)
    assert not made.is_easy(both + 0.001, 64)
