"""A TensorRT engine and its execution contexts.

A context has its shapes, its profile and its addresses in it, so that one belongs to a lane, and within the lane to a shape that is worth
a CUDA graph: a graph is captured of a context that has run once, and holds only as long as neither its shapes nor its addresses change.
Other shapes share one context a profile, without graphs. All contexts of an instance work in one block of scratch memory, since they run
on one stream and so never at once.

Rule for changing this file: every call that tells its failure by False or None is checked, and the reason is what TensorRT has logged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from headrace.backends.base import ArtifactSignature
from headrace.backends.cuda import is_device_lost
from headrace.backends.tensorrt_api import DATATYPES, Dims, ICudaEngine, IExecutionContext, Library
from headrace.backends.tensorrt_profiles import Profile, ShapeRange, choose_profile
from headrace.errors import BackendError, DeviceLost, LoadError
from headrace.signature import Shape, TensorSpec, format_shape
from headrace.telemetry.log import get_logger

if TYPE_CHECKING:
    from cuda.core import Stream
    from cuda.core.graph import Graph, GraphBuilder
    from typing_extensions import Buffer


log = get_logger(__name__)

GRAPHS = 16
"""Contexts with a graph that one lane may have; a server that restricts batch sizes has fewer sizes than that."""
LINEAR = "LINEAR"
"""The one layout of tensors that clients send: the last dimension's elements one behind the other."""
Step = Callable[[Any], None]
"""Queues work around the model, on a stream or into a graph: cuda.core's Stream or GraphBuilder."""


def run_error(library: Library, subject: str, fallback: str) -> BackendError:
    """What to raise for a call that failed while batches run."""
    reason = f"{subject}: {library.take_errors() or fallback}"
    return DeviceLost(reason) if is_device_lost(reason) else BackendError(reason)


# -- the engine --------------------------------------------------------------------------------------------------------


class Engine:
    """Owns a runtime and what it deserialised. Made on a thread whose current device it is for."""

    def __init__(self, library: Library, plan: Buffer, place: str, *, allow_host_code: bool) -> None:
        """Raises LoadError. `allow_host_code`: of version-compatible plans, which bring the code along that runs them."""
        self.library = library
        self.place = place
        library.register_plugins()
        self._runtime = library.make("Runtime")
        self._runtime.engine_host_code_allowed = allow_host_code
        engine: ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            reason = library.take_errors() or "no reason given"
            raise LoadError(f"{library.name} {library.version} could not load {place}: {reason}{_hint(reason)}")
        self.engine = engine
        self.signature = self._read_signature(engine)
        self.profiles = self._read_profiles(engine)

    def __repr__(self) -> str:
        return f"Engine({self.place}, {len(self.profiles)} profiles)"

    @property
    def scratch_bytes(self) -> int:
        return self.engine.device_memory_size_v2

    def create_context(self, profile: int, stream: Stream, scratch: int) -> IExecutionContext:
        """For one of the profiles, working in the scratch memory at that address. Raises BackendError."""
        strategy = self.library.member("ExecutionContextAllocationStrategy", "USER_MANAGED")
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise run_error(self.library, self.place, "no execution context")
        if scratch:
            context.set_device_memory(scratch, self.scratch_bytes)
        if not context.set_optimization_profile_async(profile, int(stream.handle)):
            raise run_error(self.library, self.place, f"profile {profile} refused")
        return context

    def close(self) -> None:
        """The engine before the runtime it came from. Contexts must be gone."""
        del self.engine
        del self._runtime

    def _read_signature(self, engine: ICudaEngine) -> ArtifactSignature:
        specs: dict[str, list[TensorSpec]] = {"INPUT": [], "OUTPUT": []}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_mode(name).name
            if engine.get_tensor_location(name).name != "DEVICE":
                raise LoadError(f"{self.place}: {kind.lower()} '{name}' is wanted in host memory, as a shape; that is not supported")
            for profile in range(engine.num_optimization_profiles):
                if (layout := _layout(engine, name, profile)) != LINEAR:
                    raise LoadError(f"{self.place}: {kind.lower()} '{name}' is laid out as {layout}; expected {LINEAR}, row after row")
            datatype = DATATYPES.get(engine.get_tensor_dtype(name).name)
            if datatype is None:
                raise LoadError(
                    f"{self.place}: {kind.lower()} '{name}' is {engine.get_tensor_dtype(name).name}, which the protocol cannot carry; "
                    f"expected one of {', '.join(DATATYPES)}"
                )
            specs[kind].append(TensorSpec(name, datatype, tuple(engine.get_tensor_shape(name))))
        return ArtifactSignature(tuple(specs["INPUT"]), tuple(specs["OUTPUT"]))

    def _read_profiles(self, engine: ICudaEngine) -> tuple[Profile, ...]:
        names = [spec.name for spec in self.signature.inputs]
        return tuple(
            Profile({name: _shape_range(engine.get_tensor_profile_shape(name, index)) for name in names})
            for index in range(engine.num_optimization_profiles)
        )


def _layout(engine: ICudaEngine, name: str, profile: int) -> str:
    try:
        return engine.get_tensor_format(name, profile).name
    except TypeError:  # the lean and dispatch builds' bindings do not have the type that it returns
        words = engine.get_tensor_format_desc(name, profile)
    return words if "channel" in words.lower() else LINEAR


def _shape_range(shapes: Sequence[Dims]) -> ShapeRange:
    minimum, optimum, maximum = (tuple(shape) for shape in shapes)
    return ShapeRange(minimum, optimum, maximum)


def _hint(reason: str) -> str:
    """1. Plans are of one version of TensorRT. 2. And of one kind of device. 3. Unless made otherwise, which takes code along."""
    if "version" in reason.lower() or "magic tag" in reason.lower():
        return ". A plan runs under the version of TensorRT that built it alone, unless built with VERSION_COMPATIBLE"
    if "compute" in reason.lower():
        return ". A plan runs on the kind of GPU that it was built on, unless built with a hardware compatibility level"
    return ""


# -- contexts ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class DynamicOutput:
    """An output whose shape only the data decides. It has room for the largest; TensorRT tells the shape by `allocator`."""

    size: int
    allocator: Any


class Wired(Protocol):
    """Addresses of all inputs and outputs, and what is queued around the model."""

    @property
    def addresses(self) -> Mapping[str, int]: ...
    @property
    def before(self) -> Sequence[Step]: ...
    @property
    def after(self) -> Sequence[Step]: ...


@dataclass
class Bound:
    """One execution context with the shapes that it has now. Owns its graph.

    `outputs`: shapes, without those in `dynamic`. `wiring`: what its addresses were last taken from, and its graph captured with.
    """

    engine: Engine
    context: IExecutionContext
    may_capture: bool
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    dynamic: dict[str, DynamicOutput] = field(default_factory=dict)
    wiring: Wired | None = None
    graph: Graph | None = None
    has_run: bool = False

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Raises BackendError for shapes that the model cannot have."""
        if shapes == self.shapes:
            return
        self.drop_graph()
        self.has_run, self.wiring, self.shapes = False, None, {}
        library, context = self.engine.library, self.context
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise run_error(library, f"input '{name}' of {self.engine.place}", f"shape {format_shape(shape)} refused")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            missing = [str(error)]
        if missing:
            raise run_error(library, self.engine.place, f"shapes not known: {', '.join(missing)}")
        self._read_outputs()
        self.shapes = dict(shapes)

    def _read_outputs(self) -> None:
        self.outputs, self.dynamic = {}, {}
        for spec in self.engine.signature.outputs:
            shape = tuple(self.context.get_tensor_shape(spec.name))
            if -1 not in shape:
                self.outputs[spec.name] = shape
                continue
            self.may_capture = False
            size = self.context.get_max_output_size(spec.name)
            if size < 0:
                raise run_error(self.engine.library, f"output '{spec.name}' of {self.engine.place}", "its largest size is not known")
            self.dynamic[spec.name] = DynamicOutput(size, _allocator_class(self.engine.library)(size))
            if not self.context.set_output_allocator(spec.name, self.dynamic[spec.name].allocator):
                raise run_error(self.engine.library, f"output '{spec.name}' of {self.engine.place}", "allocator refused")

    def set_wiring(self, wiring: Wired) -> None:
        """A graph holds the addresses of the steps around the model too, hence by identity."""
        if wiring is self.wiring:
            return
        self.drop_graph()
        self.wiring = None
        for name, address in wiring.addresses.items():
            if name in self.dynamic:
                self.dynamic[name].allocator.address = address
            elif not self.context.set_tensor_address(name, address):
                raise run_error(self.engine.library, f"tensor '{name}' of {self.engine.place}", "address refused")
        self.wiring = wiring

    def run(self, stream: Stream) -> None:
        """Queue the model and the steps around it. 1. As a graph that is there. 2. As one that is made now, of what has run before.
        3. One by one."""
        assert self.wiring is not None, "set_wiring() comes before run()"
        if self.graph is None and self.may_capture and self.has_run:
            self.graph = self._capture(self.wiring)
        if self.graph is not None:
            self.graph.launch(stream)
            return
        for dynamic in self.dynamic.values():
            dynamic.allocator.shape = None
        self._queue(stream, stream, self.wiring)
        self.has_run = True

    def dynamic_shape(self, name: str) -> Shape:
        """Of the last run, which has told it when it was queued."""
        shape: Shape | None = self.dynamic[name].allocator.shape
        if shape is None:
            raise BackendError(f"output '{name}' of {self.engine.place}: TensorRT did not tell its shape")
        return shape

    def _queue(self, queue: Stream | GraphBuilder, stream: Stream, wiring: Wired) -> None:
        for step in wiring.before:
            step(queue)
        if not self.context.execute_async_v3(int(stream.handle)):
            raise run_error(self.engine.library, self.engine.place, "execution refused")
        for step in wiring.after:
            step(queue)

    def _capture(self, wiring: Wired) -> Graph | None:
        """None where the model does what no graph can hold; it then runs without one for good."""
        builder = create_graph_builder()
        try:
            builder.begin_building(mode="thread_local")
            self._queue(builder, builder.stream, wiring)
            return builder.end_building().complete()
        except Exception as error:  # CUDA's errors have no common base with ours
            reason = str(error)
            if is_device_lost(reason):
                raise
        finally:
            with contextlib.suppress(Exception):  # it ends a capture that was spoilt, and says again that it was
                builder.close()
        self.may_capture = False
        log.info("cuda graph not captured", model=self.engine.place, reason=reason, next="it runs without")
        return None

    def drop_graph(self) -> None:
        """Nothing of it may be in flight."""
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.close()


def create_graph_builder() -> GraphBuilder:
    """On the calling thread's device, with a stream of its own: what runs meanwhile goes on."""
    from cuda.core import Device

    return Device().create_graph_builder()


def _allocator_class(library: Library) -> Callable[[int], Any]:
    class _FixedRoom(library.module.IOutputAllocator):  # type: ignore[misc,name-defined]  # not there when types are checked
        """Room for the largest output that a shape allows, at `address`; `shape`: what it was at last."""

        def __init__(self, size: int) -> None:
            library.module.IOutputAllocator.__init__(self)
            self.size = size
            self.address = 0
            self.shape: Shape | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.address if size <= self.size else 0

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.address if size <= self.size else 0

        def notify_shape(self, tensor_name: str, shape: Dims) -> None:
            self.shape = tuple(shape)

    return _FixedRoom


class LaneContexts:
    """The contexts of one lane. Owns them."""

    def __init__(self, engine: Engine, stream: Stream, scratch: int, worth_graphs: Callable[[Mapping[str, Shape]], bool]) -> None:
        self._engine = engine
        self._stream = stream
        self._scratch = scratch
        self._worth_graphs = worth_graphs
        self._with_graphs: dict[tuple[tuple[str, Shape], ...], Bound] = {}
        self._by_profile: dict[int, Bound] = {}

    def __repr__(self) -> str:
        return f"LaneContexts({len(self._with_graphs)} with graphs, {len(self._by_profile)} without)"

    def bind(self, shapes: Mapping[str, Shape]) -> Bound:
        """A context with these shapes. Raises BackendError for shapes that the engine was not built for."""
        key = tuple(shapes.items())
        bound = self._with_graphs.get(key)
        if bound is None:
            bound = self._choose(key, shapes)
        bound.set_shapes(shapes)
        return bound

    def _choose(self, key: tuple[tuple[str, Shape], ...], shapes: Mapping[str, Shape]) -> Bound:
        profile = choose_profile(self._engine.profiles, shapes)
        if profile is None:
            raise BackendError(f"{self._engine.place}: {_misfit(self._engine.profiles, shapes)}")
        if len(self._with_graphs) < GRAPHS and self._worth_graphs(shapes):
            return self._with_graphs.setdefault(key, self._create(profile, may_capture=True))
        if profile not in self._by_profile:
            self._by_profile[profile] = self._create(profile, may_capture=False)
        return self._by_profile[profile]

    def _create(self, profile: int, *, may_capture: bool) -> Bound:
        return Bound(self._engine, self._engine.create_context(profile, self._stream, self._scratch), may_capture)

    def close(self) -> None:
        """Nothing may be in flight."""
        for bound in (*self._with_graphs.values(), *self._by_profile.values()):
            bound.drop_graph()
        self._with_graphs.clear()
        self._by_profile.clear()


def _misfit(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> str:
    """What is wrong with shapes that no profile covers, by the first input to which that applies."""
    for name, shape in shapes.items():
        ranges = [profile.inputs[name] for profile in profiles if name in profile.inputs]
        if not any(each.covers(shape) for each in ranges):
            built = ", ".join(f"{format_shape(each.minimum)} to {format_shape(each.maximum)}" for each in ranges)
            return f"input '{name}': expected a shape that the engine was built for, {built or 'none'}, got {format_shape(shape)}"
    return "no profile of the engine covers these shapes together"
