"""How large tensors come and go: 602 kB in and out by TCP, by a Unix socket and by shared memory, beside an echo of the same size.

    python -m loadtests.large_tensors [--transport native] [--rounds 5] [--seconds 2] [--json out.json] [--markdown out.md]

The model gives back its input, [1,3,224,224] FP32, so that nothing is measured but the moving of bytes. The echo (`loadtests.echo`)
answers with the tensors of the request and has no model, no queue and no statistics: it is what the transport alone costs. For shared
memory it gets the same small message, whose tensors are elsewhere, so there it is the transport alone and moves no tensor at all.

In each round all servers run on one core, where idle ones take nothing, and are loaded one after the other by h2load on another
core, at each concurrency; every second round goes through them in reverse. All calls in flight share one input and one place for
the output, as perf_analyzer has it. Answers are compared with the input before and after, in shared memory after every run.
MB are those of the tensors, in and out together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from loadtests.calls import Array, WrongAnswer, grpc_frame, infer_inputs, infer_message
from loadtests.h2load import H2Load, LoadFailed, LoadRun, parse_concurrencies
from loadtests.machine import Noise, machine_facts, noisy_probes, probe_noise
from loadtests.models import make_identity, write_repository
from loadtests.process import ServerFailed, ServerProcess, exit_on_terminate, free_port
from loadtests.statistics import Spread, abba_order, markdown_table

MODEL = "identity"
SHAPE = (1, 3, 224, 224)
BYTES = 4 * int(np.prod(SHAPE))
MEGABYTES = 2 * BYTES / 1e6
"""A request moves it in and out."""

SERVER = "headrace"
ECHO = "echo"
TCP, UNIX, SHARED_MEMORY = "TCP", "Unix socket", "shared memory"
ROUTES = (TCP, UNIX, SHARED_MEMORY)
REGION = "tensors"
CLIENT_LIMIT = 0.85
"""From there on the client's core decides the rate."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One server, one route, one concurrency, one round. Latencies in seconds."""

    round: int
    server: str
    route: str
    concurrency: int
    requests: int
    rate: float
    p50: float
    p99: float
    server_cpu_us: float
    client_cpu_us: float
    client_core: float
    """Part of its core that the client used."""


@dataclass(slots=True)
class Report:
    facts: dict[str, str]
    settings: dict[str, object]
    cells: list[Cell] = field(default_factory=list)
    noise: list[Noise] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def select(self, server: str, route: str, concurrency: int) -> list[Cell]:
        return [c for c in self.cells if (c.server, c.route, c.concurrency) == (server, route, concurrency)]

    def ratios(self, route: str, concurrency: int) -> list[float]:
        """The server's rate over the echo's, round by round."""
        echo = {cell.round: cell.rate for cell in self.select(ECHO, route, concurrency)}
        return [cell.rate / echo[cell.round] for cell in self.select(SERVER, route, concurrency) if cell.round in echo]


def placed_message() -> bytes:
    """A request whose input is at the start of the region, and whose output goes behind it."""
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    x, y = request.inputs.add(name="x", datatype="FP32", shape=SHAPE), request.outputs.add(name="y")
    for tensor, offset in ((x, 0), (y, BYTES)):
        tensor.parameters["shared_memory_region"].string_param = REGION
        tensor.parameters["shared_memory_byte_size"].int64_param = BYTES
        tensor.parameters["shared_memory_offset"].int64_param = offset
    return bytes(request.SerializeToString())


def make_tensor() -> Array:
    return np.random.default_rng(1).uniform(-1.0, 1.0, SHAPE).astype(np.float32)


class Memory:
    """The region that input and output are in. Removed on leaving the `with` block."""

    def __init__(self, tensor: Array) -> None:
        self._tensor = tensor
        self.key = f"headrace_large_tensors_{os.getpid()}"
        self._handle = shm.create_shared_memory_region(REGION, self.key, 2 * BYTES, create_only=True)
        shm.set_shared_memory_region(self._handle, [tensor])

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        shm.destroy_shared_memory_region(self._handle)

    def clear_output(self) -> None:
        shm.set_shared_memory_region(self._handle, [np.zeros_like(self._tensor)], offset=BYTES)

    def check_output(self) -> None:
        if not np.array_equal(shm.get_contents_as_numpy(self._handle, np.float32, SHAPE, offset=BYTES), self._tensor):
            raise WrongAnswer("shared memory: expected the output to be the input, it is not")


def check_sent(address: str, tensor: Array) -> None:
    """Whether the one output is the input: `y` of the server's, `x` of the echo's."""
    with triton.InferenceServerClient(address) as client:
        result = client.infer(MODEL, infer_inputs({"x": tensor}), client_timeout=30.0)
    (output,) = result.get_response().outputs
    if not np.array_equal(result.as_numpy(output.name), tensor):
        raise WrongAnswer(f"{address}: expected output '{output.name}' to be the input, it is not")


@dataclass(frozen=True, slots=True)
class Plan:
    transport: str
    concurrencies: Sequence[int]
    rounds: int
    seconds: float
    server_core: int
    client_core: int
    h2load: str
    scratch: Path
    deadline: float
    """time.monotonic() after which nothing new is begun."""


@dataclass(frozen=True, slots=True)
class Target:
    """One server by one route; `process` has it at another address, where it says whether it is ready."""

    server: str
    route: str
    address: str
    process: ServerProcess


class OutOfTime(Exception):
    pass


@contextmanager
def running(plan: Plan, memory: Memory) -> Iterator[list[Target]]:
    """The server, which has all routes, and an echo for each kind of socket."""
    port, echo_port = free_port(), free_port()
    socket, echo_socket = f"unix:{plan.scratch}/s", f"unix:{plan.scratch}/e"
    serve = [sys.executable, "-m", "headrace.cli", "serve", "--models", str(plan.scratch / "models"), "--http", ""]
    serve += ["--grpc", f"127.0.0.1:{port}", socket, "--transport", plan.transport, "--client-shared-memory"]
    echo = [sys.executable, "-m", "loadtests.echo", plan.transport, "--mode", "tensor", "--address"]
    commands = {
        f"127.0.0.1:{port}": serve,
        f"127.0.0.1:{echo_port}": [*echo, f"127.0.0.1:{echo_port}"],
        echo_socket: [*echo, echo_socket],
    }
    with ExitStack() as stack:
        processes = [
            stack.enter_context(ServerProcess(command, address=address, cores=[plan.server_core], log=plan.scratch / f"{number}.log"))
            for number, (address, command) in enumerate(commands.items())
        ]
        for process in processes:
            process.wait_ready([MODEL])
        server, echo_tcp, echo_unix = processes
        with triton.InferenceServerClient(server.address) as client:
            client.register_system_shared_memory(REGION, memory.key, 2 * BYTES)
        yield [
            Target(SERVER, TCP, server.address, server),
            Target(ECHO, TCP, echo_tcp.address, echo_tcp),
            Target(SERVER, UNIX, socket, server),
            Target(ECHO, UNIX, echo_socket, echo_unix),
            Target(SERVER, SHARED_MEMORY, server.address, server),
            Target(ECHO, SHARED_MEMORY, echo_tcp.address, echo_tcp),
        ]


def run(plan: Plan, report: Report) -> None:
    """Fill the report round by round, so that what was measured stands also when a later round fails or the time is up."""
    tensor = make_tensor()
    sent, placed = plan.scratch / "sent", plan.scratch / "placed"
    sent.write_bytes(grpc_frame(infer_message(MODEL, {"x": tensor})))
    placed.write_bytes(grpc_frame(placed_message()))
    for number in range(plan.rounds):
        report.noise += [probe_noise(plan.server_core), probe_noise(plan.client_core)]
        with Memory(tensor) as memory, running(plan, memory) as targets:
            check_all(targets, tensor)
            for concurrency in plan.concurrencies:
                for target in abba_order(targets, plan.rounds)[number]:
                    if time.monotonic() > plan.deadline:
                        raise OutOfTime(f"round {number + 1} of {plan.rounds} was not finished in the time given")
                    print(f"round {number + 1}/{plan.rounds}: {target.server}, {target.route}, {concurrency}", file=sys.stderr, flush=True)
                    body = placed if target.route == SHARED_MEMORY else sent
                    report.cells.append(measure(plan, number, target, body, memory, concurrency))
            check_all(targets, tensor)


def check_all(targets: Sequence[Target], tensor: Array) -> None:
    for target in targets:
        if target.route != SHARED_MEMORY:
            check_sent(target.address, tensor)


def measure(plan: Plan, number: int, target: Target, body: Path, memory: Memory, concurrency: int) -> Cell:
    generator = H2Load(target.address, body, core=plan.client_core, program=plan.h2load)
    rate = generator.warm_up(concurrency, min(0.5, plan.seconds))
    response_bytes = generator.response_bytes()
    memory.clear_output()
    used = target.process.cpu_seconds()
    load = generator.measure(concurrency, rate, plan.seconds, response_bytes)
    used = target.process.cpu_seconds() - used
    if (target.server, target.route) == (SERVER, SHARED_MEMORY):
        memory.check_output()
    return as_cell(number, target, concurrency, load, used)


def as_cell(number: int, target: Target, concurrency: int, load: LoadRun, used: float) -> Cell:
    return Cell(
        round=number,
        server=target.server,
        route=target.route,
        concurrency=concurrency,
        requests=load.requests,
        rate=load.rate,
        p50=load.p50,
        p99=load.p99,
        server_cpu_us=used / load.requests * 1e6,
        client_cpu_us=load.client_cpu * load.seconds / load.requests * 1e6,
        client_core=load.client_cpu,
    )


def render(report: Report, concurrencies: Sequence[int]) -> str:
    header = ["route", "concurrent", "server", "requests/s", "x echo", "p50 ms", "p99 ms", "CPU-µs/request", "CPU-µs/MB"]
    header += ["client's CPU-µs/request", "client's CPU-µs/MB", "client core", "rounds"]
    rows = [
        [route, str(concurrency), server, *_row(report, server, route, concurrency)]
        for route in ROUTES
        for concurrency in concurrencies
        for server in (SERVER, ECHO)
    ]
    parts = [f"## {BYTES} bytes in and out", "", markdown_table(header, rows), ""]
    parts += ["The echo beside shared memory is the transport alone: it gets the same small message and moves no tensor."]
    if any(cell.client_core > CLIENT_LIMIT for cell in report.cells):
        parts.append(f"≥: the client used more than {CLIENT_LIMIT:.0%} of its core, so the rate is a lower bound.")
    noisy = noisy_probes(report.noise)
    parts += ["", "## Conditions", "", *(f"- {key}: {value}" for key, value in {**report.facts, **report.settings}.items())]
    parts.append(f"- noise probe: {len(noisy)} of {len(report.noise)} off by more than 10 %")
    parts += ["", "## Failures", "", *(f"- {failure}" for failure in report.failures)] if report.failures else []
    return "\n".join(parts) + "\n"


def _row(report: Report, server: str, route: str, concurrency: int) -> list[str]:
    cells = report.select(server, route, concurrency)
    if not cells:
        return ["not measured", *["-"] * 9]
    ratios = report.ratios(route, concurrency) if server == SERVER else []
    client = max(cell.client_core for cell in cells)
    moves = (server, route) != (ECHO, SHARED_MEMORY)
    server_cpu, client_cpu = [c.server_cpu_us for c in cells], [c.client_cpu_us for c in cells]
    return [
        ("≥ " if client > CLIENT_LIMIT else "") + Spread.of([cell.rate for cell in cells]).text(),
        Spread.of(ratios).text() if ratios else "-",
        Spread.of([cell.p50 for cell in cells]).text(1e3),
        Spread.of([cell.p99 for cell in cells]).text(1e3),
        Spread.of(server_cpu).text(),
        Spread.of(server_cpu).text(1 / MEGABYTES) if moves else "-",
        Spread.of(client_cpu).text(),
        Spread.of(client_cpu).text(1 / MEGABYTES) if moves else "-",
        f"{client:.0%}",
        str(len(cells)),
    ]


def as_json(report: Report) -> str:
    content: dict[str, Any] = {"kind": "large_tensors", **asdict(report)}
    return json.dumps(content, indent=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loadtests.large_tensors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", choices=["native", "grpcio"], default="native")
    parser.add_argument("--concurrency", type=parse_concurrencies, default=[1, 4, 8], metavar="N,N,..")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measured run (default: 2)")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further run is begun (default: 600)")
    parser.add_argument("--h2load", default="h2load", help="the program")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--markdown", type=Path, help="write the tables here as well as to stdout")
    return parser


def main() -> int:
    arguments = _parser().parse_args()
    exit_on_terminate()
    os.sched_setaffinity(0, {arguments.client_core})
    settings: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "transport": arguments.transport,
        "cores": f"servers on {arguments.server_core}, h2load on {arguments.client_core}",
        "seconds a run": arguments.seconds,
        "rounds": arguments.rounds,
    }
    report = Report(machine_facts(), settings)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "identity.onnx"
        model.write_bytes(make_identity(SHAPE).SerializeToString())
        write_repository(Path(scratch) / "models", {MODEL: model})
        plan = Plan(
            transport=arguments.transport,
            concurrencies=arguments.concurrency,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            server_core=arguments.server_core,
            client_core=arguments.client_core,
            h2load=arguments.h2load,
            scratch=Path(scratch),
            deadline=time.monotonic() + arguments.budget,
        )
        try:
            run(plan, report)
        except (OutOfTime, ServerFailed, LoadFailed, WrongAnswer, InferenceServerException) as error:
            report.failures.append(str(error))
    text = render(report, plan.concurrencies)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(as_json(report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
