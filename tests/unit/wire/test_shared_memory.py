"""Tensors in regions of shared memory, in requests and in answers."""

import struct

import numpy as np
import pytest
from headrace.errors import InvalidRequest, NotFound, Unsupported
from headrace.requests import Destination, Reply, Ticket
from headrace.signature import DataType, TensorSpec
from headrace.testing import CollectingOutlet
from headrace.wire.codec import ResponseEncoder, decode_request, decode_request_protobuf, scan_request
from headrace.wire.messages import ModelInferRequest, ModelInferResponse
from headrace.wire.request_layouts import RequestDecoder
from headrace.wire.shared_memory import place
from tritonclient.grpc import InferResult, service_pb2


class Memory(dict):
    """Regions by name, each a bytearray."""

    def view(self, name, offset, byte_size):
        if name not in self:
            raise NotFound(f"no {name}")
        return memoryview(self[name])[offset : offset + byte_size]


def decode_by_layout(message):
    decoder = RequestDecoder()
    for _ in range(RequestDecoder.LEARN_EVERY):
        decoder.decode(message)
    assert "1 layouts" in repr(decoder)
    return decoder.decode(message)


def placing(decode):
    """Bytes and regions to a request whose tensors are all there."""

    def decode_and_place(message, regions):
        request = decode(message)
        assert request.uses_regions
        place(request, regions)
        return request

    return decode_and_place


every_path = pytest.mark.parametrize(
    "decode", [placing(path) for path in (decode_request, decode_request_protobuf, scan_request, decode_by_layout)]
)


def put(tensor, region, size=None, offset=None):
    tensor.parameters["shared_memory_region"].string_param = region
    if size is not None:
        tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset is not None:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def in_memory(datatype="FP32", shape=(2,), size=8, offset=None):
    message = ModelInferRequest(model_name="m", id="7")
    put(message.inputs.add(name="x", datatype=datatype, shape=shape), "r", size, offset)
    return message


@every_path
def test_an_input_is_a_view_of_its_region_and_cannot_be_written(decode):
    memory = Memory(r=bytearray(b"0123456789ab"))
    (tensor,) = decode(in_memory(offset=2).SerializeToString(), memory).inputs
    memory["r"][2:4] = b"XY"
    assert bytes(tensor.data) == b"XY456789"
    assert tensor.data.readonly


@every_path
def test_strings_are_read_from_their_region(decode):
    content = struct.pack("<I", 2) + b"hi" + struct.pack("<I", 0)
    request = decode(in_memory("BYTES", (2,), len(content)).SerializeToString(), Memory(r=bytearray(content)))
    assert request.inputs[0].data.tolist() == [b"hi", b""]


@every_path
def test_malformed_strings_in_a_region_are_refused(decode):
    with pytest.raises(InvalidRequest, match="incomplete string data"):
        decode(in_memory("BYTES", (1,), 6).SerializeToString(), Memory(r=bytearray(b"\xff\xff\xff\xff--")))


@every_path
def test_raw_contents_belong_to_the_inputs_that_are_not_in_regions(decode):
    message = in_memory()
    message.inputs.add(name="y", datatype="INT8", shape=[2])
    message.inputs.insert(0, ModelInferRequest.InferInputTensor(name="w", datatype="INT8", shape=[1]))
    message.raw_input_contents.extend([b"w", b"yy"])
    request = decode(message.SerializeToString(), Memory(r=bytearray(b"01234567")))
    assert [(tensor.name, bytes(tensor.data)) for tensor in request.inputs] == [("w", b"w"), ("x", b"01234567"), ("y", b"yy")]


@every_path
def test_outputs_know_where_they_go(decode):
    message = in_memory()
    message.outputs.add(name="a")
    put(message.outputs.add(name="b"), "s", 4, 1)
    request = decode(message.SerializeToString(), Memory(r=bytearray(8), s=bytearray(8)))
    nowhere, placed = request.destinations
    assert (nowhere, placed.region, placed.offset, placed.view.nbytes) == (None, "s", 1, 4)
    assert request.uses_regions


@every_path
@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_refused_where_it_is_off_naming_the_flag(decode, where):
    message = ModelInferRequest(model_name="m", raw_input_contents=[] if where == "inputs" else [b"1"])
    message.inputs.add(name="x", datatype="INT8", shape=[1])
    message.outputs.add(name="y")
    put(getattr(message, where)[0], "r", 1)
    with pytest.raises(Unsupported, match="Client shared memory is disabled on this server; --client-shared-memory turns it on"):
        decode(message.SerializeToString(), None)


def test_requests_without_regions_go_nowhere_but_into_the_answer():
    message = ModelInferRequest(model_name="m", raw_input_contents=[b"1"])
    message.inputs.add(name="x", datatype="INT8", shape=[1])
    message.outputs.add(name="y")
    request = decode_request(message.SerializeToString())
    assert (request.uses_regions, request.destinations) == (False, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p["shared_memory_region"].__setattr__("int64_param", 1), "input 'x': unexpected value type for 'shared_memory_region'"),
        (lambda p: p.pop("shared_memory_byte_size"), "input 'x': expected 'shared_memory_byte_size' beside 'shared_memory_region'"),
        (lambda p: p["shared_memory_byte_size"].__setattr__("int64_param", -1), "'shared_memory_byte_size', expected .*>= 0, got -1"),
        (lambda p: p["shared_memory_byte_size"].__setattr__("bool_param", True), "'shared_memory_byte_size', expected .*got True"),
        (lambda p: p["shared_memory_offset"].__setattr__("int64_param", -8), "'shared_memory_offset', expected .*got -8"),
        (lambda p: p["shared_memory_offset"].__setattr__("string_param", "8"), "'shared_memory_offset', expected .*got '8'"),
    ],
)
def test_parameters_that_name_no_part_of_a_region_are_refused(change, text):
    message = in_memory()
    change(message.inputs[0].parameters)
    with pytest.raises(InvalidRequest, match=text):
        place(decode_request(message.SerializeToString()), Memory(r=bytearray(8)))


def test_contents_beside_a_region_are_refused():
    message = in_memory()
    message.inputs[0].contents.fp32_contents.extend([1, 2])
    with pytest.raises(InvalidRequest, match="unexpected 'content' provided when using shared memory for input 'x'"):
        decode_request(message.SerializeToString())


# -- answers -------------------------------------------------------------------------------------------------------------

ENCODER = ResponseEncoder("m", "3", (TensorSpec("y", DataType.FP32, (-1, 2)), TensorSpec("s", DataType.BYTES, (-1,))))
NUMBERS = np.arange(6, dtype=np.float32).reshape(3, 2)
STRINGS = np.array([b"a", b"bc", b""], object)


def ticket(destinations=None, rows=1, outputs=(0, 1), id=""):
    return Ticket(Reply(CollectingOutlet()), rows, (), (), outputs, id=id, destinations=destinations)


def to(memory, offset=0, size=None, name="r"):
    return Destination(name, offset, memoryview(memory)[offset : None if size is None else offset + size])


def parsed(message):
    return ModelInferResponse.FromString(message)


@pytest.mark.parametrize("rows_axis", [True, False])
def test_an_output_is_written_to_its_region_and_keeps_an_empty_entry(rows_axis):
    memory = bytearray(b"-" * 40)
    given = ticket((to(memory, 4), None), rows=3, id="7")
    (message,) = ENCODER.encode_batch([given], (0, 1), [NUMBERS, STRINGS], rows_axis)
    assert bytes(memory) == b"----" + NUMBERS.tobytes() + b"-" * 12
    response = parsed(message)
    assert (response.id, list(response.outputs[0].shape)) == ("7", [3, 2])
    found = response.outputs[0].parameters
    assert found["shared_memory_region"].string_param == "r"
    assert (found["shared_memory_byte_size"].int64_param, found["shared_memory_offset"].int64_param) == (24, 4)
    assert response.raw_output_contents[0] == b""
    assert InferResult(service_pb2.ModelInferResponse.FromString(message)).as_numpy("s").tolist() == STRINGS.tolist()


def test_strings_are_written_with_their_lengths():
    memory = bytearray(16)
    (message,) = ENCODER.encode_batch([ticket((None, to(memory)), rows=3)], (0, 1), [NUMBERS, STRINGS], True)
    content = struct.pack("<I", 1) + b"a" + struct.pack("<I", 2) + b"bc" + struct.pack("<I", 0)
    assert bytes(memory) == content + bytes(1)
    assert parsed(message).outputs[1].parameters["shared_memory_byte_size"].int64_param == len(content)
    assert list(parsed(message).raw_output_contents) == [NUMBERS.tobytes(), b""]


def test_each_of_a_batch_gets_its_rows_where_it_wants_them():
    first, second = bytearray(8), bytearray(8)
    tickets = [ticket((to(first),), outputs=(0,)), ticket(outputs=(0,)), ticket((to(second),), outputs=(0,))]
    answers = ENCODER.encode_batch(tickets, (0,), [NUMBERS], True)
    assert [bytes(first), bytes(second)] == [NUMBERS[0].tobytes(), NUMBERS[2].tobytes()]
    assert [list(parsed(answer).raw_output_contents) for answer in answers] == [[b""], [NUMBERS[1].tobytes()], [b""]]


@pytest.mark.parametrize(("rows_axis", "size"), [(True, 15), (False, 30)])
def test_an_output_that_does_not_fit_fails_its_request_alone_and_nothing_is_written(rows_axis, size):
    memory = bytearray(48)
    small = ticket((to(memory), to(memory, size=size - 1)), rows=3)
    arrays = [np.tile(NUMBERS, (2, 1)), np.tile(STRINGS, 2)]
    error, message = ENCODER.encode_batch([small, ticket(rows=3)], (0, 1), arrays, rows_axis)
    assert isinstance(error, InvalidRequest)
    assert f"for output 's' ({size - 1} bytes in region 'r') should be at least {size} bytes" in str(error)
    assert bytes(memory) == bytes(48)
    assert isinstance(message, bytes)
