"""How far two histograms over the same bins are apart. Pure numpy.

`live` and `reference` are counts [..., bins] of n and m rows, so that all features of a window are one call. Histograms with fewer bins
are padded: `real` says which bins there are, all where it is left out. PSI and Jensen-Shannon need fractions that are not 0: `fractions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.drift.distributions import binomial_sf, chi2_isf, chi2_sf

Array = NDArray[Any]

PRIOR = 5.0
"""Rows of the reference that are mixed into the live ones. An empty bin is then no proof: at 50 rows one adds 0.2 to PSI and not 0.7,
as with the usual 0.0001."""
LEAST = 0.5
"""Rows that a reference's empty bin is taken to have."""
FEW = 5.0
"""Expected rows below which a bin is counted together with others like it (Cochran 1954)."""


def reference_fractions(reference: Array, real: Array | None = None) -> Array:
    """max(count, LEAST) / m for each bin that is real, 0 for the others."""
    total = np.maximum(reference.sum(axis=-1, keepdims=True), LEAST)
    q = np.maximum(reference, LEAST) / total
    return np.asarray(q if real is None else np.where(real, q, 0.0))


def fractions(live: Array, reference: Array, real: Array | None = None) -> tuple[Array, Array]:
    """(p, q): q as reference_fractions, p = (count + PRIOR q) / (n + PRIOR). Rules in Prometheus can do the same."""
    q = reference_fractions(reference, real)
    return (live + PRIOR * q) / (live.sum(axis=-1, keepdims=True) + PRIOR), q


def psi(live: Array, reference: Array, real: Array | None = None) -> Array:
    """Population stability index, sum of (p - q) ln(p / q): Jeffreys' divergence (Jeffreys 1946; Siddiqi, Credit Risk Scorecards, 2006)."""
    p, q = fractions(live, reference, real)
    return np.asarray(((p - q) * (_log(p) - _log(q))).sum(axis=-1))


def _log(values: Array) -> Array:
    """ln; 0 of 0, which is in sums multiplied by 0."""
    return np.asarray(np.log(np.where(values > 0, values, 1.0)))


def psi_critical(bins: int, n: int, m: int, alpha: float) -> float:
    """What PSI exceeds with probability `alpha` without drift: chi2(bins - 1) (1/n + 1/m), since both samples are noisy (Yurdakul 2018)."""
    return chi2_isf(alpha, bins - 1) * (1 / n + 1 / m) if n and m and bins > 1 else math.inf


def js(live: Array, reference: Array, real: Array | None = None) -> Array:
    """Jensen-Shannon distance: the root of the divergence in bits, from 0 to 1 (Lin 1991; Endres and Schindelin 2003)."""
    p, q = fractions(live, reference, real)
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    middle = _log((p + q) / 2)
    divergence = ((p * (_log(p) - middle) + q * (_log(q) - middle)) / 2).sum(axis=-1) / math.log(2)
    return np.asarray(np.sqrt(np.maximum(divergence, 0.0)))


def js_critical(psi_critical: float) -> float:
    """Near 0 the divergence in nats is an eighth of PSI: both are sums of d^2 / q, by their second-order terms."""
    return math.sqrt(psi_critical / 8 / math.log(2)) if math.isfinite(psi_critical) else math.inf


def cdf_distances(live: Array, reference: Array) -> Array:
    """|F - G| at each bin's upper edge; 0 where either has no rows."""
    n, m = live.sum(axis=-1, keepdims=True), reference.sum(axis=-1, keepdims=True)
    distances = np.abs(np.cumsum(live, axis=-1) / np.maximum(n, 1) - np.cumsum(reference, axis=-1) / np.maximum(m, 1))
    return np.where((n > 0) & (m > 0), distances, 0.0)


def ks(live: Array, reference: Array) -> Array:
    """Kolmogorov-Smirnov's largest difference of the distribution functions, at the bins' edges: of the values themselves it is at most the
    largest bin's fraction more."""
    return np.asarray(cdf_distances(live, reference).max(axis=-1))


def ks_critical(n: int, m: int, alpha: float) -> float:
    """sqrt(-ln(alpha / 2) / 2 (1/n + 1/m)) (Smirnov 1939); binned values exceed it more seldom."""
    return math.sqrt(-math.log(alpha / 2) / 2 * (1 / n + 1 / m)) if n and m else math.inf


def wasserstein_weights(edges: Sequence[float], minimum: float, maximum: float, deviation: float) -> Array:
    """[edges + 1]: with these weights the distances of the distribution functions at the edges add up to Wasserstein-1 in standard
    deviations: the area between the functions, which are taken to be straight between the edges, from `minimum` to `maximum`
    (Vallender 1974)."""
    weights = np.zeros(len(edges) + 1)
    inner = [index for index, edge in enumerate(edges) if minimum < edge < maximum]
    places = [minimum, *[edges[index] for index in inner], maximum]
    for position, index in enumerate(inner, start=1):
        weights[index] = (places[position + 1] - places[position - 1]) / 2
    return weights / deviation if deviation > 0 else weights * 0.0


def chi_square(live: Array, reference: Array) -> tuple[Array, Array]:
    """Pearson's statistic for two samples (Press et al., Numerical Recipes, 14.3), and its degrees of freedom: sum of
    (sqrt(m/n) x - sqrt(n/m) y)^2 / (x + y) over the bins that are not empty."""
    n, m = live.sum(axis=-1, keepdims=True), reference.sum(axis=-1, keepdims=True)
    total = live + reference
    ratio = np.sqrt(np.maximum(m, 1) / np.maximum(n, 1))
    terms = (ratio * live - reference / ratio) ** 2 / np.maximum(total, 1)
    df = np.maximum((total > 0).sum(axis=-1) - 1, 0)
    is_known = (n[..., 0] > 0) & (m[..., 0] > 0) & (df > 0)
    return np.where(is_known, terms.sum(axis=-1), 0.0), np.where(is_known, df, 0)


def moderate_chi_square(live: Array, reference: Array) -> Array:
    """For p-values far out: of each cell of Pearson's statistic the smaller of its term and of the likelihood ratio's,
    2 (o ln(o / e) - o + e).

    Both are chi-square by their second-order terms. But where few rows are expected, Pearson's terms exceed what chance allows by far:
    17 rows where 5 are expected are as seldom as 4.2 standard errors, whose square is 17.5; Pearson's is 28.8 and the ratio's 17.6.
    Below the expectation it is the ratio's that is too large. With 2 to 6 bins and 100 rows Pearson's p-values of 0.0001 came 3 to 8
    times too often; these come at most as often as they say.
    """
    n, m = live.sum(axis=-1, keepdims=True), reference.sum(axis=-1, keepdims=True)
    statistic = np.zeros(live.shape[:-1])
    for observed, size in ((live, n), (reference, m)):
        expected = (live + reference) * (size / np.maximum(n + m, 1))
        some = np.where(expected > 0, expected, 1.0)
        pearson = np.where(expected > 0, (observed - expected) ** 2 / some, 0.0)
        ratio = 2 * (observed * _log(observed / some) - observed + expected)
        statistic += np.minimum(pearson, np.maximum(ratio, 0.0)).sum(axis=-1)
    return np.asarray(statistic)


def compare(live: Array, reference: Array, others: Array | None = None) -> tuple[Array, Array, Array]:
    """(chi-square, degrees of freedom, p-value) of live against reference, which holds its level also where bins are sparse.

    Bins of which fewer than FEW rows are expected in the smaller sample are one bin together, and with them `others`, the bins of what
    has none of its own: which categories of the seldom ones got one was chance. What is expected follows from the rows of both samples
    together; chosen by one of them alone, a bin would be low or high in it, and drift for that reason. Where even of that bin fewer
    are expected it is left out of chi-square, whose distribution would be wrong, and tested alone: of x + y rows in it each is live with
    probability n / (n + m) (Fisher's conditional test); the p-value is then twice the smaller one (Bonferroni).
    """
    n, m = live.sum(axis=-1, keepdims=True), reference.sum(axis=-1, keepdims=True)
    smaller = np.minimum(n, m) / np.maximum(n + m, 1)
    is_rare = (live + reference) * smaller < FEW
    if others is not None:
        is_rare |= others
    rare, rare_reference = np.where(is_rare, live, 0).sum(axis=-1), np.where(is_rare, reference, 0).sum(axis=-1)
    is_alone = (rare + rare_reference) * smaller[..., 0] < FEW
    together = np.where(is_alone, 0, 1)
    common = np.concatenate([np.where(is_rare, 0, live), (rare * together)[..., None]], axis=-1)
    common_reference = np.concatenate([np.where(is_rare, 0, reference), (rare_reference * together)[..., None]], axis=-1)
    statistic, df = chi_square(common, common_reference)
    moderate = moderate_chi_square(common, common_reference)
    p_values = np.ones(statistic.shape)
    shares = (n / np.maximum(n + m, 1))[..., 0]
    for index in np.ndindex(statistic.shape):
        p = chi2_sf(float(moderate[index]), int(df[index])) if df[index] else 1.0
        if is_alone[index] and rare[index]:
            chance = float(shares[index])
            p = min(2 * min(p, binomial_sf(int(rare[index]), int(rare[index] + rare_reference[index]), chance)), 1.0)
        p_values[index] = p
    return statistic, df, p_values


def benjamini_hochberg(p_values: Array, alpha: float) -> Array:
    """Which hypotheses are rejected with a false discovery rate of `alpha` (Benjamini and Hochberg 1995). Where nothing has drifted,
    any is with probability `alpha` at most, for features that are independent or positively dependent."""
    count = len(p_values)
    order = np.argsort(p_values)
    passes = np.flatnonzero(p_values[order] <= alpha * np.arange(1, count + 1) / count)
    rejected = np.zeros(count, np.bool_)
    if len(passes):
        rejected[order[: passes[-1] + 1]] = True
    return rejected
