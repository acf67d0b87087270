"""Captured requests as the messages that their clients sent, and answers to messages as captured tensors. Pure."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from headrace.capture.records import Captured, CapturedTensor
from headrace.errors import InvalidRequest
from headrace.signature import DataType
from headrace.wire.messages import ModelInferRequest, ModelInferResponse


def encode_request(captured: Captured, model: str, version: str = "") -> bytes:
    """A ModelInferRequest for all outputs. Raises InvalidRequest where an input is redacted."""
    if captured.redacted_inputs:
        raise InvalidRequest(f"a captured request for '{captured.model}': its input '{captured.redacted_inputs[0]}' is redacted")
    message = ModelInferRequest(
        model_name=model,
        model_version=version,
        id=captured.id,
        inputs=[
            ModelInferRequest.InferInputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape) for tensor in captured.inputs
        ],
        raw_input_contents=[bytes(tensor.data) for tensor in captured.inputs if tensor.data is not None],
    )
    return message.SerializeToString()


def decode_answer(message: bytes) -> dict[str, CapturedTensor]:
    """The outputs of a ModelInferResponse, by name. Raises InvalidRequest for what is none."""
    try:
        response = ModelInferResponse.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"could not decode the ModelInferResponse: {error}") from None
    if len(response.outputs) != len(response.raw_output_contents):
        raise InvalidRequest(
            f"expected raw contents for {len(response.outputs)} outputs, got {len(response.raw_output_contents)} (typed ones are not read)"
        )
    unknown = next((tensor for tensor in response.outputs if tensor.datatype not in DataType.__members__), None)
    if unknown is not None:
        raise InvalidRequest(f"output '{unknown.name}': unknown datatype '{unknown.datatype}'")
    return {
        tensor.name: CapturedTensor(tensor.name, tensor.datatype, tuple(tensor.shape), raw)
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
