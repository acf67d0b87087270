import struct

import numpy as np
import onnxruntime as ort
import pytest
from tritonclient.grpc import service_pb2

from loadtests.calls import (
    BatchCount,
    decode_answer,
    difference,
    grpc_frame,
    infer_message,
    is_bitwise_equal,
    random_array,
    right_answer,
    sample_inputs,
)
from loadtests.models import make_mlp


@pytest.fixture(scope="module")
def mlp() -> ort.InferenceSession:
    return ort.InferenceSession(make_mlp().SerializeToString(), providers=["CPUExecutionProvider"])


def test_mlp_is_the_same_every_time() -> None:
    assert make_mlp().SerializeToString() == make_mlp().SerializeToString()


def test_mlp_gives_every_row_its_own_answer(mlp: ort.InferenceSession) -> None:
    inputs = sample_inputs(mlp, 8, np.random.default_rng(1))
    answer = right_answer(mlp, inputs)
    assert answer["y"].shape == (8, 4)
    assert len(np.unique(answer["y"][:, 0])) == 8


def test_message_says_what_was_asked() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    request = service_pb2.ModelInferRequest.FromString(infer_message("m", {"x": array}, ["y"]))
    assert (request.model_name, request.inputs[0].datatype, list(request.inputs[0].shape)) == ("m", "INT64", [2, 3])
    assert request.raw_input_contents[0] == array.tobytes()
    assert [output.name for output in request.outputs] == ["y"]


def test_frame_is_a_flag_a_length_and_the_message() -> None:
    assert grpc_frame(b"abc") == b"\0" + struct.pack(">I", 3) + b"abc"


def test_answer_is_decoded_to_arrays() -> None:
    response = service_pb2.ModelInferResponse(model_name="m")
    response.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    response.raw_output_contents.append(np.array([1.5, 2.5], np.float32).tobytes())
    np.testing.assert_array_equal(decode_answer(response.SerializeToString())["y"], np.array([[1.5, 2.5]], np.float32))


@pytest.mark.parametrize(
    ("got", "expected", "off"),
    [
        (np.float32([1, 2]), np.float32([1, 2]), 0.0),
        (np.float32([1, 3]), np.float32([1, 1]), 1.0),
        (np.float32([np.nan, np.inf]), np.float32([np.nan, np.inf]), 0.0),
        (np.float32([1]), np.float32([np.nan]), np.inf),
        (np.float32([1]), np.float32([[1]]), np.inf),
        (np.float32([1]), np.float64([1]), np.inf),
        (np.array([b"a"], object), np.array([b"b"], object), np.inf),
    ],
)
def test_difference(got: np.ndarray, expected: np.ndarray, off: float) -> None:
    assert difference({"y": got}, {"y": expected}) == off


def test_a_missing_output_is_a_difference() -> None:
    assert difference({}, {"y": np.float32([1])}) == np.inf


def test_bitwise_equality_sees_the_last_bit() -> None:
    one = np.float32([1.0])
    assert is_bitwise_equal({"y": one}, {"y": one.copy()})
    assert not is_bitwise_equal({"y": one}, {"y": np.nextafter(one, np.float32(2))})
    assert not is_bitwise_equal({"y": one}, {"y": one.view(np.int32)})


@pytest.mark.parametrize("kind", ["tensor(float)", "tensor(int8)", "tensor(bool)", "tensor(uint64)"])
def test_made_up_arrays_vary(kind: str) -> None:
    assert len(np.unique(random_array(kind, [64], np.random.default_rng(1)))) > 1


def test_a_type_without_a_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"no rule to make up a tensor\(string\)"):
        random_array("tensor(string)", [1], np.random.default_rng(1))


def test_batches_between_two_counts() -> None:
    between = BatchCount(rows=110, executions=30) - BatchCount(rows=10, executions=5)
    assert between.mean == 4.0
    assert BatchCount(0, 0).mean == 0.0
