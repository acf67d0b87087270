"""Each statistic beside scipy, and the levels of those that decide."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.drift import statistics
from headrace.drift.distributions import binomial_sf, chi2_isf, chi2_sf, normal_isf
from headrace.drift.sequential import log_gamma
from scipy import spatial, stats
from scipy.special import gammaln

RANDOM = np.random.default_rng(5)
LIVE = np.array([30, 45, 25, 60, 40])
REFERENCE = np.array([400, 350, 250, 600, 400])


@pytest.mark.parametrize("df", [1, 2, 9, 40, 300])
def test_chi_square_tails_are_scipys(df: int) -> None:
    for x in (1e-3, 0.5, df * 0.5, df, df * 2.0, df * 5.0 + 30):
        assert chi2_sf(x, df) == pytest.approx(stats.chi2.sf(x, df), rel=1e-9, abs=1e-300)
    for probability in (0.5, 1e-2, 1e-5, 1e-9):
        assert chi2_isf(probability, df) == pytest.approx(stats.chi2.isf(probability, df), rel=1e-8)


def test_binomial_and_normal_tails_are_scipys() -> None:
    for at_least, trials, chance in [(1, 10, 0.1), (3, 5, 0.5), (40, 100, 0.2), (15, 100, 0.2), (0, 5, 0.5), (9, 8, 0.5), (300, 2000, 0.1)]:
        assert binomial_sf(at_least, trials, chance) == pytest.approx(stats.binom.sf(at_least - 1, trials, chance), rel=1e-8, abs=1e-300)
    for probability in (0.5, 0.025, 1e-6):
        assert normal_isf(probability) == pytest.approx(stats.norm.isf(probability), abs=1e-9)


def test_log_gamma_is_scipys() -> None:
    x = np.logspace(-4, 7, 500)
    np.testing.assert_allclose(log_gamma(x), gammaln(x), rtol=1e-10, atol=1e-10)


def test_chi_square_is_scipys_for_a_table_of_two_rows() -> None:
    statistic, df = statistics.chi_square(LIVE, REFERENCE)
    expected = stats.chi2_contingency(np.array([LIVE, REFERENCE]), correction=False)
    assert float(statistic) == pytest.approx(expected.statistic)
    assert int(df) == expected.dof
    assert float(statistics.compare(LIVE, REFERENCE)[0]) == pytest.approx(expected.statistic)
    # Of many rows both terms of a cell are nearly the same.
    assert float(statistics.compare(LIVE * 100, REFERENCE * 100)[2]) == pytest.approx(
        stats.chi2_contingency(np.array([LIVE, REFERENCE]) * 100, correction=False).pvalue, rel=0.3
    )


def test_psi_and_js_are_what_scipy_makes_of_the_same_fractions() -> None:
    p, q = statistics.fractions(LIVE, REFERENCE)
    assert float(statistics.psi(LIVE, REFERENCE)) == pytest.approx(stats.entropy(p, q) + stats.entropy(q, p))
    assert float(statistics.js(LIVE, REFERENCE)) == pytest.approx(spatial.distance.jensenshannon(p, q, base=2))


def test_ks_is_at_most_that_of_the_values_and_close_to_it() -> None:
    live, reference = RANDOM.normal(0.4, 1, 3000), RANDOM.normal(0, 1, 5000)
    edges = np.quantile(reference, np.linspace(0, 1, 21)[1:-1])
    counts = [np.bincount(np.searchsorted(edges, x), minlength=20) for x in (live, reference)]
    binned, true = float(statistics.ks(*counts)), stats.ks_2samp(live, reference).statistic
    assert true - 0.05 <= binned <= true + 1e-12


def test_wasserstein_is_close_to_that_of_the_values() -> None:
    live, reference = RANDOM.uniform(0.2, 0.9, 20000), RANDOM.uniform(0, 1, 20000)
    edges = np.linspace(0, 1, 21)[1:-1]
    counts = [np.bincount(np.searchsorted(edges, x), minlength=20) for x in (live, reference)]
    weights = statistics.wasserstein_weights(edges.tolist(), 0.0, 1.0, 1.0)
    found = float((statistics.cdf_distances(*counts) * weights).sum())
    assert found == pytest.approx(stats.wasserstein_distance(live, reference), rel=0.03)


def test_padded_histograms_count_as_their_own_bins_alone() -> None:
    live, reference = np.zeros((1, 8), int), np.zeros((1, 8), int)
    live[0, :5], reference[0, :5] = LIVE, REFERENCE
    real = np.arange(8)[None] < 5
    assert float(statistics.psi(live, reference, real)[0]) == pytest.approx(float(statistics.psi(LIVE, REFERENCE)))
    assert float(statistics.js(live, reference, real)[0]) == pytest.approx(float(statistics.js(LIVE, REFERENCE)))


def test_benjamini_hochberg_is_scipys() -> None:
    p_values = np.array([0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205])  # Benjamini and Hochberg's kind of example
    for alpha in (0.01, 0.05, 0.08, 0.5):
        assert list(statistics.benjamini_hochberg(p_values, alpha)) == list(stats.false_discovery_control(p_values) <= alpha)


@pytest.mark.parametrize(("rows", "shares"), [(50, None), (500, None), (200, (0.9, 0.07, 0.02, 0.005, 0.003, 0.002))])
def test_p_values_are_seldom_small_without_drift(rows: int, shares: tuple[float, ...] | None) -> None:
    """Also with sparse bins: below 0.01 in at most 1.5 % of 4,000 windows, where 1 % is meant and 0.16 % is its standard error."""
    p = np.array(shares) if shares else np.full(10, 0.1)
    live = RANDOM.multinomial(rows, p, 4000)
    reference = RANDOM.multinomial(2000, p, 4000)
    _, _, p_values = statistics.compare(live, reference)
    assert np.mean(p_values < 0.01) < 0.015


@pytest.mark.parametrize(("rows", "shares"), [(100, (0.95, 0.05)), (100, (0.6, 0.3, 0.06, 0.03, 0.009, 0.001)), (50, (0.1,) * 10)])
def test_p_values_far_out_come_at_most_as_often_as_they_say(rows: int, shares: tuple[float, ...]) -> None:
    random = np.random.default_rng(7)
    live, reference = random.multinomial(rows, shares, 40_000), random.multinomial(2000, shares, 40_000)
    p_values = statistics.compare(live, reference)[2]
    assert np.mean(p_values < 0.001) < 0.001


@pytest.mark.parametrize(("rows", "reference_rows"), [(100, 500), (5000, 2000), (50_000, 2000)])
def test_categories_that_the_reference_chose_are_not_drift(rows: int, reference_rows: int) -> None:
    random = np.random.default_rng(11)
    shares = 1 / np.arange(1, 201)
    live, reference = random.multinomial(rows, shares / shares.sum(), 3000), random.multinomial(reference_rows, shares / shares.sum(), 3000)
    order = np.argsort(-reference, axis=1)
    live, reference = [np.take_along_axis(each, order, axis=1) for each in (live, reference)]
    live, reference = [np.column_stack([each[:, :50], each[:, 50:].sum(axis=1)]) for each in (live, reference)]
    p_values = statistics.compare(live, reference, np.arange(51) == 50)[2]
    assert np.mean(p_values < 0.01) < 0.02


def test_an_unseen_category_is_significant() -> None:
    live, reference = np.array([50, 45, 5]), np.array([1000, 1000, 0])
    assert float(statistics.compare(live, reference)[2]) < 1e-4
    assert float(statistics.compare(np.array([50, 50, 0]), reference)[2]) > 0.5


def test_psi_critical_is_exceeded_as_often_as_it_says() -> None:
    p = np.full(10, 0.1)
    live, reference = RANDOM.multinomial(300, p, 4000), RANDOM.multinomial(1000, p, 4000)
    exceeded = np.mean(statistics.psi(live, reference) > statistics.psi_critical(10, 300, 1000, 0.05))
    assert 0.03 < exceeded < 0.07
