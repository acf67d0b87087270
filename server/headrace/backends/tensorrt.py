"""TensorRT 10.1 and later: engines (model.plan), and ONNX models of which engines are built.

What has run: all of it but TensorRT itself. The names used were held against the bindings of 10.1, 10.13 and 11.4, the lean runtime 11.4
was loaded, and refuses to start without a GPU as it does here in the tests. No engine has been built, loaded, refitted or executed by
this code, and no CUDA graph captured: tests/gpu/test_tensorrt.py and loadtests/gpu_tensorrt.py are for the first machine that can.

Input-consumed events are not used: each lane has input memory of its own, which nobody waits for before the batch is done.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headrace.backends.base import Array, ArtifactSignature, DeviceArray, DeviceSpace, Pending
from headrace.backends.cuda import CudaError, Gpu, device_count, device_error, open_device
from headrace.backends.cuda_lanes import Completion, Lane, Lanes, Layout, Place
from headrace.backends.cuda_processing import DeviceProcessing, GpuBackend, load_kernels
from headrace.backends.onnx_graph import graph_digest
from headrace.backends.onnxruntime_options import inspection_options
from headrace.backends.onnxruntime_session import open_session, signature_of
from headrace.backends.tensorrt_api import Library, find_library
from headrace.backends.tensorrt_engine import Bound, Engine, LaneContexts
from headrace.backends.tensorrt_fit import check_covered, check_same, expect_nothing, graph_sizes, inputs_of
from headrace.backends.tensorrt_options import Options, parse_options
from headrace.backends.tensorrt_plans import ModelPlans, read_plan
from headrace.backends.tensorrt_wiring import Wiring, lay_out_inputs, model_shapes, wire
from headrace.config import InstanceConfig
from headrace.errors import BackendError, DeviceLost, HeadraceError, LoadError
from headrace.signature import Shape
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

_FIXED_MEMORY = 600 << 20
"""Bytes, not measured here: what a process's first CUDA context and TensorRT's libraries are said to take."""
_MEMORY_PER_FILE_BYTE = 2
"""Not measured here: a plan or model as it is read, and its weights. Activations come with the batches."""
_WIRINGS = 64
"""Batch shapes of which one lane remembers where everything lies."""


class TensorRtBackend(GpuBackend):
    """Owns an engine, and for each lane its contexts and graphs."""

    name = "tensorrt"
    default_filename = "model.plan"
    platform = "tensorrt_plan"
    accepts_device_inputs = True

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self._place = f"{path.parent.name}/{path.name}"
        self._cancelled = threading.Event()
        self._plans: ModelPlans | None = None
        self._device_processing = DeviceProcessing(self._processing, None, ())
        self._free_before = self._device_memory = 0
        self._warmed: set[tuple[tuple[str, Shape], ...]] = set()
        self._gpu: Gpu | None = None
        self._engine: Engine | None = None
        self._lanes: Lanes | None = None
        self._scratch = 0
        self._contexts: list[LaneContexts] = []
        self._wirings: list[dict[tuple[tuple[str, Shape], ...], Wiring]] = []
        self._artifact = ArtifactSignature((), ())
        self._visible: list[str] = []
        self._uses_graphs = True

    def __repr__(self) -> str:
        return f"TensorRtBackend({self._place}, {self._engine or 'not loaded'})"

    # -- before it is loaded

    @classmethod
    def check_trusted(cls, path: Path, instance: InstanceConfig, *, is_signed: bool) -> None:
        if is_onnx(path) or is_signed or parse_options(instance.options).trust_plans:
            return
        if not path.is_file():
            raise LoadError(f"expected {path.parent.name}/{path.name}, found no such file; 'filename' in model.toml sets another name")
        raise LoadError(
            f"{path.parent.name}/{path.name}: a plan is code to TensorRT, and nobody has vouched for this one: expected a version whose "
            'signature is verified (signature_policy and signature_key in model.toml), or trust_plans = "true" under '
            "[instances.options], or the ONNX model itself"
        )

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        """A plan is loaded onto the first GPU for it; nothing else can read one. `check_trusted` comes before. An ONNX file is read by ONNX
        Runtime, without TensorRT."""
        if is_onnx(path):
            return signature_of(path, open_session(path, inspection_options(), ["CPUExecutionProvider"]))
        place = f"{path.parent.name}/{path.name}"
        with read_plan(path) as plan:
            library = find_library()
            _open_to_read(place).make_current()
            engine = Engine(library, plan, place, allow_host_code=True)
        signature = engine.signature
        engine.close()
        return signature

    @classmethod
    def graph_digest(cls, path: Path) -> str:
        return graph_digest(path) if is_onnx(path) else ""

    @classmethod
    def estimate_memory(cls, path: Path) -> int:
        files = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        return _FIXED_MEMORY + _MEMORY_PER_FILE_BYTE * files

    @classmethod
    def devices(cls, device: str) -> Sequence[DeviceSpace]:
        """All that this process sees for 'auto' and 'cuda'."""
        gpu = open_device(_gpu_name(device))
        return [_space(ordinal) for ordinal in (range(device_count()) if device in ("auto", "cuda") else (gpu.ordinal,))]

    @property
    def device(self) -> str:
        return f"cuda:{self._gpu.ordinal}" if self._gpu is not None else _gpu_name(self.instance.device)

    def interrupt(self) -> None:
        self._cancelled.set()
        plans = self._plans
        if plans is not None:
            plans.cancel()

    # -- loading

    def load(self) -> None:
        options = parse_options(self.instance.options)
        library = find_library()
        gpu = open_device(_gpu_name(self.instance.device))
        try:
            gpu.make_current()
            self._gpu = gpu
            self._free_before = gpu.memory().free
            self._engine = self._load_engine(library, gpu, options)
            self._prepare(self._engine, gpu, options)
            self._measure()
            return
        except DeviceLost as error:
            failure: HeadraceError = error.with_traceback(None)
        except BackendError as error:
            failure = LoadError(str(error))
        except HeadraceError as error:
            failure = error.with_traceback(None)
        except Exception as error:  # CUDA's errors have no common base with ours
            found = device_error(self._place, error)
            failure = found if isinstance(found, DeviceLost) else LoadError(str(found))
        raise failure

    def _load_engine(self, library: Library, gpu: Gpu, options: Options) -> Engine:
        is_signed = self._expected is not None and self._expected.is_signed
        self.check_trusted(self.path, self.instance, is_signed=is_signed)
        expected = self._expected or expect_nothing(self.inspect(self.path))
        if is_onnx(self.path):
            self._plans = ModelPlans(self.path, library, gpu, options, self._cancelled)
            engine = self._plans.load(inputs_of(expected, self._processing), expected.signature.max_batch_size, expected.allowed)
        else:
            with read_plan(self.path) as plan:
                engine = Engine(library, plan, self._place, allow_host_code=True)
        check_same(self._place, expected.artifact, engine.signature)
        check_covered(engine, expected)
        return engine

    def _prepare(self, engine: Engine, gpu: Gpu, options: Options) -> None:
        self._artifact = engine.signature
        self._visible = self._processing.visible_outputs([spec.name for spec in engine.signature.outputs])
        kernels = load_kernels(self._processing, gpu.ordinal)
        self._device_processing = DeviceProcessing(self._processing, kernels, engine.signature.outputs)
        self._uses_graphs = options.cuda_graphs
        self._lanes = lanes = Lanes(gpu, self.lanes)
        if engine.scratch_bytes:
            self._scratch = gpu.allocate(engine.scratch_bytes)
        stream = lanes.streams.compute
        self._contexts = [LaneContexts(engine, stream, self._scratch, self._is_worth_a_graph) for _ in lanes.all]
        self._wirings = [{} for _ in lanes.all]

    def _is_worth_a_graph(self, shapes: Mapping[str, Shape]) -> bool:
        """Of the batch sizes that come often; of models that are not batched, the first shapes that come."""
        if not self._uses_graphs:
            return False
        expected = self._expected
        if expected is None or not expected.signature.max_batch_size:
            return True
        sizes = graph_sizes(expected)
        return all(bool(shape) and shape[0] in sizes for shape in shapes.values())

    # -- batches

    def warm(self, inputs: Mapping[str, Array]) -> None:
        """In every lane twice, the first time it sees these shapes: graphs are captured of what has run."""
        key = tuple((name, array.shape) for name, array in inputs.items())
        for _ in range(1 if key in self._warmed else 2 * self.lanes + 1):
            self.execute(inputs, None)
        self._warmed.add(key)
        self._measure()

    def stage(self, shapes: Mapping[str, Shape]) -> Mapping[str, Array]:
        lane = self._lanes.first if self._lanes is not None else None
        if lane is None or set(shapes) != {spec.name for spec in self._artifact.inputs}:
            return {}
        layout = lay_out_inputs(shapes, self._artifact, self._device_processing)
        try:
            lane.gpu.make_current()
            lane.inputs.reserve(layout.size)
        except (BackendError, CudaError):
            return {}  # `launch` says what is wrong with it
        return {name: lane.inputs.array(place) for name, place in layout.places.items()}

    def launch(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Pending:
        assert self._lanes is not None, "load() comes before launch()"
        lent, self._lent = self._lent, {}
        lane = self._lanes.take()
        try:
            lane.gpu.make_current()
            arrays = self._queue(lane, inputs, lent, outputs)
        except BackendError as error:
            failure = error.with_traceback(None)
        except Exception as error:  # CUDA's errors have no common base with ours
            failure = device_error(self._place, error)
        else:
            return Completion(self._place, self._lanes, lane, arrays, lent)
        self._lanes.give_back_failed(lane)
        raise failure

    def _queue(
        self, lane: Lane, inputs: Mapping[str, Array], lent: Mapping[str, DeviceArray], outputs: Sequence[str] | None
    ) -> list[Array]:
        """Everything up to the event. Returns views of where the outputs will be."""
        given = {spec.name: (lent[spec.name] if spec.name in lent else inputs[spec.name]).shape for spec in self._artifact.inputs}
        bound = self._contexts[lane.index].bind(model_shapes(given, self._device_processing))
        wiring = self._wire(bound, lane, given)
        bound.set_wiring(wiring)
        _fill(lane, wiring.inputs, inputs, lent)
        bound.run(lane.streams.compute)
        lane.download(wiring.outputs.size)
        places = {name: self._final_place(bound, name, place) for name, place in wiring.outputs.places.items()}
        return [lane.outputs.array(places[name]) for name in (self._visible if outputs is None else outputs)]

    def _wire(self, bound: Bound, lane: Lane, given: Mapping[str, Shape]) -> Wiring:
        """As it was for such a batch, unless the lane's memory has moved since. Where data decides shapes, the room is the context's."""
        key = tuple(given.items())
        known = self._wirings[lane.index]
        wiring = known.get(key)
        if wiring is None or wiring.generation != lane.generation or bound.dynamic:
            wiring = wire(bound, lane, given, self._artifact, self._device_processing)
            if len(known) >= _WIRINGS:
                known.clear()
            known[key] = wiring
        return wiring

    def _final_place(self, bound: Bound, name: str, place: Place) -> Place:
        if name not in bound.dynamic:
            return place
        datatype = next(spec.datatype for spec in self._artifact.outputs if spec.name == name)
        return Place(place.offset, bound.dynamic_shape(name), datatype.dtype)

    @property
    def device_memory(self) -> int:
        return self._device_memory

    def _measure(self) -> None:
        """What became less on the device, whoever took it."""
        if self._gpu is not None:
            self._device_memory = max(self._free_before - self._gpu.memory().free, 0)

    def close(self) -> None:
        """Contexts before the memory that they work in, the engine last. What a lost device refuses to take back is gone anyway."""
        contexts, self._contexts, self._wirings = self._contexts, [], []
        lanes, self._lanes = self._lanes, None
        engine, self._engine = self._engine, None
        scratch, self._scratch = self._scratch, 0
        gpu, self._gpu, self._plans = self._gpu, None, None
        if gpu is None:
            return
        try:
            gpu.make_current()
            if lanes is not None:
                lanes.streams.sync()
            for each in contexts:
                each.close()
            if lanes is not None:
                lanes.close()
            if scratch:
                gpu.free(scratch)
        except Exception as error:
            log.warning("device memory not given back", model=self._place, reason=str(error))
        if engine is not None:
            engine.close()


def is_onnx(path: Path) -> bool:
    return path.suffix == ".onnx"


def _gpu_name(device: str) -> str:
    """This backend runs on nothing else. Raises LoadError."""
    if device == "cpu":
        raise LoadError("device 'cpu': TensorRT runs on NVIDIA GPUs alone; expected 'auto', 'cuda' or 'cuda:N'")
    return "cuda" if device == "auto" else device


def _open_to_read(place: str) -> Gpu:
    try:
        return open_device("cuda")
    except LoadError as error:
        reason = str(error)
    raise LoadError(f"{place}: a plan can be read on a GPU of the kind that it was built for, and nowhere else: {reason}")


def _space(ordinal: int) -> DeviceSpace:
    gpu = Gpu(ordinal)
    gpu.make_current()
    return DeviceSpace(f"cuda:{ordinal}", gpu.memory().free)


def _fill(lane: Lane, layout: Layout, inputs: Mapping[str, Array], lent: Mapping[str, DeviceArray]) -> None:
    """Queue the upload of all inputs, but of those lent a copy on the device: graphs hold the lane's addresses."""
    copies, end = [], 0
    for name, place in layout.places.items():
        if name in lent:
            copies.append((lane.inputs.address(place), lent[name].pointer, place.size))
            continue
        end = place.offset + place.size
        source, target = inputs[name], lane.inputs.array(place)
        if source.__array_interface__["data"][0] != target.__array_interface__["data"][0]:  # not gathered into what `stage` gave
            np.copyto(target, source)
    lane.upload(end, copies)
