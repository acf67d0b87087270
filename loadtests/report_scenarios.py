"""What the open-loop scenarios measured, read from their JSON and put together round by round. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from loadtests.comparison import Table
from loadtests.statistics import Spread

KIND = "scenarios"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of latencies between edges in seconds, one edge more than counts."""

    edges_s: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Run:
    """One server under one load in one round. Rates a second, times in seconds; percentiles None where nothing was answered."""

    scenario: str
    contestant: str
    model: str
    round: int
    offered_rate: float
    duration_s: float
    sent: int
    ok: int
    late: int
    refused: int
    failed: int
    wrong: int
    goodput: float
    p50: float | None
    p99: float | None
    lag_p99: float | None = None
    valid: bool = True
    slo: float | None = None
    cpu_us: float | None = None
    histogram: Histogram = field(default_factory=Histogram)


_KNOWN = [each.name for each in fields(Run)]


def read_runs(content: Mapping[str, Any]) -> list[Run]:
    """Keys that are not used here may be there. Raises ValueError that names the run and what it lacks."""
    if "runs" not in content:
        raise ValueError(f"the JSON of scenarios needs 'runs', and has {', '.join(content)}")
    return [_read_run(number, raw) for number, raw in enumerate(content["runs"])]


def _read_run(number: int, raw: Mapping[str, Any]) -> Run:
    histogram = raw.get("histogram") or {}
    given = {name: raw[name] for name in _KNOWN if name in raw and name != "histogram"}
    try:
        return Run(**given, histogram=Histogram(tuple(histogram.get("edges_s", ())), tuple(histogram.get("counts", ()))))
    except TypeError as error:
        raise ValueError(f"run {number}: {error}") from error


@dataclass(frozen=True, slots=True)
class Load:
    """The same step of a scenario in all rounds. Rates are set by what the round showed, so they differ from round to round."""

    scenario: str
    contestant: str
    model: str
    runs: tuple[Run, ...]

    @property
    def offered(self) -> Spread:
        return Spread.of([run.offered_rate for run in self.runs])

    @property
    def is_valid(self) -> bool:
        """Whether the generator kept its schedule in every round; where it did not, the figures are its own."""
        return all(run.valid for run in self.runs)

    @property
    def is_complete(self) -> bool:
        """Whether every request was answered rightly and in time."""
        return all(run.ok == run.sent for run in self.runs)

    def spread(self, value: Callable[[Run], float | None]) -> Spread | None:
        """None where no round has the value."""
        values = [each for run in self.runs if (each := value(run)) is not None]
        return Spread.of(values) if values else None

    @property
    def histogram(self) -> Histogram:
        """Of all rounds together. Raises ValueError where they were not counted on one grid."""
        try:
            return merge([run.histogram for run in self.runs if run.histogram.total])
        except ValueError as error:
            raise ValueError(f"{self.contestant}, {self.model}: {error}") from error


def merge(histograms: Sequence[Histogram]) -> Histogram:
    """Each may be a part of a common grid, from its first count to its last. Raises ValueError where bins overlap."""
    bins: dict[tuple[float, float], int] = {}
    for histogram in histograms:
        for edges, count in zip(pairwise(histogram.edges_s), histogram.counts, strict=True):
            bins[edges] = bins.get(edges, 0) + count
    edges_s: list[float] = []
    counts: list[int] = []
    for (low, high), count in sorted(bins.items()):
        if edges_s and low < edges_s[-1]:
            raise ValueError(
                f"expected histograms on one grid, got a bin from {low:g} to {high:g} s beside one that ends at {edges_s[-1]:g} s"
            )
        if not edges_s:
            edges_s.append(low)
        elif low > edges_s[-1]:
            edges_s.append(low)
            counts.append(0)
        edges_s.append(high)
        counts.append(count)
    return Histogram(tuple(edges_s), tuple(counts))


def loads(runs: Sequence[Run]) -> list[Load]:
    """By scenario, model and contestant, from the lowest rate to the highest: the n-th lowest of a round goes with that of the others."""
    steps: dict[tuple[str, str, str, int], list[Run]] = {}
    seen: dict[tuple[str, str, str, int], int] = {}
    for run in sorted(runs, key=lambda run: run.offered_rate):
        of_round = (run.scenario, run.model, run.contestant, run.round)
        place = seen[of_round] = seen.get(of_round, -1) + 1
        steps.setdefault((run.scenario, run.model, run.contestant, place), []).append(run)
    order = {run.contestant: number for number, run in reversed([*enumerate(runs)])}
    keys = sorted(steps, key=lambda key: (key[0], key[1], order[key[2]], key[3]))
    return [Load(key[0], key[2], key[1], tuple(steps[key])) for key in keys]


def scenario_table(title: str, found: Sequence[Load]) -> Table:
    header = ["scenario", "model", "server", "offered/s", "goodput/s", "p50 ms", "p99 ms", "late", "refused", "failed", "CPU-µs/request"]
    rows = [_row(load) for load in found]
    bounds = {run.slo for load in found for run in load.runs if run.slo}
    note = "Latency is of right answers, from the intended time of sending; lag is how late the generator sent."
    if bounds:
        note += f" Goodput counts those within the SLO of {' or '.join(f'{slo * 1e3:.3g} ms' for slo in sorted(bounds))}."
    if not all(load.is_valid for load in found):
        note += " Where it says no, the generator was late, and the figures say nothing about the server: the pictures leave them out."
    return Table(title, [*header, "lag p99 ms", "valid"], rows, note)


def _row(load: Load) -> list[str]:
    sent = sum(run.sent for run in load.runs)
    parts = [
        sum(counts) / max(1, sent) for counts in zip(*((run.late, run.refused, run.failed + run.wrong) for run in load.runs), strict=True)
    ]
    spreads = [load.spread(lambda run: run.goodput), *(load.spread(value) for value in (lambda run: run.p50, lambda run: run.p99))]
    texts = ["-" if spread is None else spread.text(scale) for spread, scale in zip(spreads, (1.0, 1e3, 1e3), strict=True)]
    cpu, lag = load.spread(lambda run: run.cpu_us), load.spread(lambda run: run.lag_p99)
    return [
        load.scenario,
        load.model,
        load.contestant,
        load.offered.text(),
        *texts,
        *(f"{part:.2%}" if part else "0" for part in parts),
        "-" if cpu is None else cpu.text(),
        "-" if lag is None else lag.text(1e3),
        "yes" if load.is_valid else "no",
    ]
