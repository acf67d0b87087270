"""What looks at a version's batches from when it is live until it is unloaded: shapes only."""

from __future__ import annotations

from typing import Protocol

from headrace.batching.observer import Observer
from headrace.lifecycle.effective import EffectiveModel


class Attached(Observer, Protocol):
    def close(self) -> None:
        """The version goes. Batches may still come that ran before."""


class Attachment(Protocol):
    """Something of the server that has a part in each version, and knows them. Event loop only."""

    def attach(self, version: int, effective: EffectiveModel) -> Attached | None:
        """None where it does not look at this one. Called when the instances are about to serve; never raises."""
