"""On which device each instance is loaded. Pure: a decision from numbers, nothing is asked or kept here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.backends.base import DeviceSpace


@dataclass(frozen=True, slots=True)
class Placed:
    """An instance that has a device. `needed`: bytes that it is still to take there; 0 once they are missing from what is free."""

    model: str
    device: str
    needed: int = 0


def choose_devices(model: str, count: int, needed: int, spaces: Sequence[DeviceSpace], placed: Iterable[Placed]) -> list[str]:
    """The device of each of `count` instances that take `needed` bytes each. `spaces`: at least one.

    Of the devices that have room (of all, when none has: the load will say what is missing), in this order: the one with the fewest
    of these instances, so that a model gets all devices; with the fewest of other models', so that no device idles beside a busy one;
    with the fewest of this model's other versions', which at a swap soon leave, so where they are does not count against a device
    more than its neighbours do; with the most free memory; the first.
    """
    free = {space.name: space.free for space in spaces}
    own, others, former = Counter[str](), Counter[str](), Counter[str]()
    for each in placed:
        (former if each.model == model else others)[each.device] += 1
        if each.device in free:
            free[each.device] -= each.needed
    chosen = []
    for _ in range(count):
        best = min(free, key=lambda name: (free[name] < needed, own[name], others[name], former[name], -free[name]))
        own[best] += 1
        free[best] -= needed
        chosen.append(best)
    return chosen
