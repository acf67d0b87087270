from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models
import pytest
from headrace.backends.onnx_graph import graph_digest
from onnx import ModelProto, numpy_helper


def digest(tmp_path: Path, model: ModelProto) -> str:
    return graph_digest(onnx_models.save(model, tmp_path / "m"))


def change(model: ModelProto, array: np.ndarray) -> tuple[ModelProto, ModelProto]:
    """The model with one more initializer, and the same with that one's elements changed."""
    pair = []
    for values in (array, array + array.dtype.type(1)):
        changed = ModelProto()
        changed.CopyFrom(model)
        changed.graph.initializer.append(numpy_helper.from_array(values, "another"))
        pair.append(changed)
    return pair[0], pair[1]


@pytest.mark.parametrize(
    ("array", "is_weights"),
    [
        (np.ones((64, 64), np.float32), True),
        (np.ones(64, np.float32), True),
        (np.ones(9, np.float64), True),
        (np.ones((64, 100), np.int8), True),
        (np.ones(4, np.float32), False),
        (np.array([1, 64], np.int64), False),
        (np.ones(64, np.int64), False),
    ],
)
def test_weights_make_no_difference_and_what_may_be_a_shape_or_a_scale_does(tmp_path: Path, array: np.ndarray, is_weights: bool) -> None:
    before, after = change(onnx_models.mlp(8, 4), array)
    assert (digest(tmp_path, before) == digest(tmp_path, after)) is is_weights


def test_a_model_trained_anew_has_the_same_graph(tmp_path: Path) -> None:
    assert digest(tmp_path, onnx_models.mlp(64, 32, 10, seed=1)) == digest(tmp_path, onnx_models.mlp(64, 32, 10, seed=2)) != ""


def test_nodes_names_and_shapes_count(tmp_path: Path) -> None:
    model = onnx_models.mlp(64, 64, 64)
    before = digest(tmp_path, model)
    model.graph.node[0].name = "another"
    assert digest(tmp_path, model) != before
    assert digest(tmp_path, onnx_models.mlp(64, 64, 32)) != before


@pytest.mark.parametrize("content", [b"", b"junk that is no protobuf at all", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 20])
def test_what_is_no_model_is_nobodys_equal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    found = graph_digest(tmp_path / "model.onnx")
    assert found == "" or found != digest(tmp_path, onnx_models.mlp(8, 4))
    assert graph_digest(tmp_path / "missing") == ""


def test_a_cut_model_is_nobodys_equal(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.mlp(64, 64), tmp_path / "m")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert graph_digest(path) == ""


def test_the_walk_reads_what_the_onnx_package_writes(tmp_path: Path) -> None:
    model = onnx_models.mlp(64, 64)
    model.metadata_props.append(onnx.StringStringEntryProto(key="author", value="anna"))
    before = digest(tmp_path, model)
    model.metadata_props[0].value = "bert"
    assert digest(tmp_path, model) not in ("", before)
