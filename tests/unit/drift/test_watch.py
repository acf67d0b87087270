from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
from headrace.batching.observer import RanBatch
from headrace.config import DriftConfig, ModelConfig
from headrace.drift.plan import choose
from headrace.drift.watch import DriftWatch, Subject
from headrace.requests import Reply, Ticket
from headrace.signature import DataType, Signature, TensorSpec
from headrace.telemetry.counters import VersionCounters
from headrace.testing import CollectingOutlet

SIGNATURE = Signature("m", (TensorSpec("x", DataType.FP32, (-1, 4)),), (TensorSpec("y", DataType.FP32, (-1,)),), max_batch_size=8)
ROWS = 8


@pytest.fixture
def watch() -> DriftWatch:
    config = DriftConfig(learn_rows=10_000_000)
    plan = choose(SIGNATURE, ModelConfig("m", drift=config))
    return DriftWatch(Subject("m", 1, config, SIGNATURE, plan, None, VersionCounters()), lambda: None, lambda news: None)


def batches(began: float, every: float) -> Iterator[RanBatch]:
    ticket = Ticket(Reply(CollectingOutlet()), ROWS, None, [], (0,), arrived=0.0)
    inputs = {"x": np.ones((ROWS, 4), np.float32)}
    for number in count():
        yield RanBatch([ticket], ROWS, inputs, ["y"], [np.ones(ROWS, np.float32)], began + number * every)


def show(watch: DriftWatch, number: int, began: float) -> int:
    """Rows counted of so many batches, a millisecond apart."""
    before = watch.report().seen_rows
    for _, batch in zip(range(number), batches(began, 0.001), strict=False):
        watch.look(batch)
    watch.count_pending()
    return watch.report().seen_rows - before


def test_the_first_rows_of_a_burst_are_counted_whole_although_the_one_before_it_was_too_dear(watch: DriftWatch) -> None:
    assert show(watch, 500, began=100.0) == 500 * ROWS
    watch._budget.stride = 400  # as after a burst that cost too much
    watch._countdown = 400
    assert show(watch, 400, began=100.6) < 40 * ROWS
    assert show(watch, 500, began=110.0) == 500 * ROWS
    assert 500 * ROWS < show(watch, 1000, began=120.0) < 600 * ROWS  # and of what is beyond them a part
