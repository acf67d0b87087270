"""As far as it goes without a device: that what is missing is named, and that cuda.core takes what would be launched."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from headrace_kernels import launches
from headrace_kernels.device import Kernels, _config, normalize_tolerance
from headrace_kernels.errors import KernelsUnavailable
from headrace_kernels.modules import cuda_core
from headrace_kernels.normalize import Normalize


def test_what_is_missing_is_named() -> None:
    try:
        message = f"nothing is missing: {Kernels(0)!r}"
    except KernelsUnavailable as error:
        message = str(error)
    if message.startswith("nothing"):
        pytest.skip(message)
    assert "cuda" in message.lower()


def test_cuda_core_takes_the_launches() -> None:
    """Without a driver there is no kernel to launch; how arguments are laid out for one is shown by the class that does it."""
    try:
        cuda_core()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    from cuda.core._kernel_arg_handler import ParamHolder

    (launch,) = launches.normalize(
        images=1 << 40, into=3, rows=4, height=9, width=8, channels=3, normalize=Normalize(size=(4, 4), scale=0.5, mean=(0.25,))
    )
    config = _config(launch.grid, launch.block, launch.shared)
    assert tuple(config.grid)[:2] == launch.grid
    assert tuple(config.block)[:2] == launch.block
    holder = ParamHolder(launch.arguments)
    places = (ctypes.c_void_p * len(launch.arguments)).from_address(holder.ptr)
    kinds = [ctypes.c_longlong if isinstance(one, int) else type(one) for one in launch.arguments]
    held = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]
    assert held == [one if isinstance(one, int) else one.value for one in launch.arguments]


def test_the_bindings_have_the_calls_that_put_a_kernel_on_a_device() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    core = pytest.importorskip("cuda.core")
    assert callable(driver.cuKernelGetFunction)
    assert callable(driver.cuFuncLoad)
    assert int(driver.CUkernel(4711)) == 4711
    assert hasattr(core.Kernel, "handle")


@pytest.mark.parametrize("size", [None, (5, 5)])
def test_the_definition_is_within_the_tolerance_that_the_kernel_is_held_to(size: tuple[int, int] | None) -> None:
    from loadtests.kernel_cases import near, normalized

    how = Normalize(size=size, mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))
    images = np.random.default_rng().integers(0, 256, (3, 17, 23, 3), dtype=np.uint8)
    near(how(images), normalized(images, how), "float32", normalize_tolerance(how))
