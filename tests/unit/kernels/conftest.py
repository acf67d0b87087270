from __future__ import annotations

import shutil

import emulated_kernels
import pytest


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> emulated_kernels.Emulator:
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found on PATH: the kernels are not run thread by thread on the CPU")
    return emulated_kernels.Emulator(emulated_kernels.build(tmp_path_factory.mktemp("emulation")))
