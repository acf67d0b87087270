"""What the drift study counts: false alarms over lives of versions, the smallest shift that is found, and how late a slow one is.

All of it goes through what the server itself runs: Windows, judge for tumbling and sliding windows, SlowDrift, findings and Alarms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from headrace.config import DriftConfig
from headrace.drift.alarms import Alarms, findings
from headrace.drift.counting import Counts
from headrace.drift.judgement import Histograms, judge
from headrace.drift.reference import Reference
from headrace.drift.sequential import SlowDrift
from headrace.drift.verdict import Alert, WindowVerdict
from headrace.drift.window import Windows
from numpy.typing import NDArray

from loadtests.drift_population import NORMAL, PoolCounter, Population, build_reference, index_of

Array = NDArray[Any]

SHIPPED = DriftConfig()
BARE = replace(SHIPPED, min_psi=0.0, min_rows=10)
"""The test alone: without the floor under the effect nothing but chance keeps it from an alarm."""
FIXED = (0.1, 0.25)
USUAL_ZERO = 1e-4
"""What others take an empty bin's fraction to be."""
POWER = 0.8
AT_ONCE = 50
"""Windows that are drawn together."""


def usual_psi(live: Array, reference: Array, real: Array) -> Array:
    """PSI as it is commonly computed: [..., features] of counts [..., features, bins], empty bins taken as 0.0001."""
    p = np.maximum(live / np.maximum(live.sum(axis=-1, keepdims=True), 1), USUAL_ZERO)
    q = np.maximum(reference / np.maximum(reference.sum(axis=-1, keepdims=True), 1), USUAL_ZERO)
    # A bin that holds nothing in either adds nothing: both are the same small number.
    return np.asarray(np.where(real, (p - q) * np.log(p / q), 0.0).sum(axis=-1))


class Judged(NamedTuple):
    """What the end of a window brought."""

    tumbling: WindowVerdict
    sliding: WindowVerdict | None
    evidence: dict[int, float]
    news: list[Alert]


class Chain:
    """One version's windows, judged as the server does; windows end after `n` rows. Owns what it has seen."""

    def __init__(self, reference: Reference, histograms: Histograms, config: DriftConfig, n: int) -> None:
        self._config = replace(config, window_rows=n)
        self._reference = reference
        self._histograms = histograms
        self._windows = Windows(reference, self._config, 0.0)
        self._slow = SlowDrift(reference, self._config, histograms)
        self.alarms = Alarms("study", 1)
        self._now = 0.0

    def __repr__(self) -> str:
        return f"Chain({self._windows!r}, {self._slow!r}, {self.alarms!r})"

    def add(self, counts: Counts) -> Judged:
        self._now += 1.0
        window = self._windows.add(counts, self._now)
        if window is None:
            raise ValueError(f"a window of {self._config.window_rows} rows: expected it to end, got {counts.rows} rows")
        reference, config, made = self._reference, self._config, self._histograms
        tumbling = judge(reference, window.counts, config, "tumbling", window.began, window.ended, made)
        whole = self._windows.sliding()
        sliding = judge(reference, whole.counts, config, "sliding", whole.began, whole.ended, made) if whole is not None else None
        self._slow.update(window.counts)
        self._slow.restart(tumbling.drifting)
        evidence = self._slow.evidence()
        found = findings(reference, window.counts, tumbling, sliding, evidence)
        return Judged(tumbling, sliding, evidence, self.alarms.update(reference, found, self._now, window.counts.rows, self._now))


# -- false alarms ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Alarming:
    """What one way of judging said of windows in which nothing had drifted. `by`: windows in which an alert was raised, by what for.
    `standing`: windows at whose end an alert was raised still or anew. `features`: alerts of single features."""

    raised: int = 0
    standing: int = 0
    features: int = 0
    lives: int = 0
    by: dict[str, int] = field(default_factory=dict)

    def add(self, other: Alarming) -> None:
        self.raised += other.raised
        self.standing += other.standing
        self.features += other.features
        self.lives += other.lives
        self.by = dict(Counter(self.by) + Counter(other.by))


@dataclass(slots=True)
class FalseAlarms:
    """Of `windows` windows of n rows, in `lives` with a reference of m rows each. `fixed`, `fixed_features`: by the usual thresholds."""

    m: int
    n: int
    lives: int = 0
    windows: int = 0
    features: int = 0
    shipped: Alarming = field(default_factory=Alarming)
    bare: Alarming = field(default_factory=Alarming)
    fixed: list[int] = field(default_factory=lambda: [0, 0])
    fixed_features: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, other: FalseAlarms) -> None:
        self.lives += other.lives
        self.windows += other.windows
        self.features = other.features
        self.shipped.add(other.shipped)
        self.bare.add(other.bare)
        self.fixed = [a + b for a, b in zip(self.fixed, other.fixed, strict=True)]
        self.fixed_features = [a + b for a, b in zip(self.fixed_features, other.fixed_features, strict=True)]


def live(population: Population, m: int, sizes: Sequence[int], windows: int, seed: int) -> list[FalseAlarms]:
    """One reference of m rows, and for each size that many windows of the same truth."""
    random = np.random.default_rng([seed, m])
    reference = build_reference(population, m, SHIPPED, random)
    counter, histograms = PoolCounter(reference, population), Histograms(reference)
    return [_live(population, counter, reference, histograms, FalseAlarms(m, n, lives=1), windows, random) for n in sizes]


def _live(
    population: Population, counter: PoolCounter, reference: Reference, histograms: Histograms, into: FalseAlarms, windows: int,
    random: np.random.Generator,
) -> FalseAlarms:  # fmt: skip
    chains = [(Chain(reference, histograms, config, into.n), told) for config, told in ((SHIPPED, into.shipped), (BARE, into.bare))]
    into.windows, into.features = windows, len(reference.features)
    for begin in range(0, windows, AT_ONCE):
        times = population.draw(min(AT_ONCE, windows - begin), into.n, random)
        for counts in counter.counts(times, counter.bins(times)):
            scores = usual_psi(histograms.of(counts), histograms.reference, histograms.real)
            for place, threshold in enumerate(FIXED):
                over = int((scores > threshold).sum())
                into.fixed[place] += over > 0
                into.fixed_features[place] += over
            for chain, told in chains:
                _tell(told, chain.add(counts), bool(chain.alarms.raised))
    for _, told in chains:
        told.lives = int(told.raised > 0)
    return into


def _tell(told: Alarming, judged: Judged, is_standing: bool) -> None:
    raised = [alert for alert in judged.news if alert.is_raised]
    told.standing += is_standing
    told.raised += bool(raised)
    told.features += sum([bool(alert.feature) for alert in raised])
    kinds = {"tumbling" if judged.tumbling.drifting else "sliding" if alert.kind == "drift" else alert.kind for alert in raised}
    told.by = dict(Counter(told.by) + Counter(kinds))


# -- power -----------------------------------------------------------------------------------------------------------------


Shift = Callable[[Population, float], Population]


def shift_mean(population: Population, size: float) -> Population:
    """One normal column, by that many of its standard deviations."""
    return _with_column(population, population.inputs["x"][:, NORMAL] + np.float32(size))


def change_scale(population: Population, size: float) -> Population:
    """One normal column, wider by that part."""
    return _with_column(population, population.inputs["x"][:, NORMAL] * np.float32(1 + size))


def change_mix(population: Population, size: float) -> Population:
    """That part of all rows are of class 0 in addition, with all that such rows bring; the others are fewer in proportion."""
    is_first = population.outputs["scores"].argmax(axis=1) == 0
    share = float(population.chance[is_first].sum())
    wanted = min(share + size, 1.0)
    factors = np.where(is_first, wanted / share, (1 - wanted) / (1 - share))
    return replace(population, chance=population.chance * factors)


def _with_column(population: Population, column: Array) -> Population:
    x = population.inputs["x"].copy()
    x[:, NORMAL] = column
    return replace(population, inputs={**population.inputs, "x": x})


class Scenario(NamedTuple):
    """`feature`: the one of which it is counted whether it is found. `is_alone`: no other is watched."""

    key: str
    title: str
    unit: str
    shift: Shift
    feature: str
    most: float
    is_alone: bool = False


SCENARIOS = (
    Scenario("mean", "one column of 37, its mean", "standard deviations", shift_mean, "x.normal0", 4.0),
    Scenario("alone", "one column watched alone, its mean", "standard deviations", shift_mean, "x.normal0", 4.0, is_alone=True),
    Scenario("scale", "one column of 37, its spread", "part that it is wider", change_scale, "x.normal0", 8.0),
    Scenario("mix", "more answers of one class", "part of all answers in addition", change_mix, "scores.class", 0.85),
)
CRITERIA = ("shipped", "bare", "0.1", "0.25")


@dataclass(frozen=True, slots=True)
class Power:
    """The smallest shift found in POWER of the windows, by criterion; infinite where the largest tried is not."""

    scenario: str
    m: int
    n: int
    smallest: dict[str, float]


def find_power(population: Population, scenario: Scenario, m: int, n: int, lives: int, windows: int, steps: int, seed: int) -> Power:
    """By bisection, on the same draws for each size of the shift; a larger one is taken to be found no less often."""
    trials = [_Trial(population, scenario, m, n, windows, [seed, m, n, life]) for life in range(lives)]

    def is_found(criterion: str, size: float) -> bool:
        shifted = scenario.shift(population, size)
        return float(np.mean([trial.found(shifted, criterion) for trial in trials])) >= POWER

    smallest = {}
    for criterion in CRITERIA:
        low, high = 0.0, scenario.most
        if is_found(criterion, low):
            smallest[criterion] = 0.0  # it is always found: a threshold that noise exceeds
            continue
        if not is_found(criterion, high):
            smallest[criterion] = float("inf")
            continue
        for _ in range(steps):
            middle = (low + high) / 2 if low else high / 4
            low, high = (low, middle) if is_found(criterion, middle) else (middle, high)
        smallest[criterion] = high
    return Power(scenario.key, m, n, smallest)


class _Trial:
    """One reference, and windows of a truth that is shifted. Owns the draws."""

    def __init__(self, population: Population, scenario: Scenario, m: int, n: int, windows: int, seed: list[int]) -> None:
        random = np.random.default_rng(seed)
        reference = build_reference(population, m, SHIPPED, random)
        if scenario.is_alone:
            reference = replace(reference, features=(reference.features[index_of(reference, scenario.feature)],))
        self._reference = reference
        self._index = index_of(reference, scenario.feature)
        self._histograms = Histograms(reference)
        self._counter = PoolCounter(reference, population)
        self._seed = seed
        self._windows, self._n = windows, n
        self._times = population.draw(windows, n, random)
        self._bins = self._counter.bins(self._times)
        self._chance = population.chance

    def found(self, shifted: Population, criterion: str) -> float:
        """In which part of the windows."""
        times, bins = self._times, self._bins
        if shifted.chance is not self._chance:
            times = shifted.draw(self._windows, self._n, np.random.default_rng(self._seed))
            bins = self._counter.bins(times)
        else:
            start, stop = self._counter.columns(self._index)
            bins = bins.copy()
            bins[:, start:stop] = np.rint(times.astype(np.float32) @ self._counter.feature(self._index, shifted))
        found = [self._is_found(counts, criterion) for counts in self._counter.counts(times, bins)]
        return float(np.mean(found))

    def _is_found(self, counts: Counts, criterion: str) -> bool:
        made, index = self._histograms, self._index
        if criterion in ("shipped", "bare"):
            config = BARE if criterion == "bare" else replace(SHIPPED, min_rows=BARE.min_rows)
            return index in judge(self._reference, counts, config, "tumbling", 0.0, 1.0, made).drifting
        return float(usual_psi(made.of(counts)[index], made.reference[index], made.real[index])) > float(criterion)


# -- slow drift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ramp:
    """Windows of n rows until a column whose mean moves by `speed` standard deviations a window was found: medians over lives, by what
    found it. Infinite where most lives ended without."""

    n: int
    speed: float
    lives: int
    delay: dict[str, float]


DETECTORS = ("tumbling", "sliding", "slow")


def follow_ramp(population: Population, m: int, n: int, speed: float, windows: int, config: DriftConfig, seed: int) -> dict[str, float]:
    """One life: windows until each of DETECTORS found the column, counted from the ramp's beginning."""
    random = np.random.default_rng([seed, n])
    reference = build_reference(population, m, config, random)
    counter, histograms = PoolCounter(reference, population), Histograms(reference)
    index = index_of(reference, "x.normal0")
    start, stop = counter.columns(index)
    chain, delay = Chain(reference, histograms, config, n), dict.fromkeys(DETECTORS, float("inf"))
    for window in range(1 - config.sliding_windows, windows + 1):
        times = population.draw(1, n, random)
        bins = counter.bins(times)
        adds = counter.feature(index, shift_mean(population, speed * max(window, 0)))
        bins[:, start:stop] = np.rint(times.astype(np.float32) @ adds)
        judged = chain.add(counter.counts(times, bins)[0])
        now = {
            "tumbling": index in judged.tumbling.drifting,
            "sliding": judged.sliding is not None and index in judged.sliding.drifting,
            "slow": judged.evidence.get(index, 0.0) >= 1,
        }
        if window > 0:
            delay.update({name: float(window) for name in DETECTORS if now[name] and delay[name] == float("inf")})
        if now["tumbling"] and window > 0:
            break  # the last to see it; slow drift begins anew with it
    return delay


def median_delays(n: int, speed: float, lives: Sequence[dict[str, float]]) -> Ramp:
    return Ramp(n, speed, len(lives), {name: float(np.median([life[name] for life in lives])) for name in DETECTORS})
