"""Tails of the chi-square and binomial distributions; scipy is too large to be needed at run time. Pure."""

from __future__ import annotations

import math
from functools import lru_cache


def chi2_sf(x: float, df: int) -> float:
    """P(X > x) for X chi-square with `df` degrees of freedom: the upper regularised gamma function Q(df/2, x/2).

    By its series below a + 1 and its continued fraction (Lentz) above (Press et al., Numerical Recipes, 6.2).
    """
    if x <= 0 or df <= 0:
        return 1.0
    a, z = df / 2, x / 2
    front = a * math.log(z) - z - math.lgamma(a)
    if z < a + 1:
        term = total = 1 / a
        step = a
        while abs(term) > abs(total) * 1e-16:
            step += 1
            term *= z / step
            total += term
        return max(1.0 - math.exp(front) * total, 0.0)
    tiny = 1e-300
    b = z + 1 - a
    c, d = 1 / tiny, 1 / b
    fraction = d
    for i in range(1, 1000):
        an = -i * (i - a)
        b += 2
        d = an * d + b
        d = 1 / (d if abs(d) > tiny else tiny)
        c = b + an / c
        c = c if abs(c) > tiny else tiny
        fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return math.exp(front) * fraction if front > -745 else 0.0


@lru_cache(maxsize=4096)
def chi2_isf(probability: float, df: int) -> float:
    """The x with P(X > x) = `probability`, by bisection from Wilson and Hilferty's approximation (1931)."""
    if df <= 0:
        return 0.0
    z = normal_isf(probability)
    guess = df * max(1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df)), 0.01) ** 3
    low, high = 0.0, max(guess, 1.0)
    while chi2_sf(high, df) > probability:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        if chi2_sf(middle, df) > probability:
            low = middle
        else:
            high = middle
        if high - low <= 1e-12 * high:
            break
    return (low + high) / 2


def normal_isf(probability: float) -> float:
    """The z with P(Z > z) = `probability`, by bisection on erfc; to 1e-12."""
    low, high = -40.0, 40.0
    for _ in range(120):
        middle = (low + high) / 2
        if math.erfc(middle / math.sqrt(2)) / 2 > probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def binomial_sf(at_least: int, trials: int, chance: float) -> float:
    """P(X >= at_least). Summed from the largest term on; terms beyond fall by a factor each, so few are needed."""
    if at_least <= 0:
        return 1.0
    if at_least > trials or chance <= 0:
        return 0.0
    if chance >= 1:
        return 1.0
    mean = trials * chance
    if at_least <= mean:
        return 1.0 - _lower(at_least - 1, trials, chance)
    return min(_from(at_least, trials, chance), 1.0)


def _term(k: int, trials: int, chance: float) -> float:
    ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
    return math.exp(max(ways + k * math.log(chance) + (trials - k) * math.log1p(-chance), -745.0))


def _from(start: int, trials: int, chance: float) -> float:
    term = total = _term(start, trials, chance)
    odds = chance / (1 - chance)
    for k in range(start, trials):
        term *= (trials - k) / (k + 1) * odds
        total += term
        if term < total * 1e-16:
            break
    return total


def _lower(stop: int, trials: int, chance: float) -> float:
    term = total = _term(stop, trials, chance)
    odds = (1 - chance) / chance
    for k in range(stop, 0, -1):
        term *= k / (trials - k + 1) * odds
        total += term
        if term < total * 1e-16:
            break
    return min(total, 1.0)
