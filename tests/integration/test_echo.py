"""The servers that infer nothing, as processes, asked by the stock client."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from loadtests.calls import INFER_PATH, infer_inputs, infer_message
from loadtests.contestants import echo
from loadtests.h2load import Call, EchoedCall
from loadtests.process import ServerProcess

INPUTS = {"image": np.arange(600, dtype=np.float32).reshape(2, 300), "name": np.array([b"a", b""], object)}


def echo_server(transport: str, mode: str, directory: Path) -> ServerProcess:
    return echo(transport, mode).server(directory, "any", cores=os.sched_getaffinity(0), log=directory / "log")


def test_an_echo_answers_any_call_with_nothing(transport: str, tmp_path: Path) -> None:
    with echo_server(transport, "empty", tmp_path) as server:
        server.wait_ready(["any"])
        with triton.InferenceServerClient(server.address) as client:
            assert client.is_server_live()
            assert client.infer("any", infer_inputs(INPUTS)).get_response().ByteSize() == 0
        EchoedCall(Call("any", INPUTS, {})).check(server.address)


def test_tensors_come_back_as_they_were_sent(transport: str, tmp_path: Path) -> None:
    with echo_server(transport, "tensor", tmp_path) as server:
        server.wait_ready(["any"])
        with triton.InferenceServerClient(server.address) as client:
            result = client.infer("any", infer_inputs(INPUTS))
        assert result.get_response().model_name == "any"
        for name, sent in INPUTS.items():
            assert np.array_equal(result.as_numpy(name), sent)


def test_what_is_no_request_is_refused_and_the_next_one_answered(transport: str, tmp_path: Path) -> None:
    with echo_server(transport, "tensor", tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        server.wait_ready(["any"])
        infer = channel.unary_unary(INFER_PATH)
        with pytest.raises(grpc.RpcError) as refused:
            infer(infer_message("any", INPUTS)[:-1], timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert infer(infer_message("any", INPUTS), timeout=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_echo_stops_when_told_to(transport: str, number: signal.Signals, tmp_path: Path) -> None:
    with echo_server(transport, "empty", tmp_path) as server:
        server.wait_ready(["any"])
        os.kill(server.pid, number)
        assert server._process is not None
        assert server._process.wait(10) == 0


def test_an_address_that_is_taken_is_said(transport: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        command = [sys.executable, "-m", "loadtests.echo", transport, "--address", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"echo: could not listen on {address}: " in done.stderr
    assert "Traceback" not in done.stderr
