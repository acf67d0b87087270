from __future__ import annotations

import asyncio

from headrace.errors import InvalidRequest
from headrace.rpc.guard import as_known, is_cancelled


def test_our_own_errors_pass_but_without_their_frames() -> None:
    try:
        try:
            raise KeyError("x")
        except KeyError as cause:
            raise InvalidRequest("input 'x' is missing") from cause
    except InvalidRequest as error:
        known = as_known(error, "ModelInfer")
    assert str(known) == "input 'x' is missing"
    assert (known.__traceback__, known.__context__, known.__cause__) == (None, None, None)


async def test_a_cancelled_future_is_told_from_a_cancelled_task() -> None:
    seen: list[bool] = []

    async def wait(future: asyncio.Future[None]) -> None:
        try:
            await future
        except asyncio.CancelledError:
            seen.append(is_cancelled())

    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    future.cancel()
    await asyncio.create_task(wait(future))
    task = asyncio.create_task(wait(loop.create_future()))
    loop.call_soon(task.cancel)
    await task
    assert seen == [False, True]
