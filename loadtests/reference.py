"""What ONNX Runtime alone makes of a model on given cores, by batch size, in a process that does nothing else.

    taskset -c 0 python -m loadtests.reference FILE.onnx [--batches 1,2,4,8,16,32,64] [--seconds 0.5]

prints {"1": {"rate": rows/s, "cpu_us": CPU-µs a row}, ...}. It is the ceiling of a server that costs nothing and always batches best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from loadtests.calls import open_session, sample_inputs
from loadtests.process import pinned

BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Speed:
    """At one batch size."""

    rate: float
    """Rows a second."""
    cpu_us: float
    """CPU-µs a row, of all threads."""


def measure_speeds(path: Path, batches: Sequence[int], seconds: float) -> dict[int, Speed]:
    """`seconds` for each batch size, after a warm-up of a tenth of that; one thread for each core this process may use."""
    session = open_session(path, threads=len(os.sched_getaffinity(0)))
    names = [output.name for output in session.get_outputs()]
    speeds = {}
    for rows in batches:
        inputs = sample_inputs(session, rows, np.random.default_rng(rows))
        call = partial(session._sess.run, names, inputs, None)  # InferenceSession.run itself takes 3 µs more
        _measure_speed(call, rows, seconds / 10)
        speeds[rows] = _measure_speed(call, rows, seconds)
    return speeds


def _measure_speed(call: Callable[[], object], rows: int, seconds: float) -> Speed:
    started, used = time.perf_counter(), time.process_time()
    runs, now = 0, started
    while now - started < seconds:
        call()
        runs, now = runs + 1, time.perf_counter()
    return Speed(rows * runs / (now - started), (time.process_time() - used) / (rows * runs) * 1e6)


def measure_reference(path: Path, cores: Sequence[int], batches: Sequence[int] = BATCHES, seconds: float = 0.5) -> dict[int, Speed]:
    """`measure_speeds` in a process of its own on `cores`. Raises RuntimeError with what it printed when it fails."""
    command = [sys.executable, "-m", "loadtests.reference", str(path), "--batches", ",".join(map(str, batches))]
    command += ["--seconds", str(seconds)]
    timeout = 60 + 20 * seconds * len(batches)
    done = subprocess.run(pinned(command, cores), capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference for {path.name} failed: {done.stderr}")
    return {int(rows): Speed(**speed) for rows, speed in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="loadtests.reference", description="ONNX Runtime alone, by batch size.")
    parser.add_argument("model", type=Path, metavar="FILE.onnx")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    speeds = measure_speeds(arguments.model, arguments.batches, arguments.seconds)
    print(json.dumps({rows: asdict(speed) for rows, speed in speeds.items()}))


if __name__ == "__main__":
    main()
