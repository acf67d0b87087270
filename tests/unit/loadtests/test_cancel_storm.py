from collections import Counter

import pytest

from loadtests.cancel_storm import Footprint, Manner, Probe, StormReport, Tally, growth, pending_requests

METRICS = """\
# HELP headrace_pending_rows Rows that wait in the queue.
# TYPE headrace_pending_rows gauge
headrace_pending_rows{model="a",version="1"} 3.0
headrace_pending_rows{model="b",version="1"} 4.0
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="a",version="1"} 0.0
# TYPE headrace_memory_bytes gauge
headrace_memory_bytes{model="a"} 9.0
"""


def test_pending_is_summed_over_models() -> None:
    assert pending_requests(METRICS) == {"headrace_pending_rows": 7.0, "nv_inference_pending_request_count": 0.0}


def test_metrics_without_a_pending_gauge_are_an_error() -> None:
    with pytest.raises(ValueError, match="no gauge named headrace_pending"):
        pending_requests("# TYPE up gauge\nup 1\n")


def test_growth_leaves_out_the_start() -> None:
    # 100 MB are taken at once and kept; after that nothing grows.
    assert growth([(float(at), 1.0 if at < 2 else 101.0) for at in range(20)]) == 0.0
    assert growth([(float(at), float(at)) for at in range(20)]) == 12.0
    assert growth([(0.0, 1.0)]) == 0.0


def test_only_what_was_asked_for_is_a_good_end() -> None:
    good = [(Manner.WAIT, "OK"), (Manner.CANCEL, "CANCELLED"), (Manner.CANCEL, "OK"), (Manner.DEADLINE, "DEADLINE_EXCEEDED")]
    assert Tally(Counter(dict.fromkeys(good, 5))).failures("m") == []


@pytest.mark.parametrize(
    ("manner", "status"),
    [
        (Manner.WAIT, "CANCELLED"),
        (Manner.WAIT, "DEADLINE_EXCEEDED"),
        (Manner.WAIT, "WRONG"),
        (Manner.WAIT, "HUNG"),
        (Manner.CANCEL, "INTERNAL"),
        (Manner.DEADLINE, "CANCELLED"),
    ],
)
def test_any_other_end_is_a_failure(manner: Manner, status: str) -> None:
    assert Tally(Counter({(manner, status): 2})).failures("m") == [f"m: 2 calls made to {manner} ended {status}"]


def storm_report() -> StormReport:
    probe, footprint = Probe(0.001, 0.002, 1000.0, 0.01), Footprint(10, 20, 100)
    tallies = {"m": Tally(Counter({(Manner.WAIT, "OK"): 1}))}
    samples = [(float(at), 100e6) for at in range(20)]
    pending = {"headrace_pending_rows": 0.0}
    return StormReport(1, {"m": probe}, {"m": probe}, tallies, footprint, footprint, samples, pending, [])


def test_a_server_that_is_as_before_passes() -> None:
    report = storm_report()
    report.judge(slower=1.25, max_growth=4e6)
    assert report.failures == []
    assert "pending_rows 0" in report.render()


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({"after": {"m": Probe(0.002, 0.002, 1000.0, 0.01)}}, "alone 2.00 ms afterwards"),
        ({"after": {"m": Probe(0.001, 0.002, 500.0, 0.01)}}, "500 answers/s to all afterwards"),
        ({"footprint_after": Footprint(10, 21, 100)}, "open files: 21, before 20"),
        ({"footprint_after": Footprint(13, 20, 100)}, "threads: 13, before 10"),
        ({"samples": [(float(at), at * 1e6) for at in range(20)]}, "memory grew by 12.0 MB"),
        ({"pending": {"headrace_pending_rows": 2.0}}, "2 left in headrace_pending_rows"),
        ({"tallies": {"m": Tally(Counter({(Manner.WAIT, "WRONG"): 1}))}}, "ended WRONG"),
    ],
)
def test_whatever_became_worse_is_told(change: dict[str, object], failure: str) -> None:
    report = storm_report()
    for name, value in change.items():
        setattr(report, name, value)
    report.judge(slower=1.25, max_growth=4e6)
    assert len(report.failures) == 1
    assert failure in report.failures[0]
