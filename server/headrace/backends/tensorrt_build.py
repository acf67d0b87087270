"""An engine is built in a process of its own: TensorRT takes minutes and gigabytes for it, crashes at times, and nothing else stops it.

    order   one line of JSON on the builder's standard input, which then stays open: when it ends, nobody wants the engine any more
    report  lines of JSON on its standard output: {"phase", "step", "steps"} while it works, at last {"done"} or {"error"}
    stderr  whatever else is said; of a builder that died, its end is shown

The plan itself goes into a file. The builder is tensorrt_builder.py.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from headrace.backends.tensorrt_options import BuildOptions
from headrace.backends.tensorrt_profiles import Profile, ShapeRange
from headrace.errors import LoadError
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

COMMAND = (sys.executable, "-P", "-m", "headrace.backends.tensorrt_builder")
"""-P: no module of the working directory, which may hold one called tensorrt."""
_LAST_WORDS = 1000
_LONGEST_LINE = 64 << 10
_LOG_INTERVAL = 15.0
_JOIN = 10.0
"""Seconds that a process may take to end once it was killed, or has reported its result."""


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """`device`: its index. `tensorrt`: the version that the plan is wanted of. Paths are absolute."""

    model: str
    output: str
    timings: str
    device: int
    tensorrt: str
    profiles: tuple[Profile, ...]
    build: BuildOptions

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def decode_order(line: bytes) -> BuildOrder:
    """Raises ValueError, KeyError or TypeError for what `encode` did not make."""
    given = json.loads(line)
    profiles = tuple(_decode_profile(profile) for profile in given.pop("profiles"))
    return BuildOrder(profiles=profiles, build=BuildOptions(**given.pop("build")), **given)


def _decode_profile(given: dict[str, Any]) -> Profile:
    ranges = {name: ShapeRange(**{end: tuple(shape) for end, shape in each.items()}) for name, each in given["inputs"].items()}
    return Profile(ranges, given["rows"])


@dataclass(frozen=True, slots=True)
class Progress:
    """TensorRT names its phases itself, and says no more of them than their steps."""

    phase: str = ""
    step: int = 0
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.phase} {self.step}/{self.steps}" if self.steps else self.phase or "starting"


class Build:
    """One builder process. Owns it, and the latest of what it has reported."""

    def __init__(
        self, order: BuildOrder, timeout: float, *, command: Sequence[str] = COMMAND, on_progress: Callable[[Progress], None] | None = None
    ) -> None:
        self.progress = Progress()
        self._order = order
        self._timeout = timeout
        self._command = command
        self._on_progress = on_progress or _Logged()
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._process: subprocess.Popen[bytes] | None = None
        self._is_done = False
        self._error = ""

    def __repr__(self) -> str:
        return f"Build({self._order.model}, {self.progress}{', done' if self._is_done else ''})"

    def run(self) -> None:
        """Block until the plan is in its file. Raises LoadError; then no process is left, whatever became of it."""
        with tempfile.TemporaryFile() as words:
            process = self._start(words)
            try:
                is_late = self._listen(process, time.monotonic() + self._timeout)
                if self._is_done or self._error:
                    _end(process)
            finally:
                self._kill()
                _close_pipes(process)
            self._judge(process.wait(), is_late, words)

    def cancel(self) -> None:
        """From any thread: end the process, and `run` with it."""
        with self._lock:
            self._is_cancelled = True
            self._kill_now()

    def _start(self, words: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_cancelled:
                raise LoadError(_GIVEN_UP)
            # Of a session of its own: an interrupt at the terminal is for the server, and so is the order of its end.
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, start_new_session=True, bufsize=0
            )
            self._process = process
        assert process.stdin is not None
        try:
            process.stdin.write(self._order.encode())
        except BrokenPipeError:
            pass  # it died at once; how is seen below
        return process

    def _listen(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Take in reports until it has none any more. True: it was still at it at the deadline."""
        assert process.stdout is not None
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not (self._is_done or self._error):
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    return True
                chunk = os.read(process.stdout.fileno(), _LONGEST_LINE)
                if not chunk:
                    return False
                *lines, pending = (pending + chunk).split(b"\n")
                pending = pending[-_LONGEST_LINE:]
                for line in lines:
                    self._take(line)
        return False

    def _take(self, line: bytes) -> None:
        """A library may write to standard output too: what is no report is passed over."""
        try:
            report = json.loads(line)
        except ValueError:
            return
        if not isinstance(report, dict):
            return
        if "error" in report:
            self._error = str(report["error"]) or "no reason given"
        elif "done" in report:
            self._is_done = True
        elif isinstance(report.get("phase"), str):
            step, steps = report.get("step"), report.get("steps")
            self.progress = Progress(report["phase"], step if isinstance(step, int) else 0, steps if isinstance(steps, int) else 0)
            self._on_progress(self.progress)

    def _judge(self, code: int, is_late: bool, words: IO[bytes]) -> None:
        """What became of it, by what is surest: 1. it was cancelled 2. it said that it failed 3. it was done 4. it was late 5. it died."""
        if self._is_cancelled:
            raise LoadError(_GIVEN_UP)
        if self._error:
            raise LoadError(f"TensorRT could not build an engine: {self._error}")
        if self._is_done:
            return
        if is_late:
            raise LoadError(
                f"TensorRT did not build an engine within {self._timeout:g} s (build_timeout_s), in phase '{self.progress}'; "
                "a lower optimization_level takes less"
            )
        how = f"died of {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        raise LoadError(f"the process that builds the engine {how}, in phase '{self.progress}'{_last_words(words)}")

    def _kill(self) -> None:
        with self._lock:
            self._kill_now()

    def _kill_now(self) -> None:
        """A process that was waited for has a returncode, and its number may be another's by now."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


_GIVEN_UP = "the load was given up while its engine was built"


class _Logged:
    """A line of the log now and then. Owns when the last was."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= _LOG_INTERVAL:
            self._last = now
            log.info("engine building", phase=progress.phase, step=progress.step, steps=progress.steps)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it end by itself, so that it gives back what it has; its standard input's end tells it to."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_JOIN)
    except subprocess.TimeoutExpired:
        pass


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (often for lack of memory)" if number == signal.SIGKILL else name


def _last_words(words: IO[bytes]) -> str:
    words.seek(0, os.SEEK_END)
    words.seek(max(words.tell() - _LAST_WORDS, 0))
    text = " | ".join(line.strip() for line in words.read().decode(errors="replace").splitlines() if line.strip())
    return f"; its last words: {text}" if text else ""
