import os
from pathlib import Path

import pytest
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

from loadtests.calls import Arrays, grpc_frame
from loadtests.models import MLP, write_repository
from loadtests.swap_load import SwapLoad


@pytest.fixture
def load(tmp_path: Path) -> SwapLoad:
    path = write_repository(tmp_path / "original", {MLP: None})[MLP]
    return SwapLoad.prepare(MLP, path, tmp_path / "swap", 1, "max_queue_size = 7\n")


def answer(arrays: Arrays, version: str) -> bytes:
    response = service_pb2.ModelInferResponse(model_name=MLP, model_version=version)
    for name, array in arrays.items():
        response.outputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return grpc_frame(response.SerializeToString())


def test_an_answer_has_to_be_that_of_the_version_it_names(load: SwapLoad) -> None:
    first, second = load.answers.variants
    call = load.calls[3]
    assert call.is_right(answer(first[3], "1"))
    assert call.is_right(answer(second[3], "2"))
    assert not call.is_right(answer(first[3], "2"))
    assert not call.is_right(answer(first[4], "1"))
    assert not call.is_right(answer(first[3], "latest"))
    assert not call.is_right(b"no message")


def test_the_repository_begins_with_one_version_and_its_settings(load: SwapLoad) -> None:
    assert (load.repository / MLP / "1" / "model.onnx").is_file()
    assert (load.repository / MLP / "model.toml").read_text() == "max_queue_size = 7\n"


def test_versions_are_published_while_the_block_runs(load: SwapLoad) -> None:
    with load.publishing(2, 0.0, sorted(os.sched_getaffinity(0))):
        pass
    assert load.published == {1, 2, 3}
    assert (load.repository / MLP / "3" / "model.onnx").is_file()


def test_versions_that_were_not_published_or_never_answered_are_told(load: SwapLoad) -> None:
    load.published = {1, 2}
    load.calls[0].is_right(answer(load.answers.variants[0][0], "1"))
    assert load.judge() == ["version 2, the last published, did not answer within 30 s"]
    load.calls[0].is_right(answer(load.answers.variants[1][0], "2"))
    assert load.judge() == []
    load.calls[0].is_right(answer(load.answers.variants[0][0], "5"))
    assert load.judge() == ["version 5 answered and was never published"]
