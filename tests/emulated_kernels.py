"""The kernels run thread by thread on the CPU: their sources, compiled by g++ with emulation.h in CUDA's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from headrace_kernels.launches import Launch
from headrace_kernels.sources import DIRECTORY, kernel_names

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


def build(directory: Path) -> Path:
    """Raises RuntimeError where g++ is missing or refuses."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++ was not found on PATH")
    source, library = directory / "emulation.cpp", directory / "emulation.so"
    entries = "\n".join(
        f'    {{"{name}", {{Entry<{name}, decltype(&{name})>::call, parameters(&{name})}}}},' for names in kernel_names().values() for name in names
    )
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
