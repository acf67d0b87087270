from __future__ import annotations

import numpy as np
import pytest
from headrace.config import ModelConfig, TensorConfig
from headrace.drift import building
from headrace.drift.building import ReferenceBuilder, cut, from_counts
from headrace.drift.counting import BatchCounter, Layout
from headrace.drift.plan import choose
from headrace.signature import DataType, Signature, TensorSpec

INPUT = TensorSpec("x", DataType.FP32, (-1, 2))
SCORES = TensorSpec("scores", DataType.FP32, (-1, 3))


def builder(**settings: str) -> ReferenceBuilder:
    signature = Signature("m", (INPUT,), (SCORES,), max_batch_size=8)
    return ReferenceBuilder("m", choose(signature, ModelConfig("m", outputs=(TensorConfig("scores", **settings),))), bins=10)  # type: ignore[arg-type]


def sure_of(random: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of which the largest is 0.9, and true classes that are it in 7 of 10 rows."""
    guess = random.integers(0, 3, rows)
    scores = np.full((rows, 3), 0.05, np.float32)
    scores[np.arange(rows), guess] = 0.9
    return scores, np.where(random.random(rows) < 0.7, guess, (guess + 1) % 3)


def test_labels_tell_how_often_a_confidence_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MOST_ROWS", 1000)  # so that calibration is of a sample
    random, made = np.random.default_rng(1), builder()
    for _ in range(10):
        scores, truth = sure_of(random, 500)
        made.add({"x": random.normal(size=(500, 2)).astype(np.float32)}, {"scores": scores}, 500, truth)
    reference = made.build("profile")
    assert reference.accuracy == pytest.approx(0.7, abs=0.02)
    assert reference.calibration is not None
    assert reference.calibration.rows == 1000
    assert reference.calibration.accuracy[-1] == pytest.approx(0.7, abs=0.05)
    assert reference.rows == 1000


def test_without_labels_nothing_is_said_of_accuracy() -> None:
    random, made = np.random.default_rng(1), builder()
    made.add({"x": random.normal(size=(500, 2)).astype(np.float32)}, {"scores": sure_of(random, 500)[0]}, 500)
    reference = made.build("profile")
    assert (reference.accuracy, reference.calibration) == (-1.0, None)
    assert [each.feature.title for each in reference.features][-4:] == [
        "scores.class",
        "scores.confidence",
        "scores.entropy",
        "scores.margin",
    ]


def test_of_more_rows_than_are_kept_the_sample_is_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MOST_ROWS", 2000)
    made = builder(monitor="off")
    for start in range(0, 100_000, 5000):
        made.add({"x": np.stack([np.arange(start, start + 5000)] * 2, axis=1).astype(np.float32)}, {}, 5000)
    edges = made.build("profile").features[0].edges
    assert edges == pytest.approx(np.linspace(0, 100_000, 11)[1:-1], abs=4000)  # four standard errors of a quantile of 2,000


def test_ranges_have_as_many_rows_each_and_a_heavy_value_has_its_own() -> None:
    values = np.concatenate([np.zeros(5000), np.random.default_rng(0).uniform(1, 2, 5000)])
    edges = cut(values, 10, np.dtype(np.float32))
    counts = np.bincount(np.searchsorted(edges, values, side="left"))
    assert counts[0] == 5000
    assert counts[1:].max() - counts[1:].min() < 600


def test_ids_beyond_what_floats_tell_apart_are_numbers_and_do_not_drift() -> None:
    signature = Signature("m", (TensorSpec("id", DataType.INT64, (-1,)),), (), max_batch_size=8)
    made = ReferenceBuilder("m", choose(signature, ModelConfig("m")), bins=10)
    ids = {"id": 2**60 + 1 + np.random.default_rng(0).integers(0, 10, 2000) * 2**50}
    made.add(ids, {}, 2000)
    reference = made.build("learnt")
    assert reference.features[0].is_numeric
    counts = BatchCounter(reference).count(ids, {}, 2000)
    assert Layout(reference).bins(counts, 0).tolist() == list(reference.features[0].counts)


def test_a_deviation_far_from_0_is_not_lost_in_sums() -> None:
    signature = Signature("m", (TensorSpec("at", DataType.FP64, (-1,)),), (), max_batch_size=8)
    made = ReferenceBuilder("m", choose(signature, ModelConfig("m")), bins=10)
    times = {"at": 1.7e9 + np.random.default_rng(0).normal(0, 10, 2000)}
    made.add(times, {}, 2000)
    reference = made.build("learnt")
    after = from_counts(reference, BatchCounter(reference).count(times, {}, 2000), "version 1")
    assert after.features[0].deviation == pytest.approx(10, rel=0.1)
