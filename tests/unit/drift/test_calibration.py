from __future__ import annotations

import numpy as np
import pytest
from headrace.drift.calibration import FEWEST, apply, fit, pool_adjacent_violators
from sklearn.isotonic import IsotonicRegression

RANDOM = np.random.default_rng(11)


def overconfident(rows: int, low: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, whether right): right less often than it says."""
    confidence = RANDOM.uniform(low, 1, rows)
    return confidence, RANDOM.random(rows) < confidence**2


def test_pooling_is_sklearns_isotonic_regression() -> None:
    values, weights = RANDOM.random(30), RANDOM.integers(1, 50, 30).astype(float)
    expected = IsotonicRegression().fit_transform(np.arange(30), values, sample_weight=weights)
    np.testing.assert_allclose(pool_adjacent_violators(values, weights), expected)


def test_estimated_accuracy_follows_a_shift_of_the_inputs() -> None:
    calibration = fit("scores", *overconfident(20_000))
    assert calibration is not None
    assert list(calibration.accuracy) == sorted(calibration.accuracy)
    confidence, is_right = overconfident(20_000, low=0.8)
    assert apply(calibration, confidence).mean() == pytest.approx(is_right.mean(), abs=0.02)
    assert abs(confidence.mean() - is_right.mean()) > 0.05  # which confidence as it is would have missed


def test_few_labelled_rows_make_no_map_and_no_certainty() -> None:
    assert fit("scores", *overconfident(FEWEST - 1)) is None
    calibration = fit("scores", RANDOM.uniform(0.9, 1, FEWEST), np.ones(FEWEST))
    assert calibration is not None
    assert all(0 < each < 1 for each in calibration.accuracy)
