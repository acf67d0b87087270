"""One pool of threads for all models. It is the process's for good, so each test has a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx_models
import pytest

BEGIN = """
import asyncio, os, sys
from pathlib import Path
from headrace.backends.onnxruntime import OnnxRuntimeBackend as Backend
from headrace.config import InstanceConfig, ServerConfig
from headrace.errors import ConfigError
from headrace.testing import serve_in_process

path = Path(sys.argv[1])

def load(threads):
    backend = Backend(path / "m" / "1" / "model.onnx", InstanceConfig(threads=threads))
    backend.load()
    return backend

def count():
    return len(os.listdir("/proc/self/task"))
"""


def run(script: str, tmp_path: Path) -> list[str]:
    """What it prints."""
    onnx_models.save(onnx_models.mlp(16, 64, 4), tmp_path / "m" / "1")
    command = [sys.executable, "-c", BEGIN + script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")


@needs_proc
def test_models_that_share_threads_bring_none_of_their_own(tmp_path: Path) -> None:
    script = """
Backend.share_threads(3)
models = [load(4)]
before = count()
models += [load(4), load(0)]
print(count() - before, Backend.inspect(models[0].path).inputs[0].name)
"""
    assert run(script, tmp_path) == ["0 x"]


@needs_proc
def test_models_have_threads_of_their_own_by_default(tmp_path: Path) -> None:
    assert run("models = [load(1)]\nbefore = count()\nmodels.append(load(4))\nprint(count() - before)", tmp_path) == ["3"]


def test_two_servers_of_one_process_share_one_pool_and_cannot_have_two(tmp_path: Path) -> None:
    script = """
async def main():
    async with serve_in_process(path, shared_threads=2) as one, serve_in_process(path, shared_threads=2) as two:
        print(one.models.is_ready, two.models.is_ready)
        async with serve_in_process(path) as without:
            print(without.models.is_ready)
    try:
        async with serve_in_process(path, shared_threads=3):
            pass
    except ConfigError as error:
        print(error)

asyncio.run(main())
"""
    *ready, refusal = run(script, tmp_path)
    assert [line for line in ready if line.startswith("True")] == ["True True", "True"]
    assert refusal == "shared_threads 3: this process has a pool of 2 already, for all of its servers; it cannot be replaced"
