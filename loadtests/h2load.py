"""Load from h2load, the C load generator of nghttp2 (Debian: nghttp2-client), which costs a tenth of what a Python client does.

    python -m loadtests.h2load HOST:PORT --model NAME=FILE.onnx [--concurrency 1,16,64] [--seconds 3] [--core 1]

The load is a closed loop: as many calls in flight as the concurrency says. They are spread over few connections with many
streams, as gRPC clients do: one channel is one connection, and takes any number of calls; here one for every 32 calls.

A run has a number of requests, found from the rate of the warm-up, and not a duration: a run that ends by the clock
drops the calls that are in flight, which crashed the Triton 2.x peer and makes request and byte counts differ.

h2load does not see gRPC trailers. So the same call is made with tritonclient before and after a run and its outputs compared
with the model's, and each response in the run must have the byte count of a right one: an error status has no body.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from loadtests.calls import (
    INFER_PATH,
    Arrays,
    BatchCount,
    check_answer,
    count_batches,
    grpc_frame,
    infer_inputs,
    infer_message,
    open_session,
    right_answer,
    sample_inputs,
)
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import pinned
from loadtests.statistics import markdown_table, percentile

CALLS_PER_CONNECTION = 32


class LoadFailed(Exception):
    """h2load could not run, or saw something else than right answers."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What h2load prints at the end. Bytes are those of response bodies, with gRPC's five-byte prefixes."""

    seconds: float
    total: int
    succeeded: int
    status_2xx: int
    body_bytes: int


@dataclass(frozen=True, slots=True)
class LoadRun:
    """One measured run. Latencies are from the send of a request to the end of its trailers, in seconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    client_cpu: float
    """Part of its core that h2load used; near 1 the client is the limit and the rate a lower bound."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_summary(text: str) -> Summary:
    """Raises LoadFailed when a line is missing: h2load says so little about what went wrong that the whole text is shown."""
    finished = re.search(r"finished in ([\d.]+)(us|ms|s|m|h)\b", text)
    requests = re.search(r"requests: (\d+) total, \d+ started, \d+ done, (\d+) succeeded", text)
    codes = re.search(r"status codes: (\d+) 2xx", text)
    traffic = re.search(r"\((\d+)\) data", text)
    if not (finished and requests and codes and traffic):
        raise LoadFailed(f"expected h2load's summary, got:\n{text}")
    return Summary(float(finished[1]) * _UNITS[finished[2]], int(requests[1]), int(requests[2]), int(codes[1]), int(traffic[1]))


def check_summary(summary: Summary, response_bytes: int) -> None:
    """Every request answered with 2xx and a body of `response_bytes`, or LoadFailed."""
    if summary.succeeded != summary.total or summary.status_2xx != summary.total:
        raise LoadFailed(f"{summary.total} requests: {summary.succeeded} succeeded, {summary.status_2xx} with status 2xx; expected all")
    if summary.body_bytes != summary.total * response_bytes:
        raise LoadFailed(
            f"{summary.total} responses: expected {response_bytes} bytes each, got {summary.body_bytes} together "
            f"({summary.body_bytes / max(1, summary.total):.1f} each): some were errors"
        )


def spread_calls(concurrency: int, calls_per_connection: int = CALLS_PER_CONNECTION) -> tuple[int, int]:
    """Connections and streams on each. Raises ValueError where they do not multiply to the concurrency."""
    connections = math.ceil(concurrency / calls_per_connection)
    if concurrency % connections:
        raise ValueError(
            f"concurrency {concurrency} does not divide over {connections} connections of at most {calls_per_connection} calls"
        )
    return connections, concurrency // connections


class H2Load:
    """Runs of one call against one server, at HOST:PORT or unix:PATH. `core`: where h2load runs; None leaves it to the system."""

    def __init__(self, address: str, body: Path, *, core: int | None, program: str = "h2load") -> None:
        self._address = address
        self._body = body
        self._core = core
        self._program = program

    def response_bytes(self) -> int:
        """The size of one answer's body, which of a right answer never changes."""
        return self._run(1, 1, None, 30.0)[0].body_bytes

    def warm_up(self, concurrency: int, seconds: float = 0.7) -> float:
        """Load until a run lasted `seconds`; the rate of that run."""
        requests = max(32, concurrency * 4)
        while True:
            summary, _ = self._run(requests, concurrency, None, 60.0)
            if summary.seconds >= seconds:
                return summary.total / summary.seconds
            requests = math.ceil(requests * min(10.0, 1.3 * seconds / summary.seconds))

    def measure(self, concurrency: int, rate: float, seconds: float, response_bytes: int) -> LoadRun:
        """About `seconds` of load, given the rate that a warm-up showed. Raises LoadFailed on any answer that is not right."""
        requests = max(concurrency * 4, math.ceil(rate * seconds * 1.05))
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "requests.tsv"
            summary, cpu = self._run(requests, concurrency, log, seconds * 5 + 20)
            check_summary(summary, response_bytes)
            latencies = read_latencies(log)
        return LoadRun(summary.total, summary.seconds, percentile(latencies, 50), percentile(latencies, 99), cpu / summary.seconds)

    def _run(self, requests: int, concurrency: int, log: Path | None, timeout: float) -> tuple[Summary, float]:
        connections, streams = spread_calls(concurrency)
        command = [self._program, "-n", str(requests), "-c", str(connections), "-m", str(streams), "-d", str(self._body)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        command += ["--log-file", str(log)] if log else []
        is_unix = self._address.startswith("unix:")
        command += ["--base-uri", self._address] if is_unix else []
        command.append(f"http://{'localhost' if is_unix else self._address}{INFER_PATH}")
        used = os.times()
        try:
            done = subprocess.run(
                command if self._core is None else pinned(command, [self._core]),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except FileNotFoundError as error:
            raise LoadFailed(f"{error.filename} is not installed; h2load is in the package nghttp2-client") from error
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"{requests} requests at {concurrency} concurrent did not end in {timeout:.0f} s") from error
        if done.returncode:
            raise LoadFailed(f"h2load ended with {done.returncode}: {done.stderr or done.stdout}")
        after = os.times()
        cpu = after.children_user + after.children_system - used.children_user - used.children_system
        summary = parse_summary(done.stdout)
        if summary.total != requests or not summary.succeeded:
            raise LoadFailed(f"no answer from {self._address}: {done.stdout}")
        return summary, cpu


def read_latencies(log: Path) -> NDArray[np.float64]:
    """Seconds per request from h2load's log of start, status, microseconds."""
    columns = np.fromfile(log, dtype=np.int64, sep=" ").reshape(-1, 3)
    return np.asarray(columns[:, 2] * 1e-6)


@dataclass(frozen=True, slots=True)
class Call:
    """One request to one model with its right answer."""

    model: str
    inputs: Arrays
    expected: Arrays

    @classmethod
    def of_model(cls, model: str, path: Path, seed: int = 1) -> Call:
        session = open_session(path)
        inputs = sample_inputs(session, 1, np.random.default_rng(seed))
        return cls(model, inputs, right_answer(session, inputs))

    def check(self, address: str) -> None:
        check_answer(address, self.model, self.inputs, self.expected)

    def count(self, address: str) -> BatchCount | None:
        """None where the server has no ModelStatistics: not all of the protocol's servers do."""
        try:
            return count_batches(address, self.model)
        except InferenceServerException as error:
            if error.status() != "StatusCode.UNIMPLEMENTED":
                raise
            return None

    def write_body(self, path: Path) -> Path:
        path.write_bytes(grpc_frame(infer_message(self.model, self.inputs)))
        return path


@dataclass(frozen=True, slots=True)
class EchoedCall:
    """The same request to a server that infers nothing: whatever it answers is right, unless it is an error, and it counts no rows."""

    call: Call

    @property
    def model(self) -> str:
        return self.call.model

    def check(self, address: str) -> None:
        with triton.InferenceServerClient(address) as client:
            client.infer(self.model, infer_inputs(self.call.inputs), client_timeout=30.0)

    def count(self, address: str) -> BatchCount | None:
        return None

    def write_body(self, path: Path) -> Path:
        return self.call.write_body(path)


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    concurrency: int
    load: LoadRun
    cpu_seconds: float
    """Of the server while the load ran."""
    rows_per_batch: float
    """0 where the server does not count them."""


def measure_call(
    address: str,
    call: Call | EchoedCall,
    concurrencies: list[int],
    seconds: float,
    *,
    core: int | None,
    program: str = "h2load",
    server_cpu: Callable[[], float] = lambda: 0.0,
) -> list[MeasuredRun]:
    """All concurrencies one after the other, each warmed up, between two checks of the answer."""
    with tempfile.TemporaryDirectory() as scratch:
        generator = H2Load(address, call.write_body(Path(scratch) / "body"), core=core, program=program)
        call.check(address)
        response_bytes = generator.response_bytes()
        runs = []
        for concurrency in concurrencies:
            rate = generator.warm_up(concurrency)
            before, used = call.count(address), server_cpu()
            load = generator.measure(concurrency, rate, seconds, response_bytes)
            used = server_cpu() - used
            runs.append(MeasuredRun(concurrency, load, used, _rows_per_batch(before, call.count(address), load.requests, concurrency)))
        call.check(address)
    return runs


def _rows_per_batch(before: BatchCount | None, after: BatchCount | None, requests: int, concurrency: int) -> float:
    if before is None or after is None:
        return 0.0
    batches = after - before
    # Triton counts a request after it has answered it: those of the warm-up may come late, and the last ones of the run.
    if abs(batches.rows - requests) > concurrency:
        raise LoadFailed(f"{requests} requests were answered, but the server's statistics count {batches.rows} rows")
    return batches.mean


def parse_concurrencies(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="loadtests.h2load", description="Closed-loop load on a running server, with checked answers.")
    parser.add_argument("address", metavar="HOST:PORT")
    add_models_argument(parser)
    parser.add_argument("--concurrency", type=parse_concurrencies, default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--core", type=int, default=None, help="where h2load runs")
    parser.add_argument("--h2load", default="h2load", help="the program")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model, path in write_repository(Path(scratch), selected_models(parser, arguments)).items():
            started = time.monotonic()
            for run in measure_call(
                arguments.address,
                Call.of_model(model, path),
                arguments.concurrency,
                arguments.seconds,
                core=arguments.core,
                program=arguments.h2load,
            ):
                load = run.load
                cells = [
                    model,
                    str(run.concurrency),
                    f"{load.rate:.0f}",
                    f"{load.p50 * 1e3:.2f}",
                    f"{load.p99 * 1e3:.2f}",
                    f"{run.rows_per_batch:.1f}" if run.rows_per_batch else "-",
                    f"{load.client_cpu:.0%}",
                ]
                rows.append(cells)
            print(f"{model}: answers right, {time.monotonic() - started:.0f} s")
    print(markdown_table(["model", "concurrent", "requests/s", "p50 ms", "p99 ms", "rows/batch", "client core"], rows))


if __name__ == "__main__":
    main()
