"""ModelInfer messages to requests, and arrays to ModelInfer responses. The hot path of every call.

A message is decoded in one of three ways that cannot disagree:

1. `RequestDecoder` recognises messages that differ from an earlier one only in their tensors and id, by comparing every other
   byte, and reads those two (request_layouts.py).
2. Any other small message goes through the protobuf parser.
3. In any other large message a scan of the top level takes raw_input_contents out as views of the received bytes and leaves the
   rest to the parser: nothing large is copied.

Rules for changing this file: whatever the scan is not sure of it hands to the parser whole (`split_raw_contents` returns None);
the parser alone decides what is malformed. tests/fuzz/test_codec_differential.py holds all three equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from headrace.errors import BackendError, InvalidRequest
from headrace.requests import (
    NO_PARAMETERS,
    Answer,
    Destination,
    Destinations,
    InferRequest,
    InputTensor,
    Parameters,
    RequestedOutput,
    TensorBytes,
    Ticket,
    TopClasses,
)
from headrace.signature import DataType, Shape, TensorSpec, format_shape
from headrace.wire.classification import Wanted, classify, encode_names
from headrace.wire.messages import InferParameter, ModelInferRequest, ModelInferResponse
from headrace.wire.shared_memory import BYTE_SIZE, OFFSET, REGION
from headrace.wire.tensors import decode_bytes_tensor, decode_typed, encode_bytes_tensor

Array = NDArray[Any]

SCAN_THRESHOLD = 32 * 1024
"""Bytes from which the scan is used. One FP32 tensor, parser against scan: 16 kB 3.4 and 4.2 µs, 64 kB 4.4 and 4.3, 602 kB 22
and 4.3. That is in a loop that keeps everything in the cache; the two copies that the scan saves cost more outside it."""

MAX_RESPONSE_BYTES = 2**31 - 1
"""What a gRPC client can receive: its limit is an int32."""


# -- requests ------------------------------------------------------------------------------------------------------------


def decode_request(message: bytes) -> InferRequest:
    """Raises InvalidRequest for bytes that are no ModelInferRequest or break the protocol's rules on input contents. Tensors in shared
    memory are empty until `place` has found them. Whether tensors fit a model is for its Signature."""
    return decode_request_protobuf(message) if len(message) < SCAN_THRESHOLD else scan_request(message)


def decode_request_protobuf(message: bytes) -> InferRequest:
    """The path of small messages, and of any that the scan does not read."""
    parsed = _parse(message)
    return _build(parsed, parsed.raw_input_contents[:])


def scan_request(message: bytes) -> InferRequest:
    """The path of large messages: raw tensors are views of `message`."""
    split = split_raw_contents(message)
    if split is None:
        return decode_request_protobuf(message)
    rest, raw = split
    return _build(_parse(rest), raw)


_from_string = ModelInferRequest.FromString


def _parse(message: bytes) -> ModelInferRequest:
    try:
        return _from_string(message)
    except DecodeError as error:
        raise InvalidRequest(f"could not decode the ModelInferRequest: {error}") from None


_LENGTH_DELIMITED = 2
RAW_INPUT_CONTENTS = 7


def split_raw_contents(message: bytes) -> tuple[bytes, list[memoryview]] | None:
    """(everything else, the raw_input_contents) of a ModelInferRequest, or None for what only the parser should judge."""
    view = memoryview(message)
    raw: list[memoryview] = []
    rest: list[memoryview] = []
    rest_start = position = 0
    try:
        while position < len(message):
            field, start, stop = read_field(message, position)
            if field == RAW_INPUT_CONTENTS:
                raw.append(view[start:stop])
                if rest_start < position:
                    rest.append(view[rest_start:position])
                rest_start = stop
            position = stop
    except (IndexError, ValueError):
        return None
    if not raw:
        return message, raw
    if rest_start < len(message):
        rest.append(view[rest_start:])
    return b"".join(rest), raw


def read_field(message: bytes, position: int) -> tuple[int, int, int]:
    """(number, content start, content stop) of the field at `position`.

    Reads what encoders write for this message: numbers below 16, content with a length, shortest encodings. Raises IndexError
    or ValueError on anything else, valid or not.
    """
    tag = message[position]
    if tag & 7 != _LENGTH_DELIMITED or tag >= 0x80:
        raise ValueError("not a length-delimited field with a one-byte tag")
    length = message[position + 1]
    start = position + 2
    if length >= 0x80:
        length &= 0x7F
        # Five bytes hold 35 bits, more than any message has.
        for shift in (7, 14, 21, 28):
            byte = message[start]
            start += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        if not 0 < byte < 0x80:
            raise ValueError("a length that is too long or not in its shortest encoding")
    stop = start + length
    if stop > len(message):
        raise IndexError("the content ends behind the message")
    return tag >> 3, start, stop


def _build(parsed: ModelInferRequest, raw: Sequence[bytes | memoryview]) -> InferRequest:
    """Every field is read once, and repeated fields are copied to lists before they are walked: an access to a protobuf field is
    40 to 100 ns, an iteration over one 500."""
    model = parsed.model_name
    inputs: list[InputTensor] = []
    next_raw = 0
    uses_regions = False
    for tensor in parsed.inputs[:]:
        name = tensor.name
        datatype = tensor.datatype
        shape = tuple(tensor.shape[:])
        if shape and min(shape) < 0:
            raise InvalidRequest(
                f"input '{name}' for model '{model}': expected a shape without negative dimensions, got {format_shape(shape)}"
            )
        given = tensor.parameters
        parameters = _parameters(given) if given else NO_PARAMETERS
        if parameters and REGION in parameters:
            if tensor.HasField("contents"):
                raise InvalidRequest(f"unexpected 'content' provided when using shared memory for input '{name}' for model '{model}'")
            uses_regions = True
            data: TensorBytes = b""
        elif tensor.HasField("contents"):
            if raw:
                raise InvalidRequest(f"contents field must not be specified when using raw_input_contents for '{name}' for model '{model}'")
            data = decode_typed(tensor.contents, datatype, math.prod(shape), name, model)
        elif next_raw < len(raw):
            content = raw[next_raw]
            next_raw += 1
            data = decode_bytes_tensor(content, math.prod(shape), name, model) if datatype == "BYTES" else content
        else:
            raise InvalidRequest(f"unable to find data for input tensor '{name}' for model '{model}' in request")
        inputs.append(InputTensor(name, datatype, shape, data, parameters))
    outputs = [_requested_output(output) for output in parsed.outputs[:]]
    uses_regions = uses_regions or any(REGION in output.parameters for output in outputs)
    given = parsed.parameters
    return InferRequest(
        model,
        parsed.model_version,
        parsed.id,
        inputs,
        outputs,
        _parameters(given) if given else NO_PARAMETERS,
        uses_regions=uses_regions,
    )


def _requested_output(output: ModelInferRequest.InferRequestedOutputTensor) -> RequestedOutput:
    given = output.parameters
    return RequestedOutput(output.name, _parameters(given)) if given else RequestedOutput(output.name)


def _parameters(given: Mapping[str, InferParameter]) -> Parameters:
    parameters: Parameters = {}
    for name, value in given.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"parameter '{name}' has no value; expected a bool, int64, uint64, double or string")
        parameters[name] = getattr(value, choice)
    return parameters


# -- responses -----------------------------------------------------------------------------------------------------------

Place = tuple[str, int, int] | TopClasses | None
"""Region, offset and size of an output that is written to shared memory; _AS_CLASSES for one that is a classification."""
_AS_CLASSES = TopClasses(0, by_row=False)
Key = tuple[tuple[int, ...], tuple[Shape, ...]] | tuple[tuple[int, ...], tuple[Shape, ...], tuple[Place, ...]]
"""Outputs, their shapes, and where some of them do not go into the answer as they are their places."""
Buffer = bytes | memoryview


class _Header:
    """What goes before the raw bytes of each output, for one combination of outputs and shapes. None before BYTES, whose length
    differs from answer to answer. `first` comes before them all; `is_simple`: there is one output, and its prefix is the end of `first`.
    An id goes in front: the order of a message's fields is free."""

    __slots__ = ("first", "is_simple", "prefixes")

    def __init__(self, first: bytes, prefixes: list[bytes | None], is_simple: bool) -> None:
        self.first = first
        self.prefixes = prefixes
        self.is_simple = is_simple


class _Rows:
    """One output of a batch, to be cut by rows: all its bytes, `stride` a row. BYTES are encoded from `array`, answer by answer."""

    __slots__ = ("array", "buffer", "stride", "tail")

    def __init__(self, array: Array, is_bytes: bool) -> None:
        self.array = array
        self.tail = array.shape[1:]
        self.buffer: Buffer = b"" if is_bytes else _as_buffer(array)
        self.stride = array.nbytes // len(array) if len(array) else 0


class _Plan:
    """How answers with the same outputs and number of rows are made: `first` (which holds the prefix of the first output, unless
    that is BYTES), then the outputs."""

    __slots__ = ("first", "outputs", "simple")

    def __init__(self, header: _Header, outputs: list[_Rows]) -> None:
        self.outputs = list(zip(header.prefixes, outputs, strict=True))
        self.first = header.first
        self.simple = outputs[0] if header.is_simple else None


class ResponseEncoder:
    """Encodes the answers of one model version. Owns a bounded cache of encoded headers; safe to call from several threads."""

    MAX_CACHED_HEADERS = 1024
    """About 200 bytes each."""

    def __init__(
        self, model: str, version: str, outputs: tuple[TensorSpec, ...], labels: Mapping[str, Sequence[str]] = MappingProxyType({})
    ) -> None:
        """`labels`: the names of an output's classes, by its own."""
        self._outputs = outputs
        self._names = {index: encode_names(labels[spec.name]) for index, spec in enumerate(outputs) if spec.name in labels}
        self._prefix = ModelInferResponse(model_name=model, model_version=version).SerializeToString()
        self._headers: dict[Key, _Header] = {}

    def __repr__(self) -> str:
        return f"ResponseEncoder({[spec.name for spec in self._outputs]}, {len(self._headers)} headers cached)"

    def encode(
        self,
        id: str,
        outputs: tuple[int, ...],
        arrays: Sequence[Array],
        start: int,
        stop: int,
        rows_axis: bool,
        parameters: Parameters = NO_PARAMETERS,
    ) -> bytes:
        """One answer: rows start:stop of each array when `rows_axis`, else all of it. `arrays[i]` is output `outputs[i]`.

        Raises InvalidRequest when the message would be larger than a client can receive, BackendError for an array that has not
        its output's datatype.
        """
        chosen = [array[start:stop] for array in arrays] if rows_axis else arrays
        for index, array in zip(outputs, chosen, strict=True):
            self._check_datatype(index, array)
        header = self._header((outputs, tuple([array.shape for array in chosen])))
        parts: list[Buffer] = [_encode_id(id)] if id else []
        if parameters:
            parts.append(encode_response_parameters(parameters))
        parts.append(header.first)
        if header.is_simple:
            parts.append(_as_buffer(chosen[0]))
        else:
            for prefix, array in zip(header.prefixes, chosen, strict=True):
                if prefix is None:
                    content = encode_bytes_tensor(array)
                    parts += (tag_and_length(6, len(content)), content)
                else:
                    parts += (prefix, _as_buffer(array))
        message = b"".join(parts)
        if len(message) > MAX_RESPONSE_BYTES:
            raise _too_large(message)
        return message

    def encode_batch(self, tickets: Sequence[Ticket], wanted: tuple[int, ...], arrays: Sequence[Array], rows_axis: bool) -> list[Answer]:
        """The answers of one batch, in the tickets' order; `arrays[i]` is output `wanted[i]`. A ticket wants some of `wanted`.

        When `rows_axis` a ticket's rows follow those of the ticket before it, otherwise each gets the whole arrays. An answer that
        is larger than a client can receive is an InvalidRequest in its place. Raises BackendError as `encode` does: then all fail.
        """
        if rows_axis and len(tickets) == 1:
            # Nothing to share a plan with, which costs more than it saves: 3.3 µs, and so 2.1.
            rows = tickets[0].rows
            arrays = [array if len(array) == rows else array[:rows] for array in arrays]
            rows_axis = False
        if not rows_axis:
            return [self._encode_whole(ticket, wanted, arrays) for ticket in tickets]
        rows_of = {index: _Rows(array, self._check_datatype(index, array)) for index, array in zip(wanted, arrays, strict=True)}
        return self._encode_rows(tickets, rows_of)

    def _encode_rows(self, tickets: Sequence[Ticket], rows_of: Mapping[int, _Rows]) -> list[Answer]:
        """A batch has few combinations of outputs and rows: what depends on them is looked up once each, and the usual answer,
        one output that is not BYTES, is one concatenation: 0.25 µs an answer where `encode` takes 1.8."""
        answers: list[Answer] = []
        plans: dict[tuple[tuple[int, ...], int], _Plan] = {}
        wanted: Wanted | None = None
        start = 0
        for ticket in tickets:
            rows = ticket.rows
            stop = start + rows
            if ticket.destinations is not None:
                if wanted is None:
                    wanted = classify(tickets, {index: rows.array for index, rows in rows_of.items()}, self._names)
                chosen = [rows_of[index].array[start:stop] for index in ticket.outputs]
                answers.append(self._encode_placed(ticket, ticket.destinations, chosen, wanted))
                start = stop
                continue
            plan = plans.get((ticket.outputs, rows))
            if plan is None:
                plan = plans[ticket.outputs, rows] = self._plan(ticket.outputs, rows, rows_of)
            first = _encode_id(ticket.id) + plan.first if ticket.id else plan.first
            simple = plan.simple
            if simple is None:
                message = b"".join(self._parts(first, plan, start, stop))
            else:
                stride = simple.stride
                message = first + simple.buffer[start * stride : stop * stride]
            answers.append(message if len(message) <= MAX_RESPONSE_BYTES else _too_large(message))
            start = stop
        return answers

    def _plan(self, outputs: tuple[int, ...], rows: int, rows_of: Mapping[int, _Rows]) -> _Plan:
        chosen = [rows_of[index] for index in outputs]
        return _Plan(self._header((outputs, tuple([(rows, *output.tail) for output in chosen]))), chosen)

    def _parts(self, first: bytes, plan: _Plan, start: int, stop: int) -> list[Buffer]:
        parts: list[Buffer] = [first]
        for prefix, output in plan.outputs:
            if prefix is None:
                content = encode_bytes_tensor(output.array[start:stop])
                parts += (tag_and_length(6, len(content)), content)
            else:
                parts += (prefix, output.buffer[start * output.stride : stop * output.stride])
        return parts

    def _encode_whole(self, ticket: Ticket, wanted: tuple[int, ...], arrays: Sequence[Array]) -> Answer:
        chosen = [arrays[wanted.index(index)] for index in ticket.outputs]
        if ticket.destinations is not None:
            for index, array in zip(ticket.outputs, chosen, strict=True):
                self._check_datatype(index, array)
            classes = classify([ticket], dict(zip(ticket.outputs, chosen, strict=True)), self._names)
            return self._encode_placed(ticket, ticket.destinations, chosen, classes)
        try:
            return self.encode(ticket.id, ticket.outputs, chosen, 0, 0, rows_axis=False)
        except InvalidRequest as error:
            # The traceback would keep the arrays alive for as long as the error is.
            return error.with_traceback(None)

    def _encode_placed(self, ticket: Ticket, destinations: Destinations, arrays: Sequence[Array], wanted: Wanted) -> Answer:
        """Writes each output that has a destination there, and the others into the answer, those that are `wanted` as classes as such.
        `arrays[i]` is output `ticket.outputs[i]`.

        Every output has its entry among the raw contents, an empty one where it is elsewhere: clients count them. Nothing is
        written unless all fits.
        """
        contents: list[Buffer] = []
        places: list[Place] = []
        shapes: list[Shape] = []
        for index, array, destination in zip(ticket.outputs, arrays, destinations, strict=True):
            if isinstance(destination, TopClasses):
                classes = wanted[ticket, index]
                if isinstance(classes, InvalidRequest):
                    return classes
                contents.append(classes.content)
                shapes.append(classes.shape)
                places.append(_AS_CLASSES)
                continue
            spec = self._outputs[index]
            shapes.append(array.shape)
            content = _as_buffer(array) if spec.datatype.itemsize else encode_bytes_tensor(array)
            contents.append(content)
            if destination is None:
                places.append(None)
            elif len(content) <= destination.view.nbytes:
                places.append((destination.region, destination.offset, len(content)))
            else:
                return _too_small(spec.name, len(content), destination)
        header = self._header((ticket.outputs, tuple(shapes), tuple(places)))
        parts: list[Buffer] = [_encode_id(ticket.id) if ticket.id else b"", header.first]
        for prefix, content, destination in zip(header.prefixes, contents, destinations, strict=True):
            if isinstance(destination, Destination):
                try:
                    destination.write(content)
                except BackendError as error:  # of this client's device memory, and no matter of its batch mates
                    return error.with_traceback(None)
                parts.append(_EMPTY_CONTENT)
            else:
                parts += (prefix or tag_and_length(6, len(content)), content)
        message = b"".join(parts)
        return message if len(message) <= MAX_RESPONSE_BYTES else _too_large(message)

    def _check_datatype(self, index: int, array: Array) -> bool:
        """Whether the output is BYTES. The header promises the datatype's size; another array would make a corrupt message."""
        spec = self._outputs[index]
        expected = spec.datatype.dtype
        if spec.datatype.itemsize == 0:
            if array.dtype.kind not in "OSUT":
                raise BackendError(f"output '{spec.name}': expected strings or bytes, the model gave {array.dtype}")
            return True
        if array.dtype != expected:
            raise BackendError(f"output '{spec.name}': expected {expected} for {spec.datatype.value}, the model gave {array.dtype}")
        return False

    def _header(self, key: Key) -> _Header:
        header = self._headers.get(key)
        if header is not None:
            return header
        header = self._make_header(key)
        if len(self._headers) >= self.MAX_CACHED_HEADERS:
            # Ragged shapes never repeat; starting over costs less than keeping an order of use.
            self._headers.clear()
        self._headers[key] = header
        return header

    def _make_header(self, key: Key) -> _Header:
        response = ModelInferResponse()
        prefixes: list[bytes | None] = []
        places = key[2] if len(key) == 3 else (None,) * len(key[0])
        for index, shape, where in zip(key[0], key[1], places, strict=True):
            spec = self._outputs[index]
            datatype = DataType.BYTES if where is _AS_CLASSES else spec.datatype
            output = response.outputs.add(name=spec.name, datatype=datatype.value, shape=shape)
            if isinstance(where, tuple):
                region, offset, size = where
                output.parameters[REGION].string_param = region
                output.parameters[BYTE_SIZE].int64_param = size
                if offset:
                    output.parameters[OFFSET].int64_param = offset
            itemsize = datatype.itemsize
            prefixes.append(tag_and_length(6, math.prod(shape) * itemsize) if itemsize else None)
        first = self._prefix + response.SerializeToString()
        only = prefixes[0] if len(prefixes) == 1 and places == (None,) else None
        return _Header(first if only is None else first + only, prefixes, only is not None)


_EMPTY_CONTENT = b"\x32\x00"
"""A raw_output_contents of nothing."""

_SMALL_ARRAY = 1 << 15
"""Bytes up to which a copy costs less than making a memoryview of an array and slicing it."""


def _as_buffer(array: Array) -> Buffer:
    if array.nbytes <= _SMALL_ARRAY:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _too_small(name: str, size: int, destination: Destination) -> InvalidRequest:
    return InvalidRequest(
        f"shared memory size specified with the request for output '{name}' ({destination.view.nbytes} bytes in region "
        f"'{destination.region}') should be at least {size} bytes to hold the results"
    )


def _too_large(message: bytes) -> InvalidRequest:
    return InvalidRequest(
        f"the response has {len(message)} bytes; expected at most {MAX_RESPONSE_BYTES}, which is all that gRPC clients take"
    )


def _encode_id(id: str) -> bytes:
    content = id.encode()
    length = len(content)
    return (b"\x1a%c%b" % (length, content)) if length < 0x80 else tag_and_length(3, length) + content


def encode_response_parameters(parameters: Parameters) -> bytes:
    """Response-level parameters as encoded fields: anywhere within a ModelInferResponse they add to those it has."""
    response = ModelInferResponse()
    for name, value in parameters.items():
        target = response.parameters[name]
        # bool first: it is an int too.
        if isinstance(value, bool):
            target.bool_param = value
        elif isinstance(value, int):
            target.int64_param = value
        elif isinstance(value, float):
            target.double_param = value
        else:
            target.string_param = value
    return response.SerializeToString()


def tag_and_length(field: int, length: int) -> bytes:
    """What comes before `length` bytes of a field numbered below 16."""
    encoded = bytearray([field << 3 | _LENGTH_DELIMITED])
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)
