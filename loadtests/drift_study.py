"""How often drift is told of that is none, and how small a shift is found: `python -m loadtests.drift_study --out docs/drift`.

Writes study.json and the pictures, and prints the tables. `--quick` takes seconds and says nothing; `--draw` makes the pictures and
tables again from study.json. Seeds are fixed: the same numbers come out each time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from loadtests.drift_population import POOL, Population, make_population
from loadtests.drift_report import Study, as_json, from_json, plots, tables
from loadtests.drift_trials import (
    BARE,
    SCENARIOS,
    SHIPPED,
    FalseAlarms,
    Power,
    find_power,
    follow_ramp,
    live,
    median_delays,
)
from loadtests.report_plots import draw, standalone

SEED = 20261126


@dataclass(frozen=True, slots=True)
class Settings:
    """`lives` with `windows` each make the false alarms; `long_lives` with `long_windows` those of slow drift."""

    pool: int = POOL
    references: tuple[int, ...] = (2_000, 50_000)
    sizes: tuple[int, ...] = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
    lives: int = 200
    windows: int = 50
    long_sizes: tuple[int, ...] = (100, 1_000)
    long_lives: int = 20
    long_windows: int = 500
    power_lives: int = 25
    power_windows: int = 8
    steps: int = 8
    ramp_sizes: tuple[int, ...] = (100, 1_000)
    ramp_speeds: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
    ramp_lives: int = 15
    ramp_windows: int = 600


QUICK = Settings(
    pool=2_000, references=(500,), sizes=(50, 200), lives=2, windows=10, long_sizes=(100,), long_lives=1, long_windows=20, power_lives=2,
    power_windows=4, steps=3, ramp_sizes=(200,), ramp_speeds=(0.05,), ramp_lives=2, ramp_windows=30,
)  # fmt: skip


class Task(NamedTuple):
    """A part of the study that needs nothing of the others. `group`: the results that are put together."""

    group: tuple[Any, ...]
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


@lru_cache(maxsize=1)
def _population(rows: int) -> Population:
    return make_population(SEED, rows)


def _work(pool: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return work(_population(pool), *arguments)


def tasks_of(settings: Settings) -> list[Task]:
    """The longest ones first."""
    s = settings
    tasks = [Task(("long", m), live, (m, s.long_sizes, s.long_windows, SEED + 1 + i)) for m in s.references for i in range(s.long_lives)]
    tasks += [
        Task(("ramp", kind, n, speed), follow_ramp, (max(s.references), n, speed, s.ramp_windows, config, SEED + i))
        for kind, config in (("shipped", SHIPPED), ("bare", BARE))
        for n in s.ramp_sizes
        for speed in s.ramp_speeds
        for i in range(s.ramp_lives)
    ]
    tasks += [
        Task(("power",), find_power, (scenario, m, n, s.power_lives, s.power_windows, s.steps, SEED))
        for scenario in SCENARIOS
        for m in s.references
        for n in s.sizes
    ]
    tasks += [Task(("alarms", m), live, (m, s.sizes, s.windows, SEED + i)) for m in s.references for i in range(s.lives)]
    return tasks


def run(settings: Settings, processes: int, progress: Callable[[int, int], None]) -> Study:
    """`processes` 1: in this one."""
    tasks, results = tasks_of(settings), []
    if processes == 1:
        for task in tasks:
            results.append(_work(settings.pool, task.work, task.arguments))
            progress(len(results), len(tasks))
        return gather(list(zip([task.group for task in tasks], results, strict=True)))
    # Not forked: a fork of a process with threads is no longer taken for safe. One thread of linear algebra each; they read it at import.
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1"))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_work, settings.pool, task.work, task.arguments) for task in tasks]
        for done, future in enumerate(futures, start=1):
            results.append(future.result())
            progress(done, len(futures))
    return gather(list(zip([task.group for task in tasks], results, strict=True)))


def gather(results: Sequence[tuple[tuple[Any, ...], Any]]) -> Study:
    """Put the results of lives together."""
    alarms: dict[tuple[str, int, int], FalseAlarms] = {}
    ramps: dict[tuple[str, int, float], list[dict[str, float]]] = {}
    power: list[Power] = []
    for (name, *rest), result in results:
        if name == "power":
            power.append(result)
        elif name == "ramp":
            ramps.setdefault((rest[0], rest[1], rest[2]), []).append(result)
        else:
            for each in result:
                alarms.setdefault((name, each.m, each.n), FalseAlarms(each.m, each.n)).add(each)
    return Study(
        alarms=[each for (name, _, _), each in alarms.items() if name == "alarms"],
        long=[each for (name, _, _), each in alarms.items() if name == "long"],
        power=power,
        ramps={
            kind: [median_delays(n, speed, lives) for (of, n, speed), lives in ramps.items() if of == kind] for kind in ("shipped", "bare")
        },
    )


def write_pictures(study: Study, out: Path) -> list[Path]:
    written = []
    for plot in plots(study):
        names = list(dict.fromkeys(series.name for series in plot.series))
        path = out / f"{plot.key}.svg"
        path.write_text(standalone(draw(plot, {name: index for index, name in enumerate(names)})), encoding="utf-8")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtests.drift_study", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/drift"), help="folder for study.json and pictures")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a few windows, to see that it runs")
    parser.add_argument("--draw", action="store_true", help="from the study.json that is there")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "study.json"
    if options.draw:
        study = from_json(json.loads(path.read_text(encoding="utf-8")))
    else:
        study = run(QUICK if options.quick else Settings(), options.processes, _show)
        path.write_text(as_json(study), encoding="utf-8")
    for table in tables(study):
        print(table, end="\n\n")
    for picture in write_pictures(study, options.out):
        print(f"wrote {picture}")
    return 0


def _show(done: int, total: int) -> None:
    print(f"\r{done} of {total} parts", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
