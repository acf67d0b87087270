"""New versions of a model every second under load, and what its users and those of the model beside it notice.

    python -m loadtests.hot_swap --model magika=FILE.onnx [--beside mlp] [--swaps 60] [--every 1.0] [--rounds 3] [--json out.json]
    python -m loadtests.hot_swap --model mlp --swaps 5 --seconds 3 --rounds 1 --memory-swaps 0       (a look whether it works)

Each round starts a server, which watches its repository, puts the same load on it throughout, and measures three phases: steady,
swapping, steady. While it swaps, a process on the client's core publishes a version every so often, made ready beforehand and
renamed into place, and deletes old ones; odd and even versions have different weights, so that each answer shows who gave it.
Then, on a server of its own, as many versions as --memory-swaps says, each as soon as the one before answers.
It is a failure when

- a call fails, an answer is not exactly that of the version it names, to 1e-5 (the two versions' answers are a thousand times
  further apart), or names a version that was not published by then, or an older one than was answering before the call began;
- the last version published does not come to answer;
- p99 while swapping is over --limit times that of the two steady phases together, in the median of the rounds;
- memory after the last of the many swaps is over 1.05 times what it was after the 20th, or threads or open files are more.

Versions that never answered are no failure: a newer one may be there before they are loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from headrace.plugins import load_backends

from loadtests.cancel_storm import Footprint
from loadtests.contestants import HEADRACE, Contestant
from loadtests.machine import Noise, machine_facts, noisy_probes, probe_noise
from loadtests.models import parse_models, write_repository
from loadtests.process import ServerFailed, ServerProcess, exit_on_terminate
from loadtests.publisher import Publisher
from loadtests.statistics import Spread, markdown_table
from loadtests.traffic import Record, delays, misnamed, overtaken_delays, p_ms, traffic
from loadtests.variants import Answers, Verdict, answers_of, make_variants

WARM_UP = 3.0
PATIENCE = 30.0
"""Seconds for a published version to answer. Loading and warming up take one or two."""
FLIP = 0.1
"""Seconds before and after a version's first answer that count as its flip."""
SAMPLED = (20, 50, 100)
MEMORY_LIMIT = 1.05
SPARE_THREADS = 2
"""gRPC's thread pool keeps a spare or two for a while."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same in every round. `artifacts`: the files of A and B."""

    swapped: Answers
    beside: Answers
    beside_file: Path
    artifacts: Sequence[Path]
    scratch: Path
    server_cores: Sequence[int]
    concurrency: int
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    since: float
    until: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class ModelRound:
    """One model in one round; times in ms. `ratio`: p99 while swapping to p99 of the steady phases together."""

    model: str
    calls: Mapping[str, int]
    p50: Mapping[str, float]
    p99: Mapping[str, float]
    steady_p99: float
    ratio: float
    flip_p99: float
    failed: int
    wrong: int
    bitwise: float

    @classmethod
    def of(cls, record: Record, phases: Sequence[Phase], flips: Sequence[float]) -> ModelRound:
        by_phase = {phase.name: record.latencies(phase.since, phase.until) for phase in phases}
        swapping, steady = by_phase["swapping"], np.concatenate([by_phase[name] for name in by_phase if name != "swapping"])
        flip = record.overlapping([(at - FLIP, at + FLIP) for at in flips])
        verdicts = record.verdicts
        return cls(
            record.model,
            {name: len(latencies) for name, latencies in by_phase.items()},
            {name: p_ms(latencies, 50) for name, latencies in by_phase.items()},
            {name: p_ms(latencies, 99) for name, latencies in by_phase.items()},
            p_ms(steady, 99),
            p_ms(swapping, 99) / p_ms(steady, 99),
            p_ms(flip, 99),
            sum(record.count(float("-inf"), float("inf"))[1:]),
            verdicts[Verdict.OTHER] + verdicts[Verdict.WRONG],
            verdicts[Verdict.EQUAL] / max(1, verdicts.total()),
        )


@dataclass(frozen=True, slots=True)
class Round:
    models: Sequence[ModelRound]
    phases: Sequence[Phase]
    published: int
    answered: int
    delays: Sequence[float]
    overtaken: Sequence[float]
    """As `delays`, of all that were published, where a newer version's answer counts too."""
    failures: Sequence[str]


def judge_swaps(record: Record, published: Mapping[int, float]) -> list[str]:
    """What must not be in a record of a model whose versions were published at these times."""
    failures = [f"{record.model}: {count} times: {trouble}" for trouble, count in sorted(record.troubles.items())]
    failures += [f"{record.model}: {text}" for text in misnamed(record.first_answers, published)]
    if back := record.steps_back():
        failures.append(f"{record.model}: {back} calls were answered by an older version than had answered before they began")
    if not record.versions:
        failures.append(f"{record.model}: no call ended")
    return failures


# -- the publisher's process -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PublisherProcess:
    """Owns what the process said it published, and when."""

    process: asyncio.subprocess.Process
    published: dict[int, float] = field(default_factory=dict)

    async def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        await self.process.stdin.drain()

    async def read(self) -> str:
        """The next line; "" when it ended. Raises ServerFailed when it ended badly."""
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode().strip()
        if line.startswith("published "):
            _, version, at = line.split()
            self.published[int(version)] = float(at)
        if not line and await self.process.wait():
            raise ServerFailed(f"the publisher ended with exit code {self.process.returncode}")
        return line


@asynccontextmanager
async def publishing(setting: Setting, place: Path, count: int, every: float | None) -> AsyncIterator[PublisherProcess]:
    """Versions from 2 on, staged when the block begins; on this process's cores. Version 1 is taken for published at any time."""
    paths = [str(path) for path in (place / "models", place / "staging")]
    options = ["--first", "2", "--count", str(count), *(["--every", str(every)] if every is not None else [])]
    command = [sys.executable, "-m", "loadtests.publisher", *paths, setting.swapped.model, *map(str, setting.artifacts), *options]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        publisher = PublisherProcess(process, {1: float("-inf")})
        await publisher.read()
        yield publisher
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def lay_out(setting: Setting, place: Path) -> None:
    """A repository with the model beside and the first version of the swapped one."""
    place.mkdir()
    publisher = Publisher(place / "models", place / "staging", setting.swapped.model, setting.artifacts, load_backends())
    publisher.stage(1)
    publisher.commit(1)
    write_repository(place / "models", {setting.beside.model: setting.beside_file})


def serve(setting: Setting, place: Path) -> ServerProcess:
    contestant = Contestant("headrace", f"{HEADRACE} --model-control watch")
    return contestant.server(place / "models", setting.swapped.model, cores=setting.server_cores, log=place / "server.log")


# -- the phases --------------------------------------------------------------------------------------------------------


async def measure_round(setting: Setting, place: Path, server: ServerProcess, swaps: int, every: float) -> Round:
    loads = [(setting.swapped, setting.concurrency), (setting.beside, 1)]
    phases: list[Phase] = []
    failures: list[str] = []

    @asynccontextmanager
    async def phase(name: str) -> AsyncIterator[None]:
        since, cpu = time.monotonic(), server.cpu_seconds()
        yield
        phases.append(Phase(name, since, time.monotonic(), server.cpu_seconds() - cpu))

    async with publishing(setting, place, swaps, every) as publisher, traffic(server.address, loads, setting.seed) as records:
        await asyncio.sleep(WARM_UP)
        async with phase("steady"):
            await asyncio.sleep(setting.seconds)
        async with phase("swapping"):
            await publisher.go()
            while await publisher.read():
                pass
            last = max(publisher.published)
            if not await records[0].wait_for(last, PATIENCE):
                failures.append(f"{setting.swapped.model}: version {last}, the last published, did not answer within {PATIENCE:g} s")
        async with phase("steady again"):
            await asyncio.sleep(setting.seconds)
    swapped, beside = records
    flips = [at for version, at in swapped.first_answers.items() if version != 1]
    failures += judge_swaps(swapped, publisher.published) + judge_swaps(beside, {1: float("-inf")})
    swaps_at = {version: at for version, at in publisher.published.items() if version != 1}
    late, overtaken = delays(swapped.first_answers, swaps_at), overtaken_delays(swapped.first_answers, swaps_at)
    models = [ModelRound.of(record, phases, flips) for record in records]
    return Round(models, phases, len(publisher.published) - 1, len(flips), late, overtaken, failures)


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """Footprints by the number of swaps after which they were taken."""

    footprints: Mapping[int, Footprint]
    failures: Sequence[str]

    @property
    def ratio(self) -> float:
        """Of memory, last to first."""
        sizes = [footprint.memory for footprint in self.footprints.values()]
        return sizes[-1] / sizes[0] if sizes else float("nan")

    def judge(self) -> list[str]:
        if len(self.footprints) < 2:
            return ["memory: fewer than two measurements"]
        (first_after, first), *_, (last_after, last) = self.footprints.items()
        failures = []
        if not self.ratio <= MEMORY_LIMIT:
            failures.append(f"memory: {self.ratio:.3f} times as much after {last_after} swaps as after {first_after}")
        if last.threads > first.threads + SPARE_THREADS:
            failures.append(f"threads: {last.threads} after {last_after} swaps, {first.threads} after {first_after}")
        if last.open_files > first.open_files:
            failures.append(f"open files: {last.open_files} after {last_after} swaps, {first.open_files} after {first_after}")
        return failures


async def measure_memory(setting: Setting, place: Path, server: ServerProcess, swaps: int) -> MemoryRun:
    points = sorted({*(point for point in SAMPLED if point < swaps), swaps}) if swaps > SAMPLED[0] else [1, swaps]
    footprints: dict[int, Footprint] = {}
    failures: list[str] = []
    loads = [(setting.swapped, 1)]
    async with publishing(setting, place, swaps, None) as publisher, traffic(server.address, loads, setting.seed) as (record,):
        for done in range(1, swaps + 1):
            await publisher.go()
            await publisher.read()
            version = max(publisher.published)
            if not await record.wait_for(version, PATIENCE):
                failures.append(f"{record.model}: version {version} did not answer within {PATIENCE:g} s")
                break
            if done in points:
                await asyncio.sleep(2.0)  # for the old version's unloading
                footprints[done] = Footprint.of(server)
    return MemoryRun(footprints, [*failures, *judge_swaps(record, publisher.published)])


# -- the report --------------------------------------------------------------------------------------------------------


def judge(rounds: Sequence[Round], memory: MemoryRun | None, limit: float) -> list[str]:
    failures = [f"round {number}: {failure}" for number, each in enumerate(rounds, 1) for failure in each.failures]
    for index, model in enumerate(rounds[0].models if rounds else ()):
        ratio = Spread.of([each.models[index].ratio for each in rounds])
        if not ratio.median <= limit:
            failures.append(f"{model.model}: p99 while swapping is {ratio.text()} times the steady one, expected at most {limit:g}")
    if memory is not None:
        failures += [f"many swaps: {failure}" for failure in (*memory.failures, *memory.judge())]
    return failures


def render_round(number: int, each: Round) -> str:
    rows = [
        [
            f"{number} {model.model}", phase.name, str(model.calls[phase.name]), f"{phase.until - phase.since:.1f}",
            f"{model.p50[phase.name]:.2f}", f"{model.p99[phase.name]:.2f}", f"{phase.cpu_seconds / (phase.until - phase.since):.2f}",
        ]
        for model in each.models
        for phase in each.phases
    ]  # fmt: skip
    header = ["round, model", "phase", "calls", "seconds", "p50 ms", "p99 ms", "server CPU-s/s"]
    late = each.delays or [float("nan")]
    lines = [
        f"{model.model}: p99 swapping/steady {model.ratio:.3f}, p99 around flips {model.flip_p99:.2f} ms; "
        f"{model.failed} failed, {model.wrong} wrong, {model.bitwise:.1%} bitwise equal"
        for model in each.models
    ]
    lines.append(
        f"{each.published} published, {each.answered} answered; from publication to first answer "
        f"{Spread.of(late).median:.2f} s in the median, {max(late):.2f} s at worst; "
        f"to its or a newer one's {max(each.overtaken, default=float('nan')):.2f} s at worst"
    )
    return "\n".join([markdown_table(header, rows), *lines, ""])


def render_summary(rounds: Sequence[Round], memory: MemoryRun | None) -> str:
    rows = []
    for index, model in enumerate(rounds[0].models if rounds else ()):
        same = [each.models[index] for each in rounds]
        values = [[m.steady_p99 for m in same], [m.p99["swapping"] for m in same], [m.flip_p99 for m in same], [m.ratio for m in same]]
        rows.append(
            [model.model, *(Spread.of(v).text() for v in values), str(sum(m.failed for m in same)), str(sum(m.wrong for m in same))]
        )
    header = ["model", "steady p99 ms", "swapping p99 ms", "around flips p99 ms", "swapping/steady", "failed", "wrong"]
    tables = [markdown_table(header, rows)] if rows else []
    if memory is not None:
        measured = [[str(n), f"{f.memory / 1e6:.1f}", str(f.threads), str(f.open_files)] for n, f in memory.footprints.items()]
        tables.append(markdown_table(["swaps", "memory MB", "threads", "open files"], measured) + f"\nmemory last/first {memory.ratio:.3f}")
    return "\n\n".join(tables)


def _parser() -> argparse.ArgumentParser:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.hot_swap", description=description, formatter_class=formatter)
    parser.add_argument("--model", required=True, metavar="NAME=FILE", help="the model that is swapped; `mlp` is generated")
    parser.add_argument("--beside", default="mlp", metavar="NAME=FILE", help="the model that is not (default: the generated mlp)")
    parser.add_argument("--swaps", type=int, default=60)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between publications")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each steady phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8, help="calls in flight to the swapped model")
    parser.add_argument("--memory-swaps", type=int, default=200, help="of the run that looks at memory; 0: none")
    parser.add_argument("--limit", type=float, default=1.2, help="of p99 while swapping to p99 steady")
    parser.add_argument("--server-cores", default="0", metavar="N,N")
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser


def prepare(parser: argparse.ArgumentParser, arguments: argparse.Namespace, scratch: Path) -> Setting:
    """Wrong use ends the program."""
    try:
        ((model, file),) = parse_models([arguments.model]).items()
        ((beside, beside_file),) = parse_models([arguments.beside]).items()
        originals = write_repository(scratch / "originals", {model: file})
        beside = f"{beside}_beside" if beside == model else beside
        placed = write_repository(scratch / "beside", {beside: beside_file})[beside]
        swapped, artifacts = make_variants(model, originals[model], scratch / "variants", arguments.seed)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    cores = [int(core) for core in arguments.server_cores.split(",")]
    answers = answers_of(beside, placed, arguments.seed)
    return Setting(swapped, answers, placed, artifacts, scratch, cores, arguments.concurrency, arguments.seconds, arguments.seed)


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    exit_on_terminate()
    os.sched_setaffinity(0, {arguments.client_core})
    rounds: list[Round] = []
    memory: MemoryRun | None = None
    broken: list[str] = []
    probes: list[Noise] = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = prepare(parser, arguments, Path(scratch))
        cores = [*setting.server_cores, arguments.client_core]
        try:
            for number in range(1, arguments.rounds + 1):
                probes += [probe_noise(core) for core in cores]
                place = Path(scratch) / f"round{number}"
                lay_out(setting, place)
                with serve(setting, place) as server:
                    server.wait_ready([setting.swapped.model, setting.beside.model])
                    rounds.append(asyncio.run(measure_round(setting, place, server, arguments.swaps, arguments.every)))
                print(render_round(number, rounds[-1]), flush=True)
                probes += [probe_noise(core) for core in cores]
            if arguments.memory_swaps:
                place = Path(scratch) / "memory"
                lay_out(setting, place)
                with serve(setting, place) as server:
                    server.wait_ready([setting.swapped.model, setting.beside.model])
                    memory = asyncio.run(measure_memory(setting, place, server, arguments.memory_swaps))
        except ServerFailed as error:
            broken.append(str(error))
    failures = broken + judge(rounds, memory, arguments.limit)
    noisy = noisy_probes(probes)
    print(render_summary(rounds, memory))
    print(f"\n{len(noisy)} of {len(probes)} noise probes say that the machine was busy with something else.")
    if arguments.json:
        result: dict[str, Any] = {"machine": machine_facts(), "rounds": [asdict(each) for each in rounds], "failures": failures}
        result |= {"memory": asdict(memory) if memory else None, "noise": [asdict(probe) for probe in probes]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(["", *(f"FAILED {failure}" for failure in failures)]) if failures else "\nAll as promised.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
