"""Tasks that outlive the call that starts them, with somebody to wait for them and to hear of their failures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from headrace.telemetry.log import get_logger

log = get_logger(__name__)


class Tasks:
    """Owns running tasks. A TaskGroup whose one failure does not end the others: a bug in one model's life is not the server's end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"Tasks({sorted(task.get_name() for task in self._tasks)})"

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task failed", task=task.get_name(), exc_info=task.exception())

    async def close(self) -> None:
        """Cancel what runs and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
