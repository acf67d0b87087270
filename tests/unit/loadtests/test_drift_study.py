"""The drift study: that its shortcut counts what the server counts, and that it sees drift where there is some."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from headrace.drift.counting import BatchCounter
from headrace.drift.judgement import Histograms

from loadtests.drift_population import PoolCounter, build_reference, index_of, make_population
from loadtests.drift_report import as_json, from_json, tables
from loadtests.drift_study import QUICK, gather, main, tasks_of
from loadtests.drift_trials import SCENARIOS, SHIPPED, Chain, FalseAlarms, find_power, follow_ramp, shift_mean, usual_psi

POPULATION = make_population(1, 2000)


@pytest.mark.parametrize("n", [50, 3000])
def test_windows_drawn_as_numbers_are_counted_as_the_same_rows_written_out(n: int) -> None:
    random = np.random.default_rng(2)
    reference = build_reference(POPULATION, 500, SHIPPED, random)
    counter = PoolCounter(reference, POPULATION)
    times = POPULATION.draw(2, n, random)
    for window, counts in zip(times, counter.counts(times, counter.bins(times)), strict=True):
        inputs, outputs = POPULATION.take(window)
        expected = BatchCounter(reference).count(inputs, outputs, n)
        np.testing.assert_array_equal(counts.bins, expected.bins)
        assert (counts.rows, counts.judged) == (expected.rows, expected.judged)
        assert counts.correct == pytest.approx(expected.correct)
        assert counts.correct_variance == pytest.approx(expected.correct_variance)


def test_the_truth_has_as_many_features_as_digits_and_all_kinds() -> None:
    reference = build_reference(POPULATION, 500, SHIPPED, np.random.default_rng(3))
    assert len(reference.features) == 37
    assert sum(not each.is_numeric for each in reference.features) == 4
    assert reference.features[index_of(reference, "x.sometimes_missing")].missing > 0


def test_usual_psi_is_the_formula_with_empty_bins_as_a_ten_thousandth() -> None:
    real = np.array([True, True, True])
    found = usual_psi(np.array([50, 50, 0]), np.array([100, 50, 50]), real)
    expected = 0 + 0.25 * math.log(2) + (1e-4 - 0.25) * math.log(1e-4 / 0.25)
    assert float(found) == pytest.approx(expected)


def test_what_has_shifted_is_told_of_and_what_has_not_is_not() -> None:
    random = np.random.default_rng(4)
    reference = build_reference(POPULATION, 2000, SHIPPED, random)
    chain = Chain(reference, Histograms(reference), SHIPPED, 1000)
    for population, expected in ((POPULATION, set()), (shift_mean(POPULATION, 1.0), {"x.normal0"})):
        counter = PoolCounter(reference, population)
        times = population.draw(1, 1000, random)
        news = chain.add(counter.counts(times, counter.bins(times))[0]).news
        assert {alert.feature for alert in news} == expected


def test_more_rows_find_a_smaller_shift_and_a_fixed_threshold_is_noise_with_few() -> None:
    few, many = [find_power(POPULATION, SCENARIOS[0], 2000, n, lives=2, windows=5, steps=5, seed=5).smallest for n in (50, 2000)]
    assert many["bare"] < few["bare"]
    assert few["0.1"] == 0.0


def test_a_fast_ramp_is_found_sooner_than_a_slow_one() -> None:
    delays = [min(follow_ramp(POPULATION, 2000, 500, speed, 60, SHIPPED, 6).values()) for speed in (0.2, 0.02)]
    assert delays[0] < delays[1] < math.inf


def test_the_quick_study_writes_numbers_and_pictures_that_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--processes", "1", "--out", str(tmp_path)]) == 0
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    printed = capsys.readouterr().out
    study = from_json(json.loads(written["study.json"]))
    assert as_json(study) == written["study.json"]
    assert sum(name.endswith(".svg") for name in written) == 1 + len(SCENARIOS) + 2
    assert all(text.startswith("<svg") for name, text in written.items() if name.endswith(".svg"))
    assert main(["--draw", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == printed
    assert [each.windows for each in study.alarms] == [QUICK.lives * QUICK.windows] * len(QUICK.sizes)
    assert all(table in printed for table in tables(study))


def test_lives_are_added_up_by_reference_and_window() -> None:
    parts = [FalseAlarms(500, 50, lives=1, windows=10, features=37, fixed=[2, 1], fixed_features=[3, 1]) for _ in range(2)]
    study = gather([(("alarms", 500), [each]) for each in parts])
    assert asdict(study.alarms[0]) == asdict(
        FalseAlarms(500, 50, lives=2, windows=20, features=37, fixed=[4, 2], fixed_features=[6, 2])
    )  # fmt: skip
    assert len(tasks_of(QUICK)) == QUICK.long_lives + 2 * QUICK.ramp_lives + len(SCENARIOS) * len(QUICK.sizes) + QUICK.lives


def test_what_is_no_study_is_refused() -> None:
    with pytest.raises(ValueError, match="not the JSON of a drift study: KeyError"):
        from_json({"alarms": []})
