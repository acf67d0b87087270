"""drift.msgpack: a reference as bytes. The format is described in docs/drift/reference-format.md. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgpack

from headrace.drift.features import BY_CHANNEL, OF_SCORES, Extract, Feature, Kind, Side
from headrace.drift.plan import MOST_PROJECTED, PROJECTIONS, channels_of
from headrace.drift.reference import Calibration, FeatureReference, Reference
from headrace.errors import LoadError
from headrace.signature import DataType, Signature

FILENAME = "drift.msgpack"
FORMAT = "headrace.drift"
VERSION = 1
MOST_BYTES = 16 << 20
MOST_FEATURES = 4096
MOST_BINS = 4096


def encode(reference: Reference) -> bytes:
    features = []
    for each in reference.features:
        table = dataclasses.asdict(each)
        table["feature"] = {key: value.value if hasattr(value, "value") else value for key, value in table["feature"].items()}
        features.append({key: list(value) if isinstance(value, tuple) else value for key, value in table.items()})
    calibration = dataclasses.asdict(reference.calibration) if reference.calibration is not None else None
    packed = msgpack.packb(
        {
            "format": FORMAT,
            "version": VERSION,
            "model": reference.model,
            "source": reference.source,
            "rows": reference.rows,
            "created": reference.created,
            "data_digest": reference.data_digest,
            "accuracy": reference.accuracy,
            "left_out": list(reference.left_out),
            "calibration": calibration,
            "features": features,
        }
    )
    assert isinstance(packed, bytes)
    return packed


def identified(reference: Reference) -> Reference:
    """The same with its digest, of the bytes that a file of it would have."""
    return dataclasses.replace(reference, digest=hashlib.sha256(encode(reference)).hexdigest())


def decode(data: bytes) -> Reference:
    """Raises LoadError with what was expected and what came."""
    if len(data) > MOST_BYTES:
        raise LoadError(f"{FILENAME}: expected at most {MOST_BYTES} bytes, got {len(data)}")
    try:
        table = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise LoadError(f"{FILENAME}: expected msgpack, got {len(data)} bytes that are none: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise LoadError(f"{FILENAME}: expected a map with format '{FORMAT}'")
    if table.get("version") != VERSION:
        raise LoadError(f"{FILENAME}: expected version {VERSION}, got {table.get('version')!r}: it is of a newer Headrace")
    features = _get(table, "features", list, "")
    if len(features) > MOST_FEATURES:
        raise LoadError(f"{FILENAME}: features: expected at most {MOST_FEATURES}, got {len(features)}")
    decoded = tuple([_feature(each, f"features[{position}]") for position, each in enumerate(features)])
    names = [(each.feature.side, each.feature.tensor, each.feature.name) for each in decoded]
    if len(set(names)) < len(names):
        raise LoadError(f"{FILENAME}: features: expected each of them once")
    return Reference(
        model=_get(table, "model", str, ""),
        source=_get(table, "source", str, ""),
        rows=_count(table, "rows", ""),
        features=decoded,
        left_out=tuple(_list(table, "left_out", str, "")),
        data_digest=_get(table, "data_digest", str, ""),
        created=_number(table, "created", ""),
        calibration=_calibration(table["calibration"]) if table.get("calibration") is not None else None,
        accuracy=_number(table, "accuracy", ""),
        digest=hashlib.sha256(data).hexdigest(),
    )


def check_fits(reference: Reference, signature: Signature) -> None:
    """Raises LoadError when it is of a model with other tensors, or watches what they do not have."""
    specs = {(Side.INPUT, spec.name): spec for spec in signature.inputs} | {(Side.OUTPUT, spec.name): spec for spec in signature.outputs}
    for each in reference.features:
        feature = each.feature
        spec = specs.get((feature.side, feature.tensor))
        if spec is None:
            there = ", ".join(sorted(name for side, name in specs if side is feature.side))
            raise LoadError(
                f"{FILENAME}: {feature.side.value} '{feature.tensor}' is not in model '{signature.model}', which has {there}: "
                "it was made for another model"
            )
        tail = spec.shape[1:] if signature.is_batching else spec.shape
        problem = _misfit(feature, tail, is_text=spec.datatype is DataType.BYTES)
        if problem:
            raise LoadError(f"{FILENAME}: {feature.side.value} feature '{feature.title}': {problem}")


def _misfit(feature: Feature, tail: tuple[int, ...], *, is_text: bool) -> str:
    """Why this cannot be got from rows of that shape, or nothing."""
    size = math.prod(tail) if -1 not in tail else -1
    if is_text and not (feature.kind is Kind.CATEGORICAL and feature.extract is Extract.COLUMN) and feature.extract is not Extract.LENGTH:
        return "expected a category, strings have no numbers"
    if feature.extract is Extract.COLUMN:
        return "" if feature.index < size else f"column {feature.index} of rows with {size if size >= 0 else 'any number of'} elements"
    if feature.extract in BY_CHANNEL and feature.index >= 0:
        channels = channels_of(tail)
        return "" if channels is not None and feature.index < channels[1] else f"channel {feature.index} of rows of shape {list(tail)}"
    if feature.extract is Extract.PROJECTION and not 0 < size <= MOST_PROJECTED:
        return f"a projection of rows of shape {list(tail)}"
    if feature.extract in OF_SCORES and not (len(tail) == 1 and feature.side is Side.OUTPUT):
        return f"scores of classes in rows of shape {list(tail)}"
    return ""


def _feature(table: object, where: str) -> FeatureReference:
    if not isinstance(table, dict) or not isinstance(table.get("feature"), dict):
        raise LoadError(f"{FILENAME}: {where}: expected a map with 'feature'")
    what = table["feature"]
    try:
        feature = Feature(
            Side(what.get("side")),
            _get(what, "tensor", str, where),
            _get(what, "name", str, where),
            Kind(what.get("kind")),
            Extract(what.get("extract")),
            _get(what, "index", int, where),
            _get(what, "is_logits", bool, where),
        )
    except ValueError as error:
        raise LoadError(f"{FILENAME}: {where}: {error}: unknown here") from None
    if feature.index < -1 or (feature.extract in (Extract.COLUMN, Extract.PROJECTION) and feature.index < 0):
        raise LoadError(f"{FILENAME}: {where}: index: expected at least 0, got {feature.index}")
    if feature.extract is Extract.PROJECTION and feature.index >= PROJECTIONS:
        raise LoadError(f"{FILENAME}: {where}: index: expected a projection below {PROJECTIONS}, got {feature.index}")
    edges = [float(edge) for edge in _list(table, "edges", (int, float), where)]
    categories = _list(table, "categories", str, where)
    counts = _list(table, "counts", int, where)
    bins = edges if feature.kind is Kind.NUMERIC else categories
    if len(counts) != len(bins) + 1 or len(counts) > MOST_BINS:
        raise LoadError(f"{FILENAME}: {where}: counts: expected {len(bins) + 1} (at most {MOST_BINS}), got {len(counts)}")
    if any(count < 0 or count >= 1 << 62 for count in counts):
        raise LoadError(f"{FILENAME}: {where}: counts: expected numbers of rows, got {min(counts)} to {max(counts)}")
    if not all(math.isfinite(edge) for edge in edges) or any(a >= b for a, b in pairwise(edges)):
        raise LoadError(f"{FILENAME}: {where}: edges: expected finite numbers that ascend")
    if len(set(categories)) < len(categories):
        raise LoadError(f"{FILENAME}: {where}: categories: expected each of them once")
    missing, infinite = _count(table, "missing", where), _count(table, "infinite", where)
    moments = [_number(table, key, where) for key in ("minimum", "maximum", "mean", "deviation")]
    return FeatureReference(feature, tuple(edges), tuple(categories), tuple(counts), missing, infinite, *moments)


def _calibration(table: object) -> Calibration:
    if not isinstance(table, dict):
        raise LoadError(f"{FILENAME}: calibration: expected a map")
    where = "calibration"
    edges = [float(each) for each in _list(table, "edges", (int, float), where)]
    accuracy = [float(each) for each in _list(table, "accuracy", (int, float), where)]
    if len(accuracy) != len(edges) + 1 or not all(0 <= each <= 1 for each in accuracy) or sorted(edges) != edges:
        raise LoadError(f"{FILENAME}: {where}: expected ascending edges and one more accuracies from 0 to 1")
    return Calibration(_get(table, "tensor", str, where), tuple(edges), tuple(accuracy), _count(table, "rows", where))


def _get(table: dict[str, Any], key: str, kind: type[Any], where: str) -> Any:
    value = table.get(key)
    if type(value) is not kind:
        place = f"{where}: {key}" if where else key
        raise LoadError(f"{FILENAME}: {place}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _list(table: dict[str, Any], key: str, kind: type[Any] | tuple[type[Any], ...], where: str) -> Sequence[Any]:
    values = _get(table, key, list, where)

    def allows(value: object) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    if not all(allows(value) for value in values):
        raise LoadError(f"{FILENAME}: {where}: {key}: expected a list of {kind}, got other values in it")
    return list(values)


def _number(table: dict[str, Any], key: str, where: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoadError(f"{FILENAME}: {where}: {key}: expected a finite number, got {value!r}")
    return float(value)


def _count(table: dict[str, Any], key: str, where: str) -> int:
    value: int = _get(table, key, int, where)
    if not 0 <= value < 1 << 62:
        raise LoadError(f"{FILENAME}: {where}: {key}: expected a number of rows, got {value}")
    return value
