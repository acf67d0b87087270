import socket
import sys
import time
from pathlib import Path

import pytest

from loadtests.contestants import Contestant, headrace, http_address, triton_peer
from loadtests.process import ServerFailed, ServerProcess, cpu_seconds, free_port, process_tree

# Prints its child's id, and does not listen to SIGINT.
PARENT = "trap '' INT; sleep 300 & echo $!; wait"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def child_of(server: ServerProcess) -> int:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if text := server.log.read_text().strip():
            return int(text)
    raise AssertionError("the process printed nothing")


def test_nothing_survives_a_stop(tmp_path: Path) -> None:
    with ServerProcess(["bash", "-c", PARENT], address="127.0.0.1:1", cores=[0], log=tmp_path / "log") as server:
        child = child_of(server)
        assert set(process_tree(server.pid)) >= {server.pid, child}
        server.stop(grace=0.1)
        assert server.exit_code == -9
    until = time.monotonic() + 10
    while is_running(child) and time.monotonic() < until:
        pass
    assert not is_running(child)


def test_memory_threads_and_files_are_of_the_whole_tree(tmp_path: Path) -> None:
    with ServerProcess(["bash", "-c", PARENT], address="127.0.0.1:1", cores=[0], log=tmp_path / "log") as server:
        child_of(server)
        assert server.threads() == 2
        assert server.open_files() >= 6
        assert server.resident_bytes() > 1_000_000
        server.stop(grace=0.1)


def test_cpu_time_is_counted(tmp_path: Path) -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    with ServerProcess(spin, address="127.0.0.1:1", cores=[0], log=tmp_path / "log") as server:
        until = time.monotonic() + 10
        while server.cpu_seconds() < 0.05 and time.monotonic() < until:
            pass
        assert server.cpu_seconds() >= 0.05


def test_cpu_time_of_what_is_gone_is_nothing() -> None:
    assert cpu_seconds([2**22 + 1]) == 0.0


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        ServerProcess(command, address=f"127.0.0.1:{free_port()}", cores=[0], log=tmp_path / "log") as server,
        pytest.raises(ServerFailed, match="no such model"),
    ):
        server.wait_ready(["m"], 10)


def test_free_ports_are_consecutive() -> None:
    first = free_port(2)
    for port in (first, first + 1):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_contestants_command_is_filled(tmp_path: Path) -> None:
    contestant = Contestant("other", "serve '{repository}/a b' {model} --grpc={port} --http={http_port}")
    server = contestant.server(tmp_path, "mlp", cores=[1, 2], log=tmp_path / "log")
    port = int(server.address.rpartition(":")[2])
    assert server.command == ["taskset", "-c", "1,2", "serve", f"{tmp_path}/a b", "mlp", f"--grpc={port}", f"--http={port + 1}"]
    assert http_address(server) == f"127.0.0.1:{port + 1}"


def test_headrace_is_started_on_a_transport(tmp_path: Path) -> None:
    command = headrace("grpcio").server(tmp_path, "mlp", cores=[0], log=tmp_path / "log").command
    assert command[3:7] == [sys.executable, "-m", "headrace.cli", "serve"]
    assert command[-2:] == ["--transport", "grpcio"]


def test_triton_gets_one_model(tmp_path: Path) -> None:
    command = triton_peer("peer.sh").server(tmp_path, "mlp", cores=[0], log=tmp_path / "log", max_batch=8).command
    assert command[3:8] == ["bash", "peer.sh", "mlp", str(tmp_path / "mlp" / "1" / "model.onnx"), "8"]


def test_a_server_reads_nothing_of_the_measurements_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TRITON_PEER", "peer.sh")
    monkeypatch.setenv("KEPT", "1")
    show = ["bash", "-c", "env | grep -c '^HEADRACE_'; echo kept=$KEPT $HEADRACE_LOG_LEVEL; exec sleep 300"]
    log = tmp_path / "log"
    with ServerProcess(show, address="127.0.0.1:1", cores=[0], log=log, environment={"HEADRACE_LOG_LEVEL": "debug"}):
        until = time.monotonic() + 10
        while not log.read_text().endswith("debug\n") and time.monotonic() < until:
            pass
    assert log.read_text().split("\n")[:2] == ["1", "kept=1 debug"]
