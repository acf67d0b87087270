"""Models of the sizes that GPUs are used for, with random weights: what is measured with them is time, not accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Graph:
    """Nodes and weights as they are added; every method returns the name of what it computes."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def weight(self, *shape: int, scale: float) -> str:
        name = f"w{len(self.weights)}"
        values = self._rng.standard_normal(shape, np.float32) * np.float32(scale)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, values: Sequence[int]) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def conv(self, x: str, given: int, wanted: int, kernel: int, stride: int = 1) -> str:
        # A gain below that of ReLU networks keeps residual sums of 16 blocks within fp16.
        weight = self.weight(wanted, given, kernel, kernel, scale=(1.0 / (given * kernel * kernel)) ** 0.5)
        bias = self.weight(wanted, scale=0.01)
        pad = kernel // 2
        return self.add("Conv", x, weight, bias, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def linear(self, x: str, given: int, wanted: int) -> str:
        return self.add("Add", self.add("MatMul", x, self.weight(given, wanted, scale=given**-0.5)), self.weight(wanted, scale=0.01))

    def norm(self, x: str, width: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ones(width, np.float32), name))
        return self.add("LayerNormalization", x, name, self.weight(width, scale=0.01), axis=-1)

    def model(self, name: str, last: str, given: Sequence[int | str], wanted: Sequence[int | str]) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [last], ["y"]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, given)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, wanted)
        graph = helper.make_graph(self.nodes, name, [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_cnn(width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3), classes: int = 1000, seed: int = 50) -> onnx.ModelProto:
    """`x` [N, 3, 224, 224] to `y` [N, classes], FP32. As it stands a ResNet-50 with its norms folded: 25.5 million weights, 4.1 GMAC."""
    graph = _Graph(seed)
    value = graph.add("Relu", graph.conv("x", 3, width, 7, 2))
    value = graph.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    given = width
    for stage, count in enumerate(blocks):
        inner = width << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            short = value if block else graph.conv(value, given, 4 * inner, 1, stride)
            inside = graph.add("Relu", graph.conv(value, given, inner, 1))
            inside = graph.add("Relu", graph.conv(inside, inner, inner, 3, stride))
            value = graph.add("Relu", graph.add("Add", graph.conv(inside, inner, 4 * inner, 1), short))
            given = 4 * inner
    value = graph.add("Flatten", graph.add("GlobalAveragePool", value))
    return graph.model("cnn", graph.linear(value, given, classes), ["N", 3, 224, 224], ["N", classes])


def make_transformer(width: int = 768, heads: int = 12, length: int = 128, layers: int = 4, seed: int = 12) -> onnx.ModelProto:
    """`x` [N, length, width] to `y` of the same shape, FP32: encoder layers of BERT's size."""
    graph = _Graph(seed)
    size = width // heads
    apart, together = graph.constant([0, 0, heads, size]), graph.constant([0, 0, width])
    scale = f"w{len(graph.weights)}"
    graph.weights.append(numpy_helper.from_array(np.array(size**-0.5, np.float32), scale))
    value = "x"
    for _ in range(layers):
        normed = graph.norm(value, width)
        query, key, content = (graph.add("Reshape", graph.linear(normed, width, width), apart) for _ in range(3))
        query, content = (graph.add("Transpose", each, perm=[0, 2, 1, 3]) for each in (query, content))
        scores = graph.add("Mul", graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 2, 3, 1])), scale)
        mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), content)
        mixed = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), together)
        value = graph.add("Add", value, graph.linear(mixed, width, width))
        inside = graph.linear(graph.norm(value, width), width, 4 * width)
        inside = graph.add("Mul", inside, graph.add("Sigmoid", inside))
        value = graph.add("Add", value, graph.linear(inside, 4 * width, width))
    return graph.model("transformer", value, ["N", length, width], ["N", length, width])
