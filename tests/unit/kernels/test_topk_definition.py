"""topk's and softmax's numpy definitions against scipy and whole sorts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from headrace_kernels.topk import Softmax, TopK
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy.special import softmax

Array = NDArray[Any]
NAN, INF = math.nan, math.inf

FEW = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38])
"""So that there are ties."""
SCORES = st.tuples(st.integers(1, 4), st.integers(1, 40)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=st.one_of(FEW, st.floats(width=32)))
)


def by_sorting(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda c: (math.isnan(row[c]), 0 if math.isnan(row[c]) else -row[c], c))[:k]


@given(SCORES, st.data())
def test_the_largest_are_those_of_a_whole_sort(scores: Array, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, scores.shape[1]))
    values, classes = TopK(k)(scores)
    assert (values.dtype, classes.dtype, values.shape) == (np.float32, np.int32, (len(scores), k))
    assert values.flags.c_contiguous
    assert classes.flags.c_contiguous
    for row, found, of in zip(scores, values, classes, strict=True):
        assert of.tolist() == by_sorting(row.tolist(), k)
        np.testing.assert_array_equal(found, row[of])


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-200, 200, width=32)))
def test_softmax_is_scipys(scores: Array) -> None:
    expected = softmax(scores.astype(np.float64), axis=-1)
    np.testing.assert_allclose(Softmax()(scores), expected, rtol=2e-5, atol=1e-38)
    values, classes = TopK(1, softmax=True)(scores)
    np.testing.assert_allclose(values[:, 0], expected.max(axis=1), rtol=2e-5)
    np.testing.assert_array_equal(classes[:, 0], scores.argmax(axis=1))


def test_softmax_is_along_the_last_axis_of_any() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(Softmax()(scores), softmax(scores.astype(np.float64), axis=-1), rtol=1e-6)


@pytest.mark.parametrize("row", [[1.0, NAN], [INF, 1.0], [-INF, -INF]])
def test_what_softmax_has_no_answer_for_is_nan(row: list[float]) -> None:
    with np.errstate(invalid="ignore"):
        assert np.isnan(softmax(np.array([row]), axis=-1)).all()
    assert np.isnan(Softmax()(np.array([row, [0.0, 0.0]], np.float32))).tolist() == [[True, True], [False, False]]


def test_the_order_is_that_of_scores_also_where_probabilities_are_equal() -> None:
    values, classes = TopK(3, softmax=True)(np.array([[-500.0, 0.0, -400.0]], np.float32))
    assert values.tolist() == [[1.0, 0.0, 0.0]]
    assert classes.tolist() == [[1, 2, 0]]


WIDE = np.random.default_rng(1).normal(scale=9, size=(5, 17)).astype(np.float16).astype(np.float32)
WIDE.view(np.uint32)[...] &= 0xFFFF0000  # so that every type holds them


@pytest.mark.parametrize("scores", [WIDE.astype(np.float16), (WIDE.view(np.uint32) >> 16).astype(np.uint16), WIDE.astype(np.float64)])
def test_scores_of_every_floating_type(scores: Array) -> None:
    for step in (TopK(4), TopK(4, softmax=True)):
        for found, expected in zip(step(scores), step(WIDE), strict=True):
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(Softmax()(scores), Softmax()(WIDE))


def test_scores_are_not_written_to() -> None:
    scores = np.array([[3.0, -0.0, NAN]], np.float32)
    scores.flags.writeable = False
    TopK(2, softmax=True)(scores)
    assert Softmax()(scores) is not scores


def test_no_rows_have_no_largest() -> None:
    values, classes = TopK(2, softmax=True)(np.zeros((0, 5), np.float32))
    assert values.shape == classes.shape == (0, 2)
    assert Softmax()(np.zeros((0, 5), np.float32)).shape == (0, 5)


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected \[rows, 3 classes or more\], got \[1, 2\]"):
        TopK(3)(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        TopK(0)
