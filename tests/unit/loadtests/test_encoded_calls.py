from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtests.calls import grpc_frame
from loadtests.encoded_calls import AnswerCheck, encode_calls, is_message, with_priority
from loadtests.models import MLP, write_repository

RIGHT = np.array([[1.0, 2.0]], np.float32)


def body(values: object = RIGHT, **fields: str) -> bytes:
    array = np.asarray(values, np.float32)
    response = service_pb2.ModelInferResponse(model_name="m", **fields)
    response.outputs.add(name="y", datatype="FP32", shape=array.shape)
    response.raw_output_contents.append(array.tobytes())
    return grpc_frame(response.SerializeToString())


def test_the_right_answer_is_right_however_it_is_encoded() -> None:
    check = AnswerCheck({"y": RIGHT})
    assert check(body())
    assert check(body(model_version="2"))
    assert check(body(RIGHT * np.float32(1 + 1e-6)))  # from a batch of another size
    assert check(body())


def test_an_answer_is_wrong_also_after_right_ones() -> None:
    check = AnswerCheck({"y": RIGHT})
    assert check(body())
    assert not check(body(RIGHT + 1e-3))
    assert not check(body(RIGHT[:, :1]))


@pytest.mark.parametrize("spoilt", [b"", body()[:-1], body() + b"x", b"\x01" + body()[1:], grpc_frame(b"\xff\xff"), body()[5:]])
def test_what_is_not_one_whole_message_is_wrong(spoilt: bytes) -> None:
    assert not AnswerCheck({"y": RIGHT})(spoilt)


def test_a_tensor_of_another_size_than_its_shape_says_is_wrong() -> None:
    response = service_pb2.ModelInferResponse.FromString(body()[5:])
    response.raw_output_contents[0] += b"1234"
    assert not AnswerCheck({"y": RIGHT})(grpc_frame(response.SerializeToString()))


def test_calls_of_a_model_differ_and_carry_their_priority(tmp_path: Path) -> None:
    path = write_repository(tmp_path, {MLP: None})[MLP]
    calls = encode_calls(MLP, path, inputs=3, timeout=0.5, priority=2)
    assert len({call.body for call in calls}) == 3
    assert all(is_message(call.body) and call.timeout == 0.5 for call in calls)
    request = service_pb2.ModelInferRequest.FromString(calls[0].body[5:])
    assert request.parameters["priority"].uint64_param == 2


def test_no_priority_leaves_the_message_as_it_is() -> None:
    assert with_priority(b"x", None) == b"x"
