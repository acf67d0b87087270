"""The parts of the application: its timer, its schedule, and a whole server that starts and stops."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import onnx_models
import pytest
from headrace.batching.event_loop import LoopSchedule, LoopTimer
from headrace.errors import ConfigError
from headrace.testing import serve_in_process


def from_another_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


async def test_the_last_call_of_a_timer_holds_whatever_thread_it_comes_from() -> None:
    timer = LoopTimer(asyncio.get_running_loop())
    rung = asyncio.Event()
    from_another_thread(lambda: timer(time.monotonic() + 3600, lambda: None))
    timer(time.monotonic(), rung.set)
    async with asyncio.timeout(5):
        await rung.wait()


async def test_a_failing_callback_does_not_keep_the_others_from_running() -> None:
    schedule = LoopSchedule(asyncio.get_running_loop())
    ran = asyncio.Event()

    def fail() -> None:
        raise RuntimeError("boom")

    schedule(fail)
    schedule(ran.set)
    async with asyncio.timeout(5):
        await ran.wait()


async def test_a_policy_that_selects_no_version_is_said_and_keeps_the_server_from_being_ready(tmp_path: Path) -> None:
    onnx_models.save(onnx_models.square_root(), tmp_path / "m" / "1")
    (tmp_path / "m" / "model.toml").write_text('version_policy = "7"\n')
    async with serve_in_process(tmp_path) as server:
        assert not server.models.is_ready
        assert [(row.model, row.state, row.reason) for row in server.models.index()] == [
            ("m", "UNAVAILABLE", "version_policy '7' selects none of its versions: 1")
        ]


async def test_a_server_inside_another_program_leaves_its_garbage_collector_alone(tmp_path: Path) -> None:
    onnx_models.save(onnx_models.square_root(), tmp_path / "m" / "1")
    frozen = gc.get_freeze_count()
    async with serve_in_process(tmp_path):
        assert gc.get_freeze_count() == frozen


async def test_a_server_that_could_not_start_can_be_stopped(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found nothing"):
        async with serve_in_process(tmp_path / "nowhere"):
            pass
