from __future__ import annotations

import pytest
from headrace.requests import InferRequest
from headrace.wire.messages import ModelInferResponse, ModelStreamInferResponse
from headrace.wire.stream_responses import encode_stream_error, encode_stream_response

REQUEST = InferRequest("resnet", "3", "id-1", [])


@pytest.mark.parametrize("size", [0, 1, 100, 1 << 14, 1 << 21])
def test_a_response_gains_the_final_flag_and_loses_nothing(size: int) -> None:
    response = ModelInferResponse(model_name="m", id="7", raw_output_contents=[b"x" * size])
    response.parameters["other"].int64_param = 5
    sent = ModelStreamInferResponse.FromString(encode_stream_response(response.SerializeToString()))
    assert sent.error_message == ""
    assert sent.infer_response.parameters["triton_final_response"].bool_param
    del sent.infer_response.parameters["triton_final_response"]
    assert sent.infer_response == response


def test_an_error_before_admission_has_the_id_only() -> None:
    sent = ModelStreamInferResponse.FromString(encode_stream_error("bad", REQUEST, was_admitted=False))
    assert (sent.error_message, sent.infer_response) == ("bad", ModelInferResponse(id="id-1"))


def test_an_error_after_admission_names_its_model_and_is_final() -> None:
    sent = ModelStreamInferResponse.FromString(encode_stream_error("broke", REQUEST, was_admitted=True))
    response = sent.infer_response
    assert (sent.error_message, response.id, response.model_name, response.model_version) == ("broke", "id-1", "resnet", "3")
    assert response.parameters["triton_final_response"].bool_param


def test_an_error_of_what_could_not_be_decoded_has_a_response_nonetheless() -> None:
    sent = ModelStreamInferResponse.FromString(encode_stream_error("garbage", None, was_admitted=False))
    assert sent.HasField("infer_response")
    assert sent.error_message == "garbage"
