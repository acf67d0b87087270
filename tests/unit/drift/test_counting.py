from __future__ import annotations

import numpy as np
import pytest
from headrace.config import DriftConfig, ModelConfig, TensorConfig
from headrace.drift.building import ReferenceBuilder, cut, from_counts
from headrace.drift.counting import QUALITY, BatchCounter, Layout
from headrace.drift.extraction import numbers
from headrace.drift.features import Extract, Feature, Kind, Side
from headrace.drift.plan import choose, settle
from headrace.drift.reference import FeatureReference, Reference
from headrace.drift.reference_file import check_fits, decode, encode
from headrace.errors import ConfigError, LoadError
from headrace.signature import DataType, Signature, TensorSpec
from headrace_kernels import histogram
from hypothesis import given
from hypothesis import strategies as st

RANDOM = np.random.default_rng(3)
SIGNATURE = Signature(
    "m",
    (TensorSpec("x", DataType.FP32, (-1, 4)), TensorSpec("kind", DataType.BYTES, (-1, 1))),
    (TensorSpec("scores", DataType.FP32, (-1, 3)),),
    8,
)


def batch(rows: int, shift: float = 0.0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    x = (RANDOM.normal(shift, 1, (rows, 4))).astype(np.float32)
    kind = RANDOM.choice(np.array([b"a", b"b"], object), (rows, 1))
    return {"x": x, "kind": kind}, {"scores": RANDOM.dirichlet(np.ones(3), rows).astype(np.float32)}, rows


@pytest.fixture(scope="module")
def reference() -> Reference:
    builder = ReferenceBuilder("m", choose(SIGNATURE, ModelConfig("m")), bins=10)
    for _ in range(10):
        builder.add(*batch(200))
    return builder.build("profile")


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(floats, max_size=40), st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8, unique=True))
def test_a_value_is_in_the_bin_of_as_many_edges_as_are_less(values: list[float], cuts: list[float]) -> None:
    edges = np.array([sorted(cuts)], np.float32)
    expected = [0] * (len(cuts) + 1)
    for value in values:
        if np.isfinite(value):
            expected[sum(edge < np.float32(value) for edge in edges[0])] += 1
    column = np.array(values, np.float32).reshape(-1, 1)
    assert histogram.count_columns(column, edges)[0].tolist() == expected


def test_searching_and_comparing_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RANDOM.normal(size=(300, 5))
    values[RANDOM.random((300, 5)) < 0.1] = np.nan
    edges = np.sort(RANDOM.normal(size=(5, 9)), axis=1)
    compared = histogram.count_columns(values, edges)
    monkeypatch.setattr(histogram, "FEW", 0)
    assert (histogram.count_columns(values, edges) == compared).all()


def test_a_reference_counts_its_own_data_as_it_says(reference: Reference) -> None:
    builder = ReferenceBuilder("m", choose(SIGNATURE, ModelConfig("m")), bins=10)
    data = batch(1000)
    builder.add(*data)
    made = builder.build("profile")
    counts, layout = BatchCounter(made).count(*data), Layout(made)
    for index, each in enumerate(made.features):
        assert tuple(layout.bins(counts, index)) == each.counts
        assert not layout.quality(counts, index).any()
        if each.is_numeric:
            assert counts.sums[index] / 1000 == pytest.approx(each.mean)
    assert counts.correct / counts.judged == pytest.approx(data[1]["scores"].max(axis=1).mean(), rel=1e-6)


def test_what_is_wrong_with_values_is_counted_apart(reference: Reference) -> None:
    inputs, outputs, rows = batch(6)
    inputs["x"][:, 0] = [np.nan, np.inf, -np.inf, 9.0, -9.0, 1e9]
    inputs["kind"][:, 0] = [b"", b"c", b"a", b"a", b"b", b"\xff"]
    counts, layout = BatchCounter(reference).count(inputs, outputs, rows), Layout(reference)
    index = {each.feature.title: position for position, each in enumerate(reference.features)}
    quality = dict(zip(QUALITY, layout.quality(counts, index["x.0"]).tolist(), strict=True))
    assert quality == {"missing": 1, "infinite": 2, "below": 1, "above": 2, "off_scale": 1}
    assert layout.bins(counts, index["x.0"]).sum() == 3
    assert layout.bins(counts, index["kind.value"]).tolist() == [2, 1, 2]
    assert layout.quality(counts, index["kind.value"])[0] == 1


def test_tensors_that_a_batch_does_not_have_count_nothing(reference: Reference) -> None:
    inputs, _, rows = batch(5)
    counts, layout = BatchCounter(reference).count({"x": inputs["x"]}, {}, rows), Layout(reference)
    counted = {each.feature.title for i, each in enumerate(reference.features) if layout.bins(counts, i).any()}
    assert counted == {"x.0", "x.1", "x.2", "x.3"}
    assert counts.judged == 0


def test_rows_of_probabilities_are_watched_as_classes_and_others_as_numbers() -> None:
    plan = choose(SIGNATURE, ModelConfig("m"))
    assert [each.spec.name for each in plan.undecided] == ["scores"]
    inputs, outputs, rows = batch(200)
    for scores, names in [(outputs["scores"], ["class", "confidence", "entropy", "margin"]), (outputs["scores"] * 3, ["0", "1", "2"])]:
        builder = ReferenceBuilder("m", plan, bins=10)
        builder.add(inputs, {"scores": scores}, rows)
        made = builder.build("learnt")
        assert [each.feature.name for each in made.features if each.feature.tensor == "scores"] == names
        assert plan.watches_the_same([each.feature for each in made.features])


def test_integers_of_few_kinds_are_categories_and_constants_notice_change() -> None:
    signature = Signature("m", (TensorSpec("x", DataType.INT32, (-1, 3)),), (), 8)
    builder = ReferenceBuilder("m", choose(signature, ModelConfig("m")), bins=10)
    x = np.stack([RANDOM.integers(0, 4, 500), RANDOM.integers(0, 10**6, 500), np.full(500, 7)], axis=1).astype(np.int32)
    builder.add({"x": x}, {}, 500)
    made = builder.build("profile")
    assert [each.feature.kind for each in made.features] == [Kind.CATEGORICAL, Kind.NUMERIC, Kind.CATEGORICAL]
    assert made.features[0].categories == ("0", "1", "2", "3")
    assert len(made.features[1].counts) == 10
    assert max(made.features[1].counts) - min(made.features[1].counts) <= 2
    floats = Signature("m", (TensorSpec("x", DataType.FP32, (-1, 1)),), (), 8)
    builder = ReferenceBuilder("m", choose(floats, ModelConfig("m")), bins=10)
    builder.add({"x": np.full((100, 1), 0.1, np.float32)}, {}, 100)
    made = builder.build("profile")
    counts = BatchCounter(made).count({"x": np.nextafter(np.float32([[0.1], [0.1], [0.1]]), np.float32([[0], [0.1], [1]]))}, {}, 3)
    assert Layout(made).bins(counts, 0).tolist() == [1, 1, 1]


def test_a_wide_row_is_summed_up_and_what_is_left_out_is_said() -> None:
    signature = Signature("m", (TensorSpec("x", DataType.FP32, (-1, 100)), TensorSpec("y", DataType.FP32, (-1, 3, 16, 16))), (), 8)
    plan = choose(signature, ModelConfig("m", drift=DriftConfig(max_features=20)))
    of_x = [each.name for each in plan.features if each.tensor == "x"]
    assert len(of_x) == 20
    assert of_x[:5] == ["mean", "deviation", "minimum", "maximum", "norm"]
    assert plan.left_out == ("input 'x': 93 of 100 columns; max_features in [drift]",)
    assert [each.name for each in plan.features if each.tensor == "y"][-1] == "sharpness[2]"


def test_column_names_must_be_as_many_as_there_are_columns() -> None:
    config = ModelConfig("m", inputs=(TensorConfig("x", columns=("a", "b")),))
    with pytest.raises(ConfigError, match=r"input 'x': columns: expected 4 names for \[-1,4\], got 2"):
        choose(SIGNATURE, config)


def test_a_reference_comes_back_from_its_file(reference: Reference) -> None:
    data = encode(reference)
    back = decode(data)
    assert back.digest
    assert {**vars_of(back), "digest": ""} == vars_of(reference)
    check_fits(back, SIGNATURE)


def vars_of(reference: Reference) -> dict[str, object]:
    return {name: getattr(reference, name) for name in reference.__slots__}


@given(st.binary(max_size=200))
def test_what_is_no_reference_is_refused(data: bytes) -> None:
    with pytest.raises(LoadError, match=r"drift\.msgpack"):
        decode(data)


def test_a_damaged_reference_is_refused_or_can_be_counted_with(reference: Reference) -> None:
    data, rows = bytearray(encode(reference)), batch(3)
    for position in RANDOM.integers(0, len(data), 400):
        changed = data.copy()
        changed[position] ^= 1 << int(RANDOM.integers(8))
        try:
            decoded = decode(bytes(changed))
            check_fits(decoded, SIGNATURE)
        except LoadError:
            continue
        BatchCounter(decoded).count(*rows)


def test_a_reference_of_another_model_is_refused(reference: Reference) -> None:
    other = Signature("n", (TensorSpec("z", DataType.FP32, (-1, 4)),), (), 8)
    with pytest.raises(LoadError, match="input 'x' is not in model 'n', which has z"):
        check_fits(reference, other)


def test_live_counts_are_a_reference_for_the_next_version(reference: Reference) -> None:
    counts = BatchCounter(reference).count(*batch(500, shift=1.0))
    made = from_counts(reference, counts, "version 3")
    assert (made.source, made.rows) == ("version 3", 500)
    assert made.features[0].edges == reference.features[0].edges
    assert made.features[0].mean == pytest.approx(1.0, abs=0.2)
    assert sum(made.features[0].counts) == 500


@pytest.mark.parametrize(
    ("shape", "extract", "index"),
    [
        ((-1, 3, 16, 16), Extract.MEAN, 3),
        ((-1, 4), Extract.MEAN, 5),
        ((-1, 4), Extract.COLUMN, 4),
        ((-1, -1), Extract.COLUMN, 7),
        ((-1, -1), Extract.PROJECTION, 0),
        ((-1, 4), Extract.CONFIDENCE, -1),
    ],
)
def test_a_feature_that_rows_do_not_have_is_refused(shape: tuple[int, ...], extract: Extract, index: int) -> None:
    feature = FeatureReference(Feature(Side.INPUT, "x", "f", Kind.NUMERIC, extract, index), (0.0,), (), (1, 1))
    signature = Signature("m", (TensorSpec("x", DataType.FP32, shape),), (), 8)
    with pytest.raises(LoadError, match=r"input feature 'x\.f': "):
        check_fits(Reference("m", "profile", 2, (feature,)), signature)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 30), (3, 40), (16, 16), (30, 2)])
def test_features_of_a_picture_of_any_size_are_of_its_channels(size: tuple[int, int]) -> None:
    """As [[preprocess]] has clients send them: channels last."""
    pictures = RANDOM.integers(0, 256, (4, *size, 3)).astype(np.uint8)
    features = [Feature(Side.INPUT, "x", f"mean[{channel}]", Kind.NUMERIC, Extract.MEAN, channel) for channel in range(3)]
    np.testing.assert_allclose(numbers(pictures, features), pictures.reshape(4, -1, 3).mean(axis=1), rtol=1e-6)


def test_an_input_and_an_output_of_one_name_are_two_tensors() -> None:
    signature = Signature("m", (TensorSpec("x", DataType.BYTES, (-1, 1)),), (TensorSpec("x", DataType.FP32, (-1, 4)),), 8)
    feature = Feature(Side.OUTPUT, "x", "3", Kind.NUMERIC, Extract.COLUMN, 3)
    check_fits(Reference("m", "profile", 2, (FeatureReference(feature, (0.0,), (), (1, 1)),)), signature)


@pytest.mark.parametrize("share", [0.3, 0.85, 0.95, 0.99])
def test_values_that_pile_up_at_the_end_have_a_range_to_themselves(share: float) -> None:
    """A confidence that saturates: fewer of them is what has to be seen."""
    values = np.where(RANDOM.random(10_000) < share, 1.0, RANDOM.uniform(0.5, 1, 10_000)).astype(np.float32)
    edges = cut(values, 10, values.dtype)
    assert np.searchsorted(edges, [1.0])[0] == len(edges)
    assert (values > edges[-1]).sum() == (values == 1.0).sum()
    assert len(edges) <= 11


def test_edges_divide_values_evenly() -> None:
    edges = cut(RANDOM.normal(size=10_000), 10, np.dtype(np.float64))
    assert len(edges) == 9
    assert edges[4] == pytest.approx(0.0, abs=0.05)


def test_every_bin_has_a_name_of_its_own() -> None:
    builder = ReferenceBuilder("m", choose(Signature("m", (TensorSpec("x", DataType.FP32, (-1, 1)),), (), 8), ModelConfig("m")), bins=10)
    builder.add({"x": np.full((100, 1), 7, np.float32)}, {}, 100)
    labels = builder.build("profile").features[0].labels
    assert len(set(labels)) == len(labels) == 3


def test_one_row_that_adds_up_to_1_does_not_make_classes() -> None:
    plan = choose(SIGNATURE, ModelConfig("m"))
    one = settle(plan, {"scores": np.array([[0, 1, 0]], np.float32)})
    assert one.undecided == plan.undecided
    many = RANDOM.dirichlet(np.ones(3), 40).astype(np.float32)
    many[0] = np.nan
    assert [each.name for each in settle(plan, {"scores": many}).features][-1] == "margin"
