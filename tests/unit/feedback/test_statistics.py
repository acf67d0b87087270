"""Against scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from headrace.feedback.statistics import BINS, MOST_CLASSES, OTHER, RECENT, ClassificationCounter, RegressionCounter, wilson
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, confusion_matrix, mean_absolute_error, mean_squared_error


@pytest.mark.parametrize(("correct", "rows"), [(0, 1), (1, 1), (7, 10), (0, 50), (50, 50), (980, 1000), (123, 4567)])
def test_the_interval_is_scipys(correct: int, rows: int) -> None:
    expected = binomtest(correct, rows).proportion_ci(method="wilson")
    assert wilson(correct, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_of_no_rows_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    empty = ClassificationCounter().snapshot()
    assert (empty.accuracy, empty.calibration_error, empty.interval, empty.recent_accuracy) == (0.0, -1.0, (0.0, 1.0), 0.0)
    assert (RegressionCounter().snapshot().mae, RegressionCounter().snapshot().rmse) == (0.0, 0.0)


def labelled(classes: int, rows: int = 3000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, confidence, true), the confidence too high."""
    random = np.random.default_rng(classes)
    confidence = random.uniform(1 / classes, 1.0, rows)
    true = random.integers(0, classes, rows)
    is_right = random.random(rows) < confidence**2
    return np.where(is_right, true, (true + random.integers(1, classes, rows)) % classes), confidence, true


def count(predicted: np.ndarray, confidence: np.ndarray, true: np.ndarray) -> ClassificationCounter:
    counter = ClassificationCounter()
    for start in range(0, len(true), 7):
        part = slice(start, start + 7)
        counter.add(predicted[part].tolist(), confidence[part].tolist(), true[part].tolist())
    return counter


@pytest.mark.parametrize("classes", [2, 10])
def test_accuracy_and_confusion_are_scikit_learns(classes: int) -> None:
    predicted, confidence, true = labelled(classes)
    found = count(predicted, confidence, true).snapshot()
    assert found.accuracy == pytest.approx(accuracy_score(true, predicted))
    matrix = confusion_matrix(true, predicted, labels=range(classes))
    assert {pair: rows for pair, rows in np.ndenumerate(matrix) if rows} == dict(found.confusion)
    latest = slice(len(true) - RECENT, None)
    assert found.recent_accuracy == pytest.approx(accuracy_score(true[latest], predicted[latest]))


def test_the_bins_of_the_calibration_are_scikit_learns_and_the_error_their_weighted_mean() -> None:
    predicted, confidence, true = labelled(10)
    found = count(predicted, confidence, true).snapshot()
    right, sure = calibration_curve(predicted == true, confidence, n_bins=BINS)
    assert [each.accuracy for each in found.bins] == pytest.approx(right.tolist())
    assert [each.confidence for each in found.bins] == pytest.approx(sure.tolist())
    weights = np.histogram(confidence, np.linspace(0, 1, BINS + 1))[0]
    assert found.calibration_error == pytest.approx(np.average(np.abs(right - sure), weights=weights[weights > 0]))
    assert found.calibration_error > 0.1


@pytest.mark.parametrize(("confidence", "bin_"), [(0.0, 0), (1 / BINS, 0), (1 / BINS + 1e-9, 1), (1.0, BINS - 1), (1.0000001, BINS - 1)])
def test_the_upper_bound_belongs_to_the_bin(confidence: float, bin_: int) -> None:
    (found,) = count(np.array([1]), np.array([confidence]), np.array([1])).snapshot().bins
    assert (found.lower, found.upper) == (bin_ / BINS, (bin_ + 1) / BINS)


def test_an_unknown_confidence_is_in_no_bin_and_still_counts_as_right_or_wrong() -> None:
    found = count(np.array([1, 2]), np.array([-1.0, -1.0]), np.array([1, 1])).snapshot()
    assert (found.rows, found.correct, found.bins, found.calibration_error) == (2, 1, (), -1.0)


def test_classes_beyond_the_cap_share_one_and_memory_is_bounded() -> None:
    random = np.random.default_rng(0)
    predicted, true = random.integers(0, 5000, (2, 20_000))
    found = count(predicted, np.full(20_000, 0.5), true).snapshot()
    assert sum(found.confusion.values()) == 20_000
    assert len(found.confusion) <= (MOST_CLASSES + 1) ** 2
    assert found.confusion[OTHER, OTHER] > 10_000
    assert found.correct == np.count_nonzero(predicted == true)


def test_errors_of_numbers_are_scikit_learns() -> None:
    random = np.random.default_rng(1)
    true = random.normal(size=2500)
    predicted = true + random.normal(0.5, 2.0, size=2500)
    counter = RegressionCounter()
    for start in range(0, 2500, 9):
        counter.add(predicted[start : start + 9].tolist(), true[start : start + 9].tolist())
    found = counter.snapshot()
    assert found.mae == pytest.approx(mean_absolute_error(true, predicted))
    assert found.rmse == pytest.approx(math.sqrt(mean_squared_error(true, predicted)))
    assert found.bias == pytest.approx((predicted - true).mean())
    assert found.recent_mae == pytest.approx(mean_absolute_error(true[-RECENT:], predicted[-RECENT:]))
