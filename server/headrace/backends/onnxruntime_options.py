"""ONNX Runtime's options by its own names, as model.toml gives them, and the threads that sessions compute on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Container, Mapping
from typing import Any

from headrace.backends.onnxruntime_session import import_runtime, one_line
from headrace.config import InstanceConfig
from headrace.errors import ConfigError, LoadError
from headrace.telemetry.log import get_logger

log = get_logger(__name__)


_pool_threads = 0
"""Of the runtime's pool that all sessions share; 0: there is none. The runtime has one environment a process and makes that pool once, so
this is the process's as well, and says only what was done to it. Once there, the runtime refuses sessions with threads of their own."""


def pool_threads() -> int:
    return _pool_threads


def share_threads(threads: int) -> None:
    global _pool_threads
    if _pool_threads == threads:
        return
    if _pool_threads:
        raise ConfigError(
            f"shared_threads {threads}: this process has a pool of {_pool_threads} already, for all of its servers; it cannot be replaced"
        )
    runtime = import_runtime()
    make_pools = getattr(runtime, "set_global_thread_pool_sizes", None)
    if make_pools is None:
        raise ConfigError(f"shared_threads {threads}: onnxruntime {runtime.__version__} offers no such pool to Python; leave it at 0")
    try:
        make_pools(threads, 1)
    except Exception as error:  # no common base
        reason = one_line(error)
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


def inspection_options() -> Any:
    """As little as gives the tensors: optimising and prepacking a graph for that takes 36 ms instead of 9 (11 MB OCR model)."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    _set_threads(options, 1)
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = _SILENT
    return options


_SILENT = 4
"""Fatal errors only. All others arrive as exceptions, and would be written to stderr besides, past our log."""


def session_options(instance: InstanceConfig) -> Any:
    """Ours first, then what instance.options says, by the runtime's own names. Raises LoadError for an unknown name or value.

    The memory arena stays on, which is the runtime's default: batches of 16 took 39 ms with it and 58 without (magika on 2
    cores; fresh pages for every run), a single row the same. It costs memory, 292 MB against 82 after a batch of 64: where
    that matters, enable_cpu_mem_arena = false, or memory.enable_memory_arena_shrinkage = "cpu:0" to about the same effect.
    """
    runtime = import_runtime()
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
    check_option(name, value)
    if name in _ENUM_OPTIONS:
        enum, choices = _ENUM_OPTIONS[name]
        setattr(options, name, getattr(getattr(runtime, enum), choices[value]))
    elif name in _SWITCH_OPTIONS:
        setattr(options, name, value == "true")
    elif name in _COUNT_OPTIONS:
        setattr(options, name, int(value))
    elif name in _SESSION_ENTRIES:
        options.add_session_config_entry(name, _as_digit(value))


def check_option(name: str, value: str) -> None:
    """Raises LoadError for an unknown name or a value that it does not take."""
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(OPTIONS)}"
        raise LoadError(f"unknown onnxruntime option '{name}', {hint}")
    choices = (*_ENUM_OPTIONS[name][1],) if name in _ENUM_OPTIONS else GPU_CHOICES.get(name, ())
    expected = ""
    if choices and value not in choices:
        expected = f"one of {', '.join(choices)}"
    elif name in (*_SWITCH_OPTIONS, *GPU_SWITCHES) and value not in ("true", "false"):
        expected = "true or false"
    elif name in (*_COUNT_OPTIONS, *GPU_COUNTS) and not (value.isascii() and value.isdigit() and int(value) > 0):
        expected = "a whole number from 1"
    if expected:
        raise LoadError(f"onnxruntime option '{name}': expected {expected}, got '{value}'")


def _as_digit(value: str) -> str:
    return {"true": "1", "false": "0"}.get(value, value)


def provider_options(given: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    """Of the options that model.toml gives, those that an execution provider takes."""
    return {name: _as_digit(value) for name, value in given.items() if name in names}


def run_options(given: Mapping[str, str]) -> Any:
    entries = {name: given[name] for name in _RUN_ENTRIES if name in given}
    return make_run_options(entries) if entries else None


def make_run_options(entries: Mapping[str, str]) -> Any:
    options = import_runtime().RunOptions()
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
SHRINK = "memory.enable_memory_arena_shrinkage"
_RUN_ENTRIES = (SHRINK,)

GPU_CHOICES = {
    "provider": ("cuda", "tensorrt"),
    "arena_extend_strategy": ("kSameAsRequested", "kNextPowerOfTwo"),
    "cudnn_conv_algo_search": ("HEURISTIC", "EXHAUSTIVE", "DEFAULT"),
}
NO_CPU_FALLBACK = "session.disable_cpu_ep_fallback"
GPU_SWITCHES = (
    "cuda_graph",
    NO_CPU_FALLBACK,
    "use_tf32",
    "prefer_nhwc",
    "fuse_conv_bias",
    "cudnn_conv_use_max_workspace",
    "cudnn_conv1d_pad_to_nc1d",
    "enable_skip_layer_norm_strict_mode",
    "trt_fp16_enable",
    "trt_bf16_enable",
    "trt_engine_cache_enable",
    "trt_timing_cache_enable",
    "trt_layer_norm_fp32_fallback",
)
GPU_COUNTS = ("gpu_mem_limit", "sdpa_kernel", "trt_max_workspace_size", "trt_builder_optimization_level", "trt_min_subgraph_size")
_GPU_TEXTS = (
    "trt_engine_cache_path",
    "trt_timing_cache_path",
    "trt_profile_min_shapes",
    "trt_profile_opt_shapes",
    "trt_profile_max_shapes",
)
GPU_OPTIONS = (*GPU_CHOICES, *GPU_SWITCHES, *GPU_COUNTS, *_GPU_TEXTS)
"""Of sessions on a GPU. A session on the CPU takes them and leaves them alone, so that one model.toml serves on both. `provider` and
`cuda_graph` are our own names, the others the runtime's."""
OWN_OPTIONS = ("provider", "cuda_graph", NO_CPU_FALLBACK)
TENSORRT_OPTIONS = tuple(name for name in GPU_OPTIONS if name.startswith("trt_"))
CUDA_OPTIONS = tuple(name for name in GPU_OPTIONS if name not in (*OWN_OPTIONS, *TENSORRT_OPTIONS))
OPTIONS = (*_ENUM_OPTIONS, *_SWITCH_OPTIONS, *_COUNT_OPTIONS, *_SESSION_ENTRIES, *_RUN_ENTRIES, *GPU_OPTIONS)


def _cores() -> int:
    """Those this process may use: a container's or taskset's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
