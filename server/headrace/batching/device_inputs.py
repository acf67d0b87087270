"""What becomes of inputs that their client has left in a device's memory: lent to a backend that reads them there, or copied. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.backends.base import Backend, DeviceArray
from headrace.requests import DeviceMemory, InputTensor, Ticket
from headrace.signature import Signature


def bring_to_host(inputs: Iterable[InputTensor | None]) -> None:
    """Replace what is on a device by a copy. Blocks. Raises BackendError."""
    for tensor in inputs:
        if tensor is not None and isinstance(tensor.data, DeviceMemory):
            tensor.data = tensor.data.read()


def lend_or_bring(backend: Backend, signature: Signature, tickets: Sequence[Ticket], rows: int) -> dict[str, DeviceArray]:
    """Before a batch is gathered, on its worker's thread: those inputs that the backend is to read where they are, for `lend`. They stay
    DeviceMemory, which `gather` leaves out; all others are on the host after this. Blocks for those. Raises BackendError.

    Lent are those of a batch that is one request, without padding, on the device of the instance: everything else has to be put together
    from several places first.
    """
    first = tickets[0]
    if not first.on_device:  # then none is: their keys differ
        return {}
    has_rows = not signature.max_batch_size or first.rows == rows
    lent = {}
    if backend.accepts_device_inputs and len(tickets) == 1 and has_rows:
        for spec, tensor in zip(signature.inputs, first.inputs, strict=True):
            if tensor is not None and isinstance(tensor.data, DeviceMemory) and tensor.data.device == backend.device:
                memory = tensor.data
                lent[spec.name] = DeviceArray(memory.device, memory.pointer, tensor.shape, spec.datatype.dtype, memory)
    for ticket in tickets:
        bring_to_host([tensor for tensor in ticket.inputs if tensor is not None and tensor.name not in lent])
    return lent
