"""What model.toml declares to be done to tensors before and after the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK


@dataclass(frozen=True, slots=True)
class Processing:
    """By the name that the tensor has in the artifact. Each step is its own numpy definition: called with an array, it returns another."""

    inputs: Mapping[str, Normalize] = field(default_factory=dict)
    outputs: Mapping[str, TopK | Softmax] = field(default_factory=dict)
