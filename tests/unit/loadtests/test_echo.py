import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtests.calls import decode_answer, infer_message
from loadtests.echo import tensor_answer


@pytest.mark.parametrize("size", [0, 1, 31, 32, 5000, 70_000])
def test_an_echoed_request_is_a_valid_answer(size: int) -> None:
    sent = {"a": np.arange(size, dtype=np.float32).reshape(1, size), "b": np.ones((2, 2), np.int64)}
    got = decode_answer(tensor_answer(infer_message("m", sent, ["a"])))
    assert got.keys() == sent.keys()
    assert all(np.array_equal(got[name], array) for name, array in sent.items())


def test_what_an_answer_has_not_is_left_out() -> None:
    request = service_pb2.ModelInferRequest(model_name="m", model_version="3", id="7", outputs=[{"name": "a"}])
    request.parameters["priority"].int64_param = 1
    answer = service_pb2.ModelInferResponse.FromString(tensor_answer(request.SerializeToString()))
    assert answer == service_pb2.ModelInferResponse(model_name="m")


@pytest.mark.parametrize(
    ("message", "said"), [(b"\x08\x01", "length-delimited"), (b"\x0a\x05ab", "has 5 bytes"), (b"\x0a\xff", "within a length")]
)
def test_what_is_no_request_is_refused(message: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tensor_answer(message)
