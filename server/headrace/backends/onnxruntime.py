"""ONNX models through ONNX Runtime, on the CPU; on a GPU: onnxruntime_cuda.py. One session an instance.

Rule for changing this file: nothing of the runtime may be kept that outlives `close`. A session is kept alive by tracebacks and
by the NodeArg objects that get_inputs() returns (measured: one forgotten NodeArg kept 240 MB of arena).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.backends.base import Array, ArtifactSignature, Backend, DeviceSpace
from headrace.backends.onnx_graph import graph_digest
from headrace.backends.onnxruntime_options import (
    OPTIONS,
    SHRINK,
    inspection_options,
    pool_threads,
    run_options,
    session_options,
    share_threads,
)
from headrace.backends.onnxruntime_providers import find_devices, is_on_gpu
from headrace.backends.onnxruntime_session import (
    CONVERSIONS,
    Provider,
    bfloat16_bits,
    check_present,
    check_string_path,
    direct_run,
    import_runtime,
    one_line,
    open_session,
    signature_of,
)
from headrace.config import InstanceConfig
from headrace.errors import BackendError
from headrace.signature import DataType
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

_FIXED_MEMORY = 32 << 20
"""Measured: a session on a file of 0.6 MB takes 14 MB, on 3 MB 24 MB, on 11 MB 40 MB; mostly kernels and their tables."""
_MEMORY_PER_FILE_BYTE = 2
"""Measured peak while loading 134 MB of weights: 206 MB, as read and as kernels prepack them. Afterwards 141 MB."""


class OnnxRuntimeBackend(Backend):
    """Owns one session. Inputs that have an initializer (ONNX lets callers override those) keep it: old exporters list every
    weight as such an input, which is nothing to offer to clients."""

    name = "onnxruntime"
    default_filename = "model.onnx"
    platform = "onnxruntime_onnx"
    works_on_the_caller = True

    def __new__(cls, path: Path, instance: InstanceConfig) -> OnnxRuntimeBackend:
        """One name in model.toml for both; the device says which."""
        if cls is OnnxRuntimeBackend and is_on_gpu(instance.device):
            from headrace.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

            return super().__new__(OnnxRuntimeCudaBackend)
        return super().__new__(cls)

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        super().__init__(path, instance)
        self._session: Any = None
        self._run_session: Callable[..., list[Array]] | None = None
        self._run_options: Any = None
        self._output_names: list[str] = []
        self._conversions: dict[str, Callable[[str, Array], Any]] = {}
        self._bfloat16_outputs: frozenset[str] = frozenset()
        self._optional_outputs: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path.name}, {'loaded' if self._session else 'not loaded'})"

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        """Tensors of unknown rank come out like scalars, with shape (): the runtime does not tell the two apart."""
        return signature_of(path, open_session(path, inspection_options(), ["CPUExecutionProvider"]))

    @classmethod
    def graph_digest(cls, path: Path) -> str:
        return graph_digest(path)

    @classmethod
    def estimate_memory(cls, path: Path) -> int:
        """For the file and the external data beside it. Activations are not in it: they come with the batches."""
        files = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        return _FIXED_MEMORY + _MEMORY_PER_FILE_BYTE * files

    @classmethod
    def share_threads(cls, threads: int) -> None:
        share_threads(threads)

    @classmethod
    def devices(cls, device: str) -> Sequence[DeviceSpace]:
        return find_devices(device)

    def load(self) -> None:
        if pool_threads() and self.instance.threads:
            log.info("threads not used", model=self.path.parent.parent.name, threads=self.instance.threads, shared_threads=pool_threads())
        self._open(session_options(self.instance), ["CPUExecutionProvider"])

    def _open(self, options: Any, providers: Sequence[Provider]) -> ArtifactSignature:
        session = open_session(self.path, options, providers)
        signature = signature_of(self.path, session)
        check_string_path(self.path, signature)
        self._output_names = [spec.name for spec in signature.outputs]
        self._conversions = {s.name: CONVERSIONS[s.datatype] for s in signature.inputs if s.datatype in CONVERSIONS}
        self._bfloat16_outputs = frozenset(spec.name for spec in signature.outputs if spec.datatype is DataType.BF16)
        self._optional_outputs = frozenset(spec.name for spec in signature.outputs if spec.optional)
        self._run_options = run_options(self.instance.options)
        self._run_session = direct_run(session)
        self._session = session
        return signature

    def shrink(self, inputs: Mapping[str, Array]) -> None:
        """magika after a warm-up up to 64 rows: 292 MB, 85 after this. It also spares the unload from giving the memory back, which
        the runtime does with the GIL held (17 ms)."""
        if self.instance.options.get("enable_cpu_mem_arena") == "false":
            return
        options = self._run_options
        self._run_options = run_options({SHRINK: "cpu:0"})
        try:
            self.execute(inputs, None)
        finally:
            self._run_options = options

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        names = self._output_names if outputs is None else list(outputs)
        try:
            return self._run(dict(inputs), names)
        except Exception as error:  # the runtime's exceptions have no common base
            reason = one_line(error)
        # Not from inside the handler: even with `from None` the runtime's exception would stay as __context__, and the arrays
        # in its traceback with it.
        raise BackendError(f"onnxruntime: {reason}")

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Array]:
        assert self._run_session is not None, "load() comes before execute()"
        for name, convert in self._conversions.items():
            if name in feed:
                feed[name] = convert(name, feed[name])
        if not self._bfloat16_outputs.isdisjoint(names):
            return self._run_values(feed, names)
        results = self._run_session(names, feed, self._run_options)
        if self._optional_outputs:
            check_present(names, results)
        return results

    def _run_values(self, feed: dict[str, Any], names: list[str]) -> list[Array]:
        """By OrtValue, the only way to get at BF16 outputs; 40 µs dearer than arrays, so for those models only."""
        value_of = import_runtime().OrtValue.ortvalue_from_numpy
        values = {name: value_of(given) if isinstance(given, np.ndarray) else given for name, given in feed.items()}
        results = self._session.run_with_ort_values(names, values, self._run_options)
        return [
            bfloat16_bits(value) if name in self._bfloat16_outputs else value.numpy() for name, value in zip(names, results, strict=True)
        ]

    def close(self) -> None:
        self._session = self._run_session = self._run_options = None


__all__ = ["OPTIONS", "OnnxRuntimeBackend"]
