"""A server under measurement as a process of our own: pinned to cores, waited for, accounted, and always stopped.

The CPU time and memory are of the whole process tree: Triton's Python backend runs the model in a child process.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import tritonclient.grpc as triton

TICK = 1.0 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class ServerFailed(Exception):
    """The server under measurement did not start, did not get ready, or went away. Carries the end of its log."""


def free_port(count: int = 1) -> int:
    """The first of `count` consecutive free loopback ports (Triton's peer takes two). Another process may still be faster."""
    for _ in range(100):
        with ExitStack() as held:
            try:
                first = held.enter_context(_bound(0)).getsockname()[1]
                for offset in range(1, count):
                    held.enter_context(_bound(first + offset))
            except (OSError, OverflowError):
                continue
            return int(first)
    raise ServerFailed(f"no {count} consecutive free ports found on 127.0.0.1")


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", port))
    except BaseException:
        listener.close()
        raise
    return listener


def pinned(command: Sequence[str], cores: Iterable[int]) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, cores)), *command]


def _process_table() -> dict[int, int]:
    """Process id -> parent's id, of all processes there are."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int(_stat_fields(int(entry.name))[1])
    return parents


def _stat_fields(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on: the command before it is in parentheses and may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def process_tree(root: int) -> list[int]:
    """`root` and everything that descends from it."""
    parents = _process_table()
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that the processes have used so far; those that are gone count nothing."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            fields = _stat_fields(pid)
            total += (int(fields[11]) + int(fields[12])) * TICK
    return total


class ServerProcess:
    """One started server and its descendants, in a process group of its own. Leaving the `with` block stops all of them.

    Where the system can do it the kernel also kills the server when the measuring process dies without coming that far.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        address: str,
        cores: Iterable[int],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self.command = pinned(command, cores)
        self.log = log
        # Nothing of ours: what a server reads there, its measurement would not say.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        self._environment = {**inherited, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"ServerProcess({self.address}, pid={self._process.pid if self._process else None})"

    def __enter__(self) -> Self:
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                [*guard, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailed("the server was not started")
        return self._process.pid

    def wait_ready(self, models: Sequence[str], timeout: float = 60.0) -> float:
        """Block until server and models say they are ready; the seconds it took. Raises ServerFailed with the log's end."""
        started = time.monotonic()
        with triton.InferenceServerClient(self.address) as client:
            while not self._is_ready(client, models):
                if self._process is None or self._process.poll() is not None:
                    raise ServerFailed(f"server ended while it was waited for (exit {self.exit_code}):\n{self.log_tail()}")
                if time.monotonic() - started > timeout:
                    raise ServerFailed(f"{', '.join(models)} not ready at {self.address} after {timeout:.0f} s:\n{self.log_tail()}")
                time.sleep(0.1)
        return time.monotonic() - started

    @staticmethod
    def _is_ready(client: triton.InferenceServerClient, models: Sequence[str]) -> bool:
        try:
            return bool(client.is_server_ready(client_timeout=2.0)) and all(
                client.is_model_ready(model, client_timeout=2.0) for model in models
            )
        except triton.InferenceServerException:
            return False

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def cpu_seconds(self) -> float:
        return cpu_seconds(process_tree(self.pid))

    def resident_bytes(self) -> int:
        total = 0
        for pid in process_tree(self.pid):
            with suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        return total

    def threads(self) -> int:
        return sum(_entries(f"/proc/{pid}/task") for pid in process_tree(self.pid))

    def open_files(self) -> int:
        return sum(_entries(f"/proc/{pid}/fd") for pid in process_tree(self.pid))

    def stop(self, grace: float = 10.0) -> None:
        """SIGINT to the server; SIGKILL to all that is left of its group after `grace` seconds. Does nothing a second time."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _entries(directory: str) -> int:
    try:
        return sum(1 for _ in Path(directory).iterdir())
    except OSError:
        return 0


def exit_on_terminate() -> None:
    """Have SIGTERM unwind this process like Ctrl-C does, so that the servers it started are stopped."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
