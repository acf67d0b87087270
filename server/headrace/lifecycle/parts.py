"""What every model needs of the server that it is in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.backends.base import BackendRegistry
from headrace.backends.worker import Worker
from headrace.batching.batcher import Schedule, Timer
from headrace.drift.monitor import DriftMonitors
from headrace.errors import DeviceLost
from headrace.lifecycle.attachments import Attachment
from headrace.lifecycle.devices import Devices
from headrace.lifecycle.events import EventLog
from headrace.lifecycle.tasks import Tasks
from headrace.lifecycle.version import ModelVersion
from headrace.telemetry.records import RequestRecords


@dataclass(frozen=True, slots=True)
class Parts:
    """`slots`: versions that are fetched and loaded at a time. `drain_grace`, `pause`: seconds, see ModelVersion. `notify` after any
    change, `unloaded` with each version that is gone, `lost` with an instance whose device, by its name, runs nothing any more."""

    backends: BackendRegistry
    timer: Callable[[], Timer]
    schedule: Schedule
    slots: asyncio.Semaphore
    tasks: Tasks
    events: EventLog
    records: RequestRecords | None
    drift: DriftMonitors | None
    attachments: Sequence[Attachment]
    devices: Devices
    drain_grace: float
    pause: float
    notify: Callable[[], None]
    unloaded: Callable[[ModelVersion], None]
    lost: Callable[[ModelVersion, Worker, str, DeviceLost], None]
