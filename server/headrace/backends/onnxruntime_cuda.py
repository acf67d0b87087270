"""ONNX models on an NVIDIA GPU through ONNX Runtime. One session an instance, two batches in flight.

How a batch passes (streams and lanes: cuda_lanes.py): its inputs lie in the lane's pinned slab, are uploaded in one copy, and are bound to
the session by address. The first batch of some input shapes has its outputs bound by name: the runtime allocates them, and their shapes
are learnt. From then on they are bound by address in the lane's output slab, which is downloaded in one copy. A model whose output
shapes depend on more than its inputs' is found out by the runtime, which refuses the bound shape, and keeps the first way.

The runtime computes in our stream and waits for nothing (`disable_synchronize_execution_providers`); `done` of the lane tells the end.

CUDA graphs (`cuda_graph`): one for each lane and each set of shapes that the warm-up ran, since a graph has its addresses frozen. All are
of the one session, in the one stream, and are captured by the thread that replays them, as the runtime keeps graphs by thread. The
memory that a graph computes in is the arena's again after the capture; what is bound by name may then lie in it, and is therefore copied
out in the compute stream, before the next graph can run.

Rule for changing this file: as in onnxruntime.py, nothing of the runtime may outlive `close`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from headrace.backends.base import Array, ArtifactSignature, DeviceArray, Expected, Pending, PipelinedBackend
from headrace.backends.cuda import Gpu, device_error, device_ordinal, is_device_lost, open_device
from headrace.backends.cuda_lanes import Completion, Lane, Lanes, Layout, Place, lay_out
from headrace.backends.cuda_processing import DeviceProcessing, Tensor, can_run, load_kernels
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.backends.onnxruntime_options import NO_CPU_FALLBACK, make_run_options, session_options
from headrace.backends.onnxruntime_providers import check_providers, explain, gpu_unavailable, load_libraries, make_providers
from headrace.backends.onnxruntime_session import ONNX_BFLOAT16, Provider, one_line
from headrace.backends.processing import Processing
from headrace.config import InstanceConfig
from headrace.errors import BackendError, DeviceLost, HeadraceError, LoadError
from headrace.signature import DataType, TensorSpec
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

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


class OnnxRuntimeCudaBackend(PipelinedBackend, OnnxRuntimeBackend):
    """Owns one session, the lanes, and what has been learnt of shapes. Models with strings or optional tensors run the way they do on
    the CPU, one batch at a time: the runtime binds neither."""

    works_on_the_caller = False
    _memory: ClassVar[str] = "cuda"
    """The runtime's name for where the slabs are."""

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self._gpu: Gpu | None = None
        self._lanes: Lanes | None = None
        self._expected: Expected | None = None
        self._processing = Processing()
        self._kernels: DeviceProcessing | None = None
        self._inputs: dict[str, TensorSpec] = {}
        self._outputs: dict[str, TensorSpec] = {}
        self._visible: list[str] = []
        self._on_host: frozenset[str] = frozenset()
        self._is_plain = False
        self._has_graphs = instance.options.get("cuda_graph") == "true"
        self._lent: dict[str, DeviceArray] = {}
        self._free_before = 0
        self._device_memory = 0
        self._forget_shapes()

    def _forget_shapes(self) -> None:
        self._is_dynamic = False
        self._learnt: OrderedDict[Key, dict[str, tuple[int, ...]]] = OrderedDict()
        self._plans: list[OrderedDict[Key, _Plan]] = []
        self._graphs: set[Key] = set()
        self._next_graph = 1
        self._queued: Any = None

    # -- load and close ------------------------------------------------------------------------------------------------

    @property
    def accepts_device_inputs(self) -> bool:  # type: ignore[override]  # of an instance: what it takes is known once it is loaded
        return not self._is_plain

    @property
    def device(self) -> str:
        return f"cuda:{device_ordinal(self.instance.device)}"

    @property
    def device_memory(self) -> int:
        """Bytes of the device that loading and warming up took, of whichever instance did so at that time."""
        return self._device_memory

    def expect(self, expected: Expected) -> None:
        self._expected = expected

    def adopt(self, processing: Processing) -> bool:
        if self._expected is not None and not can_run(processing, self._expected.artifact):
            return False
        self._processing = processing
        return True

    def load(self) -> None:
        try:
            self._load()
            return
        except HeadraceError as error:
            failure: HeadraceError = error.with_traceback(None)
        except Exception as error:  # CUDA's and the runtime's have no common base
            failure = LoadError(f"device '{self.instance.device}': {one_line(error)}")
        raise DeviceLost(str(failure)) if is_device_lost(str(failure)) else failure

    def _load(self) -> None:
        self._gpu = gpu = self._open_device()
        gpu.make_current()
        before = gpu.memory()
        weights = sum(file.stat().st_size for file in self.path.parent.rglob("*") if file.is_file())
        if weights > before.free:
            raise LoadError(f"cuda:{gpu.ordinal} has {before.free} of {before.total} bytes free; the model's files alone have {weights}")
        self._free_before = before.free
        self._lanes = lanes = Lanes(gpu, self.lanes)
        options = session_options(self.instance)
        if self.instance.options.get(NO_CPU_FALLBACK) == "true":
            options.add_session_config_entry(NO_CPU_FALLBACK, "1")
        providers = self._make_providers(gpu.ordinal, int(lanes.streams.compute.handle))
        signature = self._open_on_gpu(options, providers)
        self._describe(signature)
        self._kernels = DeviceProcessing(self._processing, load_kernels(self._processing, gpu.ordinal), signature.outputs)
        self._kernels.load(signature.inputs, signature.outputs)
        self._plans = [OrderedDict() for _ in lanes.all]
        # Without an id, the runtime would capture each run, under one id for all shapes.
        self._queued = make_run_options({**ASYNCHRONOUS, **({GRAPH_ID: NO_GRAPH} if self._has_graphs else {})})
        self._measure()
        log.info(
            "device memory taken",
            model=self.path.parent.parent.name,
            device=f"cuda:{gpu.ordinal}",
            bytes=self._device_memory,
            provider=self._session.get_providers()[0],
        )

    def _open_on_gpu(self, options: Any, providers: list[Provider]) -> ArtifactSignature:
        try:
            signature = self._open(options, providers)
            check_providers(self._session, providers)
            return signature
        except LoadError as error:
            failure = explain(error.with_traceback(None), providers)
        raise failure

    def _open_device(self) -> Gpu:
        if reason := gpu_unavailable():
            raise LoadError(f"device '{self.instance.device}': {reason}")
        load_libraries()
        return open_device(self.instance.device)

    def _make_providers(self, ordinal: int, stream: int) -> list[Provider]:
        return make_providers(self.instance, ordinal, stream)

    def _describe(self, signature: ArtifactSignature) -> None:
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self._outputs = {spec.name: spec for spec in signature.outputs}
        self._visible = self._processing.visible_outputs(self._output_names)
        self._on_host = self._read_on_host()
        tensors = [*signature.inputs, *signature.outputs]
        self._is_plain = any(spec.optional or not spec.datatype.itemsize for spec in tensors)
        if self._is_plain and not self._processing.is_empty:
            raise LoadError("[preprocess] and [postprocess] on a GPU: not of models with BYTES or optional tensors; use device 'cpu'")
        if self._has_graphs and self._is_plain:
            raise LoadError("onnxruntime option 'cuda_graph': not for models with BYTES or optional tensors; leave it out for this model")
        if self._has_graphs and self._on_host:
            raise LoadError(
                f"onnxruntime option 'cuda_graph': input '{min(self._on_host)}' is read on the host while the graph is made, and would "
                "keep its first value; leave it out for this model"
            )

    def _read_on_host(self) -> frozenset[str]:
        """Inputs that the model takes from host memory, such as a target shape. From the device it would fetch them first, and wait."""
        places = getattr(self._session, "get_input_memory_infos", None)
        if places is None:
            return frozenset()
        return frozenset(name for name, place in zip(self._inputs, places(), strict=True) if place.name == "Cpu")

    def _measure(self) -> None:
        assert self._gpu is not None
        self._device_memory = max(self._device_memory, self._free_before - self._gpu.memory().free)

    def shrink(self, inputs: Mapping[str, Array]) -> None:
        """Nothing is given back: what the largest batch needed the next large one needs, and graphs compute in it."""

    def close(self) -> None:
        lanes, self._lanes = self._lanes, None
        try:
            if lanes is not None and self._gpu is not None:
                self._gpu.make_current()
                lanes.streams.sync()
        finally:
            # Bindings before the session, the session before the stream in which it computes.
            self._forget_shapes()
            self._kernels = self._gpu = None
            OnnxRuntimeBackend.close(self)
            if lanes is not None:
                lanes.close()

    # -- batches -------------------------------------------------------------------------------------------------------

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        lane = self._lanes.first if self._lanes is not None else None
        if self._is_plain or lane is None or not shapes.keys() <= self._inputs.keys():
            return {}
        layout = self._lay_out_inputs(shapes)
        try:
            lane.inputs.reserve(max(layout.size, 1))
        except Exception:  # too large, or no memory: `launch` meets the same and says it
            return {}
        return {name: lane.inputs.array(place) for name, place in layout.places.items()}

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        """Nothing but the warm-up comes here: shapes that it runs get graphs, in each lane."""
        names = self._visible if outputs is None else list(outputs)
        if self._is_plain or self._lent or (key := self._key(_shapes(inputs), names)) in self._learnt:
            return PipelinedBackend.execute(self, inputs, names)
        results = PipelinedBackend.execute(self, inputs, names)
        if self._has_graphs and len(self._graphs) < MAX_GRAPHS:
            self._graphs.add(key)
        for _ in range(self.lanes):
            results = PipelinedBackend.execute(self, inputs, names)
        self._measure()
        return results

    def lend(self, inputs: Mapping[str, DeviceArray]) -> None:
        self._lent = dict(inputs)

    def launch(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Pending:
        names = self._visible if outputs is None else list(outputs)
        if self._is_plain:
            return self._run_plainly(inputs, names)
        assert self._lanes is not None, "load() comes before launch()"
        lane = self._lanes.take()
        try:
            return self._launch(self._lanes, lane, inputs, names)
        except HeadraceError as error:
            failure = error.with_traceback(None)
        except Exception as error:  # CUDA's and the runtime's have no common base
            failure = device_error("onnxruntime", error)
        self._lanes.give_back_failed(lane)
        raise failure

    def _run_plainly(self, inputs: Mapping[str, Array], names: Sequence[str]) -> Pending:
        try:
            return _Finished(OnnxRuntimeBackend.execute(self, inputs, names))
        except BackendError as error:
            text = str(error)
        raise DeviceLost(text) if is_device_lost(text) else BackendError(text)

    def _launch(self, lanes: Lanes, lane: Lane, inputs: Mapping[str, Array], names: list[str]) -> Pending:
        lent, self._lent = self._lent, {}
        shapes = {**_shapes(inputs), **_shapes(lent)}
        layout = self._lay_out_inputs(shapes)
        lane.inputs.reserve(max(layout.size, 1))
        self._fill(lane, layout, inputs, lent)
        key = self._key(shapes, names)
        if not self._is_dynamic and key in self._learnt:
            try:
                visible = self._run_bound(lane, layout, key)
            except Exception as error:  # the runtime's, which say by their text alone what went wrong
                if not _is_shape_mismatch(one_line(error)):
                    raise
                self._is_dynamic = True
            else:
                lane.download(visible.size)
                return Completion("onnxruntime", lanes, lane, [lane.outputs.array(visible.places[name]) for name in names], lent)
        if self._is_dynamic and self._has_graphs:
            raise BackendError(
                "onnxruntime option 'cuda_graph': the model's output shapes depend on its values; leave it out for this model"
            )
        visible, held = self._run_by_name(lane, layout, key)
        lane.download(0)
        return Completion("onnxruntime", lanes, lane, [lane.outputs.array(visible.places[name]) for name in names], (held, lent))

    def _fill(self, lane: Lane, layout: Layout, inputs: Mapping[str, Array], lent: Mapping[str, DeviceArray]) -> None:
        """Put the inputs where the layout has them, on the device: what is lent is copied too, so that bindings and graphs hold."""
        copies, end = [], 0
        for name, place in layout.places.items():
            if name in lent:
                copies.append((lane.inputs.address(place), lent[name].pointer, place.size))
                continue
            end = place.offset + place.size
            target, given = lane.inputs.array(place), inputs[name]
            if given is not target and given.ctypes.data != target.ctypes.data:
                target[...] = given
        lane.upload(end, copies)
        for name in self._on_host.intersection(lent):
            lane.inputs.download_from(lent[name].pointer, layout.places[name], lane.streams.upload)
            lane.streams.upload.sync()

    # -- runs ----------------------------------------------------------------------------------------------------------

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
        assert self._kernels is not None
        stream = lane.streams.compute
        if not self._kernels.is_output(name):
            lane.outputs.download_from(address, places[name], stream)
            return
        self._kernels.finish(stream, name, shape, address, {each: lane.outputs.address(place) for each, place in places.items()})
        for place in places.values():
            lane.outputs.download_from(lane.outputs.address(place), place, stream)

    def _run_bound(self, lane: Lane, layout: Layout, key: Key) -> Layout:
        """All at addresses of the lane. Returns where clients' tensors are on the device."""
        assert self._kernels is not None
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
            del plans[next(each for each in plans if each not in self._graphs)]
        return plan

    def _options_for(self, key: Key) -> Any:
        """A graph captured at other addresses is left behind until the session goes: the CUDA provider cannot let go of one."""
        if key not in self._graphs:
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
        assert self._kernels is not None
        for name in filter(self._kernels.is_input, layout.places):
            place = layout.places[name]
            images, into = lane.inputs.address(place), lane.scratch.address(scratch.places[name])
            self._kernels.normalize(lane.streams.compute, name, place.shape, images, into)

    # -- places --------------------------------------------------------------------------------------------------------

    def _lay_out_inputs(self, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """In the signature's order, so that equal shapes are at equal places."""
        assert self._kernels is not None
        given = self._kernels.given
        return lay_out({name: (shapes[name], given(spec)) for name, spec in self._inputs.items() if name in shapes})

    def _lay_out_scratch(self, layout: Layout, outputs: Mapping[str, tuple[int, ...]]) -> Layout:
        """What kernels write for the model, by its inputs' names, and what they read of it."""
        assert self._kernels is not None
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
        assert self._kernels is not None
        return self._kernels.visible(name, (shape, self._outputs[name].datatype.dtype))

    def _key(self, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]) -> Key:
        assert self._kernels is not None
        return tuple((name, shapes[name]) for name in self._inputs if name in shapes), tuple(self._kernels.needed(names))

    def _learn(self, key: Key, shapes: dict[str, tuple[int, ...]]) -> None:
        self._learnt[key] = shapes
        while len(self._learnt) > KEPT_SHAPES:
            self._learnt.popitem(last=False)


def _shapes(tensors: Mapping[str, Array] | Mapping[str, DeviceArray]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _after(output: str) -> str:
    """The name in scratch memory of an output that kernels read. No tensor of a model begins so."""
    return f"\0{output}"


def _element_type(spec: TensorSpec) -> Any:
    """As bindings take it: numpy's, or ONNX's number for the one that numpy has not."""
    return ONNX_BFLOAT16 if spec.datatype is DataType.BF16 else spec.datatype.dtype.type


def _is_shape_mismatch(text: str) -> bool:
    """The runtime's words for an output that does not come out in the bound shape, of now and of before 1.24."""
    return "computed output shape" in text or "shape verification failed" in text


class _Finished(Pending):
    """A batch that was done when it was launched."""

    def __init__(self, arrays: list[Array]) -> None:
        self._arrays = arrays

    def wait(self) -> list[Array]:
        return self._arrays

    def release(self) -> None:
        self._arrays = []


__all__ = ["OnnxRuntimeCudaBackend"]
