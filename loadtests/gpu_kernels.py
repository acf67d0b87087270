"""Our kernels on the GPU: right, then how fast, as a fraction of the rate at which it copies memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from shutil import which
from typing import TYPE_CHECKING, Any

import numpy as np
from headrace_kernels import launches
from headrace_kernels.gather import row_table, storage
from headrace_kernels.launches import Launch
from headrace_kernels.normalize import Normalize
from headrace_kernels.screen import RECORD
from headrace_kernels.sources import ITEMSIZE

from loadtests.gpu_device import GpuMachine
from loadtests.kernel_cases import numbers
from loadtests.kernel_checks import all_checks

if TYPE_CHECKING:
    from loadtests.gpu_report import Report

IMAGENET = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}
Generator = np.random.Generator


@dataclass(frozen=True, slots=True)
class Case:
    """`size`: the fewest bytes to move, each input read and each output written once. `plan`: launches on the n-th set of buffers."""

    name: str
    size: int
    plan: Callable[[int], tuple[Launch, ...]]
    goal: float | None = None


Make = Callable[[GpuMachine, Generator, int], Case]
"""With so many sets of buffers."""


def run(report: Report) -> dict[str, Any]:
    machine = GpuMachine(report.device_id)
    try:
        right, wrong = check(report.seed, machine)
        rate = report.earlier.get("machine", {}).get("copy_rate")
        rows = [measure(machine, make, report.seed, rate) for make in CASES]
    finally:
        machine.close()
    checks = [
        {"what": "kernels equal their definitions", "passed": not wrong, "got": f"{right} right, wrong: {wrong or 'none'}"},
        sanitize(),
    ]
    for row in rows:
        if row["goal"] and row["fraction"] is not None:
            checks.append(
                {"what": f"{row['kernel']}: at least {row['goal']}", "passed": row["fraction"] >= row["goal"], "got": row["fraction"]}
            )
    return {"checks": checks, "tables": [{"title": "Time of one launch within a graph", "rows": rows}]}


def check(seed: int, machine: GpuMachine) -> tuple[int, dict[str, str]]:
    """(how many are right, why the others are not)."""
    wrong = {}
    checks = all_checks()
    for name, one in checks.items():
        try:
            one(machine, np.random.default_rng(seed))
        except AssertionError as error:
            wrong[name] = str(error)[:2000]
    return len(checks) - len(wrong), wrong


def measure(machine: GpuMachine, make: Make, seed: int, rate: float | None) -> dict[str, Any]:
    case = make(machine, np.random.default_rng(seed), 1)
    # Rotating, so that no launch finds in L2 what the one before it left there.
    sets = max(2, min(24, -(-3 * machine.device.properties.l2_cache_size // case.size)))
    case = make(machine, np.random.default_rng(seed), sets)
    rotation = [case.plan(index) for index in range(sets)]
    seconds, again = machine.time_launches(rotation), machine.time_launches(rotation)
    kernel = machine.kernels.modules.kernel(rotation[0][-1].kernel)
    threads = rotation[0][-1].block[0] * rotation[0][-1].block[1]
    blocks = kernel.occupancy.max_active_blocks_per_multiprocessor(threads, rotation[0][-1].shared)
    return {
        "kernel": case.name,
        "bytes": case.size,
        "microseconds": round(seconds * 1e6, 2),
        "again": round(again * 1e6, 2),
        "bytes per second": round(case.size / seconds),
        "fraction": round(case.size / seconds / rate, 3) if rate else None,
        "goal": case.goal,
        "registers": kernel.attributes.num_regs,
        "threads per multiprocessor": blocks * threads,
        "buffer sets": sets,
    }


def sanitize() -> dict[str, Any]:
    """The checks once more under compute-sanitizer, in a process of their own."""
    what = "compute-sanitizer finds nothing"
    tool = which("compute-sanitizer")
    if tool is None:
        return {"what": what, "passed": None, "got": "not run: compute-sanitizer is not on PATH"}
    got = []
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-m", "loadtests.gpu_check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
        if done.returncode:
            got.append(f"{kind}: exit code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return {"what": what, "passed": not got, "got": "; ".join(got) or "memcheck, racecheck, initcheck and synccheck are clean"}


def images(
    name: str, datatype: Any, size: tuple[int, int] | None = None, shape: tuple[int, int] = (224, 224), goal: float | None = None
) -> Make:
    how = Normalize(size=size, datatype=datatype, mean=IMAGENET["mean"], deviation=IMAGENET["deviation"])

    def make(machine: GpuMachine, generator: Generator, sets: int) -> Case:
        batch = generator.integers(0, 256, (64, *shape, 3), dtype=np.uint8)
        sources = machine.copies(machine.upload(batch), batch.nbytes, sets)
        written = int(np.prod(how.result_shape(batch.shape))) * ITEMSIZE[datatype]
        targets = [machine.allocate(written) for _ in range(sets)]

        def plan(index: int) -> tuple[Launch, ...]:
            return launches.normalize(
                images=sources[index], into=targets[index], rows=64, height=shape[0], width=shape[1], channels=3, normalize=how
            )

        return Case(f"normalize {name}", batch.nbytes + written, plan, goal)

    return make


def rows(name: str, width: int, source: str, target: str, count: int = 64, ragged: bool = False, goal: float | None = None) -> Make:
    def make(machine: GpuMachine, generator: Generator, sets: int) -> Case:
        lengths = generator.integers(1, width + 1, count) if ragged else np.full(count, width)
        slots = -(-lengths * ITEMSIZE[source] // 256) * 256
        offsets = slots.cumsum() - slots
        slab = generator.integers(0, 120, int(slots.sum()), dtype=np.uint8)
        table = machine.upload(row_table(offsets.tolist(), [1] * count, lengths.tolist(), ITEMSIZE[source], count))
        sources = machine.copies(machine.upload(slab), slab.nbytes, sets)
        written = count * width * ITEMSIZE[target]
        targets = [machine.allocate(written) for _ in range(sets)]

        def plan(index: int) -> tuple[Launch, ...]:
            return launches.gather(
                slab=sources[index], table=table, into=targets[index], rows=count, width=width, source=source, target=target
            )

        return Case(f"gather {name}", int(lengths.sum()) * ITEMSIZE[source] + written, plan, goal)

    return make


def values(machine: GpuMachine, generator: Generator, shape: tuple[int, int], datatype: str, sets: int) -> tuple[list[int], int]:
    batch = numbers(generator, (min(shape[0], 1 << 20), shape[1]), datatype, special=0)
    batch = np.ascontiguousarray(np.tile(batch, (-(-shape[0] // len(batch)), 1))[: shape[0]], storage(datatype))
    return machine.copies(machine.upload(batch), batch.nbytes, sets), batch.nbytes


def screened(shape: tuple[int, int], requests: int, by_feature: bool) -> Make:
    def make(machine: GpuMachine, generator: Generator, sets: int) -> Case:
        sources, size = values(machine, generator, shape, "float32", sets)
        owners = machine.upload((np.arange(shape[0]) * requests // shape[0]).astype(np.int32))
        feature = machine.allocate(shape[1] * RECORD.itemsize) if by_feature else 0
        request = machine.allocate(requests * RECORD.itemsize)

        def plan(index: int) -> tuple[Launch, ...]:
            return launches.screen(
                values=sources[index],
                datatype="float32",
                rows=shape[0],
                features=shape[1],
                owners=owners,
                by_feature=feature,
                by_request=request,
                requests=requests,
                multiprocessors=machine.multiprocessors,
            )

        return Case(f"screen {shape[0]} x {shape[1]}{', by feature' if by_feature else ''}", size, plan)

    return make


def counted(shape: tuple[int, int], edge_count: int, datatype: str = "float32", goal: float | None = None) -> Make:
    def make(machine: GpuMachine, generator: Generator, sets: int) -> Case:
        sources, size = values(machine, generator, shape, datatype, sets)
        edges = machine.upload(np.sort(generator.normal(size=(shape[1], edge_count)).astype(np.float32), axis=1))
        counts = machine.upload(np.zeros((shape[1], edge_count + 1), np.int64))

        def plan(index: int) -> tuple[Launch, ...]:
            return launches.histogram(
                values=sources[index],
                datatype=datatype,
                rows=shape[0],
                features=shape[1],
                edges=edges,
                edge_count=edge_count,
                counts=counts,
                multiprocessors=machine.multiprocessors,
            )

        return Case(f"histogram {shape[0]} x {shape[1]} {datatype}, {edge_count} edges", size, plan, goal)

    return make


def ranked(shape: tuple[int, int], k: int) -> Make:
    """k of 0: softmax."""

    def make(machine: GpuMachine, generator: Generator, sets: int) -> Case:
        sources, size = values(machine, generator, shape, "float32", sets)
        indices = machine.allocate(shape[0] * max(k, 1) * 4)
        into = [machine.allocate(shape[0] * (k or shape[1]) * 4) for _ in range(sets)]

        def plan(index: int) -> tuple[Launch, ...]:
            common = {"scores": sources[index], "rows": shape[0], "classes": shape[1]}
            if not k:
                return launches.softmax(into=into[index], datatype="float32", **common)
            return launches.topk(values=into[index], indices=indices, k=k, softmax=True, datatype="float32", **common)

        name = f"topk {k} of" if k else "softmax"
        return Case(f"{name} {shape[0]} x {shape[1]}", size + (shape[0] * k * 8 if k else size), plan)

    return make


CASES: Sequence[Make] = (
    images("64 x 224 x 224 x 3 to fp32", "float32", goal=0.8),
    images("64 x 224 x 224 x 3 to fp16", "float16", goal=0.8),
    images("64 x 480 x 640 x 3 to 224 x 224 fp16", "float16", size=(224, 224), shape=(480, 640)),
    rows("64 x 150528 fp32", 150_528, "float32", "float32", goal=0.8),
    rows("64 x 150528 fp32 to fp16", 150_528, "float32", "float16", goal=0.8),
    rows("ragged ids, 4096 x 512 int32 to int64", 512, "int32", "int64", count=4096, ragged=True),
    screened((64, 150_528), 64, by_feature=False),
    screened((65_536, 256), 1024, by_feature=True),
    counted((1 << 26, 1), 10, goal=0.6),
    counted((1 << 26, 1), 63, goal=0.6),
    counted((1 << 18, 256), 10),
    counted((256, 2000), 10),
    ranked((65_536, 1000), 5),
    ranked((1024, 50_000), 50),
    ranked((65_536, 1000), 0),
)
