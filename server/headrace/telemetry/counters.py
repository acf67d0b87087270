"""What is counted per model version: plain lists, written on the hot path, summed only when somebody looks.

Rules that make this need no lock:

- A shard has one writer: one thread, or whoever holds one particular lock. `counts[i] += 1` is a read, an addition and a
  write, and another thread can come between them, so two writers of one shard would lose counts.
- Readers are any thread at any time. They copy each list in one C call and may see a batch half counted. That is harmless:
  every number only grows, so the next look has the rest; a histogram's count is the sum of its own buckets, never a number
  kept beside them; and `success` is written last and read first, so that a mean never divides too little time by too many.

prometheus_client's observe() takes a lock and costs more than decoding the request, hence none of it here.
"""

from __future__ import annotations

import enum
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log
from typing import TypeVar

from headrace.telemetry.exemplars import Exemplars

Number = TypeVar("Number", int, float)

DURATION_EDGES = (
    50e-6, 75e-6,
    100e-6, 150e-6, 250e-6, 500e-6, 750e-6,
    1e-3, 1.5e-3, 2.5e-3, 5e-3, 7.5e-3,
    10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Seconds, upper bounds included. From what a tiny model takes on a CPU to what nobody waits longer for: 1-2.5-5 steps, finer
below 10 ms, where most models live and where an interpolated p99 would otherwise be wrong by a factor. Every edge is a time
series per stage and version, hence not finer. The same for all versions: PromQL sums over `le` need equal edges."""

ROW_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_BUCKETS = len(DURATION_EDGES) + 1
_LOG_OF_NOTHING = log(1e-9)
"""For a batch that took less than the clock can tell."""
_FEW = 8
"""Up to here one bisect a request costs no more than sorting the batch (0.75 µs either way at 8; 1.4 and 1.05 at 16)."""


class FailureReason(enum.IntEnum):
    """Triton's four words for why a request failed. An int, because it indexes a list on the hot path."""

    REJECTED = 0
    CANCELED = 1
    BACKEND = 2
    OTHER = 3


class DispatchReason(enum.IntEnum):
    """Why a batch was started when it was: no more fitted in, an instance was free, or the queue delay was over."""

    FULL = 0
    IDLE = 1
    DELAY = 2


class DropCause(enum.IntEnum):
    """Why a request was rejected, or of no use: the queue was at its bound, its deadline could not be met when it came, it waited
    past it, it was taken out because it could not be met any more; or it was answered, but too late."""

    QUEUE_FULL = 0
    REFUSED = 1
    EXPIRED = 2
    HOPELESS = 3
    LATE = 4


class Stage(enum.IntEnum):
    """The durations of one request. `REQUEST` is from the message's arrival to its encoded answer."""

    REQUEST = 0
    QUEUE = 1
    COMPUTE_INPUT = 2
    COMPUTE = 3
    COMPUTE_OUTPUT = 4


class BatchTimes:
    """One executed batch; times are time.monotonic(), one `arrived` a request, which waits from then until it is
    `taken`: while those it came with are decoded too.

    `padded_rows` is what ran: `rows` and the padding. `cost`: seconds by which versions are compared; None: nobody looked.
    """

    __slots__ = ("arrived", "cost", "done", "input_done", "output_start", "padded_rows", "rows", "taken")

    def __init__(
        self,
        *,
        rows: int,
        padded_rows: int,
        arrived: Sequence[float],
        taken: float,
        input_done: float,
        output_start: float,
        done: float,
        cost: float | None = None,
    ) -> None:
        self.cost = cost
        self.rows = rows
        self.padded_rows = padded_rows
        self.arrived = arrived
        self.taken = taken
        self.input_done = input_done
        self.output_start = output_start
        self.done = done

    def __repr__(self) -> str:
        return f"BatchTimes({len(self.arrived)} requests, {self.rows}/{self.padded_rows} rows, {self.done - self.taken:.6f} s)"


class CounterShard:
    """The counts of one writer; see the rules above. What can be derived when somebody looks is not kept."""

    __slots__ = (
        "batch_sizes",
        "buckets",
        "dispatches",
        "drops",
        "failure_seconds",
        "failures",
        "last_inference",
        "nonfinite",
        "padding",
        "seconds",
        "success",
        "wall_clock",
    )

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        # Lists, not numpy arrays: adding to one element of a list costs a third.
        self.buckets: list[list[int]] = [[0] * _BUCKETS for _ in Stage]
        self.seconds = [0.0] * len(Stage)
        self.batch_sizes: dict[int, list[float]] = {}
        self.dispatches = [0] * len(DispatchReason)
        self.drops = [0] * len(DropCause)
        self.failures = [0] * len(FailureReason)
        self.failure_seconds = [0.0] * len(FailureReason)
        self.nonfinite = 0
        self.padding = 0
        self.success = 0
        self.last_inference = 0.0
        self.wall_clock = wall_clock

    def __repr__(self) -> str:
        return f"CounterShard(success={self.success}, failures={self.failures})"

    def record_batch(self, times: BatchTimes) -> None:
        """Count a batch that succeeded, before its answers leave: clients read the statistics right after their answer.

        Every request in it is charged the whole batch's compute durations (Triton's rule).
        """
        requests = len(times.arrived)
        taken, input_done, output_start, done = times.taken, times.input_done, times.output_start, times.done
        compute_input = input_done - taken
        compute = output_start - input_done
        compute_output = done - output_start
        buckets, seconds = self.buckets, self.seconds
        seconds[0] += _count_durations(buckets[0], done, times.arrived)
        seconds[1] += _count_durations(buckets[1], taken, times.arrived)
        buckets[2][bisect_left(DURATION_EDGES, compute_input)] += requests
        buckets[3][bisect_left(DURATION_EDGES, compute)] += requests
        buckets[4][bisect_left(DURATION_EDGES, compute_output)] += requests
        seconds[2] += compute_input * requests
        seconds[3] += compute * requests
        seconds[4] += compute_output * requests
        size = self.batch_sizes.get(times.rows)
        if size is None:
            size = self.batch_sizes[times.rows] = [0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0, 0.0]
        size[1] += compute_input
        size[2] += compute
        size[3] += compute_output
        cost = times.cost
        if cost is not None:
            logarithm = log(cost) if cost > 0 else _LOG_OF_NOTHING
            size[4] += 1
            size[5] += cost
            size[6] += cost * cost
            size[7] += logarithm
            size[8] += logarithm * logarithm
        size[0] += 1
        self.padding += times.padded_rows - times.rows
        self.last_inference = self.wall_clock()
        self.success += requests

    def record_nonfinite(self, count: int) -> None:
        """Count `count` requests of a batch whose answers hold NaN or infinity; they have succeeded all the same."""
        self.nonfinite += count

    def record_dispatch(self, reason: DispatchReason) -> None:
        """Count a batch that was handed to an instance."""
        self.dispatches[reason] += 1

    def record_drop(self, cause: DropCause, count: int = 1) -> None:
        """Count `count` requests that were of no use; those that were not answered at all are rejected ones too."""
        self.drops[cause] += count
        if cause is not DropCause.LATE:
            self.failures[FailureReason.REJECTED] += count

    def record_failure(self, reason: FailureReason, count: int = 1, seconds: float = 0.0) -> None:
        """Count `count` requests that failed, which together took `seconds`. They touch no other number (Triton's rule)."""
        self.failure_seconds[reason] += seconds
        self.failures[reason] += count


def _count_durations(buckets: list[int], end: float, starts: Sequence[float]) -> float:
    """Put `end - start` of each start into its bucket and return their sum.

    The sum is of the differences: sums of monotonic times themselves have lost the nanoseconds after a few weeks of uptime.
    """
    if len(starts) <= _FEW:
        total = 0.0
        for start in starts:
            duration = end - start
            buckets[bisect_left(DURATION_EDGES, duration)] += 1
            total += duration
        return total
    # Requests of one batch came close together, so their sorted durations span few buckets: one bisect per bucket. At 64
    # requests 2.0-2.7 µs, where searchsorted and bincount take 3.7 and one bisect a request 5.4.
    durations = [end - start for start in starts]
    durations.sort()
    last = bisect_left(DURATION_EDGES, durations[-1])
    counted = 0
    for index in range(bisect_left(DURATION_EDGES, durations[0]), last):
        upto = bisect_right(durations, DURATION_EDGES[index])
        buckets[index] += upto - counted
        counted = upto
    buckets[last] += len(durations) - counted
    return sum(durations)


@dataclass(frozen=True, slots=True)
class BatchSizeCounts:
    """Executions of one batch size and the seconds they spent. For comparing versions also, of those whose cost is known, how many and
    the sums of their costs, of the squares, of the logarithms and of the squares of these: how much costs vary, and what is typical
    despite stray ones.

    The cost is the CPU time of the thread that ran the batch, where that does the work. By the clock a canary would seem slow: on the
    same cores its few batches run beside the old version's nearly always, and the old version's seldom beside one of the canary's.
    """

    executions: int
    compute_input: float
    compute: float
    compute_output: float
    costs: int
    cost: float
    cost_squares: float
    cost_logs: float
    cost_log_squares: float


@dataclass(frozen=True, slots=True)
class CounterSnapshot:
    """Sums over all shards.

    `buckets[stage]`: counts per bucket of DURATION_EDGES and one beyond the last (not cumulative), `seconds[stage]` their sums,
    one entry a request. `row_buckets` likewise over ROW_EDGES, one entry a batch. `batch_sizes` is by rows, ascending.
    `failures` and `failure_seconds` are by FailureReason, `dispatches` by DispatchReason, `drops` by DropCause; `last_inference` is the
    wall clock's.
    `nonfinite`: requests answered with NaN or infinity, of those that were looked at (BatchRunner.screen_outputs).
    """

    success: int
    rows: int
    batches: int
    padding: int
    failures: tuple[int, ...]
    failure_seconds: tuple[float, ...]
    dispatches: tuple[int, ...]
    drops: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    row_buckets: tuple[int, ...]
    batch_sizes: dict[int, BatchSizeCounts]
    last_inference: float
    nonfinite: int


class VersionCounters:
    """All shards of one version, and what was wrong with its inputs' values. Any thread; each shard then belongs to one writer."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._shards: list[CounterShard] = []
        self.exemplars = Exemplars(len(Stage), DURATION_EDGES)
        """Traced requests for the buckets of `snapshot`; none where nothing is traced."""
        self._wall_clock = wall_clock
        self._invalid: dict[tuple[str, str, str], int] = {}
        self._invalid_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"VersionCounters({self._shards!r})"

    def shard(self) -> CounterShard:
        shard = CounterShard(self._wall_clock)
        self._shards.append(shard)
        return shard

    def count_invalid(self, tensor: str, problem: str, action: str, values: int) -> None:
        with self._invalid_lock:
            key = (tensor, problem, action)
            self._invalid[key] = self._invalid.get(key, 0) + values

    @property
    def invalid_values(self) -> dict[tuple[str, str, str], int]:
        """By input, what was wrong, and what became of the request."""
        return self._invalid.copy()

    def rows(self) -> int:
        """Inferred so far."""
        return sum([int(rows * sums[0]) for shard in self._shards.copy() for rows, sums in shard.batch_sizes.copy().items()])

    def busy_seconds(self) -> tuple[float, float]:
        """Seconds that batches took so far, from gathering to encoding, and how many there were."""
        sizes = [sums for shard in self._shards.copy() for sums in shard.batch_sizes.copy().values()]
        return sum([sums[1] + sums[2] + sums[3] for sums in sizes]), sum([sums[0] for sums in sizes])

    def snapshot(self) -> CounterSnapshot:
        shards = self._shards.copy()
        success = sum([shard.success for shard in shards])  # first: see the rules above
        sizes = _total_sizes(shards)
        return CounterSnapshot(
            success=success,
            rows=sum([rows * counts.executions for rows, counts in sizes.items()]),
            batches=sum([counts.executions for counts in sizes.values()]),
            padding=sum([shard.padding for shard in shards]),
            failures=_total([shard.failures for shard in shards], len(FailureReason)),
            failure_seconds=_total([shard.failure_seconds for shard in shards], len(FailureReason)),
            dispatches=_total([shard.dispatches for shard in shards], len(DispatchReason)),
            drops=_total([shard.drops for shard in shards], len(DropCause)),
            buckets=tuple([_total([shard.buckets[stage] for shard in shards], _BUCKETS) for stage in Stage]),
            seconds=_total([shard.seconds for shard in shards], len(Stage)),
            row_buckets=_row_buckets(sizes),
            batch_sizes=sizes,
            last_inference=max([shard.last_inference for shard in shards], default=0.0),
            nonfinite=sum([shard.nonfinite for shard in shards]),
        )


def _total(parts: Iterable[list[Number]], length: int) -> tuple[Number, ...]:
    copies = [part.copy() for part in parts]
    return tuple([sum(column) for column in zip(*copies, strict=True)]) if copies else (0,) * length


def _batch_size_counts(executions: float, input: float, compute: float, output: float, costs: float, *rest: float) -> BatchSizeCounts:
    cost, squares, logs, log_squares = rest
    return BatchSizeCounts(int(executions), input, compute, output, int(costs), cost, squares, logs, log_squares)


def _total_sizes(shards: Iterable[CounterShard]) -> dict[int, BatchSizeCounts]:
    totals: dict[int, list[float]] = {}
    for shard in shards:
        # dict.copy is one C call; iterating the live one could meet a size being added.
        for rows, sums in shard.batch_sizes.copy().items():
            total = totals.get(rows)
            totals[rows] = sums.copy() if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    return {rows: _batch_size_counts(*sums) for rows, sums in sorted(totals.items())}


def _row_buckets(sizes: dict[int, BatchSizeCounts]) -> tuple[int, ...]:
    buckets = [0] * (len(ROW_EDGES) + 1)
    for rows, counts in sizes.items():
        buckets[bisect_left(ROW_EDGES, rows)] += counts.executions
    return tuple(buckets)
