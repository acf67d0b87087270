from collections import Counter

import pytest

from loadtests.cancel_storm import Footprint
from loadtests.hot_swap import MemoryRun, ModelRound, Phase, Round, judge, judge_swaps, render_round, render_summary
from loadtests.traffic import NO_VERSION, Record
from loadtests.variants import Verdict

PHASES = [Phase("steady", 0.0, 100.0, 50.0), Phase("swapping", 100.0, 200.0, 60.0), Phase("steady again", 200.0, 300.0, 50.0)]


def record(swapping: float, *, version: int = 1) -> Record:
    """One call a second; 10 ms long, and `swapping` seconds in the second phase."""
    made = Record("m")
    for second in range(300):
        made.add(second, second + (swapping if 100 <= second < 200 else 0.01), version)
        made.verdicts[Verdict.EQUAL] += 1
    return made


def one_round(swapping: float) -> Round:
    return Round([ModelRound.of(record(swapping), PHASES, [150.0])], PHASES, 5, 4, [0.5], [0.5, 2.5], [])


def test_the_phases_are_measured_apart() -> None:
    model = one_round(0.02).models[0]
    assert model.calls == {"steady": 100, "swapping": 100, "steady again": 100}
    assert round(model.p99["swapping"], 6) == 20.0
    assert round(model.steady_p99, 6) == 10.0
    assert round(model.ratio, 6) == 2.0
    assert round(model.flip_p99, 6) == 20.0
    assert (model.failed, model.wrong, model.bitwise) == (0, 0, 1.0)


def test_the_median_of_the_rounds_is_held_to_the_limit() -> None:
    assert judge([one_round(each) for each in (0.01, 0.0119, 0.05)], None, limit=1.2) == []
    failures = judge([one_round(each) for each in (0.01, 0.013, 0.05)], None, limit=1.2)
    assert failures == ["m: p99 while swapping is 1.30 (1.00-5.00) times the steady one, expected at most 1.2"]


def test_a_phase_without_answers_does_not_pass() -> None:
    silent = Record("m")
    silent.add(0.0, 0.01, 1)
    rounds = [Round([ModelRound.of(silent, PHASES, [])], PHASES, 0, 0, [], [], [])]
    assert "p99 while swapping is nan" in judge(rounds, None, limit=1.2)[0]


def test_answers_that_are_right_and_in_order_pass() -> None:
    assert judge_swaps(record(0.01), {1: float("-inf")}) == []


@pytest.mark.parametrize(
    ("calls", "failure"),
    [
        ([(0.0, 0.1, 1), (2.0, 2.1, 5)], "version 5 answered and was never published"),
        ([(0.0, 0.1, 1), (0.2, 0.3, 2)], "version 2 answered 0.700 s before it was published"),
        ([(2.0, 2.1, 2), (2.2, 2.3, 1)], "1 calls were answered by an older version"),
        ([], "no call ended"),
    ],
)
def test_versions_that_should_not_have_answered_are_told(calls: list[tuple[float, float, int]], failure: str) -> None:
    made = Record("m")
    for call in calls:
        made.add(*call)
    (only,) = judge_swaps(made, {1: float("-inf"), 2: 1.0})
    assert failure in only


def test_failed_and_wrong_calls_are_told_with_their_count() -> None:
    made = Record("m", troubles=Counter({"UNAVAILABLE: gone": 3}))
    made.add(0.0, 0.1, NO_VERSION)
    assert judge_swaps(made, {}) == ["m: 3 times: UNAVAILABLE: gone"]


@pytest.mark.parametrize(
    ("last", "failure"),
    [
        (Footprint(12, 20, 105), None),
        (Footprint(10, 20, 106), "memory: 1.060 times as much after 200 swaps as after 20"),
        (Footprint(13, 20, 100), "threads: 13 after 200 swaps, 10 after 20"),
        (Footprint(10, 21, 100), "open files: 21 after 200 swaps, 20 after 20"),
    ],
)
def test_what_grows_over_many_swaps_is_told(last: Footprint, failure: str | None) -> None:
    run = MemoryRun({20: Footprint(10, 20, 100), 100: Footprint(99, 99, 999), 200: last}, [])
    assert run.judge() == ([failure] if failure else [])


def test_a_memory_run_that_was_cut_short_does_not_pass() -> None:
    assert MemoryRun({20: Footprint(10, 20, 100)}, []).judge() == ["memory: fewer than two measurements"]


def test_the_report_shows_every_phase_and_the_swaps() -> None:
    each = one_round(0.02)
    text = render_round(1, each) + render_summary([each], MemoryRun({20: Footprint(10, 20, 100), 200: Footprint(10, 20, 100)}, []))
    assert "steady again" in text
    assert "p99 swapping/steady 2.000" in text
    assert "5 published, 4 answered" in text
    assert "newer one's 2.50 s at worst" in text
    assert "memory last/first 1.000" in text
