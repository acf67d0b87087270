"""Triton's config.pbtxt for an ONNX model in the Python backend: `triton_config.py NAME MODEL.onnx MAX_BATCH`. Runs in the peer's venv."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

TYPES = {
    "float": "FP32", "float16": "FP16", "double": "FP64", "bool": "BOOL", "string": "STRING",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def config(name: str, inputs: Sequence[Any], outputs: Sequence[Any], max_batch: int) -> str:
    """With `max_batch` 0 the first dimension is one like the others, and nothing is batched."""
    lines = [f'name: "{name}"', 'backend: "python"', f"max_batch_size: {max_batch}", "instance_group [{ count: 1 kind: KIND_CPU }]"]
    lines += [f"{kind} {_tensor(value, max_batch)}" for kind, values in (("input", inputs), ("output", outputs)) for value in values]
    return "\n".join([*lines, *(["dynamic_batching { }"] if max_batch else [])])


def _tensor(value: Any, max_batch: int) -> str:
    sizes = [size if isinstance(size, int) else -1 for size in value.shape[1 if max_batch else 0 :]]
    kind = TYPES[value.type.removeprefix("tensor(").removesuffix(")")]
    return f'[{{ name: "{value.name}" data_type: TYPE_{kind} dims: [{", ".join(map(str, sizes))}] }}]'


def main() -> None:
    name, model, max_batch = sys.argv[1:]
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    print(config(name, session.get_inputs(), session.get_outputs(), int(max_batch)))


if __name__ == "__main__":
    main()
