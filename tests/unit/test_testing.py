"""The doubles that ship with the product do what they promise."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from headrace.requests import Reply
from headrace.sources.base import Listing
from headrace.testing import CollectingOutlet, FakeSource, VirtualTimeLoop


def test_a_virtual_loop_sleeps_an_hour_in_no_time_and_in_order() -> None:
    async def sleepers() -> list[str]:
        woken: list[str] = []

        async def sleep(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            woken.append(name)

        await asyncio.gather(sleep(3600, "hour"), sleep(60, "minute"))
        return woken

    began = time.monotonic()
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(sleepers()) == ["minute", "hour"]
        assert runner.get_loop().time() >= 3600
    assert time.monotonic() - began < 60


async def test_a_fake_source_offers_what_it_is_told_or_fails() -> None:
    source = FakeSource()
    source.errors["m"] = "half copied"
    assert await source.list() == Listing({}, {"m": "half copied"})
    source.error = OSError("bucket unreachable")
    with pytest.raises(OSError, match="unreachable"):
        await source.list()


def test_the_collecting_outlet_refuses_a_second_answer_and_waits_for_the_first() -> None:
    outlet = CollectingOutlet()
    reply = Reply(outlet)
    with pytest.raises(TimeoutError):
        outlet.wait(reply, timeout=0.0)
    threading.Thread(target=reply.ok, args=(b"answer",)).start()
    assert outlet.wait(reply) == b"answer"
    with pytest.raises(AssertionError, match="answered twice"):
        reply.ok(b"again")
