from __future__ import annotations

import pytest
from headrace.backends.tensorrt_profiles import Profile, ShapeRange, choose_profile, derive_profiles, split_batches
from headrace.errors import LoadError
from headrace.signature import DataType, TensorSpec

IMAGE = TensorSpec("image", DataType.FP32, (-1, 3, 224, 224))
IDS = TensorSpec("ids", DataType.INT64, (-1, -1))


@pytest.mark.parametrize(
    ("largest", "allowed", "expected"),
    [
        (0, (), []),
        (1, (), [(1, 1)]),
        (2, (), [(1, 1), (2, 2)]),
        (8, (), [(1, 1), (2, 8)]),
        (9, (), [(1, 1), (2, 8), (9, 9)]),
        (64, (), [(1, 1), (2, 8), (9, 32), (33, 64)]),
        (1024, (), [(1, 1), (2, 8), (9, 32), (33, 128), (129, 512), (513, 1024)]),
        (64, (1, 4, 8, 64), [(1, 1), (4, 8), (64, 64)]),
        (16, (16,), [(16, 16)]),
    ],
)
def test_batch_of_one_has_its_own_profile_and_larger_ones_share_by_fours(
    largest: int, allowed: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    assert split_batches(largest, allowed) == expected


@pytest.mark.parametrize("largest", [1, 2, 7, 8, 9, 31, 33, 64, 100, 513])
def test_every_batch_size_is_in_exactly_one_profile(largest: int) -> None:
    ranges = split_batches(largest)
    assert [size for least, most in ranges for size in range(least, most + 1)] == list(range(1, largest + 1))


def test_profiles_are_timed_at_their_largest_batch() -> None:
    profiles = derive_profiles([IMAGE], 8, (), {})
    assert profiles[1] == Profile({"image": ShapeRange((2, 3, 224, 224), (8, 3, 224, 224), (8, 3, 224, 224))}, 8)


def test_narrowest_profile_that_covers_a_batch_is_chosen() -> None:
    profiles = derive_profiles([IMAGE], 64, (), {})
    chosen = [choose_profile(profiles, {"image": (rows, 3, 224, 224)}) for rows in (1, 2, 8, 9, 64, 65)]
    assert chosen == [0, 1, 1, 2, 3, None]


def test_batch_of_another_length_fits_no_profile() -> None:
    profiles = derive_profiles([IDS], 8, (), {"profile.ids": "1;64;128"})
    assert choose_profile(profiles, {"ids": (2, 128)}) == 1
    assert choose_profile(profiles, {"ids": (2, 129)}) is None
    assert choose_profile(profiles, {"ids": (2, 128, 1)}) is None


def test_free_dimension_without_an_option_is_refused_with_what_to_write() -> None:
    with pytest.raises(LoadError, match=r"input 'ids' has free dimensions \[-1\].*\"profile.ids\" = \"1;128;512\""):
        derive_profiles([IDS], 8, (), {})


def test_dimensions_come_from_the_option() -> None:
    [profile] = derive_profiles([IDS], 0, (), {"profile.ids": "1x1;1x64;4x512"})
    assert profile == Profile({"ids": ShapeRange((1, 1), (1, 64), (4, 512))}, 0)


def test_one_shape_is_all_three() -> None:
    profiles = derive_profiles([IDS], 1, (), {"profile.ids": "77"})
    assert profiles == (Profile({"ids": ShapeRange((1, 77), (1, 77), (1, 77))}, 1),)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("1;2", "one shape, or three"),
        ("1x1;2x2;3x3", "1 dimensions"),
        ("4;2;8", "no dimension less"),
        ("0;2;8", "whole numbers from 1"),
        ("a;b;c", "whole numbers from 1"),
        ("", "whole numbers from 1"),
    ],
)
def test_option_that_does_not_fit_is_refused(option: str, reason: str) -> None:
    with pytest.raises(LoadError, match=f"option 'profile.ids': expected .*{reason}.*got '{option}'"):
        derive_profiles([IDS], 8, (), {"profile.ids": option})


def test_option_cannot_change_a_dimension_that_the_model_fixes() -> None:
    with pytest.raises(LoadError, match=r"the dimensions that the model fixes, \[3,224,224\]"):
        derive_profiles([IMAGE], 8, (), {"profile.image": "3x224x256"})


def test_option_for_an_unknown_input_is_refused() -> None:
    with pytest.raises(LoadError, match=r"option 'profile.idz': the model has no such input; it has ids"):
        derive_profiles([IDS], 8, (), {"profile.idz": "1;2;3", "profile.ids": "1;2;3"})
