import pytest

from loadtests.comparison import Cell, Report
from loadtests.report_verdicts import CPU, RATE, Change, Verdict, changes, is_worse, verdict_table
from loadtests.statistics import Spread


def report(contestant: str, *rates: float) -> Report:
    return Report(
        {}, {}, [Cell(number, contestant, "mlp", 16, 1000, rate, 0.001, 0.002, 50.0, 4.0, 0.2) for number, rate in enumerate(rates)]
    )


def change(before: Spread, after: Spread, quantity: object = RATE) -> Change:
    return Change("ours", "mlp", 16, quantity, before, after)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (Spread(100, 95, 105), Spread(80, 75, 85), Verdict.WORSE),
        (Spread(100, 95, 105), Spread(120, 115, 125), Verdict.BETTER),
        # Far apart, but the ranges meet.
        (Spread(100, 70, 105), Spread(80, 75, 85), Verdict.SAME),
        # Disjoint, but by less than is worth a word.
        (Spread(100, 99.9, 100.1), Spread(96, 95.9, 96.1), Verdict.SAME),
    ],
)
def test_a_verdict_needs_disjoint_ranges_and_a_difference(before: Spread, after: Spread, verdict: Verdict) -> None:
    assert change(before, after).verdict is verdict


def test_less_cpu_time_is_better() -> None:
    assert change(Spread(100, 95, 105), Spread(80, 75, 85), CPU).verdict is Verdict.BETTER


def test_the_ratio_spans_what_the_ranges_allow() -> None:
    assert change(Spread(100, 50, 200), Spread(100, 100, 100)).ratio == Spread(1.0, 0.5, 2.0)


def test_only_what_both_have_measured_is_compared() -> None:
    assert changes(report("ours", 100.0), report("theirs", 100.0)) == []


def test_one_that_is_worse_makes_the_whole_worse() -> None:
    found = changes(report("ours", 100.0, 101.0), report("ours", 50.0, 51.0))
    assert [each.verdict for each in found] == [Verdict.WORSE, Verdict.SAME, Verdict.SAME, Verdict.SAME]
    assert is_worse(found)
    assert verdict_table(found).rows[0][3:] == ["requests/s", "100 (100-101)", "50.5 (50.0-51.0)", "0.502 (0.495-0.510)", "worse"]


def test_nothing_is_worse_than_itself() -> None:
    assert not is_worse(changes(report("ours", 100.0, 50.0), report("ours", 100.0, 50.0)))
