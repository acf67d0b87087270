from __future__ import annotations

import math
import random
import sys
import threading
from bisect import bisect_left
from itertools import pairwise

import pytest
from headrace.telemetry.counters import (
    DURATION_EDGES,
    ROW_EDGES,
    BatchTimes,
    CounterSnapshot,
    DispatchReason,
    FailureReason,
    Stage,
    VersionCounters,
)

NOON = 1_700_000_000.0


def batch(
    waits: list[float],
    *,
    rows: int | None = None,
    padded_rows: int | None = None,
    taken: float = 1000.0,
) -> BatchTimes:
    """Each request waited that long; then 2 ms input, 10 ms compute, 4 ms output."""
    rows = len(waits) if rows is None else rows
    return BatchTimes(
        rows=rows,
        padded_rows=rows if padded_rows is None else padded_rows,
        arrived=[taken - wait for wait in waits],
        taken=taken,
        input_done=taken + 0.002,
        output_start=taken + 0.012,
        done=taken + 0.016,
        cost=0.010,
    )


def counted(*batches: BatchTimes) -> CounterSnapshot:
    counters = VersionCounters(wall_clock=lambda: NOON)
    shard = counters.shard()
    for each in batches:
        shard.record_batch(each)
    return counters.snapshot()


def bucket_of(seconds: float) -> int:
    return bisect_left(DURATION_EDGES, seconds)


def test_nothing_counted_is_all_zero_and_of_full_length() -> None:
    counts = VersionCounters().snapshot()
    assert (counts.success, counts.rows, counts.batches, counts.padding, counts.last_inference) == (0, 0, 0, 0, 0.0)
    assert counts.failures == (0,) * len(FailureReason)
    assert [len(buckets) for buckets in counts.buckets] == [len(DURATION_EDGES) + 1] * len(Stage)
    assert counts.row_buckets == (0,) * (len(ROW_EDGES) + 1)
    assert counts.batch_sizes == {}


def test_every_request_is_charged_the_whole_batch_but_its_own_wait() -> None:
    counts = counted(batch([0.0001, 0.0009]))
    assert counts.seconds == pytest.approx((0.001 + 2 * 0.016, 0.001, 2 * 0.002, 2 * 0.010, 2 * 0.004))
    assert counts.success == 2


def test_rows_and_executions_are_counted_once_a_batch() -> None:
    counts = counted(batch([0.0], rows=3, padded_rows=4), batch([0.0, 0.0], rows=8), batch([0.0], rows=3, padded_rows=4))
    assert (counts.success, counts.rows, counts.batches, counts.padding) == (4, 14, 3, 2)
    assert list(counts.batch_sizes) == [3, 8]
    three = counts.batch_sizes[3]
    assert three.executions == 2
    assert (three.compute_input, three.compute, three.compute_output) == pytest.approx((0.004, 0.020, 0.008))
    each = math.log(0.010)
    assert (three.cost_squares, three.cost_logs, three.cost_log_squares) == pytest.approx((0.0002, 2 * each, 2 * each**2))


def test_last_inference_is_on_the_wall_clock() -> None:
    assert counted(batch([0.0])).last_inference == NOON


@pytest.mark.parametrize("requests", [1, 2, 8, 9, 64, 300])
def test_buckets_of_any_batch_size_equal_a_bisect_for_each_request(requests: int) -> None:
    chance = random.Random(requests)
    taken = 5_000_000.0
    waits = [10 ** chance.uniform(-6, 2) for _ in range(requests)]
    times = batch(waits, taken=taken)
    expected = [0] * (len(DURATION_EDGES) + 1)
    for start in times.arrived:
        expected[bucket_of(taken - start)] += 1
    counts = counted(times)
    assert counts.buckets[Stage.QUEUE] == tuple(expected)
    assert counts.seconds[Stage.QUEUE] == pytest.approx(sum(taken - start for start in times.arrived), rel=1e-12)


@pytest.mark.parametrize("requests", [1, 20])
def test_a_duration_on_an_edge_belongs_to_the_bucket_below(requests: int) -> None:
    times = batch([0.0] * requests, taken=0.0)
    times.input_done, times.output_start, times.done = 0.001, 0.002, 0.0025
    times.arrived = [-0.0025] * requests
    counts = counted(times)
    assert counts.buckets[Stage.REQUEST][bucket_of(0.005)] == requests
    assert counts.buckets[Stage.QUEUE][bucket_of(0.0025)] == requests
    assert counts.buckets[Stage.COMPUTE_INPUT][bucket_of(0.001)] == requests
    assert DURATION_EDGES[bucket_of(0.0025)] == 0.0025


def test_longer_than_the_last_edge_is_counted_beyond_it() -> None:
    assert counted(batch([61.0])).buckets[Stage.QUEUE][-1] == 1
    assert counted(batch([61.0] * 20)).buckets[Stage.QUEUE][-1] == 20


def test_small_durations_keep_their_nanoseconds_after_months_of_uptime() -> None:
    months = 2.0**23
    counts = counted(*[batch([2.0**-14] * 64, taken=months) for _ in range(100)])
    assert counts.seconds[Stage.QUEUE] == 6400 * 2.0**-14


def test_row_buckets_count_batches_by_their_rows() -> None:
    counts = counted(*[batch([0.0], rows=rows) for rows in (1, 2, 3, 4, 1025)])
    assert counts.row_buckets[:3] == (1, 1, 2)
    assert counts.row_buckets[-1] == 1
    assert sum(counts.row_buckets) == counts.batches


def test_failures_touch_nothing_but_failures() -> None:
    counters = VersionCounters()
    shard = counters.shard()
    shard.record_failure(FailureReason.REJECTED)
    shard.record_failure(FailureReason.BACKEND, 3, seconds=0.5)
    counts = counters.snapshot()
    assert counts.failures == (1, 0, 3, 0)
    assert counts.failure_seconds == (0.0, 0.0, 0.5, 0.0)
    assert (counts.success, counts.rows, sum(map(sum, counts.buckets))) == (0, 0, 0)


def test_dispatches_are_counted_by_reason() -> None:
    counters = VersionCounters()
    shard = counters.shard()
    for reason in (DispatchReason.FULL, DispatchReason.FULL, DispatchReason.DELAY):
        shard.record_dispatch(reason)
    assert counters.snapshot().dispatches == (2, 0, 1)


def test_shards_add_up() -> None:
    counters = VersionCounters()
    for waits in ([0.2], [0.2, 0.2], [0.2] * 20):
        counters.shard().record_batch(batch(waits, rows=2))
    counts = counters.snapshot()
    assert (counts.success, counts.batches, counts.rows) == (23, 3, 6)
    assert counts.batch_sizes[2].executions == 3
    assert counts.buckets[Stage.QUEUE][bucket_of(0.2)] == 23


def test_a_reader_beside_writers_sees_only_growth_and_never_more_answers_than_durations() -> None:
    counters = VersionCounters()
    batches = 2000

    def write(seed: int) -> None:
        chance = random.Random(seed)
        shard = counters.shard()
        for _ in range(batches):
            requests = chance.choice((1, 3, 30))
            shard.record_batch(batch([0.0004] * requests, rows=chance.randint(1, 50)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    try:
        for writer in writers:
            writer.start()
        seen = [counters.snapshot()]
        while any(writer.is_alive() for writer in writers):
            seen.append(counters.snapshot())
    finally:
        sys.setswitchinterval(interval)
        for writer in writers:
            writer.join()
    for before, after in pairwise(seen):
        assert before.success <= after.success
        assert all(a <= b for a, b in zip(before.seconds, after.seconds, strict=True))
        assert before.batches <= after.batches
    assert all(counts.success <= sum(buckets) for counts in seen for buckets in counts.buckets)
    final = counters.snapshot()
    assert final.batches == 3 * batches
    assert [sum(buckets) for buckets in final.buckets] == [final.success] * len(Stage)
