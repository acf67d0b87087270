import struct

import numpy as np
import pytest
from headrace.errors import InvalidRequest
from headrace.requests import Reply
from headrace.testing import CollectingOutlet
from headrace.wire.codec import SCAN_THRESHOLD, decode_request
from headrace.wire.messages import ModelInferRequest
from headrace.wire.request_layouts import RequestDecoder, learn_layout


def message(values, *, id="", model="m", timeout=0):
    request = ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="x", datatype="FP32", shape=[1, len(values)])
    request.outputs.add(name="y")
    if timeout:
        request.parameters["timeout"].int64_param = timeout
    request.raw_input_contents.append(np.array(values, "<f4").tobytes())
    return request.SerializeToString()


def layout_of(given):
    layout = learn_layout(given, decode_request(given))
    assert layout is not None
    return layout


def test_another_tensor_and_id_are_read_by_the_layout():
    layout = layout_of(message([1, 2], id="aa", timeout=5))
    request = layout.read(message([3, 4], id="é", timeout=5))
    assert request is not None
    assert (request.model, request.id, request.parameters) == ("m", "é", {"timeout": 5})
    assert bytes(request.inputs[0].data) == np.array([3, 4], "<f4").tobytes()
    assert [output.name for output in request.outputs] == ["y"]


@pytest.mark.parametrize(
    "other",
    [
        message([1, 2], model="n"),
        message([1, 2]).replace(b"\x01\x02", b"\x02\x01"),
        message([1, 2]).replace(b"FP32", b"FP16"),
        message([1, 2]).replace(b"\x01y", b"\x01z"),
        message([1, 2]).replace(b"\x3a\x08", b"\x42\x08"),
    ],
)
def test_a_message_of_equal_length_that_differs_elsewhere_does_not_fit(other):
    given = message([1, 2])
    assert len(other) == len(given)
    assert other != given
    assert layout_of(given).read(other) is None


def test_other_parameters_do_not_fit():
    assert layout_of(message([1], timeout=5)).read(message([1], timeout=6)) is None


def test_an_id_that_is_no_string_is_left_to_the_parser():
    given = message([1], id="ab")
    assert layout_of(given).read(given.replace(b"ab", b"\xff\xfe")) is None


def test_raw_contents_of_several_inputs_must_have_their_lengths():
    request = ModelInferRequest(model_name="m")
    for name in "ab":
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
    texts = [struct.pack("<I", 2) + b"hi", struct.pack("<I", 3) + b"you"]
    request.raw_input_contents.extend(texts)
    layout = layout_of(request.SerializeToString())
    assert [t.data.tolist() for t in layout.read(request.SerializeToString()).inputs] == [[b"hi"], [b"you"]]
    del request.raw_input_contents[:]
    request.raw_input_contents.extend(reversed(texts))
    assert layout.read(request.SerializeToString()) is None


def test_malformed_strings_are_refused_by_the_layout_too():
    request = ModelInferRequest(model_name="m", raw_input_contents=[struct.pack("<I", 2) + b"hi"])
    request.inputs.add(name="a", datatype="BYTES", shape=[1])
    given = request.SerializeToString()
    with pytest.raises(InvalidRequest, match="incomplete string data"):
        layout_of(given).read(given.replace(b"\x02\0\0\0", b"\x03\0\0\0"))


def test_large_tensors_stay_views():
    given = message(range(SCAN_THRESHOLD // 4))
    data = layout_of(given).read(given).inputs[0].data
    assert data.obj is given


def test_typed_contents_have_no_layout():
    request = ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[1]).contents.fp32_contents.append(1)
    given = request.SerializeToString()
    assert learn_layout(given, decode_request(given)) is None


@pytest.mark.parametrize("extra", [b"\x3a\x00", b"\x1a\x01a\x1a\x01b", b"\x40\x01", b"\x6a\x80\x20" + bytes(4096)])
def test_unusual_messages_have_no_layout(extra):
    given = message([1]) + extra
    assert learn_layout(given, decode_request(given)) is None


def test_decoder_learns_what_repeats():
    decoder = RequestDecoder()
    for number in range(3 * RequestDecoder.LEARN_EVERY):
        request = decoder.decode(message([number], id="id"))
        assert bytes(request.inputs[0].data) == np.array([number], "<f4").tobytes()
    assert repr(decoder) == f"RequestDecoder(1 layouts, {RequestDecoder.LEARN_EVERY} misses)"


def test_decoder_follows_traffic_that_changes():
    decoder = RequestDecoder()
    for model in ("a", "b", "a"):
        for _ in range(RequestDecoder.LEARN_EVERY + 1):
            assert decoder.decode(message([1], model=model)).model == model
    assert len(decoder._layouts) == 1


def test_memory_of_the_decoder_is_bounded():
    decoder = RequestDecoder()
    for count in range(RequestDecoder.MAX_LAYOUTS + 10):
        given = message([0] * count)
        for _ in range(RequestDecoder.LEARN_EVERY):
            decoder.decode(given)
    assert 0 < len(decoder._layouts) <= RequestDecoder.MAX_LAYOUTS


def test_requests_of_one_layout_share_nothing_that_differs():
    decoder = RequestDecoder()
    requests = [decoder.decode(message([number], id=str(number % 10))) for number in range(40)]
    assert [request.id for request in requests] == [str(number % 10) for number in range(40)]
    assert len({id(request.inputs[0]) for request in requests}) == 40


def test_what_is_sorted_is_what_would_be_decoded():
    decoder = RequestDecoder()
    kinds = [
        lambda number: message([number]),
        lambda number: message([number], model="n"),
        lambda number: message([number, 2]),
        lambda number: message([number], timeout=5),
        lambda number: message([number], id="an id"),
        lambda number: message([number] * SCAN_THRESHOLD),
    ]
    for kind in kinds[:1] + kinds[2:]:
        for _ in range(RequestDecoder.LEARN_EVERY):
            decoder.decode(kind(0))
    calls = [(kinds[number % len(kinds)](number), Reply(CollectingOutlet())) for number in range(60)]
    alike, others = decoder.sort(calls)
    assert sorted(len(group.replies) for group in alike) == [10, 10, 10]
    # Another model of the same length of name, an id, and a large one.
    assert len(others) == 30
    found = {id(reply): request for group in alike for request, reply in group.calls()}
    found.update((id(reply), decoder.decode(given)) for given, reply in others)
    for given, reply in calls:
        request, expected = found[id(reply)], decode_request(given)
        assert (request.model, request.id, request.parameters) == (expected.model, expected.id, expected.parameters)
        assert [output.name for output in request.outputs] == [output.name for output in expected.outputs]
        (tensor,), (right,) = request.inputs, expected.inputs
        assert (tensor.name, tensor.shape, bytes(tensor.data)) == (right.name, right.shape, bytes(right.data))
