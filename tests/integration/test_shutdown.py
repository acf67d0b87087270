"""Starting and stopping as an operator does: a real process, real signals, a real client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_models
import pytest
import tritonclient.grpc as triton


class ServerProcess:
    """`headrace serve` on free ports. Reads its log lines as they come."""

    def __init__(self, repository: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "headrace.cli", "serve", "--models", str(repository)]
        command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-format", "json", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self.process.stderr is not None
        self._stderr: IO[str] = self.process.stderr
        self.events: list[dict[str, Any]] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        for line in self._stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        raise AssertionError(f"the server ended before {event!r}: {self.events}")

    def finish(self) -> int:
        for line in self._stderr:
            self.events.append(json.loads(line))
        return self.process.wait(timeout=20)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    onnx_models.save(onnx_models.slow(), tmp_path / "slow" / "1")
    return tmp_path


@pytest.fixture
def server(repository: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(repository)
    yield process
    process.process.kill()
    process.process.wait()
    process._stderr.close()


def slow_input() -> list[triton.InferInput]:
    tensor = triton.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
    return [tensor]


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_finishes_what_was_admitted_and_exits_0(server: ServerProcess, numbers: list[signal.Signals]) -> None:
    address = server.wait_for("server listening")["grpc"][0]
    server.wait_for("server ready")
    with triton.InferenceServerClient(address) as client:
        results: list[object] = []
        done = threading.Semaphore(0)

        def keep(result: object, error: object) -> None:
            results.append(error or result)
            done.release()

        # Calls on a connection that is not up yet start in any order; on this one they arrive in theirs.
        assert client.is_server_live()
        for _ in range(4):
            client.async_infer("slow", slow_input(), keep)
        # So the four are with the server once a fifth has been answered.
        assert client.is_server_live()
        for number in numbers:
            server.process.send_signal(number)
        for _ in range(4):
            assert done.acquire(timeout=20)
    assert [str(result) for result in results if not isinstance(result, triton.InferResult)] == []
    assert server.finish() == 0
    assert server.events[-1]["event"] == "server stopped"
    assert not [event for event in server.events if event["level"] in ("error", "warning")]


def has_ended_within(seconds: float, process: subprocess.Popen[str]) -> bool:
    """Between signals the process needs time: a storm of them keeps a nanosleep that is restarted after each from ever ending."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_a_second_signal_some_time_later_ends_the_process_at_once(repository: Path) -> None:
    onnx_models.save(onnx_models.slow(5_000_000), repository / "endless" / "1")
    (repository / "endless" / "model.toml").write_text("warmup_runs = 0")
    server = ServerProcess(repository)
    try:
        address = server.wait_for("server listening")["grpc"][0]
        server.wait_for("server ready")
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_live()
            client.async_infer("endless", slow_input(), lambda result, error: None)
            assert client.is_server_live()
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("server stopping")
            while not has_ended_within(0.1, server.process):
                server.process.send_signal(signal.SIGTERM)
        assert server.process.returncode == 1
    finally:
        server.process.kill()
        server.process.wait()
        server._stderr.close()


def test_a_repository_that_is_not_there_is_wrong_use_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace.cli", "serve", "--models", str(tmp_path / "nowhere"), "--grpc", "127.0.0.1:0", "--http", ""]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert "expected a directory, found nothing" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_signal_during_a_long_load_does_not_wait_for_it(tmp_path: Path) -> None:
    onnx_models.save(onnx_models.slow(iterations=30_000_000), tmp_path / "slow" / "1")  # a minute for each run of the warm-up
    server = ServerProcess(tmp_path)
    try:
        server.wait_for("server listening")
        server.process.send_signal(signal.SIGTERM)
        assert server.finish() == 0
        assert "server stopped" in [event["event"] for event in server.events]
        assert not [event for event in server.events if event["level"] == "error"]
    finally:
        server.process.kill()
        server.process.wait()
        server._stderr.close()
