import numpy as np
import pytest

from loadtests.statistics import Spread, abba_order, markdown_table, percentile, slope


def test_spread_is_median_and_range() -> None:
    assert Spread.of([30.0, 10.0, 20.0]) == Spread(20.0, 10.0, 30.0)
    assert Spread.of([10.0, 20.0]).median == 15.0


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([26_812, 26_090, 26_961], "26 800 (26 100-27 000)"),
        ([0.1234, 0.1, 0.2], "0.123 (0.100-0.200)"),
        ([9.996, 9.9, 12.0], "10.0 (9.90-12.0)"),
        ([0.0, 0.0, 1.0], "0 (0-1.00)"),
        ([7.5], "7.50"),
        ([float("nan")], "nan (nan-nan)"),
    ],
)
def test_spread_is_written_with_three_digits(values: list[float], text: str) -> None:
    assert Spread.of(values).text() == text


def test_spread_is_scaled_when_written() -> None:
    assert Spread.of([0.001, 0.002, 0.003]).text(1e3) == "2.00 (1.00-3.00)"


def test_percentile_is_a_measured_value() -> None:
    values = list(range(1, 101))
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([3.0, 100.0], 99) == 100.0


def test_slope_is_change_per_unit_of_time() -> None:
    assert slope([100.0, 101.0, 102.0], [5.0, 7.0, 9.0]) == pytest.approx(2.0)
    assert slope([1.0], [5.0]) == 0.0


def test_every_second_round_is_reversed() -> None:
    assert abba_order("ABC", 3) == [["A", "B", "C"], ["C", "B", "A"], ["A", "B", "C"]]


def test_reversed_rounds_cancel_a_steady_drift() -> None:
    # Each turn is slower than the one before; over an even number of rounds all contestants lose the same.
    turns = [name for order in abba_order("AB", 4) for name in order]
    lost = {name: sum(turn for turn, who in enumerate(turns) if who == name) for name in "AB"}
    assert lost["A"] == lost["B"]


def test_table_columns_are_aligned() -> None:
    lines = markdown_table(["a", "long header"], [["1", "2"], ["333", "4"]]).splitlines()
    assert lines[0] == "| a   | long header |"
    assert len({len(line) for line in lines}) == 1
    assert np.all([line.startswith("| ") for line in lines])
