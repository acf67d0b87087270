"""The lanes in which batches pass through a GPU.

An instance has three streams, so that what one batch uploads, another computes and a third downloads goes on at once, and a lane for
each of these batches:

    upload    H2D of the lane's input slab, then `uploaded`
    compute   waits for `uploaded`, runs the model and the kernels around it, then `computed`
    download  waits for `computed`, D2H of the lane's output slab, then `done`, which a thread sleeps on

Rule for changing this file: nothing here waits for a device but `Completion.wait`, and what frees memory.
"""

from __future__ import annotations

import collections
import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.backends.base import Array, Pending
from headrace.backends.cuda import Gpu, device_error
from headrace.errors import BackendError

if TYPE_CHECKING:
    from cuda.core import Stream

ALIGNMENT = 256
"""Bytes at which tensors begin in a slab: what cudaMalloc aligns to, and so what every kernel may count on."""
SLAB_LIMIT = 1 << 30
"""The most that one slab grows to. A lane has up to three; pinned memory is taken from the whole machine."""
SMALLEST_SLAB = 1 << 16


# -- slabs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in a slab."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors one behind the other, each aligned. `size`: up to the end of the last."""

    places: Mapping[str, Place]
    size: int


def lay_out(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> Layout:
    """Shape and type of each tensor to their places, in the order given."""
    places, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        places[name] = place = Place(-(-end // ALIGNMENT) * ALIGNMENT, shape, dtype)
        end = place.offset + place.size
    return Layout(places, end)


class Slab:
    """Memory on a device and, with `on_host`, as much pinned memory that mirrors it.

    Owns both. They grow by need up to `limit` and never shrink; `generation` changes when they move, and when there was
    no memory to move to.
    """

    def __init__(self, gpu: Gpu, *, on_host: bool = True, limit: int = SLAB_LIMIT) -> None:
        self.size = 0
        self.generation = 0
        self._gpu = gpu
        self._on_host = on_host
        self._limit = limit
        self._device = 0
        self._pinned = 0
        self._host: Array = np.empty(0, np.uint8)

    def __repr__(self) -> str:
        return f"Slab({self.size} bytes, generation {self.generation})"

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes. What was in it is lost if it moves, and nothing may be in flight in it.

        Raises BackendError beyond the limit, CudaError where there is no memory left; then the slab is empty.
        """
        if size <= self.size:
            return
        if size > self._limit:
            raise BackendError(
                f"a batch whose tensors take {size} bytes: expected at most {self._limit}, which a device buffer may grow to"
            )
        grown = min(max(size, 2 * self.size, SMALLEST_SLAB), self._limit)
        self.generation += 1  # before: also when no larger one can be had, nothing may use what is about to be freed
        self.close()
        self._device = self._gpu.allocate(grown)
        if self._on_host:
            self._pinned = self._gpu.allocate_pinned(grown)
            self._host = np.ctypeslib.as_array((ctypes.c_uint8 * grown).from_address(self._pinned))
        self.size = grown

    def array(self, place: Place) -> Array:
        """Its host memory, where there is any. Not to be touched after the slab has moved or closed."""
        flat = self._host[place.offset : place.offset + place.size]
        return flat.view(place.dtype).reshape(place.shape)

    def address(self, place: Place) -> int:
        """Its device memory."""
        return self._device + place.offset

    def upload(self, size: int, stream: Stream) -> None:
        if size:
            self._gpu.copy(self._device, self._pinned, size, stream)

    def download(self, size: int, stream: Stream) -> None:
        if size:
            self._gpu.copy(self._pinned, self._device, size, stream)

    def download_from(self, address: int, place: Place, stream: Stream) -> None:
        """Of one tensor that lies elsewhere on the device."""
        if place.size:
            self._gpu.copy(self._pinned + place.offset, address, place.size, stream)

    def close(self) -> None:
        """Give the memory back. Nothing may be in flight in it."""
        device, pinned = self._device, self._pinned
        self._device = self._pinned = self.size = 0
        self._host = np.empty(0, np.uint8)
        if device:
            self._gpu.free(device)
        if pinned:
            self._gpu.free_pinned(pinned)


# -- lanes -------------------------------------------------------------------------------------------------------------


class Streams:
    """The three streams of one instance, for all of its lanes: batches keep their order in each of them."""

    def __init__(self, gpu: Gpu) -> None:
        self.upload = gpu.create_stream()
        self.compute = gpu.create_stream()
        self.download = gpu.create_stream()

    def sync(self) -> None:
        """Wait until all of it is done."""
        for stream in (self.upload, self.compute, self.download):
            stream.sync()

    def close(self) -> None:
        for stream in (self.upload, self.compute, self.download):
            stream.close()


class Lane:
    """What one batch has for itself from `launch` to `release`. Owns its slabs and events; used by one batch at a time.

    `inputs` and `outputs` are mirrored on the host. `scratch` is not: tensors between the model and the kernels around it.
    """

    def __init__(self, gpu: Gpu, streams: Streams, index: int, limit: int = SLAB_LIMIT) -> None:
        self.index = index
        self.gpu = gpu
        self.streams = streams
        self.inputs = Slab(gpu, limit=limit)
        self.outputs = Slab(gpu, limit=limit)
        self.scratch = Slab(gpu, on_host=False, limit=limit)
        self.uploaded = gpu.create_event()
        self.computed = gpu.create_event()
        self.done = gpu.create_event()

    def __repr__(self) -> str:
        return f"Lane({self.index}, inputs={self.inputs.size}, outputs={self.outputs.size}, scratch={self.scratch.size})"

    @property
    def generation(self) -> int:
        """Changes when any address in the lane does."""
        return self.inputs.generation + self.outputs.generation + self.scratch.generation

    def upload(self, size: int, copies: Sequence[tuple[int, int, int]] = ()) -> None:
        """Queue the copy of the input slab's first bytes, then `copies` within the device, each (target, source, size), and have what is
        computed from now on wait for all of it."""
        streams = self.streams
        self.inputs.upload(size, streams.upload)
        for target, source, length in copies:
            self.gpu.copy(target, source, length, streams.upload)
        streams.upload.record(self.uploaded)
        streams.compute.wait(self.uploaded)

    def download(self, size: int) -> None:
        """Queue the copy of the output slab's first bytes after all that has been queued to compute; the batch is done after it."""
        streams = self.streams
        streams.compute.record(self.computed)
        streams.download.wait(self.computed)
        self.outputs.download(size, streams.download)
        streams.download.record(self.done)

    def close(self) -> None:
        for slab in (self.inputs, self.outputs, self.scratch):
            slab.close()
        for event in (self.uploaded, self.computed, self.done):
            event.close()


class Lanes:
    """The lanes of one instance. Owns them, and which are free, in the order in which they became so.

    `first` and `take` on the thread that launches, `give_back` on any.
    """

    def __init__(self, gpu: Gpu, count: int, limit: int = SLAB_LIMIT) -> None:
        self.gpu = gpu
        self.streams = Streams(gpu)
        self.all = tuple(Lane(gpu, self.streams, index, limit) for index in range(count))
        self._free = collections.deque(self.all)

    def __repr__(self) -> str:
        return f"Lanes({len(self._free)} of {len(self.all)} free)"

    @property
    def first(self) -> Lane | None:
        """The one that `take` gives next."""
        return self._free[0] if self._free else None

    def take(self) -> Lane:
        if not self._free:
            raise BackendError(f"expected at most {len(self.all)} batches between launch and release, got one more")
        return self._free.popleft()

    def give_back(self, lane: Lane) -> None:
        self._free.append(lane)

    def give_back_failed(self, lane: Lane) -> None:
        """The same for one whose batch could not be launched whole: first what of it was queued ends, as it reads the lane's memory."""
        try:
            self.streams.sync()
        except Exception:  # lost: then nothing reads it any more, and the failure that brought us here says so
            pass
        self.give_back(lane)

    def close(self) -> None:
        """Wait for what is in flight and give everything back. A lost device has nothing to give back, and says so in the exception."""
        try:
            self.streams.sync()
        finally:
            for lane in self.all:
                lane.close()
            self.streams.close()


class Completion(Pending):
    """The batch in a lane whose `done` has been queued. `arrays`: views of its output slab; `held`: what must live until then."""

    def __init__(self, subject: str, lanes: Lanes, lane: Lane, arrays: Sequence[Array], held: object = None) -> None:
        self._subject = subject
        self._lanes = lanes
        self._lane = lane
        self._arrays = list(arrays)
        self._held = held

    def wait(self) -> list[Array]:
        try:
            self._lane.gpu.make_current()
            self._lane.done.sync()
        except Exception as error:  # CUDA's errors have no common base with ours
            failure = device_error(self._subject, error)
        else:
            return self._arrays
        raise failure

    def release(self) -> None:
        self._arrays, self._held = [], None
        self._lanes.give_back(self._lane)


__all__ = ["ALIGNMENT", "SLAB_LIMIT", "Completion", "Lane", "Lanes", "Layout", "Place", "Slab", "Streams", "lay_out"]
