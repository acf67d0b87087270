"""A model's effective configuration: what its artifact says, overridden by model.toml or config.pbtxt, each value with its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.config import BatchingConfig, InstanceConfig, ModelConfig
from headrace.signature import Signature


@dataclass(frozen=True, slots=True)
class EffectiveModel:
    """Everything settled, nothing left to infer.

    `batching.max_batch_size` is a number and equals `signature.max_batch_size`; `provenance` maps a dotted key to where its
    value came from; `notes` are sentences worth showing at load and in `headrace check`; `labels` are by output name.
    """

    config: ModelConfig
    backend: str
    platform: str
    filename: str
    signature: Signature
    batching: BatchingConfig
    instances: InstanceConfig
    provenance: Mapping[str, str]
    notes: tuple[str, ...] = ()
    labels: Mapping[str, tuple[str, ...]] | None = None
