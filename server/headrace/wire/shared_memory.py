"""Tensors that a request leaves in its client's shared memory: which region, where in it, and how much of it."""

from __future__ import annotations

import math
from typing import Protocol

from headrace.errors import InvalidRequest, Unsupported
from headrace.requests import Destination, DeviceMemory, InferRequest, Parameters
from headrace.wire.tensors import decode_bytes_tensor

REGION = "shared_memory_region"
BYTE_SIZE = "shared_memory_byte_size"
OFFSET = "shared_memory_offset"

DISABLED = "Client shared memory is disabled on this server; --client-shared-memory turns it on"


class Regions(Protocol):
    def view(self, name: str, offset: int, byte_size: int) -> memoryview | DeviceMemory:
        """That part of a region, writable; it stays valid for as long as somebody holds it. Any thread.

        Raises NotFound for an unknown region, InvalidRequest for a part that is not within it.
        """


def place(request: InferRequest, regions: Regions | None) -> None:
    """Put views of the regions where the request's tensors name some. `regions` None: there are none, and nobody may name any.

    Raises Unsupported, NotFound, InvalidRequest. Whether a view has its tensor's size is for the model's Signature.
    """
    if regions is None:
        raise Unsupported(f"{DISABLED}. Without it tensors go with the request")
    for tensor in request.inputs:
        if REGION in tensor.parameters:
            view = _destination(f"input '{tensor.name}'", tensor.parameters, regions).view
            if tensor.datatype == "BYTES":
                content = view.read() if isinstance(view, DeviceMemory) else view
                tensor.data = decode_bytes_tensor(content, math.prod(tensor.shape), tensor.name, request.model)
            elif isinstance(view, DeviceMemory):
                tensor.data = view
                request.on_device = True
            else:
                tensor.data = view.toreadonly()
    destinations = tuple(
        [
            _destination(f"output '{output.name}'", output.parameters, regions) if REGION in output.parameters else None
            for output in request.outputs
        ]
    )
    request.destinations = destinations if any(destinations) else None


def _destination(subject: str, parameters: Parameters, regions: Regions) -> Destination:
    name = parameters[REGION]
    if not isinstance(name, str):
        raise InvalidRequest(f"{subject}: unexpected value type for '{REGION}', expected string_param, got {name!r}")
    if BYTE_SIZE not in parameters:
        raise InvalidRequest(f"{subject}: expected '{BYTE_SIZE}' beside '{REGION}'")
    offset = _count(subject, parameters, OFFSET)
    return Destination(name, offset, regions.view(name, offset, _count(subject, parameters, BYTE_SIZE)))


def _count(subject: str, parameters: Parameters, key: str) -> int:
    given = parameters.get(key, 0)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InvalidRequest(f"{subject}: unexpected value for '{key}', expected an int64_param >= 0, got {given!r}")
    return given
