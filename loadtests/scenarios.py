"""Open-loop scenarios: what users see of a server at a rate, beyond it, in bursts, beside others, while versions change, and over time.

    python -m loadtests.scenarios SCENARIO --model mlp [--model magika=FILE.onnx] [--triton SCRIPT] [--json out.json]

smoke      a server that is a quarter busy for a few seconds, and whether its p99 is shown to be within the SLO
rates      Poisson arrivals at a quarter, half and three quarters of the closed-loop rate of the same round
capacity   the highest Poisson rate at which p99 <= SLO holds with 99 % confidence, by bisection
overload   1, 1.5, 2 and 3 times the capacity, with deadlines of the SLO (--no-deadlines: without): goodput must not collapse
burst      arrivals that jump to four times their mean, at a quarter and half of the closed-loop rate
mixed      two models with two priorities each on one server, by class
swap       steady, and a new version every --every seconds, under the same load
soak       half the closed-loop rate for long; memory, threads and open files after each tenth

Each round starts each server anew, and every second round goes through them in reverse. The client runs on a core of its own. Latency
is that of right answers, from the intended time of sending. The SLO is --slo-ms, or ten times what one call alone takes (median) on
the first server. A run whose client was late is marked `no` under `valid`: it says nothing about the server.
Exit code 1 when an answer was wrong, a call failed (refused and late ones have not), or a server did.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tritonclient.utils import InferenceServerException

from loadtests.arrivals import Times, bursts, poisson
from loadtests.cancel_storm import Footprint
from loadtests.contestants import Contestant, add_contestant_arguments, selected_contestants
from loadtests.encoded_calls import EncodedCall, encode_calls, with_timeout
from loadtests.machine import machine_facts, probe_noise
from loadtests.models import MLP, add_models_argument, make_mlp, parse_models, selected_models, write_repository
from loadtests.open_loop import Kinds, alternate, run_closed_loop, run_open_loop
from loadtests.process import ServerFailed, ServerProcess, exit_on_terminate
from loadtests.scenario_report import Report, Run, Sample, judge_samples, render
from loadtests.service_level import Results, count, most_misses
from loadtests.statistics import abba_order
from loadtests.swap_load import SwapLoad
from loadtests.wire_client import Client, ConnectFailed

CONCURRENT = 64
"""Calls of the closed loop whose rate is called the closed-loop rate."""
FRACTIONS = (0.25, 0.5, 0.75)
OVERLOADS = (1.0, 1.5, 2.0, 3.0)
ENOUGH = 850
"""Requests at least in a run that is to show a p99: with that many, two may miss."""
LONGEST = 60.0
"""Seconds that a run is made longer to for that."""
SLO_FACTOR = 10.0
NEAR = 0.05
"""How far apart two rates are at the end of a bisection, as a part of the higher one."""
PRIORITIES = (1, 2)
PARTS = 10
"""Of a soak."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contestant, and the model.toml that its models are served with."""

    contestant: Contestant
    settings: str = ""

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def takes_repositories(self) -> bool:
        """Otherwise it serves one model, and what is written beside it does not concern it."""
        return "{repository}" in self.contestant.command


@dataclass(frozen=True, slots=True)
class Plan:
    entrants: Sequence[Entrant]
    models: dict[str, Path]
    rounds: int
    seconds: float
    closed_seconds: float
    slo: float | None
    rate: float | None
    has_deadlines: bool
    grace: float
    every: float
    connections: int
    server_cores: Sequence[int]
    client_core: int
    spare_cores: Sequence[int]
    """For a publisher: neither the server's nor the client's, where there are others."""
    seed: int
    scratch: Path
    logs: Path
    start_timeout: float
    deadline: float
    """time.monotonic() after which nothing new is begun."""


class OutOfTime(Exception):
    pass


@dataclass(slots=True)
class Bench:
    """One contestant's server in one round with a client connected to it, and where its runs are entered."""

    plan: Plan
    report: Report
    scenario: str
    number: int
    entrant: Entrant
    server: ServerProcess
    client: Client
    calls: dict[str, list[EncodedCall]]
    seeds: int = 0

    @property
    def model(self) -> str:
        return next(iter(self.calls))

    def seed(self) -> int:
        """Another one for each run of a round, and the same ones for every contestant."""
        self.seeds += 1
        return self.plan.seed + 1000 * self.number + self.seeds

    def slo(self, model: str) -> float:
        return self.report.slos[model]

    def closed_rate(self, model: str) -> float:
        """Right answers a second with CONCURRENT calls under way."""
        results = run_closed_loop(self.client, self.calls[model], CONCURRENT, self.plan.closed_seconds)
        self.check(results, f"{model}, closed loop")
        return count(results, None).ok / self.plan.closed_seconds

    def seconds_for(self, rate: float) -> float:
        return max(self.plan.seconds, min(LONGEST, ENOUGH / max(rate, 1e-9)))

    def check(self, results: Results, text: str) -> None:
        """Enter what must not be."""
        name = f"round {self.number + 1}, {self.scenario}, {self.entrant.name}, {text}"
        self.report.check(name, results)
        self.report.failures += [f"{name}: {times} connections closed: {reason}" for reason, times in self.client.goodbyes.items()]
        self.client.goodbyes.clear()

    def offer(
        self, model: str, times: Times, rate: float, *, arrivals: str, seconds: float, timeout: float | None = None, is_probe: bool = False
    ) -> Run:
        """One open-loop run with one model's calls, not entered yet. A probe ends when its p99 cannot be shown any more."""
        if time.monotonic() > self.plan.deadline:
            raise OutOfTime(f"round {self.number + 1} of {self.plan.rounds} was not finished in the time given")
        calls, used = with_timeout(self.calls[model], timeout), self.server.cpu_seconds()
        kinds = alternate(len(times), len(calls))
        bound = (self.slo(model), max(0, most_misses(len(times)))) if is_probe else None
        results = run_open_loop(self.client, calls, times, kinds, seconds, grace=self.plan.grace, bound=bound)
        used = self.server.cpu_seconds() - used
        self.check(results, f"{model} at {rate:.0f}/s")
        return self.run_of(results, model, rate, arrivals, used)

    def run_of(self, results: Results, model: str, rate: float, arrivals: str, used: float, slo: float | None = None) -> Run:
        return Run.of(
            results,
            scenario=self.scenario,
            contestant=self.entrant.name,
            model=model,
            round=self.number,
            offered_rate=rate,
            arrivals=arrivals,
            slo=slo or self.report.slos.get(model),
            cpu_seconds=used,
        )

    def poisson(self, model: str, rate: float, seconds: float, *, timeout: float | None = None, is_probe: bool = False) -> Run:
        times = poisson(rate, seconds, self.seed())
        return self.offer(model, times, rate, arrivals="poisson", seconds=seconds, timeout=timeout, is_probe=is_probe)

    def enter(self, run: Run) -> None:
        self.report.runs.append(run)


# -- the scenarios -----------------------------------------------------------------------------------------------------


def smoke(bench: Bench) -> None:
    rate = bench.closed_rate(bench.model) * FRACTIONS[0]
    bench.enter(bench.poisson(bench.model, rate, bench.seconds_for(rate)))


def rates(bench: Bench) -> None:
    closed = bench.closed_rate(bench.model)
    for fraction in FRACTIONS:
        bench.enter(bench.poisson(bench.model, closed * fraction, bench.seconds_for(closed * fraction)))


@dataclass(frozen=True, slots=True)
class Bracket:
    """Between a rate that held (0 at first) and one that did not."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def is_narrow(self) -> bool:
        return self.high - self.low <= NEAR * self.high

    def narrowed(self, holds: bool) -> Bracket:
        return Bracket(self.middle, self.high) if holds else Bracket(self.low, self.middle)


def capacity(bench: Bench) -> Run | None:
    """The run at the highest rate that held; None where none did. Those on the way are entered as `capacity probe`."""
    closed = bench.closed_rate(bench.model)
    bracket, best, invalid = Bracket(0.0, 1.2 * closed), None, 0
    while not bracket.is_narrow and bracket.high > NEAR * closed:
        rate = bracket.middle
        run = bench.poisson(bench.model, rate, bench.seconds_for(rate), is_probe=True)
        bench.enter(replace(run, scenario="capacity probe"))
        holds = run.valid and run.is_slo_shown
        best = run if holds else best
        invalid += not run.valid
        bracket = bracket.narrowed(holds)
    if best is None:
        name = f"round {bench.number + 1}, {bench.entrant.name}, {bench.model}"
        text = f"no rate was shown to keep p99 within {bench.slo(bench.model) * 1e3:.3g} ms"
        bench.report.failures.append(f"{name}: {text}; the client was late in {invalid} of the runs")
    return best


def enter_capacity(bench: Bench) -> None:
    if (best := capacity(bench)) is not None:
        bench.enter(replace(best, scenario="capacity"))


def overload(bench: Bench) -> None:
    knee = bench.plan.rate
    if knee is None:
        best = capacity(bench)
        if best is None:
            return
        knee = best.offered_rate
    timeout = bench.slo(bench.model) if bench.plan.has_deadlines else None
    for factor in OVERLOADS:
        bench.enter(bench.poisson(bench.model, knee * factor, bench.plan.seconds, timeout=timeout))


def burst(bench: Bench) -> None:
    closed = bench.closed_rate(bench.model)
    for fraction in FRACTIONS[:2]:
        rate = closed * fraction
        seconds = bench.seconds_for(rate)
        times = bursts(rate, seconds, bench.seed())
        # Bursts are few in a run: what it offers can be far from the mean.
        bench.enter(bench.offer(bench.model, times, len(times) / seconds, arrivals="bursts", seconds=seconds))


def mixed(bench: Bench) -> None:
    """Each model has two fifths of its closed-loop rate, half of it at each priority."""
    plan = bench.plan
    closed = {model: bench.closed_rate(model) for model in bench.calls}
    seconds = max(bench.seconds_for(0.2 * rate) for rate in closed.values())
    parts: list[tuple[Times, Kinds, Kinds]] = []
    calls: list[EncodedCall] = []
    classes: list[tuple[str, int, float]] = []
    for model, path in plan.models.items():
        for priority in PRIORITIES:
            rate = 0.2 * closed[model]
            times = poisson(rate, seconds, bench.seed())
            prepared = encode_calls(model, path, seed=plan.seed, priority=priority)
            parts.append((times, len(calls) + alternate(len(times), len(prepared)), np.full(len(times), len(classes))))
            calls += prepared
            classes.append((model, priority, rate))
    times, kinds, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(times, kind="stable")
    used = bench.server.cpu_seconds()
    results = run_open_loop(bench.client, calls, times[order], kinds[order], seconds)
    used = bench.server.cpu_seconds() - used
    bench.check(results, "all classes")
    for index, (model, priority, rate) in enumerate(classes):
        chosen = labels[order] == index
        share = used * float(chosen.mean())  # of the process; what each class costs by itself is not known
        name = f"{model}, priority {priority}"
        bench.enter(bench.run_of(results.select(chosen), name, rate, "poisson", share, bench.slo(model)))


def soak(bench: Bench) -> None:
    rate = bench.closed_rate(bench.model) * FRACTIONS[1]
    part = bench.plan.seconds / PARTS
    samples = []
    for number in range(1, PARTS + 1):
        bench.enter(bench.poisson(bench.model, rate, part))
        samples.append(Sample(bench.entrant.name, bench.model, bench.number, number * part, Footprint.of(bench.server)))
    bench.report.samples += samples
    bench.report.failures += judge_samples(samples)


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "smoke": smoke,
    "rates": rates,
    "capacity": enter_capacity,
    "overload": overload,
    "burst": burst,
    "mixed": mixed,
    "soak": soak,
}
TOGETHER = ("mixed",)
"""Take all models on one server; the others one after another."""


# -- rounds ------------------------------------------------------------------------------------------------------------


def lay_out(scratch: Path, entrant: Entrant, models: dict[str, Path], *, levels: int = 0) -> Path:
    """A repository for this contestant alone, since its model.toml is its own."""
    repository = scratch / f"{entrant.name}-{'-'.join(models)}"
    write_repository(repository, models)
    text = entrant.settings + (f"priority_levels = {levels}\n" if levels else "")
    for model in models:
        if text:
            (repository / model / "model.toml").write_text(text)
    return repository


def run_scenario(plan: Plan, report: Report, scenario: str) -> None:
    """Fill the report round by round, so that what was measured stands also when a later round fails or the time is up."""
    for number, order in enumerate(abba_order(plan.entrants, plan.rounds)):
        report.noise += [probe_noise(core) for core in (*plan.server_cores, plan.client_core)]
        groups = [plan.models] if scenario in TOGETHER else [{model: path} for model, path in plan.models.items()]
        for models in groups:
            for entrant in order:
                if time.monotonic() > plan.deadline:
                    raise OutOfTime(f"round {number + 1} of {plan.rounds} was not finished in the time given")
                text = f"round {number + 1}/{plan.rounds}: {scenario}, {', '.join(models)}, {entrant.name}"
                print(text, file=sys.stderr, flush=True)
                _run_one(plan, report, scenario, number, entrant, models)


def _run_one(plan: Plan, report: Report, scenario: str, number: int, entrant: Entrant, models: dict[str, Path]) -> None:
    calls = {model: encode_calls(model, path, seed=plan.seed) for model, path in models.items()}
    log = plan.logs / f"{scenario}-{entrant.name}-{'-'.join(models)}-{number}.log"
    try:
        if scenario == "swap":
            _run_swap(plan, report, number, entrant, models, log)
            return
        repository = lay_out(plan.scratch, entrant, models, levels=len(PRIORITIES) if scenario in TOGETHER else 0)
        with entrant.contestant.server(repository, next(iter(models)), cores=plan.server_cores, log=log) as server:
            server.wait_ready([*models], plan.start_timeout)
            with Client(server.address, plan.connections) as client:
                bench = Bench(plan, report, scenario, number, entrant, server, client, calls)
                _warm_up(bench)
                SCENARIOS[scenario](bench)
    except (ServerFailed, ConnectFailed, InferenceServerException) as error:
        report.failures.append(f"round {number + 1}, {scenario}, {entrant.name}: {error}")


def _warm_up(bench: Bench) -> None:
    """And what the SLO of each model is, where that is not known yet."""
    for model, calls in bench.calls.items():
        run_closed_loop(bench.client, calls, CONCURRENT, 0.3)
        alone = run_closed_loop(bench.client, calls, 1, 0.5)
        bench.check(alone, f"{model}, one at a time")
        if model not in bench.report.slos and len(alone.latencies):
            bench.report.slos[model] = bench.plan.slo or SLO_FACTOR * float(np.median(alone.latencies))


def _run_swap(plan: Plan, report: Report, number: int, entrant: Entrant, models: dict[str, Path], log: Path) -> None:
    """The same load twice, on a server that watches its repository: first steady, then with new versions."""
    ((model, path),) = models.items()
    contestant = Contestant(entrant.name, f"{entrant.contestant.command} --model-control watch")
    load = SwapLoad.prepare(model, path, plan.scratch / f"swap-{entrant.name}-{model}-{number}", plan.seed, entrant.settings)
    with contestant.server(load.repository, model, cores=plan.server_cores, log=log) as server:
        server.wait_ready([model], plan.start_timeout)
        with Client(server.address, plan.connections) as client:
            bench = Bench(plan, report, "swap", number, entrant, server, client, {model: load.calls})
            _warm_up(bench)
            rate = bench.closed_rate(model) * FRACTIONS[1]
            bench.enter(replace(bench.poisson(model, rate, plan.seconds), scenario="swap, steady"))
            swaps = max(1, int(plan.seconds / plan.every))
            with load.publishing(swaps, plan.every, plan.spare_cores):
                bench.enter(bench.poisson(model, rate, plan.seconds))
            if (last := load.ask_newest(client)) is not None:
                bench.check(last, f"{model}, after the last version")
            text = f"round {number + 1}, swap, {entrant.name}, {model}"
            report.failures += [f"{text}: {failure}" for failure in load.judge()]
            report.notes.append(f"{text}: {load.summary()}")


# -- the program -------------------------------------------------------------------------------------------------------


def fixed_setting(text: str) -> tuple[int, float]:
    """`ROWS:MS`."""
    rows, _, delay = text.partition(":")
    try:
        if int(rows) < 1 or float(delay or 0) < 0:
            raise ValueError
        return int(rows), float(delay or 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWS or ROWS:MILLISECONDS") from None


def entrants_of(contestants: Sequence[Contestant], fixed: Sequence[tuple[int, float]]) -> list[Entrant]:
    """With fixed settings the first contestant takes part once more for each. They come next to it, so that Triton stays last."""
    entrants = [Entrant(contestant) for contestant in contestants]
    for rows, delay in reversed(fixed):
        named = Contestant(f"{contestants[0].name}-{rows}x{delay:g}ms", contestants[0].command)
        entrants.insert(1, Entrant(named, f"max_batch_size = {rows}\nmax_queue_delay_ms = {delay:g}\n"))
    return entrants


def _parser() -> argparse.ArgumentParser:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.scenarios", description=description, formatter_class=formatter)
    parser.add_argument("scenario", choices=[*SCENARIOS, "swap"])
    add_models_argument(parser)
    add_contestant_arguments(parser)
    parser.add_argument(
        "--fixed",
        action="append",
        default=[],
        type=fixed_setting,
        metavar="ROWS:MS",
        help="the first server once more with this max_batch_size and max_queue_delay, repeatable",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=None, help="of each run (default: 5; soak 300, swap 20)")
    parser.add_argument("--closed-seconds", type=float, default=1.5, help="of the closed loop before (default: 1.5)")
    parser.add_argument("--slo-ms", type=float, help="(default: ten times what a call alone takes on the first server)")
    parser.add_argument("--rate", type=float, help="overload: the capacity, instead of looking for it")
    parser.add_argument("--no-deadlines", action="store_true", help="overload: do not tell the server how long its clients wait")
    parser.add_argument("--grace-ms", type=float, default=0.0, help="after its deadline until the client cancels a call (default: 0)")
    parser.add_argument("--every", type=float, default=1.0, help="swap: seconds between versions (default: 1)")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--server-cores", type=parse_cores, default=[0], metavar="N,N")
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-timeout", type=float, default=60.0, help="seconds a server may take to get ready")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds after which no further run is begun (default: 900)")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs here")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    return parser


def parse_cores(text: str) -> list[int]:
    return [int(core) for core in text.split(",")]


def selected_pair(parser: argparse.ArgumentParser, arguments: argparse.Namespace, scratch: Path) -> dict[str, Path | None]:
    """The models; for `mixed` at least two, of which the second is another generated one where only one was given."""
    models = selected_models(parser, arguments)
    if arguments.scenario in TOGETHER and len(models) == 1:
        other = scratch / "other.onnx"
        other.write_bytes(make_mlp(seed=7, widths=(64, 512, 512, 16)).SerializeToString())
        models |= parse_models([f"{MLP}_wide={other}"])
    return models


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, entrants: Sequence[Entrant]) -> list[Entrant]:
    """Those that can take part; wrong use ends the program."""
    cores = {*arguments.server_cores, arguments.client_core}
    if missing := cores - os.sched_getaffinity(0):
        parser.error(f"cores {sorted(missing)}: expected some of {sorted(os.sched_getaffinity(0))}")
    if arguments.rounds < 1 or (arguments.seconds is not None and arguments.seconds <= 0):
        parser.error(f"expected at least one round and seconds > 0, got {arguments.rounds} and {arguments.seconds}")
    if arguments.scenario not in (*TOGETHER, "swap"):
        return [*entrants]
    able = [entrant for entrant in entrants if entrant.takes_repositories]
    if not able:
        parser.error(f"{arguments.scenario}: expected a server that takes a repository of models, got {[e.name for e in entrants]}")
    return able


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    entrants = _check(parser, arguments, entrants_of(selected_contestants(parser, arguments), arguments.fixed))
    seconds = arguments.seconds or {"soak": 300.0, "swap": 20.0}.get(arguments.scenario, 5.0)
    exit_on_terminate()
    spare = os.sched_getaffinity(0) - {arguments.client_core, *arguments.server_cores}
    os.sched_setaffinity(0, {arguments.client_core})
    settings: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "scenario": arguments.scenario,
        "server cores": ",".join(map(str, arguments.server_cores)),
        "client": f"core {arguments.client_core}, {arguments.connections} connections",
        "seconds a run": seconds,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "deadlines": not arguments.no_deadlines,
    }
    report = Report(machine_facts(), settings)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plan = Plan(
            entrants=entrants,
            models=write_repository(scratch / "models", selected_pair(parser, arguments, scratch)),
            rounds=arguments.rounds,
            seconds=seconds,
            closed_seconds=arguments.closed_seconds,
            slo=None if arguments.slo_ms is None else arguments.slo_ms / 1e3,
            rate=arguments.rate,
            has_deadlines=not arguments.no_deadlines,
            grace=arguments.grace_ms / 1e3,
            every=arguments.every,
            connections=arguments.connections,
            server_cores=arguments.server_cores,
            client_core=arguments.client_core,
            spare_cores=sorted(spare) or [arguments.client_core],
            seed=arguments.seed,
            scratch=scratch,
            logs=arguments.logs or scratch / "logs",
            start_timeout=arguments.start_timeout,
            deadline=time.monotonic() + arguments.budget,
        )
        try:
            run_scenario(plan, report, arguments.scenario)
        except OutOfTime as error:
            report.failures.append(str(error))
    print(render(report))
    if arguments.json:
        arguments.json.write_text(report.as_json() + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
