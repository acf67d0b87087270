"""Pure: for which shapes a TensorRT engine is built, derived from the batch sizes that will come.

An engine holds one set of kernels for each optimisation profile, valid from its least to its largest shapes and timed at one between.
The batch of one has a profile of its own, as it is what runs when little is asked; larger ones share profiles by fours, so that no batch
runs kernels timed at one more than four times as large. Each is timed at its largest batch, which is what comes under load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.errors import LoadError
from headrace.signature import Shape, TensorSpec, format_shape

OPTION = "profile."
"""Before the name of an input, in the instance's options: its dimensions but the batch's, as "least;timed at;largest"."""
_FIRST_LIMIT = 8
_STEP = 4


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Of one input, with its batch dimension."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def covers(self, shape: Shape) -> bool:
        return len(shape) == len(self.minimum) and all(a <= n <= b for a, n, b in zip(self.minimum, shape, self.maximum, strict=True))


@dataclass(frozen=True, slots=True)
class Profile:
    """`rows`: the largest batch; 0 where nothing is batched."""

    inputs: Mapping[str, ShapeRange] = field(default_factory=dict)
    rows: int = 0

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        return all(name in shapes and given.covers(shapes[name]) for name, given in self.inputs.items())


def split_batches(largest: int, allowed: Sequence[int] = ()) -> list[tuple[int, int]]:
    """(least, largest) batch of each profile, ascending: 1, 2 to 8, then by fours; of `allowed` sizes only those that hold one.

    `largest` 0: nothing is batched, and there is none.
    """
    if not largest:
        return []
    ranges, least, limit = [(1, 1)], 2, _FIRST_LIMIT
    while least <= largest:
        ranges.append((least, min(limit, largest)))
        least, limit = limit + 1, limit * _STEP
    if not allowed:
        return ranges
    held = [[size for size in allowed if first <= size <= last] for first, last in ranges]
    return [(sizes[0], sizes[-1]) for sizes in held if sizes]


def derive_profiles(inputs: Sequence[TensorSpec], largest: int, allowed: Sequence[int], options: Mapping[str, str]) -> tuple[Profile, ...]:
    """Raises LoadError for a free dimension of which the options do not say how large it gets, and for options that fit no input."""
    _check_options(inputs, options)
    tails = {spec.name: _tail(spec, spec.shape[1:] if largest else spec.shape, options) for spec in inputs}
    if not largest:
        return (Profile(tails),)
    return tuple(
        Profile({name: _with_batch(least, most, tail) for name, tail in tails.items()}, most)
        for least, most in split_batches(largest, allowed)
    )


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The index of the first, and so the narrowest, that covers a batch of these shapes; None when none does."""
    return next((index for index, profile in enumerate(profiles) if profile.covers(shapes)), None)


def _with_batch(least: int, most: int, tail: ShapeRange) -> ShapeRange:
    return ShapeRange((least, *tail.minimum), (most, *tail.optimum), (most, *tail.maximum))


def _tail(spec: TensorSpec, shape: Shape, options: Mapping[str, str]) -> ShapeRange:
    text = options.get(OPTION + spec.name)
    if text is None:
        if -1 in shape:
            raise LoadError(
                f"input '{spec.name}' has free dimensions {format_shape(shape)}: TensorRT builds for a range; expected "
                f'[instances.options] "{OPTION}{spec.name}" = "{_example(shape)}" (least;timed at;largest, without the batch dimension), '
                "or a shape for it in model.toml"
            )
        return ShapeRange(shape, shape, shape)
    parts = [_decode_shape(spec.name, text, part) for part in text.split(";")]
    if len(parts) == 1:
        parts *= 3
    if len(parts) != 3:
        raise _misfit(spec.name, text, "one shape, or three separated by ';'")
    low, timed, high = parts
    if not len(low) == len(timed) == len(high) == len(shape):
        raise _misfit(spec.name, text, f"{len(shape)} dimensions, as the model has {format_shape(shape)} without the batch dimension")
    if not all(a <= b <= c for a, b, c in zip(low, timed, high, strict=True)):
        raise _misfit(spec.name, text, "no dimension less than in the shape before")
    if any(dim not in (-1, a) or dim not in (-1, c) for dim, a, c in zip(shape, low, high, strict=True)):
        raise _misfit(spec.name, text, f"the dimensions that the model fixes, {format_shape(shape)}")
    return ShapeRange(low, timed, high)


def _decode_shape(name: str, text: str, part: str) -> Shape:
    fields = [field.strip() for field in part.split("x")]
    if not all(field.isascii() and field.isdigit() and int(field) > 0 for field in fields):
        raise _misfit(name, text, "shapes such as 3x224x224, of whole numbers from 1")
    return tuple(int(field) for field in fields)


def _misfit(name: str, text: str, expected: str) -> LoadError:
    return LoadError(f"option '{OPTION}{name}': expected {expected}, got '{text}'")


def _example(shape: Shape) -> str:
    return ";".join("x".join(str(size if dim < 0 else dim) for dim in shape) for size in (1, 128, 512))


def _check_options(inputs: Sequence[TensorSpec], options: Mapping[str, str]) -> None:
    """A mistyped name would leave a dimension at another range than was meant."""
    known = [spec.name for spec in inputs]
    for option in options:
        if option.startswith(OPTION) and option.removeprefix(OPTION) not in known:
            raise LoadError(f"option '{option}': the model has no such input; it has {', '.join(known) or 'none'}")
