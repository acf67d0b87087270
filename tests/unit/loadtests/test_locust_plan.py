import numpy as np
import pytest

from loadtests.locust_plan import TensorMetadata, ramp, random_inputs, selected_shapes, spike


def test_free_sizes_are_filled_and_fixed_ones_kept() -> None:
    inputs = random_inputs([TensorMetadata("x", "FP32", (-1, 3, -1))], rows=4, free=7, rng=np.random.default_rng(1))
    assert inputs["x"].shape == (4, 3, 7)
    assert inputs["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("INT8", "int8"), ("UINT64", "uint64"), ("BOOL", "bool"), ("FP16", "float16"), ("BYTES", "O")]
)
def test_every_datatype_gets_values_that_it_holds(datatype: str, dtype: str) -> None:
    (array,) = random_inputs([TensorMetadata("x", datatype, (-1, 2))], rows=3, free=1, rng=np.random.default_rng(1)).values()
    assert array.dtype == np.dtype(dtype)
    assert array.shape == (3, 2)
    assert datatype == "BYTES" or int(array.max()) <= 127


def test_an_unknown_datatype_is_named() -> None:
    with pytest.raises(ValueError, match="input 'x': no rule to make up a FP128"):
        random_inputs([TensorMetadata("x", "FP128", (1,))], rows=1, free=1, rng=np.random.default_rng(1))


def test_a_ramp_rises_to_its_peak_holds_it_and_ends() -> None:
    users = [ramp(second, 40.0, 30) for second in range(41)]
    assert users[0] == 1
    assert users[15] == 15
    assert users[30:40] == [30] * 10
    assert users[40] is None


def test_a_spike_comes_once_and_leaves_what_there_was() -> None:
    assert [spike(second, 50.0, 40) for second in (0, 19, 20, 29, 30, 49, 50)] == [4, 4, 40, 40, 4, 4, None]


def test_a_small_peak_still_has_users() -> None:
    assert (ramp(0.0, 10.0, 1), spike(0.0, 10.0, 1)) == (1, 1)


@pytest.mark.parametrize(("text", "shapes"), [(None, set()), ("", set()), ("ramp", {"ramp"}), ("all", {"ramp", "spike"})])
def test_shapes_are_chosen_by_name(text: str | None, shapes: set[str]) -> None:
    assert selected_shapes(text) == shapes


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="expected ramp, spike or all, got 'wave'"):
        selected_shapes("wave")
