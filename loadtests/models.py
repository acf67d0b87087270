"""The models that are measured, and a repository folder of them: DIR/<model>/1/model.onnx.

    python -m loadtests.models DIR [--model NAME=FILE.onnx]...

always makes `mlp`, a perceptron of 16-64-64-4, so small that what is measured with it is the server and not the model.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MLP = "mlp"
MLP_WIDTHS = (16, 64, 64, 4)
REAL_MODELS = ("magika", "ocr_cls", "ocr_rec", "ocr_det", "silero_vad")


def make_mlp(seed: int = 20_241, widths: Sequence[int] = MLP_WIDTHS) -> onnx.ModelProto:
    """Input `x` [N, first width] to output `y` [N, last], FP32. The same seed gives the same weights on every machine."""
    rng = np.random.default_rng(seed)
    nodes, weights, value = [], [], "x"
    for layer, (taken, given) in enumerate(pairwise(widths)):
        is_last = layer == len(widths) - 2
        matrix = rng.standard_normal((taken, given)) / np.sqrt(taken)
        weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"w{layer}"))
        weights.append(numpy_helper.from_array(rng.standard_normal(given).astype(np.float32) * np.float32(0.1), f"b{layer}"))
        product = "y" if is_last else f"sum{layer}"
        nodes.append(helper.make_node("Gemm", [value, f"w{layer}", f"b{layer}"], [product]))
        if not is_last:
            value = f"relu{layer}"
            nodes.append(helper.make_node("Relu", [product], [value]))
    graph = helper.make_graph(
        nodes,
        MLP,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", widths[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", widths[-1]])],
        weights,
    )
    # Opset 17 and IR 8 are old enough for the ONNX Runtime of any peer.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def make_identity(shape: Sequence[int]) -> onnx.ModelProto:
    """Input `x` to output `y`, FP32, unchanged: what is measured with it is how tensors come and go."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_repository(directory: Path, models: Mapping[str, Path | None]) -> dict[str, Path]:
    """Lay out each model as version 1 (None: the generated mlp) and return where its file is."""
    placed = {}
    for name, source in models.items():
        path = directory / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            path.write_bytes(make_mlp().SerializeToString())
        else:
            shutil.copyfile(source, path)
        placed[name] = path
    return placed


def parse_models(arguments: list[str]) -> dict[str, Path | None]:
    """`NAME=FILE` or the bare `mlp`. Raises argparse's error, so that it is shown as wrong use."""
    models: dict[str, Path | None] = {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        if not file and name != MLP:
            raise argparse.ArgumentTypeError(f"model {argument!r}: expected NAME=FILE.onnx, or {MLP} for the generated one")
        if file and not Path(file).is_file():
            raise argparse.ArgumentTypeError(f"model {name!r}: no file {file}")
        models[name] = Path(file) if file else None
    return models


def add_models_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a model to measure, repeatable; `mlp` is generated (default: mlp)",
    )


def selected_models(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Path | None]:
    try:
        return parse_models(arguments.model or [MLP])
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(prog="loadtests.models", description="Make a model repository for measurements.")
    parser.add_argument("directory", type=Path)
    add_models_argument(parser)
    arguments = parser.parse_args()
    for name, path in write_repository(arguments.directory, {MLP: None, **selected_models(parser, arguments)}).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
