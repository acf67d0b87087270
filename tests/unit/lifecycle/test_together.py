"""Requests that came together, given to a real version at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from headrace.errors import HeadraceError, Unsupported
from headrace.requests import Reply
from headrace.testing import CollectingOutlet
from headrace.wire.messages import ModelInferRequest
from swapping import Swapping, scaling


def message(model: str = "m", width: int = 2, classes: int = 0) -> bytes:
    tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=(1, width))
    output = ModelInferRequest.InferRequestedOutputTensor(name="y")
    if classes:
        output.parameters["classification"].int64_param = classes
    content = np.zeros(width, "<f4").tobytes()
    return ModelInferRequest(model_name=model, inputs=[tensor], outputs=[output], raw_input_contents=[content]).SerializeToString()


async def test_each_request_that_is_refused_is_refused_alone(tmp_path: Path) -> None:
    swapping = Swapping(tmp_path, scaling())
    await swapping.publish(1)
    outlet: Any = CollectingOutlet()
    replies = [Reply(outlet) for _ in range(6)]
    messages = [message(), message(classes=3), message("nobody"), message(width=3), b"\xff", message()]
    swapping.inference.submit_all(zip(messages, replies, strict=True))
    answers = [await asyncio.to_thread(outlet.wait, reply) for reply in replies]
    assert [isinstance(answer, HeadraceError) for answer in answers] == [False, True, True, True, True, False]
    assert isinstance(answers[1], Unsupported)
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
    swapping.inference.submit_all((message(), reply) for reply in replies)
    for reply in replies:
        assert not isinstance(await asyncio.to_thread(outlet.wait, reply), HeadraceError)
    assert sizes == [5]
    await swapping.models.stop(0.0)
