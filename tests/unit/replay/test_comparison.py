from __future__ import annotations

import json
import math

import numpy as np
import pytest
from captured_requests import captured, plain, tensor
from headrace.capture.records import Captured, CapturedTensor
from headrace.replay.comparison import Comparison, Limits, OutputComparison, ReplayReport, Tolerance, exceeded, to_table
from numpy.typing import NDArray

NAN, INF = math.nan, math.inf


def compare(old: NDArray, new: NDArray, tolerance: Tolerance = Tolerance()) -> ReplayReport:  # noqa: B008
    comparison = Comparison(tolerance)
    comparison.add(captured({"x": np.zeros((len(old), 1))}, {"y": old}), {"y": tensor("y", new)}, 0.001)
    return comparison.report()


def only(report: ReplayReport) -> OutputComparison:
    (output,) = report.outputs
    return output


def test_differences_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    old = random.normal(size=(500, 7)).astype(np.float32)
    new = (old + random.normal(scale=1e-3, size=old.shape)).astype(np.float32)
    tolerance = Tolerance(rtol=1e-3, atol=1e-3)
    found = only(compare(old, new, tolerance))
    a, b = old.astype(float), new.astype(float)
    assert found.max_absolute == pytest.approx(np.abs(a - b).max())
    assert found.mean_absolute == pytest.approx(np.abs(a - b).mean())
    assert found.mean_relative == pytest.approx((np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))).mean())
    assert found.outside == np.count_nonzero(~np.isclose(b, a, rtol=1e-3, atol=1e-3).all(axis=1)) > 0
    assert found.flips == np.count_nonzero(a.argmax(axis=1) != b.argmax(axis=1))
    assert (found.rows, found.judged) == (500, 500)


def test_sums_over_requests_are_those_of_all_rows_at_once() -> None:
    random = np.random.default_rng(1)
    old, new = random.normal(size=(2, 60, 3)).astype(np.float32)
    comparison, start = Comparison(Tolerance()), 0
    for rows in (1, 20, 39):
        part = slice(start, start + rows)
        comparison.add(captured({"x": np.zeros((rows, 1))}, {"y": old[part]}), {"y": tensor("y", new[part])}, 0.0)
        start += rows
    apart, together = only(comparison.report()), only(compare(old, new))
    for name in OutputComparison.__dataclass_fields__:
        assert getattr(apart, name) == pytest.approx(getattr(together, name)) if name != "name" else True


@pytest.mark.parametrize(
    ("old", "new", "outside", "absolute"),
    [
        ([1.0], [1.0 + 1e-6], 0, 1e-6), ([0.0], [0.0], 0, 0), ([NAN], [NAN], 0, 0), ([INF], [INF], 0, 0), ([INF], [-INF], 1, INF),
        ([NAN], [1.0], 1, INF), ([1.0], [NAN], 1, INF), ([1.0], [1.1], 1, 0.1), ([0.0], [1e-9], 0, 1e-9),
    ],
)  # fmt: skip
def test_what_is_within_the_tolerance(old: list[float], new: list[float], outside: int, absolute: float) -> None:
    found = only(compare(np.array([old], np.float32), np.array([new], np.float32)))
    assert found.outside == outside
    assert found.max_absolute == pytest.approx(absolute, rel=0.1)
    assert (found.judged, found.flips) == (0, 0)
    assert 0 <= found.max_relative <= 2


def test_for_machines_infinity_is_null() -> None:
    report = compare(np.array([[1.0]], np.float32), np.array([[INF]], np.float32))
    assert json.loads(json.dumps(to_table(report), allow_nan=False))["outputs"][0]["max_absolute"] is None


@pytest.mark.parametrize(
    ("old", "new", "flips"),
    [
        ([0.5, 0.4], [0.4, 0.5], 1), ([0.5, 0.4], [0.9, 0.1], 0), ([0.5, 0.5 - 1e-8], [0.5 - 1e-8, 0.5], 0), ([NAN, 0.5], [0.9, 0.5], 1),
        ([0.5, 0.4], [NAN, NAN], 0), ([0.4, 0.5], [NAN, NAN], 1), ([1, 2, 3], [1, 2, 3], 0),
    ],
)  # fmt: skip
def test_a_flip_is_another_class_first_and_no_tie(old: list[float], new: list[float], flips: int) -> None:
    assert only(compare(np.array([old], np.float32), np.array([new], np.float32))).flips == flips


def test_integers_and_strings_are_classes_where_a_row_is_one() -> None:
    found = only(compare(np.array([1, 2, 3]), np.array([1, 2, 4])))
    assert (found.rows, found.judged, found.flips, found.outside, found.max_absolute) == (3, 3, 1, 1, 1.0)
    found = only(compare(np.array([[b"a"], [b"b"]], object), np.array([[b"a"], [b"c"]], object)))
    assert (found.judged, found.flips, found.max_absolute) == (2, 1, -1.0)
    found = only(compare(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]])))
    assert (found.judged, found.flips, found.outside) == (0, 0, 1)


def test_bf16_is_compared_by_value() -> None:
    old, new = [CapturedTensor("y", "BF16", (1, 1), np.array([bits], np.uint16).tobytes()) for bits in (0x3F80, 0x4000)]  # 1 and 2
    comparison = Comparison(Tolerance())
    comparison.add(Captured("m", 1, "", 0.0, 1, True, (), (old,)), {"y": new}, 0.0)
    assert only(comparison.report()).max_absolute == 1.0


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({}, "no such output"),
        ({"y": tensor("y", np.zeros((2, 4)))}, r"expected shape [2,3], got [2,4]"),
        ({"y": tensor("y", np.full((2, 3), b"", object))}, "expected FP32, got BYTES"),
    ],
)
def test_what_cannot_be_compared_is_a_problem_and_fails_the_replay(answer: dict[str, CapturedTensor], text: str) -> None:
    comparison = Comparison(Tolerance())
    same = {"label": plain().outputs[1]}
    for _ in range(3):
        comparison.add(plain(), {**same, **answer}, 0.0)
    report = comparison.report()
    assert report.uncompared == 3
    assert [text in problem for problem in report.problems] == [True]
    assert exceeded(report, Limits()) == ["3 outputs could not be compared"]


def test_limits_are_what_a_pipeline_goes_by() -> None:
    report = compare(np.array([[0.5, 0.4]] * 4, np.float32), np.array([[0.5, 0.4]] * 3 + [[0.4, 0.5]], np.float32))
    assert exceeded(report, Limits()) == []
    assert exceeded(report, Limits(max_flips=0.25, max_outside=0.25)) == []
    (flips, outside) = exceeded(report, Limits(max_flips=0.2, max_outside=0.0))
    assert flips == "output 'y': 25.000% of the rows name another class, allowed 20.000%"
    assert "out of tolerance" in outside
    comparison = Comparison(Tolerance())
    comparison.fail("boom")
    comparison.leave_out()
    assert exceeded(comparison.report(), Limits()) == ["nothing was compared", "1 requests failed"]
    assert to_table(report)["outputs"][0]["flip_rate"] == 0.25
