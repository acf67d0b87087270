"""The kernels' own code, run thread by thread on the CPU with the launches that a GPU would get, against their definitions.

It shows that the logic is right in any order of threads. It cannot show what only a GPU has: real concurrency, its conversion
instructions, its expf and its division.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulated_kernels import EmulatedMachine, Emulator
from headrace_kernels import launches

from loadtests.kernel_checks import all_checks

CHECKS = all_checks()


@pytest.fixture
def generator() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", list(CHECKS))
def test_kernel_is_its_definition_whatever_the_order_of_threads(emulator: Emulator, generator: np.random.Generator, name: str) -> None:
    CHECKS[name](EmulatedMachine(emulator, int(generator.integers(0, 1000))), generator)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["screen float32", "histogram float32, 3 x 64", "topk float32, 40 of 3001", "softmax float32, 1025"])
def test_kernel_with_barriers_is_its_definition_forward_and_backward(
    emulator: Emulator, generator: np.random.Generator, name: str, order: int
) -> None:
    CHECKS[name](EmulatedMachine(emulator, order), generator)


@pytest.mark.parametrize("name", ["gather float32 to float16", "normalize from a slab", "normalize smaller, NCHW float32"])
def test_more_rows_than_a_grid_has_lines(
    emulator: Emulator, generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(launches, "MOST_LINES", 2)
    CHECKS[name](EmulatedMachine(emulator, int(generator.integers(0, 1000))), generator)


def test_a_launch_with_too_few_threads_is_seen(emulator: Emulator, generator: np.random.Generator) -> None:
    """The checks can fail: half of a block's threads write half of the result."""

    class Halved(EmulatedMachine):
        def run(self, planned):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            super().run([replace(one, block=(one.block[0] // 2, 1)) for one in planned])

    with pytest.raises(AssertionError):
        CHECKS["softmax float32, 2050"](Halved(emulator, 0), generator)
