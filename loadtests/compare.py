"""Servers beside each other, and beside ONNX Runtime alone: one core for the server, another for the client.

    python -m loadtests.compare --model mlp --model magika=FILE.onnx --triton SCRIPT --json out.json --markdown out.md

Each round starts each server anew, with one model, and loads it at each concurrency; every second round goes through the
contestants in reverse order. A cell of the table is the median of the rounds and their range. CPU-µs a request is the CPU time
of the server's whole process tree over a run divided by its requests. Another table is about
ONNX Runtime alone at its best batch size, on the same core in the same round: the server's rate as a fraction of its rate, and its
CPU time a row as a fraction of the server's a request. Both are 1 where the server costs nothing beside the model.

With `--echo TRANSPORT` a server that infers nothing is among the contestants. It is the ceiling of the transport; another table has each
server as a fraction of it.

Read the CPU time first: it does not depend on what else the machine does. A rate does; see the noise probe below the tables.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tritonclient.utils import InferenceServerException

from loadtests.calls import WrongAnswer
from loadtests.comparison import Cell, Reference, Report, as_json, render
from loadtests.contestants import Contestant, add_contestant_arguments, add_echo_arguments, selected_contestants, selected_echoes
from loadtests.h2load import Call, EchoedCall, LoadFailed, measure_call, parse_concurrencies
from loadtests.machine import machine_facts, probe_noise
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import ServerFailed, exit_on_terminate
from loadtests.reference import measure_reference
from loadtests.statistics import abba_order

REFERENCE = Contestant("onnxruntime alone", "")


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
                EchoedCall(call) if contestant.is_echo else call,
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtests.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models_argument(parser)
    add_contestant_arguments(parser)
    add_echo_arguments(parser)
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
    contestants = [*selected_contestants(parser, arguments), *selected_echoes(arguments)]
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
    report = Report(machine_facts(), settings, command=shlex.join(["python", "-m", "loadtests.compare", *sys.argv[1:]]))
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
