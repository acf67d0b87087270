import struct

import numpy as np
import pytest
from headrace.errors import InvalidRequest
from headrace.requests import NO_PARAMETERS
from headrace.wire.codec import SCAN_THRESHOLD, decode_request, decode_request_protobuf, scan_request, split_raw_contents
from headrace.wire.messages import InferParameter, ModelInferRequest
from headrace.wire.request_layouts import RequestDecoder


def decode_by_layout(message):
    decoder = RequestDecoder()
    for _ in range(RequestDecoder.LEARN_EVERY):
        decoder.decode(message)
    return decoder.decode(message)


every_path = pytest.mark.parametrize("decode", [decode_request, decode_request_protobuf, scan_request, decode_by_layout])


def request_with(*tensors, raw=(), **fields):
    message = ModelInferRequest(model_name="m", **fields)
    for name, datatype, shape in tensors:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.extend(raw)
    return message


@every_path
@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        ("BOOL", "?"),
        ("UINT8", "u1"),
        ("UINT16", "<u2"),
        ("UINT32", "<u4"),
        ("UINT64", "<u8"),
        ("INT8", "i1"),
        ("INT16", "<i2"),
        ("INT32", "<i4"),
        ("INT64", "<i8"),
        ("FP16", "<f2"),
        ("BF16", "<u2"),
        ("FP32", "<f4"),
        ("FP64", "<f8"),
    ],
)
def test_raw_tensors_keep_their_bytes(decode, datatype, dtype):
    array = np.arange(6).astype(dtype)
    message = request_with(("x", datatype, [2, 3]), raw=[array.tobytes()])
    (tensor,) = decode(message.SerializeToString()).inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", datatype, (2, 3))
    assert bytes(tensor.data) == array.tobytes()


@every_path
def test_everything_of_a_request_is_decoded(decode):
    message = request_with(("a", "FP32", [1]), ("b", "BYTES", [2]), id="ünï-1", model_version="3")
    message.raw_input_contents.extend([b"\0\0\x80\x3f", struct.pack("<I", 2) + b"hi" + struct.pack("<I", 0)])
    message.outputs.add(name="y")
    message.outputs.add(name="z").parameters["classification"].int64_param = 3
    message.parameters["priority"].uint64_param = 2**63
    message.inputs[0].parameters["k"].bool_param = False
    request = decode(message.SerializeToString())
    assert (request.model, request.version, request.id) == ("m", "3", "ünï-1")
    assert [output.name for output in request.outputs] == ["y", "z"]
    assert request.outputs[1].parameters == {"classification": 3}
    assert request.parameters == {"priority": 2**63}
    assert request.inputs[0].parameters == {"k": False}
    assert request.inputs[1].data.tolist() == [b"hi", b""]


@every_path
def test_absent_parameters_cost_no_dict(decode):
    request = decode(request_with(("x", "FP32", [1]), raw=[b"1234"]).SerializeToString())
    assert request.parameters is NO_PARAMETERS
    assert request.inputs[0].parameters is NO_PARAMETERS
    assert len(request.outputs) == 0


@every_path
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bool_param", True),
        ("int64_param", -5),
        ("string_param", "ü"),
        ("double_param", 0.5),
        ("uint64_param", 2**64 - 1),
        ("int64_param", 0),
        ("string_param", ""),
    ],
)
def test_parameters_of_every_kind(decode, field, value):
    message = request_with(("x", "FP32", [1]), raw=[b"1234"])
    message.parameters["p"].CopyFrom(InferParameter(**{field: value}))
    got = decode(message.SerializeToString()).parameters["p"]
    assert (got, type(got)) == (value, type(value))


@every_path
def test_a_parameter_without_a_value_is_refused(decode):
    message = request_with(("x", "FP32", [1]), raw=[b"1234"])
    message.parameters["p"].SetInParent()
    with pytest.raises(InvalidRequest, match="parameter 'p' has no value"):
        decode(message.SerializeToString())


@every_path
@pytest.mark.parametrize(("shape", "data"), [([], b"1234"), ([0], b""), ([2, 0, 3], b""), ([1, 2**62], b"")])
def test_shapes_of_any_rank_and_empty_tensors(decode, shape, data):
    (tensor,) = decode(request_with(("x", "FP32", shape), raw=[data]).SerializeToString()).inputs
    assert tensor.shape == tuple(shape)
    assert len(tensor.data) == len(data)


@every_path
def test_a_negative_dimension_is_refused(decode):
    with pytest.raises(InvalidRequest, match=r"input 'x' for model 'm': expected a shape without negative .* \[2,-1\]"):
        decode(request_with(("x", "FP32", [2, -1]), raw=[b""]).SerializeToString())


@every_path
def test_typed_contents_are_decoded(decode):
    message = request_with(("x", "INT16", [2]), ("s", "BYTES", [1]))
    message.inputs[0].contents.int_contents.extend([-2, 3])
    message.inputs[1].contents.bytes_contents.append(b"t")
    first, second = decode(message.SerializeToString()).inputs
    assert first.data == np.array([-2, 3], "<i2").tobytes()
    assert second.data.tolist() == [b"t"]


@every_path
@pytest.mark.parametrize("fill", [True, False])
def test_typed_and_raw_contents_in_one_request_are_refused(decode, fill):
    message = request_with(("x", "FP32", [1]), ("y", "FP32", [1]), raw=[b"1234"])
    message.inputs[1].contents.SetInParent()
    if fill:
        message.inputs[1].contents.fp32_contents.append(1)
    with pytest.raises(InvalidRequest, match="contents field must not be specified when using raw_input_contents for 'y'"):
        decode(message.SerializeToString())


@every_path
def test_an_input_without_data_is_refused(decode):
    message = request_with(("x", "FP32", [1]), ("y", "FP32", [1]), raw=[b"1234"])
    with pytest.raises(InvalidRequest, match="unable to find data for input tensor 'y' for model 'm'"):
        decode(message.SerializeToString())


@every_path
def test_raw_entries_beyond_the_inputs_are_ignored(decode):
    request = decode(request_with(("x", "FP32", [1]), raw=[b"1234", b"5678"]).SerializeToString())
    assert [bytes(tensor.data) for tensor in request.inputs] == [b"1234"]


@every_path
def test_malformed_strings_in_raw_contents_are_refused(decode):
    with pytest.raises(InvalidRequest, match="incomplete string length indicator"):
        decode(request_with(("x", "BYTES", [1]), raw=[b"ab"]).SerializeToString())


@every_path
def test_unknown_fields_are_ignored(decode):
    message = request_with(("x", "FP32", [1]), raw=[b"1234"]).SerializeToString()
    unknown = b"\x7a\x01u" + b"\x40\x05" + b"\x82\x7d\x02ab" + b"\xc5\x3e\x01\x02\x03\x04" + b"\x81\x7d" + b"8" * 8
    for extended in (message + unknown, unknown + message):
        assert bytes(decode(extended).inputs[0].data) == b"1234"


@every_path
@pytest.mark.parametrize(
    "junk",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0b",
        b"\x02\x00",
        b"\x00",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x0a\x02\xff\xfe",
        b"\x0f\x00",
        b"\x1a\x01\xed",
    ],
)
def test_bytes_that_are_no_request_are_refused(decode, junk):
    message = request_with(("x", "FP32", [1]), raw=[b"1234"]).SerializeToString()
    with pytest.raises(InvalidRequest, match="could not decode the ModelInferRequest"):
        decode(message + junk)


@every_path
def test_the_last_of_repeated_scalars_wins_and_repeated_messages_merge(decode):
    first = ModelInferRequest(model_name="old", id="1", raw_input_contents=[b"1234"]).SerializeToString()
    second = request_with(("x", "FP32", [1]), id="2").SerializeToString()
    request = decode(first + second)
    assert (request.model, request.id) == ("m", "2")
    assert bytes(request.inputs[0].data) == b"1234"


@every_path
def test_an_empty_message_is_a_request_for_no_model(decode):
    request = decode(b"")
    assert (request.model, list(request.inputs)) == ("", [])


def test_large_tensors_are_views_of_the_message():
    content = bytes(SCAN_THRESHOLD)
    message = request_with(("x", "UINT8", [len(content)]), raw=[content]).SerializeToString()
    data = decode_request(message).inputs[0].data
    assert isinstance(data, memoryview)
    assert data.obj is message


def test_the_scan_takes_raw_contents_out_wherever_they_are():
    parts = [b"\x3a\x01a", b"\x0a\x01m", b"\x3a\x00", b"\x1a\x01i", b"\x3a\x02bc"]
    rest, raw = split_raw_contents(b"".join(parts))
    assert rest == b"\x0a\x01m\x1a\x01i"
    assert [bytes(content) for content in raw] == [b"a", b"", b"bc"]


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16383, 16384, 2_097_151, 2_097_152])
def test_the_scan_reads_lengths_of_any_size(length):
    message = ModelInferRequest(raw_input_contents=[bytes(length)]).SerializeToString()
    rest, raw = split_raw_contents(message)
    assert (rest, [len(content) for content in raw]) == (b"", [length])


@pytest.mark.parametrize("message", [b"\x3a\x80\x00", b"\x3a\x81\x80\x00a", b"\xba\x00\x00", b"\x38\x01", b"\x3a\x05abc", b"\x3a"])
def test_the_scan_leaves_what_it_is_not_sure_of_to_the_parser(message):
    assert split_raw_contents(message) is None
