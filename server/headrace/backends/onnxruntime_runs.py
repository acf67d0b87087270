"""How batches run in ONNX Runtime's session on a GPU: bound by address, or by name until their outputs' shapes are known.

The inputs lie in the lane's slab, are uploaded in one copy, and are bound to the session by address. The first batch of some input shapes
has its outputs bound by name: the runtime allocates them, and their shapes are learnt. From then on they are bound by address in the
lane's output slab, which is downloaded in one copy. A model whose output shapes depend on more than its inputs' is found out by the
runtime, which refuses the bound shape, and keeps the first way.

The runtime computes in our stream and, but for graphs, waits for nothing (`disable_synchronize_execution_providers`); `done` of the lane
tells the end.

CUDA graphs: one for each lane and each set of shapes that was asked for, since a graph has its addresses frozen. All are of the one
session, in the one stream, and are captured by the thread that replays them, as the runtime keeps graphs by thread. The memory that a
graph computes in is the arena's again after the capture; what is bound by name may then lie in it, and is therefore copied out in the
compute stream, before the next graph can run. A replay may wait for the stream inside the runtime, by its version and whatever the run
options say: then nothing is queued behind such a batch before it has been computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.backends.base import ArtifactSignature
from headrace.backends.cuda_lanes import Lane, Layout, Place, lay_out
from headrace.backends.cuda_processing import DeviceProcessing, Tensor
from headrace.backends.onnxruntime_options import make_run_options
from headrace.backends.onnxruntime_session import ONNX_BFLOAT16, one_line
from headrace.errors import BackendError
from headrace.signature import DataType, TensorSpec

ASYNCHRONOUS = {"disable_synchronize_execution_providers": "1"}
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"
KEPT_PLANS = 64
"""Bindings kept of a lane; another one costs some 10 µs. Models of text have no end of shapes."""
KEPT_SHAPES = 1024
"""Sets of input shapes whose outputs' shapes are remembered."""
MAX_GRAPHS = 32
"""Sets of shapes that graphs are captured for, of each lane."""

Key = tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[str, ...]]
"""Names and shapes of the inputs, and the names of the artifact's outputs that are computed."""


@dataclass(slots=True)
class _Plan:
    """How batches of one key run in one lane, at the addresses that it had at `generation`."""

    generation: int
    binding: Any
    options: Any
    visible: Layout
    """What clients get, in the output slab."""
    scratch: Layout
    """What is between the model and the kernels around it."""


class Runs:
    """Owns the bindings of one session, what has been learnt of shapes, and which of them have graphs. Used by the thread that launches.

    `memory`: the runtime's name for where the lanes' slabs are. `on_host`: inputs that it takes from host memory.
    """

    def __init__(
        self, session: Any, artifact: ArtifactSignature, kernels: DeviceProcessing, lanes: int, memory: str, on_host: frozenset[str]
    ) -> None:
        self._session = session
        self._kernels = kernels
        self._memory = memory
        self._on_host = on_host
        self._inputs = {spec.name: spec for spec in artifact.inputs}
        self._outputs = {spec.name: spec for spec in artifact.outputs}
        self._is_dynamic = False
        self._learnt: OrderedDict[Key, dict[str, tuple[int, ...]]] = OrderedDict()
        self._plans: list[OrderedDict[Key, _Plan]] = [OrderedDict() for _ in range(lanes)]
        self._graphs: set[Key] | None = None
        self._next_graph = 1
        self._queued = make_run_options(ASYNCHRONOUS)

    def __repr__(self) -> str:
        return f"Runs({len(self._learnt)} sets of shapes, {len(self._graphs or ())} with graphs, dynamic={self._is_dynamic})"

    def allow_graphs(self) -> None:
        """The session captures graphs. Without an id it would capture each run, under one id for all shapes."""
        self._graphs = set()
        self._queued = make_run_options({**ASYNCHRONOUS, GRAPH_ID: NO_GRAPH})

    def want_graph(self, key: Key) -> None:
        """Runs of these shapes, which must be known, get graphs, where there may be any."""
        if self._graphs is not None and len(self._graphs) < MAX_GRAPHS:
            self._graphs.add(key)

    def key(self, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> Key:
        """`names`: of what clients get."""
        return tuple((name, shapes[name]) for name in self._inputs if name in shapes), tuple(self._kernels.needed(names))

    def lay_out_inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """In the signature's order, so that equal shapes are at equal places."""
        given = self._kernels.given
        return lay_out({name: (shapes[name], given(spec)) for name, spec in self._inputs.items() if name in shapes})

    def run(self, lane: Lane, layout: Layout, key: Key) -> tuple[Layout, object]:
        """Queue what makes of the uploaded inputs the outputs on the host, up to `done`. Returns where they will be, and what must live
        until then."""
        if not self._is_dynamic and key in self._learnt:
            try:
                visible = self._run_bound(lane, layout, key)
            except Exception as error:  # the runtime's, which say by their text alone what went wrong
                if not _is_shape_mismatch(one_line(error)):
                    raise
                self._is_dynamic = True
            else:
                lane.download(visible.size)
                return visible, None
        if self._is_dynamic and self._graphs is not None:
            raise BackendError(
                "onnxruntime option 'cuda_graph': the model's output shapes depend on its values; leave it out for this model"
            )
        visible, held = self._run_by_name(lane, layout, key)
        lane.download(0)
        return visible, held

    def _run_by_name(self, lane: Lane, layout: Layout, key: Key) -> tuple[Layout, object]:
        """The runtime allocates the outputs. Returns where clients' tensors will be, and what must live until they are."""
        scratch = self._lay_out_scratch(layout, {})
        lane.scratch.reserve(max(scratch.size, 1))
        binding = self._session.io_binding()
        self._bind_inputs(binding, lane, layout, scratch)
        for name in key[1]:
            binding.bind_output(name, self._memory, lane.gpu.ordinal)
        self._normalize(lane, layout, scratch)
        self._session.run_with_iobinding(binding, self._queued)
        values = dict(zip(key[1], binding.get_outputs(), strict=True))
        shapes = {name: tuple(value.shape()) for name, value in values.items()}
        visible = self._lay_out_visible(shapes)
        lane.outputs.reserve(max(visible.size, 1))
        for name, value in values.items():
            places = self._places_of(visible, name, shapes[name])
            self._copy_out(lane, name, shapes[name], value.data_ptr(), places)
        self._learn(key, shapes)
        return visible, (binding, values)

    def _copy_out(self, lane: Lane, name: str, shape: tuple[int, ...], address: int, places: Mapping[str, Place]) -> None:
        """From where the runtime has put an output; in the compute stream, as the theory above says."""
        stream = lane.streams.compute
        if not self._kernels.is_output(name):
            lane.outputs.download_from(address, places[name], stream)
            return
        self._kernels.finish(stream, name, shape, address, {each: lane.outputs.address(place) for each, place in places.items()})
        for place in places.values():
            lane.outputs.download_from(lane.outputs.address(place), place, stream)

    def _run_bound(self, lane: Lane, layout: Layout, key: Key) -> Layout:
        """All at addresses of the lane. Returns where clients' tensors are on the device."""
        shapes = self._learnt[key]
        plan = self._plan(lane, layout, key, shapes)
        self._normalize(lane, layout, plan.scratch)
        self._session.run_with_iobinding(plan.binding, plan.options)
        for name in filter(self._kernels.is_output, key[1]):
            into = {each: lane.outputs.address(place) for each, place in self._places_of(plan.visible, name, shapes[name]).items()}
            scores = lane.scratch.address(plan.scratch.places[_after(name)])
            self._kernels.finish(lane.streams.compute, name, shapes[name], scores, into)
        return plan.visible

    def _plan(self, lane: Lane, layout: Layout, key: Key, shapes: Mapping[str, tuple[int, ...]]) -> _Plan:
        plans = self._plans[lane.index]
        plan = plans.get(key)
        if plan is not None and plan.generation == lane.generation:
            plans.move_to_end(key)
            return plan
        visible, scratch = self._lay_out_visible(shapes), self._lay_out_scratch(layout, shapes)
        lane.outputs.reserve(max(visible.size, 1))
        lane.scratch.reserve(max(scratch.size, 1))
        binding = self._session.io_binding()
        self._bind_inputs(binding, lane, layout, scratch)
        for name in key[1]:
            place = scratch.places.get(_after(name))
            address = lane.scratch.address(place) if place else lane.outputs.address(visible.places[name])
            binding.bind_output(name, self._memory, lane.gpu.ordinal, _element_type(self._outputs[name]), shapes[name], address)
        plans[key] = plan = _Plan(lane.generation, binding, self._options_for(key), visible, scratch)
        if len(plans) > KEPT_PLANS:
            # The oldest, but not one with a graph, which would be captured anew.
            del plans[next(each for each in plans if each not in (self._graphs or ()))]
        return plan

    def _options_for(self, key: Key) -> Any:
        """A graph captured at other addresses is left behind until the session goes: the CUDA provider cannot let go of one."""
        if self._graphs is None or key not in self._graphs:
            return self._queued
        number, self._next_graph = self._next_graph, self._next_graph + 1
        return make_run_options({**ASYNCHRONOUS, GRAPH_ID: str(number)})

    def _bind_inputs(self, binding: Any, lane: Lane, layout: Layout, scratch: Layout) -> None:
        for name, place in layout.places.items():
            memory, ordinal, address = self._memory, lane.gpu.ordinal, lane.inputs.address(place)
            if name in scratch.places:
                place = scratch.places[name]
                address = lane.scratch.address(place)
            elif name in self._on_host:
                memory, ordinal, address = "cpu", 0, lane.inputs.array(place).ctypes.data
            binding.bind_input(name, memory, ordinal, _element_type(self._inputs[name]), place.shape, address)

    def _normalize(self, lane: Lane, layout: Layout, scratch: Layout) -> None:
        for name in filter(self._kernels.is_input, layout.places):
            place = layout.places[name]
            images, into = lane.inputs.address(place), lane.scratch.address(scratch.places[name])
            self._kernels.normalize(lane.streams.compute, name, place.shape, images, into)

    # -- places --------------------------------------------------------------------------------------------------------

    def _lay_out_scratch(self, layout: Layout, outputs: Mapping[str, tuple[int, ...]]) -> Layout:
        """What kernels write for the model, by its inputs' names, and what they read of it."""
        tensors = {
            name: self._kernels.normalized(name, layout.places[name].shape) for name in filter(self._kernels.is_input, layout.places)
        }
        for name in filter(self._kernels.is_output, outputs):
            tensors[_after(name)] = (outputs[name], self._outputs[name].datatype.dtype)
        return lay_out(tensors)

    def _lay_out_visible(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            tensors.update(self._visible_of(name, shape))
        return lay_out(tensors)

    def _places_of(self, visible: Layout, name: str, shape: tuple[int, ...]) -> dict[str, Place]:
        return {each: visible.places[each] for each in self._visible_of(name, shape)}

    def _visible_of(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return self._kernels.visible(name, (shape, self._outputs[name].datatype.dtype))

    def _learn(self, key: Key, shapes: dict[str, tuple[int, ...]]) -> None:
        self._learnt[key] = shapes
        while len(self._learnt) > KEPT_SHAPES:
            self._learnt.popitem(last=False)


def _after(output: str) -> str:
    """The name in scratch memory of an output that kernels read. No tensor of a model begins so."""
    return f"\0{output}"


def _element_type(spec: TensorSpec) -> Any:
    """As bindings take it: numpy's, or ONNX's number for the one that numpy has not."""
    return ONNX_BFLOAT16 if spec.datatype is DataType.BF16 else spec.datatype.dtype.type


def _is_shape_mismatch(text: str) -> bool:
    """The runtime's words for an output that does not come out in the bound shape, of now and of before 1.24."""
    return "computed output shape" in text or "shape verification failed" in text


__all__ = ["Key", "Runs"]
