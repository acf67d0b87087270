"""Trains examples/models/diabetes on data that comes with scikit-learn: `python examples/train_diabetes.py`.

A tabular model with two inputs, one of them strings: sex BYTES [N, 1] ("female" or "male"), measurements FP32 [N, 9] (age, bmi, bp,
six blood values, as measured) -> progression FP32 [N, 1], the disease's progression within a year. The last 100 of the 442
patients are held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper
from sklearn.datasets import load_diabetes
from sklearn.neural_network import MLPRegressor

HELD_OUT = 100
SEX_COLUMN = 1
SEXES = {"female": 1.0, "male": 2.0}
TARGET = Path(__file__).parent / "models" / "diabetes" / "1" / "model.onnx"


def load() -> tuple[np.ndarray, np.ndarray]:
    features, target = load_diabetes(return_X_y=True, scaled=False)
    return features, target


def train() -> tuple[MLPRegressor, np.ndarray, np.ndarray, float, float]:
    """(model of standardised features, their means and deviations, the target's mean and deviation)"""
    features, target = load()
    mean, deviation = features[:-HELD_OUT].mean(axis=0), features[:-HELD_OUT].std(axis=0)
    level, spread = float(target[:-HELD_OUT].mean()), float(target[:-HELD_OUT].std())
    model = MLPRegressor(hidden_layer_sizes=(8,), alpha=1.0, max_iter=2000, random_state=0)
    model.fit((features[:-HELD_OUT] - mean) / deviation, (target[:-HELD_OUT] - level) / spread)
    score = model.score((features[-HELD_OUT:] - mean) / deviation, (target[-HELD_OUT:] - level) / spread)
    print(f"R2 on the {HELD_OUT} held-out patients: {score:.3f}")
    return model, mean, deviation, level, spread


def export(model: MLPRegressor, mean: np.ndarray, deviation: np.ndarray, level: float, spread: float) -> ModelProto:
    (w1, w2), (b1, b2) = model.coefs_, model.intercepts_
    weights = {"mean": mean, "deviation": deviation, "w1": w1, "b1": b1, "w2": w2 * spread, "b2": b2 * spread + level}
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["sex"],
            ["sex_code"],
            domain="ai.onnx.ml",
            keys_strings=list(SEXES),
            values_floats=list(SEXES.values()),
            # An unknown string is as far from either as the mean is.
            default_float=float(mean[SEX_COLUMN]),
        ),
        helper.make_node("Split", ["measurements", "parts"], ["age", "others"], axis=1),
        helper.make_node("Concat", ["age", "sex_code", "others"], ["features"], axis=1),
        helper.make_node("Sub", ["features", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "deviation"], ["standard"]),
        helper.make_node("Gemm", ["standard", "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["progression"]),
    ]
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    constants.append(numpy_helper.from_array(np.array([1, 8]), "parts"))
    graph = helper.make_graph(
        nodes,
        "diabetes",
        [
            helper.make_tensor_value_info("sex", TensorProto.STRING, ["batch", 1]),
            helper.make_tensor_value_info("measurements", TensorProto.FLOAT, ["batch", 9]),
        ],
        [helper.make_tensor_value_info("progression", TensorProto.FLOAT, ["batch", 1])],
        constants,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="headrace")


if __name__ == "__main__":
    model = export(*train())
    checker.check_model(model)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(model.SerializeToString())
