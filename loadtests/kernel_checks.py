"""Each kernel against its definition, on whatever machine runs launches: a GPU, or the tests' emulation of one on the CPU.

Sizes are random and odd, inputs fresh from `generator` each time, outputs poisoned before and watched at both ends. A check returns
when all is as it should be; else AssertionError says what is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
from headrace_kernels import launches
from headrace_kernels.device import normalize_tolerance
from headrace_kernels.gather import cast, gather, row_table, storage
from headrace_kernels.histogram import count_columns
from headrace_kernels.launches import Launch
from headrace_kernels.normalize import Normalize
from headrace_kernels.screen import RECORD, screen, sum_tolerance
from headrace_kernels.sources import DATATYPES, FLOATS, ITEMSIZE
from headrace_kernels.topk import Softmax, TopK
from numpy.typing import NDArray

from loadtests.kernel_cases import near, normalized, numbers, same, slab_of

Array = NDArray[Any]
Generator = np.random.Generator

HOWS = {
    "as it came": Normalize(mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225)),
    "reversed": Normalize(mean=(123.0, 117.0, 104.0), deviation=(58.0, 57.0, 57.0), scale=1.0, reverse_channels=True),
    "smaller": Normalize(size=(13, 9), mean=(0.5,), deviation=(0.5,)),
    "smaller, no antialias": Normalize(size=(13, 9), antialias=False, mean=(0.5,), deviation=(0.5,)),
    "larger": Normalize(size=(61, 83), mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225), reverse_channels=True),
    "larger one way, smaller the other": Normalize(size=(90, 11)),
}


class Result(Protocol):
    """Memory for what a kernel writes, poisoned."""

    @property
    def address(self) -> int: ...

    def read(self) -> Array:
        """What is in it now. AssertionError when something was written beside it."""


class Machine(Protocol):
    """Memory that is aligned to 64 B, and launches one after the other."""

    multiprocessors: int

    def upload(self, array: Array) -> int: ...

    def result(self, shape: tuple[int, ...], dtype: Any, content: Array | None = None) -> Result:
        """`content`: what is in it instead of poison."""

    def run(self, planned: Sequence[Launch]) -> None: ...


def check_gather(machine: Machine, generator: Generator, source: str, target: str) -> None:
    """Whole rows of several requests, cast; the padding rows are the first."""
    width = int(generator.integers(1, 200))
    requests = [numbers(generator, (int(generator.integers(1, 4)), width), source) for _ in range(3)]
    slab, offsets = slab_of(generator, requests, ITEMSIZE[source])
    counts = [len(request) for request in requests]
    table = row_table(offsets, counts, width, ITEMSIZE[source], sum(counts) + 2)
    result, _ = _gather(machine, slab, table, width, source, target)
    rows = cast(np.concatenate(requests), source, target)
    same(result, np.concatenate([rows, rows[:1], rows[:1]]), target)


def check_ragged(machine: Machine, generator: Generator, source: str, target: str, skew: int = 0) -> None:
    """Rows of any length, padded and masked. `skew`: elements by which the batch begins beside a 16-byte boundary."""
    for width in (1, 15, 16, 17, 4099):
        rows = [numbers(generator, (int(length),), source) for length in (0, width, *generator.integers(0, width + 3, 4))]
        slab, offsets = slab_of(generator, rows, ITEMSIZE[source])
        table = row_table(offsets, [1] * len(rows), [len(row) for row in rows], ITEMSIZE[source], len(rows) + 1)
        result, mask = _gather(machine, slab, table, width, source, target, pad=7, masked=True, skew=skew)
        expected, expected_mask = gather(slab, table, width, source, target, pad=7)
        same(result, expected, target)
        same(mask, expected_mask, target)


def _gather(
    machine: Machine,
    slab: Array,
    table: Array,
    width: int,
    source: str,
    target: str,
    pad: float = 0,
    masked: bool = False,
    skew: int = 0,
) -> tuple[Array, Array]:
    whole = machine.result((len(table) * width + skew,), storage(target))
    mask = machine.result((len(table), width), storage(target))
    machine.run(
        launches.gather(
            slab=machine.upload(slab),
            table=machine.upload(table),
            into=whole.address + skew * ITEMSIZE[target],
            rows=len(table),
            width=width,
            source=source,
            target=target,
            pad=pad,
            mask=mask.address if masked else 0,
        )
    )
    return whole.read()[skew:].reshape(len(table), width), mask.read()


def check_normalize(machine: Machine, generator: Generator, how: Normalize, layout: Any, datatype: Any) -> None:
    for height, width, channels in ((48, 80, 3), (37, 59, 3), (40, 41, 1), (33, 64, 4)):
        mean, deviation = (values if channels == 3 else (values * channels)[:channels] for values in (how.mean, how.deviation))
        one = Normalize(how.size, how.antialias, how.scale, mean, deviation, how.reverse_channels, layout, datatype)
        images = generator.integers(0, 256, (2, height, width, channels), dtype=np.uint8)
        _normalize(machine, images, one, images)


def check_normalize_from_slab(machine: Machine, generator: Generator) -> None:
    """Images at any byte of a slab; the padding ones are the first."""
    images = [generator.integers(0, 256, (count, 46, 45, 3), dtype=np.uint8) for count in (2, 1)]
    slab, offsets = slab_of(generator, images, 1)
    table = row_table(offsets, [2, 1], 46 * 45 * 3, 1, 5)
    how = Normalize(mean=(0.5,), deviation=(0.25,))
    _normalize(machine, slab, how, np.concatenate([*images, images[0][:1], images[0][:1]]), table)


def _normalize(machine: Machine, source: Array, how: Normalize, images: Array, table: Array | None = None) -> None:
    expected = normalized(images, how)
    result = machine.result(expected.shape, storage(how.datatype))
    machine.run(
        launches.normalize(
            images=machine.upload(source),
            table=0 if table is None else machine.upload(table),
            into=result.address,
            rows=len(images),
            height=images.shape[1],
            width=images.shape[2],
            channels=images.shape[3],
            normalize=how,
        )
    )
    near(result.read(), expected, how.datatype, normalize_tolerance(how))


def check_screen(machine: Machine, generator: Generator, datatype: str) -> None:
    for rows, features in ((1, 1), (70, 3), (37, 128), (9, 261)):
        values = numbers(generator, (rows, features), datatype)
        requests = int(generator.integers(1, 6))
        owners = np.sort(generator.integers(0, requests, rows)).astype(np.int32)
        owners[int(generator.integers(1, rows + 1)) :] = -1
        by_feature, by_request = machine.result((features,), RECORD), machine.result((requests,), RECORD)
        machine.run(
            launches.screen(
                values=machine.upload(values),
                datatype=datatype,
                rows=rows,
                features=features,
                owners=machine.upload(owners),
                by_feature=by_feature.address,
                by_request=by_request.address,
                requests=requests,
                multiprocessors=machine.multiprocessors,
            )
        )
        for result, expected in zip((by_feature, by_request), screen(values, owners, requests), strict=True):
            same_records(result.read(), expected)


def same_records(result: Array, expected: Array) -> None:
    for field in ("minimum", "maximum", "nonfinite", "finite"):
        np.testing.assert_array_equal(result[field], expected[field], err_msg=field)
    for field, tolerance in zip(("sum", "squares"), sum_tolerance(expected), strict=True):
        error = np.abs(result[field] - expected[field])
        assert (error <= tolerance).all(), f"{field}: off by {error.max()}, expected at most {tolerance.max()}"


def check_histogram(machine: Machine, generator: Generator, datatype: str, features: int, edge_count: int, most: int = 400) -> None:
    """Exactly numpy's counts, added to what was there, of the first `live` rows."""
    rows = int(generator.integers(1, most))
    values = numbers(generator, (rows, features), datatype)
    as_fp32 = cast(values, datatype, "float32")
    finite = as_fp32[np.isfinite(as_fp32)]
    # Edges that are values, so that the two sides of an edge matter; some features have fewer: padding.
    edges = np.sort(generator.choice(finite, (features, edge_count)) if finite.size else np.zeros((features, edge_count)), axis=1)
    edges = edges.astype(np.float32)
    edges[::2, edge_count - edge_count // 3 :] = np.inf
    live = np.array([generator.integers(0, rows + 1)], np.int32)
    before = generator.integers(0, 1 << 40, (features, edge_count + 1))
    counts = machine.result(before.shape, np.int64, before)
    machine.run(
        launches.histogram(
            values=machine.upload(values),
            datatype=datatype,
            rows=rows,
            features=features,
            edges=machine.upload(edges),
            edge_count=edge_count,
            counts=counts.address,
            live=machine.upload(live),
            multiprocessors=machine.multiprocessors,
        )
    )
    np.testing.assert_array_equal(counts.read() - before, count_columns(as_fp32[: live[0]], edges))


def check_topk(machine: Machine, generator: Generator, datatype: str, rows: int, classes: int, k: int, softmax: bool) -> None:
    scores = numbers(generator, (rows, classes), datatype, special=0)
    # Many ties, and in some rows what is special.
    scores[:, ::3] = numbers(generator, (rows, 1), datatype, special=0)
    scores[::2] = numbers(generator, scores[::2].shape, datatype, special=0.4)
    values, indices = machine.result((rows, k), np.float32), machine.result((rows, k), np.int32)
    machine.run(
        launches.topk(
            scores=machine.upload(scores),
            values=values.address,
            indices=indices.address,
            rows=rows,
            classes=classes,
            k=k,
            softmax=softmax,
            datatype=datatype,
        )
    )
    expected, expected_indices = TopK(k, softmax)(scores)
    np.testing.assert_array_equal(indices.read(), expected_indices)
    np.testing.assert_allclose(values.read(), expected, rtol=1e-5 if softmax else 0, atol=1e-37 if softmax else 0)


def check_softmax(machine: Machine, generator: Generator, datatype: str, classes: int) -> None:
    scores = numbers(generator, (5, classes), datatype, special=0)
    scores[1] = numbers(generator, (classes,), datatype, special=0.5)
    result = machine.result(scores.shape, np.float32)
    machine.run(launches.softmax(scores=machine.upload(scores), into=result.address, rows=5, classes=classes, datatype=datatype))
    np.testing.assert_allclose(result.read(), Softmax()(scores), rtol=1e-5, atol=1e-37)


Check = Callable[[Machine, Generator], None]


def all_checks() -> dict[str, Check]:
    """By a name that says the case."""

    def case(check: Callable[..., None], *arguments: Any) -> Check:
        return lambda machine, generator: check(machine, generator, *arguments)

    checks: dict[str, Check] = {"normalize from a slab": check_normalize_from_slab}
    for source, target in product(DATATYPES, DATATYPES):
        checks[f"gather {source} to {target}"] = case(check_gather, source, target)
    for source, target in (("int64", "int64"), ("int32", "int64"), ("uint8", "uint8"), ("float16", "float32")):
        for skew in (0, 1):
            checks[f"ragged {source} to {target}, {skew} beside the boundary"] = case(check_ragged, source, target, skew)
    for name, layout, datatype in product(HOWS, ("NCHW", "NHWC"), FLOATS):
        checks[f"normalize {name}, {layout} {datatype}"] = case(check_normalize, HOWS[name], layout, datatype)
    for datatype in DATATYPES:
        checks[f"screen {datatype}"] = case(check_screen, datatype)
        for features, edge_count in ((1, 10), (1, 1), (3, 64), (13, 9), (40, 200), (7, 0), (1, 3000)):
            checks[f"histogram {datatype}, {features} x {edge_count}"] = case(check_histogram, datatype, features, edge_count)
    for datatype in FLOATS:
        for classes in (1, 5, 1000, 1024, 1025, 2050):
            checks[f"softmax {datatype}, {classes}"] = case(check_softmax, datatype, classes)
        for (rows, classes, k), softmax in product(
            ((1, 1, 1), (5, 7, 7), (6, 1000, 5), (9, 33, 10), (2, 1025, 5), (2, 3001, 40)), (False, True)
        ):
            name = f"topk {datatype}, {k} of {classes}{' with softmax' if softmax else ''}"
            checks[name] = case(check_topk, datatype, rows, classes, k, softmax)
    return checks


__all__ = ["HOWS", "Check", "Machine", "Result", "all_checks", "check_histogram", "same_records"]
