"""The process that builds an engine, `python -m headrace.backends.tensorrt_builder`; for how it is talked to see tensorrt_build.py."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.backends.tensorrt_api import Builder, IBuilderConfig, INetworkDefinition, Library, OnnxParser, ParserError, find_library
from headrace.backends.tensorrt_build import BuildOrder, decode_order
from headrace.errors import LoadError

_REPORT_INTERVAL = 0.2
_ERRORS_SHOWN = 4

Report = Callable[[dict[str, Any]], None]


def main() -> None:
    """Never returns: the interpreter's end would run destructors of objects that TensorRT may have left half made."""
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no report
    lock = threading.Lock()

    def report(values: dict[str, Any]) -> None:
        with lock:
            reports.write(json.dumps(values).encode() + b"\n")

    code = 1
    try:
        order = decode_order(sys.stdin.buffer.readline())
        threading.Thread(target=_watch_parent, daemon=True).start()
        build_engine(order, find_library(to_build=True), report)
        report({"done": True})
        code = 0
    except LoadError as error:
        report({"error": str(error)})
    except BrokenPipeError:
        pass
    except Exception as error:
        traceback.print_exc()
        report({"error": f"{type(error).__name__}: {error}"})
    os._exit(code)


def _watch_parent() -> None:
    """The order is all that is ever written; the end comes when the server has gone, or has no use for the rest."""
    sys.stdin.buffer.read()
    os._exit(1)


def build_engine(order: BuildOrder, library: Library, report: Report) -> None:
    """Leaves the plan in `order.output`. Raises LoadError."""
    if library.version != order.tensorrt:
        raise LoadError(f"expected TensorRT {order.tensorrt}, found {library.version}; was it installed anew while the server ran?")
    _choose_device(order.device)
    report({"phase": "reading the model"})
    library.register_plugins()
    builder: Builder = library.make("Builder")
    # Precisions are as the model says, which TensorRT 11 knows no other way of.
    network = builder.create_network(1 << int(library.member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")))
    parser: OnnxParser = library.make("OnnxParser", network)
    if not parser.parse_from_file(order.model):
        raise LoadError(describe_errors(parser.get_error, parser.num_errors) or library.take_errors(of_all_threads=True))
    _check_inputs(network)
    config = builder.create_builder_config()
    _configure(config, order, library)
    _add_profiles(builder, config, order)
    before = _load_timings(config, Path(order.timings))
    config.progress_monitor = monitor = _monitor_class(library, report)()
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        raise LoadError(library.take_errors(of_all_threads=True) or "no reason given")
    report({"phase": "writing the plan"})
    Path(order.output).write_bytes(memoryview(plan))
    _keep_timings(config, Path(order.timings), before)


def describe_errors(get_error: Callable[[int], ParserError], count: int) -> str:
    errors = [get_error(index) for index in range(min(count, _ERRORS_SHOWN))]
    return "; ".join(f"{error.desc()} (node '{error.node_name()}', {error.node_operator()})" for error in errors)


def _choose_device(index: int) -> None:
    from headrace.backends.cuda import open_device

    open_device(f"cuda:{index}").make_current()


def _check_inputs(network: INetworkDefinition) -> None:
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise LoadError(f"input '{tensor.name}' decides the shape of others, which is not supported; make it a constant of the model")


def _configure(config: IBuilderConfig, order: BuildOrder, library: Library) -> None:
    options = order.build
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(library.member("MemoryPoolType", "WORKSPACE"), options.workspace_mb << 20)
    if options.hardware_compatibility != "none":
        level = library.member("HardwareCompatibilityLevel", options.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    flags = {"VERSION_COMPATIBLE": options.version_compatible, "REFIT": options.refit, "STRIP_PLAN": options.refit}
    for name, is_on in flags.items():
        if is_on:
            config.set_flag(library.member("BuilderFlag", name))
    if not options.tf32:
        config.clear_flag(library.member("BuilderFlag", "TF32"))


def _add_profiles(builder: Builder, config: IBuilderConfig, order: BuildOrder) -> None:
    for index, wanted in enumerate(order.profiles):
        profile = builder.create_optimization_profile()
        for name, shapes in wanted.inputs.items():
            profile.set_shape(name, shapes.minimum, shapes.optimum, shapes.maximum)
        if config.add_optimization_profile(profile) != index:
            raise LoadError(f"TensorRT refused the profile {dict(wanted.inputs)}")


def _monitor_class(library: Library, report: Report) -> Callable[[], Any]:
    class _Monitor(library.module.IProgressMonitor):  # type: ignore[misc,name-defined]  # not there when types are checked
        """Called from TensorRT's threads. Owns how far each phase is, and when that was last told."""

        def __init__(self) -> None:
            library.module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            if not parent_phase:
                report({"phase": phase_name, "step": 0, "steps": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._last > _REPORT_INTERVAL:
                self._last = now
                report({"phase": phase_name, "step": step + 1, "steps": self._steps.get(phase_name, 0)})
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return _Monitor


# -- measurements of kernels -------------------------------------------------------------------------------------------


def _load_timings(config: IBuilderConfig, path: Path) -> bytes:
    """Give the builder what builds before it measured; what it refuses is of no use to anybody."""
    before = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(before), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return before


def _keep_timings(config: IBuilderConfig, path: Path, before: bytes) -> None:
    """Together with what another build kept meanwhile. Nothing that a build could fail for: the plan is there."""
    mine = config.get_timing_cache()
    if mine is None:
        return
    with path.parent.joinpath(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        now = path.read_bytes() if path.is_file() else b""
        if now != before:
            mine.combine(config.create_timing_cache(now), False)
        new = path.parent / f"building-{path.name}-{os.getpid()}"
        new.write_bytes(memoryview(mine.serialize()))
        os.replace(new, path)


if __name__ == "__main__":
    main()
