import json

import pytest

from loadtests.comparison import Cell, Reference, Report, as_json, baseline_of, echoes_of, from_json, render, summary
from loadtests.machine import Noise, noisy_probes
from loadtests.reference import Speed


def cell(round_number: int, contestant: str, rate: float, client_cpu: float = 0.2) -> Cell:
    return Cell(round_number, contestant, "mlp", 16, 1000, rate, 0.001, 0.002, 50.0, 4.0, client_cpu)


@pytest.fixture
def report() -> Report:
    cells = [cell(0, "ours", 20.0), cell(0, "theirs", 10.0), cell(1, "theirs", 20.0), cell(1, "ours", 60.0), cell(2, "ours", 30.0)]
    references = [
        Reference(0, "mlp", {1: Speed(50.0, 20.0), 2: Speed(100.0, 10.0)}),
        Reference(1, "mlp", {1: Speed(120.0, 5.0), 2: Speed(80.0, 12.0)}),
    ]
    return Report({"cpu": "x"}, {"rounds": 3}, cells, references)


def test_ratios_are_taken_within_a_round(report: Report) -> None:
    # The third round has no baseline and gives no ratio.
    assert report.ratios("ours", "theirs", "mlp", 16) == [2.0, 3.0]


def test_fractions_are_of_the_best_batch_size_of_the_round(report: Report) -> None:
    assert report.fractions("ours", "mlp", 16) == [0.2, 0.5]
    assert report.cpu_fractions("ours", "mlp", 16) == [0.2, 0.1]


def test_tables_show_median_range_and_what_is_missing(report: Report) -> None:
    text = render(report, ["ours", "theirs"], ["mlp"], [16, 64])
    assert "30.0 (20.0-60.0)" in text
    assert "2.50 (2.00-3.00)" in text
    assert "0.350 (0.200-0.500)" in text
    assert text.count("not measured") == 2
    assert "lower bound" not in text


def test_a_busy_client_makes_the_rate_a_lower_bound(report: Report) -> None:
    report.cells.append(cell(3, "ours", 40.0, client_cpu=0.9))
    text = render(report, ["ours", "theirs"], ["mlp"], [16])
    assert "≥ 35.0 (20.0-60.0)" in text
    assert "lower bound" in text


def test_failures_are_shown(report: Report) -> None:
    report.failures.append("round 1, ours, mlp: gone")
    assert "- round 1, ours, mlp: gone" in render(report, ["ours"], ["mlp"], [16])


def test_json_has_every_number(report: Report) -> None:
    content = json.loads(as_json(report))
    assert content["cells"][0]["rate"] == 20.0
    assert content["references"][0]["speeds"]["2"] == {"rate": 100.0, "cpu_us": 10.0}
    assert (content["references"][1]["best_rate"], content["references"][1]["least_cpu_us"]) == (120.0, 5.0)


def test_noise_is_judged_by_the_best_of_its_core() -> None:
    quiet = Noise(0, 1.0, 1.05, 1.2, 0.0)
    slow = Noise(0, 1.1, 1.2, 1.3, 0.0)
    stolen = Noise(1, 5.0, 5.0, 5.0, 0.05)
    assert noisy_probes([quiet, slow, stolen]) == [slow, stolen]


def test_a_report_is_read_back_from_its_json(report: Report) -> None:
    report.command, report.noise = "python -m loadtests.compare", [Noise(0, 1.0, 1.05, 1.2, 0.0)]
    assert from_json(json.loads(as_json(report))) == report


@pytest.mark.parametrize(("change", "said"), [({"facts": None}, "not the JSON"), ({"cells": [{"wrong": 1}]}, "wrong")])
def test_json_of_something_else_is_refused(report: Report, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_json(json.loads(as_json(report)) | change)


def test_echoes_are_of_the_servers_own_transport() -> None:
    names = ["headrace-native", "headrace", "echo-native", "echo-grpcio", "triton"]
    assert echoes_of("headrace-native", names) == ["echo-native"]
    assert echoes_of("headrace", names) == ["echo-native", "echo-grpcio"]
    assert echoes_of("echo-native", names) == []


def test_an_echo_is_not_what_others_are_set_in_proportion_to() -> None:
    assert baseline_of(["ours", "theirs", "echo-native"]) == "theirs"
    assert baseline_of(["echo-native"]) == "echo-native"


def test_the_fraction_of_an_echo_is_taken_within_a_round() -> None:
    cells = [cell(0, "headrace-native", 20.0), cell(0, "echo-native", 40.0), cell(1, "echo-native", 40.0), cell(1, "headrace-native", 30.0)]
    text = render(Report({}, {}, cells), ["headrace-native", "echo-native"], ["mlp"], [16])
    assert "| mlp   | headrace-native | echo-native | rate     | 0.625 (0.500-0.750) |" in text
    assert "| mlp   | headrace-native | echo-native | CPU time | 1.00                |" in text


def test_the_summary_has_one_row_a_server(report: Report) -> None:
    assert [row[:3] for row in summary(report).rows] == [["mlp", "ours", "30.0 (20.0-60.0)"], ["mlp", "theirs", "15.0 (10.0-20.0)"]]
