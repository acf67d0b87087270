from typing import Any

import pytest

from loadtests.report_figures import scenario_plots
from loadtests.report_scenarios import Histogram, loads, merge, read_runs, scenario_table

EDGES = [0.001, 0.002, 0.004, 0.008]


def run(contestant: str, number: int, rate: float, **changes: Any) -> dict[str, Any]:
    counts = {"sent": 100, "ok": 100, "late": 0, "refused": 0, "failed": 0, "wrong": 0, "goodput": rate}
    said = {"scenario": "rates", "contestant": contestant, "model": "mlp", "round": number, "offered_rate": rate, "duration_s": 1.0}
    latency = {"p50": 0.001, "p90": 0.002, "p99": 0.004, "histogram": {"edges_s": EDGES, "counts": [90, 9, 1]}}
    return {**said, **counts, **latency, "lag_p99": 1e-4, "valid": True, "slo": 0.005, "cpu_us": 20.0, **changes}


def content(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "scenarios", "runs": [*runs]}


def test_the_same_step_of_every_round_is_put_together() -> None:
    # The rates follow what each round could do, so no two are equal.
    found = loads(read_runs(content(run("ours", 0, 100), run("ours", 0, 200), run("ours", 1, 210), run("ours", 1, 90))))
    assert [(load.offered.low, load.offered.high) for load in found] == [(90, 100), (200, 210)]


def test_histograms_of_the_rounds_are_added() -> None:
    (load,) = loads(read_runs(content(run("ours", 0, 100), run("ours", 1, 100))))
    assert load.histogram.counts == (180, 18, 2)


def test_histograms_that_cover_parts_of_a_grid_are_joined() -> None:
    grid = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    parts = [Histogram((0.0, 1.0, 2.0), (1, 2)), Histogram((4.0, 5.0), (3,)), Histogram((1.0, 2.0, 3.0), (4, 5))]
    assert merge(parts) == Histogram(tuple(grid), (1, 6, 5, 0, 3))


def test_histograms_on_other_grids_are_refused() -> None:
    other = {"edges_s": [0.0, 1.0], "counts": [100]}
    (load,) = loads(read_runs(content(run("ours", 0, 100), run("ours", 1, 100, histogram=other))))
    with pytest.raises(ValueError, match="ours, mlp: expected histograms on one grid"):
        _ = load.histogram


def test_repetitions_of_one_load_get_no_line_over_the_load() -> None:
    plots = scenario_plots(loads(read_runs(content(run("a", 0, 100), run("a", 0, 100)))))
    assert [plot.key for plot in plots] == ["distribution-rates-mlp"]


def test_a_run_without_a_number_is_named() -> None:
    broken = run("ours", 0, 100)
    del broken["goodput"]
    with pytest.raises(ValueError, match=r"run 1: .*goodput"):
        read_runs(content(run("ours", 0, 100), broken))


def test_pictures_of_rates_have_every_server() -> None:
    plots = {plot.key: plot for plot in scenario_plots(loads(read_runs(content(run("a", 0, 9), run("a", 0, 99), run("b", 0, 5)))))}
    assert [series.name for series in plots["goodput-rates-mlp"].series] == ["a", "b"]
    assert [(series.name, series.is_secondary) for series in plots["latency-rates-mlp"].series] == [
        ("a", False), ("b", False), ("a", True), ("b", True),
    ]  # fmt: skip
    assert plots["goodput-rates-mlp"].has_diagonal


def test_distribution_is_of_the_highest_load_that_was_answered_in_time() -> None:
    runs = [run("a", 0, 10), run("a", 0, 20), run("a", 0, 30, ok=90, late=10)]
    plot = next(plot for plot in scenario_plots(loads(read_runs(content(*runs)))) if plot.key == "distribution-rates-mlp")
    assert "a at 20/s" in plot.note


def test_a_load_whose_generator_was_late_is_marked_and_not_drawn() -> None:
    found = loads(read_runs(content(run("a", 0, 10, valid=False))))
    assert scenario_table("t", found).rows[0][-1] == "no"
    assert scenario_plots(found) == []


def test_table_shows_parts_and_what_is_missing() -> None:
    (row,) = scenario_table("t", loads(read_runs(content(run("a", 0, 10, late=5, p99=None, cpu_us=None))))).rows
    assert row == ["rates", "mlp", "a", "10.0", "10.0", "1.00", "-", "5.00%", "0", "0", "-", "0.100", "yes"]
