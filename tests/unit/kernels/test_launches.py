from __future__ import annotations

import pytest
from headrace_kernels import launches
from headrace_kernels.launches import Launch, counter_copies
from headrace_kernels.normalize import Normalize
from headrace_kernels.sources import DATATYPES, kernel_names, source_of
from hypothesis import given
from hypothesis import strategies as st

GATHER = {"slab": 1, "table": 2, "into": 3}


def test_every_planned_kernel_is_one_of_the_sources() -> None:
    planned: list[Launch] = []
    for datatype in DATATYPES:
        planned += launches.gather(**GATHER, rows=3, width=5, source=datatype, target="float16")
        planned += launches.screen(values=1, datatype=datatype, rows=2, features=2, owners=3, by_feature=4)
        for features in (1, 100_000):
            planned += launches.histogram(values=1, datatype=datatype, rows=2, features=features, edges=2, edge_count=10, counts=3)
    for classes in (10, 10_000):
        planned += launches.softmax(scores=1, into=2, rows=2, classes=classes, datatype="bfloat16")
        planned += launches.topk(scores=1, values=2, indices=3, rows=2, classes=classes, k=5, softmax=True, datatype="float32")
    for size in (None, (3, 4)):
        planned += launches.normalize(images=1, into=2, rows=1, height=5, width=5, channels=3, normalize=Normalize(size=size))
    for launch in planned:
        assert launch.kernel in kernel_names()[source_of(launch.kernel)]


@given(rows=st.integers(1, 200_000), width=st.integers(1, 1 << 32), source=st.sampled_from(DATATYPES), target=st.sampled_from(DATATYPES))
def test_gather_has_threads_for_every_element(rows: int, width: int, source: str, target: str) -> None:
    (launch,) = launches.gather(**GATHER, rows=rows, width=width, source=source, target=target)
    vector = 16 // max(launches.ITEMSIZE[source], launches.ITEMSIZE[target])
    assert launch.grid[0] * launch.block[0] * launches.GATHER_UNROLL * vector >= width
    assert launch.block[0] >= 32 > vector  # head and tail are one element a thread
    assert launch.grid[1] <= 65_535


@given(rows=st.integers(1, 1 << 24), features=st.integers(1, 1 << 20), multiprocessors=st.integers(1, 200))
def test_screen_has_warps_for_every_row(rows: int, features: int, multiprocessors: int) -> None:
    *_, launch = launches.screen(
        values=1, datatype="int64", rows=rows, features=features, owners=2, by_request=3, requests=1, multiprocessors=multiprocessors
    )
    each = launch.arguments[-1].value  # type: ignore[union-attr]
    assert launch.grid[1] * launches.SCREEN_WARPS * each >= rows
    assert launch.grid[0] * 64 >= features
    assert launch.grid[1] <= 65_535


@given(features=st.integers(1, 1 << 20), edges=st.integers(0, 1 << 20))
def test_counters_have_as_many_copies_as_fit(features: int, edges: int) -> None:
    copies = counter_copies(features, edges)
    assert copies in (0, 1, 2, 4, 8, 16, 32)
    assert 4 * features * ((edges + 1) * copies + (edges if copies else 0)) <= launches.SHARED_LIMIT
    if copies == 0:
        assert 4 * features * (2 * edges + 1) > launches.SHARED_LIMIT


def test_nothing_to_do_is_no_launch() -> None:
    assert launches.gather(**GATHER, rows=0, width=5, source="int32", target="int32") == ()
    assert launches.histogram(values=1, datatype="float32", rows=0, features=3, edges=2, edge_count=1, counts=3) == ()
    assert launches.screen(values=1, datatype="float32", rows=3, features=3, owners=2) == ()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            lambda: launches.gather(**GATHER, rows=1, width=1, source="float64", target="int32"),
            "gather: expected source of .*, got float64",
        ),
        (
            lambda: launches.topk(scores=1, values=2, indices=3, rows=1, classes=4, k=5, softmax=False, datatype="float32"),
            "k of 1 to 4, got 5",
        ),
        (lambda: launches.softmax(scores=1, into=2, rows=1, classes=4, datatype="int32"), "softmax: expected datatype of .*, got int32"),
        (
            lambda: launches.normalize(images=1, into=2, rows=1, height=2, width=2, channels=5, normalize=Normalize()),
            "expected .* channels, got 5",
        ),
    ],
)
def test_what_a_kernel_does_not_take_is_refused(plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan()


def test_pad_is_the_bytes_of_the_target_type() -> None:
    assert launches.pad_bits(-1, "int64") == 2**64 - 1
    assert launches.pad_bits(2**53 + 1, "int64") == 2**53 + 1
    assert launches.pad_bits(1.0, "float16") == 0x3C00
    assert launches.pad_bits(1.0, "bfloat16") == 0x3F80
