"""What values an input may have, as model.toml says or as its reference has seen: counted, or the request refused.

Only inputs of which something is said are looked at; of those that are all right the cost is one pass or two over their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.batching.assemble import as_array
from headrace.config import TensorConfig
from headrace.drift.extraction import as_numbers, as_text, to_bf16
from headrace.drift.features import Extract, Side
from headrace.drift.reference import Reference
from headrace.errors import ConfigError, InvalidRequest, LoadError
from headrace.lifecycle.effective import EffectiveModel
from headrace.requests import InputTensor
from headrace.signature import DataType, Signature, TensorSpec

Array = NDArray[Any]
Count = Callable[[str, str, str, int], None]
"""(tensor, problem, action, values)"""

NOT_FINITE, BELOW, ABOVE, NOT_ALLOWED = "not_finite", "below", "above", "not_allowed"
COUNTED, REFUSED = "counted", "refused"
MOST_TEXT = 100
"""Characters of a value that an error quotes."""


class ValueChecks:
    """Of one version's inputs. Owns nothing; any thread."""

    def __init__(self, model: str, checks: Sequence[_Check], count: Count) -> None:
        self._model = model
        self._checks = checks
        self._count = count
        # From the start: a rate over a series that appears with its first problem misses that one.
        for check in checks:
            for problem in check.problems:
                count(check.spec.name, problem, check.action, 0)

    def __repr__(self) -> str:
        return f"ValueChecks({', '.join([check.spec.name for check in self._checks])})"

    def look_at(self, inputs: Sequence[InputTensor | None], request_id: str) -> None:
        """Inputs in the signature's order. Raises InvalidRequest with the first value that is refused."""
        for check in self._checks:
            tensor = inputs[check.position]
            if tensor is None:
                continue
            for problem, places in check.find(as_array(check.spec, tensor)):
                self._count(check.spec.name, problem, check.action, int(places.sum()))
                if check.action == REFUSED:
                    who = f"[request id: {request_id or '<id_unknown>'}] inference input '{check.spec.name}' for model '{self._model}'"
                    raise InvalidRequest(who + check.describe(problem, as_array(check.spec, tensor), places))


@dataclass(frozen=True, slots=True)
class _Check:
    """`low`, `high`: of all elements, or of each element of a row; infinite where there is none. `allowed`: as text."""

    position: int
    spec: TensorSpec
    action: str
    is_finite: bool
    low: Array
    high: Array
    allowed: frozenset[str]
    columns: tuple[str, ...]
    is_batching: bool

    @property
    def problems(self) -> Iterator[str]:
        if self.is_finite:
            yield NOT_FINITE
        if (self.low > -np.inf).any():
            yield BELOW
        if (self.high < np.inf).any():
            yield ABOVE
        if self.allowed:
            yield NOT_ALLOWED

    def find(self, array: Array) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Each problem that there is, with where it is."""
        if self.allowed:
            texts = [as_text(value) in self.allowed for value in array.ravel().tolist()]
            if not all(texts):
                yield NOT_ALLOWED, ~np.array(texts).reshape(array.shape)
        if array.dtype.kind == "O":
            return
        array = as_numbers(array, is_bf16=self.spec.datatype is DataType.BF16)
        if self.is_finite:
            finite = np.isfinite(array)
            if not finite.all():
                yield NOT_FINITE, ~finite
        rows = array.reshape(-1, *self.low.shape) if self.low.ndim else array
        # NaN is neither below nor above: `finite` is what tells of it.
        for problem, places in ((BELOW, rows < self.low), (ABOVE, rows > self.high)):
            if places.any():
                yield problem, np.asarray(places).reshape(array.shape)

    def describe(self, problem: str, array: Array, places: NDArray[np.bool_]) -> str:
        """Of the first place."""
        place = int(places.argmax())
        size = places.size // max(len(places), 1) if self.is_batching else places.size
        row, element = divmod(place, max(size, 1))
        where = f", row {row}" if self.is_batching else ""
        where += f", '{self.columns[element]}'" if self.columns else f", element {element}" if size > 1 else ""
        value = (as_numbers(array, is_bf16=True) if self.spec.datatype is DataType.BF16 else array).ravel()[place]
        return f"{where}: expected {self._expected(problem, element)}, got {_short(as_text(value))}"

    def _expected(self, problem: str, element: int) -> str:
        if problem == NOT_FINITE:
            return "finite numbers"
        if problem == NOT_ALLOWED:
            some = sorted(self.allowed)
            return f"one of {', '.join(map(_short, some[:10]))}{', ...' if len(some) > 10 else ''}"
        low, high = (float(limit[element] if limit.ndim else limit) for limit in (self.low, self.high))
        if high == np.inf:
            return f"at least {low:.9g}"
        return f"{low:.9g} to {high:.9g}" if low > -np.inf else f"at most {high:.9g}"


def _short(text: str) -> str:
    """What a client sends can be of any length."""
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "..."


def make_checks(effective: EffectiveModel, reference: Reference | None, count: Count) -> ValueChecks | None:
    """None where nothing is said of any input. Raises ConfigError for what cannot be checked, LoadError for limits of no reference."""
    settings = {each.name: each for each in effective.config.inputs}
    checks = []
    for index, spec in enumerate(effective.signature.inputs):
        setting = settings.get(spec.name)
        if setting is not None and _says_something(setting):
            _check_settings(spec, setting, effective.signature)
            checks.append(_make(index, spec, setting, effective.signature, reference))
    return ValueChecks(effective.config.name, checks, count) if checks else None


def _says_something(setting: TensorConfig) -> bool:
    limits = setting.minimum, setting.maximum
    return limits != (None, None) or setting.finite or bool(setting.categories) or setting.limits != "none"


def _check_settings(spec: TensorSpec, setting: TensorConfig, signature: Signature) -> None:
    tail = spec.shape[1:] if signature.is_batching else spec.shape
    size = -1 if -1 in tail else int(np.prod(tail))
    if setting.columns and len(setting.columns) != size:
        raise ConfigError(f"input '{spec.name}': columns: expected {max(size, 0)} names, got {len(setting.columns)}")
    has_numbers = spec.datatype not in (DataType.BYTES, DataType.BOOL)
    is_whole = spec.datatype.dtype.kind in "iu" and spec.datatype is not DataType.BF16
    given: Mapping[str, tuple[bool, bool, str]] = {
        "minimum": (setting.minimum is not None, has_numbers, "numbers"),
        "maximum": (setting.maximum is not None, has_numbers, "numbers"),
        "finite": (setting.finite, has_numbers and not is_whole, "floating-point numbers"),
        "limits": (setting.limits != "none", has_numbers, "numbers"),
        "categories": (bool(setting.categories), is_whole or not has_numbers, "integers, strings or booleans"),
    }
    for key, (is_set, fits, expected) in given.items():
        if is_set and not fits:
            raise ConfigError(f"input '{spec.name}': {key}: expected {expected}, it has {spec.datatype.value}")
    if setting.minimum is not None and setting.maximum is not None and setting.minimum > setting.maximum:
        raise ConfigError(f"input '{spec.name}': minimum: expected at most the maximum {setting.maximum:g}, got {setting.minimum:g}")


def _make(index: int, spec: TensorSpec, setting: TensorConfig, signature: Signature, reference: Reference | None) -> _Check:
    low = _as_held(-np.inf if setting.minimum is None else setting.minimum, spec.datatype)
    high = _as_held(np.inf if setting.maximum is None else setting.maximum, spec.datatype)
    if setting.limits == "reference":
        low, high = _seen(spec, low, high, signature, reference)
    action = REFUSED if setting.on_invalid == "refuse" else COUNTED
    columns = setting.columns
    return _Check(index, spec, action, setting.finite, low, high, frozenset(setting.categories), columns, signature.is_batching)


def _as_held(limit: float, datatype: DataType) -> Array:
    """As the tensor's type holds it: 0.1 as a client that has 0.1 sends it."""
    if datatype is DataType.BF16:
        return np.asarray(as_numbers(to_bf16(np.array([limit], np.float32)), is_bf16=True)[0], np.float64)
    return np.array(limit, datatype.dtype).astype(np.float64) if datatype.dtype.kind == "f" else np.array(limit)


def _seen(spec: TensorSpec, low: Array, high: Array, signature: Signature, reference: Reference | None) -> tuple[Array, Array]:
    """The range that the reference has seen of each element that it watches by itself, within what is set anyway."""
    if reference is None:
        raise LoadError(
            f"input '{spec.name}': limits 'reference': expected drift.msgpack beside the model's file, and [drift] reference 'auto' or "
            "'file', by which it is read"
        )
    watched = [
        each
        for each in reference.features
        if (each.feature.side, each.feature.tensor, each.feature.extract) == (Side.INPUT, spec.name, Extract.COLUMN) and each.is_numeric
    ]
    tail = spec.shape[1:] if signature.is_batching else spec.shape
    if not watched or -1 in tail:
        raise LoadError(f"input '{spec.name}': limits 'reference': expected columns of it as numbers in drift.msgpack, which has none")
    size = int(np.prod(tail))
    lows, highs = np.full(size, low), np.full(size, high)
    for each in watched:
        lows[each.feature.index] = max(lows[each.feature.index], each.minimum)
        highs[each.feature.index] = min(highs[each.feature.index], each.maximum)
    return lows, highs
