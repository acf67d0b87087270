"""Servers beside each other, and beside ONNX Runtime alone: one core for the server, another for the client.

    python -m loadtests.compare --model mlp --model magika=FILE.onnx --triton SCRIPT --json out.json --markdown out.md

Each round starts each server anew, with one model, and loads it at each concurrency; every second round goes through the
contestants in reverse order. A cell of the table is the median of the rounds and their range. CPU-µs a request is the CPU time
of the server's whole process tree over a run divided by its requests. Another table is about
ONNX Runtime alone at its best batch size, on the same core in the same round: the server's rate as a fraction of its rate, and its
CPU time a row as a fraction of the server's a request. Both are 1 where the server costs nothing beside the model.

Read the CPU time first: it does not depend on what else the machine does. A rate does; see the noise probe below the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tritonclient.utils import InferenceServerException

from loadtests.calls import WrongAnswer
from loadtests.contestants import Contestant, add_contestant_arguments, selected_contestants
from loadtests.h2load import Call, LoadFailed, measure_call, parse_concurrencies
from loadtests.machine import Noise, machine_facts, noisy_probes, probe_noise
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import ServerFailed, exit_on_terminate
from loadtests.reference import Speed, measure_reference
from loadtests.statistics import Spread, abba_order, markdown_table

REFERENCE = Contestant("onnxruntime alone", "")
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


@dataclass(frozen=True, slots=True)
class Plan:
    contestants: Sequence[Contestant]
    models: dict[str, Path]
    concurrencies: list[int]
    rounds: int
    seconds: float
    server_core: int
    client_core: int
    h2load: str
    scratch: Path
    logs: Path
    start_timeout: float
    deadline: float
    """time.monotonic() after which nothing new is begun."""


class OutOfTime(Exception):
    pass


def run(plan: Plan, report: Report) -> None:
    """Fill the report round by round, so that what was measured stands also when a later round fails or the time is up."""
    calls = {model: Call.of_model(model, path) for model, path in plan.models.items()}
    for number, order in enumerate(abba_order([REFERENCE, *plan.contestants], plan.rounds)):
        report.noise += [probe_noise(plan.server_core), probe_noise(plan.client_core)]
        for model, path in plan.models.items():
            for contestant in order:
                if time.monotonic() > plan.deadline:
                    raise OutOfTime(f"round {number + 1} of {plan.rounds} was not finished in the time given")
                _progress(f"round {number + 1}/{plan.rounds}: {model}, {contestant.name}")
                if contestant is REFERENCE:
                    report.references.append(Reference(number, model, measure_reference(path, [plan.server_core])))
                else:
                    _measure(plan, report, number, contestant, calls[model])


def _measure(plan: Plan, report: Report, number: int, contestant: Contestant, call: Call) -> None:
    repository = plan.scratch / call.model
    write_repository(repository, {call.model: plan.models[call.model]})
    server = contestant.server(
        repository, call.model, cores=[plan.server_core], log=plan.logs / f"{contestant.name}-{call.model}-{number}.log"
    )
    try:
        with server:
            server.wait_ready([call.model], plan.start_timeout)
            runs = measure_call(
                server.address,
                call,
                plan.concurrencies,
                plan.seconds,
                core=plan.client_core,
                program=plan.h2load,
                server_cpu=server.cpu_seconds,
            )
    except (ServerFailed, LoadFailed, WrongAnswer, InferenceServerException) as error:
        report.failures.append(f"round {number + 1}, {contestant.name}, {call.model}: {error}")
        return
    for measured in runs:
        load = measured.load
        report.cells.append(
            Cell(
                round=number,
                contestant=contestant.name,
                model=call.model,
                concurrency=measured.concurrency,
                requests=load.requests,
                rate=load.rate,
                p50=load.p50,
                p99=load.p99,
                cpu_us=measured.cpu_seconds / load.requests * 1e6,
                rows_per_batch=measured.rows_per_batch,
                client_cpu=load.client_cpu,
            )
        )


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def render(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> str:
    """The report as markdown. The last contestant is what the others are set in proportion to."""
    parts = ["## Throughput, latency and CPU", "", _rates_table(report, contestants, models, concurrencies)]
    if any(cell.client_cpu > CLIENT_LIMIT for cell in report.cells):
        parts += ["", f"≥: the client used more than {CLIENT_LIMIT:.0%} of its core, so the rate is a lower bound."]
    if report.references:
        parts += ["", "## Fraction of ONNX Runtime alone at its best batch size", ""]
        parts += [_fractions_table(report, contestants, models, concurrencies)]
        parts += ["", "## ONNX Runtime alone, by batch size", "", _reference_table(report, models)]
    parts += ["", "## Conditions", "", *(f"- {key}: {value}" for key, value in {**report.facts, **report.settings}.items())]
    noisy = noisy_probes(report.noise)
    parts.append(f"- noise probe (fixed work, µs): {_noise_text(report.noise)}; {len(noisy)} of {len(report.noise)} off by more than 10 %")
    parts += ["", "## Failures", "", *(f"- {failure}" for failure in report.failures)] if report.failures else []
    return "\n".join(parts) + "\n"


def _rates_table(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> str:
    baseline = contestants[-1]
    header = [
        "model",
        "concurrent",
        "server",
        "requests/s",
        f"x {baseline}",
        "CPU-µs/request",
        "p50 ms",
        "p99 ms",
        "rows/batch",
    ]
    rows = []
    for model in models:
        for concurrency in concurrencies:
            for contestant in contestants:
                ratios = report.ratios(contestant, baseline, model, concurrency)
                row = _rates_row(report.select(contestant, model, concurrency), ratios)
                rows.append([model, str(concurrency), contestant, *row])
    return markdown_table([*header, "client core", "rounds"], rows)


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
        Spread.of([cell.rows_per_batch for cell in cells]).text(),
        f"{client:.0%}",
        str(len(cells)),
    ]


def _fractions_table(report: Report, contestants: Sequence[str], models: Sequence[str], concurrencies: Sequence[int]) -> str:
    rows = []
    for model in models:
        for contestant in contestants:
            for quantity, fractions in (("rate", report.fractions), ("CPU time", report.cpu_fractions)):
                cells = [fractions(contestant, model, concurrency) for concurrency in concurrencies]
                rows.append([model, contestant, quantity, *(Spread.of(values).text() if values else "-" for values in cells)])
    return markdown_table(["model", "server", "by", *(f"at {concurrency}" for concurrency in concurrencies)], rows)


def _reference_table(report: Report, models: Sequence[str]) -> str:
    sizes = sorted({rows for reference in report.references for rows in reference.speeds})
    rows = []
    for model in models:
        speeds = [reference.speeds for reference in report.references if reference.model == model]
        if speeds:
            rows.append([model, "rows/s", *(Spread.of([by_size[size].rate for by_size in speeds]).text() for size in sizes)])
            rows.append([model, "CPU-µs/row", *(Spread.of([by_size[size].cpu_us for by_size in speeds]).text() for size in sizes)])
    return markdown_table(["model", "", *map(str, sizes)], rows)


def _noise_text(probes: Sequence[Noise]) -> str:
    medians = {core: [probe.median for probe in probes if probe.core == core] for core in sorted({probe.core for probe in probes})}
    return ", ".join(f"core {core} {Spread.of(values).text(1e6)}" for core, values in medians.items()) or "none"


def as_json(report: Report) -> str:
    content = asdict(report)
    for reference, raw in zip(report.references, content["references"], strict=True):
        raw |= {"best_rate": reference.best_rate, "least_cpu_us": reference.least_cpu_us}
    return json.dumps(content, indent=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtests.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models_argument(parser)
    add_contestant_arguments(parser)
    parser.add_argument("--concurrency", type=parse_concurrencies, default=[1, 16, 64], metavar="N,N,..")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measured run (default: 3)")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=60.0,
        help="seconds a server may take to get ready; a peer that installs itself first needs more",
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further run is begun (default: 600)")
    parser.add_argument("--h2load", default="h2load", help="the program")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs here")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--markdown", type=Path, help="write the tables here as well as to stdout")
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    contestants = selected_contestants(parser, arguments)
    exit_on_terminate()
    # This process and all clients it starts keep off the server's core.
    os.sched_setaffinity(0, {arguments.client_core})
    settings: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "server core": arguments.server_core,
        "client": f"h2load on core {arguments.client_core}, at most 32 streams a connection",
        "seconds a run": arguments.seconds,
        "rounds": arguments.rounds,
    }
    report = Report(machine_facts(), settings)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(
            contestants=contestants,
            models=write_repository(Path(scratch) / "models", selected_models(parser, arguments)),
            concurrencies=arguments.concurrency,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            server_core=arguments.server_core,
            client_core=arguments.client_core,
            h2load=arguments.h2load,
            scratch=Path(scratch),
            logs=arguments.logs or Path(scratch) / "logs",
            start_timeout=arguments.start_timeout,
            deadline=time.monotonic() + arguments.budget,
        )
        try:
            run(plan, report)
        except OutOfTime as error:
            report.failures.append(str(error))
        text = render(report, [c.name for c in contestants], list(plan.models), plan.concurrencies)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(as_json(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
