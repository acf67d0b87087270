import pytest

from loadtests.comparison import Cell, Report
from loadtests.report_verdicts import CPU, OF_ECHO, RATE, Change, Quantity, Verdict, changes, is_worse, verdict_table
from loadtests.statistics import Spread


def report(contestant: str, *rates: float) -> Report:
    return Report(
        {}, {}, [Cell(number, contestant, "mlp", 16, 1000, rate, 0.001, 0.002, 50.0, 4.0, 0.2) for number, rate in enumerate(rates)]
    )


def change(before: Spread, after: Spread, quantity: Quantity = RATE, rounds: int = 3) -> Change:
    return Change("ours", "mlp", 16, quantity, before, after, rounds)


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


def test_few_rounds_give_no_verdict() -> None:
    assert change(Spread(100, 100, 100), Spread(10, 10, 10), rounds=2).verdict is Verdict.UNKNOWN


def test_one_that_is_worse_makes_the_whole_worse() -> None:
    found = changes(report("ours", 100.0, 101.0, 102.0), report("ours", 50.0, 51.0, 52.0))
    assert [each.verdict for each in found] == [Verdict.WORSE, Verdict.SAME, Verdict.SAME, Verdict.SAME]
    assert is_worse(found)
    assert verdict_table(found).rows[0][3:] == ["requests/s", "101 (100-102)", "51.0 (50.0-52.0)", "0.505 (0.490-0.520)", "worse"]


def test_an_echo_that_is_worse_is_the_machine() -> None:
    found = changes(report("echo-native", 100.0, 101.0, 102.0), report("echo-native", 50.0, 51.0, 52.0))
    assert found[0].verdict is Verdict.WORSE
    assert not is_worse(found)


def test_the_rate_over_the_echos_does_not_depend_on_the_machine() -> None:
    def measured(factor: float) -> Report:
        both = report("headrace-native", *(factor * rate for rate in (50.0, 52.0, 54.0)))
        both.cells += report("echo-native", *(factor * rate for rate in (100.0, 104.0, 108.0))).cells
        return both

    (found,) = (each for each in changes(measured(1.0), measured(0.3)) if each.quantity is OF_ECHO)
    assert found.verdict is Verdict.SAME
    assert found.ratio.median == pytest.approx(1.0)


def test_nothing_is_worse_than_itself() -> None:
    assert not is_worse(changes(report("ours", 100.0, 50.0, 70.0), report("ours", 100.0, 50.0, 70.0)))
