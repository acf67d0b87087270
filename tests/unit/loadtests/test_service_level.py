import math

import numpy as np
import pytest

from loadtests.service_level import (
    Counts,
    Histogram,
    Results,
    Status,
    binomial_tail,
    count,
    goodput,
    is_shown,
    is_valid,
    least_requests,
    most_misses,
    statement,
    status_name,
)

# MLPerf's early stopping at 99 % confidence: requests that it takes, by misses.
MLPERF = {
    0.99: {0: 459, 1: 662, 2: 838, 5: 1307, 10: 2010, 20: 3304},
    0.999: {0: 4603, 1: 6636, 2: 8403, 5: 13_105, 10: 20_140, 20: 33_097},
    0.95: {0: 90, 1: 130, 2: 165, 5: 259, 10: 398, 20: 656},
}


@pytest.mark.parametrize(("share", "misses", "requests"), [(p, t, n) for p, by in MLPERF.items() for t, n in by.items()])
def test_counts_of_early_stopping_are_mlperfs(share: float, misses: int, requests: int) -> None:
    assert least_requests(misses, share) == requests
    assert is_shown(requests, misses, share)
    assert not is_shown(requests - 1, misses, share)


@pytest.mark.parametrize(("total", "misses"), [(458, -1), (459, 0), (661, 0), (662, 1), (3304, 20), (0, -1)])
def test_most_misses_is_the_other_side_of_the_same_counts(total: int, misses: int) -> None:
    assert most_misses(total) == misses


def test_binomial_tail_of_a_few_coins() -> None:
    assert binomial_tail(1, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(3, 3, 0.5) == 1.0


def test_as_many_misses_as_are_to_be_expected_show_nothing() -> None:
    assert not is_shown(1_000_000, 10_000)
    assert is_shown(1_000_000, 9_700)


def results(*calls: tuple[float, float, int], timeout: float = math.inf, seconds: float = 1.0, lag: float = 0.0) -> Results:
    """Of (intended, done, status)."""
    intended, done, statuses = (np.array(column) for column in zip(*calls, strict=True))
    return Results(intended, intended + lag, done, statuses.astype(np.int16), np.full(len(calls), timeout), seconds)


def test_latency_counts_from_the_intended_time() -> None:
    assert results((0.0, 0.5, 0), (1.0, 1.25, 0), lag=0.2).latencies.tolist() == [0.5, 0.25]


def test_failed_calls_have_no_latency() -> None:
    assert results((0.0, 0.5, 13), (1.0, math.nan, Status.UNANSWERED)).latencies.tolist() == []


@pytest.mark.parametrize(
    ("done", "status", "kind"),
    [
        (0.05, Status.OK, "ok"),
        (0.15, Status.OK, "late"),
        (0.30, Status.DEADLINE_EXCEEDED, "late"),
        (0.30, Status.EXPIRED, "late"),
        (0.30, Status.CANCELLED, "late"),
        (0.01, Status.CANCELLED, "refused"),
        (0.30, Status.LOST, "failed"),
        (0.01, Status.DEADLINE_EXCEEDED, "refused"),
        (0.01, Status.RESOURCE_EXHAUSTED, "refused"),
        (0.01, Status.UNAVAILABLE, "refused"),
        (0.01, 13, "failed"),
        (0.01, Status.LOST, "failed"),
        (0.01, Status.RESET, "failed"),
        (math.nan, Status.UNANSWERED, "failed"),
        (0.01, Status.WRONG, "wrong"),
    ],
)
def test_each_end_of_a_call_is_counted_as_what_it_is(done: float, status: int, kind: str) -> None:
    counts = count(results((0.0, done, status), timeout=0.2), slo=0.1)
    assert counts == Counts(**{name: int(name == kind) for name in ("ok", "late", "refused", "failed", "wrong")})
    assert counts.total == 1


def test_without_slo_every_right_answer_is_in_time() -> None:
    assert count(results((0.0, 99.0, 0)), None).ok == 1


def test_goodput_is_what_came_in_time_per_second_of_the_schedule() -> None:
    made = results((0.0, 0.1, 0), (1.0, 1.1, 0), (1.5, 9.5, 0), (1.8, 1.9, 8), seconds=2.0)
    assert goodput(made, slo=0.2) == 1.0


def test_without_slo_goodput_does_not_count_what_piled_up_as_done_in_time() -> None:
    assert goodput(results((0.0, 0.1, 0), (1.0, 6.0, 0), seconds=2.0), None) == pytest.approx(2 / 6)


def test_a_run_whose_client_was_late_is_not_valid() -> None:
    calls = [(float(index), index + 0.01, 0) for index in range(200)]
    assert is_valid(results(*calls, lag=0.0009), None)
    assert not is_valid(results(*calls, lag=0.0011), None)
    assert is_valid(results(*calls, lag=0.0049), 0.05)
    assert not is_valid(results(*calls, lag=0.0051), 0.05)


def test_the_statement_says_what_it_would_take() -> None:
    assert statement(459, 0, 0.01) == "p99 <= 10 ms holds with 99 % confidence (0 of 459 missed)"
    assert statement(600, 1, 0.01) == "p99 <= 10 ms is not shown: 1 of 600 missed, which takes 662 requests"


def test_a_histogram_counts_every_latency_also_those_beyond_its_edges() -> None:
    made = Histogram.of(np.array([1e-9, 1e-3, 1.01e-3, 500.0]))
    assert sum(made.counts) == 4
    assert len(made.edges_s) == len(made.counts) + 1


def test_a_histogram_holds_only_what_was_seen() -> None:
    made = Histogram.of(np.array([1e-3 * 1.01, 2e-3 * 1.01]))
    assert made.edges_s[0] <= 1.01e-3 < made.edges_s[1]
    assert made.edges_s[-2] <= 2.02e-3 < made.edges_s[-1]


def test_statuses_have_names() -> None:
    assert status_name(101) == "LOST"
    assert status_name(13) == "grpc-status 13"
