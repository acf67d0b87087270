"""ONNX models on the CPU through ONNX Runtime. One session an instance.

Rule for changing this file: nothing of the runtime may be kept that outlives `close`. A session is kept alive by tracebacks and
by the NodeArg objects that get_inputs() returns (measured: one forgotten NodeArg kept 240 MB of arena).
"""

from __future__ import annotations

import ctypes
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.backends.base import Array, ArtifactSignature, Backend
from headrace.backends.onnx_graph import graph_digest
from headrace.config import InstanceConfig
from headrace.errors import BackendError, ConfigError, LoadError
from headrace.signature import DataType, TensorSpec
from headrace.telemetry.log import get_logger

log = get_logger(__name__)

_DATATYPES = {
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
    "tensor(uint16)": DataType.UINT16,
    "tensor(uint32)": DataType.UINT32,
    "tensor(uint64)": DataType.UINT64,
    "tensor(int8)": DataType.INT8,
    "tensor(int16)": DataType.INT16,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(float16)": DataType.FP16,
    "tensor(bfloat16)": DataType.BF16,
    "tensor(float)": DataType.FP32,
    "tensor(double)": DataType.FP64,
    "tensor(string)": DataType.BYTES,
}
_ONNX_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16"""

_FIXED_MEMORY = 32 << 20
"""Measured: a session on a file of 0.6 MB takes 14 MB, on 3 MB 24 MB, on 11 MB 40 MB; mostly kernels and their tables."""
_MEMORY_PER_FILE_BYTE = 2
"""Measured peak while loading 134 MB of weights: 206 MB, as read and as kernels prepack them. Afterwards 141 MB."""

_RAW_STRINGS_LIMIT = 64 << 20
_REASON_LIMIT = 1000


class OnnxRuntimeBackend(Backend):
    """Owns one session. Inputs that have an initializer (ONNX lets callers override those) keep it: old exporters list every
    weight as such an input, which is nothing to offer to clients."""

    name = "onnxruntime"
    default_filename = "model.onnx"
    platform = "onnxruntime_onnx"
    works_on_the_caller = True

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
        return f"OnnxRuntimeBackend({self.path.name}, {'loaded' if self._session else 'not loaded'})"

    @classmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        """Tensors of unknown rank come out like scalars, with shape (): the runtime does not tell the two apart."""
        return _signature(path, _open_session(path, _inspection_options(), ["CPUExecutionProvider"]))

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
        _share_threads(threads)

    def load(self) -> None:
        if _pool_threads and self.instance.threads:
            log.info("threads not used", model=self.path.parent.parent.name, threads=self.instance.threads, shared_threads=_pool_threads)
        providers = _providers(self.instance.device)
        options = _session_options(self.instance)
        session = _open_session(self.path, options, providers)
        signature = _signature(self.path, session)
        _check_string_path(self.path, signature)
        self._output_names = [spec.name for spec in signature.outputs]
        self._conversions = {s.name: _CONVERSIONS[s.datatype] for s in signature.inputs if s.datatype in _CONVERSIONS}
        self._bfloat16_outputs = frozenset(spec.name for spec in signature.outputs if spec.datatype is DataType.BF16)
        self._optional_outputs = frozenset(spec.name for spec in signature.outputs if spec.optional)
        self._run_options = _run_options(self.instance.options)
        self._run_session = _direct_run(session)
        self._session = session

    def shrink(self, inputs: Mapping[str, Array]) -> None:
        """magika after a warm-up up to 64 rows: 292 MB, 85 after this. It also spares the unload from giving the memory back, which
        the runtime does with the GIL held (17 ms)."""
        if self.instance.options.get("enable_cpu_mem_arena") == "false":
            return
        options = self._run_options
        self._run_options = _run_options({_SHRINK: "cpu:0"})
        try:
            self.execute(inputs, None)
        finally:
            self._run_options = options

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        names = self._output_names if outputs is None else list(outputs)
        try:
            return self._run(dict(inputs), names)
        except Exception as error:  # the runtime's exceptions have no common base
            reason = _reason(error)
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
            _check_present(names, results)
        return results

    def _run_values(self, feed: dict[str, Any], names: list[str]) -> list[Array]:
        """By OrtValue, the only way to get at BF16 outputs; 40 µs dearer than arrays, so for those models only."""
        value_of = _runtime().OrtValue.ortvalue_from_numpy
        values = {name: value_of(given) if isinstance(given, np.ndarray) else given for name, given in feed.items()}
        results = self._session.run_with_ort_values(names, values, self._run_options)
        return [
            _bfloat16_bits(value) if name in self._bfloat16_outputs else value.numpy() for name, value in zip(names, results, strict=True)
        ]

    def close(self) -> None:
        self._session = self._run_session = self._run_options = None


def _runtime() -> Any:
    # Imported at first use: it takes a tenth of a second and 30 MB that `headrace --help` must not pay.
    try:
        import onnxruntime
    except ImportError as error:
        reason = str(error)
    else:
        return onnxruntime
    raise LoadError(f"onnxruntime is not there ({reason}); pip install 'headrace[cpu]'")


def _open_session(path: Path, options: Any, providers: Sequence[str]) -> Any:
    place = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise LoadError(f"expected an ONNX file at {place}, found none")
    runtime = _runtime()
    try:
        return runtime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # no common base
        reason = _reason(error).replace(str(path), place)
    raise LoadError(f"onnxruntime could not load {place}: {reason}")


def _direct_run(session: Any) -> Callable[..., list[Array]]:
    """The session's own run, without the checks of names that the signature has already made: 2.7 µs a call instead of 3.3
    with onnxruntime 1.32, 4 instead of 7 before. The attribute is private, hence the public method where it is gone."""
    run: Callable[..., list[Array]] = getattr(getattr(session, "_sess", None), "run", session.run)
    return run


def _reason(error: BaseException) -> str:
    """The runtime's text on one line. Callers keep this and drop the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines)[:_REASON_LIMIT] or type(error).__name__


# -- tensors -----------------------------------------------------------------------------------------------------------


def _signature(path: Path, session: Any) -> ArtifactSignature:
    return ArtifactSignature(_specs(path, "input", session.get_inputs()), _specs(path, "output", session.get_outputs()))


def _specs(path: Path, kind: str, tensors: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for tensor in tensors:
        is_optional = tensor.type.startswith("optional(")
        plain = tensor.type.removeprefix("optional(").removesuffix(")") if is_optional else tensor.type
        if plain not in _DATATYPES:
            raise LoadError(
                f"{path.parent.name}/{path.name}: {kind} '{tensor.name}' is a {tensor.type}, which the protocol cannot carry; "
                f"expected a tensor of one of {', '.join(datatype.value for datatype in DataType)}"
            )
        shape = tuple(length if isinstance(length, int) and length >= 0 else -1 for length in tensor.shape)
        specs.append(TensorSpec(tensor.name, _DATATYPES[plain], shape, is_optional))
    return tuple(specs)


def _check_string_path(path: Path, signature: ArtifactSignature) -> None:
    text = next((spec.name for spec in signature.inputs if spec.datatype is DataType.BYTES), None)
    narrow = next((spec.name for spec in signature.outputs if spec.datatype is DataType.BF16), None)
    if text is not None and narrow is not None:
        raise LoadError(
            f"{path.parent.name}/{path.name}: input '{text}' is BYTES and output '{narrow}' BF16; the one call of "
            "onnxruntime's Python interface that returns bfloat16 takes no strings. Cast the output to FP32 in the model"
        )


def _check_present(names: Sequence[str], results: Sequence[Array | None]) -> None:
    for name, result in zip(names, results, strict=True):
        if result is None:
            raise ValueError(f"output '{name}' is optional and was not produced for this input; ask for the other outputs only")


def _string_array(name: str, array: Array) -> Array:
    """str objects, which is what the runtime encodes; given bytes objects it would take their repr()."""
    try:
        texts = [element.decode() if isinstance(element, bytes) else element for element in array.ravel()]
    except UnicodeDecodeError:
        return _raw_string_array(name, array)
    strings = np.empty(len(texts), object)
    strings[:] = texts
    return strings.reshape(array.shape)


def _raw_string_array(name: str, array: Array) -> Array:
    """The same for bytes that are not UTF-8, which str cannot hold: a fixed-width array, whose elements the runtime reads as
    they are up to a NUL, so that one request's odd bytes are the model's business and fail no batch mate.

    Raises ValueError for what does not fit such an array: bytes with NUL, and (width times count) beyond any honest text.
    """
    elements = [element if isinstance(element, bytes) else element.encode() for element in array.ravel()]
    width = 1 + max(map(len, elements))
    if width * len(elements) > _RAW_STRINGS_LIMIT or any(b"\0" in element for element in elements):
        position = next(i for i, element in enumerate(elements) if not _is_utf8(element))
        raise ValueError(f"input '{name}': expected UTF-8, element {position} of {len(elements)} is not")
    return np.array(elements, f"S{width}").reshape(array.shape)


def _is_utf8(element: bytes) -> bool:
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bfloat16_value(_name: str, array: Array) -> Any:
    """An OrtValue over the array's memory: numpy has no name for the type, so it cannot be passed as an array."""
    return _runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)


def _bfloat16_bits(value: Any) -> Array:
    """The 16-bit patterns of a BF16 OrtValue, copied out of its memory: numpy() and DLPack both refuse the type."""
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, np.uint16)
    buffer = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(buffer, np.uint16).reshape(shape)


_CONVERSIONS: dict[DataType, Callable[[str, Array], Any]] = {DataType.BYTES: _string_array, DataType.BF16: _bfloat16_value}
"""What the runtime does not take as our arrays hold it."""


# -- options -----------------------------------------------------------------------------------------------------------


def _providers(device: str) -> list[str]:
    if device in ("auto", "cpu"):
        return ["CPUExecutionProvider"]
    if device.partition(":")[0] == "cuda" and "CUDAExecutionProvider" not in _runtime().get_available_providers():
        raise LoadError(f"device '{device}': the installed onnxruntime has no CUDAExecutionProvider (onnxruntime-gpu has); use 'cpu'")
    raise LoadError(f"device '{device}': expected 'auto' or 'cpu'; this backend runs models on the CPU")


_pool_threads = 0
"""Of the runtime's pool that all sessions share; 0: there is none. The runtime has one environment a process and makes that pool once, so
this is the process's as well, and says only what was done to it. Once there, the runtime refuses sessions with threads of their own."""


def _share_threads(threads: int) -> None:
    global _pool_threads
    if _pool_threads == threads:
        return
    if _pool_threads:
        raise ConfigError(
            f"shared_threads {threads}: this process has a pool of {_pool_threads} already, for all of its servers; it cannot be replaced"
        )
    runtime = _runtime()
    make_pools = getattr(runtime, "set_global_thread_pool_sizes", None)
    if make_pools is None:
        raise ConfigError(f"shared_threads {threads}: onnxruntime {runtime.__version__} offers no such pool to Python; leave it at 0")
    try:
        make_pools(threads, 1)
    except Exception as error:  # no common base
        reason = _reason(error)
    else:
        _pool_threads = threads
        if threads > 1:
            log.warning("shared threads spin", threads=threads, seconds=0.04, reason="onnxruntime's Python interface cannot turn that off")
        return
    raise ConfigError(f"shared_threads {threads}: onnxruntime cannot make its pool any more: {reason}")


def _set_threads(options: Any, threads: int) -> None:
    if _pool_threads:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1


def _inspection_options() -> Any:
    """As little as gives the tensors: optimising and prepacking a graph for that takes 36 ms instead of 9 (11 MB OCR model)."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    _set_threads(options, 1)
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = _SILENT
    return options


_SILENT = 4
"""Fatal errors only. All others arrive as exceptions, and would be written to stderr besides, past our log."""


def _session_options(instance: InstanceConfig) -> Any:
    """Ours first, then what instance.options says, by the runtime's own names. Raises LoadError for an unknown name or value.

    The memory arena stays on, which is the runtime's default: batches of 16 took 39 ms with it and 58 without (magika on 2
    cores; fresh pages for every run), a single row the same. It costs memory, 292 MB against 82 after a batch of 64: where
    that matters, enable_cpu_mem_arena = false, or memory.enable_memory_arena_shrinkage = "cpu:0" to about the same effect.
    """
    runtime = _runtime()
    options = runtime.SessionOptions()
    _set_threads(options, instance.threads or max(_cores() // instance.count, 1))
    # One batch at a time and an instance: branches of the graph run in turn, batches side by side on several instances.
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Idle threads spin for about 47 ms by default, which takes the core that the event loop needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _SILENT
    for name, value in instance.options.items():
        _apply_option(runtime, options, name, value)
    return options


def _apply_option(runtime: Any, options: Any, name: str, value: str) -> None:
    if name in _ENUM_OPTIONS:
        enum, choices = _ENUM_OPTIONS[name]
        if value not in choices:
            raise LoadError(f"onnxruntime option '{name}': expected one of {', '.join(choices)}, got '{value}'")
        setattr(options, name, getattr(getattr(runtime, enum), choices[value]))
    elif name in _SWITCH_OPTIONS:
        if value not in ("true", "false"):
            raise LoadError(f"onnxruntime option '{name}': expected true or false, got '{value}'")
        setattr(options, name, value == "true")
    elif name in _COUNT_OPTIONS:
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise LoadError(f"onnxruntime option '{name}': expected a whole number from 1, got '{value}'")
        setattr(options, name, int(value))
    elif name in _SESSION_ENTRIES:
        options.add_session_config_entry(name, {"true": "1", "false": "0"}.get(value, value))
    elif name not in _RUN_ENTRIES:
        near = difflib.get_close_matches(name, OPTIONS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(OPTIONS)}"
        raise LoadError(f"unknown onnxruntime option '{name}', {hint}")


def _run_options(given: Mapping[str, str]) -> Any:
    entries = {name: given[name] for name in _RUN_ENTRIES if name in given}
    if not entries:
        return None
    options = _runtime().RunOptions()
    for name, value in entries.items():
        options.add_run_config_entry(name, value)
    return options


_ENUM_OPTIONS = {
    "graph_optimization_level": (
        "GraphOptimizationLevel",
        {"disable": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"},
    ),
    "execution_mode": ("ExecutionMode", {"sequential": "ORT_SEQUENTIAL", "parallel": "ORT_PARALLEL"}),
}
_SWITCH_OPTIONS = ("enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse", "use_deterministic_compute")
_COUNT_OPTIONS = ("inter_op_num_threads",)
_SESSION_ENTRIES = (
    "session.intra_op.allow_spinning",
    "session.intra_op.spin_duration_us",
    "session.intra_op.spin_backoff_max",
    "session.intra_op_thread_affinities",
    "session.force_spinning_stop",
    "session.dynamic_block_base",
    "session.set_denormal_as_zero",
    "session.disable_prepacking",
    "session.prepack.enable_parallel",
    "session.use_device_allocator_for_initializers",
    "session.qdqisint8allowed",
    "session.disable_quant_qdq",
    "session.enable_quant_qdq_cleanup",
    "optimization.enable_gelu_approximation",
    "optimization.disable_specified_optimizers",
    "mlas.disable_kleidiai",
)
"""The runtime itself takes any key in silence, so a typing mistake would mean the default: hence a list."""
_SHRINK = "memory.enable_memory_arena_shrinkage"
_RUN_ENTRIES = (_SHRINK,)
OPTIONS = (*_ENUM_OPTIONS, *_SWITCH_OPTIONS, *_COUNT_OPTIONS, *_SESSION_ENTRIES, *_RUN_ENTRIES)


def _cores() -> int:
    """Those this process may use: a container's or taskset's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
