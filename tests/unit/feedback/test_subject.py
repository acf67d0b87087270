from __future__ import annotations

import numpy as np
import pytest
from headrace.config import FeedbackConfig
from headrace.errors import ConfigError
from headrace.feedback.subject import UNNAMED, ClassNames, Kind, Subject, choose, predictions
from headrace.signature import DataType, Signature, TensorSpec
from scipy.special import softmax

SCORES = TensorSpec("scores", DataType.FP32, (-1, 3))
LABEL = TensorSpec("label", DataType.INT64, (-1,))
NUMBER = TensorSpec("price", DataType.FP32, (-1, 1))
IMAGE = TensorSpec("mask", DataType.FP32, (-1, 8, 8))
TEXT = TensorSpec("kind", DataType.BYTES, (-1, 1))


def chosen(*outputs: TensorSpec, labels: dict[str, tuple[str, ...]] | None = None, **config: str) -> Subject:
    return choose(Signature("m", (LABEL,), outputs, 8), FeedbackConfig(True, **config), labels or {})


@pytest.mark.parametrize(
    ("outputs", "config", "expected"),
    [
        ((LABEL, SCORES), {}, ("scores", Kind.SCORES)),
        ((LABEL,), {}, ("label", Kind.CLASS)),
        ((TEXT,), {}, ("kind", Kind.CLASS)),
        ((NUMBER,), {}, ("price", Kind.NUMBER)),
        ((NUMBER,), {"kind": "classification"}, ("price", Kind.CHANCE)),
        ((LABEL, SCORES), {"output": "label"}, ("label", Kind.CLASS)),
        ((LABEL,), {"kind": "regression"}, ("label", Kind.NUMBER)),
    ],
)
def test_the_output_and_what_it_is(outputs: tuple[TensorSpec, ...], config: dict[str, str], expected: tuple[str, Kind]) -> None:
    subject = chosen(*outputs, **config)
    assert (subject.output, subject.kind) == expected


def test_an_output_with_labels_comes_first_and_gives_the_names() -> None:
    subject = chosen(SCORES, LABEL, labels={"label": ("a", "b")})
    assert (subject.output, subject.names) == ("label", ("a", "b"))


@pytest.mark.parametrize(
    ("output", "kind", "text"),
    [
        (IMAGE, "auto", r"output 'mask': expected scores of classes, or one value a row, got FP32 \[-1,8,8\]"),
        (SCORES, "regression", "expected one number a row"),
        (TEXT, "regression", "expected one number a row"),
    ],
)
def test_what_an_output_cannot_be_is_said(output: TensorSpec, kind: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        chosen(output, kind=kind)


def found(subject: Subject, rows: np.ndarray) -> tuple[list[float], list[float]]:
    return predictions(subject, ClassNames(subject), rows)


def test_scores_name_their_class_and_how_sure_they_are() -> None:
    subject = chosen(SCORES)
    chances = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], np.float32)
    values, confidences = found(subject, chances)
    assert values == [1, 0]
    assert confidences == pytest.approx([0.7, 0.5])
    logits = np.array([[2.0, -1.0, 0.5], [1000.0, 0.0, 999.0]], np.float32)
    values, confidences = found(subject, logits)
    assert values == [0, 0]
    assert confidences == pytest.approx(softmax(logits.astype(float), axis=1).max(axis=1))
    assert found(subject, np.array([[np.nan, 0, 0]], np.float32))[1] == [-1.0]


def test_one_number_can_be_the_chance_of_class_one() -> None:
    values, confidences = found(chosen(NUMBER, kind="classification"), np.array([[0.9], [0.2]], np.float32))
    assert values == [1, 0]
    assert confidences == pytest.approx([0.9, 0.8])
    values, confidences = found(chosen(NUMBER, kind="classification"), np.array([[3.0], [-1.0]], np.float32))
    assert values == [1, 0]
    assert confidences == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))])


def test_what_comes_with_a_chance_does_not_make_it_a_logit() -> None:
    subject = chosen(NUMBER, kind="classification")
    values, confidences = found(subject, np.array([[0.3], [np.nan], [1.0000001]], np.float32))
    assert values == [0, UNNAMED, 1]
    assert confidences == pytest.approx([0.7, -1.0, 1.0])


def test_one_logit_says_that_all_of_a_version_are() -> None:
    subject = chosen(NUMBER, kind="classification")
    classes = ClassNames(subject)
    predictions(subject, classes, np.array([[5.0]], np.float32))
    assert predictions(subject, classes, np.array([[0.3]], np.float32))[0] == [1]


def test_classes_beyond_what_a_message_holds_have_no_name() -> None:
    subject = chosen(TensorSpec("label", DataType.UINT64, (-1,)))
    assert found(subject, np.array([[2**53 + 1], [2**64 - 1]], np.uint64))[0] == [2**53 + 1, UNNAMED]


def test_classes_as_integers_and_strings_have_no_confidence() -> None:
    assert found(chosen(LABEL), np.array([[3], [1]])) == ([3, 1], [-1, -1])
    subject = chosen(TEXT)
    classes = ClassNames(subject)
    assert predictions(subject, classes, np.array([[b"cat"], [b"dog"], [b"cat"]], object))[0] == [0, 1, 0]
    assert (classes.index("dog"), classes.name(1), classes.name(7)) == (1, "dog", "7")


def test_names_are_learnt_of_strings_only() -> None:
    classes = ClassNames(chosen(SCORES, labels={"scores": ("a", "b", "")}))
    assert (classes.index("b"), classes.index("nobody"), classes.name(2)) == (1, UNNAMED, "2")


def test_bf16_is_read_by_value() -> None:
    subject = chosen(TensorSpec("price", DataType.BF16, (-1, 1)))
    assert found(subject, np.array([[0x4000]], np.uint16)) == ([2.0], [])
