"""Requests that came together, given to a real version at once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
from headrace.config import BatchingConfig
from headrace.errors import HeadraceError, InvalidRequest, QueueFull
from headrace.requests import Reply
from headrace.testing import CollectingOutlet
from headrace.wire.messages import ModelInferRequest, ModelInferResponse
from headrace.wire.request_layouts import RequestDecoder
from swapping import Swapping, scaling


def message(model: str = "m", width: int = 2, classes: int = 0, value: float = 0.0) -> bytes:
    tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=(1, width))
    output = ModelInferRequest.InferRequestedOutputTensor(name="y")
    if classes:
        output.parameters["classification"].int64_param = classes
    content = np.full(width, value, "<f4").tobytes()
    return ModelInferRequest(model_name=model, inputs=[tensor], outputs=[output], raw_input_contents=[content]).SerializeToString()


async def test_each_request_that_is_refused_is_refused_alone(tmp_path: Path) -> None:
    swapping = Swapping(tmp_path, scaling())
    await swapping.publish(1)
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(6)]
    messages = [message(), message(classes=-1), message("nobody"), message(width=3), b"\xff", message()]
    swapping.inference.submit_all([*zip(messages, replies, strict=True)])
    answers = [await asyncio.to_thread(outlet.wait, reply) for reply in replies]
    assert [isinstance(answer, HeadraceError) for answer in answers] == [False, True, True, True, True, False]
    assert isinstance(answers[1], InvalidRequest)
    await swapping.models.stop(0.0)


async def test_what_came_together_runs_together(tmp_path: Path) -> None:
    sizes: list[int] = []

    def execute(self: Any, inputs: Any, outputs: Any) -> Any:
        sizes.append(len(inputs["x"]))
        return [inputs["x"]]

    swapping = Swapping(tmp_path, scaling(execute=execute))
    await swapping.publish(1)
    sizes.clear()
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(5)]
    swapping.inference.submit_all([(message(), reply) for reply in replies])
    for reply in replies:
        assert not isinstance(await asyncio.to_thread(outlet.wait, reply), HeadraceError)
    assert sizes == [5]
    await swapping.models.stop(0.0)


async def learnt(swapping: Swapping, given: bytes) -> None:
    """Until messages like it are alike to the decoder."""
    for _ in range(RequestDecoder.LEARN_EVERY):
        reply = Reply(CollectingOutlet())
        swapping.inference.submit(given, reply)
        await asyncio.to_thread(reply.outlet.wait, reply)  # type: ignore[attr-defined]


async def test_requests_that_are_alike_get_the_answers_to_their_own_content(tmp_path: Path) -> None:
    swapping = Swapping(tmp_path, scaling())
    await swapping.publish(1, 2)
    await learnt(swapping, message())
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(70)]
    given = [message(value=value) for value in range(70)]
    # One of another kind and one of nobody among them.
    given[30], given[40] = message("nobody"), message(value=40)[:-1]
    swapping.inference.submit_all([*zip(given, replies, strict=True)])
    answers = [await asyncio.to_thread(outlet.wait, reply) for reply in replies]
    for value, answer in enumerate(answers):
        if value in (30, 40):
            assert isinstance(answer, HeadraceError)
        else:
            response = ModelInferResponse.FromString(answer)
            assert np.frombuffer(response.raw_output_contents[0], "<f4").tolist() == [2.0 * value] * 2
    await swapping.models.stop(0.0)


async def test_requests_that_are_alike_and_wrong_are_refused_each_with_the_reason(tmp_path: Path) -> None:
    swapping = Swapping(tmp_path, scaling())
    await swapping.publish(1)
    await learnt(swapping, message(width=3))
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(5)]
    swapping.inference.submit_all([(message(width=3), reply) for reply in replies])
    answers = [await asyncio.to_thread(outlet.wait, reply) for reply in replies]
    assert all(isinstance(answer, InvalidRequest) and "unexpected shape" in str(answer) for answer in answers)
    assert len({id(answer) for answer in answers}) == 5
    await swapping.models.stop(0.0)


async def test_of_requests_that_are_alike_as_many_are_queued_as_there_is_room_for(tmp_path: Path) -> None:
    started, may_run = threading.Event(), threading.Event()

    def execute(self: Any, inputs: Any, outputs: Any) -> Any:
        started.set()
        may_run.wait()
        return [inputs["x"]]

    may_run.set()
    swapping = Swapping(tmp_path, scaling(execute=execute))
    # A delay keeps the model off the thread that submits.
    await swapping.publish(1, batching=BatchingConfig(max_queue_size=3, max_queue_delay=1e-6))
    await learnt(swapping, message())
    outlet: Any = CollectingOutlet()
    may_run.clear()
    started.clear()
    first = Reply(outlet)
    swapping.inference.submit(message(), first)
    await asyncio.to_thread(started.wait)
    replies = [Reply(outlet) for _ in range(5)]
    swapping.inference.submit_all([(message(), reply) for reply in replies])
    may_run.set()
    answers = [await asyncio.to_thread(outlet.wait, reply) for reply in (first, *replies)]
    assert [isinstance(answer, QueueFull) for answer in answers] == [False, False, False, False, True, True]
    await swapping.models.stop(0.0)


async def test_requests_that_are_alike_are_retried_with_the_successor_of_a_version_that_drains(tmp_path: Path) -> None:
    swapping = Swapping(tmp_path, scaling())
    await swapping.publish(1)
    await learnt(swapping, message())
    (old,) = swapping.models.find("m", "")
    await swapping.publish(2)
    # As if the look at the route had come just before the flip.
    chosen = [old]
    find = swapping.models.choose_for_all
    swapping.models.choose_for_all = lambda request: chosen.pop() if chosen else find(request)  # type: ignore[method-assign]
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(5)]
    swapping.inference.submit_all([(message(value=1.0), reply) for reply in replies])
    for reply in replies:
        answer = await asyncio.to_thread(outlet.wait, reply)
        assert ModelInferResponse.FromString(answer).model_version == "2"
    await swapping.models.stop(0.0)


async def test_requests_that_are_alike_and_want_classes_are_each_classified(tmp_path: Path) -> None:
    swapping = Swapping(tmp_path, scaling())
    await swapping.publish(1)
    await learnt(swapping, message(classes=1))
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(5)]
    swapping.inference.submit_all([(message(classes=1, value=value), reply) for value, reply in enumerate(replies)])
    answers = [await asyncio.to_thread(outlet.wait, reply) for reply in replies]
    contents = [ModelInferResponse.FromString(answer).raw_output_contents[0][4:] for answer in answers]
    assert contents == [b"%d.000000:0" % value for value in range(5)]
    await swapping.models.stop(0.0)
