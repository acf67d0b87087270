"""Which output labels are for, and what of it is a prediction. Pure."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.config import FeedbackConfig
from headrace.errors import ConfigError
from headrace.signature import DataType, Signature, TensorSpec, format_shape

Array = NDArray[Any]

MOST_NAMES = 10_000
UNNAMED = -2
_FLOATS = (DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64)


class Kind(enum.Enum):
    """`SCORES` of classes, the largest is the prediction; `CHANCE`: one number, of class 1 rather than 0; `CLASS`: the class itself, as
    an integer or a string; `NUMBER`: regression."""

    SCORES = "scores"
    CHANCE = "chance"
    CLASS = "class"
    NUMBER = "number"

    @property
    def is_classification(self) -> bool:
        return self is not Kind.NUMBER


@dataclass(frozen=True, slots=True)
class Subject:
    """`names`: of the classes, by index; empty where none are known."""

    output: str
    kind: Kind
    datatype: DataType
    names: tuple[str, ...] = ()


def choose(
    signature: Signature, config: FeedbackConfig, labels: Mapping[str, tuple[str, ...]], ranked: Collection[str] = frozenset()
) -> Subject:
    """`ranked`: outputs with a row's classes by rank, the first of which is the prediction. Raises ConfigError where no output can be what
    model.toml wants of it."""
    specs = {spec.name: spec for spec in signature.outputs}
    spec = specs[config.output] if config.output else _likely(signature, labels)
    kind = _kind(spec, (1,) if spec.name in ranked and config.kind != "regression" else _tail(signature, spec), config.kind)
    names = next((each for each in (labels.get(spec.name, ()), *labels.values()) if each), ()) if kind.is_classification else ()
    return Subject(spec.name, kind, spec.datatype, names)


def _tail(signature: Signature, spec: TensorSpec) -> tuple[int, ...]:
    return spec.shape[1:] if signature.is_batching else spec.shape


def _likely(signature: Signature, labels: Mapping[str, tuple[str, ...]]) -> TensorSpec:
    """1. With labels. 2. Scores of classes. 3. The first."""
    scores = [spec for spec in signature.outputs if spec.datatype in _FLOATS and _is_row(_tail(signature, spec))]
    labelled = [spec for spec in signature.outputs if spec.name in labels]
    return (labelled or scores or list(signature.outputs))[0]


def _is_row(tail: Sequence[int]) -> bool:
    """More than one number a row, as far as the signature says."""
    return sum(dim != 1 for dim in tail) == 1


def _kind(spec: TensorSpec, tail: Sequence[int], wanted: str) -> Kind:
    is_one = all(dim == 1 for dim in tail)
    if wanted == "regression":
        if not is_one or spec.datatype is DataType.BYTES:
            raise ConfigError(_misfit(spec, wanted, "one number a row"))
        return Kind.NUMBER
    if spec.datatype in _FLOATS:
        if not is_one and _is_row(tail):
            return Kind.SCORES
        if is_one:
            return Kind.CHANCE if wanted == "classification" else Kind.NUMBER
    elif is_one:
        return Kind.CLASS
    raise ConfigError(_misfit(spec, wanted, "scores of classes, or one value a row"))


def _misfit(spec: TensorSpec, wanted: str, expected: str) -> str:
    return f"[feedback] kind '{wanted}': output '{spec.name}': expected {expected}, got {spec.datatype.value} {format_shape(spec.shape)}"


def predictions(subject: Subject, classes: ClassNames, rows: Array) -> tuple[list[float], list[float]]:
    """(values, confidences) of an output's rows, [rows, elements]. A confidence is negative where none is known; numbers have none."""
    if subject.kind is Kind.CLASS:
        return [_index(classes, value) for value in rows[:, 0].tolist()], [-1.0] * len(rows)
    if subject.datatype is DataType.BF16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    values = rows.astype(np.float64)
    if subject.kind is Kind.NUMBER:
        return values[:, 0].tolist(), []
    if subject.kind is Kind.CHANCE:
        return _by_chance(values[:, 0], classes, _tolerance(subject))
    return values.argmax(axis=1).astype(np.float64).tolist(), _confidence(values, _tolerance(subject)).tolist()


def _tolerance(subject: Subject) -> float:
    """By which chances may be off: BF16 knows a number to one part in 512."""
    return 0.02 if subject.datatype is DataType.BF16 else 1e-3


def _by_chance(numbers: Array, classes: ClassNames, tolerance: float) -> tuple[list[float], list[float]]:
    """Of one number a row. One that is no chance says that all of the version's are logits, whatever came with it in a batch."""
    finite = numbers[np.isfinite(numbers)]
    classes.are_logits |= bool(((finite < -tolerance) | (finite > 1 + tolerance)).any())
    chance = 1 / (1 + np.exp(-np.clip(numbers, -700, 700))) if classes.are_logits else np.clip(numbers, 0.0, 1.0)
    guess = np.where(np.isnan(chance), UNNAMED, chance >= 0.5)
    return guess.astype(np.float64).tolist(), np.nan_to_num(np.maximum(chance, 1 - chance), nan=-1.0).tolist()


def _confidence(scores: Array, tolerance: float) -> Array:
    """The largest chance of each row: as it is where the row adds up to 1, else softmax's. Negative where it is no number."""
    with np.errstate(invalid="ignore", over="ignore"):
        largest = scores.max(axis=1)
        are_chances = (scores.min(axis=1) >= 0) & (np.abs(scores.sum(axis=1) - 1) < tolerance)
        softmax = 1 / np.exp(scores - largest[:, None]).sum(axis=1)
    found = np.where(are_chances, np.minimum(largest, 1.0), softmax)
    return np.where(np.isfinite(found), found, -1.0)


class ClassNames:
    """Owns the classes' names, by index; those of a model that answers with strings are learnt as they come, up to a bound. And whether
    a model that answers with one number is known to answer with logits."""

    def __init__(self, subject: Subject) -> None:
        self._names = list(subject.names)
        self._indexes = {name: index for index, name in reversed(list(enumerate(subject.names)))}
        self._learns = subject.datatype is DataType.BYTES
        self.are_logits = False

    def index(self, name: str) -> int:
        """UNNAMED for a class that is not known and cannot be learnt."""
        index = self._indexes.get(name, UNNAMED)
        if index == UNNAMED and self._learns and len(self._names) < MOST_NAMES:
            index = self._indexes[name] = len(self._names)
            self._names.append(name)
        return index

    def name(self, index: int) -> str:
        return self._names[index] if 0 <= index < len(self._names) and self._names[index] else str(index)


def _index(classes: ClassNames, value: object) -> int:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        return classes.index(value)
    index = int(value)  # type: ignore[call-overload]  # an integer or a boolean of the array
    return index if index < 2**63 else UNNAMED
