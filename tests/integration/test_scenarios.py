"""Scenarios end to end: a server of its own process, real load, and what is entered of it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from loadtests.contestants import headrace
from loadtests.models import MLP, make_mlp, write_repository
from loadtests.scenario_report import Report
from loadtests.scenarios import Entrant, Plan, run_scenario


def plan(scratch: Path, *models: str, **changes: object) -> Plan:
    """As short as may be: whether all is counted, not how fast it is."""
    other = scratch / "other.onnx"
    other.write_bytes(make_mlp(seed=3).SerializeToString())
    cores = sorted(os.sched_getaffinity(0))
    settings: dict[str, object] = {
        "entrants": [Entrant(headrace())], "models": write_repository(scratch / "models", dict.fromkeys(models, other)), "rounds": 1,
        "seconds": 0.5, "closed_seconds": 0.2, "slo": 5.0, "rate": 50.0, "has_deadlines": True, "grace": 0.0, "every": 0.1,
        "connections": 2, "server_cores": cores[:1], "client_core": cores[-1], "spare_cores": cores[-1:], "seed": 1, "scratch": scratch,
        "logs": scratch / "logs", "start_timeout": 60.0, "deadline": math.inf,
    }  # fmt: skip
    return Plan(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.slow
def test_mixed_load_is_entered_by_model_and_priority(tmp_path: Path) -> None:
    report = Report({}, {})
    run_scenario(plan(tmp_path, MLP, "other"), report, "mixed")
    assert report.failures == []
    assert [run.model for run in report.runs] == [f"{model}, priority {level}" for model in (MLP, "other") for level in (1, 2)]
    assert all(run.sent > 0 and run.wrong == run.failed == 0 for run in report.runs)


@pytest.mark.slow
def test_swaps_under_load_answer_right_and_are_entered_beside_the_steady_run(tmp_path: Path) -> None:
    report = Report({}, {})
    run_scenario(plan(tmp_path, MLP), report, "swap")
    assert report.failures == []
    assert [run.scenario for run in report.runs] == ["swap, steady", "swap"]
    assert all(run.sent > 0 and run.wrong == run.failed == 0 for run in report.runs)
    assert "5 versions published" in report.notes[0]


@pytest.mark.slow
def test_overload_offers_multiples_of_the_rate_that_was_given(tmp_path: Path) -> None:
    report = Report({}, {})
    run_scenario(plan(tmp_path, MLP), report, "overload")
    assert [run.offered_rate for run in report.runs] == [50.0, 75.0, 100.0, 150.0]
    assert report.failures == []
    assert all(run.cpu_us > 0 for run in report.runs)


@pytest.mark.slow
def test_a_server_that_does_not_start_is_a_failure_with_its_log(tmp_path: Path) -> None:
    broken = Entrant(headrace("no-such-transport"))
    report = Report({}, {})
    run_scenario(plan(tmp_path, MLP, entrants=[broken]), report, "smoke")
    assert report.runs == []
    assert "no-such-transport" in report.failures[0]
