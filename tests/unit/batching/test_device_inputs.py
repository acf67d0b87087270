"""Which inputs on a device are lent to a backend, and which are brought to the host first."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from headrace.batching.device_inputs import bring_to_host, lend_or_bring
from headrace.config import InstanceConfig
from headrace.requests import DeviceMemory, InputTensor, Reply, Ticket
from headrace.signature import DataType, Signature, TensorSpec
from headrace.testing import CollectingOutlet, FakeBackend

SIGNATURE = Signature("m", (TensorSpec("a", DataType.FP32, (-1, 2)), TensorSpec("b", DataType.FP16, (-1, 2))), (), 8)


class Memory(DeviceMemory):
    __slots__ = ("content", "reads")

    def __init__(self, content: bytes, device: str = "cuda:0") -> None:
        super().__init__(device, 0x7000, len(content))
        self.content = content
        self.reads = 0

    def read(self) -> memoryview:
        self.reads += 1
        return memoryview(self.content)

    def write(self, content: bytes | memoryview) -> None:
        raise AssertionError("an input is not written to")


class Accepting(FakeBackend):
    accepts_device_inputs: ClassVar[bool] = True


def on(backend: type[FakeBackend], device: str = "cuda:0") -> FakeBackend:
    return backend(Path(), InstanceConfig(device=device))


def ticket(memory: Memory, rows: int = 1) -> Ticket:
    inputs = (InputTensor("a", "FP32", (rows, 2), memory), InputTensor("b", "FP16", (rows, 2), bytes(4 * rows)))
    return Ticket(Reply(CollectingOutlet()), rows, (), inputs, (), on_device=True)


def test_one_request_without_padding_on_the_instances_device_is_lent_as_it_lies() -> None:
    memory = Memory(bytes(16))
    one = ticket(memory, rows=2)
    lent = lend_or_bring(on(Accepting), SIGNATURE, [one], 2)
    assert list(lent) == ["a"]
    array = lent["a"]
    assert (array.device, array.pointer, array.shape, array.dtype) == ("cuda:0", 0x7000, (2, 2), np.dtype("<f4"))
    assert array.owner is memory
    assert memory.reads == 0
    assert one.inputs[0] is not None
    assert one.inputs[0].data is memory


@pytest.mark.parametrize(
    ("backend", "count", "rows"),
    [
        (on(FakeBackend), 1, 1),  # cannot
        (on(Accepting, "cuda:1"), 1, 1),  # lies elsewhere
        (on(Accepting), 1, 2),  # is padded
        (on(Accepting), 2, 2),  # is put together
    ],
)
def test_everything_else_is_copied_to_the_host_once(backend: FakeBackend, count: int, rows: int) -> None:
    memories = [Memory(bytes([number] * 8)) for number in range(count)]
    tickets = [ticket(memory) for memory in memories]
    assert lend_or_bring(backend, SIGNATURE, tickets, rows) == {}
    assert [bytes(each.inputs[0].data) for each in tickets if each.inputs[0]] == [memory.content for memory in memories]
    assert lend_or_bring(backend, SIGNATURE, tickets, rows) == {}
    assert [memory.reads for memory in memories] == [1] * count


def test_what_is_absent_or_on_the_host_is_left_alone() -> None:
    tensor = InputTensor("a", "FP32", (1, 2), b"12345678")
    bring_to_host([None, tensor])
    assert tensor.data == b"12345678"
