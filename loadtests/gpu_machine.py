"""Which GPU, and the two rates that everything else is a fraction of: copying its memory, and multiplying matrices."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtests.gpu_device import GpuMachine, checked
from loadtests.machine import machine_facts

if TYPE_CHECKING:
    from loadtests.gpu_report import Report

COPIED = 512 << 20
"""Bytes of a copy: beyond every L2."""
SIDE = 8192
"""Of the matrices."""

# Out of cublas_api.h and library_types.h.
_FP16, _COMPUTE_FP32, _NOT_TRANSPOSED, _DEFAULT = 2, 68, 0, -1


def run(report: Report) -> dict[str, Any]:
    machine = GpuMachine(report.device_id)
    try:
        return {"facts": facts(machine), "copy_rate": copy_rate(machine), "matrix_rate": matrix_rate(machine)}
    finally:
        machine.close()


def facts(machine: GpuMachine) -> dict[str, str]:
    from cuda.bindings import driver

    properties = machine.device.properties
    found = {
        "gpu": machine.device.name,
        "compute capability": ".".join(map(str, machine.device.compute_capability)),
        "multiprocessors": str(properties.multiprocessor_count),
        "L2 bytes": f"{properties.l2_cache_size:,}",
        "memory bytes": f"{checked(driver.cuMemGetInfo())[1]:,}",
        "driver's CUDA": str(checked(driver.cuDriverGetVersion())),
        "kernels from": machine.kernels.modules.origin,
    }
    return {**found, **machine_facts()}


def copy_rate(machine: GpuMachine) -> float:
    """Bytes read plus bytes written per second, from one half of memory of the device to another."""
    from cuda.bindings import driver

    random = np.random.default_rng().integers(0, 256, COPIED, dtype=np.uint8)
    source, target = machine.upload(random), machine.allocate(COPIED)
    seconds = machine.time(lambda: checked(driver.cuMemcpyDtoDAsync(target, source, COPIED, machine.stream.handle)))
    return 2 * COPIED / seconds


def matrix_rate(machine: GpuMachine) -> float | str:
    """Operations per second of fp16 matrices with sums in fp32, by cuBLAS; a sentence where it is not there."""
    try:
        from cuda import pathfinder

        library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception as error:
        return f"not measured: {error}"
    handle, one, zero = ctypes.c_void_p(), ctypes.c_float(1), ctypes.c_float(0)
    _succeeded(library.cublasCreate_v2(ctypes.byref(handle)), "cublasCreate")
    _succeeded(library.cublasSetStream_v2(handle, ctypes.c_void_p(int(machine.stream.handle))), "cublasSetStream")
    generator = np.random.default_rng()
    a, b, c = (machine.upload(generator.normal(size=(SIDE, SIDE)).astype(np.float16)) for _ in range(3))

    def multiply() -> None:
        matrices = [(ctypes.c_void_p(matrix), _FP16, SIDE) for matrix in (a, b, c)]
        _succeeded(
            library.cublasGemmEx(
                *(handle, _NOT_TRANSPOSED, _NOT_TRANSPOSED, SIDE, SIDE, SIDE, ctypes.byref(one)),
                *matrices[0],
                *matrices[1],
                ctypes.byref(zero),
                *matrices[2],
                _COMPUTE_FP32,
                _DEFAULT,
            ),
            "cublasGemmEx",
        )

    seconds = machine.time(multiply)
    _succeeded(library.cublasDestroy_v2(handle), "cublasDestroy")
    return 2 * SIDE**3 / seconds


def _succeeded(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: status {status}")
