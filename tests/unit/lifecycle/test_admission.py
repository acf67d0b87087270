from __future__ import annotations

import pytest
from headrace.config import BatchingConfig
from headrace.errors import InvalidRequest
from headrace.lifecycle.admission import make_ticket, make_tickets
from headrace.requests import (
    Alike,
    DeviceMemory,
    InferRequest,
    InputTensor,
    Parameter,
    Parameters,
    Reply,
    RequestedOutput,
    Ticket,
    TopClasses,
)
from headrace.signature import DataType, Signature, TensorSpec
from headrace.testing import CollectingOutlet

SIGNATURE = Signature("m", (TensorSpec("x", DataType.FP32, (-1, 1)),), (TensorSpec("y", DataType.FP32, (-1, 1)),), 8)


def admit(parameters: Parameters, batching: BatchingConfig, deadline: float | None = None) -> Ticket:
    request = InferRequest("m", "", "id", [InputTensor("x", "FP32", (1, 1), bytes(4))], (), parameters)
    return make_ticket(SIGNATURE, batching, request, Reply(CollectingOutlet(), deadline), 100.0)


NEVER = float("inf")


@pytest.mark.parametrize(
    ("timeout", "default", "slo", "deadline", "expires", "answer_by"),
    [
        (0, 0.0, 0.0, None, NEVER, NEVER),
        (0, 2.0, 0.0, None, 102.0, NEVER),
        (1_000_000, 2.0, 0.0, None, 101.0, 101.0),
        (9_000_000, 2.0, 0.0, None, 102.0, 109.0),
        (1_000_000, 0.0, 0.0, None, 101.0, 101.0),
        (0, 0.0, 0.0, 100.5, 100.5, 100.5),
        (1_000_000, 0.0, 0.0, 100.5, 100.5, 100.5),
        (0, 0.0, 0.3, None, 100.3, 100.3),
        (1_000_000, 0.2, 0.3, 100.5, 100.2, 100.3),
    ],
)
def test_the_earliest_of_deadline_timeout_and_slo_counts_and_the_default_timeout_for_the_start(
    timeout: int, default: float, slo: float, deadline: float | None, expires: float, answer_by: float
) -> None:
    ticket = admit({"timeout": timeout}, BatchingConfig(default_timeout=default, slo=slo), deadline)
    assert (ticket.expires, ticket.answer_by) == (expires, answer_by)


@pytest.mark.parametrize("parameters", [{}, {"timeout": 1_000_000}, {"priority": 2}, {"priority": 1, "timeout": 400_000}])
@pytest.mark.parametrize("batching", [BatchingConfig(), BatchingConfig(default_timeout=0.3, slo=0.5, priority_levels=3)])
@pytest.mark.parametrize("version", ["", "7"])
def test_of_requests_that_are_alike_each_gets_the_ticket_that_it_would_get_alone(
    parameters: Parameters, batching: BatchingConfig, version: str
) -> None:
    replies = [Reply(CollectingOutlet(), deadline) for deadline in (None, 100.2, 100.45, 103.0)]
    contents = [bytes([number] * 4) for number in range(4)]
    alike = Alike(InferRequest("m", version, "", [InputTensor("x", "FP32", (1, 1), contents[0])], (), parameters), contents, replies)
    together = make_tickets(SIGNATURE, batching, alike, 100.0)
    alone = [make_ticket(SIGNATURE, batching, request, reply, 100.0) for request, reply in alike.calls()]
    for one, other, content in zip(together, alone, contents, strict=True):
        assert [getattr(one, name) for name in Ticket.__slots__ if name != "inputs"] == [
            getattr(other, name) for name in Ticket.__slots__ if name != "inputs"
        ]
        (tensor,) = one.inputs
        assert tensor is not None
        assert (tensor.name, tensor.datatype, tensor.shape, tensor.data) == ("x", "FP32", (1, 1), content)


def test_timeout_override_can_be_switched_off() -> None:
    batching = BatchingConfig(default_timeout=2.0, allow_timeout_override=False)
    assert admit({"timeout": 1}, batching).expires == 102.0


@pytest.mark.parametrize(("given", "level"), [(0, 2), (1, 1), (3, 3), (4, 2)])
def test_priority_outside_the_levels_means_the_default(given: int, level: int) -> None:
    assert admit({"priority": given}, BatchingConfig(priority_levels=3, default_priority_level=2)).priority == level


@pytest.mark.parametrize("parameters", [{"priority": -1}, {"priority": "high"}, {"timeout": -5}, {"timeout": True}, {"triton_odd": 1}])
def test_wrong_parameters_are_refused_by_name(parameters: Parameters) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(parameters))):
        admit(parameters, BatchingConfig(priority_levels=3))


def test_an_output_is_classified_or_in_shared_memory_not_both() -> None:
    output = RequestedOutput("y", {"classification": 3, "shared_memory_region": "r", "shared_memory_byte_size": 4})
    request = InferRequest("m", "", "id", [InputTensor("x", "FP32", (1, 1), bytes(4))], [output])
    with pytest.raises(InvalidRequest, match="output 'y': expected 'classification' or 'shared_memory_region', got both"):
        make_ticket(SIGNATURE, BatchingConfig(), request, Reply(CollectingOutlet()), 100.0)


def classified(given: Parameters, datatype: DataType = DataType.FP32, max_batch_size: int = 8) -> Ticket:
    signature = Signature(
        "m", SIGNATURE.inputs, (TensorSpec("x", DataType.FP32, (-1,)), TensorSpec("y", datatype, (-1, 5))), max_batch_size
    )
    outputs = [RequestedOutput("y", given), RequestedOutput("x")]
    request = InferRequest("m", "", "id", [InputTensor("x", "FP32", (1, 1), bytes(4))], outputs)
    return make_ticket(signature, BatchingConfig(), request, Reply(CollectingOutlet()), 100.0)


@pytest.mark.parametrize("max_batch_size", [0, 8])
def test_a_classification_is_of_each_row_where_there_are_rows(max_batch_size: int) -> None:
    ticket = classified({"classification": 3}, max_batch_size=max_batch_size)
    assert ticket.outputs == (1, 0)
    assert ticket.destinations is not None
    wanted, plain = ticket.destinations
    assert isinstance(wanted, TopClasses)
    assert (wanted.count, wanted.by_row, plain) == (3, max_batch_size > 0, None)


def test_what_wants_no_classes_has_no_destinations() -> None:
    assert classified({"binary_data": True}).destinations is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (0, "invalid value for 'classification' parameter, expected > 0, got 0"),
        (-3, "invalid value for 'classification' parameter, expected > 0, got -3"),
        (True, "invalid value type for 'classification' parameter, expected int64_param, got True"),
        ("3", "invalid value type for 'classification' parameter, expected int64_param, got '3'"),
        (3.0, "invalid value type for 'classification' parameter, expected int64_param, got 3.0"),
    ],
)
def test_a_number_of_classes_that_is_none_is_refused(given: Parameter, text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"output 'y': {text}"):
        classified({"classification": given})


@pytest.mark.parametrize("datatype", [DataType.FP16, DataType.BF16, DataType.BOOL, DataType.BYTES])
def test_what_triton_does_not_rank_is_refused_in_its_words(datatype: DataType) -> None:
    with pytest.raises(InvalidRequest, match=f"class result not available for output due to unsupported type '{datatype.value}'"):
        classified({"classification": 3}, datatype)


def test_a_request_with_inputs_on_a_device_shares_no_batch_with_one_that_has_none() -> None:
    tickets = []
    for memory in (bytes(4), DeviceMemory("cuda:0", 0x7000, 4), DeviceMemory("cuda:1", 0x9000, 4)):
        request = InferRequest("m", "", "", [InputTensor("x", "FP32", (1, 1), memory)])
        request.on_device = isinstance(memory, DeviceMemory)
        tickets.append(make_ticket(SIGNATURE, BatchingConfig(), request, Reply(CollectingOutlet()), 100.0))
    assert [ticket.on_device for ticket in tickets] == [False, True, True]
    assert tickets[0].key != tickets[1].key == tickets[2].key
