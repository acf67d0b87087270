"""A backend on devices that a test breaks, all of them in the host's memory: what a lost device does to the server, but not to a driver."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from headrace.backends.base import Array, DeviceSpace
from headrace.errors import DeviceLost
from headrace.testing import FakeBackend


class DeviceBackend(FakeBackend):
    """y = x on `names`; what runs on one of `broken` raises DeviceLost, as it would for every later call. A negative value breaks
    the device that it comes to. `make_on` gives a class."""

    names: ClassVar[tuple[str, ...]] = ("cuda:0", "cuda:1")
    broken: ClassVar[set[str]]
    lost_batches: ClassVar[list[int]]
    """Rows of each batch that failed for it, without those of a warm-up."""
    closed: ClassVar[threading.Condition]

    @classmethod
    def make_on(cls, *names: str, **body: Any) -> type[DeviceBackend]:
        state = {"live": [], "broken": set(), "lost_batches": [], "names": names, **body}
        return type("DeviceBackend", (cls,), {"closed": threading.Condition(), **state})

    @classmethod
    def wait_for_live(cls, *devices: str) -> None:
        """Until those are the devices of all instances that are not closed. Blocks. Raises AssertionError."""
        with cls.closed:
            assert cls.closed.wait_for(lambda: {each.device for each in cls.live} == set(devices), 10), cls.live

    def close(self) -> None:
        super().close()
        with self.closed:
            self.closed.notify_all()

    @classmethod
    def devices(cls, device: str) -> Sequence[DeviceSpace]:
        return [DeviceSpace(name, 1 << 30) for name in cls.names if device in ("auto", "cuda", name)]

    @property
    def device_memory(self) -> int:
        return 1000 if self.device != "cpu" else 0

    def load(self) -> None:
        self._check()
        super().load()

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        if inputs["x"].flat[0] < 0:
            self.broken.add(self.device)
        if self.device in self.broken:
            self.lost_batches.append(len(inputs["x"]))
        self._check()
        return super().execute(inputs, outputs)

    def _check(self) -> None:
        if self.device in self.broken:
            raise DeviceLost(f"{self.device}: unspecified launch failure")
