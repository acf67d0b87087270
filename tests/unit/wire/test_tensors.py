import struct

import numpy as np
import pytest
from headrace.errors import InvalidRequest
from headrace.wire.messages import InferTensorContents
from headrace.wire.tensors import decode_bytes_tensor, decode_typed, encode_bytes_tensor


def raw(*elements):
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


@pytest.mark.parametrize("elements", [[], [b""], [b"a", b"", b"\x00\xff"], [b"same", b"size"], [b"x" * 70_000]])
def test_bytes_tensor_round_trips(elements):
    decoded = decode_bytes_tensor(raw(*elements), len(elements), "x", "m")
    assert decoded.dtype == object
    assert decoded.shape == (len(elements),)
    assert decoded.tolist() == elements
    assert encode_bytes_tensor(decoded) == raw(*elements)


def test_bytes_tensor_decodes_from_a_view():
    assert decode_bytes_tensor(memoryview(raw(b"ab", b"c")), 2, "x", "m").tolist() == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("content", "count", "text"),
    [
        (raw(b"a", b"b"), 1, "unexpected number of string elements 2 for inference input 'x' for model 'm', expecting 1"),
        (raw(b"a"), 0, "unexpected number of string elements 1 for inference input 'x' for model 'm', expecting 0"),
        (raw(b"a"), 3, "expected 3 string elements for inference input 'x' for model 'm', got 1"),
        (raw(b"a") + b"\x01\x00", 2, "expecting 4 bytes but only 2 bytes available. Expecting 1 string elements"),
        (raw(b"a") + b"\x05\x00\x00\x00abc", 2, "expecting string of length 5 but only 3 bytes available"),
        (b"\xff\xff\xff\xff", 1, "expecting string of length 4294967295 but only 0 bytes available"),
        (b"", 1, "expected 1 string elements"),
    ],
)
def test_malformed_bytes_tensor_is_refused(content, count, text):
    with pytest.raises(InvalidRequest) as raised:
        decode_bytes_tensor(content, count, "x", "m")
    assert text in str(raised.value)


@pytest.mark.parametrize(
    "array",
    [
        np.array([["é", "b"], ["", "ü"]], object),
        np.array([["é", "b"], ["", "ü"]]),
        np.array([["é".encode(), b"b"], [b"", "ü".encode()]], object),
    ],
)
def test_strings_of_any_kind_are_encoded_row_major_as_utf8(array):
    assert encode_bytes_tensor(array) == raw("é".encode(), b"b", b"", "ü".encode())


def test_a_transposed_string_array_is_encoded_in_its_own_order():
    array = np.array([[b"a", b"b"], [b"c", b"d"]], object)
    assert encode_bytes_tensor(array.T) == raw(b"a", b"c", b"b", b"d")


TYPED = [
    ("BOOL", "bool_contents", [True, False], "?"),
    ("INT8", "int_contents", [-128, 127], "i1"),
    ("INT16", "int_contents", [-(2**15), 2**15 - 1], "<i2"),
    ("INT32", "int_contents", [-(2**31), 2**31 - 1], "<i4"),
    ("INT64", "int64_contents", [-(2**63), 2**63 - 1], "<i8"),
    ("UINT8", "uint_contents", [0, 255], "u1"),
    ("UINT16", "uint_contents", [0, 2**16 - 1], "<u2"),
    ("UINT32", "uint_contents", [0, 2**32 - 1], "<u4"),
    ("UINT64", "uint64_contents", [1, 2**64 - 1], "<u8"),
    ("FP32", "fp32_contents", [1.5, float("inf")], "<f4"),
    ("FP64", "fp64_contents", [0.1, -0.0], "<f8"),
]


@pytest.mark.parametrize(("datatype", "field", "values", "dtype"), TYPED)
def test_typed_contents_become_the_wire_layout(datatype, field, values, dtype):
    contents = InferTensorContents(**{field: values})
    assert decode_typed(contents, datatype, 2, "x", "m") == np.array(values, dtype).tobytes()


@pytest.mark.parametrize(("datatype", "field", "values", "dtype"), TYPED)
def test_empty_typed_contents_are_no_bytes(datatype, field, values, dtype):
    assert decode_typed(InferTensorContents(), datatype, 0, "x", "m") == b""


def test_typed_strings_become_elements():
    decoded = decode_typed(InferTensorContents(bytes_contents=[b"a", b""]), "BYTES", 2, "x", "m")
    assert decoded.tolist() == [b"a", b""]


@pytest.mark.parametrize(("count", "text"), [(1, "unexpected number of string elements 2"), (3, "expected 3 string elements")])
def test_wrong_number_of_typed_strings_is_refused(count, text):
    with pytest.raises(InvalidRequest, match=text):
        decode_typed(InferTensorContents(bytes_contents=[b"a", b"b"]), "BYTES", count, "x", "m")


@pytest.mark.parametrize(
    ("datatype", "field", "value", "limits"),
    [
        ("INT8", "int_contents", 128, "from -128 to 127, got 128 to 128"),
        ("INT8", "int_contents", -129, "got -129 to -129"),
        ("INT16", "int_contents", 2**15, "from -32768 to 32767"),
        ("UINT8", "uint_contents", 256, "from 0 to 255, got 256 to 256"),
        ("UINT16", "uint_contents", 2**16, "from 0 to 65535"),
    ],
)
def test_a_value_that_does_not_fit_the_datatype_is_refused(datatype, field, value, limits):
    with pytest.raises(InvalidRequest, match=limits):
        decode_typed(InferTensorContents(**{field: [value]}), datatype, 1, "x", "m")


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FLOAT", ""])
def test_datatypes_without_a_typed_field_are_refused(datatype):
    with pytest.raises(InvalidRequest, match="expected raw_input_contents"):
        decode_typed(InferTensorContents(fp32_contents=[1]), datatype, 1, "x", "m")


@pytest.mark.parametrize(
    "contents",
    [InferTensorContents(int_contents=[1]), InferTensorContents(fp32_contents=[1], int_contents=[1], bytes_contents=[b""])],
)
def test_a_field_of_another_datatype_is_refused(contents):
    with pytest.raises(InvalidRequest, match=r"unexpected explicit tensor data for input tensor 'x'.*expected fp32_contents, got"):
        decode_typed(contents, "FP32", 1, "x", "m")
