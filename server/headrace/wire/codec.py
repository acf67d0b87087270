"""ModelInfer messages to requests, and arrays to ModelInfer responses. The hot path of every call.

Small messages go through the protobuf parser. In large ones a scan of the top level takes raw_input_contents out as views of
the received bytes and leaves everything else to the parser: nothing large is copied, and the two paths cannot disagree on
anything but where raw_input_contents are, which tests/fuzz holds equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from headrace.errors import InvalidRequest, Unsupported
from headrace.requests import NO_PARAMETERS, InferRequest, InputTensor, Parameters, RequestedOutput, TensorBytes
from headrace.signature import TensorSpec
from headrace.wire.messages import ModelInferRequest, ModelInferResponse
from headrace.wire.tensors import decode_bytes_tensor, decode_typed, encode_bytes_tensor

SCAN_THRESHOLD = 32 * 1024
"""Bytes from which the scan is the faster path: a 602 kB message takes 43 µs through the parser and 5 through the scan; below
about 30 kB the parser's fixed cost is the lower one."""
MAX_RESPONSE_BYTES = 2**31 - 1
"""What a gRPC client can receive: its limit is an int32."""

_parse = ModelInferRequest.FromString


def decode_request(message: bytes) -> InferRequest:
    """Raises InvalidRequest for bytes that are no ModelInferRequest or break the protocol's rules on input contents."""
    return decode_request_protobuf(message) if len(message) < SCAN_THRESHOLD else decode_request_scan(message)


def decode_request_protobuf(message: bytes) -> InferRequest:
    try:
        parsed = _parse(message)
    except DecodeError as error:
        raise InvalidRequest(f"could not decode the ModelInferRequest: {error}") from None
    return _build(parsed, parsed.raw_input_contents)


def decode_request_scan(message: bytes) -> InferRequest:
    split = split_raw_contents(message)
    if split is None:
        return decode_request_protobuf(message)
    rest, raw = split
    try:
        parsed = _parse(rest)
    except DecodeError as error:
        raise InvalidRequest(f"could not decode the ModelInferRequest: {error}") from None
    return _build(parsed, raw)


_RAW_TAG = 7 << 3 | 2


def split_raw_contents(message: bytes) -> tuple[bytes, list[memoryview]] | None:
    """(everything else, the raw_input_contents) of a ModelInferRequest, or None for what the parser should judge.

    Walks the top-level fields only (https://protobuf.dev/programming-guides/encoding/). Gives up on malformed lengths and on
    groups: they are rare, and the parser has the last word on them.
    """
    view = memoryview(message)
    end = len(message)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    position = 0
    while position < end:
        start = position
        tag, position = _varint(message, position, end)
        kind = tag & 7
        if kind == 2:
            length, position = _varint(message, position, end)
            if position < 0 or length > end - position:
                return None
            stop = position + length
            if tag == _RAW_TAG:
                raw.append(view[position:stop])
            else:
                rest.append(view[start:stop])
            position = stop
            continue
        if position < 0:
            return None
        if kind == 0:
            _, position = _varint(message, position, end)
        elif kind == 5:
            position += 4
        elif kind == 1:
            position += 8
        else:
            return None
        if position < 0 or position > end:
            return None
        rest.append(view[start:position])
    return b"".join(rest), raw


def _varint(message: bytes, position: int, end: int) -> tuple[int, int]:
    """(value, next position); the position is -1 when the varint is cut off or longer than 64 bits."""
    if position < 0:
        return 0, -1
    value = shift = 0
    while position < end and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value, position) if value < 1 << 64 else (0, -1)
        shift += 7
    return 0, -1


def _build(parsed: Any, raw: Sequence[bytes | memoryview]) -> InferRequest:
    model = parsed.model_name
    inputs: list[InputTensor] = []
    next_raw = 0
    for tensor in parsed.inputs:
        name = tensor.name
        datatype = tensor.datatype
        shape = tuple(tensor.shape)
        if shape and min(shape) < 0:
            raise InvalidRequest(f"input '{name}' for model '{model}': expected a shape without negative dimensions, got {list(shape)}")
        given = tensor.parameters
        parameters = _parameters(given) if given else NO_PARAMETERS
        if parameters and "shared_memory_region" in parameters:
            raise Unsupported("Client shared memory is disabled on this server: send the tensor in the request")
        if tensor.HasField("contents"):
            if raw:
                raise InvalidRequest(
                    f"contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'"
                )
            data: TensorBytes = decode_typed(tensor.contents, datatype, math.prod(shape), name, model)
        elif next_raw < len(raw):
            data = raw[next_raw]
            next_raw += 1
            if datatype == "BYTES":
                data = decode_bytes_tensor(data, math.prod(shape), name, model)
        else:
            raise InvalidRequest(f"unable to find data for input tensor '{name}' for model '{model}' in the request")
        inputs.append(InputTensor(name, datatype, shape, data, parameters))
    outputs: Sequence[RequestedOutput] = (
        [RequestedOutput(output.name, _parameters(output.parameters) if output.parameters else NO_PARAMETERS) for output in parsed.outputs]
        if parsed.outputs
        else ()
    )
    given = parsed.parameters
    return InferRequest(model, parsed.model_version, parsed.id, inputs, outputs, _parameters(given) if given else NO_PARAMETERS)


def _parameters(given: Mapping[str, Any]) -> Parameters:
    parameters: Parameters = {}
    for name, value in given.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"parameter '{name}' has no value; expected a bool, int64, uint64, double or string")
        parameters[name] = getattr(value, choice)
    return parameters


# -- responses ---------------------------------------------------------------------------------------------------------


class _Header:
    """The encoded outputs of one answer's shapes, and for each output what goes before its raw bytes (None: BYTES)."""

    __slots__ = ("outputs", "raw_prefixes")

    def __init__(self, outputs: bytes, raw_prefixes: list[bytes | None]) -> None:
        self.outputs = outputs
        self.raw_prefixes = raw_prefixes


class ResponseEncoder:
    """Encodes the answers of one model version. Owns a bounded cache of encoded headers; safe to call from several threads."""

    MAX_CACHED_HEADERS = 1024
    SMALL = 1 << 14
    """Bytes up to which copying out of the array twice is cheaper than making a memoryview of it."""

    def __init__(self, model: str, version: str, outputs: tuple[TensorSpec, ...]) -> None:
        self._outputs = outputs
        self._prefix = ModelInferResponse(model_name=model, model_version=version).SerializeToString()
        self._headers: dict[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], _Header] = {}

    def encode(
        self, id: str, outputs: tuple[int, ...], arrays: Sequence[NDArray[Any]], start: int, stop: int, rows_axis: bool
    ) -> bytes:
        """One answer: rows start:stop of each array when `rows_axis`, else all of it. `arrays[i]` is output `outputs[i]`.

        Raises InvalidRequest when the message would be larger than a client can receive.
        """
        if rows_axis:
            arrays = [array[start:stop] for array in arrays]
        key = (outputs, tuple([array.shape for array in arrays]))
        header = self._headers.get(key) or self._make_header(key)
        parts: list[Any] = [self._prefix]
        if id:
            parts.append(_length_delimited(3, id.encode()))
        parts.append(header.outputs)
        for array, prefix in zip(arrays, header.raw_prefixes, strict=True):
            if prefix is None:
                content: Any = encode_bytes_tensor(array)
                parts.append(_tag_and_length(6, len(content)))
            else:
                parts.append(prefix)
                content = array.tobytes() if array.nbytes <= self.SMALL else memoryview(np.ascontiguousarray(array)).cast("B")
            parts.append(content)
        message = b"".join(parts)
        if len(message) > MAX_RESPONSE_BYTES:
            raise InvalidRequest(f"the response has {len(message)} bytes; expected at most {MAX_RESPONSE_BYTES}, which is all that gRPC clients take")
        return message

    def _make_header(self, key: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]) -> _Header:
        response = ModelInferResponse()
        prefixes: list[bytes | None] = []
        for index, shape in zip(*key, strict=True):
            spec = self._outputs[index]
            response.outputs.add(name=spec.name, datatype=spec.datatype.value, shape=shape)
            itemsize = spec.datatype.itemsize
            prefixes.append(_tag_and_length(6, math.prod(shape) * itemsize) if itemsize else None)
        header = _Header(response.SerializeToString(), prefixes)
        if len(self._headers) >= self.MAX_CACHED_HEADERS:
            # Ragged shapes never repeat; starting over costs less than keeping an order of use.
            self._headers.clear()
        self._headers[key] = header
        return header


def _length_delimited(field: int, content: bytes) -> bytes:
    return _tag_and_length(field, len(content)) + content


def _tag_and_length(field: int, length: int) -> bytes:
    encoded = bytearray([field << 3 | 2])
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)
