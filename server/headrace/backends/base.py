"""The contract between a model version and whatever runs it.

A Backend class is the adapter of one runtime; an instance of it is one loaded copy of a model on one device, with its own
worker thread. `load`, `warm` and `close` are called from that thread. So is `execute`, any number of times, but for tiny models on
the CPU, which run on whatever thread brings the request; never two calls at once. Nothing here knows of requests, queues or wire
formats: a backend sees arrays.

A device that works beside its host has a PipelinedBackend: `launch` gives it a batch and returns, so that the next one is gathered and
uploaded while it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from headrace.backends.processing import Processing
from headrace.config import InstanceConfig
from headrace.signature import Signature, TensorSpec

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ArtifactSignature:
    """What the model file itself says of its tensors. -1 is a free dimension; nothing is assumed about a batch axis.

    `graph`: equal for artifacts that differ in nothing but their weights; empty where that is not known.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graph: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What will be asked of an instance. `allowed`: the only batch sizes that come, ascending; empty: any up to the signature's.

    `signature` is what clients see; where `adopt` took something over, it differs from the `artifact`. `is_signed`: the version's files
    are those that a key which its model trusts has signed.
    """

    artifact: ArtifactSignature
    signature: Signature
    allowed: tuple[int, ...] = ()
    is_signed: bool = False


CPU = "cpu"
"""The name of the device that is always there."""


@dataclass(frozen=True, slots=True)
class DeviceSpace:
    """A device that an instance can be loaded onto, by its name in model.toml, e.g. cuda:1, and the bytes that are free there."""

    name: str
    free: int


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An input that lies in a device's memory, C-contiguous. Not to be written to. `owner` keeps it there: whoever reads it holds that
    until nothing on the device reads it any more."""

    device: str
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object


class Backend(ABC):
    """One runtime. Raises LoadError from `inspect` and `load`, BackendError from `execute`; both with the runtime's own reason."""

    name: ClassVar[str]
    """As in model.toml's `backend` and the entry point's name."""
    default_filename: ClassVar[str]
    """The file looked for in a version directory, e.g. model.onnx."""
    platform: ClassVar[str]
    """Triton's word for it in metadata, e.g. onnxruntime_onnx."""

    works_on_the_caller: ClassVar[bool] = False
    """Whether `execute` does its work, or an equal share of it, on the thread that calls it, so that the thread's CPU time tells what a
    batch costs, whatever else runs on the same cores."""

    accepts_device_inputs: ClassVar[bool] = False
    """Whether `lend` may be called."""

    def __init__(self, path: Path, instance: InstanceConfig) -> None:
        self.path = path
        self.instance = instance

    @classmethod  # noqa: B027  # of most artifacts nothing is ever run
    def check_trusted(cls, path: Path, instance: InstanceConfig, *, is_signed: bool) -> None:
        """Before anything else is done with the artifact at `path`. Raises LoadError where opening it would run code of whoever made it,
        and neither a signature nor the configuration says that this may be."""

    @classmethod
    @abstractmethod
    def inspect(cls, path: Path) -> ArtifactSignature:
        """Read the tensors of the artifact at `path`. May be slow; never called on the event loop."""

    @classmethod
    def graph_digest(cls, path: Path) -> str:
        """Equal for artifacts that differ in nothing but their weights, found without opening them; empty: cannot be told."""
        return ""

    @classmethod
    @abstractmethod
    def estimate_memory(cls, path: Path) -> int:
        """An upper bound in bytes of what one loaded instance takes, known before it is loaded."""

    @classmethod  # noqa: B027  # most runtimes have no such pool
    def share_threads(cls, threads: int) -> None:
        """Have all instances in this process compute on one pool of `threads`, now and for good. Called before any artifact is opened.

        Raises ConfigError when the process has another pool already, or the runtime cannot.
        """

    @classmethod
    def devices(cls, device: str) -> Sequence[DeviceSpace]:
        """Those among which the instances of a model whose model.toml says `device` are spread; each is then made with the name of its own
        one there. None: there is nothing to choose, and `device` stays as it is. May wake a driver; never called on the event loop.

        Raises LoadError when there is no such device.
        """
        return ()

    @property
    def device(self) -> str:
        """Where it runs, once it is loaded."""
        return CPU if self.instance.device == "auto" else self.instance.device

    @property
    def device_memory(self) -> int:
        """Bytes of the device's own memory that it was measured to take, loaded and warmed up. 0: none, or nobody knows."""
        return 0

    def adopt(self, processing: Processing) -> bool:
        """Before `load`: take over what model.toml has done to tensors before and after the model, on the device. The tensors of `execute`
        are then those that clients see. False: it is not done here, but around this backend, in numpy."""
        return False

    def expect(self, expected: Expected) -> None:  # noqa: B027  # most runtimes take what comes
        """Before `load`, on any thread: what will be asked of this instance."""

    def interrupt(self) -> None:  # noqa: B027  # most loads are short
        """From any thread, at any time: nobody wants the instance any more. A `load` that takes long ends, with LoadError."""

    @abstractmethod
    def load(self) -> None:
        """Take the device memory and make `execute` possible."""

    def warm(self, inputs: Mapping[str, Array]) -> None:
        """Run once on synthesised or recorded inputs so that the first real request pays for no lazy work."""
        self.execute(inputs, None)

    def shrink(self, inputs: Mapping[str, Array]) -> None:  # noqa: B027  # most runtimes hold nothing back
        """After the warm-up, with one row's inputs: give back the working memory that only the largest of its batches needed."""

    @abstractmethod
    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        """Run one batch and block until its outputs are in host memory.

        `inputs`: C-contiguous arrays by name, absent optional inputs left out. They may be read-only views of received
        messages and are the caller's again when this returns. `outputs`: names in the wanted order, None for all.
        Returned arrays are C-contiguous and owned by the caller. BYTES are object arrays of bytes or str; BF16 is uint16.
        """

    def lend(self, inputs: Mapping[str, DeviceArray]) -> None:
        """Right before an `execute` or `launch`, whose `inputs` then lack these: what a client has put on this instance's device. They
        may be read until that batch's outputs have been returned, or until it is released."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Nothing of the session may survive in a reference, traceback or global."""


class Pending(ABC):
    """A batch that a device has been given. `wait`, then `release`, once each and from one thread, not the one that launched it."""

    @abstractmethod
    def wait(self) -> list[Array]:
        """Block until the outputs are in host memory; the thread sleeps and holds no GIL. They may be read until `release`.

        Raises BackendError when the batch failed, DeviceLost when nothing will run on its device any more.
        """

    @abstractmethod
    def release(self) -> None:
        """The outputs have been read, or nobody will: the batch's buffers may take another one."""


class PipelinedBackend(Backend):
    """A backend with `lanes` sets of buffers, and so that many batches between `launch` and `release`. Never more: the caller counts."""

    lanes: ClassVar[int] = 2

    def stage(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        """Host memory of the next lane from which the device copies fastest, an array of exactly that shape and the input's datatype for
        each of the inputs that it has room for. What the next `launch` is given in them it need not copy first. Worker's thread."""
        return {}

    @abstractmethod
    def launch(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> Pending:
        """Give the device one batch and return without waiting for it. `inputs` and `outputs` as for `execute`, but that `inputs` may be
        read until the batch is released. Worker's thread.

        Raises BackendError or DeviceLost; then the lane is free again.
        """

    def execute(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> list[Array]:
        pending = self.launch(inputs, outputs)
        try:
            return [array.copy() for array in pending.wait()]
        finally:
            pending.release()


def select_file(directory: Path, filename: str) -> Path:
    """The artifact in a version directory; a directory of that name holds the file of the same name and its external data."""
    path = directory / filename
    return path / filename if path.is_dir() else path


BackendRegistry = Mapping[str, type[Backend]]


__all__ = [
    "CPU",
    "Array",
    "ArtifactSignature",
    "Backend",
    "BackendRegistry",
    "DeviceArray",
    "DeviceSpace",
    "Expected",
    "Pending",
    "PipelinedBackend",
    "select_file",
]
