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


def add_one(model: ModelProto, *, is_large: bool) -> ModelProto:
    """To all its weights that take more, or less, than a few kB."""
    changed = ModelProto()
    changed.CopyFrom(model)
    found = [tensor for tensor in changed.graph.initializer if (len(tensor.SerializeToString()) > 4096) == is_large]
    assert found
    for tensor in found:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(1), tensor.name))
    return changed


def test_only_large_weights_make_no_difference_since_small_ones_may_be_shapes(tmp_path: Path) -> None:
    model = onnx_models.mlp(64, 64, 64)
    before = digest(tmp_path, model)
    assert digest(tmp_path, add_one(model, is_large=True)) == before
    assert digest(tmp_path, add_one(model, is_large=False)) != before


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
