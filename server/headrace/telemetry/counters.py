"""What is counted per model version: plain arrays, written on the hot path, summed only when somebody looks.

Each writer thread has its own shard, because `+=` on an array element is a read and a write that another thread can come
between. A reader may see a batch half counted (the rows, not yet its duration); every number only grows, so the next look
has it. prometheus_client's observe() takes a lock and costs more than the whole decode, hence none of it here.
"""

from __future__ import annotations

import enum
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

DURATION_EDGES = (
    0.00005, 0.0001, 0.00015, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Seconds. 1-2.5-5 steps over what models take, finer at the low end, where a tiny model's whole latency lies."""
ROW_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_EDGES = np.array(DURATION_EDGES)
_BUCKETS = len(DURATION_EDGES) + 1


class FailureReason(enum.IntEnum):
    """Triton's four words for why a request failed."""

    REJECTED = 0
    CANCELED = 1
    BACKEND = 2
    OTHER = 3


class Stage(enum.IntEnum):
    """The durations of one request. `REQUEST` is from the message's arrival to its encoded answer."""

    REQUEST = 0
    QUEUE = 1
    COMPUTE_INPUT = 2
    COMPUTE = 3
    COMPUTE_OUTPUT = 4


class BatchTimes:
    """One executed batch; times are time.monotonic(), one `arrived` and `enqueued` a request."""

    __slots__ = ("arrived", "done", "enqueued", "input_done", "output_start", "padded_rows", "rows", "taken")

    def __init__(
        self,
        *,
        rows: int,
        padded_rows: int,
        arrived: Sequence[float],
        enqueued: Sequence[float],
        taken: float,
        input_done: float,
        output_start: float,
        done: float,
    ) -> None:
        self.rows = rows
        self.padded_rows = padded_rows
        self.arrived = arrived
        self.enqueued = enqueued
        self.taken = taken
        self.input_done = input_done
        self.output_start = output_start
        self.done = done


class CounterShard:
    """The counts of one writer. Lists, not numpy arrays: adding to one element of a list costs a third."""

    __slots__ = ("batch_sizes", "batches", "buckets", "fail_count", "last_inference", "padding", "row_buckets", "rows", "seconds", "success")

    def __init__(self) -> None:
        self.buckets: list[list[int]] = [[0] * _BUCKETS for _ in Stage]
        self.seconds = [0.0] * len(Stage)
        self.row_buckets = [0] * (len(ROW_EDGES) + 1)
        self.batch_sizes: dict[int, list[float]] = {}
        self.success = 0
        self.rows = 0
        self.batches = 0
        self.padding = 0
        self.fail_count = [0] * len(FailureReason)
        self.last_inference = 0.0

    def record_batch(self, times: BatchTimes) -> None:
        """Count a batch that succeeded. Every request in it is charged the whole batch's compute durations (Triton's rule)."""
        requests = len(times.arrived)
        self._record_requests(times, requests)
        compute_input = times.input_done - times.taken
        compute = times.output_start - times.input_done
        compute_output = times.done - times.output_start
        buckets, seconds = self.buckets, self.seconds
        for stage, duration in ((2, compute_input), (3, compute), (4, compute_output)):
            buckets[stage][bisect_left(DURATION_EDGES, duration)] += requests
            seconds[stage] += duration * requests
        self.row_buckets[bisect_left(ROW_EDGES, times.rows)] += 1
        size = self.batch_sizes.get(times.rows)
        if size is None:
            size = self.batch_sizes[times.rows] = [0, 0.0, 0.0, 0.0]
        size[0] += 1
        size[1] += compute_input
        size[2] += compute
        size[3] += compute_output
        self.rows += times.rows
        self.batches += 1
        self.padding += times.padded_rows - times.rows
        self.last_inference = time.time()
        self.success += requests

    def _record_requests(self, times: BatchTimes, requests: int) -> None:
        if requests <= 8:
            request_buckets, queue_buckets = self.buckets[0], self.buckets[1]
            for arrived, enqueued in zip(times.arrived, times.enqueued, strict=True):
                request_buckets[bisect_left(DURATION_EDGES, times.done - arrived)] += 1
                queue_buckets[bisect_left(DURATION_EDGES, times.taken - enqueued)] += 1
        else:
            self._count(0, times.done - np.array(times.arrived))
            self._count(1, times.taken - np.array(times.enqueued))
        self.seconds[0] += requests * times.done - sum(times.arrived)
        self.seconds[1] += requests * times.taken - sum(times.enqueued)

    def _count(self, stage: int, durations: Floats) -> None:
        found = np.bincount(_EDGES.searchsorted(durations)).tolist()
        buckets = self.buckets[stage]
        for index, count in enumerate(found):
            buckets[index] += count

    def record_failure(self, reason: FailureReason, count: int = 1) -> None:
        self.fail_count[reason] += count


@dataclass(frozen=True, slots=True)
class BatchSizeCounts:
    """Executions of one batch size and the seconds they spent."""

    executions: int
    compute_input: float
    compute: float
    compute_output: float


@dataclass(frozen=True, slots=True)
class CounterSnapshot:
    """Sums over all shards. `buckets[stage]` are counts per bucket of DURATION_EDGES (not cumulative), `seconds[stage]` sums."""

    success: int
    rows: int
    batches: int
    padding: int
    failures: tuple[int, ...]
    buckets: Counts
    seconds: Floats
    row_buckets: Counts
    batch_sizes: dict[int, BatchSizeCounts]
    last_inference: float


class VersionCounters:
    """All shards of one version. `shard` may be called from any thread; each shard then belongs to one writer."""

    def __init__(self) -> None:
        self._shards: list[CounterShard] = []
        self._lock = threading.Lock()

    def shard(self) -> CounterShard:
        shard = CounterShard()
        with self._lock:
            self._shards.append(shard)
        return shard

    def snapshot(self) -> CounterSnapshot:
        shards = list(self._shards)
        sizes: dict[int, Any] = {}
        for shard in shards:
            for rows, sums in list(shard.batch_sizes.items()):
                sizes[rows] = np.add(sizes.get(rows, 0), sums)
        return CounterSnapshot(
            success=sum(shard.success for shard in shards),
            rows=sum(shard.rows for shard in shards),
            batches=sum(shard.batches for shard in shards),
            padding=sum(shard.padding for shard in shards),
            failures=tuple(sum(shard.fail_count[reason] for shard in shards) for reason in FailureReason),
            buckets=_total([shard.buckets for shard in shards], (len(Stage), _BUCKETS), np.int64),
            seconds=_total([shard.seconds for shard in shards], (len(Stage),), np.float64),
            row_buckets=_total([shard.row_buckets for shard in shards], (len(ROW_EDGES) + 1,), np.int64),
            batch_sizes={rows: BatchSizeCounts(int(s[0]), *map(float, s[1:])) for rows, s in sorted(sizes.items())},
            last_inference=max((shard.last_inference for shard in shards), default=0.0),
        )


def _total(parts: Sequence[Any], shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    total = np.zeros(shape, dtype)
    for part in parts:
        total += np.array(part, dtype)
    return total
