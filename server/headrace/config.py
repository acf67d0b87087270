"""Everything that can be configured, frozen, with its default and the reason for it.

Sections are handed down one by one; nobody but app.py sees the whole. Inside, seconds are float and sizes are bytes; files,
flags and environment variables carry the unit in the key (`max_queue_delay_ms`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """Who runs together. All counts are rows, not requests, so that one large request counts as what it costs."""

    max_batch_size: int | None = None
    """None: inferred from the artifact; 0: shapes are literal and nothing is batched."""
    max_queue_delay: float = 0.0
    """0: a free instance runs what is there. Waiting on an idle device only adds latency."""
    max_queue_size: int = 4096
    """Rows; beyond it requests are refused at once. 0: unbounded."""
    allowed_batch_sizes: tuple[int, ...] = ()
    """Ascending; batches are padded up to the next. Empty: any size up to max_batch_size."""
    priority_levels: int = 0
    default_priority_level: int = 0
    default_timeout: float = 0.0
    """A request that has not started by then is refused. 0: never."""
    allow_timeout_override: bool = True


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    count: int = 1
    device: str = "auto"
    """auto | cpu | cuda | cuda:N"""
    threads: int = 0
    """Intra-op threads of one instance; 0: the cores divided by the instances of this model."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The backend's own options, by its own names."""


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """An override for one tensor. Only what is set replaces what the artifact says. Shape without the batch dimension."""

    name: str
    datatype: str | None = None
    shape: tuple[int, ...] | None = None
    optional: bool | None = None
    labels: str | None = None
    """File of class names beside model.toml, one per line."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """model.toml, or what of a config.pbtxt it corresponds to. `provenance`: dotted key -> the file that set it."""

    name: str
    backend: str | None = None
    filename: str | None = None
    batching: BatchingConfig = BatchingConfig()
    instances: InstanceConfig = InstanceConfig()
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    version_policy: str = "latest:1"
    """latest:N | all | comma-separated version numbers"""
    warmup_runs: int = 5
    """Runs per allowed batch size before a version goes live."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Free key-value pairs, passed through to clients in ModelConfig."""
    provenance: Mapping[str, str] = field(default_factory=dict)
