"""normalize's numpy definition against Pillow, scipy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from headrace_kernels import resize
from headrace_kernels.normalize import Normalize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import map_coordinates

Array = NDArray[Any]

SIDES = st.integers(1, 45)


def images(rows: int, height: int, width: int, channels: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, channels), dtype=np.uint8)


def resized(batch: Array, size: tuple[int, int], *, antialias: bool = True) -> Array:
    return Normalize(size=size, antialias=antialias, scale=1.0, layout="NHWC")(batch)


def by_pillow(image: Array, size: tuple[int, int]) -> Array:
    """In fp32, which Pillow does not round between its passes: one channel at a time."""
    planes = [Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR) for plane in image.transpose(2, 0, 1)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def by_scipy(image: Array, size: tuple[int, int]) -> Array:
    places = [np.clip((np.arange(n) + 0.5) * length / n - 0.5, 0, length - 1) for n, length in zip(size, image.shape[:2], strict=True)]
    grid = np.meshgrid(*places, indexing="ij")
    planes = [map_coordinates(image[..., c].astype(np.float64), grid, order=1, mode="nearest") for c in range(image.shape[2])]
    return np.stack(planes, axis=2)


@given(SIDES, SIDES, SIDES, SIDES, st.integers(1, 4), st.integers(0, 99))
def test_an_antialiased_resize_is_pillows(height: int, width: int, to_height: int, to_width: int, channels: int, seed: int) -> None:
    image = images(1, height, width, channels, seed)
    found = resized(image, (to_height, to_width))[0]
    np.testing.assert_allclose(found, by_pillow(image[0], (to_height, to_width)), rtol=0, atol=1e-3)


@given(SIDES, SIDES, SIDES, SIDES, st.integers(1, 4), st.integers(0, 99))
def test_a_resize_without_antialiasing_is_between_the_nearest_four(
    height: int, width: int, to_height: int, to_width: int, channels: int, seed: int
) -> None:
    image = images(1, height, width, channels, seed)
    found = resized(image, (to_height, to_width), antialias=False)[0]
    np.testing.assert_allclose(found, by_scipy(image[0], (to_height, to_width)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sides", [(375, 500), (1080, 1920), (99, 20_000), (20_000, 7), (1, 1), (224, 500), (500, 224)])
def test_photographs_and_pixels_in_a_row_are_resized_as_pillow_does(sides: tuple[int, int]) -> None:
    image = images(1, *sides, 3)
    np.testing.assert_allclose(resized(image, (224, 224))[0], by_pillow(image[0], (224, 224)), rtol=0, atol=2e-3)


def test_pillows_own_rounding_is_less_than_a_step_off() -> None:
    """What training pipelines see: bytes, rounded after each of two passes."""
    image = images(1, 333, 251, 3)
    bytes_of_pillow = np.asarray(Image.fromarray(image[0]).resize((64, 48), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(resized(image, (48, 64))[0] - bytes_of_pillow).max() <= 1.01


def test_no_product_is_large_enough_to_wake_the_threads_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def matmul(self, a: Array, b: Array, out: Array) -> None:
            sizes.append(a.size * b.shape[-1])
            np.matmul(a, b, out=out)

    monkeypatch.setattr(resize, "np", Numpy())
    resized(images(1, 1500, 2000, 3), (224, 224))
    assert sizes
    assert max(sizes) <= resize.MOST_PRODUCTS


@pytest.mark.parametrize("sides", [(1, 100_000), (100_000, 1)])
def test_what_lies_between_the_axes_is_no_larger_than_it_must_be(monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int]) -> None:
    class Scratch:
        def take(self, size: int) -> Array:
            assert size <= 3 * 224 * 100
            return np.empty((2, size), np.float32)

    monkeypatch.setattr(resize, "_scratch", Scratch())
    assert resized(images(1, *sides, 3), (224, 224)).shape == (1, 224, 224, 3)


# -- values ----------------------------------------------------------------------------------------------------------------

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def exactly(batch: Array, *, scale: float = 1 / 255, mean: Any = 0.0, deviation: Any = 1.0, reverse: bool = False) -> Array:
    """[rows, channels, height, width] in fp64."""
    planes = batch.astype(np.float64).transpose(0, 3, 1, 2)
    if reverse:
        planes = planes[:, ::-1]
    column = (-1, 1, 1)
    return (planes * scale - np.reshape(mean, column)) / np.reshape(deviation, column)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("deviation", [DEVIATION, (0.25,)])
def test_values_are_the_formulas(reverse: bool, deviation: tuple[float, ...]) -> None:
    batch = images(3, 5, 7, 3)
    found = Normalize(mean=MEAN, deviation=deviation, reverse_channels=reverse)(batch)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    # Of what is subtracted an ulp of 1 is left where it comes near 0.
    np.testing.assert_allclose(found, exactly(batch, mean=MEAN, deviation=deviation, reverse=reverse), rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize("size", [None, (6, 4)])
@pytest.mark.parametrize("datatype", ["float32", "float16", "bfloat16"])
def test_the_other_layout_has_the_same_values(size: tuple[int, int] | None, datatype: Any) -> None:
    batch, settings = images(2, 9, 5, 3), {"size": size, "mean": MEAN, "deviation": DEVIATION, "datatype": datatype}
    planes, pixels = Normalize(layout="NCHW", **settings)(batch), Normalize(layout="NHWC", **settings)(batch)
    np.testing.assert_array_equal(planes.transpose(0, 2, 3, 1), pixels)


def nearest(value: float, candidates: Array) -> int:
    """The place of the nearest, of two equally near ones the even. Past the largest number an infinity stands for the next one."""
    distances = np.abs(candidates - min(value, candidates[-1]))
    best = np.flatnonzero(distances == distances.min())
    return int(best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1])


BITS = np.arange(1 << 15, dtype=np.uint16)
"""The patterns of all numbers that are not negative, ascending."""


def fp16_numbers() -> Array:
    numbers = BITS[: 0x7C00 + 1].view(np.float16).astype(np.float64)
    return np.where(np.isinf(numbers), 2.0**16, numbers)


def bf16_numbers() -> Array:
    numbers = (BITS[: 0x7F80 + 1].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.where(np.isinf(numbers), 2.0**128, numbers)


@pytest.mark.parametrize(("datatype", "numbers"), [("float16", fp16_numbers()), ("bfloat16", bf16_numbers())])
@pytest.mark.parametrize(
    ("scale", "mean", "deviation"),
    [(1 / 255, 0.5, 0.3), (0.0123, 0.5, 0.2), (300.0, 0.5, 0.3), (-1e30, 0.0, 1e-9), (257 / 256, 0.0, 1.0), (-2049 / 2048, 0.0, 1.0)],
)
def test_narrow_types_are_rounded_to_the_nearest_even(datatype: Any, numbers: Array, scale: float, mean: float, deviation: float) -> None:
    """The last two have ties: 128.5 is between two numbers of bfloat16, and 2049/2048 between two of fp16."""
    batch, settings = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), {"scale": scale, "mean": (mean,), "deviation": (deviation,)}
    wide = Normalize(**settings)(batch).ravel()
    found = Normalize(**settings, datatype=datatype)(batch).ravel().view(np.uint16)
    expected = [nearest(abs(float(value)), numbers) | (0x8000 if np.signbit(value) else 0) for value in wide]
    assert found.tolist() == expected


@given(st.integers(1, 5), SIDES, SIDES, st.booleans())
def test_an_image_is_the_same_alone_and_among_others(rows: int, height: int, width: int, antialias: bool) -> None:
    step, batch = Normalize(size=(7, 9), antialias=antialias), images(rows, height, width, 3)
    together = step(batch)
    assert together.shape == step.result_shape(batch.shape) == (rows, 3, 7, 9)
    for row in range(rows):
        np.testing.assert_array_equal(step(batch[row : row + 1])[0], together[row])


def test_the_result_can_be_put_where_it_is_wanted() -> None:
    step, batch = Normalize(size=(2, 3), datatype="bfloat16"), images(2, 5, 4, 3)
    into = np.full((2, 3, 2, 3), 0xFFFF, np.uint16)
    assert step(batch, into) is into
    np.testing.assert_array_equal(into, step(batch))


def test_views_and_no_images_are_images_too() -> None:
    batch = images(4, 8, 10, 3)
    step = Normalize(size=(5, 5), mean=MEAN)
    np.testing.assert_array_equal(step(batch[::2, ::-1]), step(np.ascontiguousarray(batch[::2, ::-1])))
    assert step(batch[:0]).shape == (0, 3, 5, 5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"size": (0, 4)}, r"size: expected height and width, each at least 1, got \[0, 4\]"),
        ({"scale": float("nan")}, "scale: expected"),
        ({"mean": ()}, "mean: expected"),
        ({"mean": (float("inf"),)}, "mean: expected"),
        ({"mean": (1.0, 2.0), "deviation": (1.0, 2.0, 3.0)}, "deviation: expected as many numbers as mean has, 2, got 3"),
        ({"deviation": (1.0, 0.0)}, "deviation: expected numbers above 0"),
        ({"layout": "CHWN"}, "layout: expected one of NCHW, NHWC, got 'CHWN'"),
        ({"datatype": "float64"}, "datatype: expected one of"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Normalize(**settings)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (np.zeros((1, 2, 2, 3), np.float32), "got float32"),
        (np.zeros((2, 2, 3), np.uint8), r"got uint8 \[2, 2, 3\]"),
        (np.zeros((1, 2, 2, 4), np.uint8), r"expected uint8 \[rows, height, width, 3\], got uint8 \[1, 2, 2, 4\]"),
    ],
)
def test_what_is_no_image_is_refused(batch: Array, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Normalize(mean=MEAN)(batch)
