"""What ONNX Runtime alone makes of a model on given cores: rows per second by batch size, in a process that does nothing else.

    taskset -c 0 python -m loadtests.reference FILE.onnx [--batches 1,2,4,8,16,32,64] [--seconds 0.5]

prints {"1": rows/s, ...}. It is the ceiling of a server that costs nothing and always batches best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtests.calls import Arrays, open_session, sample_inputs
from loadtests.process import pinned

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def rows_per_second(path: Path, batches: Sequence[int], seconds: float) -> dict[int, float]:
    """`seconds` for each batch size, after a warm-up of a tenth of that; one thread for each core this process may use."""
    session = open_session(path, threads=len(os.sched_getaffinity(0)))
    names = [output.name for output in session.get_outputs()]
    rates = {}
    for rows in batches:
        inputs = sample_inputs(session, rows, np.random.default_rng(rows))
        _runs_per_second(session._sess.run, names, inputs, seconds / 10)
        rates[rows] = rows * _runs_per_second(session._sess.run, names, inputs, seconds)
    return rates


def _runs_per_second(run: object, names: list[str], inputs: Arrays, seconds: float) -> float:
    assert callable(run)
    started = time.perf_counter()
    runs, now = 0, started
    while now - started < seconds:
        run(names, inputs, None)
        runs, now = runs + 1, time.perf_counter()
    return runs / (now - started)


def measure_reference(path: Path, cores: Sequence[int], batches: Sequence[int] = BATCHES, seconds: float = 0.5) -> dict[int, float]:
    """`rows_per_second` in a process of its own on `cores`. Raises RuntimeError with what it printed when it fails."""
    command = [
        sys.executable,
        "-m",
        "loadtests.reference",
        str(path),
        "--batches",
        ",".join(map(str, batches)),
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run(pinned(command, cores), capture_output=True, text=True, timeout=60 + 20 * seconds * len(batches), check=False)
    if done.returncode:
        raise RuntimeError(f"the reference for {path.name} failed: {done.stderr}")
    return {int(rows): rate for rows, rate in json.loads(done.stdout).items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="loadtests.reference", description="ONNX Runtime alone: rows per second by batch size.")
    parser.add_argument("model", type=Path, metavar="FILE.onnx")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    print(json.dumps(rows_per_second(arguments.model, arguments.batches, arguments.seconds)))


if __name__ == "__main__":
    main()
