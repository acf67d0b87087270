"""headrace and tritonclient define the same protobuf names; both must load and work in one process, in either order."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
{imports}
import asyncio, pathlib, sys, tempfile
import numpy as np
sys.path.insert(0, {tests!r})
import onnx_models
import tritonclient.grpc.aio as aio
from headrace.testing import serve_in_process

async def main():
    with tempfile.TemporaryDirectory() as folder:
        onnx_models.save(onnx_models.mlp(16, 64, 64, 4), pathlib.Path(folder) / "mlp" / "1")
        async with serve_in_process(folder) as server, serve_in_process(folder) as other:
            for each in (server, other):
                async with aio.InferenceServerClient(each.grpc_addresses[0]) as client:
                    tensor = tritonclient.grpc.InferInput("x", [2, 16], "FP32")
                    tensor.set_data_from_numpy(np.ones((2, 16), np.float32))
                    print((await client.infer("mlp", [tensor])).as_numpy("y").shape)

asyncio.run(main())
"""


@pytest.mark.parametrize("first", ["headrace.wire.messages", "tritonclient.grpc"])
def test_headrace_and_tritonclient_work_in_one_process_and_so_do_two_servers(first: str) -> None:
    second = {"headrace.wire.messages", "tritonclient.grpc"} - {first}
    imports = f"import {first}\nimport {second.pop()}"
    tests = str(__import__("pathlib").Path(__file__).parent.parent)
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(imports=imports, tests=tests)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n")[:2] == ["(2, 4)", "(2, 4)"]
