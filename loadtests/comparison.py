"""What `compare` measured: its numbers, its tables, and its JSON, which is read back here. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtests.machine import Noise, noisy_probes
from loadtests.reference import Speed
from loadtests.statistics import Spread, markdown_table

KIND = "compare"
"""What `kind` of a JSON result is this one; others are skipped by who only reads these."""
ECHO = "echo-"
"""What the names of servers begin with that infer nothing; the rest is their transport."""
CLIENT_LIMIT = 0.85
"""From there on the client's core decides the rate, and the server's is a lower bound."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One contestant, one model, one concurrency, one round. Latencies in seconds."""

    round: int
    contestant: str
    model: str
    concurrency: int
    requests: int
    rate: float
    p50: float
    p99: float
    cpu_us: float
    rows_per_batch: float
    client_cpu: float


@dataclass(frozen=True, slots=True)
class Reference:
    round: int
    model: str
    speeds: dict[int, Speed]
    """By rows in a batch."""

    @property
    def best_rate(self) -> float:
        return max(speed.rate for speed in self.speeds.values())

    @property
    def least_cpu_us(self) -> float:
        return min(speed.cpu_us for speed in self.speeds.values())


@dataclass(slots=True)
class Report:
    facts: dict[str, str]
    settings: dict[str, object]
    cells: list[Cell] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    noise: list[Noise] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def contestants(self) -> list[str]:
        """In the order in which the first round went through them."""
        return list(dict.fromkeys(cell.contestant for cell in self.cells))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def concurrencies(self) -> list[int]:
        return sorted({cell.concurrency for cell in self.cells})

    def select(self, contestant: str, model: str, concurrency: int) -> list[Cell]:
        """One cell a round, for which there is one."""
        return [c for c in self.cells if (c.contestant, c.model, c.concurrency) == (contestant, model, concurrency)]

    def fractions(self, contestant: str, model: str, concurrency: int) -> list[float]:
        """The rate over the reference's best, round by round."""
        best = {r.round: r.best_rate for r in self.references if r.model == model}
        return [c.rate / best[c.round] for c in self.select(contestant, model, concurrency) if c.round in best]

    def cpu_fractions(self, contestant: str, model: str, concurrency: int) -> list[float]:
        """The reference's least CPU time a row over the server's a request, round by round."""
        least = {r.round: r.least_cpu_us for r in self.references if r.model == model}
        return [least[c.round] / c.cpu_us for c in self.select(contestant, model, concurrency) if c.round in least and c.cpu_us]

    def ratios(self, contestant: str, baseline: str, model: str, concurrency: int) -> list[float]:
        """The rate over the baseline's, round by round."""
        rates = {c.round: c.rate for c in self.select(baseline, model, concurrency)}
        return [c.rate / rates[c.round] for c in self.select(contestant, model, concurrency) if c.round in rates]

    def cpu_ratios(self, contestant: str, baseline: str, model: str, concurrency: int) -> list[float]:
        """The baseline's CPU time a request over the contestant's, round by round."""
        used = {c.round: c.cpu_us for c in self.select(baseline, model, concurrency)}
        return [used[c.round] / c.cpu_us for c in self.select(contestant, model, concurrency) if c.round in used and c.cpu_us]


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def tables(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> list[Table]:
    """The last contestant that infers is what the others are set in proportion to."""
    made = [_rates_table(report, contestants, models, concurrencies)]
    if any(name.startswith(ECHO) for name in contestants):
        made.append(_echo_table(report, contestants, models, concurrencies))
    if report.references:
        made += [_fractions_table(report, contestants, models, concurrencies), _reference_table(report, models)]
    return made


def render(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> str:
    """The report as markdown."""
    parts: list[str] = []
    for table in tables(report, contestants, models, concurrencies):
        parts += [f"## {table.title}", "", markdown_table(table.header, table.rows), "", *([table.note, ""] if table.note else [])]
    parts += ["## Conditions", "", *(f"- {key}: {value}" for key, value in {**report.facts, **report.settings}.items())]
    parts.append(f"- noise probe (fixed work, µs): {noise_text(report.noise)}")
    parts += ["", "## Failures", "", *(f"- {failure}" for failure in report.failures)] if report.failures else []
    return "\n".join(parts) + "\n"


def summary(report: Report) -> Table:
    """One row for each model and server: its rate at every concurrency, and at the highest what a request costs and takes."""
    most = report.concurrencies[-1]
    header = ["model", "server", *(f"requests/s at {concurrency}" for concurrency in report.concurrencies)]
    header += [f"CPU-µs/request at {most}", f"p50 ms at {most}", f"p99 ms at {most}"]
    rows = []
    for model in report.models:
        for contestant in report.contestants:
            cells = [report.select(contestant, model, concurrency) for concurrency in report.concurrencies]
            rates = [_text(found, lambda cell: cell.rate) for found in cells]
            last = [
                _text(cells[-1], lambda cell: cell.cpu_us),
                _text(cells[-1], lambda cell: cell.p50 * 1e3),
                _text(cells[-1], lambda cell: cell.p99 * 1e3),
            ]
            rows.append([model, contestant, *rates, *last])
    return Table("Requests/s, median and range of the rounds", header, rows)


def _text(cells: Sequence[Cell], value: Callable[[Cell], float]) -> str:
    return Spread.of([value(cell) for cell in cells]).text() if cells else "-"


def baseline_of(contestants: Sequence[str]) -> str:
    """The last that infers; the last of all where none does."""
    return [*contestants, *(name for name in contestants if not name.startswith(ECHO))][-1]


def echoes_of(contestant: str, contestants: Sequence[str]) -> list[str]:
    """The echoes that a server is compared with: the one on the transport that its name ends with; all where it names none."""
    echoes = [name for name in contestants if name.startswith(ECHO)]
    if contestant in echoes:
        return []
    return [echo for echo in echoes if contestant.endswith(echo.removeprefix(ECHO))] or echoes


def _echo_table(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> Table:
    rows = []
    for model in models:
        for contestant in contestants:
            for echo in echoes_of(contestant, contestants):
                for quantity, ratios in (("rate", report.ratios), ("CPU time", report.cpu_ratios)):
                    cells = [ratios(contestant, echo, model, concurrency) for concurrency in concurrencies]
                    rows.append([model, contestant, echo, quantity, *(Spread.of(values).text() if values else "-" for values in cells)])
    header = ["model", "server", "of", "by", *(f"at {concurrency}" for concurrency in concurrencies)]
    return Table("Fraction of a server that infers nothing", header, rows)


def _rates_table(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> Table:
    baseline = baseline_of(contestants)
    header = ["model", "concurrent", "server", "requests/s", f"x {baseline}", "CPU-µs/request", "p50 ms", "p99 ms", "rows/batch"]
    rows = []
    for model in models:
        for concurrency in concurrencies:
            for contestant in contestants:
                ratios = report.ratios(contestant, baseline, model, concurrency)
                row = _rates_row(report.select(contestant, model, concurrency), ratios)
                rows.append([model, str(concurrency), contestant, *row])
    note = f"≥: the client used more than {CLIENT_LIMIT:.0%} of its core, so the rate is a lower bound."
    is_bounded = any(cell.client_cpu > CLIENT_LIMIT for cell in report.cells)
    return Table("Throughput, latency and CPU", [*header, "client core", "rounds"], rows, note if is_bounded else "")


def _rates_row(cells: Sequence[Cell], ratios: Sequence[float]) -> list[str]:
    if not cells:
        return ["not measured", *["-"] * 7]
    client = max(cell.client_cpu for cell in cells)
    return [
        ("≥ " if client > CLIENT_LIMIT else "") + Spread.of([cell.rate for cell in cells]).text(),
        Spread.of(ratios).text() if ratios else "-",
        Spread.of([cell.cpu_us for cell in cells]).text(),
        Spread.of([cell.p50 for cell in cells]).text(1e3),
        Spread.of([cell.p99 for cell in cells]).text(1e3),
        Spread.of([cell.rows_per_batch for cell in cells]).text() if any(cell.rows_per_batch for cell in cells) else "-",
        f"{client:.0%}",
        str(len(cells)),
    ]


def _fractions_table(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> Table:
    rows = []
    for model in models:
        for contestant in (name for name in contestants if not name.startswith(ECHO)):
            for quantity, fractions in (("rate", report.fractions), ("CPU time", report.cpu_fractions)):
                cells = [fractions(contestant, model, concurrency) for concurrency in concurrencies]
                rows.append([model, contestant, quantity, *(Spread.of(values).text() if values else "-" for values in cells)])
    header = ["model", "server", "by", *(f"at {concurrency}" for concurrency in concurrencies)]
    return Table("Fraction of ONNX Runtime alone at its best batch size", header, rows)


def _reference_table(report: Report, models: Sequence[str]) -> Table:
    sizes = sorted({rows for reference in report.references for rows in reference.speeds})
    rows = []
    for model in models:
        speeds = [reference.speeds for reference in report.references if reference.model == model]
        if speeds:
            rows.append([model, "rows/s", *(Spread.of([by_size[size].rate for by_size in speeds]).text() for size in sizes)])
            rows.append([model, "CPU-µs/row", *(Spread.of([by_size[size].cpu_us for by_size in speeds]).text() for size in sizes)])
    return Table("ONNX Runtime alone, by batch size", ["model", "", *map(str, sizes)], rows)


def noise_text(probes: Sequence[Noise]) -> str:
    medians = {core: [probe.median for probe in probes if probe.core == core] for core in sorted({probe.core for probe in probes})}
    by_core = ", ".join(f"core {core} {Spread.of(values).text(1e6)}" for core, values in medians.items()) or "none"
    return f"{by_core}; {len(noisy_probes(probes))} of {len(probes)} off by more than 10 %"


def as_json(report: Report) -> str:
    content = {"kind": KIND, **asdict(report)}
    for reference, raw in zip(report.references, content["references"], strict=True):
        raw |= {"best_rate": reference.best_rate, "least_cpu_us": reference.least_cpu_us}
    return json.dumps(content, indent=1)


def from_json(content: Mapping[str, Any]) -> Report:
    """What `as_json` wrote. Raises ValueError that names what is missing or unknown."""
    try:
        references = [
            Reference(raw["round"], raw["model"], {int(rows): Speed(**speed) for rows, speed in raw["speeds"].items()})
            for raw in content["references"]
        ]
        return Report(
            facts=dict(content["facts"]),
            settings=dict(content["settings"]),
            cells=[Cell(**raw) for raw in content["cells"]],
            references=references,
            noise=[Noise(**raw) for raw in content["noise"]],
            failures=list(content["failures"]),
            command=content.get("command", ""),
        )
    except KeyError as error:
        raise ValueError(f"a comparison needs {error.args[0]!r}, and has {', '.join(content)}") from error
    except TypeError as error:
        raise ValueError(f"not the JSON of a comparison: {error}") from error
