from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2

from loadtests.calls import TOLERANCE, Arrays, difference
from loadtests.models import make_mlp
from loadtests.variants import APART, INPUTS, Answers, Verdict, answers_of, disturb, make_variants, variant_of


def encoded(answer: Arrays) -> bytes:
    response = service_pb2.ModelInferResponse(model_name="m")
    for name, array in answer.items():
        response.outputs.add(name=name, datatype="FP32", shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return bytes(response.SerializeToString())


def two_answers() -> Answers:
    ones = np.ones((1, 4), np.float32)
    return Answers("m", [b""], [[{"y": ones}], [{"y": ones * 2}]])


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, list[Path]]:
    folder = tmp_path_factory.mktemp("variants")
    (folder / "mlp.onnx").write_bytes(make_mlp().SerializeToString())
    return make_variants("mlp", folder / "mlp.onnx", folder, seed=1)


def test_every_input_tells_the_variants_apart(variants: tuple[Answers, list[Path]]) -> None:
    answers, _ = variants
    assert len(answers.messages) == INPUTS
    for a, b in zip(*answers.variants, strict=True):
        assert difference(b, a) > APART


def test_variants_differ_in_their_weights_alone(variants: tuple[Answers, list[Path]]) -> None:
    a, b = (onnx.load(str(path)) for path in variants[1])
    assert a.graph.node == b.graph.node
    changed = {x.name for x, y in zip(a.graph.initializer, b.graph.initializer, strict=True) if x != y}
    assert changed == {"w0", "w1", "w2"}


def test_the_first_variant_is_the_model_itself(variants: tuple[Answers, list[Path]]) -> None:
    assert onnx.load(str(variants[1][0])) == make_mlp()


def test_the_same_seed_disturbs_alike() -> None:
    models = [make_mlp() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        disturb(model, 0.1, seed)
    assert models[0] == models[1] != models[2]


def test_weights_in_constant_nodes_are_disturbed_and_vectors_are_not() -> None:
    tensors = [numpy_helper.from_array(np.ones(shape, np.float32), "t") for shape in ((4,), (2, 2))]
    nodes = [helper.make_node("Constant", [], [name], value=tensor) for name, tensor in zip("vw", tensors, strict=True)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2])]))
    assert disturb(model, 0.5, seed=1) == 1
    vector, matrix = (numpy_helper.to_array(node.attribute[0].t) for node in model.graph.node)
    assert np.all(vector == 1.0)
    assert not np.any(matrix == 1.0)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", 1, ["N", 2])])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph, ir_version=8).SerializeToString())
    with pytest.raises(ValueError, match="found none to disturb"):
        make_variants("m", tmp_path / "m.onnx", tmp_path, seed=1)


def test_versions_alternate_between_the_variants() -> None:
    assert [variant_of(version) for version in (1, 2, 3, 4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("version", "factor", "verdict"),
    [
        (1, 1.0, Verdict.EQUAL),
        (2, 2.0, Verdict.EQUAL),
        (3, 1.0 + TOLERANCE, Verdict.CLOSE),
        (2, 1.0, Verdict.OTHER),
        (1, 2.0, Verdict.OTHER),
        (1, 1.5, Verdict.WRONG),
    ],
)
def test_an_answer_is_judged_by_the_version_that_it_names(version: int, factor: float, verdict: Verdict) -> None:
    answer = {"y": np.full((1, 4), factor, np.float32)}
    assert two_answers().judge(version, 0, encoded(answer)) is verdict


def test_a_model_that_stays_has_one_answer_for_every_version(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(make_mlp().SerializeToString())
    answers = answers_of("m", tmp_path / "m.onnx", seed=1)
    right = encoded(answers.variants[0][5])
    assert [answers.judge(version, 5, right) for version in (1, 2)] == [Verdict.EQUAL, Verdict.EQUAL]
    assert answers.judge(1, 6, right) is Verdict.WRONG
