"""Many clients that give up at random moments, and what the server is like afterwards.

    python -m loadtests.cancel_storm [--model mlp --model magika=FILE.onnx] [--clients 200] [--seconds 60] [--seed N]

Each client calls in a loop, with an input of its own choice: a fifth of the calls waits for the answer, half is cancelled and the
rest has a deadline, both after a random time up to twice the latency that the model has under this many patient clients.
It is a failure when

- a call does not end, or ends otherwise than with an answer, or CANCELLED or DEADLINE_EXCEEDED where it asked for that;
- an answer is not that of the call's own input, which is how a batch that is shifted by a cancelled mate would show;
- one client calling alone afterwards is slower than before or gets a wrong answer, or all clients waiting patiently get
  less done than before;
- requests stay pending, or threads, open files or memory grow: memory is compared between the second fifth of the storm and
  its last, so that what is allocated once and kept is not counted.

A call that is cancelled or late ends in the client whatever the server does. That it ends in the server too is seen from the
pending gauges, the memory and the calls that wait. The seed is printed; with the same one the clients draw the same numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from loadtests.calls import (
    INFER_PATH,
    TOLERANCE,
    Arrays,
    decode_answer,
    difference,
    infer_message,
    open_session,
    right_answer,
    sample_inputs,
)
from loadtests.contestants import headrace, http_address
from loadtests.models import add_models_argument, selected_models, write_repository
from loadtests.process import ServerFailed, ServerProcess, exit_on_terminate
from loadtests.statistics import markdown_table, percentile, slope

HANG = 60.0
"""Seconds after which a call that waits counts as one that never ends."""
CLIENTS_PER_CHANNEL = 10
INPUTS = 64
PROBE_CALLS = 300
PENDING = ("headrace_pending", "nv_inference_pending_request_count")


class Manner(StrEnum):
    """How a call is made."""

    WAIT = "wait"
    CANCEL = "cancel"
    DEADLINE = "deadline"


MANNERS = (Manner.WAIT, Manner.CANCEL, Manner.DEADLINE)
WEIGHTS = (0.2, 0.5, 0.3)
ALLOWED = {
    Manner.WAIT: {grpc.StatusCode.OK},
    Manner.CANCEL: {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED},
    Manner.DEADLINE: {grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED},
}


@dataclass(frozen=True, slots=True)
class Target:
    """A model with encoded calls and the right answer to each."""

    model: str
    messages: list[bytes]
    expected: list[Arrays]

    @classmethod
    def of_model(cls, model: str, path: Path, rng: np.random.Generator) -> Target:
        session = open_session(path)
        inputs = [sample_inputs(session, 1, rng) for _ in range(INPUTS)]
        return cls(model, [infer_message(model, each) for each in inputs], [right_answer(session, each) for each in inputs])

    def is_right(self, number: int, answer: bytes) -> bool:
        return difference(decode_answer(answer), self.expected[number]) <= TOLERANCE


@dataclass(slots=True)
class Tally:
    """What became of the calls to one model."""

    outcomes: Counter[tuple[Manner, str]] = field(default_factory=Counter)
    """By manner and status name; HUNG and WRONG beside gRPC's."""
    latencies: list[float] = field(default_factory=list)
    """Of the answered calls that waited."""

    @property
    def calls(self) -> int:
        return self.outcomes.total()

    def failures(self, model: str) -> list[str]:
        return [
            f"{model}: {count} calls made to {manner} ended {status}"
            for (manner, status), count in sorted(self.outcomes.items())
            if status not in {code.name for code in ALLOWED[manner]}
        ]


class Client:
    """One caller. `patience` is the longest time to a cancellation or deadline; None: every call waits."""

    def __init__(self, channel: Any, target: Target, tally: Tally, random: Random, patience: float | None) -> None:
        self._infer = channel.unary_unary(INFER_PATH)
        self._target = target
        self._tally = tally
        self._random = random
        self._patience = patience

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            await self.call()

    async def call(self) -> None:
        number = self._random.randrange(len(self._target.messages))
        manner = Manner.WAIT if self._patience is None else self._random.choices(MANNERS, WEIGHTS)[0]
        delay = self._random.uniform(0.0, self._patience or 0.0)
        started = time.monotonic()
        call = self._infer(self._target.messages[number], timeout=delay if manner is Manner.DEADLINE else None)
        timer = asyncio.get_running_loop().call_later(delay, call.cancel) if manner is Manner.CANCEL else None
        status = await self._outcome(call, number)
        if timer:
            timer.cancel()
        self._tally.outcomes[manner, status] += 1
        if manner is Manner.WAIT and status == grpc.StatusCode.OK.name:
            self._tally.latencies.append(time.monotonic() - started)

    async def _outcome(self, call: Any, number: int) -> str:
        try:
            async with asyncio.timeout(HANG):
                code: grpc.StatusCode = await call.code()
        except TimeoutError:
            call.cancel()
            return "HUNG"
        if code is grpc.StatusCode.OK and not self._target.is_right(number, await call):
            return "WRONG"
        return str(code.name)


@asynccontextmanager
async def channels(address: str, count: int) -> AsyncIterator[list[Any]]:
    """Connections of their own each; gRPC would share one between channels with equal arguments."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    opened = [grpc.aio.insecure_channel(address, options) for _ in range(count)]
    try:
        yield opened
    finally:
        for channel in opened:
            await channel.close()


@dataclass(frozen=True, slots=True)
class Crowd:
    """`clients` callers, spread evenly over targets and connections."""

    address: str
    targets: Sequence[Target]
    clients: int
    seed: int

    async def run(self, seconds: float, patience: Mapping[str, float] | None) -> dict[str, Tally]:
        """By model. Returns when all calls ended."""
        tallies = {target.model: Tally() for target in self.targets}
        until = time.monotonic() + seconds
        async with channels(self.address, -(-self.clients // CLIENTS_PER_CHANNEL)) as opened, asyncio.TaskGroup() as group:
            for number in range(self.clients):
                target = self.targets[number % len(self.targets)]
                limit = patience[target.model] if patience else None
                client = Client(opened[number % len(opened)], target, tallies[target.model], Random(f"{self.seed}/{number}"), limit)
                group.create_task(client.run(until))
        return tallies


@dataclass(frozen=True, slots=True)
class Probe:
    """One client alone, and everybody patient."""

    p50: float
    p99: float
    rate: float
    """Answers a second to all clients waiting."""
    latency: float
    """The median of those."""


async def probe(crowd: Crowd, seconds: float, failures: list[str], when: str) -> dict[str, Probe]:
    probes = {}
    patient = await crowd.run(seconds, None)
    for target in crowd.targets:
        alone = Tally()
        medians = []
        async with channels(crowd.address, 1) as (channel,):
            client = Client(channel, target, alone, Random(crowd.seed), None)
            for _ in range(3):
                alone.latencies.clear()
                until = time.monotonic() + seconds
                while len(alone.latencies) < PROBE_CALLS and time.monotonic() < until:
                    await client.call()
                medians.append((percentile(alone.latencies or [HANG], 50), percentile(alone.latencies or [HANG], 99)))
        tally = patient[target.model]
        failures += [f"{when} the storm: {failure}" for failure in (*alone.failures(target.model), *tally.failures(target.model))]
        # The best of three: what disturbs a probe on a shared machine never makes it faster.
        p50, p99 = min(median for median, _ in medians), min(tail for _, tail in medians)
        probes[target.model] = Probe(p50, p99, len(tally.latencies) / seconds, percentile(tally.latencies or [HANG], 50))
    return probes


@dataclass(frozen=True, slots=True)
class Footprint:
    threads: int
    open_files: int
    memory: int

    @classmethod
    def of(cls, server: ServerProcess) -> Footprint:
        return cls(server.threads(), server.open_files(), server.resident_bytes())


async def settled_footprint(server: ServerProcess, wanted: Footprint | None = None, patience: float = 20.0) -> Footprint:
    """The footprint when connections that were closed are gone: as soon as it is `wanted`, or else when the time is up."""
    until = time.monotonic() + (patience if wanted else 2.0)
    while True:
        footprint = Footprint.of(server)
        is_flat = wanted is not None and footprint.threads <= wanted.threads and footprint.open_files <= wanted.open_files
        if is_flat or time.monotonic() > until:
            return footprint
        await asyncio.sleep(0.25)


async def sample_memory(server: ServerProcess, samples: list[tuple[float, float]]) -> None:
    """Time and bytes, every half second until cancelled."""
    while True:
        samples.append((time.monotonic(), float(server.resident_bytes())))
        await asyncio.sleep(0.5)


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """Bytes more in the last fifth of the samples than in the second; 0 where there are too few."""
    fifth = len(samples) // 5
    if not fifth:
        return 0.0
    memory = [size for _, size in samples]
    return float(np.median(memory[-fifth:]) - np.median(memory[fifth : 2 * fifth]))


def pending_requests(text: str) -> dict[str, float]:
    """Sum by gauge of what a metrics page says is pending. Raises ValueError when it has no such gauge."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(PENDING):
            found[family.name] = sum(sample.value for sample in family.samples)
    if not found:
        raise ValueError(f"no gauge named {' or '.join(PENDING)}* among the metrics")
    return found


async def settled_pending(address: str, patience: float = 10.0) -> dict[str, float]:
    """As soon as nothing is pending, or what is when the time is up."""
    until = time.monotonic() + patience
    while True:
        pending = pending_requests(await asyncio.to_thread(_fetch, f"http://{address}/metrics"))
        if not any(pending.values()) or time.monotonic() > until:
            return pending
        await asyncio.sleep(0.25)


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@dataclass(slots=True)
class StormReport:
    seed: int
    before: dict[str, Probe]
    after: dict[str, Probe]
    tallies: dict[str, Tally]
    footprint_before: Footprint
    footprint_after: Footprint
    samples: list[tuple[float, float]]
    pending: dict[str, float]
    failures: list[str]

    def judge(self, slower: float, max_growth: float) -> None:
        """Add to the failures what became worse. `slower`: tolerated factor; times also have 0.3 ms for the machine's noise."""
        for model, tally in self.tallies.items():
            self.failures += tally.failures(model)
            before, after = self.before[model], self.after[model]
            if after.p50 > before.p50 * slower + 3e-4:
                self.failures.append(f"{model}: alone {after.p50 * 1e3:.2f} ms afterwards, {before.p50 * 1e3:.2f} ms before")
            if after.rate < before.rate / slower:
                self.failures.append(f"{model}: {after.rate:.0f} answers/s to all afterwards, {before.rate:.0f} before")
        if self.footprint_after.open_files > self.footprint_before.open_files:
            self.failures.append(f"open files: {self.footprint_after.open_files}, before {self.footprint_before.open_files}")
        # gRPC's thread pool keeps a spare or two for a while.
        if self.footprint_after.threads > self.footprint_before.threads + 2:
            self.failures.append(f"threads: {self.footprint_after.threads}, before {self.footprint_before.threads}")
        if growth(self.samples) > max_growth:
            self.failures.append(f"memory grew by {growth(self.samples) / 1e6:.1f} MB during the storm, at most {max_growth / 1e6:.1f}")
        self.failures += [f"{count:.0f} left in {gauge}" for gauge, count in self.pending.items() if count]

    def render(self) -> str:
        outcomes = [
            [model, manner, status, str(count)]
            for model, tally in self.tallies.items()
            for (manner, status), count in sorted(tally.outcomes.items())
        ]
        probes = [
            [model, when, f"{p.p50 * 1e3:.3f}", f"{p.p99 * 1e3:.3f}", f"{p.rate:.0f}", f"{p.latency * 1e3:.2f}"]
            for model in self.before
            for when, p in (("before", self.before[model]), ("after", self.after[model]))
        ]
        late = self.samples[len(self.samples) // 5 :]
        per_minute = slope([at for at, _ in late], [size for _, size in late]) * 60 / 1e6
        sides = [("before", self.footprint_before), ("after", self.footprint_after)]
        footprints = [[when, str(f.threads), str(f.open_files), f"{f.memory / 1e6:.1f}"] for when, f in sides]
        return "\n\n".join(
            [
                markdown_table(["model", "calls made to", "ended", "calls"], outcomes),
                markdown_table(["model", "storm", "alone p50 ms", "p99 ms", "answers/s to all", "median ms"], probes),
                markdown_table(["storm", "threads", "open files", "memory MB"], footprints),
                f"Memory during the storm: {growth(self.samples) / 1e6:+.2f} MB from its second fifth to its last, "
                f"slope {per_minute:+.2f} MB/min; {_trace(self.samples)}",
                f"Pending afterwards: {', '.join(f'{gauge} {count:.0f}' for gauge, count in self.pending.items())}",
            ]
        )


def _trace(samples: Sequence[tuple[float, float]], points: int = 7) -> str:
    picked = [samples[round(index * (len(samples) - 1) / (points - 1))] for index in range(points)] if samples else []
    return ", ".join(f"{at - samples[0][0]:.0f} s {size / 1e6:.1f} MB" for at, size in picked)


async def storm(server: ServerProcess, crowd: Crowd, seconds: float, probe_seconds: float) -> StormReport:
    failures: list[str] = []
    # Twice: the first crowd pays for connections, threads and buffers that stay.
    await crowd.run(probe_seconds, None)
    before = await probe(crowd, probe_seconds, failures, "before")
    footprint_before = await settled_footprint(server)
    samples: list[tuple[float, float]] = []
    sampler = asyncio.create_task(sample_memory(server, samples))
    try:
        tallies = await crowd.run(seconds, {model: 2 * probed.latency for model, probed in before.items()})
    finally:
        sampler.cancel()
    pending = await settled_pending(http_address(server))
    footprint_after = await settled_footprint(server, footprint_before)
    after = await probe(crowd, probe_seconds, failures, "after")
    return StormReport(crowd.seed, before, after, tallies, footprint_before, footprint_after, samples, pending, failures)


def _parser() -> argparse.ArgumentParser:
    description, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="loadtests.cancel_storm", description=description, formatter_class=formatter)
    add_models_argument(parser)
    parser.add_argument("--transport", default=None, help="of the server (default: its own choice)")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--probe-seconds", type=float, default=4.0, help="of each measurement before and after")
    parser.add_argument("--slower", type=float, default=1.25, help="tolerated factor between before and after")
    parser.add_argument("--max-growth-mb", type=float, default=4.0, help="tolerated growth of memory during the storm")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one each time")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    exit_on_terminate()
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    os.sched_setaffinity(0, {arguments.client_core})
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "models"
        paths = write_repository(repository, selected_models(parser, arguments))
        rng = np.random.default_rng(seed)
        targets = [Target.of_model(model, path, rng) for model, path in paths.items()]
        log = Path(scratch) / "server.log"
        server = headrace(arguments.transport).server(repository, targets[0].model, cores=[arguments.server_core], log=log)
        try:
            with server:
                server.wait_ready(list(paths))
                crowd = Crowd(server.address, targets, arguments.clients, seed)
                report = asyncio.run(storm(server, crowd, arguments.seconds, arguments.probe_seconds))
                is_alive = server.exit_code is None
        except ServerFailed as error:
            print(error)
            return 1
        complaints = [line for line in log.read_text(errors="replace").splitlines() if "Traceback" in line or '"level": "error"' in line]
    report.judge(arguments.slower, arguments.max_growth_mb * 1e6)
    report.failures += [] if is_alive else ["the server ended during the storm"]
    report.failures += [f"the server's log has {len(complaints)} errors, the first: {complaints[0]}"] if complaints else []
    print(report.render())
    print("\n".join(["", *(f"FAILED {failure}" for failure in report.failures)]) if report.failures else "\nAll as promised.")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
