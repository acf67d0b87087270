"""Runs of Triton's own load generator, perf_analyzer, against a server, and a check of what the server says of itself there.

    python -m loadtests.perf_analyzer --perf-analyzer PROGRAM --model mlp --model magika=FILE.onnx

starts the server on one core and perf_analyzer on another, for each model at each concurrency, in short windows that do not
insist on stable results (-s 99): what matters here is that the real client works and that the breakdown is consistent.
A breakdown is the mean time of a request in the server, in parts: queue, compute input, compute, compute output. The parts must
not be more than the whole, the whole not more than what the client saw, and, --tolerance apart, not much less than the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests.calls import Arrays, open_session, sample_inputs
from loadtests.contestants import add_contestant_arguments, selected_contestants
from loadtests.h2load import parse_concurrencies
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import ServerFailed, exit_on_terminate, pinned
from loadtests.statistics import markdown_table

ROUNDING = 4
"""perf_analyzer cuts each of the four parts and their sum to whole microseconds."""


class AnalyzerFailed(Exception):
    """perf_analyzer ended with an error, or printed something else than its report."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """One concurrency as perf_analyzer reports it. Times in microseconds, as it prints them."""

    concurrency: int
    throughput: float
    client_latency: int
    p99: int
    inferences: int
    executions: int
    request: int
    overhead: int
    queue: int
    compute_input: int
    compute_infer: int
    compute_output: int

    @property
    def parts(self) -> int:
        return self.queue + self.compute_input + self.compute_infer + self.compute_output

    @property
    def rows_per_batch(self) -> float:
        return self.inferences / self.executions if self.executions else 0.0

    def problems(self, tolerance: float) -> list[str]:
        """What does not add up; empty when all does. `tolerance`: part of the request's time that no part need account for."""
        found = []
        if not self.executions:
            found.append("the server's statistics count no execution")
        if self.parts > self.request + ROUNDING:
            found.append(f"the parts are {self.parts} µs together, the request only {self.request} µs")
        if self.request - self.parts > max(tolerance * self.request, 50):
            found.append(f"of a request of {self.request} µs the parts account for {self.parts} µs only")
        if self.request > self.client_latency * 1.02 + ROUNDING:
            found.append(f"a request took {self.request} µs in the server but {self.client_latency} µs for the client")
        return found


_REPORT = {
    "throughput": r"^ +Throughput: ([\d.]+) infer/sec",
    "client_latency": r"^ +Avg latency: (\d+) usec",
    "p99": r"p99 latency: (\d+) usec",
    "inferences": r"Inference count: (\d+)",
    "executions": r"Execution count: (\d+)",
    "request": r"Avg request latency: (\d+) usec",
    "overhead": r"\(overhead (\d+) usec",
    "queue": r"\+ queue (\d+) usec",
    "compute_input": r"compute input (\d+) usec",
    "compute_infer": r"compute infer (\d+) usec",
    "compute_output": r"compute output (\d+) usec",
}


def parse_report(text: str) -> list[Analysis]:
    """One Analysis for each `Request concurrency` block. Raises AnalyzerFailed when a number is missing."""
    blocks = re.split(r"Request concurrency: (\d+)", text)
    if len(blocks) < 3:
        raise AnalyzerFailed(f"no `Request concurrency` in what perf_analyzer printed:\n{text}")
    return [_parse_block(int(concurrency), block) for concurrency, block in zip(blocks[1::2], blocks[2::2], strict=True)]


def _parse_block(concurrency: int, block: str) -> Analysis:
    found = {name: re.search(pattern, block, re.MULTILINE) for name, pattern in _REPORT.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise AnalyzerFailed(f"no {', '.join(missing)} in perf_analyzer's report:\n{block}")
    texts = {name: match[1] for name, match in found.items() if match}
    throughput = float(texts.pop("throughput"))
    return Analysis(concurrency=concurrency, throughput=throughput, **{name: int(value) for name, value in texts.items()})


def input_file(inputs: Arrays) -> str:
    """The content of a file for --input-data. Its shapes leave out the batch dimension, which perf_analyzer adds itself."""
    tensors = {name: {"content": array[0].ravel().tolist(), "shape": list(array.shape[1:])} for name, array in inputs.items()}
    return json.dumps({"data": [tensors]})


@dataclass(frozen=True, slots=True)
class Analyzer:
    program: Path
    core: int
    window_ms: int
    windows: int

    def run(self, address: str, model: str, inputs: Path, concurrency: int) -> Analysis:
        """Raises AnalyzerFailed."""
        command = [str(self.program)] if os.access(self.program, os.X_OK) else ["bash", str(self.program)]
        command += ["-m", model, "-u", address, "-i", "grpc", "-a", "--concurrency-range", str(concurrency)]
        command += ["--input-data", str(inputs), "-p", str(self.window_ms), "-r", str(self.windows), "-s", "99", "-v"]
        timeout = 60 + 5 * self.windows * self.window_ms / 1000
        try:
            done = subprocess.run(pinned(command, [self.core]), capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise AnalyzerFailed(f"perf_analyzer did not end in {timeout:.0f} s") from error
        if done.returncode:
            raise AnalyzerFailed(f"perf_analyzer ended with {done.returncode}: {done.stderr}{done.stdout}")
        return parse_report(done.stdout)[0]


def render(rows: list[tuple[str, str, Analysis, list[str]]]) -> str:
    header = ["server", "model", "concurrent", "infer/s", "client µs", "p99 µs", "server µs", "queue", "input", "infer", "output"]
    table = [
        [
            server,
            model,
            str(a.concurrency),
            f"{a.throughput:.0f}",
            *map(str, (a.client_latency, a.p99, a.request, a.queue, a.compute_input, a.compute_infer, a.compute_output)),
            f"{a.parts / a.request:.1%}" if a.request else "-",
            f"{a.rows_per_batch:.1f}",
            "; ".join(problems) or "adds up",
        ]
        for server, model, a, problems in rows
    ]
    return markdown_table([*header, "parts/server", "rows/batch", "breakdown"], table)


def _parser() -> argparse.ArgumentParser:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.perf_analyzer", description=description, formatter_class=formatter)
    parser.add_argument("--perf-analyzer", type=Path, default=os.environ.get("PERF_ANALYZER"), help="program or script [PERF_ANALYZER]")
    add_models_argument(parser)
    add_contestant_arguments(parser)
    parser.add_argument("--concurrency", type=parse_concurrencies, default=[1, 16, 64], metavar="N,N,..")
    parser.add_argument("--window-ms", type=int, default=1500)
    parser.add_argument("--windows", type=int, default=5, help="the most windows of one run; three are enough where it is stable")
    parser.add_argument("--tolerance", type=float, default=0.1, help="part of the server's time that the breakdown may not account for")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--start-timeout", type=float, default=60.0)
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.perf_analyzer is None:
        parser.error("--perf-analyzer: the program is needed")
    contestants = selected_contestants(parser, arguments)
    exit_on_terminate()
    analyzer = Analyzer(arguments.perf_analyzer, arguments.client_core, arguments.window_ms, arguments.windows)
    rows: list[tuple[str, str, Analysis, list[str]]] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for model, path in write_repository(scratch / "models", selected_models(parser, arguments)).items():
            inputs = scratch / f"{model}.json"
            inputs.write_text(input_file(sample_inputs(open_session(path), 1, np.random.default_rng(1))))
            for contestant in contestants:
                repository = scratch / "repositories" / model
                write_repository(repository, {model: path})
                server = contestant.server(repository, model, cores=[arguments.server_core], log=scratch / "server.log")
                try:
                    with server:
                        server.wait_ready([model], arguments.start_timeout)
                        for concurrency in arguments.concurrency:
                            print(f"{contestant.name}, {model}, {concurrency} concurrent", file=sys.stderr, flush=True)
                            analysis = analyzer.run(server.address, model, inputs, concurrency)
                            rows.append((contestant.name, model, analysis, analysis.problems(arguments.tolerance)))
                except (ServerFailed, AnalyzerFailed) as error:
                    failures.append(f"{contestant.name}, {model}: {error}")
    if rows:
        print(render(rows))
    for failure in failures:
        print(failure)
    return 1 if failures or any(problems for *_, problems in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
