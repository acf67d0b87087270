"""What [[preprocess]] and [[postprocess]] make of a signature, and where they contradict the artifact."""

from __future__ import annotations

import pytest
from headrace.backends.base import ArtifactSignature
from headrace.config_loading import parse_model_toml
from headrace.drift.features import Extract, Kind
from headrace.drift.plan import choose as choose_features
from headrace.errors import ConfigError, HeadraceError, InvalidRequest, LoadError
from headrace.feedback.subject import Kind as Prediction
from headrace.feedback.subject import choose as choose_prediction
from headrace.lifecycle.admission import make_ticket
from headrace.lifecycle.effective import EffectiveModel, resolve
from headrace.requests import InferRequest, InputTensor, Reply, RequestedOutput
from headrace.signature import DataType, TensorSpec
from headrace.testing import CollectingOutlet
from headrace_kernels.normalize import Normalize
from headrace_kernels.topk import Softmax, TopK

FP32, UINT8, INT32 = DataType.FP32, DataType.UINT8, DataType.INT32
LABELS = tuple("abcdefghij")


def artifact(
    image: tuple[int, ...] = (-1, 3, 224, 224),
    scores: tuple[int, ...] = (-1, 10),
    datatype: DataType = FP32,
    answers: DataType = FP32,
    extra: str = "embedding",
) -> ArtifactSignature:
    others = TensorSpec(extra, FP32, (-1, 64))
    return ArtifactSignature((TensorSpec("image", datatype, image),), (TensorSpec("scores", answers, scores), others))


def settle(toml: str, model: ArtifactSignature | None = None, labels: tuple[str, ...] = ()) -> EffectiveModel:
    config = parse_model_toml(toml.encode(), "m")
    names = {"scores": labels} if labels else {}
    return resolve(config, model or artifact(), backend="b", platform="p", filename="f", labels=names)


def images(**settings: object) -> str:
    lines = [f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in settings.items()]
    return "\n".join(["[[preprocess]]", 'input = "image"', *lines, ""])


SCALED = images(mean=1, deviation=0.5)
RESIZED = images(size=[224, 224])
TOP = '[[postprocess]]\noutput = "scores"\nsoftmax = true\ntop_k = 3\n'


# -- what clients see ------------------------------------------------------------------------------------------------------


def test_one_number_is_for_all_channels() -> None:
    step = settle(SCALED).processing.inputs["image"]
    assert (step.mean, step.deviation) == ((1.0,), (0.5,))


def test_clients_send_bytes_of_any_size_where_images_are_resized() -> None:
    effective = settle(RESIZED)
    assert effective.signature.inputs == (TensorSpec("image", UINT8, (-1, -1, -1, 3), max_pixels=1 << 24),)
    assert effective.artifact == artifact()
    assert effective.processing.inputs == {"image": Normalize(size=(224, 224))}
    assert effective.provenance["input.image"] == "model.toml [[preprocess]]"
    assert effective.notes == ("input 'image': resized to 224 x 224, antialiased; x * 0.00392157; FP32 [-1,3,224,224] NCHW to the model",)


@pytest.mark.parametrize(
    ("settings", "image", "seen"),
    [
        ({}, (-1, 3, 224, 200), (-1, 224, 200, 3)),
        ({"layout": "NHWC"}, (-1, 224, 200, 3), (-1, 224, 200, 3)),
        ({}, (1, 1, 8, 8), (1, 8, 8, 1)),
        ({"mean": [0.1, 0.2, 0.3]}, (-1, -1, 8, 8), (-1, 8, 8, 3)),
        ({"size": [8, 9]}, (-1, 3, -1, -1), (-1, -1, -1, 3)),
    ],
)
def test_the_layout_that_clients_send(settings: dict[str, object], image: tuple[int, ...], seen: tuple[int, ...]) -> None:
    spec = settle(images(**settings), artifact(image)).signature.inputs[0]
    assert (spec.datatype, spec.shape) == (UINT8, seen)


@pytest.mark.parametrize(("datatype", "name"), [(DataType.FP32, "float32"), (DataType.FP16, "float16"), (DataType.BF16, "bfloat16")])
def test_the_artifact_says_what_images_become(datatype: DataType, name: str) -> None:
    step = settle(RESIZED, artifact(datatype=datatype)).processing.inputs["image"]
    assert step.datatype == name


def test_the_largest_are_two_outputs() -> None:
    effective = settle(TOP)
    assert effective.signature.outputs[:2] == (
        TensorSpec("scores", FP32, (-1, 3), is_ranked=True),
        TensorSpec("scores_classes", INT32, (-1, 3), is_ranked=True),
    )
    assert [spec.name for spec in effective.signature.outputs] == ["scores", "scores_classes", "embedding"]
    assert effective.processing.outputs == {"scores": TopK(3, softmax=True)}
    assert effective.notes == ("output 'scores': softmax, the 3 largest and their classes",)
    assert effective.processing.visible_outputs(effective.output_names) == ["scores", "scores_classes", "embedding"]


@pytest.mark.parametrize("shape", [(-1, 10), (-1, 5, 10), (-1, -1)])
def test_softmax_keeps_the_shape(shape: tuple[int, ...]) -> None:
    effective = settle('[[postprocess]]\noutput = "scores"\nsoftmax = true\n', artifact(scores=shape, answers=DataType.FP16))
    assert effective.signature.outputs[0] == TensorSpec("scores", FP32, shape)
    assert effective.processing.outputs == {"scores": Softmax()}


def test_nothing_declared_changes_nothing() -> None:
    effective = settle("")
    assert effective.processing.is_empty
    assert (effective.signature.inputs, effective.signature.outputs) == (artifact().inputs, artifact().outputs)


# -- contradictions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "model", "text"),
    [
        (RESIZED, artifact((-1, 3, 224)), r"input 'image' of 'm': expected four dimensions.* got \[-1,3,224\]"),
        (RESIZED, artifact(datatype=DataType.INT64), "input 'image' of 'm': expected FP32, FP16 or BF16 in the model, got INT64"),
        (images(size=[96, 224]), artifact(), "size: expected 224 and 224, got 96 and 224"),
        (images(mean=[0.5, 0.5]), artifact(), "mean, deviation: expected one number, or 3, got 2"),
        (images(), artifact((-1, -1, 8, 8)), "expected a fixed number of channels, or a mean for each"),
        (images(channels="bgr"), artifact((-1, 1, 8, 8)), "channels 'bgr': expected 3 channels, got 1"),
        (TOP, artifact(scores=(-1, 2)), "output 'scores' of 'm': top_k: expected at most 2 classes, got 3"),
        (TOP, artifact(scores=(-1, -1)), r"expected \[rows, classes\] with a fixed number of classes; the model has \[-1,-1\]"),
        (TOP, artifact(scores=(-1, 4, 10)), r"expected \[rows, classes\].* \[-1,4,10\]"),
        (TOP.replace("top_k = 3", ""), artifact(scores=()), r"softmax: expected two dimensions or more.*; the model has \[\]"),
        (TOP.replace("top_k = 3", ""), artifact(scores=(-1,)), r"softmax: expected two dimensions or more"),
        (TOP, artifact(answers=DataType.INT64), "expected a floating output of the model, got INT64"),
        (TOP, artifact(extra="scores_classes"), "top_k: expected no output 'scores_classes' in the model, it has one"),
    ],
)  # fmt: skip
def test_what_contradicts_the_artifact_is_a_load_error(toml: str, model: ArtifactSignature, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        settle(toml, model)


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        ('[[preprocess]]\ninput = "imag"\n', r"\[\[preprocess\]\] input 'imag' is not in the model, did you mean 'image'\?"),
        (RESIZED + RESIZED, r"\[\[preprocess\]\] input 'image' is there twice"),
        ("[[preprocess]]\nsize = [2, 2]\n", r"m/model.toml \[\[preprocess\]\]: expected 'input', the name of one"),
        (images(sizes=[2, 2]), r"m/model.toml \[\[preprocess\]\]: unknown key 'sizes', did you mean 'size'\?"),
        (images(size=[2]), r"size: expected height and width, got \[2\]"),
        (images(size=[0, 2]), "size: expected at least 1, got 0"),
        (images(deviation=[0.0]), "deviation: expected numbers above 0"),
        (images(deviation=-1), "deviation: expected numbers above 0"),
        (images(channels="grb"), "channels: expected one of rgb, bgr, got 'grb'"),
        ('[[postprocess]]\noutput = "scores"\n', r"\[\[postprocess\]\]: expected softmax = true, top_k, or both"),
        ('[[postprocess]]\noutput = "score"\ntop_k = 1\n', "did you mean 'scores'"),
        ('[preprocess]\ninput = "image"\n', r"preprocess: expected tables \[\[preprocess\]\]"),
        (TOP + '[[output]]\nname = "scores"\nmonitor = "classes"\n', "monitor 'classes' and activation: expected neither beside top_k"),
        (TOP.replace("top_k = 3", "") + '[[output]]\nname = "scores"\nactivation = "logits"\n', "expected probabilities beside softmax"),
        (TOP + '[[output]]\nname = "scores_classes"\nshape = [4]\n', r"the model has shape \[-1,3\], the configuration says \[-1,4\]"),
        (TOP + '[capture]\nredact = ["score"]\n', "'score' is not in the model, did you mean 'scores'"),
    ],
)
def test_what_makes_no_sense_is_a_config_error_that_says_where(toml: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        settle(toml)


# -- beside what else model.toml says of the tensors --------------------------------------------------------------------------


def test_a_shape_in_model_toml_settles_what_the_artifact_leaves_free() -> None:
    effective = settle('[[output]]\nname = "scores"\nshape = [10]\n' + TOP, artifact(scores=(-1, -1)))
    assert effective.signature.outputs[0].shape == (-1, 3)


@pytest.mark.parametrize("name", ["scores", "scores_classes"])
def test_labels_go_with_the_classes(name: str) -> None:
    config = parse_model_toml(f'{TOP}[[output]]\nname = "{name}"\nlabels = "labels.txt"\n'.encode(), "m")
    effective = resolve(config, artifact(), backend="b", platform="p", filename="f", labels={name: LABELS})
    assert effective.labels == {"scores_classes": LABELS}
    assert {each.name: each.labels for each in effective.config.outputs} == {"scores": None, "scores_classes": "labels.txt"}


def test_what_is_redacted_of_scores_is_redacted_of_their_classes() -> None:
    assert settle(TOP + '[capture]\nredact = ["scores"]\n').config.capture.redact == ("scores", "scores_classes")
    assert settle(TOP + '[capture]\nredact = ["scores_classes"]\n').config.capture.redact == ("scores_classes",)


def test_drift_watches_what_clients_send_and_the_places_of_a_ranking() -> None:
    effective = settle(RESIZED + TOP, labels=LABELS)
    features = choose_features(effective.signature, effective.config, effective.labels).features
    found = {tensor: {each.extract for each in features if each.tensor == tensor} for tensor in ("image", "scores", "scores_classes")}
    assert Extract.SHARPNESS in found["image"]
    assert found["scores"] == found["scores_classes"] == {Extract.COLUMN}
    kinds = {each.tensor: each.kind for each in features if each.extract is Extract.COLUMN}
    assert kinds == {"scores": Kind.NUMERIC, "scores_classes": Kind.CATEGORICAL}


def test_what_is_said_of_drift_of_the_classes_holds() -> None:
    effective = settle(TOP + '[[output]]\nname = "scores_classes"\nmonitor = "off"\n')
    features = choose_features(effective.signature, effective.config, effective.labels).features
    assert "scores_classes" not in {each.tensor for each in features}


def test_softmax_says_that_scores_are_probabilities() -> None:
    effective = settle('[[postprocess]]\noutput = "scores"\nsoftmax = true\n')
    plan = choose_features(effective.signature, effective.config, effective.labels)
    assert {each.extract for each in plan.features if each.tensor == "scores"} >= {Extract.CLASS, Extract.CONFIDENCE}


@pytest.mark.parametrize("said", ["", '[feedback]\noutput = "scores"\n', '[feedback]\noutput = "scores_classes"\n'])
def test_labels_that_come_later_are_for_the_first_class(said: str) -> None:
    effective = settle(TOP + said, labels=LABELS)
    subject = choose_prediction(effective.signature, effective.config.feedback, effective.labels, effective.ranked)
    assert (subject.output, subject.kind, subject.names) == ("scores_classes", Prediction.CLASS, LABELS)


# -- requests ----------------------------------------------------------------------------------------------------------------


def request(*shape: int, outputs: list[RequestedOutput] | None = None) -> InferRequest:
    size = shape[0] * shape[1] * shape[2] * shape[3]
    return InferRequest("m", "", "", [InputTensor("image", "UINT8", shape, bytes(size))], outputs or [])


def test_images_of_different_sizes_do_not_share_a_batch() -> None:
    signature = settle(RESIZED).signature
    keys = [signature.validate(request(rows, height, 4, 3)).key for rows, height in ((1, 5), (2, 5), (1, 6))]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("sides", [(11, 10), (0, 5), (5, 0), (101, 1)])
def test_an_image_with_too_many_pixels_or_none_is_refused(sides: tuple[int, int]) -> None:
    signature = settle(images(size=[224, 224], max_pixels=100)).signature
    signature.validate(request(2, 10, 10, 3))
    with pytest.raises(InvalidRequest, match=f"'image' for model 'm': expected images of 1 to 100 pixels, got {sides[0]} x {sides[1]}"):
        signature.validate(request(1, *sides, 3))


@pytest.mark.parametrize("output", ["scores", "scores_classes"])
def test_the_classification_extension_says_what_to_ask_for(output: str) -> None:
    signature, wanted = settle(TOP + RESIZED).signature, [RequestedOutput(output, {"classification": 2})]
    with pytest.raises(HeadraceError, match="ask for the tensors 'scores' and 'scores_classes'"):
        make_ticket(signature, settle(TOP).batching, request(1, 4, 4, 3, outputs=wanted), Reply(CollectingOutlet()), 0.0)
