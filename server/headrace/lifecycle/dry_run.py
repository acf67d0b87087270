"""What would be served, for `headrace serve --watch-dry-run`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headrace.lifecycle.policy import Key, select_versions
from headrace.sources.base import Listing, ModelRef

NOTHING = Listing({})


def plan(before: Listing, after: Listing) -> list[str]:
    """What a server that serves `before` would do when a source comes to offer `after`, a line each. Nothing is verified or opened."""
    lines: list[str] = []
    for name in sorted({*before.models, *after.models}):
        if name in after.errors:
            continue  # its versions stay as they are
        old, new = before.models.get(name), after.models.get(name)
        lines += _versions(name, old, new)
        lines += _labels(name, old, new)
    lines += [f"cannot take {name}: {reason}" for name, reason in sorted(after.errors.items()) if before.errors.get(name) != reason]
    return lines


def _versions(name: str, old: ModelRef | None, new: ModelRef | None) -> Iterator[str]:
    loaded, wanted = _selected(old), _selected(new)
    for key in sorted(wanted.keys() - loaded.keys()):
        again = " again, as its content has changed" if key.number in {other.number for other in loaded} else ""
        yield f"load {name}:{key.number}{again}, from {wanted[key]}"
    for key in sorted(loaded.keys() - wanted.keys()):
        if key.number not in {other.number for other in wanted}:
            yield f"unload {name}:{key.number}"
    if new is not None and new.versions and not wanted:
        there = ", ".join(map(str, sorted(new.versions)))
        yield f"serve nothing of {name}: version_policy '{new.config.version_policy}' selects none of {there}"


def _selected(model: ModelRef | None) -> Mapping[Key, str]:
    """Location by version."""
    if model is None:
        return {}
    labels = {**model.config.labels, **model.labels}
    numbers = {*select_versions(list(model.versions), model.config.version_policy), *(v for v in labels.values() if v in model.versions)}
    return {Key(number, model.versions[number].token): model.versions[number].location for number in numbers}


def _labels(name: str, old: ModelRef | None, new: ModelRef | None) -> Iterator[str]:
    before = {**old.config.labels, **old.labels} if old is not None else {}
    after = {**new.config.labels, **new.labels} if new is not None else {}
    for label in sorted({*before, *after}):
        if before.get(label) != after.get(label):
            yield f"label {name}@{label}: {before.get(label, 'none')} -> {after.get(label, 'none')}"
