"""The scheduler against traffic, in virtual time: `python -m loadtests.simulator [--json out.json]`. Nothing runs and nothing waits.

The real Batcher, BatchQueue, LatencyTable and Forecast are driven over traces of arrivals, with a clock that jumps and models that
are nothing but their l(b). Compared are

- ours, told by the warm-up what l(b) is and by each request when it is due;
- greedy: whatever waits, up to the largest batch, as soon as an instance is free;
- fixed: a grid of (size, delay), a batch starts when it has so many rows or its oldest request is so old, the best of the grid in
  hindsight, trace by trace;
- informed: the same grid, but as it knows l(b) it drops what the batch to come would answer late. No server is set up like that; it
  tells what of ours is the early drop and what is not;
- the oracle, an upper bound: a server without batches that does rows one by one at the best rate of any batch that a deadline lets be,
  always at work on whatever is due first. Unit jobs in that order are a maximum of jobs in time, so no schedule of batches does more.

Greedy and fixed drop what is overdue before they start a batch, which favours them: few servers do. Goodput is the part of all requests
that were answered in time. Everything is drawn from `--seed`; the same seed gives the same numbers on every machine.
Exit code 1 when one of the promises (`find_broken`, `find_collapses`) does not hold.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from headrace.batching.batcher import Batcher
from headrace.batching.latency import LatencyTable
from headrace.config import BatchingConfig
from headrace.errors import HeadraceError
from headrace.requests import Answer, Reply, Ticket
from headrace.telemetry.counters import VersionCounters

MAX_BATCH = 64
SLO = 10.0
"""Times l(1)."""
NEVER = float("inf")


# -- what is simulated -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """A model as its l(b): seconds by rows, linear in between."""

    name: str
    seconds: Mapping[int, float]

    def latency(self, rows: int) -> float:
        return float(np.interp(rows, list(self.seconds), list(self.seconds.values())))

    @property
    def slo(self) -> float:
        return SLO * self.latency(1)

    def best_rate(self, within: float) -> float:
        """Rows a second of the best batch that takes no longer than that."""
        return max((rows / self.latency(rows) for rows in range(1, MAX_BATCH + 1) if self.latency(rows) <= within), default=0.0)

    @property
    def capacity(self) -> float:
        """Of batches that can follow one another within the SLO: one is waited for, one is run."""
        return self.best_rate(self.slo / 2)


SIZES = (1, 2, 4, 8, 16, 32, 64)
MAGIKA_RATES = (154, 150, 145, 141, 136, 130, 114)
GPU = Table("gpu", {rows: 0.004 + 0.0002 * rows for rows in SIZES})
STEEP = Table("steep", {rows: 0.002 + 0.0008 * rows for rows in SIZES})
"""Batching pays, but full batches take longer than the SLO."""
MAGIKA = Table("magika", {rows: rows / rate for rows, rate in zip(SIZES, MAGIKA_RATES, strict=True)})
TABLES = (GPU, STEEP, MAGIKA)


@dataclass(frozen=True, slots=True)
class Request:
    arrival: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Trace:
    """`noise`: what each batch takes longer or shorter, by its number; mean 1."""

    name: str
    requests: Sequence[Request]
    noise: Sequence[float]
    instances: int = 1

    @property
    def offered_rate(self) -> float:
        return len(self.requests) / self.requests[-1].arrival


def poisson(rate: float, count: int, rng: random.Random) -> Iterator[float]:
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        yield now


def bursts(low: float, high: float, dwell: float, count: int, rng: random.Random) -> Iterator[float]:
    """A Poisson process that switches between two rates, each kept for `dwell` seconds on average (MMPP)."""
    now, rate, switch = 0.0, low, rng.expovariate(1 / dwell)
    made = 0
    while made < count:
        gap = rng.expovariate(rate)
        if now + gap > switch:
            # Exponential gaps have no memory: from the switch on they are drawn anew.
            now, rate = switch, high if rate == low else low
            switch += rng.expovariate(1 / dwell)
            continue
        now += gap
        made += 1
        yield now


def heavy_tail(rng: random.Random) -> float:
    """Mostly 0.9, seldom up to many times that: Pareto with mean 1."""
    return 0.8 + 0.2 * (rng.paretovariate(2.2) - 2.2 / 1.2 + 1)


def slight(rng: random.Random) -> float:
    return rng.uniform(0.97, 1.03)


def make_traces(table: Table, count: int, seed: int) -> list[Trace]:
    slo, capacity = table.slo, table.capacity

    def due(arrivals: Iterable[float], slacks: Sequence[float], rng: random.Random) -> list[Request]:
        return [Request(arrival, arrival + rng.choice(slacks)) for arrival in arrivals]

    def trace(
        name: str,
        arrivals: Callable[[random.Random], Iterable[float]],
        slacks: Sequence[float] = (slo,),
        noise: Callable[[random.Random], float] = slight,
        instances: int = 1,
    ) -> Trace:
        rng = random.Random(f"{seed} {table.name} {name}")
        requests = due(arrivals(rng), slacks, rng)
        return Trace(name, requests, [noise(rng) for _ in range(count)], instances)

    def at(load: float) -> Callable[[random.Random], Iterable[float]]:
        return lambda rng: poisson(load * capacity, count, rng)

    mixed = (slo / 3, slo, slo, 3 * slo)
    return [
        *(trace(f"poisson {load:g}", at(load)) for load in (0.1, 0.3, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)),
        trace("bursts", lambda rng: bursts(0.3 * capacity, 2.0 * capacity, 5 * slo, count, rng)),
        trace("heavy tail 0.7", at(0.7), noise=heavy_tail),
        trace("heavy tail 1.5", at(1.5), noise=heavy_tail),
        trace("mixed 0.8", at(0.8), mixed),
        trace("mixed 1.5", at(1.5), mixed),
        trace("4 instances 0.8", at(3.2), instances=4),
        trace("4 instances 1.5", at(6.0), instances=4),
    ]


# -- what came of it ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """`latencies`: of all that were answered, in time or not."""

    good: int = 0
    latencies: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def answered(self, request: Request, now: float) -> None:
        self.latencies.append(now - request.arrival)
        self.good += now <= request.deadline


@dataclass(frozen=True, slots=True)
class Run:
    """`goodput`: of the requests, answered in time. Latencies are of those that were answered."""

    trace: str
    table: str
    policy: str
    offered_rate: float
    goodput: float
    mean: float
    p50: float
    p99: float
    mean_batch: float
    size: int = 0
    delay: float = 0.0

    @classmethod
    def of(cls, trace: Trace, table: Table, policy: str, outcome: Outcome, size: int = 0, delay: float = 0.0) -> Run:
        latencies = np.array(outcome.latencies or [0.0])
        p50, p99 = (float(value) for value in np.percentile(latencies, (50, 99)))
        mean_batch = float(np.mean(outcome.rows or [0]))
        goodput = outcome.good / len(trace.requests)
        return cls(
            trace.name, table.name, policy, trace.offered_rate, goodput, float(latencies.mean()), p50, p99, mean_batch, size, delay
        )  # fmt: skip


# -- ours --------------------------------------------------------------------------------------------------------------


class World:
    """A Batcher, its instances and its clients in virtual time. Owns the clock and what is still to happen."""

    def __init__(self, trace: Trace, table: Table, known: Mapping[int, float]) -> None:
        self.now = 0.0
        self.outcome = Outcome()
        self.batcher = Batcher(
            f"{table.name}:1",
            BatchingConfig(max_queue_size=0),
            latencies=LatencyTable(known, MAX_BATCH),
            clock=lambda: self.now,
            timer=self.at,
            shard=VersionCounters().shard(),
        )
        self._trace = trace
        self._table = table
        self._noise = itertools.cycle(trace.noise)
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), callback))

    def run(self) -> Outcome:
        for _ in range(self._trace.instances):
            Executor(self).wake()
        for request in self._trace.requests:
            self._advance(request.arrival)
            self._submit(request)
        self._advance(NEVER)
        return self.outcome

    def _advance(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            when, _, callback = heapq.heappop(self._events)
            self.now = max(self.now, when)
            callback()
        self.now = until

    def _submit(self, request: Request) -> None:
        reply = Client(self, request)
        deadline = request.deadline
        ticket = Ticket(reply, 1, (), (), (), arrived=self.now, expires=deadline, answer_by=deadline)
        try:
            self.batcher.submit(ticket)
        except HeadraceError as error:
            reply.fail(error)

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        for reply, answer in answers:
            assert isinstance(reply, Client)
            if isinstance(answer, bytes):
                self.outcome.answered(reply.request, self.now)

    def duration(self, rows: int) -> float:
        self.outcome.rows.append(rows)
        return self._table.latency(rows) * next(self._noise)


class Client(Reply):
    __slots__ = ("request",)

    def __init__(self, world: World, request: Request) -> None:
        super().__init__(world, request.deadline)
        self.request = request


class Executor:
    """An instance that does nothing for as long as its batch takes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_busy = False

    def wake(self) -> None:
        if self._is_busy:
            return
        tickets, until = self._world.batcher.take(self)
        if tickets:
            self._is_busy = True
            self._world.at(self._world.now + self._world.duration(len(tickets)), lambda: self._end(tickets))
        elif until != NEVER:
            self._world.at(until, self.wake)

    def _end(self, tickets: list[Ticket]) -> None:
        self._is_busy = False
        self._world.batcher.settle(tickets, [b""] * len(tickets))
        self.wake()


def simulate_ours(trace: Trace, table: Table, known: Mapping[int, float] | None = None) -> Outcome:
    """`known`: what the warm-up has found, left out: the truth."""
    return World(trace, table, table.seconds if known is None else known).run()


# -- the others --------------------------------------------------------------------------------------------------------


def simulate_fixed(trace: Trace, table: Table, size: int, delay: float, *, is_informed: bool = False) -> Outcome:
    """In order of arrival; a batch starts on a free instance when it is full or its first request has waited for `delay`."""
    outcome = Outcome()
    noise = itertools.cycle(trace.noise)
    free = [0.0] * trace.instances
    waiting: deque[Request] = deque()
    arrivals = deque(trace.requests)
    while arrivals or waiting:
        now = heapq.heappop(free)
        while True:
            while arrivals and arrivals[0].arrival <= now:
                waiting.append(arrivals.popleft())
            foreseen = table.latency(min(len(waiting), size)) if is_informed and waiting else 0.0
            while waiting and waiting[0].deadline <= now + foreseen:
                waiting.popleft()
            if len(waiting) >= size or (waiting and now >= waiting[0].arrival + delay):
                break
            upcoming = arrivals[0].arrival if arrivals else NEVER
            now = min(upcoming, waiting[0].arrival + delay) if waiting else upcoming
            if now == NEVER:
                return outcome
        batch = [waiting.popleft() for _ in range(min(size, len(waiting)))]
        outcome.rows.append(len(batch))
        end = now + table.latency(len(batch)) * next(noise)
        for request in batch:
            outcome.answered(request, end)
        heapq.heappush(free, end)
    return outcome


def simulate_greedy(trace: Trace, table: Table) -> Outcome:
    return simulate_fixed(trace, table, MAX_BATCH, 0.0)


def bound(trace: Trace, table: Table) -> Outcome:
    """The oracle: rows one by one at the best rate, the earliest deadline first."""
    outcome = Outcome()
    slack = max(request.deadline - request.arrival for request in trace.requests)
    step = 1.0 / (table.best_rate(slack) * trace.instances)
    waiting: list[tuple[float, int]] = []
    now, position = 0.0, 0
    requests = trace.requests
    while position < len(requests) or waiting:
        if not waiting:
            now = max(now, requests[position].arrival)
        while position < len(requests) and requests[position].arrival <= now:
            heapq.heappush(waiting, (requests[position].deadline, position))
            position += 1
        deadline, index = heapq.heappop(waiting)
        # A slot that ends a little late counts: slots begin at arrivals, which may cost a part of one.
        if deadline + step < now + step:
            continue
        now += step
        outcome.latencies.append(now - requests[index].arrival)
        outcome.good += 1
    return outcome


# -- comparison --------------------------------------------------------------------------------------------------------

DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Times l(1)."""


def compare(table: Table, trace: Trace) -> list[Run]:
    """Ours, greedy, the best of each grid by goodput and then by mean latency, the oracle."""

    def best(policy: str, *, is_informed: bool) -> Run:
        grid = [
            Run.of(trace, table, policy, simulate_fixed(trace, table, size, delay, is_informed=is_informed), size, delay)
            for size in SIZES
            for delay in [times * table.latency(1) for times in DELAYS]
            if size > 1 or not delay
        ]
        return max(grid, key=lambda run: (run.goodput, -run.mean))

    return [
        Run.of(trace, table, "ours", simulate_ours(trace, table)),
        Run.of(trace, table, "greedy", simulate_greedy(trace, table)),
        best("fixed", is_informed=False),
        best("informed", is_informed=True),
        Run.of(trace, table, "oracle", bound(trace, table)),
    ]


LOW = ("poisson 0.1", "poisson 0.3")


def find_broken(runs: Sequence[Run]) -> list[str]:
    """What was promised and does not hold."""
    by_trace: dict[tuple[str, str], dict[str, Run]] = {}
    for run in runs:
        by_trace.setdefault((run.table, run.trace), {})[run.policy] = run
    broken = []
    for (table, trace), policies in by_trace.items():
        ours, greedy = policies["ours"], policies["greedy"]
        for other in (policies["fixed"], policies["informed"]):
            if ours.goodput < 0.95 * other.goodput:
                broken.append(f"{table}, {trace}: expected 0.95 of the best {other.policy} setting, got {ours.goodput / other.goodput:.3f}")
        if trace in LOW and ours.goodput < greedy.goodput:
            broken.append(f"{table}, {trace}: expected greedy's goodput {greedy.goodput:.4f}, got {ours.goodput:.4f}")
        if trace in LOW and ours.mean > 1.001 * greedy.mean:
            broken.append(f"{table}, {trace}: expected greedy's mean latency {greedy.mean * 1e3:.3f} ms, got {ours.mean * 1e3:.3f}")
    return broken


def find_collapses(runs: Sequence[Run]) -> Iterator[str]:
    """Tables of which fewer requests are answered in time beyond 1.8 times the knee than at it: the highest rate of which 99 % are."""
    for table in sorted({run.table for run in runs}):
        ours = [run for run in runs if run.table == table and run.policy == "ours" and run.trace.startswith("poisson")]
        knee = max((run.offered_rate * run.goodput for run in ours if run.goodput >= 0.99), default=0.0)
        beyond = [run.offered_rate * run.goodput for run in ours if run.offered_rate >= 1.8 * knee]
        if not knee or not beyond or min(beyond) < 0.95 * knee:
            yield f"{table}: expected 0.95 of the knee's {knee:.0f}/s under overload, got {min(beyond, default=0.0):.0f}/s"


def table_text(runs: Sequence[Run]) -> str:
    header = ["table", "trace", "policy", "offered/s", "goodput", "of fixed", "mean ms", "p50 ms", "p99 ms", "rows/batch"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    fixed = {(run.table, run.trace): run.goodput for run in runs if run.policy == "fixed"}
    for run in runs:
        policy = f"{run.policy} {run.size}, {run.delay * 1e3:.3g} ms" if run.size else run.policy
        ratio = run.goodput / fixed[run.table, run.trace] if fixed.get((run.table, run.trace)) else 0.0
        numbers = (
            f"{run.offered_rate:.0f} | {run.goodput:.4f} | {ratio:.3f} | {run.mean * 1e3:.2f} | {run.p50 * 1e3:.2f} | {run.p99 * 1e3:.2f}"
        )
        lines.append(f"| {run.table} | {run.trace} | {policy} | {numbers} | {run.mean_batch:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the runs are written")
    parser.add_argument("--requests", type=int, default=20_000, help="of each trace")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    runs = [run for table in TABLES for trace in make_traces(table, options.requests, options.seed) for run in compare(table, trace)]
    print(table_text(runs))
    if options.json:
        report = {"kind": "simulator", "seed": options.seed, "requests": options.requests, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    broken = [*find_broken(runs), *find_collapses(runs)]
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
