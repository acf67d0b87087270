"""Whoever looks at batches that have run: drift, validation, capture. Shapes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from headrace.requests import Ticket

Array = NDArray[Any]


class RanBatch(NamedTuple):
    """A batch that succeeded. `arrays[i]` is the output `outputs[i]`; inputs may be padded beyond `rows`, and outputs with them.

    Inputs can be views of what was received, and where they are writeable of shared memory, which its client may change at any time
    from now on: who keeps those copies them. `done`: time.monotonic() when its answers were encoded. `is_lent`: arrays and inputs are
    buffers of the device's, and the next batch's after `look`.
    """

    tickets: Sequence[Ticket]
    rows: int
    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    arrays: Sequence[Array]
    done: float
    is_lent: bool = False

    def to_keep(self) -> RanBatch:
        """The batch, with arrays that nobody else writes to later on."""
        if not self.is_lent:
            return self
        inputs = {name: array.copy() for name, array in self.inputs.items()}
        return self._replace(inputs=inputs, arrays=[array.copy() for array in self.arrays], is_lent=False)


class Observer(Protocol):
    def look(self, batch: RanBatch) -> None:
        """Called on the thread that ran the batch, after its answers have left; what it costs delays the next one. Never raises."""
