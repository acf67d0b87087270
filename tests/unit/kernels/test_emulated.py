"""The kernels' own code, run thread by thread on the CPU with the launches that a GPU would get, against their definitions.

It shows that the logic is right in any order of threads. It cannot show what only a GPU has: real concurrency, its conversion
instructions, its expf and its division.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from emulated_kernels import Emulator
from headrace_kernels import launches
from headrace_kernels.device import normalize_tolerance
from headrace_kernels.gather import gather, row_table
from headrace_kernels.histogram import count_columns
from headrace_kernels.normalize import Normalize
from headrace_kernels.screen import RECORD, screen, sum_tolerance
from headrace_kernels.sources import DATATYPES, FLOATS, ITEMSIZE
from headrace_kernels.topk import Softmax, TopK
from kernel_cases import guarded, near, normalized, numbers, poisoned, same, slab_of, storage

ORDERS = (0, 1, 7)


@pytest.fixture
def generator() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def run_gather(emulator: Emulator, slab, table, width: int, source: str, target: str, pad: float, with_mask: bool, skew: int = 0):
    rows = len(table)
    # `skew`: elements by which the batch begins beside a 16-byte boundary.
    whole, around = poisoned(rows * width + skew, storage(target))
    mask, mask_around = poisoned((rows, width), storage(target))
    planned = launches.gather(
        slab=slab.ctypes.data,
        table=table.ctypes.data,
        into=whole.ctypes.data + skew * ITEMSIZE[target],
        rows=rows,
        width=width,
        source=source,
        target=target,
        pad=pad,
        mask=mask.ctypes.data if with_mask else 0,
    )
    emulator.run(planned, order=7)
    assert guarded(around)
    assert guarded(mask_around)
    return whole[skew:].reshape(rows, width), mask


@pytest.mark.parametrize(("source", "target"), product(DATATYPES, DATATYPES))
def test_gather_casts_every_type_to_every_other(emulator: Emulator, generator: np.random.Generator, source: str, target: str) -> None:
    width = int(generator.integers(1, 200))
    requests = [numbers(generator, (int(generator.integers(1, 4)), width), source) for _ in range(3)]
    slab, offsets = slab_of(generator, requests, ITEMSIZE[source])
    counts = [len(request) for request in requests]
    table = row_table(offsets, counts, width, ITEMSIZE[source], sum(counts) + 2)
    result, _ = run_gather(emulator, slab, table, width, source, target, pad=0, with_mask=False)
    expected, _ = gather(slab, table, width, source, target)
    same(result, expected, target)
    same(result[-2:], np.repeat(expected[:1], 2, axis=0), target)


@pytest.mark.parametrize(("source", "target"), [("int64", "int64"), ("int32", "int64"), ("uint8", "uint8"), ("float16", "float32")])
@pytest.mark.parametrize("skew", [0, 1])
def test_ragged_rows_are_padded_and_masked(
    emulator: Emulator, generator: np.random.Generator, source: str, target: str, skew: int
) -> None:
    for width in (1, 15, 16, 17, 4099):
        rows = [numbers(generator, (int(length),), source) for length in (0, width, *generator.integers(0, width + 3, 4))]
        slab, offsets = slab_of(generator, rows, ITEMSIZE[source])
        table = row_table(offsets, [1] * len(rows), [len(row) for row in rows], ITEMSIZE[source], len(rows) + 1)
        result, mask = run_gather(emulator, slab, table, width, source, target, pad=7, with_mask=True, skew=skew)
        expected, expected_mask = gather(slab, table, width, source, target, pad=7)
        same(result, expected, target)
        same(mask, expected_mask, target)


NORMALIZE = {
    "as it came": Normalize(mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225)),
    "reversed": Normalize(mean=(123.0, 117.0, 104.0), deviation=(58.0, 57.0, 57.0), scale=1.0, reverse_channels=True),
    "smaller": Normalize(size=(13, 9), mean=(0.5,), deviation=(0.5,)),
    "smaller, no antialias": Normalize(size=(13, 9), antialias=False, mean=(0.5,), deviation=(0.5,)),
    "larger": Normalize(size=(61, 83), mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225), reverse_channels=True),
    "larger one way, smaller the other": Normalize(size=(90, 11)),
}


@pytest.mark.parametrize("how", NORMALIZE.values(), ids=NORMALIZE.keys())
@pytest.mark.parametrize(("layout", "datatype"), product(("NCHW", "NHWC"), FLOATS))
def test_normalize(emulator: Emulator, generator: np.random.Generator, how: Normalize, layout: str, datatype: str) -> None:
    for height, width, channels in ((48, 80, 3), (37, 59, 3), (40, 41, 1), (33, 64, 4)):
        mean, deviation = (values if channels == 3 else (values * channels)[:channels] for values in (how.mean, how.deviation))
        one = Normalize(how.size, how.antialias, how.scale, mean, deviation, how.reverse_channels, layout, datatype)  # type: ignore[arg-type]
        images = generator.integers(0, 256, (2, height, width, channels), dtype=np.uint8)
        expected = normalized(images, one)
        result, around = poisoned(expected.shape, storage(datatype))
        emulator.run(
            launches.normalize(
                images=images.ctypes.data,
                into=result.ctypes.data,
                rows=2,
                height=height,
                width=width,
                channels=channels,
                normalize=one,
            ),
            order=7,
        )
        assert guarded(around)
        near(result, expected, datatype, normalize_tolerance(one))


def test_normalize_takes_its_images_from_a_slab_and_repeats_the_first(emulator: Emulator, generator: np.random.Generator) -> None:
    images = [generator.integers(0, 256, (count, 46, 45, 3), dtype=np.uint8) for count in (2, 1)]
    slab, offsets = slab_of(generator, images, 1)
    table = row_table(offsets, [2, 1], 46 * 45 * 3, 1, 5)
    how = Normalize(mean=(0.5,), deviation=(0.25,))
    expected = normalized(np.concatenate([*images, images[0][:1], images[0][:1]]), how)
    result, around = poisoned(expected.shape, np.float32)
    emulator.run(
        launches.normalize(
            images=slab.ctypes.data,
            table=table.ctypes.data,
            into=result.ctypes.data,
            rows=5,
            height=46,
            width=45,
            channels=3,
            normalize=how,
        ),
        order=7,
    )
    assert guarded(around)
    near(result, expected, "float32", normalize_tolerance(how))


def records_equal(result: np.ndarray, expected: np.ndarray) -> None:
    for field in ("minimum", "maximum", "nonfinite", "finite"):
        np.testing.assert_array_equal(result[field], expected[field], err_msg=field)
    for field, tolerance in zip(("sum", "squares"), sum_tolerance(expected), strict=True):
        assert (np.abs(result[field] - expected[field]) <= tolerance).all(), field


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_screen(emulator: Emulator, generator: np.random.Generator, datatype: str, order: int) -> None:
    for rows, features in ((1, 1), (70, 3), (37, 128), (9, 261)):
        values = numbers(generator, (rows, features), datatype)
        requests = int(generator.integers(1, 6))
        owners = np.sort(generator.integers(0, requests, rows)).astype(np.int32)
        owners[int(generator.integers(1, rows + 1)) :] = -1
        by_feature, around = poisoned(features, RECORD)
        by_request, request_around = poisoned(requests, RECORD)
        emulator.run(
            launches.screen(
                values=values.ctypes.data,
                datatype=datatype,
                rows=rows,
                features=features,
                owners=owners.ctypes.data,
                by_feature=by_feature.ctypes.data,
                by_request=by_request.ctypes.data,
                requests=requests,
                multiprocessors=int(generator.integers(1, 4)),
            ),
            order=order,
        )
        expected_feature, expected_request = screen(values, owners, requests)
        assert guarded(around)
        assert guarded(request_around)
        records_equal(by_feature, expected_feature)
        records_equal(by_request, expected_request)


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize(("features", "edge_count"), [(1, 10), (1, 1), (3, 64), (13, 9), (40, 200), (7, 0), (1, 3000)])
def test_histogram_counts_are_exactly_those_of_numpy(
    emulator: Emulator, generator: np.random.Generator, datatype: str, features: int, edge_count: int
) -> None:
    rows = int(generator.integers(1, 400))
    values = numbers(generator, (rows, features), datatype)
    as_fp32 = gather_to_fp32(values, datatype)
    finite = as_fp32[np.isfinite(as_fp32)]
    edges = np.sort(generator.choice(finite, (features, edge_count)) if finite.size else np.zeros((features, edge_count)), axis=1)
    edges = edges.astype(np.float32)
    # Some have fewer than others: padding.
    edges[::2, edge_count - edge_count // 3 :] = np.inf
    live = np.array([generator.integers(0, rows + 1)], np.int32)
    counts, around = poisoned((features, edge_count + 1), np.int64)
    before = generator.integers(0, 1 << 40, counts.shape)
    counts[:] = before
    emulator.run(
        launches.histogram(
            values=values.ctypes.data,
            datatype=datatype,
            rows=rows,
            features=features,
            edges=edges.ctypes.data,
            edge_count=edge_count,
            counts=counts.ctypes.data,
            live=live.ctypes.data,
            multiprocessors=int(generator.integers(1, 3)),
        ),
        order=7,
    )
    assert guarded(around)
    np.testing.assert_array_equal(counts - before, count_columns(as_fp32[: live[0]], edges))


def gather_to_fp32(values: np.ndarray, datatype: str) -> np.ndarray:
    flat = values.reshape(1, -1)
    return gather(flat.view(np.uint8).reshape(-1), np.array([[0, flat.size]]), flat.size, datatype, "float32")[0].reshape(values.shape)


@pytest.mark.parametrize("datatype", FLOATS)
@pytest.mark.parametrize(("rows", "classes", "k"), [(1, 1, 1), (5, 7, 7), (6, 1000, 5), (9, 33, 10), (2, 1025, 5), (2, 3001, 40)])
@pytest.mark.parametrize("softmax", [False, True])
def test_topk(
    emulator: Emulator, generator: np.random.Generator, datatype: str, rows: int, classes: int, k: int, softmax: bool
) -> None:
    scores = numbers(generator, (rows, classes), datatype, special=0)
    # Many ties, and in some rows what is special.
    scores[:, ::3] = numbers(generator, (rows, 1), datatype, special=0)
    scores[::2] = numbers(generator, scores[::2].shape, datatype, special=0.4)
    values, around = poisoned((rows, k), np.float32)
    indices, indices_around = poisoned((rows, k), np.int32)
    emulator.run(
        launches.topk(
            scores=scores.ctypes.data,
            values=values.ctypes.data,
            indices=indices.ctypes.data,
            rows=rows,
            classes=classes,
            k=k,
            softmax=softmax,
            datatype=datatype,
        ),
        order=7,
    )
    expected, expected_indices = TopK(k, softmax)(scores)
    assert guarded(around)
    assert guarded(indices_around)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(values, expected, rtol=1e-5 if softmax else 0, atol=1e-37 if softmax else 0)


@pytest.mark.parametrize("datatype", FLOATS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("classes", [1, 5, 1000, 1024, 1025, 2050])
def test_softmax(emulator: Emulator, generator: np.random.Generator, datatype: str, order: int, classes: int) -> None:
    scores = numbers(generator, (5, classes), datatype, special=0)
    scores[1] = numbers(generator, (classes,), datatype, special=0.5)
    result, around = poisoned((5, classes), np.float32)
    emulator.run(
        launches.softmax(scores=scores.ctypes.data, into=result.ctypes.data, rows=5, classes=classes, datatype=datatype), order=order
    )
    assert guarded(around)
    np.testing.assert_allclose(result, Softmax()(scores), rtol=1e-5, atol=1e-37)
