import json
import math
from dataclasses import fields
from typing import Any

import numpy as np

from loadtests.cancel_storm import Footprint
from loadtests.machine import Noise
from loadtests.scenario_report import Report, Run, Sample, judge_samples, render, rows_of
from loadtests.service_level import Results, Status

# What programs that read the JSON rely on.
RUN_FIELDS = (
    "scenario", "contestant", "model", "round", "offered_rate", "arrivals", "duration_s", "sent", "ok", "late", "refused", "failed",
    "wrong", "goodput", "p50", "p90", "p99", "p999", "mean", "lag_p50", "lag_p99", "valid", "slo", "cpu_us", "histogram",
)  # fmt: skip


def results(latencies: list[float], status: int = 0, lag: float = 0.0) -> Results:
    intended = np.arange(len(latencies), dtype=float)
    statuses = np.full(len(latencies), status, np.int16)
    return Results(intended, intended + lag, intended + np.array(latencies), statuses, np.full(len(latencies), math.inf), 10.0)


def run(made: Results | None = None, **changes: Any) -> Run:
    facts: dict[str, Any] = {"scenario": "rates", "contestant": "a", "model": "m", "round": 0, "offered_rate": 100.0}
    facts |= {"arrivals": "poisson", "slo": 0.05, "cpu_seconds": 0.01}
    return Run.of(made if made is not None else results([0.01] * 500), **(facts | changes))


def test_a_run_sums_up_its_results() -> None:
    made = run(results([0.01] * 400 + [0.06] * 100))
    assert (made.sent, made.ok, made.late, made.goodput) == (500, 400, 100, 40.0)
    assert [round(value or 0, 3) for value in (made.p50, made.p90, made.mean)] == [0.01, 0.06, 0.02]
    assert made.cpu_us == 20.0
    assert sum(made.histogram.counts) == 500
    assert made.valid
    assert not made.is_slo_shown


def test_p99_is_shown_by_enough_requests_and_none_too_late() -> None:
    assert run(results([0.01] * 459)).is_slo_shown
    assert not run(results([0.01] * 458)).is_slo_shown
    assert not run(results([0.01] * 459), slo=None).is_slo_shown


def report(*runs: Run) -> Report:
    made = Report({"cpu": "x"}, {"rounds": 1}, slos={"m": 0.05})
    made.runs += runs
    made.noise.append(Noise(0, 1.0, 1.0, 1.0, 0.0))
    return made


def test_json_has_the_fields_that_readers_rely_on_and_no_nan() -> None:
    nothing_answered = run(results([math.nan] * 3, Status.UNANSWERED))
    content = json.loads(report(run(), nothing_answered).as_json(), parse_constant=lambda text: text / 0)
    assert content["kind"] == "scenarios"
    assert {"facts", "settings", "noise", "runs", "failures"} <= content.keys()
    assert tuple(content["runs"][0]) == RUN_FIELDS == tuple(field.name for field in fields(Run))
    assert content["runs"][1]["p99"] is None
    assert content["settings"]["SLO of m (ms)"] == 50.0
    assert len(content["runs"][0]["histogram"]["edges_s"]) == len(content["runs"][0]["histogram"]["counts"]) + 1


def test_the_same_step_of_every_round_is_one_row() -> None:
    runs = [run(round=number, offered_rate=rate + number) for number in range(2) for rate in (100.0, 200.0)]
    assert [[each.offered_rate for each in row] for row in rows_of(runs).values()] == [[100.0, 101.0], [200.0, 201.0]]


def test_tables_show_medians_and_leave_out_probes() -> None:
    runs = [run(round=number, offered_rate=100.0 + number) for number in range(3)]
    text = render(report(*runs, run(scenario="capacity probe", contestant="b")))
    assert "| rates    | m     | a      | 101 (100-102) |" in text
    assert "3 of 3" in text
    assert "capacity probe" not in text


def test_a_client_that_was_late_is_said_to_have_been() -> None:
    assert "Not valid" in render(report(run(results([0.02] * 500, lag=0.02))))
    assert "Not valid" not in render(report(run()))


def test_wrong_and_failed_calls_are_failures_and_others_are_not() -> None:
    made = report()
    for status in (Status.OK, Status.RESOURCE_EXHAUSTED, Status.EXPIRED):
        made.check("so", results([0.01], status))
    assert made.failures == []
    made.check("this", results([0.01], Status.WRONG))
    made.check("that", results([0.01] * 2, 13))
    assert made.failures == ["this: 1 wrong, 0 failed of 1 (WRONG 1)", "that: 0 wrong, 2 failed of 2 (grpc-status 13 2)"]
    assert "FAILED this" in render(made)


def sample(at: float, memory: int, threads: int = 10, files: int = 20) -> Sample:
    return Sample("a", "m", 0, at, Footprint(threads, files, memory))


def test_a_soak_fails_when_something_grows_after_its_beginning() -> None:
    assert judge_samples([sample(1, 50), sample(2, 100), sample(3, 104)]) == []
    assert "1.060 times the memory" in judge_samples([sample(1, 50), sample(2, 100), sample(3, 106)])[0]
    assert "21 open files at the end" in judge_samples([sample(1, 50), sample(2, 100), sample(3, 100, files=21)])[0]
    assert "13 threads at the end" in judge_samples([sample(1, 50), sample(2, 100), sample(3, 100, threads=13)])[0]
