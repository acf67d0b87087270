"""What model.toml declares to be done to tensors before and after the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK


@dataclass(frozen=True, slots=True)
class Processing:
    """By the name that the tensor has in the artifact. Each step is its own numpy definition: called with an array, it returns another."""

    inputs: Mapping[str, Normalize] = field(default_factory=dict)
    outputs: Mapping[str, TopK | Softmax] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not self.inputs and not self.outputs

    def visible_outputs(self, outputs: Sequence[str]) -> list[str]:
        """What clients can ask for of the artifact's `outputs`: behind one of which the largest are taken stands that of their classes."""
        named = [(name, classes_of(name)) if isinstance(self.outputs.get(name), TopK) else (name,) for name in outputs]
        return [name for names in named for name in names]


def classes_of(output: str) -> str:
    """The output that says which classes the values of `output` belong to."""
    return f"{output}_classes"
