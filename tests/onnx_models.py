"""Tiny ONNX models for tests, each with the property that its name says. All functions return a fresh ModelProto."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

ONNX_TYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float",
    "FP64": "double",
    "BYTES": "string",
}
"""Datatype on the wire -> its name in ONNX's text format. All that the protocol can carry."""


def parse(graph: str) -> ModelProto:
    """A graph in ONNX's text format, under fixed versions so that a newer onnx does not outrun the installed runtime."""
    return parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20, "ai.onnx.ml" : 3]> {graph}')


def save(model: ModelProto, directory: Path, filename: str = "model.onnx") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / filename
    path.write_bytes(model.SerializeToString())
    return path


# -- datatypes and shapes ----------------------------------------------------------------------------------------------


def identity(datatype: str = "FP32", shape: str = "N,4") -> ModelProto:
    """x -> y. `shape` as in ONNX's text format: names are free dimensions, empty is a scalar."""
    tensor = f"{ONNX_TYPES[datatype]}[{shape}]" if shape else ONNX_TYPES[datatype]
    return parse(f"g ({tensor} x) => ({tensor} y) {{ y = Identity(x) }}")


def mlp(*widths: int, seed: int = 0) -> ModelProto:
    """x[N, first] -> y[N, last], dense layers with ReLU between them, e.g. mlp(16, 64, 64, 4)."""
    generator = np.random.default_rng(seed)
    nodes, weights, previous = [], [], "x"
    for layer, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        is_last = layer == len(widths) - 2
        weight = generator.standard_normal((wide, narrow), np.float32) / np.float32(np.sqrt(wide))
        weights += [
            numpy_helper.from_array(weight, f"w{layer}"),
            numpy_helper.from_array(np.zeros(narrow, np.float32), f"b{layer}"),
        ]
        nodes.append(helper.make_node("Gemm", [previous, f"w{layer}", f"b{layer}"], ["y" if is_last else f"h{layer}"]))
        previous = f"r{layer}"
        if not is_last:
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [previous]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", widths[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", widths[-1]])
    graph = helper.make_graph(nodes, "mlp", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def two_inputs_two_outputs() -> ModelProto:
    """a[N,3], b[N,3] -> sum[N,3], product[N,3]."""
    return parse("g (float[N,3] a, float[N,3] b) => (float[N,3] sum, float[N,3] product) { sum = Add(a, b) product = Mul(a, b) }")


def scalar_factor() -> ModelProto:
    """x[N,4], k (a scalar) -> y = x * k."""
    return parse("g (float[N,4] x, float k) => (float[N,4] y) { y = Mul(x, k) }")


def default_factor() -> ModelProto:
    """x[N,4] -> y = x * 2, where the 2 is an input that has an initializer (which ONNX lets callers override)."""
    return parse("g (float[N,4] x, float k = {2.0}) => (float[N,4] y) { y = Mul(x, k) }")


def optional_bias() -> ModelProto:
    """x[N,4], optional bias[N,4] -> y = x + bias, or x."""
    return parse("""
        g (float[N,4] x, optional(float[N,4]) bias) => (float[N,4] y) {
            has = OptionalHasElement(bias)
            y = If (has) <
                then_branch = present () => (float[N,4] shifted) { value = OptionalGetElement(bias) shifted = Add(x, value) },
                else_branch = absent () => (float[N,4] same) { same = Identity(x) }
            >
        }""")


def ragged(datatype: str = "FP32") -> ModelProto:
    """x[N,W] -> y[N,W], both free."""
    return identity(datatype, "N,W")


def ragged_conv() -> ModelProto:
    """x[N,1,W] -> y[N,1,V]: sums of three neighbours, stride 2."""
    return parse("""
        g (float[N,1,W] x) => (float[N,1,V] y) <float[1,1,3] k = {1, 1, 1}> {
            y = Conv <kernel_shape = [3], strides = [2]> (x, k)
        }""")


# -- strings and BF16 --------------------------------------------------------------------------------------------------


def strings_upper() -> ModelProto:
    """x[N] -> y[N], upper case. The operator's default locale, en_US.UTF-8, is not on every machine; this one is."""
    return parse('g (string[N] x) => (string[N] y) { y = StringNormalizer <case_change_action = "UPPER", locale = "C.UTF-8"> (x) }')


def strings_concat() -> ModelProto:
    """a[N,2], b[N,2] -> y[N,2]."""
    return parse("g (string[N,2] a, string[N,2] b) => (string[N,2] y) { y = StringConcat(a, b) }")


def strings_lookup() -> ModelProto:
    """x[N] -> y[N] INT64: 1 for 'yes', 2 for 'naïve', else -1."""
    return parse("""
        g (string[N] x) => (int64[N] y) {
            y = ai.onnx.ml.LabelEncoder <keys_strings = ["yes", "naïve"], values_int64s = [1, 2], default_int64 = -1> (x)
        }""")


def bfloat16_double() -> ModelProto:
    """x[N,4] BF16, k[N,4] FP32 -> y BF16 = x + k, z FP32 = x + k."""
    return parse("""
        g (bfloat16[N,4] x, float[N,4] k) => (bfloat16[N,4] y, float[N,4] z) {
            wide = Cast <to = 1> (x)
            z = Add(wide, k)
            y = Cast <to = 16> (z)
        }""")


def bfloat16_and_strings() -> ModelProto:
    """s[N] BYTES, x[N] BF16 -> t[N] BYTES, y[N] BF16."""
    return parse("g (string[N] s, bfloat16[N] x) => (string[N] t, bfloat16[N] y) { t = Identity(s) y = Identity(x) }")


# -- what limits batching ----------------------------------------------------------------------------------------------


def fixed_batch(size: int = 1) -> ModelProto:
    """x[size,4] -> y[size,4]."""
    return identity(shape=f"{size},4")


def state_carrier() -> ModelProto:
    """x[N,4], state[2,N,4] -> y[N,4], state_out[2,N,4]: its batch dimension is not the first one everywhere."""
    return parse("""
        g (float[N,4] x, float[2,N,4] state) => (float[N,4] y, float[2,N,4] state_out) {
            y = Identity(x)
            state_out = Add(state, x)
        }""")


def false_batch_axis() -> ModelProto:
    """x[N,4] -> y[M,2], M twice N: free first dimensions that are no batch dimension."""
    return parse("g (float[N,4] x) => (float[M,2] y) <int64[2] target = {-1, 2}> { y = Reshape(x, target) }")


def undeclared_output_shape() -> ModelProto:
    """x[N,4], target[2] -> y = x reshaped: neither the file nor shape inference knows y's rank."""
    model = parse("g (float[N,4] x, int64[R] target) => (float[N,4] y) { y = Reshape(x, target) }")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


# -- time and failure --------------------------------------------------------------------------------------------------


def slow(iterations: int = 20_000) -> ModelProto:
    """x[N,4] -> y[N,4] = x, after a loop of `iterations`: some 2 µs each, whatever the batch."""
    return parse(f"""
        g (float[N,4] x) => (float[N,4] y) <int64 count = {{{iterations}}}, bool go = {{1}}, float zero = {{0}}> {{
            y = Loop (count, go, x) <
                body = step (int64 i, bool on, float[N,4] before) => (bool still, float[N,4] after) {{
                    still = Identity(on)
                    after = Add(before, zero)
                }}
            >
        }}""")


def fails_on_large_index() -> ModelProto:
    """index[N] INT64 -> y[N] = a table of three values; any other index fails while it runs."""
    return parse("g (int64[N] index) => (float[N] y) <float[3] table = {10, 20, 30}> { y = Gather(table, index) }")


def square_root() -> ModelProto:
    """x[N,4] -> y[N,4]; NaN for negative values."""
    return parse("g (float[N,4] x) => (float[N,4] y) { y = Sqrt(x) }")


# -- artifacts that cannot be served, or are not one file --------------------------------------------------------------


def sequence_output() -> ModelProto:
    return parse("g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }")


def map_output() -> ModelProto:
    """What scikit-learn's converter makes of predict_proba unless told not to."""
    model = parse("g (float[N,2] x) => (float[N,2] y) { y = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1]> (x) }")
    key_value = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(key_value))
    return model


def float8() -> ModelProto:
    """A tensor type that the protocol has no name for."""
    return parse("g (float8e4m3fn[N] x) => (float8e4m3fn[N] y) { y = Identity(x) }")


def save_with_external_data(model: ModelProto, directory: Path, filename: str = "model.onnx") -> Path:
    """As `save`, the weights in `filename`.data beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / filename
    onnx.save_model(model, str(path), save_as_external_data=True, location=f"{filename}.data", size_threshold=0)
    return path
