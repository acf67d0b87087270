"""Where an engine's plan comes from: a file, the cache, or a build. Blocking."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from headrace.backends.cuda import Gpu
from headrace.backends.onnx_graph import graph_digest
from headrace.backends.tensorrt_api import Library
from headrace.backends.tensorrt_build import Build, BuildOrder
from headrace.backends.tensorrt_cache import Device, Plan, PlanCache, PlanKey, model_digest
from headrace.backends.tensorrt_engine import Engine
from headrace.backends.tensorrt_options import Options
from headrace.backends.tensorrt_profiles import derive_profiles
from headrace.backends.tensorrt_refit import refit
from headrace.errors import LoadError
from headrace.signature import TensorSpec
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


@contextlib.contextmanager
def read_plan(path: Path) -> Iterator[memoryview]:
    """A plan's file, mapped. Raises LoadError when there is none."""
    place = f"{path.parent.name}/{path.name}"
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        reason = f'expected a TensorRT plan at {place}, found none; for an ONNX model set filename = "model.onnx" in model.toml'
    except (OSError, ValueError) as error:
        reason = f"{place}: {error}"
    else:
        with mapped, memoryview(mapped) as content:
            yield content
        return
    raise LoadError(reason)


class ModelPlans:
    """The plans of one ONNX model. Owns the build that is under way."""

    def __init__(self, path: Path, library: Library, gpu: Gpu, options: Options, cancelled: threading.Event) -> None:
        self._path = path
        self._place = f"{path.parent.name}/{path.name}"
        self._library = library
        self._gpu = gpu
        self._options = options
        self._cancelled = cancelled
        self._build: Build | None = None
        self._cache = PlanCache(_directory(options), options.cache_mb << 20)

    def cancel(self) -> None:
        """From any thread, after `cancelled` was set."""
        build = self._build
        if build is not None:
            build.cancel()

    def load(self, inputs: Sequence[TensorSpec], largest: int, allowed: Sequence[int]) -> Engine:
        """From the cache, or built and then kept there. Raises LoadError."""
        key = PlanKey(
            self._model_digest(),
            self._library.version,
            describe_device(self._gpu),
            derive_profiles(inputs, largest, allowed, self._options.profiles),
            self._options.build,
        )
        self._cache.prepare()
        engine = self._find(key)
        if engine is None:
            with self._cache.building(key, self._cancelled):
                # Another instance may have built it meanwhile.
                engine = self._find(key) or self._make(key)
        if self._options.build.refit:
            began = time.monotonic()
            refit(self._library, engine.engine, self._path, self._place)
            log.info("engine refitted", model=self._place, seconds=round(time.monotonic() - began, 3))
        return engine

    def _model_digest(self) -> str:
        if not self._path.is_file():
            raise LoadError(f"expected an ONNX file at {self._place}, found none")
        if self._options.build.refit:
            graph = graph_digest(self._path)
            if graph:
                return f"graph {graph}"
            log.warning("graph not told from weights", model=self._place, next="its engine is of use to no other version")
        return model_digest(self._path)

    def _find(self, key: PlanKey) -> Engine | None:
        plan = self._cache.find(key)
        if plan is None:
            return None
        try:
            return self._open(plan)
        except LoadError as error:
            reason = str(error)
        self._cache.discard(key, reason)
        return None

    def _open(self, plan: Plan) -> Engine:
        """Host code is only in those that were built so, and it is TensorRT's own, as it was built here."""
        try:
            return Engine(self._library, plan.content, self._place, allow_host_code=self._options.build.version_compatible)
        finally:
            plan.close()

    def _make(self, key: PlanKey) -> Engine:
        if not self._library.can_build:
            raise LoadError(
                f"{self._place}: {self._library.name} {self._library.version} runs plans and builds none; "
                "pip install 'headrace[cpu,tensorrt]', or build a version-compatible model.plan elsewhere"
            )
        log.info("engine build began", model=self._place, profiles=len(key.profiles), tensorrt=key.tensorrt, device=key.device.name)
        began, built = time.monotonic(), self._cache.new_file()
        try:
            self._run_builder(key, built)
            self._cache.keep(key, built)
        finally:
            built.unlink(missing_ok=True)
        log.info("engine built", model=self._place, seconds=round(time.monotonic() - began, 1))
        plan = self._cache.find(key)
        if plan is None:
            raise LoadError(f"{self._place}: the engine that was just built is gone from {self._cache.directory}")
        return self._open(plan)

    def _run_builder(self, key: PlanKey, output: Path) -> None:
        order = BuildOrder(
            model=str(self._path.resolve()),
            output=str(output),
            timings=str(self._cache.timings(key)),
            device=self._gpu.ordinal,
            tensorrt=key.tensorrt,
            profiles=key.profiles,
            build=key.build,
        )
        self._build = build = Build(order, self._options.build_timeout_s)
        # The other way round would miss a cancellation between the two.
        if self._cancelled.is_set():
            build.cancel()
        try:
            build.run()
        finally:
            self._build = None


def _directory(options: Options) -> Path:
    """Absolute, as it is also the builder's."""
    if options.cache_directory:
        return Path(options.cache_directory).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "headrace" / "engines"


def describe_device(gpu: Gpu) -> Device:
    from cuda.bindings import driver
    from cuda.core import Device as CudaDevice

    device = CudaDevice(gpu.ordinal)
    capability = device.compute_capability
    code, version = driver.cuDriverGetVersion()
    return Device(str(device.name), f"{capability.major}.{capability.minor}", 0 if code else int(version) // 1000)
