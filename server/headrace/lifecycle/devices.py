"""What the versions have on which device, which devices are lost, and how much their batches hold each other up there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.backends.base import CPU, DeviceSpace
from headrace.batching.latency import Interference, JointInterference, Neighbours
from headrace.errors import DeviceLost
from headrace.lifecycle.placement import Placed, choose_devices


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one version has on one device: `instances` that serve, and the `memory` in bytes that they were measured to take there."""

    model: str
    version: int
    device: str
    instances: int
    memory: int


class Devices:
    """Owns the places of all versions' instances, the interference of each device, and the devices that are lost. Event loop only.

    A version is known by its model and number and an `owner` of its own, as two of one number may be there at a time.
    """

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        """Why, by device. It stays so: a device whose driver gave up is back only in a new process."""
        self._interference: defaultdict[str, Interference] = defaultdict(Interference)
        self._placed: dict[object, list[Placed]] = {}
        self._uses: dict[object, list[DeviceUse]] = {}

    def __repr__(self) -> str:
        instances = Counter(each.device for placed in self._placed.values() for each in placed)
        return f"Devices({dict(instances)}, lost={sorted(self.lost)})"

    def interference(self, devices: Iterable[str]) -> Neighbours:
        """For a version whose instances are on these."""
        parts = [self._interference[device] for device in sorted(set(devices))]
        return parts[0] if len(parts) == 1 else JointInterference(parts)

    def place(self, owner: object, model: str, count: int, device: str, needed: int, spaces: Sequence[DeviceSpace]) -> list[str]:
        """The device of each instance, kept for the owner until it is told otherwise. `device` is as in model.toml, `spaces` what the
        backend says of it, `needed` the bytes of an instance. Raises DeviceLost when no device is left for them."""
        self.release(owner)
        left = [space for space in spaces if space.name not in self.lost]
        if left:
            names = choose_devices(model, count, needed, left, [each for placed in self._placed.values() for each in placed])
        elif device == "auto":
            names = [CPU if spaces else device] * count
        elif spaces or device in self.lost:
            gone = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.lost.items()))
            raise DeviceLost(f"device '{device}': none is left that works; it takes a new start of the server ({gone})")
        else:
            names = [device] * count
        self._placed[owner] = [Placed(model, name, needed) for name in names]
        return names

    def settle(self, owner: object, model: str, version: int, loaded: Sequence[tuple[str, int]]) -> None:
        """The instances are there: on which device each is, and the bytes it takes of its memory."""
        self._placed[owner] = [Placed(model, device) for device, _ in loaded]
        by_device: dict[str, list[int]] = {}
        for device, memory in loaded:
            by_device.setdefault(device, []).append(memory)
        self._uses[owner] = [DeviceUse(model, version, device, len(each), sum(each)) for device, each in by_device.items()]

    def drop(self, owner: object, device: str, count: int) -> None:
        """So many instances of a device have stopped serving. Their memory is given back, or went with the device."""
        for _ in range(count):
            place = next((each for each in self._placed.get(owner, ()) if each.device == device), None)
            if place is not None:
                self._placed[owner].remove(place)
        self._uses[owner] = [_without(use, count) if use.device == device else use for use in self._uses.get(owner, ())]

    def release(self, owner: object) -> None:
        self._placed.pop(owner, None)
        self._uses.pop(owner, None)

    def lose(self, device: str, reason: str) -> bool:
        """False when that was known."""
        is_new = device not in self.lost
        self.lost.setdefault(device, reason)
        return is_new

    def find_lost(self, devices: Iterable[str]) -> Mapping[str, str]:
        """Those of them that are lost, with the reason."""
        return {device: self.lost[device] for device in devices if device in self.lost}

    def uses(self) -> list[DeviceUse]:
        return [use for uses in self._uses.values() for use in uses]


def _without(use: DeviceUse, count: int) -> DeviceUse:
    left = max(use.instances - count, 0)
    return DeviceUse(use.model, use.version, use.device, left, use.memory * left // use.instances if use.instances else 0)
