"""ModelStreamInferResponse messages: what ModelStreamInfer sends, around the ModelInferResponse bytes of the codec."""

from __future__ import annotations

from headrace.requests import InferRequest
from headrace.wire.codec import tag_and_length
from headrace.wire.messages import InferParameter, ModelInferResponse, ModelStreamInferResponse

# Concatenated messages are merged by whoever parses them: this is how one more parameter gets into an encoded response.
_FINAL_PARAMETER = ModelInferResponse(parameters={"triton_final_response": InferParameter(bool_param=True)}).SerializeToString()


def encode_stream_response(response: bytes) -> bytes:
    """The last response to a request on a stream, from an encoded ModelInferResponse."""
    return b"".join((tag_and_length(2, len(response) + len(_FINAL_PARAMETER)), response, _FINAL_PARAMETER))


def encode_stream_error(text: str, request: InferRequest | None, *, was_admitted: bool) -> bytes:
    """An error in the stream, which goes on. Clients find their request by its id.

    As in Triton only what was admitted names its model and says that it was the last response.
    """
    message = ModelStreamInferResponse(error_message=text)
    response = message.infer_response
    response.SetInParent()
    if request is not None:
        response.id = request.id
        if was_admitted:
            response.model_name = request.model
            response.model_version = request.version
            response.parameters["triton_final_response"].bool_param = True
    return message.SerializeToString()
