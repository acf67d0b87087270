"""Trains examples/models/digits and digits_image on the handwritten digits that come with scikit-learn: `python examples/train_digits.py`.

image FP32 [N, 64] (8x8 pixels, 0 to 16) -> label INT64 [N], probabilities FP32 [N, 10]. The last 297 of the 1,797 images are held
out; client.py shows what the served model makes of them. The same versions of scikit-learn and numpy give the same file.

digits_image has the same weights, and takes and gives what a vision model does: image FP32 [N, 1, 8, 8] (0 to 1) -> scores FP32 [N, 10].
Its model.toml makes pictures of any size into that, and the three most probable digits of the scores; classify_image.py asks it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

HELD_OUT = 297
MODELS = Path(__file__).parent / "models"


def train() -> MLPClassifier:
    images, labels = load_digits(return_X_y=True)
    model = MLPClassifier(hidden_layer_sizes=(64,), max_iter=400, random_state=0, alpha=1e-3)
    model.fit(images[:-HELD_OUT] / 16, labels[:-HELD_OUT])
    print(f"accuracy on the {HELD_OUT} held-out images: {model.score(images[-HELD_OUT:] / 16, labels[-HELD_OUT:]):.3f}")
    return model


def export(model: MLPClassifier) -> ModelProto:
    """Scaling, the two layers, softmax and the most probable class, in plain ONNX operators."""
    (w1, w2), (b1, b2) = model.coefs_, model.intercepts_
    weights = {"scale": np.array(16), "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    nodes = [
        helper.make_node("Div", ["image", "scale"], ["scaled"]),
        helper.make_node("Gemm", ["scaled", "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 64])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10]),
        ],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="headrace")


def export_for_images(model: MLPClassifier) -> ModelProto:
    (w1, w2), (b1, b2) = model.coefs_, model.intercepts_
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    nodes = [
        helper.make_node("Flatten", ["image"], ["pixels"]),
        helper.make_node("Gemm", ["pixels", "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "digits_image",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="headrace")


def save(model: ModelProto, name: str) -> None:
    checker.check_model(model)
    target = MODELS / name / "1" / "model.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    trained = train()
    save(export(trained), "digits")
    save(export_for_images(trained), "digits_image")
