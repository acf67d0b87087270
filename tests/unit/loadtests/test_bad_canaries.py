from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from loadtests.bad_canaries import Story, answer_nan, work_twice
from loadtests.models import make_mlp


def answers(model: ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]  # type: ignore[no-any-return]


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)


def test_nan_is_answered_for_one_class_and_for_no_other(x: np.ndarray) -> None:
    model = make_mlp()
    right = answers(model, x)
    got = answers(answer_nan(model, 2), x)
    is_bad = right.argmax(axis=1) == 2
    assert 0 < is_bad.sum() < len(x)
    assert np.isnan(got[is_bad]).all()
    np.testing.assert_array_equal(got[~is_bad], right[~is_bad])


def test_twice_the_work_gives_the_same_answers_and_stays_in_the_optimised_graph(x: np.ndarray, tmp_path: Path) -> None:
    model = make_mlp()
    twice = work_twice(model)
    np.testing.assert_allclose(answers(twice, x), answers(model, x), rtol=1e-6)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(twice.SerializeToString(), options, providers=["CPUExecutionProvider"])
    products = [node for node in onnx.load(tmp_path / "optimised.onnx").graph.node if "Gemm" in node.op_type]
    assert len(products) == 2 * sum(node.op_type == "Gemm" for node in model.graph.node)


def test_a_story_is_of_one_version(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    assert Story.of(path, 2).lines == []
    lines = [
        {"at": "t", "event": event, "version": version, "who": "server", "reason": "why"} for event, version in (("live", 2), ("live", 3))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    story = Story.of(path, 2)
    assert (len(story.lines), story.find("live"), story.find("rolled_back")) == (1, lines[0], None)
    assert "server" in str(story)
