"""The kernels on a GPU against their definitions, launched and replayed from graphs, with a fresh seed each time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from headrace_kernels import launches

from loadtests.gpu_device import GpuMachine, KernelsUnavailable, find_device
from loadtests.kernel_checks import all_checks, check_histogram

pytestmark = pytest.mark.gpu

CHECKS = all_checks()


@pytest.fixture(scope="module", params=["launched", "through a graph"])
def machine(request: pytest.FixtureRequest) -> Iterator[GpuMachine]:
    try:
        find_device()
    except KernelsUnavailable as error:
        pytest.skip(f"no GPU: {error}")
    machine = GpuMachine(through_graph=request.param == "through a graph")
    yield machine
    machine.close()


@pytest.fixture
def generator() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", list(CHECKS))
def test_kernel_is_its_definition(machine: GpuMachine, generator: np.random.Generator, name: str) -> None:
    CHECKS[name](machine, generator)


@pytest.mark.parametrize(("features", "edge_count"), [(1, 10), (1, 63), (300, 12), (2000, 64)])
def test_histogram_of_many_values_counts_exactly(
    machine: GpuMachine, generator: np.random.Generator, features: int, edge_count: int
) -> None:
    check_histogram(machine, generator, "float32", features, edge_count, most=4_000_000 // features)


def test_a_graph_sees_what_is_new_in_memory(machine: GpuMachine, generator: np.random.Generator) -> None:
    """Captured once, replayed with another batch: other rows, and another number of them."""
    scores = machine.result((64, 1000), np.float32, generator.normal(size=(64, 1000)))
    result = machine.result((64, 1000), np.float32)
    graph = machine.capture([launches.softmax(scores=scores.address, into=result.address, rows=64, classes=1000, datatype="float32")])
    for _ in range(3):
        batch = generator.normal(size=(64, 1000)).astype(np.float32)
        again = machine.copies(machine.upload(batch), batch.nbytes, 1)[0]
        machine.overwrite(scores.address, again, batch.nbytes)
        graph.launch(machine.stream)
        machine.stream.sync()
        expected = np.exp(batch - batch.max(axis=1, keepdims=True))
        np.testing.assert_allclose(result.read(), expected / expected.sum(axis=1, keepdims=True), rtol=1e-5)
