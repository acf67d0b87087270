"""What the warm-up learns of a model, from curves of known shape and machines of known noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_models
import pytest
from fake_cuda import HostBackend
from headrace.backends.base import ArtifactSignature
from headrace.batching.latency import worthwhile_batch
from headrace.config import InstanceConfig
from headrace.lifecycle.warm_up import NOTHING_KNOWN, TIME_BUDGET, BatchAxisError, Known, batch_sizes, measure, warm_up
from headrace.signature import DataType, Signature, TensorSpec
from headrace.testing import FakeBackend

POWERS = batch_sizes(64, ())


class Machine:
    """Runs a model whose l(b) is known, in virtual time. `noise`: by how much a run may take longer."""

    def __init__(self, latency: Callable[[int], float], noise: float = 0.0, seed: int = 0) -> None:
        self.latency = latency
        self.noise = noise
        self.rng = random.Random(seed)
        self.now = 0.0
        self.runs: list[int] = []

    def sample(self, rows: int) -> float:
        took = self.latency(rows) * (1 + self.noise * self.rng.random())
        self.now += took
        self.runs.append(rows)
        return took

    def measure(self, sizes: list[int] = POWERS, runs: int = 3, must_run_all: bool = False) -> dict[int, float]:
        return measure(self.sample, sizes, runs, must_run_all=must_run_all, left=lambda: TIME_BUDGET - self.now)


def falling(rows: int) -> float:
    """Like magika on one core: 154 rows a second at 1, 135 at 8, 114 at 64."""
    return rows / 154 * (1 + 0.35 * (rows - 1) / (rows + 8))


def rising(rows: int) -> float:
    """Like a GPU."""
    return 0.004 + 0.0002 * rows


def test_a_model_that_only_gets_slower_by_the_row_is_not_run_at_every_size() -> None:
    machine = Machine(falling)
    assert worthwhile_batch(machine.measure(), 64) == 1
    assert max(machine.runs) <= 16
    assert machine.now < 1.0


def test_a_model_that_gains_by_batching_is_measured_to_the_end() -> None:
    machine = Machine(rising)
    assert worthwhile_batch(machine.measure(), 64) == 64


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_machine_does_not_change_the_limit_by_much(seed: int) -> None:
    print("seed", seed)
    assert worthwhile_batch(Machine(falling, noise=0.3, seed=seed).measure(), 64) <= 4
    assert worthwhile_batch(Machine(rising, noise=0.3, seed=seed).measure(), 64) >= 32


def test_a_size_that_is_expected_to_take_longer_than_what_is_left_is_not_begun() -> None:
    machine = Machine(lambda rows: 1.5 + 0.5 * rows)
    seconds = machine.measure()
    assert machine.now <= TIME_BUDGET
    assert max(seconds) == 4


def test_sizes_that_were_asked_for_all_run_once_however_slow() -> None:
    machine = Machine(lambda rows: rows**2)
    assert set(machine.measure([1, 2, 4], must_run_all=True)) == {1, 2, 4}


def test_no_warm_up_runs_means_none() -> None:
    backend = FakeBackend.make()(Path("model.fake"), InstanceConfig())
    signature = Signature("m", backend.artifact.inputs, backend.artifact.outputs, 64)
    assert warm_up(backend, signature, POWERS, 0).seconds == {}
    assert backend.batches == []


def test_only_allowed_sizes_are_run() -> None:
    backend = FakeBackend.make()(Path("model.fake"), InstanceConfig())
    signature = Signature("m", backend.artifact.inputs, backend.artifact.outputs, 8)
    warm_up(backend, signature, [4, 8], 2, must_run_all=True)
    assert {len(batch["x"]) for batch in backend.batches} == {4, 8}


@pytest.mark.parametrize("is_restricted", [True, False])
@pytest.mark.parametrize("is_swap", [True, False])
def test_buffers_of_a_device_move_no_more_once_a_model_serves(is_restricted: bool, is_swap: bool, tmp_path: Path) -> None:
    """As what has been captured at their addresses would be captured anew, while a client waits."""
    path = onnx_models.save(onnx_models.identity(), tmp_path / "m/1")
    backend = HostBackend(path, InstanceConfig(device="cuda:0", options={"cuda_graph": "true"}))
    backend.load()
    artifact = HostBackend.inspect(path)
    sizes = [1, 1000, 9000, 30_000]
    known = Known(dict.fromkeys(sizes, 1.0)) if is_swap else NOTHING_KNOWN
    warmed = warm_up(backend, Signature("m", artifact.inputs, artifact.outputs, 30_000), sizes, 2, must_run_all=is_restricted, known=known)
    assert not warmed.failure
    runs = backend._runs
    assert runs is not None
    captured = runs._next_graph
    for rows in warmed.seconds:
        for _ in range(backend.lanes):
            backend.launch({"x": np.zeros((rows, 4), np.float32)}, None).release()
    assert set(warmed.seconds) >= {1, 1000}
    assert runs._next_graph == captured > 1 + 2 * backend.lanes
    backend.close()


@pytest.mark.parametrize("must_run_all", [True, False])
def test_a_backend_on_the_host_runs_a_known_models_sizes_upwards(must_run_all: bool) -> None:
    backend = FakeBackend.make()(Path("model.fake"), InstanceConfig())
    signature = Signature("m", backend.artifact.inputs, backend.artifact.outputs, 8)
    known = Known({1: 1.0, 4: 2.0, 8: 3.0})
    assert warm_up(backend, signature, [1, 4, 8], 2, must_run_all=must_run_all, known=known).seconds == known.seconds
    assert [len(batch["x"]) for batch in backend.batches] == ([4, 1, 8] if must_run_all else [4])


def test_a_false_batch_dimension_is_found_out() -> None:
    artifact = ArtifactSignature((TensorSpec("x", DataType.FP32, (-1, 2)),), (TensorSpec("y", DataType.FP32, (-1, 2)),))
    backend = FakeBackend.make(lambda inputs: [np.zeros((1, 2), "<f4")], artifact=artifact)(Path("model.fake"), InstanceConfig())
    with pytest.raises(BatchAxisError, match="for a batch of 2"):
        warm_up(backend, Signature("m", artifact.inputs, artifact.outputs, 8), [1, 2, 4, 8], 1)
