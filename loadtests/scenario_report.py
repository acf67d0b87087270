"""What scenarios measured: the runs, as JSON for programs and as tables for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

import numpy as np

from loadtests.cancel_storm import Footprint
from loadtests.machine import Noise, noisy_probes
from loadtests.service_level import Histogram, Results, count, goodput, is_shown, is_valid, percentiles, status_name
from loadtests.statistics import Spread, markdown_table

MEMORY_LIMIT = 1.05
SPARE_THREADS = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One stretch of open-loop load on one model. Latencies in seconds, None where no right answer came."""

    scenario: str
    contestant: str
    model: str
    round: int
    offered_rate: float
    arrivals: str
    duration_s: float
    sent: int
    ok: int
    late: int
    refused: int
    failed: int
    wrong: int
    goodput: float
    p50: float | None
    p90: float | None
    p99: float | None
    p999: float | None
    mean: float | None
    lag_p50: float | None
    lag_p99: float | None
    valid: bool
    slo: float | None
    cpu_us: float
    """Of the server, a request sent."""
    histogram: Histogram

    @classmethod
    def of(
        cls,
        results: Results,
        *,
        scenario: str,
        contestant: str,
        model: str,
        round: int,
        offered_rate: float,
        arrivals: str,
        slo: float | None,
        cpu_seconds: float,
    ) -> Self:
        counts, latencies = count(results, slo), results.latencies
        p50, p90, p99, p999 = (_known(value) for value in percentiles(latencies, [50, 90, 99, 99.9]))
        lag_p50, lag_p99 = (_known(value) for value in percentiles(results.lags, [50, 99]))
        return cls(
            scenario=scenario,
            contestant=contestant,
            model=model,
            round=round,
            offered_rate=offered_rate,
            arrivals=arrivals,
            duration_s=results.seconds,
            sent=len(results),
            ok=counts.ok,
            late=counts.late,
            refused=counts.refused,
            failed=counts.failed,
            wrong=counts.wrong,
            goodput=goodput(results, slo),
            p50=p50,
            p90=p90,
            p99=p99,
            p999=p999,
            mean=float(latencies.mean()) if len(latencies) else None,
            lag_p50=lag_p50,
            lag_p99=lag_p99,
            valid=is_valid(results, slo),
            slo=slo,
            cpu_us=cpu_seconds / max(1, len(results)) * 1e6,
            histogram=Histogram.of(latencies),
        )

    @property
    def is_slo_shown(self) -> bool:
        """Whether p99 <= SLO holds with 99 % confidence. A request without a right answer missed it."""
        return self.slo is not None and is_shown(self.sent, self.sent - self.ok)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Sample:
    """A server's footprint after so many seconds of a soak."""

    contestant: str
    model: str
    round: int
    at_s: float
    footprint: Footprint


@dataclass(slots=True)
class Report:
    """Owns what was measured so far."""

    facts: dict[str, str]
    settings: dict[str, object]
    noise: list[Noise] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    slos: dict[str, float] = field(default_factory=dict)
    """Seconds, by model."""

    def check(self, text: str, results: Results) -> None:
        """A wrong answer or a failed call is a failure of the run; one that was late or refused is not."""
        counts = count(results, None)
        if counts.wrong or counts.failed:
            kinds, numbers = np.unique(results.statuses, return_counts=True)
            statuses = ", ".join(f"{status_name(int(kind))} {number}" for kind, number in zip(kinds, numbers, strict=True))
            said = "".join(f"; {number} times: {each}" for each, number in results.texts.most_common(5))
            self.failures.append(f"{text}: {counts.wrong} wrong, {counts.failed} failed of {len(results)} ({statuses}){said}")

    def as_json(self) -> str:
        settings = self.settings | {f"SLO of {model} (ms)": round(slo * 1e3, 4) for model, slo in self.slos.items()}
        content = {
            "kind": "scenarios",
            "facts": self.facts,
            "settings": settings,
            "noise": [asdict(noise) for noise in self.noise],
            "runs": [asdict(run) for run in self.runs],
            "failures": self.failures,
            "notes": self.notes,
            "footprints": [asdict(sample) for sample in self.samples],
        }
        return json.dumps(content, indent=1, allow_nan=False)


def judge_samples(samples: Sequence[Sample]) -> list[str]:
    """What grew from the second sample to the last; the first may still be warming up."""
    if len(samples) < 3:
        return []
    first, last = samples[1].footprint, samples[-1].footprint
    name = f"soak, {samples[0].contestant}, {samples[0].model}"
    failures = []
    if last.memory > MEMORY_LIMIT * first.memory:
        failures.append(f"{name}: {last.memory / first.memory:.3f} times the memory at the end, expected at most {MEMORY_LIMIT:g}")
    if last.threads > first.threads + SPARE_THREADS:
        failures.append(f"{name}: {last.threads} threads at the end, {first.threads} at the beginning")
    if last.open_files > first.open_files:
        failures.append(f"{name}: {last.open_files} open files at the end, {first.open_files} at the beginning")
    return failures


Row = tuple[str, str, str, int]
"""Scenario, model, contestant, and which of its runs in a round: the same step of every round is one row."""


def rows_of(runs: Sequence[Run]) -> dict[Row, list[Run]]:
    """In the order of their first run."""
    steps: dict[tuple[str, str, str, int], int] = {}
    rows: dict[Row, list[Run]] = {}
    for run in runs:
        in_round = (run.scenario, run.model, run.contestant, run.round)
        steps[in_round] = steps.get(in_round, -1) + 1
        rows.setdefault((run.scenario, run.model, run.contestant, steps[in_round]), []).append(run)
    return rows


HEADER = [
    "scenario", "model", "server", "offered/s", "goodput/s", "p50 ms", "p99 ms", "p99.9 ms", "late", "refused", "failed", "wrong",
    "CPU-µs/request", "lag p99 µs", "valid", "p99 <= SLO shown",
]  # fmt: skip


def runs_table(runs: Sequence[Run]) -> str:
    """Probes of a bisection are left out: there are as many as it took, and the last that held says it all."""
    rows = rows_of([run for run in runs if not run.scenario.endswith("probe")])
    ordered = sorted(rows, key=lambda row: (row[0], row[1], row[3]))  # servers beside each other at each step
    return markdown_table(HEADER, [[*row[:3], *_cells(rows[row])] for row in ordered])


def _cells(runs: Sequence[Run]) -> list[str]:
    shares = [f"{sum(getattr(run, name) for run in runs) / max(1, sum(run.sent for run in runs)):.2%}" for name in ("late", "refused")]
    return [
        _spread([run.offered_rate for run in runs]),
        _spread([run.goodput for run in runs]),
        _spread([run.p50 for run in runs], 1e3),
        _spread([run.p99 for run in runs], 1e3),
        _spread([run.p999 for run in runs], 1e3),
        *shares,
        str(sum(run.failed for run in runs)),
        str(sum(run.wrong for run in runs)),
        _spread([run.cpu_us for run in runs]),
        _spread([run.lag_p99 for run in runs], 1e6),
        _of([run.valid for run in runs]),
        _of([run.is_slo_shown for run in runs]) if runs[0].slo is not None else "-",
    ]


def _spread(values: Sequence[float | None], scale: float = 1.0) -> str:
    known = [value for value in values if value is not None]
    return Spread.of(known).text(scale) if known else "-"


def _of(flags: Sequence[bool]) -> str:
    if len(flags) == 1:
        return "yes" if flags[0] else "no"
    return f"{sum(flags)} of {len(flags)}"


def samples_table(samples: Sequence[Sample]) -> str:
    header = ["server", "model", "round", "after s", "memory MB", "threads", "open files"]
    rows = [
        [s.contestant, s.model, str(s.round + 1), f"{s.at_s:.0f}", f"{f.memory / 1e6:.1f}", str(f.threads), str(f.open_files)]
        for s, f in ((sample, sample.footprint) for sample in samples)
    ]
    return markdown_table(header, rows)


def render(report: Report) -> str:
    """As markdown."""
    parts = [runs_table(report.runs)] if report.runs else ["Nothing was measured."]
    if any(not run.valid for run in report.runs):
        parts += ["", "Not valid: the client did not keep to its schedule, so the latencies are in part its own."]
    if report.samples:
        parts += ["", samples_table(report.samples)]
    conditions = {**report.facts, **report.settings, **{f"SLO of {model}": f"{slo * 1e3:.3g} ms" for model, slo in report.slos.items()}}
    parts += ["", *(f"- {key}: {value}" for key, value in conditions.items())]
    noisy = noisy_probes(report.noise)
    parts.append(f"- noise probe: {len(noisy)} of {len(report.noise)} off by more than 10 %")
    parts += [f"- {note}" for note in report.notes]
    parts += ["", *(f"FAILED {failure}" for failure in report.failures)] if report.failures else []
    return "\n".join(parts)
