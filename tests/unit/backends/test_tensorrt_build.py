"""The stand-in builder is a program that talks as the real one does; what TensorRT itself does when it builds is not shown here."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from headrace.backends.tensorrt_build import COMMAND, Build, BuildOrder, Progress, decode_order
from headrace.backends.tensorrt_options import BuildOptions
from headrace.backends.tensorrt_profiles import Profile, ShapeRange
from headrace.errors import LoadError

PREAMBLE = """
import json, os, signal, sys, threading
order = json.loads(sys.stdin.readline())
def say(**report): print(json.dumps(report), flush=True)
"""


def order(tmp_path: Path) -> BuildOrder:
    profiles = (Profile({"x": ShapeRange((1, 4), (2, 4), (8, 4))}, 8),)
    return BuildOrder(
        str(tmp_path / "model.onnx"), str(tmp_path / "out"), str(tmp_path / "timings"), 0, "11.4", profiles, BuildOptions(refit=True)
    )


def build(tmp_path: Path, program: str, timeout: float = 60.0, seen: list[Progress] | None = None) -> Build:
    command = (sys.executable, "-c", PREAMBLE + program)
    return Build(order(tmp_path), timeout, command=command, on_progress=(seen if seen is not None else []).append)


def test_order_arrives_as_it_was_given(tmp_path: Path) -> None:
    assert decode_order(order(tmp_path).encode()) == order(tmp_path)


def test_plan_is_in_its_file_when_the_build_returns(tmp_path: Path) -> None:
    build(tmp_path, "open(order['output'], 'w').write(order['tensorrt']); say(done=True)").run()
    assert (tmp_path / "out").read_text() == "11.4"


def test_progress_is_told_as_it_comes(tmp_path: Path) -> None:
    seen: list[Progress] = []
    build(tmp_path, "say(phase='a'); print('noise'); print('[1]'); say(phase='b', step=2, steps=3); say(done=True)", seen=seen).run()
    assert seen == [Progress("a"), Progress("b", 2, 3)]
    assert list(map(str, [Progress(), *seen])) == ["starting", "a", "b 2/3"]


def test_reason_of_a_failed_build_is_the_load_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="TensorRT could not build an engine: no such operator"):
        build(tmp_path, "say(error='no such operator'); sys.exit(1)").run()


def test_crash_is_told_with_signal_phase_and_last_words(tmp_path: Path) -> None:
    program = "say(phase='timing'); print('out of\\nluck', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    with pytest.raises(LoadError, match=r"died of SIGSEGV, in phase 'timing'; its last words: out of \| luck"):
        build(tmp_path, program).run()


def test_kill_from_outside_hints_at_memory(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"died of SIGKILL \(often for lack of memory\)"):
        build(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)").run()


def test_end_without_a_result_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="ended with exit code 3, in phase 'starting'"):
        build(tmp_path, "sys.exit(3)").run()


def test_program_that_reads_no_order_is_told_by_its_end(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="ended with exit code"):
        Build(order(tmp_path), 60.0, command=(sys.executable, "-c", "import os; os._exit(4)")).run()


def test_build_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"open({str(pid)!r}, 'w').write(str(os.getpid())); say(phase='timing'); threading.Event().wait()"
    with pytest.raises(LoadError, match=r"within 2 s \(build_timeout_s\)"):
        build(tmp_path, program, timeout=2.0).run()
    assert not is_alive(int(pid.read_text() or 0))


def test_cancelled_build_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    started = threading.Event()
    program = """
import subprocess
child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])
say(phase=f'{os.getpid()} {child.pid}')
threading.Event().wait()
"""
    pids: list[int] = []

    def note(progress: Progress) -> None:
        pids.extend(map(int, progress.phase.split()))
        started.set()

    running = Build(order(tmp_path), 60.0, command=(sys.executable, "-c", PREAMBLE + program), on_progress=note)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(running.run)
        assert started.wait(60)
        running.cancel()
        with pytest.raises(LoadError, match="given up while its engine was built"):
            result.result()
    assert not is_alive(pids[0])
    assert not is_running(pids[1])


def test_cancelled_before_it_began_starts_no_process(tmp_path: Path) -> None:
    waiting = build(tmp_path, "open(order['output'], 'w'); say(done=True)")
    waiting.cancel()
    with pytest.raises(LoadError, match="given up"):
        waiting.run()
    assert not (tmp_path / "out").exists()


def test_builder_ends_when_its_server_is_gone(tmp_path: Path) -> None:
    """The real builder, whose order never comes to its end because the server died: standard input closes."""
    import subprocess

    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out, _ = process.communicate(b"", timeout=60)
    assert process.returncode == 1
    assert b'"error"' in out


def test_builder_without_tensorrt_says_what_to_install(tmp_path: Path) -> None:
    """The real builder, on a machine without the package."""
    try:
        import tensorrt  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("tensorrt is installed")
    with pytest.raises(
        LoadError, match=r"could not build an engine: no TensorRT that builds engines of ONNX models is there.*headrace\[cpu,tensorrt\]"
    ):
        Build(order(tmp_path), 60.0).run()


def is_alive(pid: int) -> bool:
    """Of a process of this one, which has been waited for where it is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Of somebody's: where nobody waits for it, it stays as a zombie. The kill of a group reaches all, but one after the other."""
    for _ in range(1000):  # some ten seconds
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "ZX":
            return False
        threading.Event().wait(0.01)
    return True
