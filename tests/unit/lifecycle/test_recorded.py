"""Requests recorded from clients, which a version has to answer before it goes live."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.errors import BackendError, LoadError
from headrace.lifecycle.recorded import read_recorded
from headrace.signature import Signature
from headrace.testing import FakeBackend
from headrace.wire.messages import ModelInferRequest
from swapping import Swapping, scaling

SIGNATURE = Signature("m", FakeBackend.artifact.inputs, FakeBackend.artifact.outputs, 64)


def record(directory: Path, name: str, values: list[float], *, columns: int = 2) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    array = np.array(values, "<f4").reshape(-1, columns)
    tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=array.shape)
    message = ModelInferRequest(model_name="as recorded", id="7", inputs=[tensor], raw_input_contents=[array.tobytes()])
    (directory / name).write_bytes(message.SerializeToString())


def test_those_of_the_version_count_and_those_beside_it_where_it_has_none(tmp_path: Path) -> None:
    record(tmp_path / "m" / "warmup", "shared", [1, 2])
    assert [name for name, _ in read_recorded(SIGNATURE, tmp_path / "m", tmp_path / "m" / "1")] == ["shared"]
    record(tmp_path / "m" / "1" / "warmup", "b", [3, 4, 5, 6])
    record(tmp_path / "m" / "1" / "warmup", "a", [3, 4])
    found = read_recorded(SIGNATURE, tmp_path / "m", tmp_path / "m" / "1")
    assert [(name, inputs["x"].tolist()) for name, inputs in found] == [("a", [[3, 4]]), ("b", [[3, 4], [5, 6]])]
    assert read_recorded(SIGNATURE, tmp_path, tmp_path / "elsewhere") == ()


def test_a_request_for_another_model_is_named(tmp_path: Path) -> None:
    record(tmp_path / "warmup", "wide", [1, 2, 3], columns=3)
    with pytest.raises(LoadError, match=r"warmup/wide: expected a ModelInferRequest for this model: .*Expected \[-1,2\], got \[1,3\]"):
        read_recorded(SIGNATURE, tmp_path, tmp_path)
    (tmp_path / "warmup" / "wide").write_bytes(b"\xff junk")
    with pytest.raises(LoadError, match="warmup/wide: expected a ModelInferRequest for this model: could not decode"):
        read_recorded(SIGNATURE, tmp_path, tmp_path)


@pytest.fixture
async def swap(tmp_path: Path) -> AsyncIterator[Swapping]:
    def execute(self: Any, inputs: Any, outputs: Any) -> Any:
        if self.path.parent.name == "2" and (inputs["x"] < 0).any():
            raise BackendError("negative rows are not for me")
        return [inputs["x"] * int(self.path.parent.name)]

    swapping = Swapping(tmp_path, scaling(execute=execute))
    yield swapping
    await swapping.models.stop(1)


async def test_a_version_that_cannot_answer_what_clients_ask_does_not_go_live(swap: Swapping) -> None:
    record(swap.root / "m" / "warmup", "usual", [-1, 2])
    await swap.publish(1)
    await swap.publish(1, 2)
    assert await swap.ask(-1.0) == (1, -1.0)
    assert swap.index()["m:2"] == ("UNAVAILABLE", "the recorded request usual fails: negative rows are not for me")
    await swap.publish(1, 2, 3)
    assert await swap.ask(-1.0) == (3, -3.0)
