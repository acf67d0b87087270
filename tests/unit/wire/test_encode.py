import numpy as np
import pytest
from headrace.errors import BackendError, InvalidRequest
from headrace.requests import Reply, Ticket
from headrace.signature import DataType, TensorSpec
from headrace.wire import codec
from headrace.wire.codec import ResponseEncoder, encode_response_parameters
from headrace.wire.messages import ModelInferResponse
from tritonclient.grpc import InferResult, service_pb2

NUMERIC = [datatype for datatype in DataType if datatype is not DataType.BYTES]


class NoOutlet:
    def deliver(self, answers):
        raise AssertionError("nothing is delivered here")


def ticket(rows, outputs, id=""):
    return Ticket(Reply(NoOutlet()), rows, (), (), outputs, id=id)


def encoder(*specs):
    return ResponseEncoder("m", "3", tuple(TensorSpec(f"y{i}", datatype, shape) for i, (datatype, shape) in enumerate(specs)))


def parsed(message):
    return ModelInferResponse.FromString(message)


@pytest.mark.parametrize("datatype", NUMERIC)
def test_numbers_of_every_datatype_are_raw(datatype):
    array = np.arange(12).reshape(4, 3).astype(datatype.dtype)
    response = parsed(encoder((datatype, (-1, 3))).encode("7", (0,), [array], 1, 3, rows_axis=True))
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y0", datatype.value, [2, 3])
    assert list(response.raw_output_contents) == [array[1:3].tobytes()]


@pytest.mark.parametrize("datatype", [d for d in NUMERIC if d is not DataType.BF16])
def test_tritonclient_reads_what_was_encoded(datatype):
    array = np.arange(6).reshape(2, 3).astype(datatype.dtype)
    message = encoder((datatype, (-1, 3))).encode("", (0,), [array], 0, 2, rows_axis=True)
    result = InferResult(service_pb2.ModelInferResponse.FromString(message))
    np.testing.assert_array_equal(result.as_numpy("y0"), array)
    assert result.as_numpy("y0").dtype == array.dtype


def test_tritonclient_reads_strings():
    array = np.array([["ü", "b"], ["", "c"]], object)
    message = encoder((DataType.BYTES, (-1, 2))).encode("", (0,), [array], 0, 2, rows_axis=True)
    result = InferResult(service_pb2.ModelInferResponse.FromString(message))
    assert result.as_numpy("y0").tolist() == [["ü".encode(), b"b"], [b"", b"c"]]


def test_one_raw_entry_an_output_in_the_asked_order_empty_ones_too():
    encode = encoder((DataType.FP32, (-1,)), (DataType.BYTES, (-1,)), (DataType.INT8, (-1,))).encode
    arrays = [np.zeros(0, "i1"), np.zeros(0, object), np.ones(2, "<f4")]
    response = parsed(encode("", (2, 1, 0), arrays, 0, 0, rows_axis=False))
    assert [output.name for output in response.outputs] == ["y2", "y1", "y0"]
    assert [list(output.shape) for output in response.outputs] == [[0], [0], [2]]
    assert list(response.raw_output_contents) == [b"", b"", np.ones(2, "<f4").tobytes()]


def test_whole_arrays_of_any_rank():
    array = np.array(2.5, "<f8")
    response = parsed(encoder((DataType.FP64, ())).encode("", (0,), [array], 0, 0, rows_axis=False))
    assert list(response.outputs[0].shape) == []
    assert response.raw_output_contents[0] == array.tobytes()


def test_arrays_that_are_not_contiguous():
    array = np.arange(20_000, dtype="<f4").reshape(100, 200).T
    response = parsed(encoder((DataType.FP32, (-1, -1))).encode("", (0,), [array], 0, 200, rows_axis=True))
    assert response.raw_output_contents[0] == np.ascontiguousarray(array).tobytes()


def test_large_arrays():
    array = np.arange(100_000, dtype="<f4").reshape(4, 25_000)
    response = parsed(encoder((DataType.FP32, (-1, -1))).encode("", (0,), [array], 1, 2, rows_axis=True))
    assert response.raw_output_contents[0] == array[1:2].tobytes()


@pytest.mark.parametrize("id", ["a", "ünï", "x" * 127, "x" * 128, "é" * 100_000])
def test_ids_of_any_length(id):
    array = np.ones((1, 1), "<f4")
    assert parsed(encoder((DataType.FP32, (-1, 1))).encode(id, (0,), [array], 0, 1, rows_axis=True)).id == id


def test_response_parameters_of_every_kind():
    given = {"flag": True, "count": -3, "ratio": 0.5, "text": "ü"}
    array = np.ones((1, 1), "<f4")
    message = encoder((DataType.FP32, (-1, 1))).encode("1", (0,), [array], 0, 1, True, given)
    for response in (parsed(message), parsed(message + encode_response_parameters({"more": False}))):
        read = {name: value.WhichOneof("parameter_choice") for name, value in response.parameters.items() if name in given}
        assert read == {"flag": "bool_param", "count": "int64_param", "ratio": "double_param", "text": "string_param"}
        assert response.parameters["count"].int64_param == -3
    assert "more" in response.parameters


def test_an_array_of_another_datatype_is_the_models_error():
    encode = encoder((DataType.FP32, (-1, 1)), (DataType.BYTES, (-1, 1)))
    with pytest.raises(BackendError, match="output 'y0': expected float32 for FP32, the model gave float64"):
        encode.encode("", (0,), [np.ones((1, 1))], 0, 1, rows_axis=True)
    with pytest.raises(BackendError, match="output 'y1': expected strings or bytes, the model gave float64"):
        encode.encode_batch([ticket(1, (1,))], (1,), [np.ones((1, 1))], rows_axis=True)


def test_a_response_larger_than_clients_can_receive_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "MAX_RESPONSE_BYTES", 60)
    encode = encoder((DataType.UINT8, (-1,)))
    with pytest.raises(InvalidRequest, match=r"the response has \d+ bytes; expected at most 60"):
        encode.encode("", (0,), [np.ones(50, "u1")], 0, 50, rows_axis=True)
    for is_whole in (True, False):
        answers = encode.encode_batch([ticket(2, (0,)), ticket(48, (0,))], (0,), [np.ones(50, "u1")], rows_axis=not is_whole)
        assert isinstance(answers[1], InvalidRequest)
        assert isinstance(answers[0], InvalidRequest) is is_whole


def test_headers_of_ragged_shapes_do_not_pile_up():
    encode = encoder((DataType.UINT8, (-1, -1)))
    for length in range(ResponseEncoder.MAX_CACHED_HEADERS + 10):
        encode.encode("", (0,), [np.ones((1, length), "u1")], 0, 1, rows_axis=True)
    assert 0 < len(encode._headers) <= ResponseEncoder.MAX_CACHED_HEADERS


BATCH = [
    np.arange(12, dtype="<f4").reshape(6, 2),
    np.array([[str(row)] for row in range(6)], object),
    np.zeros((6, 0), "<i8"),
    np.arange(60_000, dtype="<i4").reshape(6, 10_000)[:, ::2],
    np.arange(6, dtype="u1"),
]
SPECS = [
    (DataType.FP32, (-1, 2)),
    (DataType.BYTES, (-1, 1)),
    (DataType.INT64, (-1, 0)),
    (DataType.INT32, (-1, 5000)),
    (DataType.UINT8, (-1,)),
]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 1), (1, 0, 3), (0, 1, 2, 3, 4), ()])
@pytest.mark.parametrize("rows", [[1, 1, 1], [2, 1, 3], [6], [1, 0, 1]])
def test_a_batch_gives_what_its_tickets_would_get_alone(wanted, rows):
    encode = encoder(*SPECS)
    arrays = [BATCH[index] for index in wanted]
    tickets = [ticket(count, wanted, id="" if i % 2 else f"id{i}") for i, count in enumerate(rows)]
    stops = np.cumsum(rows).tolist()
    alone = [encode.encode(t.id, wanted, arrays, stop - t.rows, stop, rows_axis=True) for t, stop in zip(tickets, stops, strict=True)]
    assert encode.encode_batch(tickets, wanted, arrays, rows_axis=True) == alone
    assert parsed(alone[0]) == expected(wanted, arrays, tickets[0])


def expected(wanted, arrays, first):
    """By protobuf alone."""
    response = ModelInferResponse(model_name="m", model_version="3", id=first.id)
    for index, array in zip(wanted, arrays, strict=True):
        rows = array[: first.rows]
        response.outputs.add(name=f"y{index}", datatype=SPECS[index][0].value, shape=rows.shape)
        if array.dtype == object:
            content = b"".join(len(text).to_bytes(4, "little") + text.encode() for text in rows.ravel())
        else:
            content = rows.tobytes()
        response.raw_output_contents.append(content)
    return response


def test_tickets_of_one_batch_may_want_different_outputs():
    encode = encoder(*SPECS)
    tickets = [ticket(1, (1, 0)), ticket(2, (0,)), ticket(1, (0, 1))]
    answers = [parsed(a) for a in encode.encode_batch(tickets, (0, 1), BATCH[:2], rows_axis=True)]
    assert [[output.name for output in answer.outputs] for answer in answers] == [["y1", "y0"], ["y0"], ["y0", "y1"]]
    assert answers[1].raw_output_contents[0] == BATCH[0][1:3].tobytes()
    assert answers[2].raw_output_contents[0] == BATCH[0][3:4].tobytes()


def test_without_a_batch_dimension_a_ticket_gets_the_whole_arrays():
    encode = encoder((DataType.FP32, (2,)), (DataType.UINT8, (3,)))
    arrays = [np.ones(2, "<f4"), np.ones(3, "u1")]
    (answer,) = encode.encode_batch([ticket(1, (1,), id="i")], (0, 1), arrays, rows_axis=False)
    assert parsed(answer).id == "i"
    assert list(parsed(answer).raw_output_contents) == [b"\1\1\1"]
