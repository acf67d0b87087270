"""Answers of a version on trial beside the old one's: what rolls it back, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from headrace.config import RolloutConfig
from headrace.drift.counting import BatchCounter, Counts
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.reference import Calibration, FeatureReference, Reference
from headrace.drift.verdict import DriftReport
from headrace.lifecycle.answers import LEAST_ROWS, Answers, Judged, answers, estimates, judge_answers, table
from headrace.lifecycle.rollout import Decision, Evidence, judge

CONFIG = RolloutConfig(mode="canary", max_drift=0.2, max_accuracy_drop=0.02)
EVEN = (0.4, 0.3, 0.3)


def scores(name: str, kind: Kind, extract: Extract, **described: Any) -> FeatureReference:
    return FeatureReference(Feature(Side.OUTPUT, "p", name, kind, extract), **described)


REFERENCE = Reference(
    "m", "version 3", 1000,
    (
        scores("class", Kind.CATEGORICAL, Extract.CLASS, edges=(), categories=("0", "1", "2"), counts=(400, 300, 300, 0)),
        scores("confidence", Kind.NUMERIC, Extract.CONFIDENCE, edges=(0.6, 0.8, 0.9, 0.95), categories=(),
            counts=(20, 80, 300, 300, 300), minimum=0.4, maximum=1.0, mean=0.9, deviation=0.1),
    ),
)  # fmt: skip


def answered(random: np.random.Generator, rows: int, *, shares: tuple[float, ...] = EVEN, sure: float = 0.95) -> Counts:
    """Rows of three classes in such shares, with a confidence of `sure` or a little less."""
    best = random.choice(3, rows, p=shares)
    confidence = np.clip(random.normal(sure - 0.03, 0.03, rows), 0.4, 1.0)
    chances = np.repeat(((1 - confidence) / 2)[:, None], 3, axis=1)
    chances[np.arange(rows), best] = confidence
    return BatchCounter(REFERENCE).count({}, {"p": chances}, rows)


def judged(candidate: Counts, baseline: Counts, *, is_over: bool = False, config: RolloutConfig = CONFIG) -> Judged:
    return judge_answers(config, Answers(4, REFERENCE, candidate), Answers(3, REFERENCE, baseline), is_over)


def test_versions_that_answer_alike_are_seldom_told_apart_however_often_one_looks() -> None:
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(100):
        candidate, baseline = Counts.zero(REFERENCE), Counts.zero(REFERENCE)
        faults: list[str] = []
        for look in range(20):
            candidate.add(answered(random, 50))
            baseline.add(answered(random, 450))
            faults += judged(candidate, baseline, is_over=look == 19).faults
        wrong += bool(faults)
    assert wrong == 0


def test_other_classes_are_found_at_once_and_the_reason_has_the_numbers() -> None:
    random = np.random.default_rng(3)
    found = judged(answered(random, 300, shares=(0.0, 0.1, 0.9)), answered(random, 2000))
    assert len(found.faults) == 1
    assert found.faults[0].startswith("output p.class is unlike version 3's in the same time: PSI ")
    assert found.faults[0].endswith(" over 300 rows; at most 0.2")


def test_a_drop_of_estimated_accuracy_rolls_back_with_its_points() -> None:
    random = np.random.default_rng(4)
    config = replace(CONFIG, max_drift=0.0)
    found = judged(answered(random, 2000, sure=0.8), answered(random, 4000, sure=0.99), config=config)
    assert found.faults == ["estimated accuracy 77.0 % over 2,000 rows, 18.9 points below version 3; at most 2"]
    # Of a drop within the allowance nothing is said.
    assert judged(answered(random, 20_000, sure=0.94), answered(random, 20_000), is_over=True, config=config).faults == []


def test_at_the_end_likely_is_enough_and_before_it_is_not() -> None:
    random = np.random.default_rng(5)
    config = replace(CONFIG, max_drift=0.0)
    candidate, baseline = answered(random, 400, sure=0.84), answered(random, 4000, sure=0.92)
    assert judged(candidate, baseline, config=config).faults == []
    assert len(judged(candidate, baseline, is_over=True, config=config).faults) == 1


def test_too_few_rows_are_not_judged_and_that_is_said() -> None:
    random = np.random.default_rng(6)
    found = judged(answered(random, LEAST_ROWS - 1, shares=(0, 0, 1)), answered(random, 2000), is_over=True)
    assert found == Judged([], ["answers not judged: 199 rows counted for drift, 200 are needed"])
    verdict = judge(CONFIG, Evidence(answered=1000), Evidence(answered=9000), CONFIG.probation, found.faults, found.unknown)
    assert verdict.decision is Decision.PASSED
    assert verdict.reason.endswith("answers not judged: 199 rows counted for drift, 200 are needed")


def test_what_a_version_learnt_itself_says_nothing_against_it_and_what_was_published_does() -> None:
    random = np.random.default_rng(7)
    strange, other = answered(random, 1000, shares=(0, 0, 1)), replace(REFERENCE, features=REFERENCE.features[1:])
    baseline = Answers(3, other, Counts.zero(other))
    learnt = judge_answers(CONFIG, Answers(4, replace(REFERENCE, source="learnt"), strange), baseline, True)
    assert learnt.faults == []
    assert any(each.startswith("output drift not judged: version 4 has learnt its reference") for each in learnt.unknown)
    published = judge_answers(CONFIG, Answers(4, replace(REFERENCE, source="profile"), strange), baseline, True)
    assert published.faults[0].startswith("output p.class is unlike its reference (profile): PSI ")


def test_inputs_that_change_for_both_are_no_fault_of_the_new_version() -> None:
    random = np.random.default_rng(8)
    shares = (0.05, 0.05, 0.9)  # nothing like the reference, and the same for both
    assert judged(answered(random, 2000, shares=shares), answered(random, 9000, shares=shares), is_over=True).faults == []


def test_only_like_is_compared_with_like() -> None:
    """A calibration that one version has and the other has not would make a difference that is none of their answers."""
    random = np.random.default_rng(9)
    calibrated = replace(REFERENCE, calibration=Calibration("p", (0.5,), (0.2, 0.6), 1000))
    counts = answered(random, 3000)
    found = estimates(Answers(4, REFERENCE, counts), Answers(3, calibrated, counts))
    assert found is not None
    assert found[0] == found[1]


def test_only_what_was_counted_since_the_trial_began_counts() -> None:
    random = np.random.default_rng(10)
    before = answered(random, 5000, shares=(0, 0, 1))
    now = before.copy()
    more = answered(random, 300)
    now.add(more)
    reports = [DriftReport("m", 4, REFERENCE, totals=totals) for totals in (now, before)]
    found = answers(4, *reports)
    assert found.rows == 300
    assert found.counts is not None
    np.testing.assert_array_equal(found.counts.bins, more.bins)
    assert answers(4, reports[0], None).rows == 5300
    assert answers(4, None, None).rows == 0


@pytest.mark.parametrize("config", [RolloutConfig(), RolloutConfig(mode="canary", max_error_rate=0.5)])
def test_off_by_default(config: RolloutConfig) -> None:
    random = np.random.default_rng(11)
    assert judged(answered(random, 1000, shares=(0, 0, 1)), answered(random, 1000), is_over=True, config=config) == Judged([], [])


def test_the_table_says_what_is_known_and_what_is_not() -> None:
    random = np.random.default_rng(12)
    many, few = [Answers(version, REFERENCE, answered(random, rows)) for version, rows in ((4, 1000), (3, 100))]
    assert table(many, many)[:2] == (("rows counted for drift", "1,000", "1,000"), ("estimated accuracy", "92.0 %", "92.0 %"))
    assert table(few, many) == (
        ("rows counted for drift", "100", "1,000"),
        ("estimated accuracy", "not known", "not known"),
        ("output drift, PSI", "not known", ""),
    )
