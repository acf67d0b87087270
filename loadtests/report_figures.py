"""Which pictures are made of what was measured: one set for each model. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from loadtests.comparison import ECHO, Cell, Report, baseline_of, echoes_of
from loadtests.report_plots import Plot, Point, Series, complementary_distribution
from loadtests.report_scenarios import Load, Run
from loadtests.statistics import Spread

CONCURRENT = "concurrent calls"
APART = 1.2
"""Loads that are nearer to each other are repetitions, in which a line over the load says nothing."""
WIDE = 10.0
"""Rates that are further apart than this need a logarithmic axis to be told apart at its low end."""
MODEL_IS_THE_LIMIT = 0.2
"""From this fraction of ONNX Runtime alone on there is something to see; below, the transport is all there is."""


def compare_plots(report: Report) -> list[Plot]:
    return [plot for model in report.models for plot in _model_plots(report, model) if plot.series]


def _model_plots(report: Report, model: str) -> list[Plot]:
    names, ticks = report.contestants, report.concurrencies
    serving = [name for name in names if not name.startswith(ECHO)]
    baseline = baseline_of(names)

    def by_concurrency(name: str, values: Callable[[str, int], Sequence[float]]) -> Series:
        return Series(name, [Point(concurrency, Spread.of(found)) for concurrency in ticks if (found := values(name, concurrency))])

    def of_cells(chosen: Iterable[str], value: Callable[[Cell], float]) -> list[Series]:
        def values(name: str, concurrency: int) -> list[float]:
            return [value(cell) for cell in report.select(name, model, concurrency)]

        return _filled(by_concurrency(name, values) for name in chosen)

    def of_ratios(name: str, other: str) -> Series:
        return by_concurrency(name, lambda name, concurrency: report.ratios(name, other, model, concurrency))

    def over(key: str, title: str, unit: str, series: Sequence[Series], note: str = "", **more: bool | float) -> Plot:
        return Plot(f"{key}-{model}", f"{model}: {title}", CONCURRENT, unit, series, has_log_x=True, x_ticks=ticks, note=note, **more)  # type: ignore[arg-type] # the flags of a Plot, by name

    ratios = _filled(of_ratios(name, baseline) for name in serving if name != baseline)
    of_echo = _filled(
        of_ratios(name, echo) for name in serving for echo in echoes_of(name, names) if name.endswith(echo.removeprefix(ECHO))
    )
    of_runtime = _filled(by_concurrency(name, lambda name, concurrency: report.fractions(name, model, concurrency)) for name in serving)
    is_model_the_limit = any(point.y.median >= MODEL_IS_THE_LIMIT for series in of_runtime for point in series.points)
    p50 = of_cells(serving, lambda cell: cell.p50 * 1e3)
    p99 = [Series(series.name, series.points, is_secondary=True) for series in of_cells(serving, lambda cell: cell.p99 * 1e3)]
    return [
        over("rates", "throughput", "requests/s", of_cells(names, lambda cell: cell.rate), "Bars span the rounds.", has_log_y=True),
        over("ratios", f"rate as a multiple of {baseline}'s", "ratio, within a round", ratios, has_log_y=True, level=1.0),
        over("echo", "rate as a fraction of a server's that infers nothing, same transport", "fraction", of_echo, level=1.0),
        over("runtime", "rate as a fraction of ONNX Runtime alone", "fraction", of_runtime if is_model_the_limit else [], level=1.0),
        over("cpu", "CPU time", "CPU-µs a request", of_cells(names, lambda cell: cell.cpu_us), has_log_y=True),
        over("closed", "latency, closed loop", "ms", p50 + p99, "Solid: p50. Dashed: p99.", has_log_y=True),
    ]


def _filled(series: Iterable[Series]) -> list[Series]:
    return [each for each in series if each.points]


def scenario_plots(found: Sequence[Load]) -> list[Plot]:
    """Of loads that the generator kept up with; over the load where there is more than one."""
    plots = []
    kept = [load for load in found if load.is_valid]
    for scenario, model in dict.fromkeys((load.scenario, load.model) for load in kept):
        chosen = [load for load in kept if (load.scenario, load.model) == (scenario, model)]
        if _span(chosen) > APART and any(count > 1 for count in _steps(chosen).values()):
            plots += _load_plots(f"{scenario}-{model}", f"{model}, {scenario}", chosen)
        plots.append(_distribution_plot(f"{scenario}-{model}", f"{model}, {scenario}", chosen))
    return [plot for plot in plots if plot.series]


def _span(found: Sequence[Load]) -> float:
    rates = [load.offered.median for load in found]
    return max(rates) / min(rates)


def _steps(found: Sequence[Load]) -> dict[str, int]:
    return {name: sum(load.contestant == name for load in found) for name in dict.fromkeys(load.contestant for load in found)}


def _load_plots(key: str, title: str, found: Sequence[Load]) -> list[Plot]:
    offered = "offered requests/s"

    def lines(value: Callable[[Run], float | None], is_secondary: bool = False) -> list[Series]:
        return _filled(
            Series(
                name,
                [Point(load.offered.median, y) for load in found if load.contestant == name and (y := load.spread(value)) is not None],
                is_secondary,
            )
            for name in _steps(found)
        )

    p50 = lines(lambda run: None if run.p50 is None else run.p50 * 1e3)
    p99 = lines(lambda run: None if run.p99 is None else run.p99 * 1e3, is_secondary=True)
    slo = next((run.slo for load in found for run in load.runs if run.slo), None)
    return [
        Plot(
            f"latency-{key}",
            f"{title}: latency against load",
            offered,
            "ms, from the intended send",
            p50 + p99,
            has_log_x=_span(found) > WIDE,
            has_log_y=True,
            level=slo and slo * 1e3,
            note="Solid: p50. Dashed: p99." + (" The thin line is the SLO." if slo else ""),
        ),
        Plot(
            f"goodput-{key}",
            f"{title}: goodput against load",
            offered,
            "right answers in time a second",
            lines(lambda run: run.goodput),
            has_diagonal=True,
            note="The thin line is what was offered.",
        ),
    ]


def _distribution_plot(key: str, title: str, found: Sequence[Load]) -> Plot:
    """Of each server at the highest load that it answered wholly and in time; at its lowest where it never did."""
    series, said = [], []
    for name in _steps(found):
        own = [load for load in found if load.contestant == name and load.histogram.total]
        if own:
            load = ([load for load in own if load.is_complete] or own[:1])[-1]
            histogram = load.histogram
            points = complementary_distribution(histogram.edges_s, histogram.counts)
            series.append(Series(name, [Point(latency * 1e3, Spread.of([part])) for latency, part in points]))
            said.append(f"{name} at {load.offered.median:.0f}/s")
    return Plot(
        f"distribution-{key}",
        f"{title}: how many requests take longer",
        "latency in ms",
        "part of the requests",
        _filled(series),
        has_log_x=True,
        has_log_y=True,
        has_steps=True,
        note=f"{'; '.join(said)}: the highest load that each answered wholly and in time, or else its lowest.",
    )
