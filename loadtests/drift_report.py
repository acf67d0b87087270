"""The drift study's results: their JSON, its tables and its pictures. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.lifecycle.rollout import wilson

from loadtests.drift_trials import BARE, DETECTORS, POWER, SCENARIOS, SHIPPED, Alarming, FalseAlarms, Power, Ramp
from loadtests.report_plots import Plot, Point, Series, short_number
from loadtests.statistics import Spread, markdown_table

SURE = 1.96
LEAST_RATE = 1e-5
"""Where a logarithmic axis has rates of 0."""
NAMES = {"shipped": "as shipped", "bare": "without floor", "0.1": "PSI > 0.1", "0.25": "PSI > 0.25"}


@dataclass(frozen=True, slots=True)
class Study:
    """`alarms`: many references with few windows each; `long`: few with many. `ramps`: by whether as shipped or without the floor."""

    alarms: list[FalseAlarms]
    long: list[FalseAlarms]
    power: list[Power]
    ramps: dict[str, list[Ramp]]


def as_json(study: Study) -> str:
    return json.dumps(_finite(asdict(study)), indent=1)


def _finite(value: Any) -> Any:
    """JSON has no infinity; null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def from_json(content: Mapping[str, Any]) -> Study:
    """What `as_json` wrote. Raises ValueError that says what is missing."""
    try:
        return Study(
            alarms=[_alarms(raw) for raw in content["alarms"]],
            long=[_alarms(raw) for raw in content["long"]],
            power=[Power(raw["scenario"], raw["m"], raw["n"], _infinite(raw["smallest"])) for raw in content["power"]],
            ramps={
                kind: [Ramp(raw["n"], raw["speed"], raw["lives"], _infinite(raw["delay"])) for raw in ramps]
                for kind, ramps in content["ramps"].items()
            },
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the JSON of a drift study: {error!r}") from error


def _alarms(raw: Mapping[str, Any]) -> FalseAlarms:
    return FalseAlarms(**{**raw, "shipped": Alarming(**raw["shipped"]), "bare": Alarming(**raw["bare"])})


def _infinite(raw: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.inf if value is None else value for key, value in raw.items()}


# -- tables ----------------------------------------------------------------------------------------------------------------


def tables(study: Study) -> list[str]:
    """Markdown, each under a line that says what it is."""
    found = []
    for m in _sorted([each.m for each in study.alarms]):
        found.append(_alarm_table(f"False alarms, reference of {m:,} rows", [each for each in study.alarms if each.m == m]))
    found.append(_feature_table(study.alarms))
    found.append(_long_table(study.long))
    for scenario in SCENARIOS:
        some = [each for each in study.power if each.scenario == scenario.key]
        found.append(_power_table(f"Smallest shift found in {POWER:.0%} of windows: {scenario.title}, in {scenario.unit}", some))
    for kind, ramps in study.ramps.items():
        found.append(_ramp_table(f"Windows until a slow shift is found, {NAMES[kind]}", ramps))
    return found


def _alarm_table(title: str, alarms: Sequence[FalseAlarms]) -> str:
    header = ["rows a window", "windows", "as shipped", "without floor", "by", "lives with one", "PSI > 0.1", "PSI > 0.25"]
    rows = [
        [
            f"{each.n:,}", f"{each.windows:,}", _rate(each.shipped.raised, each.windows), _rate(each.bare.raised, each.windows),
            ", ".join(f"{name} {count}" for name, count in sorted(each.bare.by.items())) or "-", f"{each.bare.lives} of {each.lives}",
            *[_rate(over, each.windows) for over in each.fixed],
        ]
        for each in alarms
    ]  # fmt: skip
    return f"{title}\n\n{markdown_table(header, rows)}"


def _feature_table(alarms: Sequence[FalseAlarms]) -> str:
    header = ["reference", "rows a window", "as shipped", "without floor", "PSI > 0.1", "PSI > 0.25"]
    rows = []
    for each in alarms:
        pairs = each.windows * each.features
        counts = (each.shipped.features, each.bare.features, *each.fixed_features)
        rows.append([f"{each.m:,}", f"{each.n:,}", *[_percent(count / pairs) for count in counts]])
    return f"The same of single features: part of the pairs of feature and window\n\n{markdown_table(header, rows)}"


def _long_table(alarms: Sequence[FalseAlarms]) -> str:
    header = ["reference", "rows a window", "windows", "as shipped", "by", "without floor", "by", "of them slow"]
    rows = []
    for each in alarms:
        told = [(_rate(way.raised, each.windows), ", ".join(f"{k} {c}" for k, c in sorted(way.by.items())) or "-") for way in _ways(each)]
        rows.append([f"{each.m:,}", f"{each.n:,}", f"{each.windows:,}", *told[0], *told[1], str(each.bare.by.get("slow_drift", 0))])
    lengths = " and ".join(f"{length:,}" for length in _sorted([each.windows // each.lives for each in alarms if each.lives]))
    return f"False alarms in lives of {lengths} windows, in which evidence can add up\n\n{markdown_table(header, rows)}"


def _ways(each: FalseAlarms) -> tuple[Alarming, Alarming]:
    return each.shipped, each.bare


def _power_table(title: str, power: Sequence[Power]) -> str:
    rows = [[f"{each.m:,}", f"{each.n:,}", *[_shift(each.smallest[key]) for key in NAMES]] for each in power]
    return f"{title}\n\n{markdown_table(['reference', 'rows a window', *NAMES.values()], rows)}"


def _ramp_table(title: str, ramps: Sequence[Ramp]) -> str:
    header = ["rows a window", "standard deviations a window", *DETECTORS, "mean's shift by then"]
    rows = []
    for each in ramps:
        first = min(each.delay.values())
        at = f"{first * each.speed:.2f}" if math.isfinite(first) else "-"
        rows.append([f"{each.n:,}", f"{each.speed:g}", *[_windows(each.delay[name]) for name in DETECTORS], at])
    return f"{title}\n\n{markdown_table(header, rows)}"


def _rate(count: int, total: int) -> str:
    low, high = wilson(count / total, total, SURE)
    return f"{_percent(count / total)} ({_percent(low)} to {_percent(high)})"


def _percent(rate: float) -> str:
    return f"{float(f'{rate * 100:.2g}'):g} %" if rate < 0.1 else f"{rate * 100:.1f} %"


def _shift(value: float) -> str:
    return "not found" if math.isinf(value) else "noise alone" if value == 0 else f"{value:.3g}"


def _windows(value: float) -> str:
    return "later" if math.isinf(value) else f"{value:.0f}"


def _sorted(values: Sequence[int]) -> list[int]:
    return sorted(set(values))


# -- pictures --------------------------------------------------------------------------------------------------------------


def plots(study: Study) -> list[Plot]:
    found = [_alarm_plot(study, m) for m in _sorted([each.m for each in study.alarms])]
    for scenario in SCENARIOS:
        found.append(_power_plot(study, scenario.key, scenario.title, scenario.unit))
    return found + [_ramp_plot(study, kind) for kind in study.ramps]


def _alarm_plot(study: Study, m: int) -> Plot:
    alarms = [each for each in study.alarms if each.m == m]

    def series(name: str, counts: Sequence[int]) -> Series:
        return Series(name, [Point(each.n, _interval(count, each.windows)) for each, count in zip(alarms, counts, strict=True)])

    lines = [
        series("PSI > 0.25", [each.fixed[1] for each in alarms]),
        series("PSI > 0.1", [each.fixed[0] for each in alarms]),
        series("without floor", [each.bare.raised for each in alarms]),
        series("as shipped", [each.shipped.raised for each in alarms]),
    ]
    title = f"Windows with a false alarm, nothing has drifted; reference of {m:,} rows"
    x_label = f"rows in a window (dotted line: the budget; none at all is drawn at {LEAST_RATE:g})"
    return Plot(
        f"false-alarms-{m}", title, x_label, "part of the windows", lines, has_log_x=True, has_log_y=True, level=SHIPPED.alpha,
        x_ticks=[each.n for each in alarms],
    )  # fmt: skip


def _interval(count: int, total: int) -> Spread:
    """A rate with its interval; those of 0 lie at the bottom, without one: they would cover each other."""
    if not count:
        return Spread(LEAST_RATE, LEAST_RATE, LEAST_RATE)
    low, high = wilson(count / total, total, SURE)
    rate = count / total
    return Spread(rate, max(min(low, rate), LEAST_RATE), max(high, rate))


def _power_plot(study: Study, key: str, title: str, unit: str) -> Plot:
    lines = []
    sizes = _sorted([each.m for each in study.power])
    for name in reversed(NAMES):
        for m in reversed(sizes):
            some = [each for each in study.power if each.scenario == key and each.m == m and 0 < each.smallest[name] < math.inf]
            points = [Point(each.n, Spread(each.smallest[name], each.smallest[name], each.smallest[name])) for each in some]
            lines.append(Series(NAMES[name], points, is_secondary=m != sizes[-1]))
    ticks = _sorted([each.n for each in study.power])
    how = f" (dashed: a reference of {sizes[0]:,} rows, else of {sizes[-1]:,})" if len(sizes) > 1 else ""
    return Plot(
        f"power-{key}", f"Smallest shift found in {POWER:.0%} of windows: {title}", f"rows in a window{how}", unit, lines,
        has_log_x=True, has_log_y=True, x_ticks=ticks,
    )  # fmt: skip


def _ramp_plot(study: Study, kind: str) -> Plot:
    ramps = study.ramps[kind]
    lines = [
        Series(f"{short_number(n)} rows a window", [
            Point(each.speed, Spread(first, first, first))
            for each in ramps if each.n == n and math.isfinite(first := min(each.delay.values()))
        ])
        for n in _sorted([each.n for each in ramps])
    ]  # fmt: skip
    floor = f"PSI of at least {SHIPPED.min_psi if kind == 'shipped' else BARE.min_psi:g}"
    return Plot(
        f"slow-{kind}", f"Windows until a mean that moves steadily is found; {floor}", "standard deviations a window", "windows", lines,
        has_log_x=True, has_log_y=True, x_ticks=_speeds(ramps),
    )  # fmt: skip


def _speeds(ramps: Sequence[Ramp]) -> list[float]:
    return sorted({each.speed for each in ramps})
