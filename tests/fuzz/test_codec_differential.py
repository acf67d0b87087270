"""The paths of the decoder are equal on any bytes: the same request, or all of them refuse.

HEADRACE_FUZZ=deep runs thirty times as many examples, about five minutes, with other seeds each time.
"""

import os
import random

import numpy as np
import pytest
from headrace.errors import HeadraceError, InvalidRequest, NotFound
from headrace.wire.codec import decode_request, decode_request_protobuf, scan_request
from headrace.wire.messages import ModelInferRequest
from headrace.wire.request_layouts import learn_layout
from headrace.wire.shared_memory import place
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

DEEP = os.environ.get("HEADRACE_FUZZ") == "deep"
profile = settings(
    max_examples=20_000 if DEEP else 600,
    derandomize=not DEEP,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)

names = st.text(max_size=6)
datatypes = st.sampled_from(["FP32", "INT8", "UINT16", "BYTES", "FP16", "BOOL", "UINT64", "FP64", "", "NONSENSE"])
dimensions = st.one_of(st.integers(-1, 4), st.integers(-(2**63), 2**63 - 1))


@st.composite
def parameter_maps(draw, target):
    for name in draw(st.lists(names, max_size=2)):
        kind = draw(st.sampled_from(["bool_param", "int64_param", "string_param", "double_param", "uint64_param", None]))
        if kind is None:
            target[name].SetInParent()
        else:
            values = {"bool_param": st.booleans(), "string_param": names, "double_param": st.floats(allow_nan=False)}
            setattr(target[name], kind, draw(values.get(kind, st.integers(0, 2**63 - 1))))


@st.composite
def regions_named(draw, target):
    """Mostly a part of `Memory`; now and then one beside it, an unknown region, or a value of another type."""
    if draw(st.integers(0, 3)):
        return
    target["shared_memory_region"].string_param = draw(st.sampled_from(["r", "r", "r", "s"]))
    if draw(st.integers(0, 9)):
        target["shared_memory_byte_size"].int64_param = draw(st.sampled_from([0, 4, 8, 12, 60, 2**62]))
    if draw(st.integers(0, 1)):
        target["shared_memory_offset"].int64_param = draw(st.sampled_from([-1, 0, 3, 61]))
    if not draw(st.integers(0, 9)):
        target["shared_memory_offset"].string_param = "1"


class Memory:
    """One region of 64 bytes, which hold an empty string from 0 on."""

    def view(self, name, offset, byte_size):
        if name != "r":
            raise NotFound(name)
        if offset + byte_size > 64:
            raise InvalidRequest(name)
        return memoryview(bytearray(64))[offset : offset + byte_size]


MEMORY = Memory()


@st.composite
def strings(draw):
    elements = draw(st.lists(st.binary(max_size=3), max_size=3))
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


@st.composite
def requests(draw):
    message = ModelInferRequest(model_name=draw(names), model_version=draw(names), id=draw(names))
    is_typed = draw(st.integers(0, 3)) == 0
    for _ in range(draw(st.integers(0, 3))):
        tensor = message.inputs.add(name=draw(names), datatype=draw(datatypes), shape=draw(st.lists(dimensions, max_size=3)))
        draw(parameter_maps(tensor.parameters))
        draw(regions_named(tensor.parameters))
        if is_typed:
            _fill(draw, tensor.contents)
    for name in draw(st.lists(names, max_size=2)):
        output = message.outputs.add(name=name)
        draw(parameter_maps(output.parameters))
        draw(regions_named(output.parameters))
    draw(parameter_maps(message.parameters))
    contents = st.one_of(st.binary(max_size=12), strings(), st.sampled_from([bytes(200), bytes(20_000)]))
    count = sum("shared_memory_region" not in tensor.parameters for tensor in message.inputs) + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    message.raw_input_contents.extend(draw(contents) for _ in range(0 if is_typed else count))
    return message.SerializeToString()


def _fill(draw, contents):
    contents.SetInParent()
    for field, values in {
        "bool_contents": st.booleans(),
        "int_contents": st.integers(-200, 200),
        "uint_contents": st.integers(0, 70_000),
        "fp32_contents": st.floats(width=32, allow_nan=False),
        "bytes_contents": st.binary(max_size=3),
    }.items():
        if draw(st.integers(0, 4)) == 0:
            getattr(contents, field).extend(draw(st.lists(values, max_size=3)))


@st.composite
def damaged(draw):
    """Valid messages cut, overwritten, extended and put together: wire-format merging, broken lengths, groups, bad UTF-8."""
    message = bytearray(draw(requests()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(message), 150)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del message[at:]
        elif kind == 1 and at < len(message):
            message[at] = draw(st.integers(0, 255))
        elif kind == 2:
            message[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == 3:
            message += draw(requests())
        elif kind == 4:
            message[at:at] = draw(fields())
        else:
            message += draw(fields())
    return bytes(message)


@st.composite
def fields(draw):
    """One field by hand: any number, any wire type, lengths in more bytes than needed."""
    number = draw(st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 2047, 2**29 - 1, 2**29])))
    kind = draw(st.integers(0, 7))
    content = draw(st.binary(max_size=6))
    length = _varint(len(content) if draw(st.integers(0, 5)) else draw(st.integers(0, 2**64)), draw(st.integers(0, 9)))
    return _varint(number << 3 | kind, draw(st.sampled_from([0, 0, 0, 1]))) + (length if kind == 2 else b"") + content


def _varint(value, extra_bytes):
    encoded = []
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, *([value | 0x80] + [0x80] * (extra_bytes - 1) + [0] if extra_bytes else [value])])


def outcome(decode, message):
    """Everything that a request holds, or the error, in a form that compares by value."""
    try:
        request = decode(message)
        if request.uses_regions:
            place(request, MEMORY)
    except HeadraceError as error:
        # What follows is the parser's own reason. Where a message has several faults it names the one that it met first, which
        # depends on whether the raw contents were still there.
        return type(error), str(error).split("could not decode the ModelInferRequest:")[0]
    return described(request)


def described(request):
    inputs = [(t.name, t.datatype, t.shape, content(t.data), t.parameters) for t in request.inputs]
    outputs = [(output.name, output.parameters) for output in request.outputs]
    places = [place and (place.region, place.offset, place.view.nbytes) for place in request.destinations or ()]
    return request.model, request.version, request.id, inputs, outputs, places, request.parameters


def content(data):
    return data.tolist() if isinstance(data, np.ndarray) else bytes(data)


def check_equal(message):
    expected = outcome(decode_request_protobuf, message)
    assert outcome(scan_request, message) == expected
    assert outcome(decode_request, message) == expected
    return expected


@profile
@given(requests())
def test_paths_agree_on_valid_messages(message):
    check_equal(message)


@profile
@given(damaged())
def test_paths_agree_on_damaged_messages(message):
    check_equal(message)


@profile
@given(st.binary(max_size=40))
def test_paths_agree_on_noise(message):
    check_equal(message)


@profile
@given(st.one_of(requests(), damaged()), st.data())
def test_a_layout_never_reads_another_request_than_the_parser(message, data):
    """Learn from one message, read others of the same length that differ in a few bytes, wherever those are."""
    try:
        layout = learn_layout(message, decode_request(message))
    except HeadraceError:
        return
    if layout is None:
        return
    assert outcome(layout.read, message) == outcome(decode_request_protobuf, message)
    for _ in range(4):
        other = bytearray(message)
        for at in data.draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=3)):
            other[at] = data.draw(st.integers(0, 255))
        changed = bytes(other)
        read = outcome(layout.read, changed) if _fits(layout, changed) else None
        assert read is None or read == outcome(decode_request_protobuf, changed)


def _fits(layout, message):
    try:
        return layout.read(message) is not None
    except HeadraceError:
        return True


@pytest.mark.parametrize("seed", range(3))
def test_every_truncation_and_every_byte_flip_of_one_message(seed):
    message = _sample(random.Random(seed))
    for length in range(len(message)):
        check_equal(message[:length])
    for at in range(len(message)):
        for bit in range(8):
            check_equal(message[:at] + bytes([message[at] ^ 1 << bit]) + message[at + 1 :])


@pytest.mark.parametrize("seed", range(3))
def test_a_layout_reads_the_flips_in_tensors_and_id_and_no_others(seed):
    message = _sample(random.Random(seed))
    request = decode_request(message)
    layout = learn_layout(message, request)
    cut = sum(len(tensor.data) for tensor in request.inputs) + len(request.id)
    read = 0
    for at in range(len(message)):
        for bit in range(8):
            changed = message[:at] + bytes([message[at] ^ 1 << bit]) + message[at + 1 :]
            got = layout.read(changed)
            if got is not None:
                read += 1
                assert described(got) == outcome(decode_request_protobuf, changed)
    # The topmost bit makes a character of the id the start of a longer one, which it is not.
    assert read == 8 * cut - len(request.id)


def _sample(rng):
    message = ModelInferRequest(model_name="model", model_version="1", id=str(rng.random()))
    for name in "ab":
        message.inputs.add(name=name, datatype="INT8", shape=[2, rng.randrange(300)]).parameters["p"].int64_param = rng.randrange(2**40)
        message.raw_input_contents.append(rng.randbytes(rng.randrange(20)))
    message.outputs.add(name="y").parameters["s"].string_param = "ü"
    last = ModelInferRequest(model_version="2")
    last.outputs.add(name="z")
    return message.SerializeToString() + last.SerializeToString()
