"""One inference request on its way through the server, and whoever waits for its answer. No rules here, only shapes.

The path: bytes -> InferRequest (wire) -> Ticket (admitted to one version's batcher) -> bytes or an error (the Reply's outlet).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.errors import HeadraceError
from headrace.telemetry.trace_context import TraceContext

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]
NO_PARAMETERS: Parameters = {}
"""Shared by the many tensors that have none. Nobody writes to a Parameters after decoding."""


class DeviceMemory:
    """Bytes that a client lends in a device's memory; they are there for as long as this is held. Any thread, and it blocks.

    To be subclassed. No ABC, of which isinstance takes ten times as long: every batch asks it.
    """

    __slots__ = ("device", "nbytes", "pointer")

    def __init__(self, device: str, pointer: int, nbytes: int) -> None:
        self.device = device
        self.pointer = pointer
        self.nbytes = nbytes

    def __len__(self) -> int:
        return self.nbytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.device}, {self.nbytes} bytes)"

    def read(self) -> memoryview:
        """A copy of it all in the host's memory. Raises BackendError."""
        raise NotImplementedError

    def write(self, content: bytes | memoryview) -> None:
        """From its beginning; no more than it has. Raises BackendError."""
        raise NotImplementedError


TensorBytes = bytes | memoryview | NDArray[np.object_] | DeviceMemory
"""A tensor's content: little-endian row-major bytes (a view of the received message where possible), or for BYTES a
one-dimensional object array with one `bytes` an element. DeviceMemory until the batch is gathered: see batching/device_inputs.py."""


class InputTensor:
    __slots__ = ("data", "datatype", "name", "parameters", "shape")

    def __init__(self, name: str, datatype: str, shape: tuple[int, ...], data: TensorBytes, parameters: Parameters = NO_PARAMETERS) -> None:
        self.name = name
        self.datatype = datatype
        self.shape = shape
        self.data = data
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"InputTensor({self.name!r}, {self.datatype}, {self.shape}, {len(self.data)} bytes)"


class RequestedOutput:
    __slots__ = ("name", "parameters")

    def __init__(self, name: str, parameters: Parameters = NO_PARAMETERS) -> None:
        self.name = name
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"RequestedOutput({self.name!r})"


class Destination:
    """Where an output goes that its client wants in a region of shared memory: `view` is that place, all of it."""

    __slots__ = ("offset", "region", "view")

    def __init__(self, region: str, offset: int, view: memoryview | DeviceMemory) -> None:
        self.region = region
        self.offset = offset
        self.view = view

    def write(self, content: bytes | memoryview) -> None:
        """From its beginning; no more than it has. Raises BackendError."""
        if isinstance(self.view, DeviceMemory):
            self.view.write(content)
        else:
            self.view[: len(content)] = content

    def __repr__(self) -> str:
        return f"Destination({self.region!r}, {self.offset}, {self.view.nbytes} bytes)"


class TopClasses:
    """How an output goes into the answer that its client wants as a classification: the `count` largest values, as strings with their
    classes and those's names. `by_row`: of each row, else of the whole tensor."""

    __slots__ = ("by_row", "count")

    def __init__(self, count: int, by_row: bool) -> None:
        self.count = count
        self.by_row = by_row

    def __repr__(self) -> str:
        return f"TopClasses({self.count}, by_row={self.by_row})"


Destinations = tuple[Destination | TopClasses | None, ...]
"""None: into the answer, as it is."""


class Likeness:
    """Shared by requests that were found equal in all but their tensors' content and their id: names, datatypes, shapes, sizes of
    the content, outputs, parameters. What is true of one for these alone is true of all, and may be kept in `known`, one thing by
    whoever learnt it last; it is replaced whole, by any thread.
    """

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: object = None


class InferRequest:
    """A decoded ModelInfer message. `outputs` empty means all of them. `likeness` where it is known to be like others.

    `uses_regions`: some of its tensors lie in shared memory, and may be overwritten by the client once it has its answer.
    `on_device`: some of its inputs are DeviceMemory. `destinations`: where each of `outputs` goes, None where all go into the answer.
    """

    __slots__ = ("destinations", "id", "inputs", "likeness", "model", "on_device", "outputs", "parameters", "uses_regions", "version")

    def __init__(
        self,
        model: str,
        version: str,
        id: str,
        inputs: Sequence[InputTensor],
        outputs: Sequence[RequestedOutput] = (),
        parameters: Parameters = NO_PARAMETERS,
        likeness: Likeness | None = None,
        uses_regions: bool = False,
    ) -> None:
        self.likeness = likeness
        self.model = model
        self.version = version
        self.id = id
        self.inputs = inputs
        self.outputs = outputs
        self.parameters = parameters
        self.uses_regions = uses_regions
        self.on_device = False
        self.destinations: Destinations | None = None

    def __repr__(self) -> str:
        return f"InferRequest({self.model}:{self.version or 'default'}, id={self.id!r}, {self.inputs!r})"


class Alike:
    """Requests that came together and are like each other, with one tensor each and no id: `first` is one of them, and `contents[i]`
    is the content of that of `replies[i]`. What is true of one is found out once for all of them."""

    __slots__ = ("contents", "first", "replies")

    def __init__(self, first: InferRequest, contents: Sequence[bytes], replies: Sequence[Reply]) -> None:
        self.first = first
        self.contents = contents
        self.replies = replies

    def __repr__(self) -> str:
        return f"Alike({len(self.replies)} of {self.first!r})"

    def calls(self) -> list[tuple[InferRequest, Reply]]:
        """One by one."""
        return [(self._request(content), reply) for content, reply in zip(self.contents, self.replies, strict=True)]

    def _request(self, content: bytes) -> InferRequest:
        first, tensor = self.first, self.first.inputs[0]
        own = InputTensor(tensor.name, tensor.datatype, tensor.shape, content, tensor.parameters)
        return InferRequest(
            first.model, first.version, first.id, [own], first.outputs, first.parameters, first.likeness, first.uses_regions
        )  # fmt: skip


Answer = bytes | HeadraceError


class Outlet(Protocol):
    """Where answers leave: one per transport, so that a whole batch costs one hop to it."""

    def deliver(self, answers: Sequence[tuple[Reply, Answer]]) -> None:
        """Called from any thread, exactly once for each reply; never raises and never blocks."""


class Caller:
    """Who makes a call, by its address and what the client calls itself, and in which trace it does, None for in none."""

    __slots__ = ("peer", "trace", "user_agent")

    def __init__(self, peer: str, user_agent: str = "", trace: TraceContext | None = None) -> None:
        self.peer = peer
        self.user_agent = user_agent
        self.trace = trace

    def __repr__(self) -> str:
        return f"Caller({self.peer}, {self.user_agent!r}, {self.trace!r})"


class Reply:
    """Whoever waits for one answer. Transports subclass it with what they need to find the caller again.

    `deadline` is on time.monotonic()'s clock, None where the call has none. `caller` is there
    where a transport was asked for it. `ticket` and `cancel` are set
    when a version takes the request, so that a caller who goes away can be found in that version's queue.
    """

    __slots__ = ("caller", "cancel", "deadline", "outlet", "ticket")

    def __init__(self, outlet: Outlet, deadline: float | None = None) -> None:
        self.outlet = outlet
        self.deadline = deadline
        self.caller: Caller | None = None
        self.ticket: Ticket | None = None
        self.cancel: Callable[[Reply], None] | None = None

    def ok(self, message: bytes) -> None:
        self.outlet.deliver([(self, message)])

    def fail(self, error: HeadraceError) -> None:
        self.outlet.deliver([(self, error)])


class Ticket:
    """One admitted request in one version's batcher, which owns it until it is settled.

    `rows` of the batch dimension; tickets with equal `key` can share a batch; `inputs` and `outputs` (indexes) are in the
    signature's order, `destinations` in that of `outputs` (None: all go into the answer as they are). Times are time.monotonic(): `arrived`
    when the message came, `enqueued` when the batcher took it, `expires` when it must have started, `answer_by` when it is of no use
    any more (inf: never), which is not before that. `is_bound`: it asked for this version, and no other may answer it. `on_device`: some
    of its inputs are DeviceMemory; it then shares no batch with one that has none.
    """

    __slots__ = (
        "answer_by", "arrived", "destinations", "enqueued", "expires", "id", "inputs", "is_bound", "is_settled", "is_taken", "key",
        "on_device", "outputs",
        "priority", "reply", "rows",
    )  # fmt: skip

    def __init__(
        self,
        reply: Reply,
        rows: int,
        key: Hashable,
        inputs: Sequence[InputTensor | None],
        outputs: tuple[int, ...],
        id: str = "",
        priority: int = 0,
        expires: float = float("inf"),
        answer_by: float = float("inf"),
        arrived: float = 0.0,
        is_bound: bool = False,
        destinations: Destinations | None = None,
        on_device: bool = False,
    ) -> None:
        self.on_device = on_device
        self.answer_by = answer_by
        self.is_bound = is_bound
        self.destinations = destinations
        self.reply = reply
        self.rows = rows
        self.key = key
        self.inputs = inputs
        self.outputs = outputs
        self.id = id
        self.priority = priority
        self.expires = expires
        self.arrived = arrived
        self.enqueued = 0.0
        self.is_taken = False
        self.is_settled = False

    def __repr__(self) -> str:
        state = "settled" if self.is_settled else "taken" if self.is_taken else "queued"
        return f"Ticket({self.id!r}, rows={self.rows}, {state})"
