"""Data for the drift study: a truth of 37 features that is known exactly, references and windows drawn from it.

The truth is a distribution over `rows` different rows, each with a probability. A window of n rows from it is a multinomial draw of how
often each row comes, which costs the same for 50 rows as for 50,000, and keeps how features depend on each other; its counts are those
numbers times what each row adds. They are, to the last one, what BatchCounter counts of the same rows written out (a test); the
distribution is that of n rows drawn one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from headrace.config import DriftConfig, ModelConfig, TensorConfig
from headrace.drift.building import ReferenceBuilder
from headrace.drift.calibration import apply
from headrace.drift.counting import OFF_SCALE, Counts, Layout
from headrace.drift.extraction import as_text, categories, numbers
from headrace.drift.features import Extract, Side
from headrace.drift.plan import Plan, choose
from headrace.drift.reference import FeatureReference, Reference
from headrace.signature import DataType, Signature, TensorSpec
from numpy.typing import NDArray

Array = NDArray[Any]

POOL = 20_000
"""Different rows of the truth. A decile has 2,000 of them, so that ranges can be cut about as finely as a continuous truth's."""
CLASSES = 10
NORMAL = 0
"""The column of `x` that is shifted where one feature is: a normal one."""

COLUMNS = (
    *[f"normal{i}" for i in range(4)], *[f"lognormal{i}" for i in range(4)], *[f"heavy{i}" for i in range(2)],
    *[f"uniform{i}" for i in range(3)], *[f"poisson{i}" for i in range(2)], "mostly_zero", "constant", "hardly_varies", "bimodal",
    "sometimes_missing", "bounded", *[f"correlated{i}" for i in range(7)],
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Population:
    """`chance`: of each row. Inputs and outputs as a batch of a server has them, one row of each for each row of the truth."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    chance: NDArray[np.float64]

    @property
    def rows(self) -> int:
        return len(self.chance)

    def draw(self, windows: int, n: int, random: np.random.Generator) -> NDArray[np.int64]:
        """[windows, rows]: how often each row comes in each of `windows` windows of n rows."""
        return random.multinomial(n, self.chance, size=windows)

    def take(self, times: NDArray[np.int64]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Inputs and outputs of a window written out, row by row."""
        places = np.repeat(np.arange(self.rows), times)
        return {name: each[places] for name, each in self.inputs.items()}, {name: each[places] for name, each in self.outputs.items()}


def make_population(seed: int, rows: int = POOL) -> Population:
    """37 features: 28 columns, an integer, two strings with their lengths, and class, confidence, entropy and margin of ten scores."""
    random = np.random.default_rng(seed)
    x = np.empty((rows, len(COLUMNS)), np.float32)
    at = {name: index for index, name in enumerate(COLUMNS)}
    common = random.normal(size=rows)
    for name, index in at.items():
        x[:, index] = _column(name.rstrip("0123456789"), rows, common, random)
    kinds = np.array([f"kind{index:03d}".encode() for index in range(200)], object)
    zipf = 1 / np.arange(1, 201)
    strings = random.choice(kinds, rows, p=zipf / zipf.sum()).reshape(-1, 1)
    sorts = np.array([b"card", b"transfer", b"cash", b"cheque"], object)
    payment = random.choice(sorts, rows, p=[0.7, 0.25, 0.049, 0.001]).reshape(-1, 1)
    integer = random.binomial(6, 0.3, rows).astype(np.int64).reshape(-1, 1)
    heading = random.normal(size=(8, CLASSES))
    scores = 2.2 * x[:, [0, 1, 2, 3, 21, 22, 23, 24]] @ heading + random.gumbel(size=(rows, CLASSES))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    outputs = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    inputs: dict[str, Array] = {"x": x, "count": integer, "kind": strings, "payment": payment}
    return Population(inputs, {"scores": outputs}, np.full(rows, 1 / rows))


def _column(kind: str, rows: int, common: Array, random: np.random.Generator) -> Array:
    match kind:
        case "normal":
            return random.normal(size=rows)
        case "lognormal":
            return random.lognormal(sigma=1.0, size=rows)
        case "heavy":
            return random.standard_t(1.5, size=rows)
        case "uniform":
            return random.uniform(size=rows)
        case "poisson":
            return random.poisson(3.0, size=rows)
        case "mostly_zero":
            return np.where(random.uniform(size=rows) < 0.95, 0.0, random.exponential(size=rows))
        case "constant":
            return np.full(rows, 4.0)
        case "hardly_varies":
            return np.where(random.uniform(size=rows) < 0.998, 1.0, random.normal(size=rows))
        case "bimodal":
            return random.normal(size=rows) + np.where(random.uniform(size=rows) < 0.3, 4.0, 0.0)
        case "sometimes_missing":
            return np.where(random.uniform(size=rows) < 0.05, np.nan, random.normal(size=rows))
        case "bounded":
            return random.beta(0.5, 0.5, size=rows)
        case "correlated":
            return np.asarray(0.95 * common + 0.3 * random.normal(size=rows))
    raise ValueError(f"a column's kind: expected one that _column knows, got {kind!r}")


def plan(config: DriftConfig) -> Plan:
    """What the server itself would watch of such tensors."""
    inputs = (
        TensorSpec("x", DataType.FP32, (-1, len(COLUMNS))), TensorSpec("count", DataType.INT64, (-1, 1)),
        TensorSpec("kind", DataType.BYTES, (-1, 1)), TensorSpec("payment", DataType.BYTES, (-1, 1)),
    )  # fmt: skip
    signature = Signature("study", inputs, (TensorSpec("scores", DataType.FP32, (-1, CLASSES)),), max_batch_size=1 << 20)
    return choose(signature, ModelConfig("study", inputs=(TensorConfig("x", columns=COLUMNS),), drift=config))


def build_reference(population: Population, m: int, config: DriftConfig, random: np.random.Generator) -> Reference:
    """A reference of m rows drawn from the truth, by the server's own builder."""
    builder = ReferenceBuilder("study", plan(config), config.bins)
    inputs, outputs = population.take(population.draw(1, m, random)[0])
    builder.add(inputs, outputs, m)
    return builder.build("profile")


class PoolCounter:
    """What each row of a population adds to a reference's counts, and so the counts of any window. Immutable once made."""

    def __init__(self, reference: Reference, population: Population) -> None:
        self._layout = Layout(reference)
        self._reference = reference
        self._adds = np.zeros((population.rows, self._layout.width), np.float32)
        self._chances = np.zeros(population.rows)
        for index, each in enumerate(reference.features):
            start, stop = self.columns(index)
            self._adds[:, start:stop] = self.feature(index, population)
            if each.feature.extract is Extract.CONFIDENCE:
                confidence = _values(each, population)
                calibration = reference.calibration
                self._chances = confidence if calibration is None else apply(calibration, confidence)

    def columns(self, index: int) -> tuple[int, int]:
        """Where a feature's counts are: its bins, then its quality."""
        start = self._layout.starts[index]
        return start, start + self._layout.sizes[index] + 5

    def feature(self, index: int, population: Population) -> NDArray[np.float32]:
        """[rows, counts of the feature]: what each row of `population` adds to it."""
        each = self._reference.features[index]
        size = len(each.counts)
        adds = np.zeros((population.rows, size + 5), np.float32)
        rows = np.arange(population.rows)
        if not each.is_numeric:
            place = _categories(each, population)
            adds[rows[place >= 0], place[place >= 0]] = 1
            adds[rows[place < 0], size] = 1
            return adds
        values = _values(each, population)
        is_finite = np.isfinite(values)
        place = np.searchsorted(np.array(each.edges), values, side="left")
        adds[rows[is_finite], place[is_finite]] = 1
        width = each.maximum - each.minimum
        far = OFF_SCALE * (width if width > 0 else max(abs(each.maximum), 1.0))
        known = np.where(is_finite, values, each.minimum)
        low, high = known < each.minimum, known > each.maximum
        off = (known < each.minimum - far) | (known > each.maximum + far)
        adds[:, size:] = np.stack([np.isnan(values), np.isinf(values), low, high, off], axis=1)
        return adds

    def bins(self, times: Array) -> Array:
        """[windows, all counts] of windows as Population.draw has them. Exact: single precision holds integers up to 2^24."""
        return np.asarray(np.rint(times.astype(np.float32) @ self._adds), np.int64)

    def counts(self, times: Array, bins: Array) -> list[Counts]:
        """Each window's, with `bins` as its counts. Sums for means are left 0: nothing is judged by them."""
        judged = times.sum(axis=1)
        correct, variance = times @ self._chances, times @ (self._chances * (1 - self._chances))
        zeros = np.zeros(len(self._reference.features))
        return [
            Counts(bins[i], zeros.copy(), zeros.copy(), int(judged[i]), int(judged[i]), float(correct[i]), float(variance[i]))
            for i in range(len(times))
        ]


def _tensor(each: FeatureReference, population: Population) -> Array:
    return (population.inputs if each.feature.side is Side.INPUT else population.outputs)[each.feature.tensor]


def _values(each: FeatureReference, population: Population) -> NDArray[np.float64]:
    return np.asarray(numbers(_tensor(each, population), [each.feature])[:, 0], np.float64)


def _categories(each: FeatureReference, population: Population) -> NDArray[np.int64]:
    """The bin of each row; -1 where it is missing."""
    known = {text: place for place, text in enumerate(each.categories)}
    texts = [as_text(value) for value in categories(_tensor(each, population), each.feature).tolist()]
    return np.array([-1 if text in ("", "nan") else known.get(text, len(each.categories)) for text in texts])


def index_of(reference: Reference, title: str) -> int:
    """Raises ValueError where no feature has that title."""
    titles: Sequence[str] = [each.feature.title for each in reference.features]
    return titles.index(title)
