"""The kernels run thread by thread on the CPU: their sources, compiled by g++ with emulation.h in CUDA's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from headrace_kernels.launches import Launch
from headrace_kernels.sources import DIRECTORY, kernel_names
from numpy.typing import NDArray

Array = NDArray[Any]

HERE = Path(__file__).parent


class Emulator:
    """Runs Launches over addresses of host memory. A misaligned wide access ends the process: g++ has it trap."""

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_char_p

    def run(self, launches: Sequence[Launch], order: int = 0) -> None:
        """`order` of a block's threads: 0 forward, 1 backward, else shuffled with it as the seed."""
        for launch in launches:
            values = [ctypes.c_void_p(one) if isinstance(one, int) else one for one in launch.arguments]
            addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            fault = self._run(launch.kernel.encode(), addresses, len(values), *launch.grid, *launch.block, launch.shared, order)
            assert not fault, f"{launch.kernel}: {fault.decode()}"


class EmulatedMachine:
    """What loadtests.kernel_checks runs on, here."""

    def __init__(self, emulator: Emulator, order: int = 0) -> None:
        self.multiprocessors = 1 + order % 3
        self._emulator = emulator
        self._order = order
        self._kept: list[Array] = []

    def upload(self, array: Array) -> int:
        return self.result(array.shape, array.dtype, array).address

    def result(self, shape: tuple[int, ...], dtype: Any, content: Array | None = None) -> EmulatedResult:
        result = EmulatedResult(shape, np.dtype(dtype), content)
        self._kept.append(result.around)
        return result

    def run(self, planned: Sequence[Launch]) -> None:
        self._emulator.run(planned, self._order)


class EmulatedResult:
    GUARD = 64

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], content: Array | None = None) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + 2 * self.GUARD + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        self.around = memory[start : start + size + 2 * self.GUARD]
        self.array = self.around[self.GUARD : self.GUARD + size].view(dtype).reshape(shape)
        if content is not None:
            self.array[...] = content

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def read(self) -> Array:
        beside = np.concatenate([self.around[: self.GUARD], self.around[-self.GUARD :]])
        assert (beside == 0xA5).all(), "something was written beside the result"
        return self.array


def build(directory: Path) -> Path:
    """Raises RuntimeError where g++ is missing or refuses."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++ was not found on PATH")
    source, library = directory / "emulation.cpp", directory / "emulation.so"
    names = [name for names in kernel_names().values() for name in names]
    entries = "\n".join(f'{{"{name}", {{Entry<{name}, decltype(&{name})>::call, parameters(&{name})}}}},' for name in names)
    source.write_text(_MAIN.replace("ENTRIES", entries))
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command = [compiler, *flags, "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{HERE}", f"-I{DIRECTORY}", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return library


_MAIN = r"""
#include "emulation.h"
#include "kernels.cu"

namespace emulation {
template <typename... A> constexpr unsigned parameters(void (*)(A...)) { return sizeof...(A); }
struct Known { void (*call)(void*); unsigned parameters; };
const std::map<std::string, Known> known = {
ENTRIES
};
}

extern "C" const char* run(const char* name, void** values, unsigned count, unsigned grid_x, unsigned grid_y, unsigned block_x,
    unsigned block_y, unsigned shared, int order) {
    auto found = emulation::known.find(name);
    if (found == emulation::known.end()) return "no such kernel";
    if (found->second.parameters != count) return "another number of arguments than the kernel has parameters";
    return emulation::run(found->second.call, values, {grid_x, grid_y, 1}, {block_x, block_y, 1}, shared, order);
}
"""
