"""Which features of a model are watched: chosen from its signature, overridden in model.toml. Pure.

| tensor | watched |
|---|---|
| strings | each element by value, and its length |
| [N], [N, F] with F at most `max_features` | each column |
| [N, F] with more | mean, deviation, extremes, norm, random projections, and evenly spread columns in the room that is left |
| [N, C, H, W] or [N, H, W, C], C one of 1, 3, 4 | mean, deviation, extremes and sharpness of each channel |
| [N, any length] | length, mean, deviation, extremes, sharpness |
| others | mean, deviation, extremes, norm, and projections where the size is fixed |
| outputs [N, F] whose rows are probabilities, or that have labels | class, confidence, entropy, margin |

Whether an output's rows are probabilities is seen in the first data: until then it is `undecided`. So is whether a column of integers is
a number or a category; building.py sees to that, by how many different ones there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig, TensorConfig
from headrace.drift.features import OF_SCORES, SUMMARY, Extract, Feature, Kind, Side
from headrace.errors import ConfigError
from headrace.signature import DataType, Signature, TensorSpec, format_shape

Array = NDArray[Any]

PROJECTIONS = 8
MOST_PROJECTED = 1 << 16
"""Elements of a row. Projecting more costs more than counting everything else."""
MOST_SPREAD = 256
"""Elements of a row of which some are watched one by one; of a wider one no single element says much."""
ENOUGH = 32
"""Rows that decide whether an output's numbers are probabilities. Of one alone they can add up to 1 by chance."""
SMALLEST_SIDE = 8
"""Pixels: [3, 4, 5] is no picture."""

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, slots=True)
class Undecided:
    """An output of `size` numbers a row, which are scores of classes or not."""

    spec: TensorSpec
    settings: TensorConfig
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`left_out`: what could be watched and is not, a sentence each."""

    features: tuple[Feature, ...]
    left_out: tuple[str, ...] = ()
    undecided: tuple[Undecided, ...] = ()
    max_features: int = 32

    @property
    def tensors(self) -> frozenset[tuple[Side, str]]:
        decided = {(feature.side, feature.tensor) for feature in self.features}
        return frozenset(decided | {(Side.OUTPUT, each.spec.name) for each in self.undecided})

    def watches_the_same(self, features: Sequence[Feature]) -> bool:
        """Whether these can have come from this plan, once all was decided."""
        open_tensors = {each.spec.name for each in self.undecided}
        there = {_key(each) for each in features if not (each.side is Side.OUTPUT and each.tensor in open_tensors)}
        return there == {_key(each) for each in self.features} and {(each.side, each.tensor) for each in features} == self.tensors


def _key(feature: Feature) -> tuple[Side, str, str, Extract, int]:
    """Without the kind, which the data decides."""
    return feature.side, feature.tensor, feature.name, feature.extract, feature.index


def choose(signature: Signature, config: ModelConfig, labels: Mapping[str, tuple[str, ...]] | None = None) -> Plan:
    """Raises ConfigError where model.toml wants of a tensor what it cannot be."""
    features: list[Feature] = []
    left_out: list[str] = []
    undecided: list[Undecided] = []
    cap = config.drift.max_features
    for side, specs, settings in ((Side.INPUT, signature.inputs, config.inputs), (Side.OUTPUT, signature.outputs, config.outputs)):
        by_name = {each.name: each for each in settings}
        for spec in specs:
            setting = by_name.get(spec.name, TensorConfig(spec.name))
            tail = spec.shape[1:] if signature.is_batching else spec.shape
            has_labels = side is Side.OUTPUT and bool(labels and labels.get(spec.name))
            found, missed, is_open = _choose_tensor(side, spec, tail, setting, cap, has_labels)
            features += found
            left_out += missed
            undecided += [Undecided(spec, setting, tail[0])] if is_open else []
    return Plan(tuple(features), tuple(left_out), tuple(undecided), cap)


def settle(plan: Plan, outputs: Mapping[str, Array]) -> Plan:
    """Decide by the first data what was undecided; an output of which there are not ENOUGH finite rows stays so."""
    features, left_out, still = list(plan.features), list(plan.left_out), []
    for each in plan.undecided:
        rows = outputs[each.spec.name].reshape(-1, each.size) if each.spec.name in outputs else np.zeros((0, each.size))
        rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows) < ENOUGH:
            still.append(each)
        elif are_probabilities(rows):
            features += _scores(each.spec, is_logits=False)
        else:
            found, missed = _row(Side.OUTPUT, each.spec, (each.size,), each.settings, plan.max_features)
            features += found
            left_out += missed
    return replace(plan, features=tuple(features), left_out=tuple(left_out), undecided=tuple(still))


def are_probabilities(rows: Array) -> bool:
    """Of floats: none is negative, and each row adds up to 1."""
    rows = rows.astype(np.float64)
    return bool((rows >= 0).all() and (np.abs(rows.sum(axis=1) - 1) < 1e-2).all())


def _choose_tensor(
    side: Side, spec: TensorSpec, tail: tuple[int, ...], setting: TensorConfig, cap: int, has_labels: bool
) -> tuple[list[Feature], list[str], bool]:
    """Features, what is left out, and whether the first data has to decide."""
    size = -1 if -1 in tail else math.prod(tail)
    monitor, is_text = setting.monitor, spec.datatype is DataType.BYTES
    where = f"{side.value} '{spec.name}'"
    if setting.columns and len(setting.columns) != size:
        raise ConfigError(f"{where}: columns: expected {max(size, 0)} names for {format_shape(spec.shape)}, got {len(setting.columns)}")
    if monitor == "off":
        return [], [f'{where} by monitor = "off"'], False
    if is_text and monitor not in ("auto", "columns", "categories"):
        raise ConfigError(f"{where}: monitor '{monitor}': expected numbers, got {spec.datatype.value}")
    if monitor in ("columns", "categories") or is_text or (monitor == "auto" and setting.columns):
        if size < 0:
            if is_text:
                return [], [f"{where}: strings in a number that is free"], False
            raise ConfigError(f"{where}: monitor '{monitor}': expected a fixed number of columns, got {format_shape(spec.shape)}")
        kind = Kind.CATEGORICAL if monitor == "categories" or is_text or spec.datatype is DataType.BOOL else Kind.NUMERIC
        found, missed = _columns(side, spec, range(size), setting, kind, cap)
        if is_text and size == 1:
            found.append(Feature(side, spec.name, "length", Kind.NUMERIC, Extract.LENGTH))
        return found, missed, False
    if monitor == "classes":
        if side is Side.INPUT or len(tail) != 1 or 0 <= size < 2:
            raise ConfigError(f"{where}: monitor 'classes': expected an output with scores [N, classes], got {format_shape(spec.shape)}")
        return _scores(spec, setting.activation == "logits"), [], False
    if side is Side.OUTPUT and monitor == "auto" and len(tail) == 1 and size > 1 and spec.datatype in _FLOATS:
        if has_labels or setting.activation != "auto":
            return _scores(spec, setting.activation == "logits"), [], False
        return [], [], True
    if monitor == "image" or (monitor == "auto" and channels_of(tail) is not None):
        found, missed = _image(side, spec, tail, where, cap)
        return found, missed, False
    found, missed = _row(side, spec, tail, setting, cap)
    return found, missed, False


_FLOATS = frozenset({DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64})


def channels_of(tail: tuple[int, ...]) -> tuple[int, int] | None:
    """(axis, number) of a picture's channels, the first axis before the last; None where a row is no picture."""
    if len(tail) != 3:
        return None
    for axis, sides in ((0, tail[1:]), (2, tail[:2])):
        if tail[axis] in _CHANNELS and all(side == -1 or side >= SMALLEST_SIDE for side in sides):
            return axis, tail[axis]
    return None


def _scores(spec: TensorSpec, is_logits: bool) -> list[Feature]:
    return [
        Feature(
            Side.OUTPUT, spec.name, extract.value, Kind.CATEGORICAL if extract is Extract.CLASS else Kind.NUMERIC, extract,
            is_logits=is_logits,
        )
        for extract in OF_SCORES
    ]  # fmt: skip


def _image(side: Side, spec: TensorSpec, tail: tuple[int, ...], where: str, cap: int) -> tuple[list[Feature], list[str]]:
    found = channels_of(tail)
    if found is None:
        expected = f"[N, channels, height, width] or channels last, with 1, 3 or 4 channels and sides of at least {SMALLEST_SIDE}"
        raise ConfigError(f"{where}: monitor 'image': expected {expected}, got {format_shape(spec.shape)}")
    features = [
        Feature(side, spec.name, f"{extract.value}[{channel}]", Kind.NUMERIC, extract, channel)
        for channel in range(found[1])
        for extract in (*SUMMARY, Extract.SHARPNESS)
    ]
    missed = [f"{where}: {len(features) - cap} of {len(features)} numbers of its channels"] if len(features) > cap else []
    return features[:cap], missed


def _row(side: Side, spec: TensorSpec, tail: tuple[int, ...], setting: TensorConfig, cap: int) -> tuple[list[Feature], list[str]]:
    """Columns where they are few; else what sums up a row, and some columns where there is room."""
    size = -1 if -1 in tail else math.prod(tail)
    is_audio = setting.monitor == "audio" or (setting.monitor == "auto" and tail == (-1,))
    if 0 <= size <= cap and len([side for side in tail if side != 1]) <= 1 and setting.monitor == "auto":
        kind = Kind.CATEGORICAL if spec.datatype is DataType.BOOL else Kind.NUMERIC
        return _columns(side, spec, range(size), setting, kind, cap)
    extracts = [Extract.LENGTH] if size < 0 else []
    extracts += [*SUMMARY, Extract.SHARPNESS if is_audio else Extract.NORM]
    features = [Feature(side, spec.name, extract.value, Kind.NUMERIC, extract) for extract in extracts]
    if 0 < size <= MOST_PROJECTED and not is_audio:
        features += [
            Feature(side, spec.name, f"projection[{index}]", Kind.NUMERIC, Extract.PROJECTION, index) for index in range(PROJECTIONS)
        ]
    features = features[:cap]
    room = cap - len(features)
    if size < 0 or is_audio or setting.monitor in ("image", "embedding"):
        return features, []
    if size > MOST_SPREAD or room <= 0:
        return features, [f"{side.value} '{spec.name}': each of {size} columns alone; a row is watched as a whole"]
    spread = sorted({round(position) for position in np.linspace(0, size - 1, min(room, size))})
    columns, _ = _columns(side, spec, spread, setting, Kind.NUMERIC, cap)
    missed = [f"{side.value} '{spec.name}': {size - len(spread)} of {size} columns; max_features in [drift]"] if len(spread) < size else []
    return features + columns, missed


def _columns(
    side: Side, spec: TensorSpec, indexes: Sequence[int], setting: TensorConfig, kind: Kind, cap: int
) -> tuple[list[Feature], list[str]]:
    kept = [indexes[round(position)] for position in np.linspace(0, len(indexes) - 1, cap)] if len(indexes) > cap else list(indexes)
    names = setting.columns
    features = []
    for index in kept:
        name = names[index] if names else ("value" if len(indexes) == 1 else str(index))
        features.append(Feature(side, spec.name, name, kind, Extract.COLUMN, index))
    missed = len(indexes) - len(kept)
    return features, [f"{side.value} '{spec.name}': {missed} of {len(indexes)} columns; max_features in [drift]"] if missed else []
