"""ONNX models on an NVIDIA GPU through ONNX Runtime. One session an instance, two batches in flight.

How a batch passes: onnxruntime_runs.py; streams and lanes: cuda_lanes.py.

Rule for changing this file: as in onnxruntime.py, nothing of the runtime may outlive `close`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from headrace.backends.base import Array, ArtifactSignature, DeviceArray, Pending, PipelinedBackend
from headrace.backends.cuda import Gpu, device_error, device_ordinal, is_device_lost, open_device
from headrace.backends.cuda_lanes import Completion, Lane, Lanes, Layout
from headrace.backends.cuda_processing import DeviceProcessing, GpuBackend, load_kernels
from headrace.backends.onnxruntime import OnnxRuntimeBackend
from headrace.backends.onnxruntime_options import NO_CPU_FALLBACK, session_options
from headrace.backends.onnxruntime_providers import check_providers, explain, gpu_unavailable, load_libraries, make_providers
from headrace.backends.onnxruntime_runs import Key, Runs
from headrace.backends.onnxruntime_session import Provider, one_line
from headrace.config import InstanceConfig
from headrace.errors import BackendError, DeviceLost, HeadraceError, LoadError
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


class OnnxRuntimeCudaBackend(GpuBackend, OnnxRuntimeBackend):
    """Owns one session, the lanes, and what has been learnt of shapes. Models with strings or optional tensors run the way they do on
    the CPU, one batch at a time: the runtime binds neither."""

    works_on_the_caller = False
    _memory: ClassVar[str] = "cuda"
    """The runtime's name for where the slabs are."""

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self._gpu: Gpu | None = None
        self._lanes: Lanes | None = None
        self._runs: Runs | None = None
        self._inputs: frozenset[str] = frozenset()
        self._visible: list[str] = []
        self._on_host: frozenset[str] = frozenset()
        self._is_plain = False
        self._has_graphs = instance.options.get("cuda_graph") == "true"
        self._warmed: set[Key] = set()
        self._free_before = 0
        self._device_memory = 0

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
        kernels = DeviceProcessing(self._processing, load_kernels(self._processing, gpu.ordinal), signature.outputs)
        kernels.load(signature.inputs, signature.outputs)
        self._runs = Runs(self._session, signature, kernels, self.lanes, self._memory, self._on_host)
        if self._has_graphs:
            self._runs.allow_graphs()
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
        self._inputs = frozenset(spec.name for spec in signature.inputs)
        self._visible = self._processing.visible_outputs(self._output_names)
        self._on_host = self._read_on_host([spec.name for spec in signature.inputs])
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

    def _read_on_host(self, inputs: Sequence[str]) -> frozenset[str]:
        """Inputs that the model takes from host memory, such as a target shape. From the device it would fetch them first, and wait."""
        places = getattr(self._session, "get_input_memory_infos", None)
        if places is None:
            return frozenset()
        return frozenset(name for name, place in zip(inputs, places(), strict=True) if place.name == "Cpu")

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
            self._runs = self._gpu = None
            OnnxRuntimeBackend.close(self)
            if lanes is not None:
                lanes.close()

    # -- batches -------------------------------------------------------------------------------------------------------

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        lane = self._lanes.first if self._lanes is not None else None
        if self._is_plain or lane is None or self._runs is None or shapes.keys() != self._inputs:
            return {}  # beside inputs that are lent there would be room for these alone, and `launch` would move what is in it
        layout = self._runs.lay_out_inputs(shapes)
        try:
            lane.inputs.reserve(max(layout.size, 1))
        except Exception:  # too large, or no memory: `launch` meets the same and says it
            return {}
        return {name: lane.inputs.array(place) for name, place in layout.places.items()}

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        """Nothing but the warm-up comes here: shapes that it runs get graphs, in each lane."""
        names = self._visible if outputs is None else list(outputs)
        results = PipelinedBackend.execute(self, inputs, names)
        runs = self._runs
        if self._is_plain or runs is None or (key := runs.key(_shapes(inputs), names)) in self._warmed:
            return results
        self._warmed.add(key)
        runs.want_graph(key)
        for _ in range(self.lanes):
            results = PipelinedBackend.execute(self, inputs, names)
        self._measure()
        return results

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
        assert self._runs is not None
        lent, self._lent = self._lent, {}
        shapes = {**_shapes(inputs), **_shapes(lent)}
        layout = self._runs.lay_out_inputs(shapes)
        lane.inputs.reserve(max(layout.size, 1))
        self._fill(lane, layout, inputs, lent)
        visible, held = self._runs.run(lane, layout, self._runs.key(shapes, names))
        return Completion("onnxruntime", lanes, lane, [lane.outputs.array(visible.places[name]) for name in names], (held, lent))

    def _fill(self, lane: Lane, layout: Layout, inputs: Mapping[str, Array], lent: Mapping[str, DeviceArray]) -> None:
        """Put the inputs where the layout has them, on the device: what is lent is copied too, so that bindings and graphs hold."""
        end = 0
        for name, given in inputs.items():
            place = layout.places[name]
            end = max(end, place.offset + place.size)
            target = lane.inputs.array(place)
            if given is not target and given.ctypes.data != target.ctypes.data:
                target[...] = given
        places = {name: layout.places[name] for name in lent}
        lane.upload(end, [(lane.inputs.address(place), lent[name].pointer, place.size) for name, place in places.items()])
        for name in self._on_host.intersection(lent):
            lane.inputs.download_from(lent[name].pointer, places[name], lane.streams.upload)
            lane.streams.upload.sync()


def _shapes(tensors: Mapping[str, Array] | Mapping[str, DeviceArray]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


class _Finished(Pending):
    """A batch that was done when it was launched."""

    def __init__(self, arrays: list[Array]) -> None:
        self._arrays = arrays

    def wait(self) -> list[Array]:
        return self._arrays

    def release(self) -> None:
        self._arrays = []


__all__ = ["OnnxRuntimeCudaBackend"]
